"""What is done to real jobs, and what they do themselves: cancel, requeue, chains, several clusters. Commands are stand-ins."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from launch_site import EXPERIMENT, Site, command, run_with

from hpc_cifar import runs
from hpc_cifar.errors import LaunchError, LostRank, RunError
from hpc_cifar.launch import control, job, requeue, several, slurm, status
from hpc_cifar.launch.job import TrainJob


def test_one_forgotten_job_hides_no_other_problem_of_scancel(tmp_path: Path, slurm_says: Any) -> None:
    slurm_says("7|RUNNING|None")
    lines = ["Kill job error on job id 6: Invalid job id specified", "Kill job error on job id 7: Access denied"]
    command(tmp_path / "bin", "scancel", f"printf 'scancel: error: %s\\n' {shlex.join(lines)} >&2; exit 1")
    with pytest.raises(LaunchError, match="scancel failed: Kill job error on job id 7: Access denied"):
        slurm.cancel(["6", "7"])
    command(tmp_path / "bin", "scancel", f"echo 'scancel: error: {lines[0]}' >&2; exit 1")
    slurm.cancel(["6"])


def test_cancel_names_the_jobs_of_the_last_submission_only(tmp_path: Path, slurm_says: Any) -> None:
    """Numbers of long ago may be other jobs' by now, or another cluster's."""
    slurm_says("8|RUNNING|None\n18|RUNNING|None")
    command(tmp_path / "bin", "scancel", f'echo "$@" >> {tmp_path}/cancelled')
    one, two = (run_with(tmp_path / "runs", old, {"state": "running"}) for old in ("7", "17"))
    for run, first in ((one, "8"), (two, "18")):
        run.add_job(executor="slurm", job_id=first)
        run.add_job(executor="slurm", job_id=f"{first}9", follows=first)
    control.cancel(one)
    list(several.cancel_all([one, two]))
    assert (tmp_path / "cancelled").read_text() == "8 89\n8 89 18 189\n"


def test_a_job_that_another_cluster_of_the_federation_took_is_not_here(tmp_path: Path, slurm_says: Any) -> None:
    slurm_says("7|REVOKED|None", "7|RUNNING|None")
    assert slurm.query(["7"]).jobs["7"].state == "RUNNING"


def test_a_refused_link_costs_only_the_links_behind_it(site: Site) -> None:
    count = f"n=$(($(cat {site.folder}/n 2>/dev/null || echo 0) + 1)); echo $n > {site.folder}/n"
    tested = 'if [ "$1" = --test-only ]; then echo "sbatch: Job 1 to start at 2030-01-01T00:00:00" >&2; exit; fi'
    limit = "if [ $n = 3 ]; then echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1; fi"
    command(site.folder / "bin", "sbatch", f"{tested}\n{count}\n{limit}\necho Submitted batch job $n")
    command(site.folder / "bin", "squeue", "echo '1|PENDING|Priority'; echo '2|PENDING|Dependency'")
    site.environment["PATH"] = f"{site.folder / 'bin'}:/usr/bin:/bin"
    (site.work / "chain.yaml").write_text("executor: slurm\nrequeue: false\nchain_links: 5\n")
    arguments = ("submit", site.job(), "--cluster", "./chain.yaml")
    done = site.cli(*arguments, "--parsable")
    run, job = done.stdout.split()
    assert job == "1"
    assert "is queued, but only 1 of the 5 jobs that continue it: sbatch refused the job: QOSMaxSubmit" in done.stderr
    assert site.status(runs.Run(site.runs / run))["state"] == "pending"
    shown = site.cli(*arguments, "--dry-run").stdout
    assert "a run that needs more goes on in up to 5 more, which wait behind it from the start" in shown
    over = site.cli(*arguments, "--gpus-per-node", "2", "--max-gpu-hours", "1", "--dry-run", code=2).stderr
    assert "the 6 jobs of this run may use 2.00 GPU-hours (6 jobs x 2 GPUs x 0.17 h)" in over


class Rank0:
    cluster, global_rank, num_tasks, job_id, raw_job_id = "slurm", 0, 1, "9_4", "9"


def test_a_time_limit_is_no_cancel(tmp_path: Path, slurm_says: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both end a job by TERM, and Slurm calls both COMPLETING while they do."""

    def submitits_handler(*_: Any) -> None:
        raise SystemExit("requeued")

    run = run_with(tmp_path / "runs", "9_4", {"state": "stopped"})
    monkeypatch.setattr(Rank0, "paths", Paths(tmp_path), raising=False)
    arguments = (signal.SIGUSR2, submitits_handler, {"state": "stopped", "reason": "terminated"})
    slurm_says("COMPLETING TimeLimit")
    with pytest.raises(SystemExit, match="requeued"):
        requeue.requeue(run, Rank0(), *arguments)
    assert run.state()["state"] == "requeued"
    slurm_says("COMPLETING None")
    requeue.requeue(run, Rank0(), *arguments)
    assert run.state()["state"] == "cancelled"


SHOWN = (
    " JobState={} Reason=None Dependency=(null) Requeue=1 Restarts={} EndTime=2026-11-28T15:00:00 PreemptTime={} Partition=x"
)


def test_term_alone_is_a_preemption_where_slurm_says_so(
    tmp_path: Path, slurm_says: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a grace time Slurm calls the job COMPLETING, as one that was cancelled."""
    handed: list[str] = []

    def submitits_handler(*_: Any) -> None:
        handed.append("over")
        raise SystemExit("requeued")

    monkeypatch.setattr(Rank0, "paths", Paths(tmp_path), raising=False)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")

    def told(restarts: int, preempted: str, state: str = "COMPLETING", chain: bool = False) -> tuple[str, str]:
        run = run_with(tmp_path / "runs", "9_4", {"state": "stopped", "reason": "terminated"})
        if chain:
            run.add_job(executor="slurm", job_id="10", follows="9_4")
            (run.path / "cluster.json").write_text('{"requeue": false, "preemptible": true}')
        slurm_says(f"{state} None", None, SHOWN.format(state, restarts, preempted))
        handed.clear()
        result = {"state": "stopped", "reason": "terminated"}
        try:
            requeue.requeue(run, Rank0(), signal.SIGUSR2, submitits_handler, result)
        except SystemExit as left:
            return f"left with {left.code}", str(run.state()["state"])
        return "returned", str(run.state()["state"])

    assert told(1, "None") == ("returned", "cancelled")
    assert told(1, "None", chain=True) == ("returned", "cancelled")
    assert told(1, "2026-11-28T15:00:00", chain=True) == ("left with 0", "requeued")  # the next link goes on
    assert told(1, "2026-11-28T15:00:00", state="RUNNING", chain=True) == ("left with 0", "requeued")
    assert told(2, "None") == ("left with 0", "requeued") and not handed, "Slurm has requeued it already"
    assert told(1, "2026-11-28T15:00:00") == ("left with requeued", "requeued") and handed
    assert told(1, "2026-11-28T14:59:00") == ("returned", "cancelled"), "cancelled a minute after the preemption began"


def test_a_signal_during_the_first_imports_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit listens before we do, and would requeue a job that must not be, or fail it where that is forbidden."""
    import submitit

    class Finder:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "hpc_cifar.runs":
                os.kill(os.getpid(), signal.SIGUSR2)

    class Environment(Rank0):
        num_nodes, local_rank = 1, 0

        @staticmethod
        def _usr_sig() -> signal.Signals:
            return signal.SIGUSR2

    seen: list[Any] = []
    run = run_with(tmp_path / "runs", "9_4", {"state": "pending"})
    monkeypatch.setattr(submitit, "JobEnvironment", Environment)
    monkeypatch.setattr(requeue, "requeue", lambda run, env, usr, hand_over, result: seen.append((hand_over, result)))
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "hpc_cifar.runs")
    monkeypatch.delattr("hpc_cifar.runs")
    submitits = lambda *_: seen.append("submitit")  # noqa: E731
    before = {number: signal.signal(number, submitits) for number in (signal.SIGUSR2, signal.SIGTERM)}
    try:
        TrainJob(run.path, tmp_path)()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert seen == [(submitits, {"state": "requeued"})]


class Paths:
    def __init__(self, folder: Path) -> None:
        self.submitted_pickle = folder / "9_submitted.pkl"


def test_a_hung_element_requeues_itself_and_a_cancelled_one_nothing(
    tmp_path: Path, slurm_says: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(state: str) -> tuple[str, str]:
        slurm_says(state)
        command(tmp_path / "bin", "scontrol", f'echo "$@" >> {tmp_path}/asked')
        run = run_with(tmp_path / "runs", "9_4", {"state": "running", "step": 5})
        (tmp_path / "asked").unlink(missing_ok=True)
        assert requeue.restart_hung(run, Rank0(), "hung after step 5") == 1
        asked = tmp_path / "asked"
        return str(run.state()["state"]), asked.read_text() if asked.exists() else ""

    monkeypatch.setenv("SLURM_JOB_ID", "9")
    assert hang("RUNNING") == ("requeued", "requeue Incomplete 9_4\n"), "never the plain number, which is the whole array"
    assert hang("COMPLETING") == ("running", "")
    assert hang("CANCELLED") == ("cancelled", "")


def test_a_job_that_lost_a_silent_rank_goes_back_to_the_queue(
    tmp_path: Path, slurm_says: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setattr(requeue, "LAST_WORD_S", 0.1)
    slurm_says("RUNNING")
    command(tmp_path / "bin", "scontrol", f'echo "$@" >> {tmp_path}/asked')
    run = run_with(tmp_path / "runs", "9_4", {"state": "running", "step": 5})
    for restart in range(requeue.MAX_HANGS + 1):  # again and again at one step: it is no accident
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        assert requeue.restart_after_loss(run, Rank0(), LostRank("connection closed by peer")) is (restart < requeue.MAX_HANGS)
    assert (tmp_path / "asked").read_text() == "requeue Incomplete 9_4\n" * requeue.MAX_HANGS
    talking = run_with(tmp_path / "runs", "9_4", {"state": "running", "step": 5})
    job.record_failure(talking, ValueError("mine"), rank=1, segment=job.segment())
    assert not requeue.restart_after_loss(talking, Rank0(), LostRank("connection closed by peer")), "it could say why"
    assert talking.state()["reason"] == "rank 1: ValueError: mine"


def test_a_cancel_in_the_moment_of_a_requeue_is_told_to_slurm_again(
    tmp_path: Path, slurm_says: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm heard of the cancel first, and then of the requeue, which brings the job back."""
    slurm_says("9_4|RUNNING|None")
    command(tmp_path / "bin", "scancel", f'echo "$*" >> {tmp_path / "cancelled"}')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    run = run_with(tmp_path / "runs", "9_4", {"state": "requeued"})

    class Rank0:
        cluster, job_id, global_rank = "slurm", "9_4", 0
        paths = SimpleNamespace(submitted_pickle=tmp_path / "job.pkl")

    def as_submitit(number: int, frame: Any) -> None:
        run.cancel_marker.touch()
        raise SystemExit(-1)

    with pytest.raises(SystemExit):
        requeue.requeue(run, Rank0(), signal.SIGUSR2, as_submitit, {"state": "requeued"})
    assert (tmp_path / "cancelled").read_text() == "9_4\n" and run.state()["state"] == "cancelled"


def test_hours_left_are_those_of_the_present_job(tmp_path: Path, slurm_says: Any) -> None:
    import time

    plan = {"batch_size": 64, "gpu_hours": 8.0, "placement": {"nodes": 2, "gpus_per_node": 4}}
    run = runs.create(tmp_path / "runs", runs.new_run_id("deep", tmp_path / "runs"), EXPERIMENT, plan, {})
    run.add_job(executor="slurm", job_id="7")
    run.write_state(state="running", step=5, gpu_hours=20.0)  # of the jobs before it too
    begun = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - 1800))
    slurm_says(f"7|RUNNING|None|{begun}|n1")
    assert status.status(run).gpu_hours_left == pytest.approx(4.0, abs=0.05)
    slurm_says("7|PENDING|BeginTime|N/A|")
    assert (status.status(run).gpu_hours, status.status(run).gpu_hours_left) == (20.0, 8.0)


def test_a_slurm_that_does_not_answer_is_not_a_job_that_is_queued(site: Site) -> None:
    command(site.folder / "bin", "squeue", "echo 'squeue: error: Unable to contact slurm controller' >&2; exit 1")
    site.environment["PATH"] = f"{site.folder / 'bin'}:/usr/bin:/bin"
    run = runs.create(site.runs, runs.new_run_id("tiny", site.runs), EXPERIMENT, {}, {})
    run.add_job(executor="slurm", job_id="7")
    run.write_state(state="failed", reason="why")
    refused = site.cli("resume", run.id, code=1).stderr
    assert "Slurm does not answer, so nobody can say whether job 7 is still queued" in refused


def test_another_clusters_jobs_are_neither_asked_for_nor_cancelled(
    tmp_path: Path, slurm_says: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two clusters share a home folder; job 7 of this one is somebody else's work."""
    monkeypatch.setattr(slurm, "configuration", lambda: {"ClusterName": "here"})
    slurm_says("7|RUNNING|None")
    run = run_with(tmp_path / "runs", "7", {"state": "pending"})
    assert status.status(run).state == "running"
    run.add_job(executor="slurm", job_id="7", slurm_cluster="there")
    seen = status.status(run)
    assert (seen.state, seen.reason) == (
        "pending",
        "on cluster there, which cannot be asked from here; this is what the run last wrote",
    )
    with pytest.raises(LaunchError, match="is on cluster there: cancel it there"):
        control.cancel(run)
    assert not run.cancel_marker.exists()
    run.write_state(state="failed", reason="why")
    with pytest.raises(RunError, match="it was submitted on cluster there, which cannot be asked from here"):
        control.resume(run, data_root=tmp_path)
