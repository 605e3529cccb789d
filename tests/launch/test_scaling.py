"""``bench step``: the trainer on several numbers of processes; those that are not here are modelled, and labelled so."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest

from hpc_cifar.cli.main import main
from hpc_cifar.launch.scaling import Link


def test_a_ring_all_reduce() -> None:
    """Each process sends 2 (n - 1) times the n-th part."""
    link = Link(bytes_per_second=1e9, latency_s=1e-5)
    assert link.all_reduce_s(1_000_000, 1) == 0
    assert link.all_reduce_s(1_000_000, 2) == pytest.approx(1e-3 + 2e-5)
    assert link.all_reduce_s(1_000_000, 8) == pytest.approx(2 * 7 / 8 * 1e-3 + 14e-5)


@pytest.mark.slow
def test_measured_and_modelled(
    tmp_path: Path, digits_data: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    out, more, sizes = tmp_path / "scaling.json", 4, "1,2,4"
    root = ["--root", str(digits_data), "--json", str(out)]
    assert main(["bench", "step", "quickstart-digits", "--world-size", sizes, "--steps", "25", *root]) == 0
    figures = json.loads(out.read_text())
    assert [(point["processes"], point["modelled"]) for point in figures["points"]] == [(1, False), (2, False), (more, True)]
    assert figures["points"][0]["efficiency"] == 1.0
    # an epoch of 21 steps: 5, 10, 15, 20 and its end; the tail is not counted; with a quarter of the batch it is longer
    assert [len(point["images_per_second"]) for point in figures["points"]] == [3, 3, 4]
    assert all(min(point["images_per_second"]) > 0 for point in figures["points"])
    lines = capfd.readouterr().out.splitlines()
    assert [line.endswith("modelled") for line in lines[2:5]] == [False, False, True]
    assert list((tmp_path / "temporary").iterdir()) == [], "its runs are thrown away"


def test_what_cannot_be_measured_is_said(tmp_path: Path, digits_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--root", str(digits_data)]
    for arguments, words in (
        (["--world-size", "1,x"], "--world-size 1,x: should be whole numbers from 1 to 1024"),
        (["--world-size", "65"], "--world-size 65: the job's batch of 64 images is smaller"),
        (["--world-size", "1", "--json", str(tmp_path / "no" / "x.json")], "there is no folder"),
    ):
        assert main(["bench", "step", "quickstart-digits", *root, *arguments]) == 2
        assert words in capsys.readouterr().err
