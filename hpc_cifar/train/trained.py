"""A run's network as it was trained: what ``evaluate`` and ``export`` begin with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..config.experiment import Experiment
from ..data import pipeline as data
from ..data.pipeline import Batch
from ..data.store import Arrays
from ..errors import CheckpointError, RunError, UsageError
from ..runs import Run
from . import begun, checkpoint, contents, statistics
from .distributed import World, device_for
from .saved import missing
from .setup import Prepared, choose_channels_last, choose_precision, make_network, prepare_data, split_digest
from .step import autocast

BATCH = 500


@dataclasses.dataclass(frozen=True)
class Trained:
    """The network in evaluation mode, with the average of its weights if the run kept one.

    Attributes:
        which: the checkpoint: ``best``, ``latest`` or a folder's name.
        epoch, step: after which it was saved.
    """

    run: Run
    experiment: Experiment
    prepared: Prepared
    network: nn.Module
    device: torch.device
    precision: torch.dtype
    channels_last: bool
    which: str
    epoch: int
    step: int
    history: list[dict[str, Any]]

    def images(self, split: str) -> tuple[Arrays, npt.NDArray[np.int64]]:
        """The arrays that hold ``test`` or ``validation``, and the indices int64 (n,) of its images there.

        Raises:
            UsageError: the run held no images out.
        """
        store, held_out = self.prepared.store, self.prepared.validation_indices
        if split == "test":
            return store.test, np.arange(len(store.test.labels))
        if not len(held_out):
            raise UsageError("--split validation: this run held no images out (data.validation: test); use --split test")
        return store.train, held_out

    def batches(self, arrays: Arrays, indices: npt.NDArray[np.int64], size: int = BATCH) -> Iterator[Batch]:
        """The images ``indices`` (n,) in their order, as the network gets them; at most ``size`` in each."""
        return data.evaluation_batches(
            self.experiment.data, arrays, indices, batch_size=size, rank=0, world_size=1, device=self.device,
            dtype=self.precision, channels_last=self.channels_last, mean=self.prepared.mean, std=self.prepared.std,
        )  # fmt: skip


def load(run: Run, data_root: Path, which: str = "") -> Trained:
    """The network of ``run`` on the GPU if there is one, from its verified checkpoint.

    Args:
        which: ``best`` or ``latest``; "" is the one whose test figures the run reports.

    Raises:
        RunError: there is no such checkpoint, or it is of another experiment than the run is now.
        CheckpointError: it is damaged, or of another network or dataset.
        DataError: the dataset is not here.
    """
    experiment = run.experiment()
    world = World(0, 1, 0, 1, device_for(torch.cuda.is_available(), 0, 1), None)
    prepared = prepare_data(experiment, data_root, world)
    which = which or ("best" if experiment.checkpoint.select == "best" else "latest")
    saved = checkpoint.named(run.checkpoints, which)
    if saved is None:
        if problem := missing(run):
            raise problem
        raise RunError(f"{run.id} has no checkpoint {which!r} (yet); there are: {_names(run)}")
    state = checkpoint.read(saved)
    if wrong := contents.problem(state):
        raise CheckpointError(f"{saved.folder}: is not what this version writes: {wrong}")
    begun.check(run, saved.manifest, experiment)
    if state["split_digest"] != split_digest(prepared):
        raise CheckpointError(
            f"{run.id} was trained on other images than those in {data_root / experiment.data.dataset}; prepare the same again"
        )
    channels_last = choose_channels_last(experiment)
    network = make_network(experiment, prepared, world, channels_last)
    live = [parameter for parameter in network.parameters() if parameter.requires_grad]
    unlike = contents.difference(state["model"], network.state_dict())
    if state["ema"] is None and experiment.training.ema_decay is not None:
        unlike = "it has no average of the weights"
    if state["ema"] is not None:
        average = contents.listed(state["ema"]["shadow"], "average")
        unlike = unlike or contents.difference(average, contents.listed(live, "average"))
    if unlike:
        raise CheckpointError(f"{saved.folder} does not fit the run's network: {unlike}")
    network.load_state_dict(state["model"])
    if state["ema"] is not None:
        with torch.no_grad():
            for parameter, shadow in zip(live, state["ema"]["shadow"], strict=True):
                parameter.copy_(shadow)
    network.eval()
    precision = choose_precision(experiment, world.device, run.state().precision)
    step = state["position"]["step"]
    epoch = state["position"]["epoch"]
    found = Trained(
        run, experiment, prepared, network, world.device, precision, channels_last, which, epoch, step, state["history"]
    )
    if experiment.training.batch_norm_images is not None:
        known = state.get("statistics")
        buffers = dict(network.named_buffers())
        if known and (unlike := contents.difference(known, {name: buffers[name] for name in known if name in buffers})):
            raise CheckpointError(f"{saved.folder} does not fit the run's network: {unlike}")
        statistics.put(network, known or _statistics_of(found))
    return found


def _statistics_of(trained: Trained) -> statistics.Statistics:
    """BatchNorm's, of a checkpoint whose weights were not validated."""
    indices, size = statistics.images_of(trained.experiment, trained.prepared)
    batches = trained.batches(trained.prepared.store.train, indices, size)
    inference = partial(autocast, trained.precision, trained.device)
    return statistics.computed(trained.network, (batch.images for batch in batches), inference)


def _names(run: Run) -> str:
    names = [name for name in ("best", "latest") if (run.checkpoints / name).exists()]
    return ", ".join([*names, *(saved.folder.name for saved in checkpoint.stored(run.checkpoints))]) or "none"
