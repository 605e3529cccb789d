"""Exact loss and accuracy over a sharded set: every sample once, sums in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.pipeline import Batch
from ..models.batch_norm import at_least_float32


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], sum_over_ranks: Callable[[Tensor], Tensor], device: torch.device
) -> tuple[float, float, int]:
    """Mean cross-entropy, accuracy and number of samples over all ranks.

    Args:
        model: (n, c, h, w) to (n, classes); put into evaluation mode here and back afterwards.
        batches: this rank's share; together the ranks cover every sample once.
        sum_over_ranks: sums a tensor in place over the ranks and returns it.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    for batch in batches:
        if not len(batch.labels):
            continue
        logits = at_least_float32(model(batch.images))
        totals[0] += F.cross_entropy(logits, batch.labels, reduction="sum")
        totals[1] += (logits.argmax(1) == batch.labels).sum()
        totals[2] += len(batch.labels)
    model.train(was_training)
    loss, correct, count = sum_over_ranks(totals).tolist()
    return loss / count, correct / count, int(count)
