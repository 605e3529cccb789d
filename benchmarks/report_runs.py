"""How much ``report``, ``status`` and ``list`` of many runs cost: copies of one run, other seeds, metrics of real length.

    python benchmarks/report_runs.py --runs 1000 --repeat 3 [--json OUT] [--commands report status list]

Nothing is trained. Every run has ``--epochs`` epochs of ``--rows`` rows each, a result, provenance, a Slurm job that has
ended and the manifest of a checkpoint, as a finished run leaves them. Each command is a process of its own, its output
thrown away; the fewest and the median of its processor seconds are told, beside the hardware. ``--package FOLDER`` measures
another checkout with the same runs, alternately.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hpc_cifar import files, runs
from hpc_cifar.config.load import load_experiment
from hpc_cifar.config.packaged import find_job

JOB = "quickstart"
COMMANDS = {
    "report": ["report", "--campaign", "many", "-o", "{folder}/report.html"],
    "report csv": ["report", "--campaign", "many", "--format", "csv"],
    "list": ["list", "--campaign", "many"],
    "status": ["status", "--json"],
}


def rows(epochs: int, each: int, seed: int, began: float) -> list[dict[str, Any]]:
    """Metrics of a run, as it writes them."""
    made: list[dict[str, Any]] = [
        {"kind": "event", "epoch": 0, "step": 0, "time": began, "event": "started", "world_size": 1, "device": "cuda:0"}
    ]
    for epoch in range(1, epochs + 1):
        for number in range(1, each + 1):
            step = (epoch - 1) * each * 10 + number * 10
            loss = 0.1 + 2.1 * math.exp(-step / 900) + 0.01 * math.sin(step + seed)
            figures = {"train_loss": loss, "train_accuracy": 1 - loss / 2.4, "lr": 0.1, "images_per_second": 31234.5}
            made.append({"kind": "step", "epoch": epoch, "step": step, "time": round(began + step / 7, 3), **figures})
        good = 0.94 - 0.4 * math.exp(-epoch / 20) + 0.002 * math.sin(epoch + seed)
        figures = {"train_loss": loss, "train_accuracy": good, "lr": 0.1, "images_per_second": 30123.4}
        figures |= {"val_loss": 1.2 - good, "val_accuracy": good - 0.01}
        made.append({"kind": "epoch", "epoch": epoch, "step": step, "time": round(began + step / 7, 3), **figures})
    made.append({"kind": "event", "epoch": epochs, "step": step, "time": began + step / 7 + 1, "event": "finished"})
    return made


def make(root: Path, count: int, epochs: int, each: int) -> None:
    """``count`` runs below ``root``, a tenth of them of each of ten rates."""
    first = load_experiment(find_job(JOB), [f"epochs={epochs}"])
    provenance = {
        "command": ["hpc-cifar", "submit", "jobs/quickstart.yaml"],
        "packages": {"torch": "2.15.0"},
        "git": {"commit": "0", "dirty": False},
    }
    for number in range(count):
        optimizer = first.optimizer.model_copy(update={"lr": round(0.1 + number % 10 / 100, 3)})
        tracking = first.tracking.model_copy(update={"group": "many"})
        one = first.model_copy(update={"seed": number // 10, "optimizer": optimizer, "tracking": tracking})
        plan = {"batch_size": 128, "train_images": 45000, "steps_per_epoch": each * 10, "total_steps": each * 10 * epochs}
        run = runs.create(root, f"{one.name}-20261101-{number:06}-{number:04x}", one, plan, provenance, durable=False)
        run.add_job(executor="slurm", job_id=str(1000 + number))
        made = rows(epochs, each, number, 1.79e9 + number)
        run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in made))
        *_, last, end = made
        about = {"state": "finished", "epoch": epochs, "step": end["step"], "restarts": 0, "gpu_hours": 0.5, "seconds": 1800.0}
        write_state = getattr(run, "update_state", None) or run.write_state  # an older version's
        write_state(**about, world_size=1, device="cuda", total_steps=end["step"], epochs=epochs)
        done = {
            **about,
            "test_accuracy": last["val_accuracy"] - 0.005,
            "test_loss": 0.3,
            "epochs": epochs,
            "steps": end["step"],
        }
        files.write_json(run.result_file, {**done, "data": "CIFAR-10"}, durable=False)
        checkpoint = run.checkpoints / f"step-{end['step']:08d}"
        checkpoint.mkdir()
        metrics = {name: value for name, value in last.items() if isinstance(value, float) and name != "time"}
        said = {
            "format": 1,
            "step": end["step"],
            "epoch": epochs,
            "whole_epoch": True,
            "bytes": 1,
            "sha256": "",
            "best_step": None,
        }
        said |= {"metrics": metrics, "experiment": one.model_dump(mode="json")}
        files.write_json(checkpoint / "manifest.json", said, durable=False)
        (run.checkpoints / "latest").symlink_to(checkpoint.name)


def measure(command: list[str], folder: Path, package: Path | None, repeat: int) -> list[float]:
    """Processor seconds of each call and its children, which other work on the machine changes little."""
    environment = {**os.environ, "HPC_CIFAR_RUNS": str(folder / "runs")}
    if package is not None:
        environment |= {"PYTHONPATH": str(package), "PYTHONSAFEPATH": "1"}
    words = [sys.executable, "-m", "hpc_cifar", *(word.format(folder=folder) for word in command)]
    taken = []
    for _ in range(repeat):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)}: {done.stderr[-2000:]}")
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--rows", type=int, default=10, help="rows of steps an epoch")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=["report"])
    parser.add_argument("--package", type=Path, help="another checkout, measured alternately")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="keep the runs here, and use those that are there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hpc-cifar-bench-") as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "runs").is_dir():
            (folder / "runs").mkdir(parents=True)
            if options.package is None:
                make(folder / "runs", options.runs, options.epochs, options.rows)
            else:  # an older version may not read what this one writes
                numbers = f"{options.runs}, {options.epochs}, {options.rows}"
                call = f"import report_runs as r; r.make(r.Path({str(folder / 'runs')!r}), {numbers})"
                paths = os.pathsep.join((str(options.package.resolve()), str(Path(__file__).parent)))
                subprocess.run([sys.executable, "-P", "-c", call], env={**os.environ, "PYTHONPATH": paths}, check=True)
        places = {"here": None} if options.package is None else {"here": None, "there": options.package}
        found: dict[str, dict[str, list[float]]] = {}
        for name in options.commands:
            found[name] = {place: [] for place in places}
            for _ in range(options.repeat):
                for place, package in places.items():
                    found[name][place] += measure(COMMANDS[name], folder, package, 1)
            for place, taken in found[name].items():
                print(f"{name}, {place}: fewest {min(taken):.2f} s, median {statistics.median(taken):.2f} s (n = {len(taken)})")
    about = {"runs": options.runs, "epochs": options.epochs, "rows_per_epoch": options.rows, "seconds": found}
    about |= {"processors": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    print(f"{options.runs} runs of {options.epochs} epochs; {os.cpu_count()} processors, Python {platform.python_version()}")
    if options.json:
        files.write_json(options.json.absolute(), about)


if __name__ == "__main__":
    main()
