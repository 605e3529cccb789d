"""A run as a chain of jobs submitted beforehand, where a job cannot requeue itself.

Each follow-up job waits until the one before has ended, however it ended (``afterany``), and continues the run from its last
checkpoint. This module is what a job on a node needs of that; it asks nobody, since Slurm's programs may be missing there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..runs import Run


def is_link(run: Run, job_id: str) -> bool:
    """Whether this job follows another one of the run."""
    return any(job.job_id == job_id and job.follows for job in run.jobs())


def next_link(run: Run, job_id: str) -> str | None:
    """The job that waits behind this one."""
    return next((job.job_id for job in run.jobs() if job.follows == job_id), None)


def profile(run: Run) -> dict[str, Any]:
    """The profile that the run was submitted with, or ``{}``."""
    from .. import files

    return files.read_object(run.path / "cluster.json")
