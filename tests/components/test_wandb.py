"""The real W&B client: what it records offline can be read back, and a server that is not there costs bounded time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc_cifar.config.experiment import Tracking
from hpc_cifar.track.wandb_run import WandbMirror

pytestmark = [pytest.mark.component("wandb"), pytest.mark.slow]

ROWS = [{"kind": "epoch", "epoch": epoch, "step": 10 * epoch, "val_accuracy": 0.25 * epoch} for epoch in (1, 2, 3)]


def record(folder: Path, config: Tracking, said: list[str]) -> WandbMirror:
    mirror = WandbMirror(config, folder, "abc123", "name of the run", {"lr": 0.1}, said.append)
    for row in ROWS:
        mirror.log(row)
    mirror.finish({"test_accuracy": 0.75})
    return mirror


def read_back(path: Path) -> list[dict[str, object]]:
    """The history rows that the client's own inspector finds in a .wandb file."""
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def written(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.wandb"))


def test_offline_record_reads_back(tmp_path: Path) -> None:
    said: list[str] = []
    mirror = record(tmp_path, Tracking(wandb="offline"), said)
    assert (mirror.mode, said) == ("offline", [])
    [path] = written(tmp_path)
    rows = read_back(path)
    assert [row["val_accuracy"] for row in rows] == [0.25, 0.5, 0.75]
    assert [row["global_step"] for row in rows] == [10, 20, 30]


def test_an_absent_server_costs_bounded_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    said: list[str] = []
    began = time.monotonic()
    record(tmp_path, Tracking(wandb="online"), said)
    assert time.monotonic() - began < 90
    assert said, "the user is told"
    assert any(read_back(path) for path in written(tmp_path)), "and what was measured is recorded offline"


def test_no_login_means_offline(tmp_path: Path) -> None:
    said: list[str] = []
    mirror = record(tmp_path, Tracking(wandb="online"), said)
    assert mirror.mode == "offline"
    assert "no login" in said[0]
