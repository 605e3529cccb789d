"""From files of one's own to a trained network: CIFAR-100's layout, and class folders of images of another size."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))

import makers
from command_line import COMMANDS, TRAINING, preload, typed

from hpc_cifar.data.choice import problem

pytestmark = pytest.mark.slow
preload(*COMMANDS, *TRAINING)
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
    done = typed(arguments, environment, folder, timeout_s=120)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def trained(folder: Path, dataset: str, classes: int, pipeline: str) -> float:
    """The loss on the test images of two epochs."""
    (folder / "job.yaml").write_text(JOB.format(dataset=dataset, classes=classes, pipeline=pipeline))
    hpc_cifar(folder, "train", "job.yaml", "--name", pipeline)
    [path] = folder.glob(f"runs/*{pipeline}*/result.json")
    result = json.loads(path.read_text())
    assert (result["state"], result["epochs"]) == ("finished", 2)
    return float(result["test_loss"])


@pytest.fixture(scope="module", params=["cifar100", "leaves"])
def own(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int, float]:
    """A folder with prepared data, their name and number of classes, and the loss that ``resident`` ends with."""
    folder, dataset = tmp_path_factory.mktemp(request.param), request.param
    if dataset == "cifar100":
        source, classes, size = makers.write_tar(folder / "hundred.tar.gz", makers.hundred_files(200, 100)), 100, (32, 32)
    else:
        files = makers.image_files(each=12, classes=("oak", "ash", "yew"), size=(28, 20), kind="PNG")
        source, classes, size = makers.write_folder(folder / "leaves", files), 3, (20, 28)
    said = hpc_cifar(folder, "prepare", dataset, "--archive", str(source), "--preview", "sheet.png")
    assert "unverified" in said and (folder / "sheet.png").stat().st_size > 1000
    assert np.load(folder / "data" / dataset / "train-images.npy", mmap_mode="r").shape[1:] == (*size, 3)
    return folder, dataset, classes, trained(folder, dataset, classes, "resident")


@pytest.mark.parametrize("pipeline", ["reference", FFCV, DALI])
def test_prepare_and_train(own: tuple[Path, str, int, float], pipeline: str) -> None:
    """Any pipeline ends with the loss of ``resident``."""
    if why := problem(pipeline):
        pytest.skip(why)
    folder, dataset, classes, loss = own
    assert trained(folder, dataset, classes, pipeline) == pytest.approx(loss, abs=1e-5)
