"""What a plan says of a run: its epochs, and the images and GPU-hours that are left."""

from __future__ import annotations

import math

from .. import records
from ..plan import Plan
from . import age, slurm

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
    age_s, limit_s = age.since_s(known.start), float(plan.time_s or math.inf)
    if not -SKEW_S <= age_s <= limit_s + SKEW_S:  # the clock was set: what the run has measured itself is left
        return max(0.0, round(plan.gpu_hours - (used or 0.0), 6))
    gpus = plan.placement.nodes * plan.placement.gpus_per_node
    return max(0.0, round(plan.gpu_hours - gpus * max(0.0, age_s) / 3600, 6))


def planned_epochs(plan: Plan) -> int | None:
    return plan.total_steps // plan.steps_per_epoch if plan.steps_per_epoch and plan.total_steps else None
