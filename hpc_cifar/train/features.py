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
from ..models.pretrained import Pretrained
from ..plan import shard
from .distributed import World

LIMIT_BYTES = 4 * 2**30  # of the features of one split; more would not fit beside the network on many GPUs
BATCH = 250


def wanted(experiment: Experiment) -> bool:
    """Whether the job file allows it: a frozen backbone, and images that no epoch changes."""
    model = experiment.model
    if not isinstance(model, PretrainedModel) or model.cache_features is False or model.train != "frozen":
        return False
    return experiment.data.augment == Augment()


class Features:
    """The features of the images of a store, on the device of the rank; (n, channels, height, width) in the head's type.

    Each rank computes its share, and a sum over the ranks brings them together. Where the head begins with global average
    pooling, only the means are kept.

    Args:
        train: indices of the training images; :meth:`batches` are of these.
        used: sorted indices of all images of the training part of the store that the run looks at.
        inference: a context in which the backbone is run, such as autocast.
        arguments: what the data pipelines take.
        progress: called after every batch: this may take longer than a watchdog has patience.

    """

    def __init__(
        self,
        experiment: Experiment,
        network: Pretrained,
        world: World,
        train: npt.NDArray[np.int64],
        used: npt.NDArray[np.int64],
        inference: Callable[[], Any],
        arguments: dict[str, Any],
        progress: Callable[[], None],
    ) -> None:
        assert isinstance(experiment.model, PretrainedModel)
        self._experiment, self._network, self._world = experiment, network, world
        self._inference, self._arguments, self._progress = inference, arguments, progress
        self._pooled = head_layers(experiment.model, 1)[0].type == "global_avg_pool"
        self._used = used
        self._epochs = data.Epochs(experiment.data, train, experiment.seed, world.rank, world.size, 1, 1)
        self._known: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def of(self, arrays: Arrays, *, some: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Features, labels, and the row of each image of the store; call on every rank.

        Args:
            some: only the images that the run looks at; of the others the row is 0.
        """
        if id(arrays) not in self._known:
            self._known[id(arrays)] = self._computed(arrays, self._used if some else np.arange(len(arrays.labels)))
        return self._known[id(arrays)]

    def bytes_of(self, arrays: Arrays, count: int) -> int:
        """Memory of the features of ``count`` images, the same on every rank."""
        return count * self._maps(self._images(arrays, np.arange(1)))[0].numel() * self._type().itemsize

    def _type(self) -> torch.dtype:
        return next(self._network.head.parameters()).dtype

    def _images(self, arrays: Arrays, indices: npt.NDArray[np.int64]) -> Tensor:
        alone = self._arguments | {"rank": 0, "world_size": 1}
        return next(data.evaluation_batches(self._experiment.data, arrays, indices, batch_size=len(indices), **alone)).images

    @torch.no_grad()
    def _maps(self, images: Tensor) -> Tensor:
        """Of a few images; the network is in evaluation mode afterwards as it was before."""
        training = self._network.training
        self._network.eval()
        with self._inference():
            maps = self._network.features(images).to(self._type())
        self._network.train(training)
        return maps.mean((2, 3), keepdim=True) if self._pooled else maps

    def _computed(self, arrays: Arrays, indices: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        begin, end = shard(len(indices), self._world.size, self._world.rank)
        example = self._maps(self._images(arrays, np.arange(1)))
        whole = torch.zeros(len(indices), *example.shape[1:], dtype=example.dtype, device=example.device)
        for start in range(begin, end, BATCH):
            part = slice(start, min(start + BATCH, end))
            whole[part] = self._maps(self._images(arrays, indices[part]))
            self._progress()
        if self._world.size > 1:
            self._world.sum(whole)
        row = np.zeros(len(arrays.labels), np.int64)
        row[indices] = np.arange(len(indices))
        labels = torch.from_numpy(np.asarray(arrays.labels)[indices])
        return whole, labels.to(whole.device), torch.from_numpy(row).to(whole.device)

    def batches(self, arrays: Arrays, epoch: int, first: int) -> Iterator[Batch]:
        """This rank's shard of the same global batches that a pipeline of images delivers."""
        features, labels, row = self.of(arrays, some=True)
        samples, positions = self._epochs.samples_of(epoch, first)
        chosen = row[torch.from_numpy(samples).to(row.device)]
        start = 0
        for number, global_size, count in positions:
            part = chosen[start : start + count]
            start += count
            yield Batch(features[part], labels[part], number, global_size)

    def evaluation_batches(self, arrays: Arrays, indices: npt.ArrayLike, batch_size: int, *, some: bool) -> Iterator[Batch]:
        """This rank's share of ``indices``, in order."""
        features, labels, row = self.of(arrays, some=some)
        samples = row[torch.from_numpy(np.asarray(indices, dtype=np.int64)).to(row.device)]
        begin, end = shard(len(samples), self._world.size, self._world.rank)
        for number, start in enumerate(range(begin, end, batch_size)):
            part = samples[start : min(start + batch_size, end)]
            yield Batch(features[part], labels[part], number, len(samples))

    def fits(self, arrays: Arrays) -> str:
        """Why they take too much memory, "" if they do not."""
        needed = self.bytes_of(arrays, len(self._used))
        if needed <= LIMIT_BYTES:
            return ""
        return (
            f"the features of {len(self._used):,} images take {needed / 2**30:.1f} GiB, more than {LIMIT_BYTES / 2**30:.0f}; "
            "begin the head with global_avg_pool to cache them"
        )


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
