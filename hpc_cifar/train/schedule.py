"""The factor on the learning rate: a pure function of the step and of the finished epochs, so there is nothing to save."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..config.optimization import (
    Constant,
    Cosine,
    EarlyStopping,
    Exponential,
    InverseTime,
    Linear,
    OneCycle,
    Plateau,
    ScheduleConfig,
    Staged,
    Step,
    Triangular,
)
from ..track.rows import improvements

History = Sequence[Mapping[str, Any]]
"""Rows of the finished epochs, in order; those that were evaluated have ``val_loss`` and ``val_accuracy``."""


def factor(
    schedule: ScheduleConfig, step: int, steps_per_epoch: int, total_steps: int, *, lr: float = 1.0, history: History = ()
) -> float:
    """Factor on the rate ``lr`` for the update number ``step``.

    Args:
        step: updates made before this one, 0 .. total_steps - 1.
        lr: the optimizer's, which the rates in ``staged`` and ``min_lr`` are related to.
        history: of the epochs before this step's.

    Returns:
        0 <= factor, at most 1 but for ``staged``. Warm-up rises linearly and reaches 1 at its last step; cosine (Loshchilov &
        Hutter 2017), linear and the fall of one-cycle (Smith 2018) run over what is left.
    """
    if isinstance(schedule, OneCycle):
        top = max(1.0, schedule.peak * total_steps)
        if step < top:
            return schedule.initial_factor + (1 - schedule.initial_factor) * (step + 1) / (top + 1)
        left = (total_steps - step) / (total_steps - top + 1)
        return schedule.final_factor + (1 - schedule.final_factor) * left
    if isinstance(schedule, Triangular):
        period = schedule.period_epochs * steps_per_epoch
        height = schedule.decay ** (step // period) * (1 - abs(2 * (step % period) / period - 1))
        return float(schedule.initial_factor + (1 - schedule.initial_factor) * height)
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    epoch = step // steps_per_epoch + 1
    done = (step - warmup) / max(1, total_steps - warmup)
    match schedule:
        case Constant():
            return 1.0
        case Linear():
            return schedule.final_factor + (1 - schedule.final_factor) * (1 - done)
        case Cosine():
            return schedule.final_factor + (1 - schedule.final_factor) * (1 + math.cos(math.pi * done)) / 2
        case Step():
            return float(schedule.factor ** sum(epoch >= start for start in schedule.epochs))
        case Staged():
            return next((stage.lr / lr for stage in reversed(schedule.stages) if epoch >= stage.epoch), 1.0)
        case Exponential():
            return float(schedule.factor ** (step / steps_per_epoch if schedule.every_step else epoch - 1))
        case InverseTime():
            return 1 / (1 + schedule.decay * step)
        case Plateau():
            return _plateau(schedule, lr, history)


def _plateau(schedule: Plateau, lr: float, history: History) -> float:
    """As Keras' ReduceLROnPlateau counts."""
    result, waited, cooling = 1.0, 0, 0
    for better in improvements(history, schedule.monitor, schedule.min_delta):
        if cooling:
            cooling -= 1
            waited = 0
        if better:
            waited = 0
        elif not cooling:
            waited += 1
            if waited >= schedule.patience:
                result = max(result * schedule.factor, min(result, schedule.min_lr / lr))
                waited, cooling = 0, schedule.cooldown
    return result


def stopped_early(stopping: EarlyStopping | None, history: History) -> bool:
    """Whether the run is finished though epochs are left."""
    if stopping is None:
        return False
    waited = 0
    for better in improvements(history, stopping.monitor, stopping.min_delta):
        waited = 0 if better else waited + 1
        if waited >= stopping.patience:
            return True
    return False
