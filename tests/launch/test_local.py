"""Real jobs on the local executor: real submitit, real processes, a training loop without torch."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from launch_site import Site, eventually

from hpc_cifar import files
from hpc_cifar.launch import control, controller, deaths, process
from hpc_cifar.launch.local import process_file
from hpc_cifar.launch.policy import REMEDIES, Event
from hpc_cifar.launch.status import status

pytestmark = pytest.mark.slow  # real processes, seconds each


def test_two_ranks_run_the_snapshot_in_a_session_of_their_own(site: Site) -> None:
    run = site.submit()
    assert site.cli("wait", run.id).stdout == f"{run.id}: finished\n"
    ranks = [site.seen(run, rank)[0] for rank in (0, 1)]
    assert [rank["RANK"] for rank in ranks] == ["0", "1"] == [rank["LOCAL_RANK"] for rank in ranks]
    assert {rank["WORLD_SIZE"] for rank in ranks} == {"2"}
    assert {rank["MASTER_ADDR"] for rank in ranks} == {"127.0.0.1"}
    assert len({rank["MASTER_PORT"] for rank in ranks}) == 1
    assert 10_000 <= int(ranks[0]["MASTER_PORT"]) < 30_000
    for rank in ranks:
        assert rank["file"] == str(run.code / "hpc_cifar" / "train" / "loop.py")
        assert rank["PYTHONSAFEPATH"] == "1"
        assert rank["stdin"] == "/dev/null"
        assert rank["fds"] == ["0", "1", "2", "3"]  # 3 is the listing itself
        assert rank["sid"] == site.controller(run).pid != os.getsid(0)
    assert "torn down" not in site.cli("logs", run.id).stdout, "ranks leave when the result is written"
    assert not list(run.path.glob(".code*"))
    assert run.path.stat().st_mode & 0o777 == 0o700


def test_status_json_is_the_contract(site: Site) -> None:
    run = site.submit("step_s=0.1", epochs=300)
    site.running(run)
    fields = ["run", "state", "job_id", "epoch", "epochs", "step", "val_accuracy", "test_accuracy", "restarts", "gpu_hours"]
    fields += ["eta_s", "reason"]
    fields += ["estimated_start", "nodes", "images_per_second", "gpu_hours_planned", "gpu_hours_left", "wandb"]
    running = site.status(run)
    assert list(running) == fields
    assert running["state"] == "running"
    assert running["job_id"] == run.jobs()[0].job_id
    assert running["eta_s"] > 0
    assert running["images_per_second"] == 1000.0
    assert running["test_accuracy"] is None
    site.cli("cancel", run.id)
    cancelled = site.status(run)
    assert cancelled["state"] == "cancelled"
    assert cancelled["eta_s"] is None


def test_a_job_id_and_a_unique_prefix_name_the_run(site: Site) -> None:
    first, second = site.submit(), site.submit()
    assert site.cli("wait", first.jobs()[0].job_id).stdout.startswith(first.id)
    assert site.cli("wait", second.id[:-1]).stdout.startswith(second.id)
    assert site.cli("wait").stdout.startswith(second.id)
    ambiguous = site.cli("wait", "tiny", code=2)
    assert "not unique" in ambiguous.stderr
    assert "no such run" in site.cli("status", "nothing", code=2).stderr
    listed = site.cli("list").stdout.splitlines()
    assert [line.split("\t")[0] for line in listed[1:]] == [first.id, second.id]


def test_ctrl_c_ends_the_watching_and_not_the_run(site: Site) -> None:
    child = site.start("submit", site.job("held", epochs=3), "--cluster", "local", "--follow", start_new_session=True)
    run = eventually(lambda: next(iter(control_runs(site)), None))
    assert child.stdout is not None
    for line in child.stdout:  # the watching has begun
        if line.strip() == f"{run.id}: running":
            break
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
    out, err = child.communicate(timeout=20)
    assert child.returncode == 130, err
    assert f"{run.id} goes on" in out
    assert f"hpc-cifar logs {run.id} -f" in out
    (site.runs / "go").touch()
    assert site.cli("wait", run.id).stdout == f"{run.id}: finished\n"
    assert len(site.seen(run)) == 1


def control_runs(site: Site) -> list[Any]:
    from hpc_cifar import runs

    return [run for run in runs.all_runs(site.runs) if run.jobs()]


def test_the_run_survives_the_hang_up_of_its_terminal(site: Site) -> None:
    child = site.start("submit", site.job("step_s=0.1"), "--cluster", "local", "--follow", start_new_session=True)
    run = eventually(lambda: next(iter(control_runs(site)), None))
    site.running(run)
    for number in (signal.SIGHUP, signal.SIGKILL):
        os.killpg(child.pid, number)
    child.communicate(timeout=20)
    assert site.cli("wait", run.id).stdout == f"{run.id}: finished\n"


def test_follow_prints_epochs_and_the_result(site: Site) -> None:
    done = site.cli("submit", site.job(), "--cluster", "local", "--follow")
    assert "epoch 1/2" in done.stdout
    assert "epoch 2/2" in done.stdout
    assert "test accuracy  75.00 %" in done.stdout
    assert "fake data" in done.stdout
    assert str(site.runs) in done.stdout
    assert "\x1b" not in done.stdout


def test_a_dead_rank_ends_the_job(site: Site) -> None:
    run = site.submit("die=1", "step_s=0.1", epochs=100)
    began = time.monotonic()
    words = f"rank 1 was killed by SIGKILL, usually for memory: {REMEDIES[Event.KILLED]}"
    assert f"{run.id}: failed ({words})\n" == site.cli("wait", run.id, code=1).stdout
    assert time.monotonic() - began < 40
    eventually(lambda: not process.survivors(site.controller(run)), what="the end of its controller, which told of the failure")


def test_a_rank_that_the_kernel_killed_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"/a": 3, "/": 5}
    monkeypatch.setattr(deaths, "killed_for_memory", counts.copy)
    spec = {"folder": str(tmp_path), "job_id": "local-1", "command": "false", "tasks": 0, "timeout_s": 9, "signal_delay_s": 1}
    made = controller.Controller(spec | {"signal": "SIGUSR2"})
    made.start(0)  # no task, but a look at the counts
    assert made._reason([-9]) == f"rank 0 was killed by SIGKILL, usually for memory: {REMEDIES[Event.KILLED]}"
    counts["/a"] += 1
    assert made._reason([None, -9]) == f"rank 1 was killed for memory: {REMEDIES[Event.OUT_OF_MEMORY]}"
    assert made._reason([1, -11]) == "rank 1 was killed by SIGSEGV"


def test_a_rank_that_ends_before_it_speaks(site: Site) -> None:
    """The ranks' Python lacks a package, as that of a broken environment does."""
    text = 'import os, sys\nif "SUBMITIT_EXECUTOR" in os.environ:\n    sys.modules["submitit"] = None\n'
    (site.package.parent / "sitecustomize.py").write_text(text)
    run = site.submit()
    said = site.cli("wait", run.id, code=1).stdout
    assert said.startswith(f"{run.id}: failed (rank ")
    assert "Error while finding module specification for 'submitit.core._submit' (ModuleNotFoundError: " in said
    assert site.status(run)["reason"] in said


def test_a_start_that_ended_before_is_not_the_reason(tmp_path: Path) -> None:
    spec = {"folder": str(tmp_path / "submitit"), "job_id": "local-1", "command": "sh -c 'exec /no/python'", "tasks": 1}
    made = controller.Controller({**spec, "timeout_s": 9, "signal_delay_s": 1, "signal": "SIGUSR2"})
    made.folder.mkdir()
    log = made.folder / "local-1_0_log.err"
    log.write_text("Traceback (most recent call last):\nOSError: of an earlier start\n")
    made.start(0)
    made.tasks[0].wait(20)
    assert made._reason([127]).startswith("rank 0 ended with exit code 127: sh: 1: exec: /no/python: not found (log: ")


def test_a_controller_that_breaks(site: Site) -> None:
    (site.package / "launch" / "controller.py").write_text("import not_there\n")
    run = site.submit()
    words = "processes ended without a result: ModuleNotFoundError: No module named 'not_there'"
    assert site.cli("wait", run.id, code=1).stdout == f"{run.id}: failed ({words})\n"


def test_an_exception_becomes_one_line(site: Site) -> None:
    run = site.submit("raise=1", "step_s=0.1", epochs=100)
    done = site.cli("wait", run.id, code=1)
    assert done.stdout == f"{run.id}: failed (rank 1: the training loss became nan at step 5)\n"
    assert site.status(run)["reason"] == "rank 1: the training loss became nan at step 5"
    assert "NonFiniteLoss" in site.cli("logs", run.id, "--rank", "1").stdout


def test_a_local_run_has_failed_when_its_job_has_ended(site: Site) -> None:
    """A rank says so first; the others may write that they train until the controller has ended them."""
    run = site.submit("raise=1", "step_s=0.1", epochs=100)
    site.cli("wait", run.id, code=1)
    job, here = process_file(run.submitit, run.jobs()[-1].job_id), process.identity(os.getpid())
    ended = files.read_json(job)
    files.write_json(job, here)
    assert (status(run).state, status(run).reason) == ("running", None)
    files.write_json(job, ended)
    assert (status(run).state, status(run).reason) == ("failed", "rank 1: the training loss became nan at step 5")


def test_logs_follow_to_the_end(site: Site) -> None:
    run = site.submit("reason")
    followed = site.cli("logs", run.id, "-f").stdout
    assert f"training {run.id} from step 0" in followed
    assert "to stderr" in followed
    assert "Job completed successfully" in followed
    assert site.cli("logs", run.id, "--rank", "7", code=1).stderr.startswith("hpc-cifar: error: ")


def test_cancel_saves_and_never_requeues_and_resume_continues(site: Site) -> None:
    run = site.submit("step_s=0.1", epochs=15)
    site.running(run)
    assert site.cli("cancel", run.id).stdout == f"{run.id}: cancelled\n"
    assert run.cancel_marker.exists()
    assert site.status(run)["state"] == "cancelled"
    assert site.cli("wait", run.id, code=1).stdout == f"{run.id}: cancelled (terminated)\n"
    assert len(site.seen(run)) == 1
    assert "not running: it is cancelled" in site.cli("cancel", run.id).stdout
    step = run.state().step
    assert "resumed as job" in site.cli("resume", run.id).stdout
    assert site.cli("wait", run.id).stdout == f"{run.id}: finished\n"
    assert site.seen(run)[1]["step"] == step
    assert len(run.jobs()) == 2
    assert site.cli("resume", run.id).stdout == f"{run.id} has finished already; nothing to do\n"
    assert site.cli("cancel", run.id).stdout == f"{run.id} has finished already\n"


def test_cancel_while_starting(site: Site) -> None:
    run = site.submit("step_s=0.1", epochs=50)
    assert site.cli("cancel", run.id).stdout == f"{run.id}: cancelled\n"
    assert not process.survivors(site.controller(run))
    assert site.status(run)["state"] == "cancelled"


def test_cancel_escalates_to_everything_the_job_started(site: Site) -> None:
    run = site.submit("deaf", "step_s=0.1", epochs=1000)
    site.running(run)
    who = site.controller(run)
    assert len(process.survivors(who)) == 3
    assert control.cancel(run, grace_s=1.0) == f"{run.id}: cancelled"
    eventually(lambda: not process.survivors(who))


def test_a_running_run_is_not_resumed(site: Site) -> None:
    run = site.submit("step_s=0.1", epochs=20)
    site.running(run)
    refused = site.cli("resume", run.id, code=1).stderr
    assert f"{run.id} is running as job" in refused
    assert len(run.jobs()) == 1


def test_the_time_limit_requeues(site: Site) -> None:
    run = site.submit("step_s=0.1", epochs=10, processes=1, time="00:00:10")
    assert site.cli("wait", run.id, timeout=120).stdout == f"{run.id}: finished\n"
    segments = site.seen(run)
    assert len(segments) > 1
    assert [row["step"] for row in segments] == sorted({row["step"] for row in segments})
    assert site.status(run)["restarts"] == len(segments) - 1
    assert len({row["MASTER_PORT"] for row in segments}) == len(segments)


def test_preemptions_are_not_counted(site: Site) -> None:
    run = site.submit("step_s=0.05", epochs=100, processes=1)
    site.running(run)
    who = site.controller(run)
    for count in range(1, 9):  # submitit's own controller gives up after six
        process.send(who.pid, signal.SIGUSR2)
        eventually(lambda count=count: len(site.seen(run)) > count)
        step = site.seen(run)[-1]["step"]
        eventually(lambda step=step: run.state().step > step)
    assert site.status(run)["restarts"] == 8
    assert control.cancel(run) == f"{run.id}: cancelled"
    assert len(site.seen(run)) == 9


def test_a_requeue_never_runs_edited_code(site: Site) -> None:
    run = site.submit("held", epochs=3)
    eventually(lambda: site.seen(run) and site.seen(run, 1))
    loop = site.package / "train" / "loop.py"
    loop.write_text(loop.read_text().replace('VERSION = "first"', 'VERSION = "edited"'))
    (site.work / "hpc_cifar").mkdir()  # nor what lies in the working folder
    (site.work / "hpc_cifar" / "__init__.py").write_text("raise SystemExit('wrong package')\n")
    process.send(site.controller(run).pid, signal.SIGUSR2)
    eventually(lambda: len(site.seen(run)) > 1)
    (site.runs / "go").touch()
    assert site.cli("wait", run.id).stdout == f"{run.id}: finished\n"
    assert [row["version"] for row in site.seen(run)] == ["first", "first"]
    fresh = site.submit()
    site.cli("wait", fresh.id)
    assert site.seen(fresh)[0]["version"] == "edited"


def test_a_killed_controller_takes_its_ranks_along_and_the_run_resumes(site: Site) -> None:
    run = site.submit("step_s=0.1", epochs=10)
    site.running(run)
    who = site.controller(run)
    process.send(who.pid, signal.SIGKILL)
    eventually(lambda: not process.survivors(who))
    seen = site.status(run)
    assert (seen["state"], seen["reason"]) == ("failed", "processes ended without a result")
    site.cli("resume", run.id, "--follow")
    assert site.status(run)["state"] == "finished"
    assert site.seen(run)[1]["step"] > 0


def test_a_recycled_pid_is_never_signalled(site: Site) -> None:
    run = site.submit("step_s=0.1", epochs=50)
    site.running(run)
    who = site.controller(run)
    for pid in process.survivors(who):
        process.send(pid, signal.SIGKILL)
    eventually(lambda: not process.survivors(who))
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True) as innocent:
        record = {**dataclasses.asdict(who), "pid": innocent.pid}  # as if the number had come round again
        files.write_json(process_file(run.submitit, run.jobs()[-1].job_id), record)
        assert site.status(run)["state"] == "failed"
        assert control.cancel(run, grace_s=1.0) == f"{run.id} is not running: it is failed"
        run.update_state(state="running")
        control._cancel_local(run, run.jobs()[-1], 1.0)
        assert innocent.poll() is None
        innocent.kill()


def test_a_term_without_a_cancel_leaves_a_run_that_resumes(site: Site) -> None:
    run = site.submit("held", epochs=3)
    eventually(lambda: site.seen(run) and site.seen(run, 1))
    process.send(site.controller(run).pid, signal.SIGTERM)
    eventually(lambda: site.status(run)["state"] == "stopped")
    (site.runs / "go").touch()
    site.cli("resume", run.id)
    assert site.cli("wait", run.id).stdout == f"{run.id}: finished\n"


def test_what_is_missing_is_said_before_anything_is_made(site: Site) -> None:
    (site.data / "digits").rmdir()
    refused = site.cli("submit", site.job(), "--cluster", "local", code=2)
    assert "hpc-cifar prepare digits" in refused.stderr
    assert not site.runs.exists()


@pytest.mark.parametrize("setting", ["data.batch_size=1"])
def test_more_processes_than_images_in_a_batch(site: Site, setting: str) -> None:
    refused = site.cli("submit", site.job(), "--cluster", "local", "--set", setting, code=2)
    assert "data.batch_size: 1 images for 2 processes" in refused.stderr
    assert not site.runs.exists()


def test_resume_asks_for_checkpoints_that_are_gone_or_begins_again(site: Site) -> None:
    run = site.submit("held", epochs=3)
    eventually(lambda: site.seen(run) and site.seen(run, 1))
    site.cli("cancel", run.id)  # where it is held, so that it cannot finish before
    (site.runs / "go").touch()
    files.write_json(run.path / "saved.json", {"step": 7, "time": "2026-11-01T00:00:00+00:00"})
    for path in run.checkpoints.glob("step-*"):
        path.unlink()
    (run.path / "metrics.jsonl").write_text('{"kind": "step", "step": 7}\n')
    before = [run.state(), run.jobs()]
    refused = site.cli("resume", run.id, code=1).stderr
    assert "no checkpoint is there, though that of step 7 was written at 2026-11-01T00:00:00+00:00" in refused
    assert [run.state(), run.jobs()] == before and run.cancel_marker.exists()
    site.cli("resume", run.id, "--fresh")
    assert site.cli("wait", run.id).stdout == f"{run.id}: finished\n"
    assert [row["step"] for row in site.seen(run)] == [0, 0]
    [aside] = run.path.glob("before-*")
    assert (aside / "metrics.jsonl").read_text() == '{"kind": "step", "step": 7}\n'
    assert files.read_json_lines(run.metrics_file)[0]["aside"] == aside.name
    assert "has finished already" in site.cli("resume", run.id, "--fresh").stdout


def test_what_a_restart_waits_for_is_its_reason(site: Site) -> None:
    """As the training loop says it, for the job that runs now."""
    run = site.submit("held", epochs=3)
    eventually(lambda: site.seen(run) and site.seen(run, 1))
    words = "waits for the lock of its earlier segment on n1 (process 7)"
    for job, reason in (("another", None), (run.jobs()[-1].job_id, words)):
        files.write_json(run.path / "waits.json", {"job": job, "reason": words})
        assert (site.status(run)["state"], site.status(run)["reason"]) == ("running", reason)
    (site.runs / "go").touch()
    site.cli("wait", run.id)
    assert site.status(run)["reason"] is None
