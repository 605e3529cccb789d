"""How long after its start a preempted job trains again, stage by stage, beside a plain script's.

    python benchmarks/restart.py --json docs/results/restart-2-cores.json
    python benchmarks/restart.py --cold                 neither torch nor data in the page cache, as on a new node

Both go on from a checkpoint of deep300's network and make one step of 64 images. The ranks are started as Slurm starts them,
without torchrun, which would import torch first. They take turns; ratios of each round count. Run nothing else beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hpc_cifar import files

PLAIN = Path(__file__).with_name("plain_restart.py")
BATCH = 64
CHANGES = (f"data.batch_size={BATCH}", "data.validation=0.01", "tracking.wandb=disabled")


def evict(store: Path) -> None:
    """Have the libraries and the data read from the disk again; needs no root, unlike emptying the whole cache."""
    found = find_spec("torch")
    assert found is not None and found.origin is not None
    site = Path(found.origin).parents[1]
    for path in [*site.rglob("*.so*"), *site.rglob("*.pyc"), *store.iterdir()]:
        if path.is_file():
            with path.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ranks(command: Sequence[str], processes: int, environment: dict[str, str]) -> str:
    """Start the ranks as a scheduler does; what rank 0 printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = str(processes)
    place = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // processes))}
    started = [
        subprocess.Popen(
            command, env={**os.environ, **environment, **place, **threads, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    texts = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("\n".join([f"{' '.join(command)} failed:", *texts]))
    return texts[0]


class Plain:
    """benchmarks/plain_restart.py."""

    def __init__(self, folder: Path, store: Path, gpus: bool) -> None:
        self._command = [sys.executable, str(PLAIN), str(store), str(folder / "plain.pt"), str(BATCH)]
        self._environment = {"PYTHONPATH": str(Path(__file__).parents[1]), **({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})}

    def __call__(self, processes: int) -> dict[str, float]:
        text = ranks(self._command, processes, self._environment)
        return dict(json.loads(text.splitlines()[-1])) if text.strip() else {}


class Ours:
    """``hpc-cifar train`` on the same run again and again, a step further each time."""

    def __init__(self, folder: Path, store: Path, gpus: bool) -> None:
        self._runs, self._steps = folder / "runs", 0
        sets = [*CHANGES, "resources.nodes=1", f"resources.gpus_per_node={1 if gpus else 0}", f"data.dataset={store.name}"]
        self._command = [
            sys.executable, "-m", "hpc_cifar", "train", "deep300", "--name", "restart", "--data", str(store.parent),
            *(part for change in sets for part in ("--set", change)),
        ]  # fmt: skip
        self._environment = {"HPC_CIFAR_RUNS": str(self._runs), **({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})}

    def __call__(self, processes: int) -> dict[str, float]:
        self._steps += 1
        ranks([*self._command, "--max-steps", str(self._steps)], processes, self._environment)
        rows = files.read_json_lines(self._runs / "restart" / "metrics.jsonl")
        return dict([row["seconds"] for row in rows if row.get("event") == "first step"][-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2", help="numbers of ranks, with commas between")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--gpus", action="store_true", help="each rank on a GPU of its own")
    parser.add_argument("--cold", action="store_true", help="empty the page cache of libraries and data before each start")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    store = (files.data_root() / options.dataset).absolute()
    report: dict[str, Any] = {
        "n": options.rounds,
        "cold": options.cold,
        "device": "cuda" if options.gpus else "cpu",
        "starts": [],
    }
    with tempfile.TemporaryDirectory(prefix="hpc-cifar-bench-") as folder:
        kinds = {"plain": Plain(Path(folder), store, options.gpus), "ours": Ours(Path(folder), store, options.gpus)}
        for kind in kinds.values():
            kind(1)  # makes the checkpoint
        for processes in map(int, options.processes.split(",")):
            found: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
            for _ in range(options.rounds):
                for name, kind in kinds.items():
                    if options.cold:
                        evict(store)
                    found[name].append(kind(processes))
            report["starts"].append({"processes": processes, **found})
    from hpc_cifar.data import bench  # not before: torch's libraries stay in the page cache while this process has them

    report |= {"hardware": bench.hardware(), "versions": bench.versions()}
    print("\n".join(table(report)))
    if options.json:
        files.write_json(options.json.absolute(), report)
    return 0


def table(report: dict[str, Any]) -> list[str]:
    lines = []
    for start in report["starts"]:
        stages = list(dict.fromkeys(stage for name in ("ours", "plain") for row in start[name] for stage in row))
        lines += [
            f"{start['processes']} process(es), n = {report['n']}, {'cold, ' if report['cold'] else ''}{report['hardware']}",
            "| seconds, median of rank 0 | " + " | ".join(stages) + " | in all (least to most) | beside plain |",
            "|---" * (len(stages) + 3) + "|",
        ]
        totals = {name: [sum(row.values()) for row in start[name]] for name in ("plain", "ours")}
        for name, sums in totals.items():
            parts = [statistics.median(row.get(stage, 0.0) for row in start[name]) for stage in stages]
            ratio = statistics.median(one / other for one, other in zip(sums, totals["plain"], strict=True))
            lines.append(
                f"| {name} | {' | '.join(f'{part:.2f}' for part in parts)} "
                f"| {statistics.median(sums):.2f} ({min(sums):.2f} to {max(sums):.2f}) | {ratio:.2f} |"
            )
    return lines


if __name__ == "__main__":
    sys.exit(main())
