"""From files of one's own to a trained network: CIFAR-100's layout, and class folders of images of another size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))

import makers

from hpc_cifar.data.choice import problem

pytestmark = pytest.mark.slow
FFCV = pytest.param("ffcv", marks=pytest.mark.component("ffcv"))
DALI = pytest.param("dali", marks=pytest.mark.component("dali"))
JOB = """\
name: own
epochs: 2
model:
  family: sequential
  layers: [{{conv: {{filters: 4, kernel: 3, padding: same}}}}, relu, flatten, {{dense: {{units: {classes}}}}}]
data:
  dataset: {dataset}
  pipeline: {pipeline}
  workers: 1
  batch_size: 16
  augment: {{crop_padding: 2, padding_mode: reflect, flip: random, cutout: 4, rotation_degrees: 5}}
optimizer: {{name: sgd, lr: 0.01}}
schedule: {{name: constant}}
"""


def hpc_cifar(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "HPC_CIFAR_DATA": str(folder / "data"), "HPC_CIFAR_RUNS": str(folder / "runs")}
    command = [sys.executable, "-m", "hpc_cifar", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def results(folder: Path, dataset: str, classes: int, pipelines: list[str]) -> list[dict[str, Any]]:
    found = []
    for pipeline in pipelines:
        (folder / "job.yaml").write_text(JOB.format(dataset=dataset, classes=classes, pipeline=pipeline))
        hpc_cifar(folder, "train", "job.yaml", "--name", pipeline)
        [result] = folder.glob(f"runs/*{pipeline}*/result.json")
        found.append(json.loads(result.read_text()))
    return found


@pytest.mark.parametrize("other", ["reference", FFCV, DALI])
@pytest.mark.parametrize("dataset", ["cifar100", "leaves"])
def test_prepare_and_train(tmp_path: Path, dataset: str, other: str) -> None:
    """Any pipeline ends with the loss of ``resident``."""
    if why := problem(other):
        pytest.skip(why)
    if dataset == "cifar100":
        source, classes, size = makers.write_tar(tmp_path / "hundred.tar.gz", makers.hundred_files(200, 100)), 100, (32, 32)
    else:
        files = makers.image_files(each=12, classes=("oak", "ash", "yew"), size=(28, 20), kind="PNG")
        source, classes, size = makers.write_folder(tmp_path / "leaves", files), 3, (20, 28)
    said = hpc_cifar(tmp_path, "prepare", dataset, "--archive", str(source), "--preview", "sheet.png")
    assert "unverified" in said and (tmp_path / "sheet.png").stat().st_size > 1000
    assert np.load(tmp_path / "data" / dataset / "train-images.npy", mmap_mode="r").shape[1:] == (*size, 3)
    first, second = results(tmp_path, dataset, classes, ["resident", other])
    for result in (first, second):
        assert (result["state"], result["epochs"]) == ("finished", 2)
    assert second["test_loss"] == pytest.approx(first["test_loss"], abs=1e-5)
