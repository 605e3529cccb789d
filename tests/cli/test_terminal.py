"""What people see on a terminal: bars and live tables there, plain lines everywhere else, colours where wanted."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import wandb_server
from mirrored import EXPERIMENT

from hpc_cifar import files
from hpc_cifar.train import rehearsal

pytestmark = pytest.mark.slow
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-9]|4[0-9]|9[0-7])(?:;\d+)*m")
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def environment(tmp_path: Path, digits_data: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    site = {"HPC_CIFAR_RUNS": str(tmp_path / "runs"), "HPC_CIFAR_DATA": str(digits_data), "WANDB_MODE": "disabled"}
    return {**inherited, **site, "TERM": "xterm-256color"}


@pytest.fixture
def job(tmp_path: Path) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(EXPERIMENT | {"epochs": 30}))
    return str(path)


@contextlib.contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of one, of 40 lines and 140 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
    try:
        yield ours, theirs
    finally:
        os.close(ours)


def shown(
    environment: dict[str, str], *arguments: str, until: Callable[[str], bool] = lambda text: False, code: int = 0
) -> str:
    """All that a command writes to its terminal until it ends, or is interrupted as soon as ``until`` says so."""
    text, interrupted = "", False
    deadline = time.monotonic() + 100
    with terminal() as (ours, theirs):
        command = [sys.executable, "-m", "hpc_cifar", *arguments]
        child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True)
        os.close(theirs)
        while time.monotonic() < deadline:
            try:
                read = os.read(ours, 65536)
            except OSError:  # Linux: the other end is closed
                break
            text += read.decode(errors="replace")
            if not interrupted and until(text):
                interrupted = True
                child.send_signal(2)
        else:
            child.kill()
            raise AssertionError(f"it goes on and on: {text[-2000:]}")
    assert child.wait(10) == code, text
    return text


def plain(environment: dict[str, str], *arguments: str) -> str:
    """The same without a terminal."""
    command = [sys.executable, "-m", "hpc_cifar", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_train_has_a_bar_and_keeps_the_lines_of_the_epochs(environment: dict[str, str], job: str) -> None:
    text = shown(environment, "train", job, "--fresh")
    words = ESCAPE.sub("", text)
    assert COLOUR.search(text) and "━" in words
    assert re.search(r"epoch \d+/30 .*\d+/270.*loss \d\.\d{4}  [\d,]+ images/s", words), words[-3000:]
    lines = [line.strip() for line in words.splitlines()]
    told = [line for line in lines if re.match(r"epoch \d+/30  loss .*validation accuracy", line)]
    assert [line.partition("/")[0] for line in told] == [f"epoch {epoch}" for epoch in range(1, 31)]
    assert re.search(r"test accuracy +\d", words)


def test_without_a_terminal_there_are_plain_lines(environment: dict[str, str], job: str) -> None:
    text = plain(environment, "train", job, "--fresh")
    assert "\x1b" not in text and "━" not in text and "\r" not in text
    assert len(re.findall(r"^epoch \d+/30  loss", text, re.MULTILINE)) == 30


def test_no_color_is_heard(environment: dict[str, str], job: str) -> None:
    environment["NO_COLOR"] = "1"
    for command in (("train", job, "--fresh"), ("status",), ("list",)):
        text = shown(environment, *command)
        assert not COLOUR.search(text), command
    assert "finished" in text


def test_following_a_job_has_a_bar_with_the_time_that_is_left(environment: dict[str, str], job: str) -> None:
    text = shown(environment, "submit", job, "--cluster", "local", "--follow", "--set", "epochs=60")
    words = ESCAPE.sub("", text)
    assert re.search(r"epoch \d+/60 .*step [\d,]+/540  loss \d\.\d+.* left ", words), words[-3000:]
    assert "━" in words and "60/60" in words and re.search(r"state +finished", words)


def test_a_live_table_is_drawn_in_place_until_the_run_has_ended(environment: dict[str, str], job: str) -> None:
    command = [sys.executable, "-m", "hpc_cifar", "train", job, "--name", "shown"]
    run = Path(environment["HPC_CIFAR_RUNS"]) / "shown"

    def seen_thrice(text: str) -> bool:
        if text.count("\x1b[H") > 2:
            files.write_json(run / "drill" / "pace", 0.0)
        return False

    with subprocess.Popen(command, env=environment | {rehearsal.VARIABLE: "0.5"}, stdout=subprocess.DEVNULL) as child:
        wandb_server.until(lambda: (files.read_json(run / "state.json") or {}).get("state") == "running")
        text = shown(environment, "status", "--watch", "--every", "0.2", until=seen_thrice)
        assert child.wait(60) == 0
    assert text.count("\x1b[H") > 2 and text.count("\x1b[2J") == 1
    assert "finished" in ESCAPE.sub("", text).splitlines()[-1], text[-2000:]


def test_preparing_data_tells_how_much_has_been_read(
    environment: dict[str, str], cifar_archive: Path, lossless_archive: Path, tmp_path: Path
) -> None:
    environment["HPC_CIFAR_DATA"] = str(tmp_path / "data")

    def shares(text: str) -> list[int]:
        return [int(share) for share in re.findall(r"reading .*?(\d+)%", ESCAPE.sub("", text))]

    def moves(text: str) -> bool:
        return len(set(shares(text)) - {0, 100}) > 2

    large = "prepare", "cifar10", "--archive", str(cifar_archive)  # seconds, whatever the machine
    text = shown(environment, *large, until=moves, code=130)
    assert moves(text) and shares(text) == sorted(shares(text)), text
    small = "prepare", "cifar10", "--archive", str(lossless_archive)
    assert shares(shown(environment, *small))[-1] == 100
    assert "%" not in plain(environment, *small, "--force")
