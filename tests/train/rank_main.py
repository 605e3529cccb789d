"""One rank of a run, as a process of its own, with arguments ``RUN_DIR DATA_ROOT MAX_STEPS [SEEN_FILE]``.

With SEEN_FILE, every rank appends what it was given: ``epoch batch hash,hash,...``, one hash per image of its shard. With
GIVES_UP_AFTER_EPOCH in its environment, the run is given up there; with DAMAGED_BATCHES, such as ``0:3,1:0``, the images of
these batches (of an epoch, from 0) are not numbers; LIMITED_TO_MIB is memory that it may take; SEGMENT is its job and restart;
with DAMAGED_SINCE_ITS_START the store is taken for good at the start.
STATISTICS names a file that gets those of BatchNorm that the rank computes anew.
"""

from __future__ import annotations

import hashlib
import math
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hpc_cifar.data import pipeline as data
from hpc_cifar.data.store import Store
from hpc_cifar.errors import HpcCifarError
from hpc_cifar.runs import Run
from hpc_cifar.train import statistics
from hpc_cifar.train.loop import train


def record_batches(path: Path) -> None:
    build = data.build

    def recording(*args: Any, **kwargs: Any) -> data.Pipeline:
        built = build(*args, **kwargs)
        batches = built.batches

        def recorded(epoch: int, first: int | None = None) -> Iterator[data.Batch]:
            for batch in batches(epoch, first):
                images = batch.images.contiguous().view(torch.uint8).numpy()
                names = [hashlib.sha1(image.tobytes()).hexdigest()[:16] for image in images]
                with path.open("a") as stream:
                    stream.write(f"{epoch} {batch.number} {','.join(names)}\n")
                yield batch

        built.batches = recorded  # type: ignore[method-assign]
        return built

    data.build = recording


def damage_batches(places: str) -> None:
    damaged = {tuple(map(int, place.split(":"))) for place in places.split(",")}
    taken = data.Pipeline.batches

    def batches(self: data.Pipeline, epoch: int, first: int | None = None) -> Iterator[data.Batch]:
        for batch in taken(self, epoch, first):
            if (epoch, batch.number) in damaged:
                batch.images.fill_(math.nan)
            yield batch

    data.Pipeline.batches = batches  # type: ignore[method-assign]


def record_statistics(path: Path) -> None:
    compute, found = statistics.computed, []

    def computed(*args: Any, **kwargs: Any) -> statistics.Statistics:
        found.append(compute(*args, **kwargs))
        torch.save(found, path)
        return found[-1]

    statistics.computed = computed


def as_rank(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """Train; ends the process with the exit code the command line would give. Output is appended to ``log``."""
    # the server that this process is forked from may have been begun by a pipeline, whose workers hear no signals
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.environ.update(environment)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.close(stream)
    run, root, max_steps, *seen = arguments
    if seen:
        record_batches(Path(f"{seen[0]}.{os.environ['RANK']}"))
    if limit := os.environ.get("LIMITED_TO_MIB"):  # beside what the process has mapped already
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int(limit) * 2**20,) * 2)
    if places := os.environ.get("DAMAGED_BATCHES"):
        damage_batches(places)
    if os.environ.get("DAMAGED_SINCE_ITS_START"):
        Store.verify_once = lambda store: None  # type: ignore[method-assign]
    if path := os.environ.get("STATISTICS"):
        record_statistics(Path(f"{path}.{os.environ['RANK']}"))
    last = int(os.environ.get("GIVES_UP_AFTER_EPOCH", 0))
    options: dict[str, Any] = {"gives_up": lambda row: row["epoch"] >= last} if last else {}
    options["segment"] = os.environ.get("SEGMENT", "")
    try:
        train(Run(Path(run)), max_steps=int(max_steps) if max_steps else None, data_root=Path(root), console=True, **options)
    except HpcCifarError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
