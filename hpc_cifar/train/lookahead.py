"""Lookahead: slow weights that follow an optimizer's weights (Zhang et al. 2019)."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim.lookahead import Lookahead as TimmLookahead

SLOW = "lookahead_slow_buff"  # timm's name for the slow weights of a parameter in the optimizer's state


class Lookahead(TimmLookahead):  # type: ignore[misc, unused-ignore]
    """timm's, but the slow weights begin as the initial weights, as in the paper's first algorithm.

    timm's begin as the weights at the first return, which therefore does nothing.
    """

    def step(self, closure: None = None) -> None:  # type: ignore[override, unused-ignore]
        self.step_fast()
        self.step_slow()

    def step_fast(self) -> None:
        """An update of the fast weights, all of it on the device."""
        base: Any = self._base_optimizer
        parameters = [p for group in base.param_groups for p in group["params"]]
        # a copy before the first update: optimizers take a state that is not empty for one that they have made
        slow = [] if SLOW in base.state.get(parameters[0], {}) else [p.detach().clone() for p in parameters]
        base.step()
        for parameter, weights in zip(parameters, slow, strict=False):
            base.state[parameter][SLOW] = weights

    @torch.no_grad()
    def step_slow(self) -> None:
        """Count the update, and return to the slow weights when it is time: the host decides that."""
        for group in self._base_optimizer.param_groups:
            group["lookahead_step"] += 1
            if group["lookahead_step"] % group["lookahead_k"] == 0:
                self.update_slow(group)  # type: ignore[no-untyped-call]
