"""What is left of a run: images and GPU-hours; and how long ago something was."""

from __future__ import annotations

import datetime
import math
import time
from typing import Any

from .. import records
from ..plan import Plan
from . import slurm

SKEW_S = 300.0  # between the clocks of a site
NO_PLAN = records.of(Plan, {})


def images_left(plan: Plan, step: int, total: int) -> int | None:
    """Images of the steps after ``step``; the last batch of every epoch may be smaller than the others."""
    batch, images, steps = plan.batch_size, plan.train_images, plan.steps_per_epoch
    if not batch or not images or not steps:
        return max(total - step, 0) * batch if batch else None

    def until(number: int) -> int:
        return number // steps * images + min(number % steps * batch, images)

    return max(until(total) - until(step), 0)


def hours_left(plan: Plan, used: float | None, known: slurm.JobState | None) -> float:
    """What the present job, or the next one where none runs, may still use: every job has the whole time limit for itself."""
    if known is None:
        return max(0.0, round(plan.gpu_hours - (used or 0.0), 6))
    if not known.active:
        return plan.gpu_hours
    age_s, limit_s = since_s(known.start), float(plan.time_s or math.inf)
    if not -SKEW_S <= age_s <= limit_s + SKEW_S:  # the clock was set: what the run has measured itself is left
        return max(0.0, round(plan.gpu_hours - (used or 0.0), 6))
    gpus = plan.placement.nodes * plan.placement.gpus_per_node
    return max(0.0, round(plan.gpu_hours - gpus * max(0.0, age_s) / 3600, 6))


def planned_epochs(plan: Plan) -> int | None:
    return plan.total_steps // plan.steps_per_epoch if plan.steps_per_epoch and plan.total_steps else None


def age_s(stamp: Any) -> float:
    """How far it is from now: a time to come is one of before the clock was set back, or of a machine with another clock."""
    seconds = abs(since_s(stamp))
    return float("inf") if math.isnan(seconds) else seconds


def since_s(stamp: str | None) -> float:
    """Seconds since then by the clock of this machine; nan without a time."""
    try:
        return time.time() - datetime.datetime.fromisoformat(str(stamp)).timestamp()
    except (ValueError, OverflowError, OSError):  # no time at all, or of a year that the system does not know
        return math.nan
