"""The job of a run that is another user's: asked for by its number, and not called failed where Slurm hides it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest
from launch_site import command, run_with

from hpc_cifar import runs
from hpc_cifar.launch import slurm, status


def of_a_colleague(root: Path, monkeypatch: pytest.MonkeyPatch, job_id: str) -> runs.Run:
    """A run whose folder is another user's, as this user sees it."""
    run = run_with(root, job_id, {"state": "running", "step": 5})
    monkeypatch.setattr(os, "getuid", lambda: run.path.stat().st_uid + 1)
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
    monkeypatch.setattr(os, "getuid", lambda: own.path.stat().st_uid)
    assert status.status(own).state == "failed"
