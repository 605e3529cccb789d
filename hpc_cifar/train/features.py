"""Features of a frozen backbone, computed once: every epoch after that trains the head alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

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

LIMIT_BYTES = 4 * 2**30  # of the features of one split; more would not fit beside the network on many GPUs
BATCH = 250


def wanted(experiment: Experiment) -> bool:
    """Whether the job file asks for it: a frozen backbone, and images that no epoch changes."""
    model = experiment.model
    if not isinstance(model, PretrainedModel) or model.cache_features is False or model.train != "frozen":
        return False
    return experiment.data.augment == Augment()


class Features:
    """The features of the images of a store, on the device of the rank; float32 (n, channels, height, width).

    Each rank computes its share, and a sum over the ranks brings them together. Where the head begins with global average
    pooling, only the means are kept.

    Args:
        inference: a context in which the backbone is run, such as autocast.
        arguments: what the data pipelines take.
    """

    def __init__(
        self,
        experiment: Experiment,
        network: Pretrained,
        world: World,
        indices: npt.NDArray[np.int64],
        inference: Callable[[], Any],
        arguments: dict[str, Any],
    ) -> None:
        assert isinstance(experiment.model, PretrainedModel)
        self._experiment, self._network, self._world = experiment, network, world
        self._inference, self._arguments = inference, arguments
        self._pooled = head_layers(experiment.model, 1)[0].type == "global_avg_pool"
        self._known: dict[int, tuple[Tensor, Tensor]] = {}
        self._epochs = data.Epochs(experiment.data, indices, experiment.seed, world.rank, world.size, 1, 1)
        network.takes_features = True

    def of(self, arrays: Arrays) -> tuple[Tensor, Tensor]:
        """Features and labels of all images of one split; call on every rank."""
        if id(arrays) not in self._known:
            self._known[id(arrays)] = self._computed(arrays)
        return self._known[id(arrays)]

    @torch.no_grad()
    def _computed(self, arrays: Arrays) -> tuple[Tensor, Tensor]:
        count = len(arrays.labels)
        begin, end = shard(count, self._world.size, self._world.rank)
        alone = self._arguments | {"rank": 0, "world_size": 1}
        batches = data.evaluation_batches(self._experiment.data, arrays, np.arange(begin, end), batch_size=BATCH, **alone)
        was_training = self._network.training
        self._network.eval()
        whole: Tensor | None = None
        start = begin
        for batch in batches:
            with self._inference():
                maps = self._network.features(batch.images).float()
            if self._pooled:
                maps = maps.mean((2, 3), keepdim=True)
            if whole is None:
                whole = self._room(count, maps)
            whole[start : start + len(maps)] = maps
            start += len(maps)
        self._network.train(was_training)
        if whole is None:
            raise UsageError(f"model.cache_features: {count} images are too few for {self._world.size} processes")
        if self._world.size > 1:
            self._world.sum(whole)
        return whole, torch.from_numpy(np.array(arrays.labels)).to(whole.device)

    def _room(self, count: int, maps: Tensor) -> Tensor:
        needed = count * maps[0].numel() * 4
        if needed > LIMIT_BYTES:
            raise UsageError(
                f"model.cache_features: the features of {count:,} images take {needed / 2**30:.1f} GiB, more than "
                f"{LIMIT_BYTES / 2**30:.0f}; begin the head with global_avg_pool, or set cache_features: false"
            )
        return torch.zeros(count, *maps.shape[1:], device=maps.device)

    def batches(self, arrays: Arrays, epoch: int, first: int) -> Iterator[Batch]:
        """This rank's shard of the same global batches that a pipeline of images delivers."""
        features, labels = self.of(arrays)
        samples, positions = self._epochs.samples_of(epoch, first)
        chosen = torch.from_numpy(samples).to(features.device)
        start = 0
        for number, global_size, count in positions:
            part = chosen[start : start + count]
            start += count
            yield Batch(features[part], labels[part], number, global_size)

    def evaluation_batches(self, arrays: Arrays, indices: npt.ArrayLike, batch_size: int) -> Iterator[Batch]:
        """This rank's share of ``indices``, in order."""
        features, labels = self.of(arrays)
        samples = torch.from_numpy(np.asarray(indices, dtype=np.int64)).to(features.device)
        begin, end = shard(len(samples), self._world.size, self._world.rank)
        for number, start in enumerate(range(begin, end, batch_size)):
            part = samples[start : min(start + batch_size, end)]
            yield Batch(features[part], labels[part], number, len(samples))


class FeaturePipeline:
    """What the trainer takes its batches from, in the place of :class:`hpc_cifar.data.pipeline.Pipeline`."""

    name = "features"

    def __init__(self, features: Features, arrays: Arrays) -> None:
        self._features, self._arrays = features, arrays

    def batches(self, epoch: int, first: int | None = None) -> Iterator[Batch]:
        """See :meth:`hpc_cifar.data.pipeline.Pipeline.batches`."""
        return self._features.batches(self._arrays, epoch, first or 0)

    def close(self) -> None:
        """Nothing is open."""
