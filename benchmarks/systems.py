"""Train the published systems and put what their sources claim beside what was measured.

    python benchmarks/systems.py ann-1 cnn-3 --json docs/results/systems.json
    python benchmarks/systems.py --seeds 3 --json docs/results/systems.json        every system that has a claim
    python benchmarks/systems.py --show --json docs/results/systems.json           the table of what was measured

One after another, each in a process of its own on this machine, on the GPU if there is one. Runs lie in HPC_CIFAR_RUNS and are
continued if this program is started again; figures of runs that were not made with the present files are kept as they are.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from hpc_cifar import files
from hpc_cifar.config.claim import Claim, cell
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.config.load import load_experiment
from hpc_cifar.data import bench
from hpc_cifar.runs import Run
from hpc_cifar.track.rows import selected

JOBS = Path(__file__).resolve().parents[1] / "jobs"
FIGURES = ("train_accuracy", "train_loss", "val_accuracy", "val_loss", "test_accuracy", "test_loss")
# without the start of the process, its imports and its data; checkpoints are those of the last stretch alone
COST = ("epochs", "seconds", "restarts", "checkpoints", "checkpoint_seconds")


def claimed() -> list[str]:
    """Systems with a claim, in the order of the sources."""
    found = [(load_experiment(path), path.stem) for path in sorted(JOBS.glob("*.yaml"))]
    return [
        name for experiment, name in sorted(found, key=lambda pair: getattr(pair[0].claim, "source", "")) if experiment.claim
    ]


def train(job: Path, name: str, sets: list[str]) -> bool:
    """Whether it is trained to its end; what it said has been printed. A run that had ended before is not begun again."""
    run = Run(files.runs_root() / name)
    if run.finished() and run.experiment() == load_experiment(job, sets):
        return True
    changes = [part for change in sets for part in ("--set", change)]
    done = subprocess.run([sys.executable, "-m", "hpc_cifar", "train", str(job), "--name", name, *changes], check=False)
    return done.returncode == 0 and run.finished()


def on_the_gpu(experiment: Experiment) -> list[str]:
    """A job that asks for no GPU is trained on one where there is one."""
    if torch.cuda.is_available() and not experiment.resources.gpus_per_node:
        return ["resources.gpus_per_node=1", "resources.processes_per_node=null"]
    return []


def measured(run: Run) -> dict[str, Any]:
    """The figures of a finished run's selected epoch, and its test."""
    result = run.result() or {}
    rows = [row for row in files.read_json_lines(run.metrics_file) if row["kind"] == "epoch"]
    figures = {**selected(run.experiment(), rows), **result}
    # of the epochs alone, without validation and checkpoints; one that was interrupted counts at the rate of its last stretch
    training = [run.plan()["train_images"] / row["images_per_second"] for row in rows]
    return {
        "train_seconds": round(sum(training), 3),
        "warm_train_seconds": round(len(training) * statistics.median(training), 3),  # nor compilation, which the first have
        **{name: figures.get(name) for name in FIGURES},
        **{name: result.get(name) for name in (*COST, "tta_accuracy", "tta_loss", "data", "selected", "precision")},
        "device": run.state().get("device"),
        "processes": run.state().get("world_size"),
    }


def claim_of(entry: dict[str, Any]) -> Claim | None:
    """What the source of a system claims, as the figures were kept with."""
    return Claim.model_validate(entry["claim"]) if entry["claim"] else None


def lines(results: dict[str, Any]) -> list[str]:
    """A Markdown table: claimed / measured, mean and spread over the seeds."""
    table = ["| job | n | " + " | ".join(f"{name.replace('_', ' ')}" for name in FIGURES) + " | epochs | time |"]
    table.append("|---" * (len(FIGURES) + 4) + "|")
    for name, entry in results.items():
        cells, claim = [], claim_of(entry)
        for figure in FIGURES:
            values = [one[figure] for one in entry["measured"] if one[figure] is not None]
            mean = statistics.mean(values) if values else None
            spread = f" ± {cell(statistics.stdev(values), figure)}" if len(values) > 1 else ""
            cells.append(f"{cell(getattr(claim, figure, None), figure)} / {cell(mean, figure)}{spread}")
        epochs = statistics.mean(one["epochs"] for one in entry["measured"])
        seconds = statistics.mean(one["seconds"] for one in entry["measured"])
        when = f"{claim.hours * 60:.0f} min" if claim and claim.hours else "-"
        row = [
            name,
            str(len(entry["measured"])),
            *cells,
            f"{(claim and claim.epochs) or '-'} / {epochs:g}",
            f"{when} / {seconds:.0f} s",
        ]
        table.append("| " + " | ".join(row) + " |")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", help="names in jobs/; every one with a claim unless some are named")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each, from the file's seed on")
    parser.add_argument("--set", action="append", default=[], dest="sets", help="a.b=value, as for submit; noted in the result")
    parser.add_argument("--suffix", default="", help="word behind the names of runs, and of the jobs in the result")
    parser.add_argument("--json", type=Path, help="where the figures are added to")
    parser.add_argument("--again", action="store_true", help="also seeds that are in the JSON without a run here")
    parser.add_argument("--show", action="store_true", help="train nothing")
    options = parser.parse_args()
    kept = (files.read_json(options.json) or {}) if options.json else {}
    if options.show:
        print("\n".join(lines(kept.get("systems", {}))))
        return 0
    failed: list[str] = []
    suffix = f"-{options.suffix}" if options.suffix else ""
    results: dict[str, Any] = kept.get("systems", {})
    for name in options.jobs or claimed():
        experiment: Experiment = load_experiment(JOBS / f"{name}.yaml", options.sets)
        claim = experiment.claim.model_dump(exclude_none=True, exclude={"inferred"}) if experiment.claim else None
        entry = {"claim": claim, "set": options.sets, "hardware": bench.hardware(), "versions": bench.versions()}
        before = results.get(name + suffix, {})
        same = all(before.get(key) == value for key, value in entry.items())  # else its figures are of another kind
        found = {one["seed"]: one for one in before.get("measured", [])} if same else {}
        for seed in range(experiment.seed, experiment.seed + options.seeds):
            run = f"{name}{suffix}-s{seed}"
            if seed in found and not options.again and not (files.runs_root() / run).exists():
                continue  # measured on a machine that is gone
            if not train(JOBS / f"{name}.yaml", run, [*on_the_gpu(experiment), *options.sets, f"seed={seed}"]):
                failed.append(run)
                continue
            found[seed] = measured(Run(files.runs_root() / run)) | {"seed": seed}
            results[name + suffix] = entry | {"measured": [found[seed] for seed in sorted(found)]}
            if options.json:  # after each: a session may end at any time
                files.write_json(options.json.absolute(), {"systems": results})
        if not found:
            continue
        print("\n".join(lines({name + suffix: results[name + suffix]})), flush=True)
    print("\n".join(["", *lines(results)]))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
