"""Norms of gradients and weights in the rows of steps, for ``tracking.norms``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

NAMES = ("grad_norm", "weight_norm")


class Norms:
    """Global L2 norms of the last step, computed where its metrics are taken: no step does more for them.

    Gradients lie where the optimizer has read them until the next step begins, and no optimizer here changes them. Clipping
    does, so its own norm is kept.

    Args:
        parameters: those that are trained.
        clips: whether every step clips its gradients.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], clips: bool) -> None:
        self._parameters = parameters
        # in memory that stays where it is: a step may be a CUDA graph
        self._before = torch.zeros((), dtype=torch.float64, device=parameters[0].device) if clips else None

    def clipped(self, norm: Tensor) -> None:
        """Keep the norm () that clipping has found."""
        if self._before is not None:
            self._before.copy_(norm)

    @torch.no_grad()
    def now(self) -> Tensor:
        """float64 (2,) on the device, in the order of :data:`NAMES`: of the gradients, summed over the ranks and before they
        were clipped, and of the weights after the update; nothing waits for it.
        """
        gradients = self._before
        if gradients is None:
            gradients = get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        return torch.stack([gradients.double(), get_total_norm([p.detach() for p in self._parameters]).double()])
