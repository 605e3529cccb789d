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
    return any(str(row.get("job_id")) == job_id and row.get("follows") for row in run.jobs())


def next_link(run: Run, job_id: str) -> str | None:
    """The job that waits behind this one."""
    return next((str(row["job_id"]) for row in run.jobs() if str(row.get("follows")) == job_id), None)


def profile(run: Run) -> dict[str, Any]:
    """The profile that the run was submitted with, or ``{}``."""
    from .. import files

    found = files.read_json(run.path / "cluster.json")
    return found if isinstance(found, dict) else {}
