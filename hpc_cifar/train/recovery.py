"""What a run leaves out after a loss that was not finite; what it says where memory is full.

<run>/left-out.json    numbers (from 1) of the updates that are not made, and how often the run went back for that
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import files, records
from ..config.experiment import Experiment
from ..errors import OutOfMemory, RunError, first_line
from ..models import tensors
from ..records import LeftOut
from ..runs import Run
from . import checkpoint, saved
from .distributed import World

FILE = "left-out.json"


def left_out(run: Run) -> frozenset[int]:
    """Numbers of the updates that are not made."""
    return frozenset(_known(run).steps)


def goes_back(run: Run, step: int) -> bool:
    """Whether a loss at update ``step`` that is not finite sends the run back to its last checkpoint, or ends it."""
    known = _known(run)
    return known.times < run.experiment().training.skip_non_finite and step not in known.steps


def leave_out(run: Run, world: World, step: int) -> bool:
    """Write down that update ``step`` is left out, and the one before, which may have caused what was seen at ``step``; whether
    the run may go back. Call on every rank.

    Raises:
        RunError: on every rank: it cannot be written down.
    """
    may, problem = False, ""
    if world.main:
        try:
            may = goes_back(run, step)
            if may:
                known = _known(run)
                steps = sorted({*known.steps, *(number for number in (step - 1, step) if number > 0)})
                files.write_json(run.path / FILE, {"steps": steps, "times": known.times + 1})
                before = checkpoint.stored(run.checkpoints)
                checkpoint.set_aside(run.checkpoints, step - 1)  # they hold an update that is left out
                left = checkpoint.stored(run.checkpoints)
                if before:  # else those would be missed
                    saved.note(run, left[0].step if left else 0)
        except OSError as error:
            problem = f"{run.path / FILE}: cannot leave out update {step}: {error.strerror or error}"
        except RunError as error:
            problem = str(error)
    may, problem = world.share((may, problem))
    if problem:
        raise RunError(problem)
    return bool(may)


@contextlib.contextmanager
def memory_told(experiment: Experiment, world: World) -> Iterator[None]:
    """Turn an allocation that fails within the block into a message with the batch and the memory of the rank.

    Raises:
        OutOfMemory: instead of torch's error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not tensors.is_out_of_memory(error):
            raise
        batch = experiment.data.batch_size
        share = -(-batch // world.size)
        part = min(experiment.data.micro_batch_size or share, share)
        raise OutOfMemory(
            f"rank {world.rank} on {os.uname().nodename}: out of memory with {part} images at a time (batch {batch} over "
            f"{world.size} processes), {_memory(world)}; data.micro_batch_size: {max(1, part // 2)} makes the same steps in "
            f"smaller parts, and more processes have smaller shares ({first_line(error)})"
        ) from None


def _memory(world: World) -> str:
    if world.on_gpu:
        free, total = torch.cuda.mem_get_info(world.device)
        held = torch.cuda.memory_allocated(world.device)
        return f"{held / 2**20:,.0f} MiB of it in use, {free / 2**20:,.0f} of the GPU's {total / 2**20:,.0f} MiB free"
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    used = next((int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)
    return f"{used / 1024:,.0f} MiB of the host in use"


def _known(run: Run) -> LeftOut:
    found = records.read(LeftOut, run.path / FILE)
    if found is not None and found.problem:
        raise RunError(f"{run.path}: {found.problem}; it says which updates this run leaves out, and cannot be read")
    return found or LeftOut()
