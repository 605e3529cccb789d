"""Features of a frozen backbone, computed once: every epoch after that trains the head alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..config.experiment import Augment, Experiment
from ..config.model import PretrainedModel
from ..config.shapes import head_layers
from ..data import pipeline as data
from ..data.pipeline import Batch
from ..data.store import Arrays
from ..errors import UsageError
from ..models.pretrained import Pretrained
from ..plan import shard
from .distributed import World
from .setup import Prepared
from .stop import StopAsked
from .watchdog import Watchdog

LIMIT_BYTES = 4 * 2**30  # of the features of one split; more would not fit beside the network on many GPUs
BATCH = 250


def begin(
    experiment: Experiment,
    network: nn.Module,
    prepared: Prepared,
    world: World,
    inference: Callable[[], Any],
    arguments: dict[str, Any],
    watchdog: Watchdog,
    stopping: Callable[[], str],
) -> tuple[Features | None, str]:
    """The features of the training images, if the backbone is frozen and no epoch changes an image; and why, or why not.

    Args:
        inference: a context in which the backbone is run, such as autocast.
        arguments: what the data pipelines take.
        stopping: asked after every batch, equally often on every rank; why to stop, or "".

    Raises:
        StopAsked: there is a reason to stop.
        UsageError: the job file insists on them, and they would take too much memory.
    """
    model = experiment.model
    if not isinstance(model, PretrainedModel) or not isinstance(network, Pretrained):
        return None, ""
    if model.cache_features is False or model.train != "frozen" or experiment.data.augment != Augment():
        return None, ""
    made = Features(experiment, model, network, prepared, world, inference, arguments, watchdog.moved)
    if too_large := made.too_large():
        if model.cache_features is True:
            raise UsageError(f"model.cache_features: {too_large}")
        return None, too_large
    began = time.perf_counter()
    with watchdog.phase("features"):
        made.of(prepared.store.train, stopping)
    network.takes_features = True
    return made, f"the backbone is frozen: computed once, in {time.perf_counter() - began:.1f} s"


class Features:
    """The features of the images of a store, on the device of the rank: (n, channels, height, width) in the head's type.

    The trainer takes its batches from here, in the place of a :class:`hpc_cifar.data.pipeline.Pipeline`.

    Each rank computes its share, and a sum over the ranks brings them together. Where the head begins with global average
    pooling, only the means are kept.

    Args:
        progress: called after every batch: this may take longer than a watchdog has patience.
    """

    name = "features"

    def __init__(
        self,
        experiment: Experiment,
        model: PretrainedModel,
        network: Pretrained,
        prepared: Prepared,
        world: World,
        inference: Callable[[], Any],
        arguments: dict[str, Any],
        progress: Callable[[], None],
    ) -> None:
        self._data, self._network, self._world = experiment.data, network, world
        self._inference, self._arguments, self._progress = inference, arguments, progress
        self._pooled = head_layers(model, 1)[0].type == "global_avg_pool"
        self._store = prepared.store
        self._used = np.union1d(prepared.train_indices, prepared.validation_indices)  # of the training part of the store
        self._epochs = data.Epochs(experiment.data, prepared.train_indices, experiment.seed, world.rank, world.size, 1, 1)
        self._known: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def of(self, arrays: Arrays, stopping: Callable[[], str] = str) -> tuple[Tensor, Tensor, Tensor]:
        """Features, labels, and the row of each image of the store; call on every rank.

        Of the training part only the images that the run looks at are there; of the others the row is 0.

        Returns:
            (m, channels, height, width) in the head's type and int64 (m,), of the images that are there; int64 (all images,).
        """
        if id(arrays) not in self._known:
            whole = np.arange(len(arrays.labels))
            self._known[id(arrays)] = self._computed(arrays, self._used if arrays is self._store.train else whole, stopping)
        return self._known[id(arrays)]

    def too_large(self) -> str:
        """Why the features of the training part take too much memory, "" if they do not; the same on every rank."""
        example = self._example(self._store.train)
        needed = len(self._used) * example.numel() * example.element_size()
        if needed <= LIMIT_BYTES:
            return ""
        return (
            f"the features of {len(self._used):,} images take {needed / 2**30:.1f} GiB, more than {LIMIT_BYTES / 2**30:.0f}; "
            "begin the head with global_avg_pool to cache them"
        )

    def _batches(self, arrays: Arrays, indices: npt.NDArray[np.int64]) -> Iterator[Batch]:
        alone = self._arguments | {"rank": 0, "world_size": 1}
        return data.evaluation_batches(self._data, arrays, indices, batch_size=BATCH, **alone)

    def _example(self, arrays: Arrays) -> Tensor:
        """(1, channels, height, width), which every rank knows, however few images are its own."""
        return self._maps(next(self._batches(arrays, np.arange(1))).images)

    @torch.no_grad()
    def _maps(self, images: Tensor) -> Tensor:
        """Of a few images, in the type of the head; the backbone is frozen, so that it is in evaluation mode."""
        with self._inference():
            maps = self._network.features(images)
        maps = maps.to(next(self._network.head.parameters()).dtype)
        return maps.mean((2, 3), keepdim=True) if self._pooled else maps

    def _computed(
        self, arrays: Arrays, indices: npt.NDArray[np.int64], stopping: Callable[[], str]
    ) -> tuple[Tensor, Tensor, Tensor]:
        start, end = shard(len(indices), self._world.size, self._world.rank)
        example = self._example(arrays)
        whole = example.new_zeros(len(indices), *example.shape[1:])
        batches = self._batches(arrays, indices[start:end])
        largest = math.ceil(len(indices) / self._world.size)  # share of a rank
        for _ in range(0, largest, BATCH):
            if batch := next(batches, None):
                whole[start : start + len(batch.labels)] = self._maps(batch.images)
                start += len(batch.labels)
            self._progress()
            if reason := stopping():
                raise StopAsked(reason)
        if self._world.size > 1:
            self._world.sum(whole)
        row = np.zeros(len(arrays.labels), np.int64)
        row[indices] = np.arange(len(indices))
        labels = torch.from_numpy(np.asarray(arrays.labels)[indices])
        return whole, labels.to(whole.device), torch.from_numpy(row).to(whole.device)

    def batches(self, epoch: int, first: int | None = None) -> Iterator[Batch]:
        """This rank's shard of the same global batches; see :meth:`hpc_cifar.data.pipeline.Pipeline.batches`."""
        features, labels, row = self.of(self._store.train)
        samples, positions = self._epochs.samples_of(epoch, first or 0)
        chosen = row[torch.from_numpy(samples).to(row.device)]
        start = 0
        for number, global_size, count in positions:
            part = chosen[start : start + count]
            start += count
            yield Batch(features[part], labels[part], number, global_size)

    def evaluation_batches(
        self, arrays: Arrays, indices: npt.ArrayLike, batch_size: int, alone: bool = False
    ) -> Iterator[Batch]:
        """This rank's share of ``indices``, in order; all of them, if it is ``alone``."""
        features, labels, row = self.of(arrays)
        samples = row[torch.from_numpy(np.asarray(indices, dtype=np.int64)).to(row.device)]
        begin, end = (0, len(samples)) if alone else shard(len(samples), self._world.size, self._world.rank)
        for number, start in enumerate(range(begin, end, batch_size)):
            part = samples[start : min(start + batch_size, end)]
            yield Batch(features[part], labels[part], number, len(samples))

    def close(self) -> None:
        """Nothing is open."""
