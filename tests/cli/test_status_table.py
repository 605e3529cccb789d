"""The table of status on terminals of any width."""

from __future__ import annotations

import dataclasses

import pytest

from hpc_cifar.cli.status_table import cells, fitted, in_place
from hpc_cifar.launch.status import Status

RUNNING = Status(
    run="deep300-20260102-030405-ab12", state="running", job_id="123456", epoch=120, epochs=300, step=9120, val_accuracy=0.8123,
    test_accuracy=None, restarts=2, gpu_hours=3.25, eta_s=4000.0, reason=None, nodes="gpu[01-02]", images_per_second=123456.7,
    gpu_hours_planned=16.0, gpu_hours_left=12.75,
)  # fmt: skip
PENDING = dataclasses.replace(
    RUNNING, run="deep300-20260102-030406-cd34", state="pending", job_id="123457", epoch=None, step=None, val_accuracy=None,
    restarts=0, gpu_hours=None, eta_s=None, nodes=None, images_per_second=None, estimated_start="2030-01-02T03:04:05+00:00",
    reason="ReqNodeNotAvail, UnavailableNodes:" + ",".join(f"gpu{number:02}" for number in range(40)),
)  # fmt: skip


def lines(*rows: Status, width: int) -> list[str]:
    return fitted([cells(row) for row in rows], width)


def test_it_fits_eighty_columns_and_keeps_what_matters() -> None:
    shown = lines(RUNNING, PENDING, width=80)
    assert max(map(len, shown)) <= 80
    assert {"run", "state", "epoch", "validation", "left"} <= set(shown[0].split())
    assert "1:06:40" in shown[1] and "81.23 %" in shown[1]
    reason = "".join(line.strip() for line in shown[3:])
    assert len(shown) > 4 and reason.replace(" ", "") == (PENDING.reason or "").replace(" ", "")


def test_columns_that_say_nothing_are_left_out() -> None:
    assert "test" not in lines(RUNNING, width=300)[0].split()
    assert lines(dataclasses.replace(RUNNING, test_accuracy=0.9), width=300)[0].split()[6] == "test"
    wide = lines(RUNNING, PENDING, width=300)[0]
    assert "GPU-h left" in wide and "nodes" in wide and "start" in wide and "restarts" in wide


def test_a_screen_is_not_overflown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINES", "24")
    rows = [dataclasses.replace(RUNNING, run=f"run-{number}") for number in range(200)]
    text = in_place(lines(*rows, width=80), first=True)
    assert text.startswith("\x1b[2J\x1b[H") and text.endswith("\x1b[J")
    assert text.count("\n") < 25 and "more lines" in text
    assert not in_place(["x"], first=False).startswith("\x1b[2J")
