"""A W&B server that refuses, hangs or goes away, at once or midway: training goes on, and every row arrives in the end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import wandb_server
from command_line import typed
from mirrored import a_run, assert_whole, at, job, sync, train
from wandb_server import ENDLESS, GONE, HANG, Server

from hpc_cifar import files
from hpc_cifar.runs import Run
from hpc_cifar.train import rehearsal

pytestmark = [pytest.mark.component("wandb"), pytest.mark.slow]

TROUBLES = {
    "401": lambda what, number: 401,
    "404": lambda what, number: 404,
    "hanging": lambda what, number: HANG,
    "endless for the rows": lambda what, number: ENDLESS if what.endswith("file_stream") else None,
    "401 for the rows": lambda what, number: 401 if what.endswith("file_stream") else None,
    "404 for the rows": lambda what, number: 404 if what.endswith("file_stream") else None,
    "hanging for the rows": lambda what, number: HANG if what.endswith("file_stream") else None,
    "gone with the rows": lambda what, number: GONE if what.endswith("file_stream") else None,
    "gone at finish": lambda what, number: GONE if what.startswith("complete ") else None,
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_what_was_refused_arrives_the_next_time(server: Server, tmp_path: Path, trouble: str) -> None:
    run = a_run(tmp_path)
    train(run, 0, 30, ended="finished")
    server.trouble = TROUBLES[trouble]
    began = time.monotonic()
    said = sync(run, server, code=1)
    assert time.monotonic() - began < 75 and f"{run.id}: W&B" in said.splitlines()[-1], said
    server.trouble = lambda what, number: None
    server.listen()
    sync(run, server)
    assert_whole(server, run, 30)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_comes_back_gets_every_row_once(server: Server, tmp_path: Path, status: int) -> None:
    run = a_run(tmp_path)
    train(run, 0, 30, ended="finished")
    refused: list[str] = []

    def at_first(what: str, number: int) -> int | None:
        if what.endswith("file_stream") and len(refused) < 2:
            refused.append(what)
            return status
        return None

    server.trouble = at_first
    sync(run, server)
    assert len(refused) == 2
    assert_whole(server, run, 30)


def test_no_server_and_no_login(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    train(run, 0, 10, ended="finished")
    with wandb_server.serving() as server:
        pass  # nobody listens any more
    said = sync(run, server, code=1)
    assert f"{run.id}: W&B" in said
    done = typed(["sync", str(run.path)], dict(os.environ), tmp_path, timeout_s=60)
    assert (done.returncode, done.stderr) == (
        2,
        "hpc-cifar: error: W&B: no login here: type 'wandb login', or set WANDB_API_KEY\n",
    )


@pytest.mark.parametrize("trouble", ["401", "hanging", "endless for the rows"])
def test_training_is_not_kept_by_a_server_in_trouble(server: Server, tmp_path: Path, digits_data: Path, trouble: str) -> None:
    server.trouble = TROUBLES[trouble]
    environment = at(server, tmp_path, digits_data)
    done = typed(["train", str(job(tmp_path)), "--name", "mirrored"], environment, tmp_path, timeout_s=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hpc-cifar sync mirrored" in done.stdout
    server.trouble = lambda what, number: None
    sync(Run(tmp_path / "mirrored"), server)
    [kept] = server.runs.values()
    assert [row["global_step"] for row in kept.history if "step/train_loss" in row] == list(range(1, 361))


class Midway:
    """A server's trouble that begins once it has rows of a run that still trains.

    Args:
        status: what it answers from then on.
        times: to so many requests; then it is well again. None: to all.
    """

    def __init__(self, server: Server, metrics: Path, status: int, times: int | None = None) -> None:
        self.server, self.metrics, self.status, self.times = server, metrics, status, times
        self.refused, self.lock = 0, threading.Lock()  # a request is a thread
        self.had = self.trained = 0  # rows that had arrived, and the step of the training, as the trouble began

    def __call__(self, what: str, number: int) -> int | None:
        with self.lock:
            if not self.refused:
                self.had = sum(len(run.history) for run in self.server.runs.values())
                if not self.had or not what.endswith("file_stream"):
                    return None
                self.trained = max(row["step"] for row in files.read_json_lines(self.metrics))
            refuses = self.times is None or self.refused < self.times
            self.refused += refuses
            if self.times is None or (not refuses and what.endswith("file_stream")):  # the training need not wait any more
                files.write_json(self.metrics.parent / "drill" / "pace", 0.0)
            return self.status if refuses else None


def trained(server: Server, folder: Path, data: Path, trouble: Midway) -> str:
    """What a training prints in the middle of which the trouble begins; it waits after its steps until then."""
    server.trouble = trouble
    command = [sys.executable, "-m", "hpc_cifar", "train", str(job(folder)), "--name", "mirrored", "--set", f"epochs={EPOCHS}"]
    done = subprocess.run(
        command,
        env=at(server, folder, data) | {rehearsal.VARIABLE: "0.1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert trouble.had > 0 and 0 < trouble.trained < EPOCHS * 10, f"it began at step {trouble.trained}, with {trouble.had} rows"
    return done.stdout + done.stderr


EPOCHS = 50
LATER = "hpc-cifar sync mirrored"


def assert_every_row(server: Server, metrics: Path) -> None:
    [kept] = server.runs.values()
    rows = files.read_json_lines(metrics)
    assert [row["step"] for row in rows if row["kind"] == "epoch"][-1] == EPOCHS * 9
    shown = [row["global_step"] for row in kept.history if "step/train_loss" in row]
    assert shown == [row["step"] for row in rows if row["kind"] == "step"]
    assert [row["epoch"] for row in kept.history if "val_loss" in row] == list(range(1, EPOCHS + 1))


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_in_trouble_for_a_while_gets_every_row_from_the_training_itself(
    server: Server, tmp_path: Path, digits_data: Path, status: int
) -> None:
    metrics = tmp_path / "mirrored" / "metrics.jsonl"
    trouble = Midway(server, metrics, status, times=2)
    said = trained(server, tmp_path, digits_data, trouble)
    assert trouble.refused == 2 and LATER not in said
    assert_every_row(server, metrics)


@pytest.mark.parametrize(("name", "status"), {"401": 401, "404": 404, "hanging": HANG, "gone": GONE}.items())
def test_what_a_server_refuses_in_the_middle_of_a_training_arrives_later(
    server: Server, tmp_path: Path, digits_data: Path, name: str, status: int
) -> None:
    metrics = tmp_path / "mirrored" / "metrics.jsonl"
    trouble = Midway(server, metrics, status)
    said = trained(server, tmp_path, digits_data, trouble)
    assert LATER in said, said
    server.trouble = lambda what, number: None
    server.listen()
    sync(Run(tmp_path / "mirrored"), server)
    assert_every_row(server, metrics)
