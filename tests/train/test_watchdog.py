"""A hung rank is noticed, named, recorded and restarted."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

from hpc_cifar import files, processes
from hpc_cifar.runs import Run, all_runs
from hpc_cifar.train.distributed import World
from hpc_cifar.train.watchdog import ASLEEP_S, PATIENCE, POLL_S, SLOW_PHASE, Watchdog, lost_ranks

LIMIT_S = ASLEEP_S + 2 * POLL_S  # so that a machine which stalls is asleep before anybody takes it for a hang
ALONE = World(0, 1, 0, 1, torch.device("cpu"), None)


def test_the_limit_grows_with_the_slowest_step_and_with_the_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    watchdog = Watchdog(tmp_path, "s", ALONE, 30.0, None, print)
    assert watchdog.limit_s == 900  # nothing is known of the start
    for step, seconds in ((1, 200.0), (2, 0.5), (3, 7.0)):  # what lies before the first step is no step
        clock[0] += seconds
        watchdog.step(step)
    assert watchdog.limit_s == 70
    with watchdog.phase("evaluate"):
        assert watchdog.limit_s == 350
        clock[0] += 1000
    watchdog.step(4)
    assert watchdog.limit_s == 70


def test_it_can_be_switched_off_and_leaves_no_thread(tmp_path: Path) -> None:
    with Watchdog(tmp_path, "s", ALONE, None, None, print):
        assert not list(tmp_path.iterdir())
    with Watchdog(tmp_path, "s", ALONE, 5.0, None, print) as watchdog:
        beat = files.read_json(tmp_path / "heartbeat" / "rank-0.json")
        assert isinstance(beat, dict) and beat["pid"] == os.getpid()
    assert not watchdog._thread.is_alive()


def slow_job() -> Any:
    resources = {"hang_timeout_s": LIMIT_S}
    return ranks.experiment(epochs=300, resources=resources, checkpoint={"every_steps": 10, "every_epochs": 300})


def three_ranks(folder: Path, data: Path) -> tuple[Run, list[ranks.Rank]]:
    """In the middle of their training."""
    run = ranks.new_run(folder, slow_job())
    processes = ranks.start(run, data, 3)
    ranks.wait_for_step(run, 30, processes)
    return run, processes


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_everyone_leaves(tmp_path: Path, digits_data: Path) -> None:
    run, processes = three_ranks(tmp_path, digits_data)
    times = [row["time"] for row in files.read_json_lines(run.metrics_file) if row["kind"] == "step"]
    slowest = max(after - before for before, after in itertools.pairwise(times))
    processes[1].send_signal(signal.SIGSTOP)
    assert ranks.finish(processes) == [1, 1, 1], ranks.logs(run)
    (folder,) = (run.path / "hangs").iterdir()
    alarm = files.read_json(folder / "alarm.json")
    assert isinstance(alarm, dict)
    limit = max(LIMIT_S, PATIENCE * slowest) * (1 if alarm["phase"] == "train" else SLOW_PHASE)  # it may evaluate, or save
    assert LIMIT_S < alarm["still_s"] < limit + ASLEEP_S
    report = files.read_json(folder / "report.json")
    assert isinstance(report, dict)
    assert "hung after step" in report["reason"] and "rank 1 on" in report["reason"] and "T (stopped)" in report["reason"]
    assert "rank 0 on" not in report["reason"] and "rank 2 on" not in report["reason"]
    for rank in (0, 2):
        stacks = (folder / f"rank-{rank}.txt").read_text()
        assert "distributed_c10d.py" in stacks, stacks  # waiting in a collective
    assert "watchdog" in (folder / "rank-1.txt").read_text()  # it was let go, and told too
    assert "state: T (stopped)" in (folder / "rank-1-process.txt").read_text()


@pytest.mark.slow
def test_the_others_name_the_rank_that_was_killed_and_not_each_other(tmp_path: Path, digits_data: Path) -> None:
    run, processes = three_ranks(tmp_path, digits_data)
    processes[1].send_signal(signal.SIGKILL)
    assert ranks.finish(processes) == [1, -signal.SIGKILL, 1]
    for rank in (0, 2):
        said = (run.path / f"rank-{rank}.log").read_text()
        assert f"rank {rank} on {os.uname().nodename} lost contact with rank 1 on {os.uname().nodename} (process " in said, said
        assert "which has probably ended; its log says why" in said and f"rank {2 - rank} on" not in said


def test_lost_ranks_are_told_by_heartbeats_of_this_segment_alone(tmp_path: Path) -> None:
    (tmp_path / "heartbeat").mkdir()
    four = World(0, 4, 0, 1, torch.device("cpu"), None)

    def beat(rank: int, segment: str, host: str, phase: str, pid: int) -> None:
        values = {"rank": rank, "segment": segment, "host": host, "phase": phase, "pid": pid}
        files.write_json(tmp_path / "heartbeat" / f"rank-{rank}.json", values)

    here, never = os.uname().nodename, 2**22 + 1  # above the largest number that a process can have
    beat(1, "old", here, "train", never)
    assert lost_ranks(tmp_path, "s", four, 0.0) == ""
    beat(1, "s", here, "left", never)
    beat(2, "s", "other", "train", 7)
    beat(3, "s", here, "train", os.getpid())
    assert lost_ranks(tmp_path, "s", four, 0.0) == "one of rank 2 on other (process 7)"
    beat(2, "s", "other", "failed", 7)
    assert lost_ranks(tmp_path, "s", four) == "rank 2 on other (process 7)"
    beat(3, "s", here, "train", never)
    assert lost_ranks(tmp_path, "s", four) == f"rank 2 on other (process 7), rank 3 on {here} (process {never})"


def test_a_rank_that_closed_its_connections_has_a_moment_to_end(tmp_path: Path) -> None:
    """The kernel closes what a process had open before it says that it has ended."""
    (tmp_path / "heartbeat").mkdir()
    ending = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    assert ending.stdin is not None
    values = {"rank": 1, "segment": "s", "host": os.uname().nodename, "phase": "train", "pid": ending.pid}
    files.write_json(tmp_path / "heartbeat" / "rank-1.json", values)
    two = World(0, 2, 0, 1, torch.device("cpu"), None)
    assert lost_ranks(tmp_path, "s", two, 0.0) == ""
    threading.Timer(0.5, ending.stdin.close).start()
    assert lost_ranks(tmp_path, "s", two, 100.0) == f"rank 1 on {os.uname().nodename} (process {ending.pid})"
    ending.wait()


@pytest.mark.slow
def test_a_suspended_run_goes_on_as_if_nothing_had_been(tmp_path: Path, digits_data: Path) -> None:
    """Slurm suspends every process of a job at once."""
    run = ranks.new_run(tmp_path, slow_job())
    [process] = ranks.start(run, digits_data, 1)
    ranks.wait_for_step(run, 30, [process])
    process.send_signal(signal.SIGSTOP)
    time.sleep(ASLEEP_S + 2)  # longer than the limit of 6 s, and than two polls can be apart otherwise
    process.send_signal(signal.SIGCONT)
    before = run.state().step
    ranks.wait_for_step(run, before + 200, [process])
    assert not (run.path / "hangs").exists()
    process.send_signal(signal.SIGTERM)
    ranks.finish([process])


@pytest.mark.slow
def test_a_hung_local_job_restarts_by_itself_and_ends_like_the_undisturbed(tmp_path: Path, digits_data: Path) -> None:
    job = tmp_path / "job.yaml"
    experiment = slow_job().model_copy(update={"epochs": 15})
    document = experiment.model_dump(mode="json", exclude_none=True)
    document["resources"]["processes_per_node"] = 2
    job.write_text(json.dumps(document))
    places = {"HPC_CIFAR_DATA": str(digits_data), "HPC_CIFAR_RUNS": str(tmp_path / "runs")}
    site = os.environ | places | {"HPC_CIFAR_THREADS": "1"}  # as the undisturbed one has

    def call(*arguments: str) -> None:
        command = [sys.executable, "-m", "hpc_cifar", *arguments]
        done = subprocess.run(command, env=site, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    call("submit", str(job), "--cluster", "local")
    (run,) = all_runs(tmp_path / "runs")
    end = time.monotonic() + 300
    while (run.state().step or 0) < 30:
        assert time.monotonic() < end, run.state()
        time.sleep(0.01)
    beat = files.read_json(run.path / "heartbeat" / "rank-1.json")
    assert isinstance(beat, dict)
    os.kill(beat["pid"], signal.SIGSTOP)
    call("wait", run.id)
    result = files.read_object(run.result_file)
    assert (result["state"], result["restarts"]) == ("finished", 1)
    undisturbed: Run = ranks.new_run(tmp_path, run.experiment())
    assert ranks.complete(undisturbed, digits_data, 2)["test_loss"] == result["test_loss"]
    assert ranks.losses(run) == ranks.losses(undisturbed)


@pytest.mark.parametrize("case", ["another start", "another boot", "another segment", "the right one"])
def test_a_process_is_signalled_only_if_it_is_the_rank_that_hangs(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process numbers are used again, and a heartbeat stays in its file when its segment is over."""
    monkeypatch.setattr("hpc_cifar.train.watchdog.ANSWER_S", 0.0)
    wrong: dict[str, dict[str, Any]] = {"another start": {"pid_started": 1}, "another boot": {"boot": "x"}}
    wrong |= {"another segment": {"segment": "old"}, "the right one": {}}
    bystander = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    try:
        watchdog = Watchdog(tmp_path, "s", World(0, 2, 0, 2, torch.device("cpu"), None), 5.0, None, print)
        (tmp_path / "heartbeat").mkdir()
        watchdog._alarm_folder.mkdir(parents=True)
        beat = {"rank": 1, "segment": "s", "phase": "train", "step": 3, "time": "then", **processes.identity(bystander.pid)}
        files.write_json(tmp_path / "heartbeat" / "rank-1.json", beat | wrong[case])
        reason = watchdog._report()
        assert "rank 1 on" in reason and "has not answered since" in reason
        if case == "the right one":
            assert bystander.wait(30) == -signal.SIGKILL
        else:
            time.sleep(0.2)
            assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_rank_that_closes_after_its_failure_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take W&B a while; what it failed of is not to be restarted as a hang."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    (tmp_path / "heartbeat").mkdir()
    first, second = (Watchdog(tmp_path, "s", World(rank, 2, 0, 1, ALONE.device, None), 10.0, None, print) for rank in (0, 1))
    for watchdog in (first, second):
        watchdog.step(1)
        watchdog._write_beat()
    clock[0] += 11
    assert not second._waits_for_a_failed_rank(clock[0])
    first.left(ValueError, ValueError("a full disk"), None)
    assert second._waits_for_a_failed_rank(clock[0]) and first.limit_s == 10 * SLOW_PHASE
    clock[0] += 10 * SLOW_PHASE
    assert not second._waits_for_a_failed_rank(clock[0])
    first.left(RuntimeError, RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer"), None)
    clock[0] -= 10 * SLOW_PHASE
    assert not second._waits_for_a_failed_rank(clock[0]), "it only followed another one"
