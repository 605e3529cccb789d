"""Jobs that are hard to ask for: another user's, which Slurm may hide, and those of a record that cannot be read."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from launch_site import command, run_with

from hpc_cifar import owner, runs
from hpc_cifar.errors import LaunchError
from hpc_cifar.launch import several, slurm, status


def of_a_colleague(root: Path, monkeypatch: pytest.MonkeyPatch, job_id: str) -> runs.Run:
    """A run whose folder is another user's, as this user sees it."""
    run = run_with(root, job_id, {"state": "running", "step": 5})
    monkeypatch.setattr(owner, "uid", lambda: run.path.stat().st_uid + 1)
    return run


def squeue_by(folder: Path, listing: str, by_id: str, code: int = 0, err: str = "") -> None:
    """One that answers a question for a user's jobs and one for jobs by their ids apart."""
    asked = f"case \"$*\" in *--jobs=*) printf '%s\\n' {shlex.quote(by_id)}; echo {shlex.quote(err)} >&2; exit {code};; esac"
    command(folder / "bin", "squeue", f"{asked}\nprintf '%s\\n' {shlex.quote(listing)}")


def test_a_colleagues_running_job_has_not_failed(tmp_path: Path, slurm_says: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm_says("")
    run = of_a_colleague(tmp_path / "runs", monkeypatch, "7")
    squeue_by(tmp_path, "99|RUNNING|None", "7|RUNNING|None|2030-01-01T00:00:00|n[1-2]")
    assert status.status(run).state == "running" and status.is_live(run) is True
    squeue_by(tmp_path, "99|RUNNING|None", "7|PENDING|Priority")
    assert status.status(run).state == "requeued"
    squeue_by(tmp_path, "", "", 1, "slurm_load_jobs error: Invalid job id specified")
    assert (status.status(run).state, status.status(run).reason) == ("failed", status.VANISHED)
    squeue_by(tmp_path, "", "", 1, "slurm_load_jobs error: Access/permission denied")
    assert (status.status(run).state, status.status(run).reason) == ("running", status.HIDDEN)
    assert status.is_live(run) is None


def test_where_jobs_are_private_their_absence_says_nothing(
    tmp_path: Path, slurm_says: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm_says("", None, "PrivateData             = accounts,jobs")
    monkeypatch.setattr(slurm, "configuration", slurm.configuration.__wrapped__)
    run = of_a_colleague(tmp_path / "runs", monkeypatch, "7")
    assert (status.status(run).state, status.status(run).reason) == ("running", status.HIDDEN)
    own = run_with(tmp_path / "runs", "8", {"state": "running"})
    monkeypatch.setattr(owner, "uid", lambda: own.path.stat().st_uid)
    assert status.status(own).state == "failed"


def test_a_run_whose_jobs_cannot_be_read_does_not_keep_others_from_being_cancelled(
    tmp_path: Path, slurm_says: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm_says("7|PENDING|Priority\n8|PENDING|Priority")
    good, bad = (run_with(tmp_path / name, number, {"state": "pending"}) for name, number in (("a", "7"), ("b", "8")))
    (bad.path / "jobs.jsonl").open("a").write('{"executor": "slurm", "job_id": {}}\n')
    told: list[str] = []
    monkeypatch.setattr(slurm, "cancel", told.extend)
    answers = several.cancel_all([good, bad])
    assert "cancelled while it was waiting (job 7)" in next(answers) and told == ["7"]
    with pytest.raises(LaunchError, match=r"job_id should be .*: nobody can say which job to cancel"):
        next(answers)
    assert not bad.cancel_marker.exists()
    assert [row.state for row in status.statuses([bad])] == ["pending"], "its job is in the queue"
