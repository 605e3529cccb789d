"""A planted key, which is used for W&B, is in no output: files, what is printed, command lines, or what W&B is sent."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import typed
from mirrored import at, job
from wandb_server import KEY, Server

from hpc_cifar import files
from hpc_cifar.runs import Run

pytestmark = [pytest.mark.component("wandb"), pytest.mark.slow]
PLANTED = {"HF_TOKEN": "hf_PlantedPlantedPlanted0123456789", "DB_PASSWORD": "planted-hunter2-planted", "WANDB_API_KEY": KEY}


@contextlib.contextmanager
def command_lines() -> Iterator[set[bytes]]:
    """Those of all processes that are there meanwhile."""
    seen: set[bytes] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.05):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    seen.add(path.read_bytes())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield seen
    finally:
        stop.set()
        looking.join()


def holding(value: bytes, folder: Path) -> list[Path]:
    found = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    return [path for path in found if path.is_file() and value in path.read_bytes()]


def test_a_planted_key_is_nowhere(server: Server, tmp_path: Path, digits_data: Path) -> None:
    secret_folder = tmp_path / "not an output"
    work = tmp_path / "work"
    for folder in (secret_folder, work):
        folder.mkdir()
    environment = at(server, work / "runs", digits_data) | PLANTED | {"HOME": str(secret_folder), "WANDB_DIR": str(work)}
    submit = ["submit", str(job(work)), "--cluster", "local", "--nodes", "1", "--set", "epochs=5", "--follow"]
    commands = [
        (submit, 0),
        ([*submit, "--set", f"optimizer.lr={KEY}"], 2),  # pasted in the wrong place: told, and not kept
        (["submit", str(work / "job.yaml"), "--dry-run"], 0),
        (["evaluate", "last"], 0),
        (["logs", "last"], 0),
        (["status", "last", "--json"], 0),
        (["list", "--json"], 0),
        *((["report", "last", "--format", form, "-o", str(work / f"report.{form}")], 0) for form in ("html", "md", "json")),
        (["report", "last", "--wandb"], 0),
        (["sync", "last"], 0),
    ]
    printed = []
    with command_lines() as lines:
        for command, code in commands:
            done = typed(command, environment, work, timeout_s=120)
            assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
            if KEY not in command[-1]:
                printed.append(done.stdout + done.stderr)
    assert any(b"hpc_cifar" in line and b"--beside" in line for line in lines), "the process that uploads was seen"
    [kept] = server.runs.values()
    assert kept.history and server.reports, "the key was used"
    sent = [str(server.reports), str(kept.config), str(kept.summary), *map(str, kept.lines.values())]
    for name, value in PLANTED.items():
        assert not holding(value.encode(), work), name
        assert not [text for text in (*printed, *sent) if value in text], name
        assert not [line for line in lines if value.encode() in line], name
        assert not [path for path, data in kept.files.items() if value.encode() in data], name


def test_nobody_else_can_look_into_a_run(tmp_path: Path, server: Server, digits_data: Path) -> None:
    before = os.umask(0o022)  # as on most machines
    try:
        done = typed(
            ["train", str(job(tmp_path)), "--set", "epochs=1"], at(server, tmp_path, digits_data), tmp_path, timeout_s=120
        )
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr
    [run] = [Run(path) for path in tmp_path.iterdir() if path.is_dir() and files.read_json(path / "state.json")]
    assert run.path.stat().st_mode & 0o077 == 0
