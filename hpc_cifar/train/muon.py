"""Muon for the weights of layers, and what updates everything else beside it (Jordan 2024).

timm has Muon; here are weights that are brought to a length before each update, and torch's AdamW or SGD beside it. (timm's own
fallback is a NAdamW with a second moment of 0.95.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.optim.muon import Muon as TimmMuon

from ..config.optimization import Muon

Groups = list[dict[str, Any]]
Plain = Callable[[type[torch.optim.Optimizer]], Callable[..., torch.optim.Optimizer]]


class Normalizing(TimmMuon):
    """Before each update every weight is scaled so that the mean square length of its rows is 1.

    An update has about that length too: the rate is then the angle by which it turns the weights.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if group["use_muon"]:
                for weight in group["params"]:
                    if weight.grad is not None:
                        weight.mul_(len(weight) ** 0.5 / weight.norm().clamp_(min=1e-7))
        super().step()  # type: ignore[no-untyped-call]


class Together(torch.optim.Optimizer):
    """Optimizers that each update some of the groups of parameters, with one state and one list of groups.

    Args:
        parts: their groups, in this order, are those of the whole.
    """

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self._parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()  # a state that was read has other lists

    def _share(self) -> None:
        first = 0
        for part in self._parts:
            end = first + len(part.param_groups)
            part.__setstate__({"state": self.state, "param_groups": self.param_groups[first:end]})
            first = end

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()


def build(config: Muon, groups: Groups, capturable: bool, plain: Plain) -> torch.optim.Optimizer:
    """The optimizer of a job file.

    Args:
        groups: of parameters; ``use_muon`` tells which are Muon's.
        capturable: its step will be recorded in a CUDA graph.
        plain: takes torch's compiler off an optimizer's methods.
    """
    muon = plain(Normalizing if config.normalize_weights else TimmMuon)
    options: dict[str, Any] = {
        "lr": config.lr,
        "momentum": config.momentum,
        "nesterov": config.nesterov,
        "ns_steps": config.newton_schulz_steps,
        "ns_coefficients": config.newton_schulz_coefficients,
        "adjust_lr_fn": "original",
        "capturable": capturable,
    }
    mine, others = ([group for group in groups if group["use_muon"] is by_muon] for by_muon in (True, False))
    parts = [muon(mine, **options)] if mine else []
    if others and config.other == "sgd":
        sgd = plain(torch.optim.SGD)
        parts.append(sgd(others, lr=config.lr, momentum=config.other_momentum, nesterov=config.nesterov, fused=True))
    elif others:
        adamw, betas = plain(torch.optim.AdamW), (config.other_beta1, config.other_beta2)
        parts.append(adamw(others, lr=config.lr, betas=betas, eps=config.other_eps, fused=True, capturable=capturable))
    return plain(Together)(parts)
