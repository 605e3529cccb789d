"""The real W&B client against a server on loopback: whatever happens, every row arrives, and once."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import wandb_server
from command_line import typed
from mirrored import GIT, a_run, assert_whole, at, is_oldest_client, job, sync, train
from wandb_server import Server

from hpc_cifar import files
from hpc_cifar.launch.control import here
from hpc_cifar.runs import Run
from hpc_cifar.track import companion
from hpc_cifar.track.metrics import MetricsLog
from hpc_cifar.track.rows import Tail
from hpc_cifar.train import rehearsal

pytestmark = [pytest.mark.component("wandb"), pytest.mark.slow]
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)


def test_segments_become_one_run(server: Server, tmp_path: Path) -> None:
    run = a_run(tmp_path)
    train(run, 0, 14)
    assert "15 rows uploaded" in sync(run, server)
    train(run, 11, 27, ended="requeued")  # after a kill: steps 12 to 14 are computed again
    sync(run, server)
    [kept] = server.runs.values()
    assert (kept.preempting, kept.ended) == (1, [0, 1]), "a preemption, after an upload while it ran"
    train(run, 27, 30, ended="finished")
    sync(run, server)
    kept = assert_whole(server, run, 30)
    assert (kept.name, kept.group, kept.job_type, kept.tags) == (run.id, "a group", "train", ["one", "two"])
    config = kept.values()
    about = config["about"]
    assert config["name"] == "curves" and about["plan"] == {"batch_size": 64} and about["data"] == "digits"
    assert about["git"] == GIT
    assert kept.summary["test_accuracy"] == 0.75 and kept.summary["gpu_hours"] == 0.5
    assert not kept.events, "system metrics would be those of another machine"
    assert kept.alerts == [f"{run.id}: finished"]
    before = len(server.requests)
    assert "0 rows uploaded" in sync(run, server)
    assert len(server.requests) > before
    assert len(assert_whole(server, run, 30).alerts) == 1


def test_pictures_arrive_once_and_take_no_row_s_place(server: Server, tmp_path: Path) -> None:
    run = a_run(tmp_path)
    train(run, 0, 20)
    folder = run.path / "evaluation" / "test"
    folder.mkdir(parents=True)
    (folder / "confusion.png").write_bytes(PNG)
    files.write_json(folder / "evaluation.json", {"accuracy": 0.5, "loss": 1.0, "macro": {"f1": 0.4}})
    server.trouble = lambda what, number: 401 if what.endswith("file_stream") else None
    sync(run, server, code=1)  # they have a number, and did not arrive
    server.trouble = lambda what, number: None
    sync(run, server)
    sync(run, server)
    train(run, 20, 30, ended="finished")
    sync(run, server)
    kept = assert_whole(server, run, 30)
    [shown] = [row for row in kept.history if "evaluation/test-confusion" in row]
    assert shown["evaluation/test-confusion"]["path"] in kept.files
    assert kept.summary["evaluation/test_accuracy"] == 0.5 and kept.summary["evaluation/test_f1"] == 0.4


def test_a_damaged_line_is_left_out_with_a_word(server: Server, tmp_path: Path) -> None:
    run = a_run(tmp_path)
    train(run, 0, 20, ended="finished")
    lines = run.metrics_file.read_text().splitlines(keepends=True)
    lines[5] = lines[5][:9] + "\x00\x00\n"
    run.metrics_file.write_text("".join(lines) + '{"kind": "step", "step": 21, "tor')  # and a torn one
    assert "1 damaged line" in sync(run, server)
    [kept] = server.runs.values()
    assert [row["global_step"] for row in kept.history if "step/train_loss" in row] == [1, 2, 3, 4, *range(6, 21)]


def test_follow_goes_on_until_the_run_ends_and_only_once_at_a_time(server: Server, tmp_path: Path) -> None:
    run = a_run(tmp_path)
    train(run, 0, 10)
    run.add_job(executor="train", job_id="here", tasks=1, **here())
    training = (run.path / ".lock").open("w")  # as rank 0 holds it
    fcntl.flock(training, fcntl.LOCK_EX)
    environment = {**os.environ, **server.environment}
    command = [sys.executable, "-m", "hpc_cifar", "sync", str(run.path), "--follow"]
    following = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    lock = run.path / ".wandb.lock"
    wandb_server.until(lambda: lock.exists() and lock.read_text())
    assert f"{run.id}: is being uploaded to W&B by process {following.pid}" in sync(run, server, code=1)
    wandb_server.until(lambda: server.runs and len(next(iter(server.runs.values())).history) == 11)
    train(run, 10, 30, ended="finished")
    training.close()
    said, _ = following.communicate(timeout=60)
    assert (following.returncode, said) == (0, f"{run.id}: 33 rows uploaded\n")
    assert_whole(server, run, 30)


def test_the_tail_of_a_growing_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert list(tail.new()) == []
    log = MetricsLog(path)
    log.write("event", epoch=0, step=0, event="started")
    log.write("step", epoch=0, step=1)
    assert [(number, row["step"]) for number, row in tail.new()] == [(1000, 1)]
    path.open("a").write('{"kind": "step", "epoch": 0, "st')
    assert list(tail.new()) == []
    path.open("a").write('ep": 2}\n')
    assert [(number, row["step"]) for number, row in tail.new()] == [(2000, 2)]
    path.open("a").write('{"kind": "step", "step": 3}\n')  # no row has been without an epoch
    assert (list(tail.new()), tail.damaged) == ([], 1)
    log.close()
    MetricsLog(path, 1).write("step", epoch=0, step=2)  # a resume replaces the file
    assert [(number, row["step"]) for number, row in tail.new()] == [(1000, 1), (2000, 2)]


def test_pictures_take_no_number_of_a_row(server: Server, tmp_path: Path) -> None:
    """They may be sent between the last step of an epoch and the row of that epoch, which comes after its validation."""
    run = a_run(tmp_path)
    train(run, 0, 10)
    rows = run.metrics_file.read_text().splitlines(keepends=True)
    run.metrics_file.write_text("".join(rows[:-1]))  # the epoch is not told yet
    picture = run.path / "evaluation" / "training" / "batch.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(PNG)
    sync(run, server)
    run.metrics_file.write_text("".join(rows))
    train(run, 10, 20, ended="finished")
    sync(run, server)
    assert_whole(server, run, 20)


@pytest.mark.parametrize("every", [1, 4])
def test_a_run_that_was_killed_three_times_is_one_run(server: Server, tmp_path: Path, digits_data: Path, every: int) -> None:
    """A row for every step, and rows of windows, which end at the same steps however often training begins anew."""
    environment = at(server, tmp_path, digits_data) | {companion.VARIABLE: "100"}
    command = [sys.executable, "-m", "hpc_cifar", "train", str(job(tmp_path)), "--name", "mirrored"]
    command += ["--set", f"training.log_every_steps={every}"]
    metrics = tmp_path / "mirrored" / "metrics.jsonl"

    def reached(step: int, pid: int) -> bool:
        ours = Run(tmp_path / "mirrored").state().pid == pid
        return ours and any(row["step"] >= step for row in files.read_json_lines(metrics))

    slow = environment | {rehearsal.VARIABLE: "0.02"}
    for step in (30, 110, 190):
        with subprocess.Popen(command, env=slow, cwd=tmp_path, stdout=subprocess.DEVNULL) as child:
            wandb_server.until(lambda step=step, pid=child.pid: reached(step, pid))  # type: ignore[misc]
            child.kill()
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "W&B: http" in done.stderr
    [kept] = server.runs.values()
    steps = [row["global_step"] for row in kept.history if "step/train_loss" in row]
    local = {row["step"]: row["train_loss"] for row in files.read_json_lines(metrics) if row["kind"] == "step"}
    assert steps == list(local) and (every > 1 or steps == list(range(1, 361)))
    assert [row["epoch"] for row in kept.history if "val_loss" in row] == list(range(1, 41))
    assert all(row["step/train_loss"] == local[row["global_step"]] for row in kept.history if "step/train_loss" in row)
    if not is_oldest_client():
        assert kept.events, "system metrics of the machine that trained"
    assert kept.summary["restarts"] == 3 and kept.ended[-1] == 0 and set(kept.ended[:-1]) <= {1}


def test_a_training_that_fails_is_told_as_failed(server: Server, tmp_path: Path, digits_data: Path) -> None:
    environment = at(server, tmp_path, digits_data) | {companion.VARIABLE: "100"}
    sets = ("optimizer.lr=1e38", "tracking.alerts=true")
    options = [word for change in sets for word in ("--set", change)]
    done = typed(["train", str(job(tmp_path)), "--name", "mirrored", *options], environment, tmp_path, timeout_s=400)
    assert done.returncode == 1 and "loss became" in done.stderr
    [kept] = server.runs.values()
    assert kept.ended == [1] and kept.alerts == ["mirrored: failed"]
    assert kept.summary["state"] == "failed" and "loss became" in kept.summary["reason"]
    events = [row["event"] for row in files.read_json_lines(tmp_path / "mirrored" / "metrics.jsonl") if row["kind"] == "event"]
    assert events[-1] == "failed"


def test_threads_end_with_their_server() -> None:
    before = threading.active_count()
    with wandb_server.serving():
        pass
    wandb_server.until(lambda: threading.active_count() <= before)
