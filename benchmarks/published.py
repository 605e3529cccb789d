"""A published record script, unmodified, on the images that the recipes are trained on, on the same GPU.

    git clone https://github.com/KellerJordan/cifar10-airbench published
    python benchmarks/published.py published/airbench94_muon.py --runs 20 --json docs/results/published-gpu.json

The script finds the store's images where it would keep those that it downloads, and is ended after the runs that are wanted: it
makes 200. Accuracies and times are those of the table that it prints, without its first run, which compiles. Its time is of
training alone, from the initialisation on; its own total has the augmented test in it. Nothing of it is part of this project.
"""

from __future__ import annotations

import argparse
import hashlib
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hpc_cifar import files
from hpc_cifar.data import bench
from hpc_cifar.data.store import Store

ON_CPU = " on the CPU"  # ends the name of what was run so
STATED = {  # by the heads of the scripts; accuracies with test-time augmentation, on lossless CIFAR-10
    "airbench94_muon": "94.01 % (n = 200) in 2.59 s on an A100",
    "airbench96_faster": "96.00 % (n = 200) in 27.3 s on an A100",
}


def write_images(store: Store, folder: Path) -> None:
    """Both parts as the published scripts keep them: uint8 (n, 32, 32, 3), int64 labels, names of the classes."""
    folder.mkdir(parents=True)
    for name, part in (("train.pt", store.train), ("test.pt", store.test)):
        images, labels = torch.from_numpy(part.images[:].copy()), torch.from_numpy(part.labels[:].astype("int64"))
        torch.save({"images": images, "labels": labels, "classes": list(store.classes)}, folder / name)


def rows(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    """The rows of the printed table, by the names in its head."""
    head: list[str] = []
    for line in lines:
        if not line.startswith("|"):
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if head:
            yield dict(zip(head, cells, strict=True))
        else:
            head = cells


def finished(table: Iterator[dict[str, str]], compiled: bool = False) -> Iterator[dict[str, float]]:
    """Accuracies, without and with test-time augmentation, and seconds of training and of all, of each run.

    Args:
        compiled: there is nothing to compile; else the first run does, and is left out.
    """
    last: dict[str, str] = {}
    for row in table:
        if row["epoch"] != "eval":
            last = row
            continue
        if compiled:
            clock = next(name for name in row if name.endswith("time_seconds"))
            yield {
                "test_accuracy": float(last["val_acc"]),
                "tta_accuracy": float(row["tta_val_acc"]),
                "train_seconds": float(last[clock]),
                "total_seconds": float(row[clock]),
            }
        compiled = True


def measure(script: Path, store: Store, runs: int, on_cpu: bool = False) -> Iterator[dict[str, float]]:
    """The figures of so many runs, each as it is finished.

    Args:
        on_cpu: see published_on_cpu.py.

    Raises:
        SystemExit: the script ended before; with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_images(store, Path(folder) / "cifar10")
        said: list[str] = []
        through = [str(Path(__file__).resolve().with_name("published_on_cpu.py"))] if on_cpu else []
        command = [sys.executable, "-u", *through, str(script.absolute())]
        child = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )

        def heard() -> Iterator[str]:
            for line in child.stdout or ():
                said.append(line)
                print(line, end="", flush=True)
                yield line

        count = 0
        try:
            for run in finished(rows(heard()), compiled=on_cpu):
                count += 1
                yield run
                if count == runs:
                    return
        finally:
            child.kill()
            child.wait()
    sys.exit(f"{script} ended after {count} of {runs} runs:\n{''.join(said[-20:])}")


def table(report: dict[str, Any]) -> list[str]:
    """A Markdown table: mean and standard deviation over the runs."""
    heads = (
        "script",
        "n",
        "test accuracy",
        "with augmentation",
        "training alone",
        "with the augmented test",
        "its authors state",
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, entry in report["scripts"].items():
        columns = {key: [run[key] for run in entry["runs"]] for key in entry["runs"][0]}
        script, on_cpu, _ = name.partition(ON_CPU)
        cells = [f"`{script}`{on_cpu}", str(len(entry["runs"]))]
        for key, values in columns.items():
            spread = statistics.stdev(values) if len(values) > 1 else None
            if key.endswith("accuracy"):
                cells.append(f"{statistics.mean(values):.2%}" + (f" ± {spread:.2%}" if spread is not None else ""))
            else:
                cells.append(f"{statistics.mean(values):.2f} s" + (f" ± {spread:.2f} s" if spread is not None else ""))
        lines.append(f"| {' | '.join([*cells, STATED.get(script, '-')])} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path, help="the published script")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--on-cpu", action="store_true", help="without a GPU, for its accuracy: published_on_cpu.py")
    parser.add_argument("--dataset", default="cifar10", help="the store whose images it gets")
    parser.add_argument("--json", type=Path, help="where the figures are added to")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the script is ended, too
    if not options.script.is_file():
        sys.exit(f"{options.script}: no such file; --help says where the scripts are published")
    store = Store.open(files.data_root(), options.dataset)
    hardware, name = bench.hardware(), options.script.stem
    if options.on_cpu:
        hardware.pop("gpu", None)
        name += ON_CPU
    facts = {"data": store.label, "hardware": hardware, "versions": bench.versions()}
    before = (files.read_json(options.json) or {}) if options.json else {}
    same = all(before.get(key) == value for key, value in facts.items())
    runs: list[dict[str, float]] = []
    entry: dict[str, Any] = {"sha256": hashlib.sha256(options.script.read_bytes()).hexdigest(), "runs": runs}
    if options.on_cpu:
        entry["on_cpu"] = "bf16 autocast around float32 weights in place of half precision, nothing compiled"
    report = {"scripts": {**(before["scripts"] if same else {}), name: entry}, **facts}
    for run in measure(options.script, store, options.runs, options.on_cpu):
        runs.append(run)
        if options.json:  # after each: what waits for it may end it at any time
            files.write_json(options.json.absolute(), report)
    print("\n".join(["", *table(report)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
