"""A run as a chain of jobs submitted beforehand, where a job cannot requeue itself.

Each follow-up job waits until the one before has ended, however it ended (``afterany``), and continues the run from its last
checkpoint. This module is what a job on a node needs of that; it asks nobody, since Slurm's programs may be missing there.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..runs import Run


def is_link(run: Run, job_id: str) -> bool:
    """Whether this job follows another one of the run."""
    return any(str(row.get("job_id")) == job_id and row.get("follows") for row in run.jobs())


def next_link(run: Run, job_id: str) -> str | None:
    """The job that waits behind this one."""
    return next((str(row["job_id"]) for row in run.jobs() if str(row.get("follows")) == job_id), None)


def can_requeue(run: Run) -> bool:
    """Whether a job on this node can requeue itself."""
    return bool(_profile(run).get("requeue", True)) and shutil.which("scontrol") is not None


def term_means_preemption(run: Run) -> bool:
    """What the profile says; asked only where Slurm cannot say whether a TERM came from a preemption or from ``scancel``."""
    return bool(_profile(run).get("preemptible"))


def _profile(run: Run) -> dict[str, Any]:
    from .. import files

    found = files.read_json(run.path / "cluster.json")
    return found if isinstance(found, dict) else {}


def hand_over(run: Run, job_id: str, result: dict[str, Any], reason: str = "") -> bool:
    """Leave the rest of the run to the next link, if there is one and requeueing is not possible.

    A job that was only terminated (``scancel``) leaves nothing: what follows must not take up a cancelled run.
    """
    link = next_link(run, job_id)
    if link is None or can_requeue(run) or result.get("state") != "requeued":
        return False
    words = f"{reason}; " if reason else ""
    run.write_state(**{**run.state(), "state": "requeued", "reason": f"{words}it goes on as job {link}"})
    return True


def stays_ended(run: Run, rank: int) -> str:
    """Why a link must not take the run up: ``failed`` for a reason that a restart does not mend, ``cancelled``; else ""."""
    from .. import files

    state = run.state()
    if state.get("state") == "stopped" and state.get("reason") == "pruned":
        return "stopped"
    if state.get("state") == "stopped":  # by a TERM that no preemption signal went with
        if rank == 0:
            run.write_state(**{**state, "state": "cancelled", "reason": "cancelled with scancel"})
        return "cancelled"
    reports = files.read_json_lines(run.path / "failures.jsonl")
    last = [row for row in reports if row.get("segment") == reports[-1].get("segment")]
    final = state.get("state") == "failed" and any(row.get("final") for row in last)
    return str(state["state"]) if final or state.get("state") == "cancelled" else ""
