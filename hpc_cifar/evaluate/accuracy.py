"""Exact loss and accuracy over a sharded set: every sample once, sums in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.pipeline import Batch
from ..models.batch_norm import at_least_float32
from .predict import PLAIN, View


class Sums:
    """Loss, correct predictions and samples, added up where the network is, without waiting for it.

    Args:
        model: (n, c, h, w) to (n, classes).
        inference: a context for the forward pass, such as autocast.
        views: of each image; their probabilities are averaged.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        inference: Callable[[], Any] = contextlib.nullcontext,
        views: Sequence[View] = PLAIN,
    ) -> None:
        self.model = model
        self._views = views
        self._inference = inference
        self._totals = torch.zeros(3, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, images: Tensor, labels: Tensor, _global_size: int) -> None:
        """A batch: images (n, channels, height, width), labels int64 (n,). It may be recorded in a CUDA graph."""
        # entered for each batch: autocast keeps the weights it has cast until it ends, and a graph would keep the ones of its
        # recording for ever
        with self._inference():
            every = [at_least_float32(self.model(view(images))) for view in self._views]
        # logarithms of the mean probabilities, of which none becomes 0; the logits of a single view
        logits = every[0] if len(every) == 1 else torch.stack([one.log_softmax(1) for one in every]).logsumexp(0)
        self._totals[0] += F.cross_entropy(logits, labels, reduction="sum")
        self._totals[1] += (logits.argmax(1) == labels).sum()
        self._totals[2] += len(labels)

    def take(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> tuple[float, float, int]:
        """Mean cross-entropy, accuracy and number of samples over all ranks; begins anew."""
        totals = sum_over_ranks(self._totals.clone())
        self._totals.zero_()
        loss, correct, count = totals.tolist()
        return loss / count, correct / count, int(count)


def evaluate(
    sums: Sums,
    batches: Iterable[Batch],
    sum_over_ranks: Callable[[Tensor], Tensor],
    add: Callable[[Tensor, Tensor, int], None] | None = None,
) -> tuple[float, float, int]:
    """Mean cross-entropy, accuracy and number of samples over all ranks; the model is in evaluation mode meanwhile.

    Args:
        batches: this rank's share; together the ranks cover every sample once.
        sum_over_ranks: sums a tensor in place over the ranks and returns it.
        add: calls ``sums.add``, as a graph does.
    """
    was_training = sums.model.training
    sums.model.eval()
    for batch in batches:
        if len(batch.labels):
            (add or sums.add)(batch.images, batch.labels, batch.global_size)
    sums.model.train(was_training)
    return sums.take(sum_over_ranks)
