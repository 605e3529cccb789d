"""Optimizers of the job file, from torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..config.experiment import SGD, Adam, AdamW, Optimizer


def build(config: Optimizer, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer over ``parameters``; its rate is set before every step from the schedule."""
    params = [p for p in parameters if p.requires_grad]
    match config:
        case SGD():
            return _plain(torch.optim.SGD)(
                params,
                lr=config.lr,
                momentum=config.momentum,
                nesterov=config.nesterov,
                weight_decay=config.weight_decay,
                fused=True,
            )
        case Adam() | AdamW():
            kind: type[torch.optim.Optimizer] = torch.optim.AdamW if isinstance(config, AdamW) else torch.optim.Adam
            return _plain(kind)(
                params,
                lr=config.lr,
                betas=(config.beta1, config.beta2),
                eps=config.eps,
                weight_decay=config.weight_decay,
                fused=True,
            )


def _plain(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """The optimizer without what it does for torch.compile, which nothing here uses.

    Its methods import torch's compiler, only to be left alone by it: a third of the time in which a rank starts. Each is
    replaced by the function of torch that it wraps; on a torch that wraps nothing this changes nothing.
    """
    names = ("step", "zero_grad", "add_param_group", "state_dict", "load_state_dict")
    methods: dict[str, Any] = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    return type(kind.__name__, (kind,), {**methods, "step": torch.no_grad()(methods["step"])})


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
