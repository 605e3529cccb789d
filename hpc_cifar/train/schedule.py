"""The factor on the learning rate: a pure function of the step, so there is nothing to save."""

from __future__ import annotations

import math

from ..config.experiment import Constant, Cosine, OneCycle, ScheduleConfig, Step


def factor(schedule: ScheduleConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Factor on the optimizer's ``lr`` for the update number ``step``.

    Args:
        step: updates made before this one, 0 .. total_steps - 1.

    Returns:
        0 <= factor <= 1. Warm-up rises linearly and reaches 1 at its last step; cosine (Loshchilov & Hutter 2017) and the
        fall of one-cycle (Smith 2018) run over what is left.
    """
    if isinstance(schedule, OneCycle):
        top = max(1.0, schedule.peak * total_steps)
        if step < top:
            return schedule.initial_factor + (1 - schedule.initial_factor) * (step + 1) / (top + 1)
        left = (total_steps - step) / (total_steps - top + 1)
        return schedule.final_factor + (1 - schedule.final_factor) * left
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    match schedule:
        case Constant():
            return 1.0
        case Cosine():
            done = (step - warmup) / max(1, total_steps - warmup)
            return schedule.final_factor + (1 - schedule.final_factor) * (1 + math.cos(math.pi * done)) / 2
        case Step():
            epoch = step // steps_per_epoch + 1
            return float(schedule.factor ** sum(epoch >= start for start in schedule.epochs))
