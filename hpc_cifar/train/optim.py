"""Optimizers of the job file, from torch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..config.experiment import SGD, Adam, AdamW, Optimizer


def build(config: Optimizer, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer over ``parameters``; its rate is set before every step from the schedule."""
    params = [p for p in parameters if p.requires_grad]
    match config:
        case SGD():
            return torch.optim.SGD(
                params,
                lr=config.lr,
                momentum=config.momentum,
                nesterov=config.nesterov,
                weight_decay=config.weight_decay,
                fused=True,
            )
        case Adam() | AdamW():
            kind = torch.optim.AdamW if isinstance(config, AdamW) else torch.optim.Adam
            return kind(
                params,
                lr=config.lr,
                betas=(config.beta1, config.beta2),
                eps=config.eps,
                weight_decay=config.weight_decay,
                fused=True,
            )


class EMA:
    """Exponential moving average of the parameters, corrected for its start: the first update copies them.

    Args:
        parameters: the live parameters, in a fixed order.
        decay: share of the old average kept at every step, once enough steps are behind it.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self._live = [p for p in parameters if p.requires_grad]
        self.shadow = [p.detach().clone() for p in self._live]
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (self.updates - 1) / (self.updates + 8))  # short at first, as in TensorFlow's num_updates rule
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self._live], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the live parameters with the average; calling it twice restores them."""
        for live, average in zip(self._live, self.shadow, strict=True):
            saved = live.detach().clone()
            live.copy_(average)
            average.copy_(saved)
