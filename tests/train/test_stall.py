"""``bench checkpoint``: ours and plain ones by turns, and nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpc_cifar.cli.main import main


def test_checkpoints_of_both_kinds_by_turns(tmp_path: Path, digits_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, folder = tmp_path / "checkpoint.json", tmp_path / "shared"
    where = ["--root", str(digits_data), "--folder", str(folder), "--json", str(out)]
    small = ["--batch-size", "50", "--steps", "2", "--rounds", "2"]
    assert main(["bench", "checkpoint", "quickstart-digits", *small, *where]) == 0
    figures = json.loads(out.read_text())
    assert {kind: len(seconds) for kind, seconds in figures["seconds"].items()} == {"ours": 2, "torch.save": 2}
    assert {kind: len(rates) for kind, rates in figures["images_per_second_after"].items()} == {"ours": 2, "torch.save": 2}
    assert (figures["n"], figures["batch_size"], figures["device"]) == (2, 50, "cpu") and figures["state_bytes"] > 1000
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("`quickstart-digits`") and [line.split(" | ")[0] for line in lines[4:6]] == [
        "| ours",
        "| torch.save",
    ]
    assert list(folder.iterdir()) == [], "its run is thrown away"


def test_a_job_that_does_not_exist_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "checkpoint", "deep30", "--folder", str(tmp_path / "runs")]) == 2
    assert "deep300" in capsys.readouterr().err and not (tmp_path / "runs").exists()
