"""From an experiment and a number of processes to batches, steps, time and budget. Pure arithmetic."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from .config.experiment import Experiment, Resources
from .errors import UsageError


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the processes of a run are: ``world_size`` is nodes x processes_per_node."""

    nodes: int
    processes_per_node: int
    gpus_per_node: int
    cpus_per_process: int | None = None

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes_per_node


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one experiment runs on one placement."""

    placement: Placement
    batch_size: int
    largest_shard: int  # images of a global batch on the busiest rank
    accumulation: int  # forward passes a rank makes for one step
    train_images: int
    steps_per_epoch: int
    total_steps: int
    time_s: int
    gpu_hours: float  # the most one job (chain link) can use: GPUs x time limit
    core_hours: float
    notes: tuple[str, ...] = ()

    INNER: ClassVar = {"placement": Placement}  # for whoever reads it back

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def seconds_of(duration: str) -> int:
    """Seconds in ``HH:MM:SS`` or ``D-HH:MM:SS``."""
    days, _, clock = duration.rpartition("-")
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def shard(count: int, world_size: int, rank: int) -> tuple[int, int]:
    """First and one-past-last position of ``rank``'s contiguous, possibly empty share of ``count`` samples.

    Shares differ by one sample at most, and together they are exactly ``range(count)``.
    """
    return count * rank // world_size, count * (rank + 1) // world_size


def requested_placement(resources: Resources) -> Placement:
    """What the experiment file asks for: one process a GPU, or ``processes_per_node`` processes on CPUs."""
    return Placement(
        nodes=resources.nodes,
        processes_per_node=resources.gpus_per_node or resources.processes_per_node or 1,
        gpus_per_node=resources.gpus_per_node,
        cpus_per_process=resources.cpus_per_process,
    )


def train_images_of(experiment: Experiment, stored: int) -> int:
    """Images that are trained on, given ``stored`` training images in the dataset."""
    left = _after_the_split(experiment, stored)
    return min(experiment.data.train_images or left, left)


def _after_the_split(experiment: Experiment, stored: int) -> int:
    share, folds, fold = experiment.data.validation, experiment.data.folds, experiment.data.fold
    if folds is not None and fold is not None:
        return stored - len(range(fold, stored, folds))
    if share == "test":
        return stored
    held_out = min(max(round(stored * share), 1), stored - 1)
    return stored - held_out


def make_plan(experiment: Experiment, placement: Placement, stored_train_images: int, notes: tuple[str, ...] = ()) -> Plan:
    """Plan ``experiment`` on ``placement``.

    Args:
        stored_train_images: training images in the dataset, before the validation split.
        notes: what was adapted, for people to read.

    Raises:
        UsageError: the global batch has fewer images than there are processes.
    """
    batch = experiment.data.batch_size
    world = placement.world_size
    if batch < world:
        raise UsageError(
            f"data.batch_size: {batch} images for {world} processes leaves some without work; "
            f"use a batch of at least {world} or fewer processes"
        )
    images = train_images_of(experiment, stored_train_images)
    largest = -(-batch // world)
    micro = experiment.data.micro_batch_size or largest
    steps = -(-images // batch)
    time_s = seconds_of(experiment.resources.time)
    cores = (placement.cpus_per_process or 1) * world
    return Plan(
        placement=placement,
        batch_size=batch,
        largest_shard=largest,
        accumulation=-(-largest // micro),
        train_images=images,
        steps_per_epoch=steps,
        total_steps=steps * experiment.epochs,
        time_s=time_s,
        gpu_hours=placement.nodes * placement.gpus_per_node * time_s / 3600,
        core_hours=cores * time_s / 3600,
        notes=notes,
    )
