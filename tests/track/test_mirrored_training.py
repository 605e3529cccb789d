"""TensorBoard beside a real training, and a W&B that hangs beside it: every row once, whatever ends either process."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'hpc-cifar[tensorboard]'")


from command_line import typed
from events import accumulated, assert_whole, curve
from mirrored import EXPERIMENT, a_run, at, train
from wandb_server import HANG, Server, until

from hpc_cifar import files, processes
from hpc_cifar.runs import Run
from hpc_cifar.track import companion, underway
from hpc_cifar.train import rehearsal

pytestmark = pytest.mark.slow


def job(folder: Path, **tracking: object) -> Path:
    path = folder / "job.yaml"
    path.write_text(json.dumps(EXPERIMENT | {"tracking": {"mirrors": ["tensorboard"], **tracking}}))
    return path


def beside(pid: int) -> list[int]:
    """Processes of a training that feed a tracker."""
    words = {
        one: Path(f"/proc/{one}/cmdline").read_bytes() for one in processes.descendants(pid) if Path(f"/proc/{one}").exists()
    }
    return [one for one, line in words.items() if b"--beside" in line]


@pytest.mark.component("wandb")
def test_three_preemptions_and_a_kill_in_the_middle_of_a_record(server: Server, tmp_path: Path, digits_data: Path) -> None:
    """W&B hangs throughout, and waits for nobody."""
    server.trouble = lambda what, number: HANG
    environment = at(server, tmp_path, digits_data)
    command = [sys.executable, "-m", "hpc_cifar", "train", str(job(tmp_path, wandb="online")), "--name", "mirrored"]
    run = Run(tmp_path / "mirrored")

    def reached(step: int, pid: int) -> bool:
        rows = files.read_json_lines(run.metrics_file)
        return run.state().pid == pid and any(row["step"] >= step for row in rows)

    slow = environment | {rehearsal.VARIABLE: "0.02"}
    for step in (40, 110, 180):
        with subprocess.Popen(
            command, env=slow, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as child:
            until(lambda step=step, pid=child.pid: reached(step, pid))  # type: ignore[misc]
            child.terminate()
            said, _ = child.communicate(timeout=120)
            assert "TensorBoard" not in said, said
        assert run.state().state == "stopped" and run.state().reason == "terminated"
    with subprocess.Popen(command, env=slow, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        until(lambda: reached(240, child.pid))
        for pid in beside(child.pid):
            os.kill(pid, signal.SIGKILL)
        child.kill()
    newest = max((run.path / "tensorboard").iterdir())
    with newest.open("r+b") as stream:  # as in the middle of a write, wherever that kill was
        stream.truncate(newest.stat().st_size - random.Random(24).randrange(1, 60))
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0 and "W&B has not got everything" in done.stdout, done.stdout + done.stderr
    assert "TensorBoard" not in done.stdout + done.stderr
    assert_whole(run)
    shown = accumulated(run)
    assert [step for step, _ in curve(shown, "step/train_loss")] == list(range(1, 361))
    assert [epoch for _, epoch in curve(shown, "epoch")] == list(range(1, 41))
    assert len(shown.Images("evaluation/training-batch")) == 1 and len(shown.Tensors("experiment")) == 1
    assert curve(shown, "result/test_accuracy")[0][0] == 360


def test_a_writer_that_is_killed_at_any_moment(tmp_path: Path) -> None:
    """SIGKILL, again and again, while the run goes on."""
    run, dice, killed = a_run(tmp_path), random.Random(7), 0
    for step in range(0, 96, 8):
        train(run, step, step + 8)
        command = [sys.executable, "-m", "hpc_cifar", "sync", str(run.path), "--beside", "--to", "tensorboard"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as child:
            assert child.stdin is not None
            folder = run.path / "tensorboard"
            before = len(list(folder.iterdir())) if folder.exists() else 0
            if dice.random() < 0.5:
                child.stdin.close()
                until(lambda before=before, folder=folder: folder.exists() and len(list(folder.iterdir())) > before)  # type: ignore[misc]
            time.sleep(dice.random() * 0.02)
            child.kill()
            killed += child.wait() == -signal.SIGKILL
    assert killed > 3
    run.update_state(state="finished")
    done = typed(["sync", str(run.path), "--to", "tensorboard"], dict(os.environ), tmp_path, timeout_s=60)
    assert done.returncode == 0, done.stderr
    assert_whole(run)


def test_whoever_waits_waits_for_it(tmp_path: Path, digits_data: Path) -> None:
    """A short run: its curves are there as `submit --wait` returns, its pictures after `evaluate`; no login, no server."""
    environment = {**os.environ, "HPC_CIFAR_RUNS": str(tmp_path), "HPC_CIFAR_DATA": str(digits_data)}
    options = ["--set", "epochs=3", "--set", "resources.processes_per_node=1"]
    done = typed(["submit", str(job(tmp_path)), "--cluster", "local", "--wait", *options], environment, tmp_path, timeout_s=300)
    assert done.returncode == 0, done.stdout + done.stderr
    [run] = [Run(path.parent) for path in tmp_path.glob("mirrored-*/experiment.yaml")]
    assert_whole(run)
    assert underway.left_s(run) == 0
    done = typed(["evaluate", run.id], environment, tmp_path, timeout_s=300)
    assert done.returncode == 0 and "W&B" not in done.stderr, done.stderr
    assert len(accumulated(run).Images("evaluation/test-confusion")) == 1


def test_something_in_its_place_does_not_hurt_a_training(tmp_path: Path, digits_data: Path) -> None:
    environment = {**os.environ, "HPC_CIFAR_RUNS": str(tmp_path), "HPC_CIFAR_DATA": str(digits_data), companion.VARIABLE: "2"}
    command = ["train", str(job(tmp_path)), "--name", "mirrored", "--set", "epochs=2"]
    done = typed([*command, "--max-steps", "9"], environment, tmp_path, timeout_s=300)
    assert done.returncode == 0, done.stderr
    run = Run(tmp_path / "mirrored")
    for path in (run.path / "tensorboard").iterdir():
        path.unlink()
    (run.path / "tensorboard").rmdir()
    os.mkfifo(run.path / "tensorboard")
    done = typed(command, environment, tmp_path, timeout_s=300)
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr, done.stderr
    assert f"TensorBoard: {run.path / 'tensorboard'} is no folder of this run; remove it" in done.stderr
    (run.path / "tensorboard").unlink()
    done = typed(["sync", "mirrored", "--to", "tensorboard"], environment, tmp_path, timeout_s=60)
    assert done.returncode == 0, done.stderr
    assert_whole(run)
