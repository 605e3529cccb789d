"""No figure is reported of a damaged store, by no command."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))

import ranks

from hpc_cifar import files
from hpc_cifar.cli.main import main
from hpc_cifar.config.packaged import find_job
from hpc_cifar.runs import Run

pytestmark = pytest.mark.slow


@pytest.fixture
def data(digits_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(digits_data, tmp_path / "data")
    monkeypatch.setenv("HPC_CIFAR_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HPC_CIFAR_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "data"


def damage(data: Path, split: str = "test") -> None:
    path = data / "digits" / f"{split}-labels.npy"
    labels = np.load(path, mmap_mode="r+")
    labels[:200] = (labels[:200] + 1) % 10
    labels.flush()


def trained(data: Path, folder: Path, world: int = 1, **environment: str) -> tuple[Run, list[int]]:
    run = ranks.new_run(folder, ranks.experiment(epochs=1))
    return run, ranks.finish(ranks.start(run, data, world, environment=environment))


def test_every_command_refuses_a_damaged_store(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").mkdir()
    run, codes = trained(data, tmp_path / "runs")
    assert codes == [0]
    figures = (run.path / "result.json").read_text()
    damage(data)
    job = str(find_job("quickstart-digits"))
    commands = (
        ["evaluate", run.id],
        ["export", run.id, "--out", str(tmp_path / "out.safetensors")],
        ["submit", job, "--cluster", "local"],
        ["submit", job, "--cluster", "local", "--dry-run"],
        ["train", job],
        ["bench", "data", "--dataset", "digits", "--images", "500", "--rounds", "1"],
    )
    for command in commands:
        capfd.readouterr()
        assert main(command) == 2, command
        said = capfd.readouterr()
        assert "test-labels.npy is not what was written" in said.err, command
        assert "%" not in said.out and "Traceback" not in said.err, command
    assert main(["doctor"]) != 0 and "test-labels.npy is not what was written" in capfd.readouterr().out
    assert (run.path / "result.json").read_text() == figures
    assert not (run.path / "evaluation" / "test").exists()


def test_test_files_that_are_damaged_during_the_training_give_no_figure(data: Path, tmp_path: Path) -> None:
    """Both ranks say so: one of them has read the files."""
    (tmp_path / "runs").mkdir()
    damage(data)
    for world in (1, 2):
        run, codes = trained(data, tmp_path / "runs", world, DAMAGED_SINCE_ITS_START="1")
        assert codes == [2] * world, ranks.logs(run)
        assert run.result() is None or "test_accuracy" not in files.read_object(run.result_file)
        assert "test-labels.npy is not what was written" in run.state().reason


def test_a_damaged_store_stops_all_ranks(data: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    damage(data, "train")
    run, codes = trained(data, tmp_path / "runs", 2)
    assert codes == [2, 2], ranks.logs(run)
    assert "train-labels.npy is not what was written" in run.state().reason
