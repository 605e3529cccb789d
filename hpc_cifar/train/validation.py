"""Loss and accuracy of the weights of a run, at the end of an epoch and at its own end."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from ..config.experiment import Experiment
from ..data import pipeline as data
from ..data.store import Arrays
from ..evaluate.accuracy import Sums, evaluate
from ..evaluate.predict import tta_views
from . import statistics
from .features import Features
from .graph import Graphs
from .optim import penalty
from .session import Session
from .setup import AveragedStatistics, Prepared, on_each_host
from .step import autocast

BATCH = 1000
KEPT_BYTES = 2**30  # of finished images that stay on a GPU; CIFAR-10's test images are 61 MB in bf16


class Validation:
    """Of the current weights, or of their average if there is one. Call on every rank.

    Attributes:
        cached: features of a frozen backbone, which take the place of images.
        arguments: what the data pipelines take.
        progress: called within what may take longer than a watchdog has patience.
    """

    cached: Features | None = None
    _verified = False  # the test files were, by this process or another one of its host
    progress: Callable[[], None] = staticmethod(lambda: None)

    def __init__(
        self, experiment: Experiment, prepared: Prepared, session: Session, precision: torch.dtype, channels_last: bool
    ) -> None:
        self._experiment, self._prepared, self._session, self._precision = experiment, prepared, session, precision
        self.arguments: dict[str, Any] = {
            "rank": session.world.rank,
            "world_size": session.world.size,
            "device": session.world.device,
            "dtype": precision,
            "channels_last": channels_last,
            "mean": prepared.mean,
            "std": prepared.std,
        }
        device = session.world.device
        statistics.check(experiment, session.network)
        self._inference = partial(autocast, precision, device)
        self._sums = Sums(session.network, device, self._inference)
        self._views = Sums(session.network, device, self._inference, tta_views())
        self._graphs = Graphs(self._sums.add, device) if experiment.training.graph is True else None
        self._kept: dict[int, list[data.Batch]] = {}  # on a GPU, by the arrays they are of

    def __call__(self) -> tuple[float, float]:
        """On the validation split; with ``validation: test`` on the test set, by which nothing is chosen."""
        if self._experiment.data.validation == "test":
            return self._test() if self._verified else self.test()
        return self._of(self._prepared.store.train, self._prepared.validation_indices)

    def penalty(self) -> float | None:
        """The ``l2`` of layers, which Keras adds to a validation's loss; None where no layer has one."""
        session = self._session
        rules = session.stepper.rules
        if not any(rule.l2 for rule in rules):
            return None
        with self._averaged():
            return penalty(rules)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Within the block the network has the average of its weights, if there is one."""
        ema = self._session.ema
        if ema is None:
            yield
            return
        ema.swap()
        try:
            yield
        finally:
            ema.swap()

    def test(self, augmented: bool = False) -> tuple[float, float]:
        """On the test set, as it is or averaged over shifted and mirrored views.

        Its files are read whole before: a figure of damaged ones would be believed. The views follow the figure without them.

        Raises:
            DataError: on every rank: they are not what was written.
        """
        if not augmented or not self._verified:
            on_each_host(self._session.world, partial(self._prepared.store.verify, "test"))
            self._verified = True
        return self._test(augmented)

    def _test(self, augmented: bool = False) -> tuple[float, float]:
        arrays = self._prepared.store.test
        return self._of(arrays, range(len(arrays.labels)), augmented)

    def _of(self, arrays: Arrays, indices: Any, augmented: bool = False) -> tuple[float, float]:
        session = self._session
        with self._averaged(), self._statistics():  # in this order: they are of the averaged weights
            sums, run = (self._views, None) if augmented else (self._sums, self._graphs)
            loss, accuracy, _ = evaluate(sums, self._batches(arrays, indices), session.world.sum, run)
        return loss, accuracy

    def _statistics(self) -> contextlib.AbstractContextManager[None]:
        """Within the block BatchNorm has the statistics that are validated; those of a step are computed once."""
        session, step = self._session, self._session.position.step
        if self._experiment.training.batch_norm_images is None:
            return AveragedStatistics(session.network, session.world, session.local_statistics)
        if step not in session.statistics:
            found = statistics.computed(session.network, self._unchanged_images(), self._inference, self.progress)
            session.statistics = {step: found}
        return statistics.using(session.network, session.statistics[step])

    def _unchanged_images(self) -> Iterator[torch.Tensor]:
        """Of the training, for the statistics: the same batches on every rank."""
        arrays = self._prepared.store.train
        indices, size = statistics.images_of(self._experiment, self._prepared)
        if self.cached is not None:
            found = self.cached.evaluation_batches(arrays, indices, size, alone=True)
        else:
            alone = self.arguments | {"rank": 0, "world_size": 1}
            found = data.evaluation_batches(self._experiment.data, arrays, indices, batch_size=size, **alone)
        return (batch.images for batch in found)

    def close(self) -> None:
        """Let go of what was recorded and kept."""
        if self._graphs is not None:
            self._graphs.close()
        self._kept.clear()

    def _batches(self, arrays: Arrays, indices: Any) -> Iterable[data.Batch]:
        if self.cached is not None:
            return self.cached.evaluation_batches(arrays, indices, BATCH)
        found = data.evaluation_batches(self._experiment.data, arrays, indices, batch_size=BATCH, **self.arguments)
        images = math.prod(arrays.images.shape[1:]) * len(indices)
        if not self._session.world.on_gpu or images * self._precision.itemsize > KEPT_BYTES:
            return found
        if id(arrays) not in self._kept:  # they are the same every time
            self._kept[id(arrays)] = list(found)
        return self._kept[id(arrays)]
