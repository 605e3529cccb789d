"""What is done to real jobs, and what they do themselves: cancel, requeue, chains, several clusters. Commands are stand-ins."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from launch_site import EXPERIMENT, Site, command, run_with

from hpc_cifar import files, runs
from hpc_cifar.errors import LaunchError, RunError
from hpc_cifar.launch import control, interruptions, job, own_job, several, slurm, status
from hpc_cifar.launch.job import TrainJob
from hpc_cifar.launch.policy import Event


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
    """Of an element of an array."""

    cluster, global_rank, num_tasks, job_id, raw_job_id, num_nodes, local_rank = "slurm", 0, 1, "9_4", "9", 1, 0
    hostnames = ("n1",)

    @staticmethod
    def _usr_sig() -> signal.Signals:
        return signal.SIGUSR2


STOPPED = {"state": "stopped", "reason": "terminated"}
PREEMPTED = "2026-11-28T15:00:00"


@pytest.fixture
def element(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the job of a run, on a Slurm whose ``scontrol`` notes what it is asked to do."""
    monkeypatch.setattr(own_job, "LAST_WORD_S", 0.3)
    for name, value in {"SLURM_JOB_ID": "13", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def make(
        state: str, *, reason: str = "None", restarts: int = 0, preempted: str = "None", problem: str = "",
        profile: str = "{}", link: bool = False, run: runs.Run | None = None,
    ) -> own_job.OwnJob:  # fmt: skip
        shown = (
            f" JobState={state} Reason={reason} Dependency=(null) Requeue=1 Restarts={restarts} EndTime=2026-11-28T15:00:00 "
            f"PreemptTime={preempted} Partition=x"
        )
        refusal = f"echo {shlex.quote(problem)} >&2; exit 1" if problem else f'echo "$@" >> {tmp_path}/asked'
        told = f"echo {shlex.quote(shown)}" if state else "exit 1"
        command(tmp_path / "bin", "scontrol", f'case "$*" in *show*) {told} ;; *) {refusal} ;; esac')
        command(tmp_path / "bin", "scancel", f'echo "scancel $@" >> {tmp_path}/asked')
        command(tmp_path / "bin", "squeue", "exit 1")
        (tmp_path / "asked").unlink(missing_ok=True)
        if run is None:
            run = run_with(tmp_path / "runs", "9_4", dict(STOPPED))
        (run.path / "cluster.json").write_text(profile)
        if link:
            run.add_job(executor="slurm", job_id="10", follows="9_4")
        return own_job.OwnJob(run, Rank0())

    return make


@pytest.fixture
def asked(tmp_path: Path) -> Any:
    def read() -> str:
        path = tmp_path / "asked"
        return path.read_text() if path.exists() else ""

    return read


AGAIN = "requeue Incomplete 9_4\n"  # never the plain number, which is the whole array


def outcome(own: own_job.OwnJob, event: Event, result: dict[str, Any] | None = None) -> tuple[str, str]:
    try:
        own.stopped(event, dict(result or STOPPED))
    except SystemExit as left:
        return f"left with {left.code}", str(own.run.state().state)
    return "returned", str(own.run.state().state)


CHAIN = {"profile": '{"requeue": false, "preemptible": true}', "link": True}


@pytest.mark.parametrize(
    ("slurm_word", "expected", "requeued"),
    [
        # both a time limit and a cancel end a job by TERM, and Slurm calls both COMPLETING while they do
        ({"state": "COMPLETING", "reason": "TimeLimit"}, ("left with 0", "requeued"), True),
        ({"state": "COMPLETING"}, ("returned", "cancelled"), False),
        ({"state": "COMPLETING", **CHAIN}, ("returned", "cancelled"), False),
        ({"state": "CANCELLED"}, ("returned", "cancelled"), False),
        # without a grace time Slurm calls a preempted job COMPLETING, as one that was cancelled, and requeues it
        ({"state": "COMPLETING", "preempted": PREEMPTED}, ("left with 0", "requeued"), False),
        ({"state": "COMPLETING", "preempted": PREEMPTED, **CHAIN}, ("left with 0", "requeued"), False),
        ({"state": "COMPLETING", "preempted": "2026-11-28T14:59:00"}, ("returned", "cancelled"), False),
        ({"state": "RUNNING", "preempted": PREEMPTED}, ("left with 0", "requeued"), True),
        ({"state": "RUNNING", "preempted": PREEMPTED, **CHAIN}, ("left with 0", "requeued"), False),
        ({"state": "RUNNING", "restarts": 1}, ("left with 0", "requeued"), False),  # Slurm has requeued it already
        ({"state": "RUNNING"}, ("left with 0", "requeued"), True),  # a rank was lost
        ({"state": ""}, ("returned", "stopped"), False),  # Slurm does not answer
        ({"state": "", "profile": '{"preemptible": true}'}, ("left with 0", "requeued"), True),
        ({"state": "", **CHAIN}, ("left with 0", "requeued"), False),
    ],
)
def test_term_alone(slurm_word: dict[str, Any], expected: tuple[str, str], requeued: bool, element: Any, asked: Any) -> None:
    own = element(**slurm_word)
    assert outcome(own, Event.TERMINATED) == expected
    # at the time limit Slurm takes the job for complete, and does nothing with the first request
    again = AGAIN + AGAIN.replace("Incomplete ", "") if slurm_word.get("reason") == "TimeLimit" else AGAIN
    assert asked() == again * requeued


def test_a_preemption_that_cannot_be_requeued(element: Any, asked: Any) -> None:
    own = element("RUNNING", problem="scontrol: error: Requested operation is presently disabled")
    assert outcome(own, Event.PREEMPTED) == ("left with 1", "failed")
    assert "could not be requeued (scontrol: error: Requested operation is presently disabled)" in own.run.state().reason
    own = element("RUNNING", problem="disabled", link=True)
    assert outcome(own, Event.PREEMPTED) == ("left with 0", "requeued")
    assert own.run.state().reason == "it goes on as job 10"
    assert [row.event for row in interruptions.rows(own.run)] == ["preempted"]


def test_a_signal_during_the_first_imports_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, element: Any) -> None:
    """submitit listens before we do, and would requeue a job that must not be, or fail it where that is forbidden."""
    import submitit

    class Finder:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "hpc_cifar.runs":
                os.kill(os.getpid(), signal.SIGUSR2)

    seen: list[Any] = []
    own = element("RUNNING")
    monkeypatch.setattr(submitit, "JobEnvironment", Rank0)
    monkeypatch.setattr(own_job.OwnJob, "stopped", lambda self, event, result: seen.append((event, result)) or result)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "hpc_cifar.runs")
    monkeypatch.delattr("hpc_cifar.runs")
    submitits = lambda *_: seen.append("submitit")  # noqa: E731
    before = {number: signal.signal(number, submitits) for number in (signal.SIGUSR2, signal.SIGTERM)}
    try:
        TrainJob(own.run.path, tmp_path)()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert seen == [(Event.PREEMPTED, {"state": "requeued"})]


def test_a_hung_element_requeues_itself_and_a_cancelled_one_nothing(element: Any, asked: Any) -> None:
    def hang(state: str) -> tuple[str, str]:
        own = element(state)
        own.run.update_state(state="running", step=5)
        assert own.hung("hung after step 5") == 1
        return str(own.run.state().state), asked().replace("scancel --signal=CONT 9_4\n", "")

    assert hang("RUNNING") == ("requeued", AGAIN)
    assert hang("COMPLETING") == ("cancelled", ""), "without any reason that is what Slurm calls a cancelled job"
    assert hang("CANCELLED") == ("cancelled", "")


def test_a_job_that_lost_a_silent_rank_goes_back_to_the_queue(
    element: Any, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So often without a checkpoint in between; a checkpoint, or a person who submits the run again, begins the count anew."""
    run = element("RUNNING").run
    for restart in range(18):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        own = element("RUNNING", restarts=restart, run=run)
        goes_on = own.lost(Event.RANK_LOST, "connection closed by peer")
        assert goes_on is (restart not in (5, 11, 17)), f"restart {restart}: {run.state()}"
        assert asked() == AGAIN * goes_on
        if restart == 5:
            assert "connection closed by peer; lost rank: 6 times without a checkpoint" in run.state().reason
            run.checkpoints.mkdir(exist_ok=True)
            (run.checkpoints / "latest").symlink_to("step-00000070")
        if restart == 11:
            interruptions.begin_anew(run)


def test_what_killed_a_rank_is_told(element: Any, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In srun's words, in the log of the job since this segment began; the rank that is left hears a TERM alone."""
    killed = "srun: error: n1: task 1: Killed\nsrun: Terminating StepId=9.0\nsrun: error: n1: task 0: Terminated\n"
    own = element("RUNNING")
    log = own.run.submitit / "9_4_0_log.err"
    log.parent.mkdir(exist_ok=True)
    log.write_text(killed)
    words = {
        killed: "rank 1 on n1 was killed by signal 9 (SIGKILL), usually for memory",
        "srun: error: n1: task 1: Out Of Memory\n": "rank 1 on n1 was killed for memory",
        f"slurmstepd: error: Detected 1 oom_kill event in StepId=9.0.\n{killed}": "rank 1 on n1 was killed for memory",
        "srun: error: n2: tasks 2-3: Segmentation fault (core dumped)\n": "ranks 2-3 on n2 was killed by signal 11 (SIGSEGV)",
    }
    for restart, (text, reason) in enumerate(words.items()):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        own = element("RUNNING", restarts=restart, run=own.run)
        log.write_text(log.read_text() + text)
        interruptions.begin_anew(own.run)
        assert outcome(own, Event.TERMINATED) == ("left with 0", "requeued")
        assert own.run.state().reason == reason.replace("ranks 2-3 on n2 was", "ranks 2-3 on n2 were")
        [row] = interruptions.rows(own.run)
        assert row.event == ("out of memory" if "for memory" in reason and "usually" not in reason else "killed rank")
    log.write_text("")
    own.run.submitit.joinpath("9_4_0_log.err").write_text("")


def test_out_of_memory_ends_at_the_second_time(element: Any, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = None
    for restart in range(2):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        own = element("RUNNING", restarts=restart, run=run)
        run = own.run
        log = run.submitit / "9_4_0_log.err"
        log.parent.mkdir(exist_ok=True)
        with log.open("a") as stream:
            stream.write("srun: error: n1: task 1: Out Of Memory\n")
        assert own.lost(Event.RANK_LOST, "connection closed by peer") is (restart == 0)
    assert run is not None
    assert run.state().state == "failed"
    assert "rank 1 on n1 was killed for memory; out of memory: 2 times" in run.state().reason
    assert "resources.memory_gib_per_node" in run.state().reason


def test_one_rank_ends_a_segment_and_the_others_follow(element: Any, asked: Any) -> None:
    own = element("RUNNING")
    second = own_job.OwnJob(own.run, Rank0())
    assert own.lost(Event.RANK_LOST, "closed") and second.lost(Event.RANK_LOST, "closed as well")
    assert asked() == AGAIN
    assert second.hung("hung") == 1 and outcome(second, Event.PREEMPTED)[0] == "left with 0"
    assert asked() == AGAIN + "scancel --signal=CONT 9_4\n"


@pytest.mark.parametrize("event", [Event.PREEMPTED, Event.TERMINATED])
def test_what_squeue_alone_says_of_an_end_is_no_cancel(tmp_path: Path, element: Any, event: Event) -> None:
    """It calls a job that was preempted COMPLETING, too; scontrol is away, or does not answer."""
    own = element("RUNNING", **CHAIN)
    command(tmp_path / "bin", "scontrol", "exit 1")
    command(tmp_path / "bin", "squeue", "echo COMPLETING None")
    assert outcome(own, event) == ("left with 0", "requeued")


def test_a_rank_that_could_say_why_is_no_lost_one(element: Any, asked: Any) -> None:
    own = element("RUNNING")
    job.record_failure(own.run, ValueError("mine"), rank=1, segment=job.segment())
    assert not own.lost(Event.RANK_LOST, "connection closed by peer")
    assert own.run.state().reason == "rank 1: ValueError: mine" and asked() == ""


def test_a_hang_is_no_word_of_a_rank_and_a_cancel_no_failure(element: Any, asked: Any) -> None:
    own = element("RUNNING")
    files.append_json_line(
        own.run.path / "failures.jsonl", {"segment": job.segment(), "rank": 0, "reason": "hung", "hang": True}
    )
    assert own.lost(Event.RANK_LOST, "connection closed by peer") and asked() == AGAIN
    own = element("CANCELLED")
    assert own.lost(Event.RANK_LOST, "connection closed by peer"), "the rank leaves quietly, and nobody calls the run failed"
    assert own_job.OwnJob(own.run, Rank0()).follow() and own.run.state().state == "cancelled"


def test_a_requeue_that_nobody_answered_is_asked_for_again(
    tmp_path: Path, element: Any, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_job, "PAUSE_S", 0.1)
    own = element("RUNNING")
    scontrol = tmp_path / "bin" / "scontrol"
    busy = f'if [ "$(cat {tmp_path}/asked 2>/dev/null | wc -l)" -lt 2 ]; then echo $@ >> {tmp_path}/asked; '
    busy += "echo 'Socket timed out on send/recv operation' >&2; exit 1; fi; "
    scontrol.write_text(scontrol.read_text().replace(";; *) ", f";; *) {busy}"))
    assert outcome(own, Event.PREEMPTED) == ("left with 0", "requeued")
    assert asked() == AGAIN * 3


def test_a_cancel_in_the_moment_of_a_requeue_is_told_to_slurm_again(tmp_path: Path, element: Any, asked: Any) -> None:
    """Slurm heard of the cancel first, and then of the requeue, which brings the job back."""
    own = element("RUNNING")
    script = (tmp_path / "bin" / "scontrol").read_text()
    (tmp_path / "bin" / "scontrol").write_text(script.replace(">> ", f"> {own.run.cancel_marker}; echo $@ >> ", 1))
    assert outcome(own, Event.PREEMPTED) == ("returned", "cancelled")
    assert asked() == AGAIN + "scancel 9_4\n"


def test_a_run_that_has_finished_stays_so(element: Any, asked: Any) -> None:
    own = element("RUNNING", preempted=PREEMPTED)
    own.run.update_state(state="finished")
    own.run.result_file.write_text('{"state": "finished"}')
    assert outcome(own, Event.TERMINATED) == ("returned", "finished") and asked() == ""


def test_hours_left_are_those_of_the_present_job(tmp_path: Path, slurm_says: Any) -> None:
    import time

    plan = {"batch_size": 64, "gpu_hours": 8.0, "placement": {"nodes": 2, "gpus_per_node": 4}}
    run = runs.create(tmp_path / "runs", runs.new_run_id("deep", tmp_path / "runs"), EXPERIMENT, plan, {})
    run.add_job(executor="slurm", job_id="7")
    run.update_state(state="running", step=5, gpu_hours=20.0)  # of the jobs before it too
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
    run.update_state(state="failed", reason="why")
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
    run.update_state(state="failed", reason="why")
    with pytest.raises(RunError, match="it was submitted on cluster there, which cannot be asked from here"):
        control.resume(run, data_root=tmp_path)
