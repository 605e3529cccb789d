"""Images per second of a job on several numbers of processes of this machine, by the trainer itself under torchrun.

Numbers of processes that are not here are modelled: one process is measured with the share of the batch that each of them would
have, and a ring all-reduce of the gradients is added, 2 (n - 1) / n times their bytes over the link and 2 (n - 1) latencies
(Patarasuk and Yuan, 2009). Nothing overlaps in it, no process waits for a slower one, and there are no other collectives.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import files
from ..config.load import load_experiment
from ..data.store import Store
from ..errors import RunError, UsageError
from ..models.build import trained_parameters
from ..runs import all_runs
from .local import visible_gpus

WINDOW = 5  # steps of one rate; the first of a run is not counted


@dataclasses.dataclass(frozen=True)
class Link:
    """What joins the processes that are not here."""

    bytes_per_second: float
    latency_s: float

    def all_reduce_s(self, size: int, processes: int) -> float:
        """Seconds of a ring all-reduce of ``size`` bytes."""
        rounds = 2 * (processes - 1)
        return rounds / processes * size / self.bytes_per_second + rounds * self.latency_s


def measure(
    job: Path, sets: Sequence[str], sizes: Sequence[int], steps: int, data_root: Path, link: Link, say: Callable[[str], None]
) -> dict[str, Any]:
    """Rates of each number of processes, as a table line by line and as figures.

    Raises:
        UsageError: the batch is smaller than a number of processes.
        RunError: the trainer failed; its last words are in the message.
    """
    experiment = load_experiment(job, list(sets))
    batch = experiment.data.batch_size
    if max(sizes) > batch:
        raise UsageError(f"--world-size {max(sizes)}: the job's batch of {batch} images is smaller")
    gpus = len(visible_gpus()) if experiment.resources.gpus_per_node else 0
    here = gpus or len(os.sched_getaffinity(0))
    kind = "GPUs" if gpus else "CPU processes"
    # the same for every process, one or many, here or modelled: else one alone would have the cores of the others
    threads = max(1, len(os.sched_getaffinity(0)) // min(max(sizes), here))
    store = Store.open(data_root, experiment.data.dataset)
    itemsize = 2 if experiment.training.gradient_compression == "bf16" else 4
    gradients = itemsize * trained_parameters(experiment.model, store.image_shape, len(store.classes))
    say(f"{experiment.name}, global batch {batch}, {kind}, {steps} steps each; beyond {here} modelled")
    say(f"{kind:>14}{'images/s':>12}{'lowest':>10}{'highest':>10}{'ms a step':>12}{'efficiency':>12}")
    points: list[dict[str, Any]] = []
    for size in sorted(set(sizes)):
        modelled = size > here
        processes, share = (1, -(-batch // size)) if modelled else (size, batch)
        rates = _rates(job, [*sets, f"data.batch_size={share}"], processes, threads, gpus > 0, steps, data_root)
        times = [share / rate + (link.all_reduce_s(gradients, size) if modelled else 0.0) for rate in rates]
        found = [batch / seconds for seconds in times]
        middle = statistics.median(found)
        base = points[0]["images_per_second_median"] / points[0]["processes"] if points else middle / size
        points.append(
            {
                "processes": size,
                "modelled": modelled,
                "images_per_second": [round(rate, 1) for rate in found],
                "images_per_second_median": middle,
                "milliseconds": 1000 * batch / middle,
                "efficiency": middle / size / base,
            }
        )
        line = f"{size:14}{middle:12,.0f}{min(found):10,.0f}{max(found):10,.0f}{1000 * batch / middle:12.1f}"
        say(f"{line}{middle / size / base:12.0%}{'  modelled' if modelled else ''}")
    return {
        "job": experiment.name,
        "batch_size": batch,
        "n": min(len(point["images_per_second"]) for point in points),  # windows of steps
        "device": "cuda" if gpus else "cpu",
        "gradient_bytes": gradients,
        "link": dataclasses.asdict(link),
        "points": points,
    }


def _rates(
    job: Path, sets: Sequence[str], processes: int, threads: int, on_gpu: bool, steps: int, data_root: Path
) -> list[float]:
    """Images per second of the full windows but the first of a run of its own, which is thrown away."""
    place = {"nodes": 1, "gpus_per_node": processes if on_gpu else 0, "processes_per_node": processes}
    changes = [
        *sets, *(f"resources.{name}={value}" for name, value in place.items()),
        f"training.log_every_steps={WINDOW}", "tracking={}", "checkpoint.every_steps=null",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="hpc-cifar-bench-") as folder:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "hpc_cifar",
            "train", str(job), "--name", "bench", "--max-steps", str(steps), "--data", str(data_root),
            *(part for change in changes for part in ("--set", change)),
        ]  # fmt: skip
        environment = {**os.environ, "HPC_CIFAR_RUNS": folder, "HPC_CIFAR_THREADS": str(threads)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            words = next(
                (line for line in done.stderr.splitlines() if line.startswith("hpc-cifar: error: ")), done.stderr[-500:]
            )
            raise RunError(f"{processes} processes: {words.removeprefix('hpc-cifar: error: ')}")
        [run] = all_runs(Path(folder))
        rows = files.read_json_lines(run.metrics_file)
    ends = {row["step"] for row in rows if row["kind"] == "epoch"}  # the last batch of an epoch is smaller
    windows = [row for row in rows if row["kind"] == "step"]
    full = [
        float(row["images_per_second"])
        for before, row in itertools.pairwise(windows)
        if row["step"] - before["step"] == WINDOW and row["step"] not in ends
    ]
    if not full:
        raise UsageError(f"no {WINDOW} steps in a row of whole batches were made: use more --steps, or a smaller batch")
    return full
