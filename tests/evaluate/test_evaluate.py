"""``evaluate`` and ``export`` of real runs on digits."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))

import ranks

from hpc_cifar import files
from hpc_cifar.cli.main import main
from hpc_cifar.data.store import Store
from hpc_cifar.errors import DataError
from hpc_cifar.models import exported
from hpc_cifar.runs import Run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, digits_data: Path) -> Run:
    """A run whose best epoch counts, with an average of its weights."""
    views = {"test_time_augmentation": True}
    config = ranks.experiment(epochs=3, checkpoint={"select": "best"}, tracking={"wandb": "offline"}, training=views)
    run = ranks.new_run(tmp_path_factory.mktemp("evaluated"), config)
    ranks.complete(run, digits_data, 1)
    return run


def command(run: Run, data: Path, *arguments: str, code: int = 0) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPC_CIFAR_RUNS", str(run.path.parent))
        patch.setenv("HPC_CIFAR_DATA", str(data))
        assert main([arguments[0], run.id, *arguments[1:]]) == code


def evaluation(run: Run, split: str = "test") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.path / "evaluation" / split / "evaluation.json").read_text())
    return found


def test_the_figures_are_those_of_the_run(
    finished: Run, digits_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command(finished, digits_data, "evaluate", "--tta", "--feature-maps", "--image", "7")
    said = capsys.readouterr().out
    found, result = evaluation(finished), files.read_object(finished.result_file)
    assert found["accuracy"] == pytest.approx(result["test_accuracy"], abs=1e-9)
    assert found["loss"] == pytest.approx(result["test_loss"], rel=1e-5)
    assert found["tta"]["accuracy"] == pytest.approx(result["tta_accuracy"], abs=1e-9)
    assert found["tta"]["loss"] == pytest.approx(result["tta_loss"], rel=1e-5)
    assert result["tta_loss"] != result["test_loss"]
    assert (found["checkpoint"], found["data"], found["images"]) == ("best", "digits", 359)
    assert np.array(found["confusion"]).sum() == 359 and found["tta"]["views"] == 10
    assert f"{found['accuracy']:.2%}" in said and f"{found['tta']['accuracy']:.2%}" in said and "most confused: " in said
    assert sum(scores["images"] for scores in found["per_class"].values()) == 359
    folder = finished.path / "evaluation" / "test"
    drawn = {path.name for path in folder.glob("*.png")}
    # a convolution and a pool are in the network
    maps = {"kernels.png", "maps-00-image.png", "maps-01-0.png", "maps-02-3.png"}
    assert drawn == {"confusion.png", "reliability.png", "curves.png", "misclassified.png"} | maps
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            picture.load()
            assert min(picture.size) > 100 and np.asarray(picture.convert("L")).std() > 5, f"{path.name} shows something"


def test_the_validation_split_and_other_checkpoints(finished: Run, digits_data: Path, capsys: Any) -> None:
    command(finished, digits_data, "evaluate", "--split", "validation", "--no-pictures", "--checkpoint", "latest", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 144 and found["checkpoint"] == "latest" and "tta" not in found
    last = [row for row in map(json.loads, finished.metrics_file.read_text().splitlines()) if row["kind"] == "epoch"][-1]
    assert found["accuracy"] == pytest.approx(last["val_accuracy"], abs=1e-9)
    assert not list((finished.path / "evaluation" / "validation").glob("*.png"))


def test_wrong_requests_are_one_line(finished: Run, digits_data: Path, tmp_path: Path, capsys: Any) -> None:
    cases = {
        ("evaluate", "--split", "train"): (2, "--split train: should be test or validation"),
        ("evaluate", "--checkpoint", "step-9"): (1, "has no checkpoint 'step-9' (yet); there are: best, latest, step-"),
        ("evaluate", "--feature-maps", "--image", "400"): (2, "--image 400: the test images are numbered 0 to 358"),
        ("export", "--out", str(tmp_path / "no" / "x.safetensors")): (2, "should end in .safetensors, in a folder that exists"),
        ("export", "--out", str(tmp_path / "x.pt")): (2, "should end in .safetensors"),
    }
    for arguments, (code, words) in cases.items():
        command(finished, digits_data, *arguments, code=code)
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1, said
    other = tmp_path / "data"
    shutil.copytree(digits_data, other)
    shutil.rmtree(other / "digits")
    command(finished, other, "evaluate", code=2)
    assert "is not prepared" in capsys.readouterr().err


def test_an_export_stands_alone(finished: Run, digits_data: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "digits.safetensors"
    command(finished, digits_data, "export", "--out", str(path))
    assert "10 classes, best checkpoint" in capsys.readouterr().out
    network, about = exported.load(path)
    store = Store.open(digits_data, "digits")
    with torch.no_grad():
        logits = network(about.prepare(torch.from_numpy(store.test.images.copy())))
    right = float((logits.argmax(1).numpy() == store.test.labels).mean())
    result = files.read_object(finished.result_file)
    assert right == pytest.approx(result["test_accuracy"], abs=1e-9), "with the average of the weights, as tested"
    assert about.classes == store.classes and about.image == (3, 32, 32)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert about.facts["run"] == finished.id and about.facts["test_accuracy"] == result["test_accuracy"]


@pytest.mark.parametrize("damage", ["cut", "text", "foreign", "header"])
def test_damaged_exports(finished: Run, digits_data: Path, tmp_path: Path, damage: str) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    command(finished, digits_data, "export", "--out", str(path))
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "text":
        path.write_text("hello")
    elif damage == "foreign":
        save_file({"a": torch.zeros(1)}, path)
    else:
        save_file({"a": torch.zeros(1)}, path, metadata={"format": "hpc-cifar-1", "model": "{}"})
    with pytest.raises(DataError) as error:
        exported.load(path)
    assert str(path) in str(error.value)


def test_a_backbone_s_run_is_evaluated_and_exported(tmp_path: Path, digits_data: Path) -> None:
    values = ranks.experiment(epochs=1, training={"ema_decay": None}).model_dump()
    values["model"] = {"family": "timm", "name": "resnet10t", "weights": None}
    values["data"] |= {"augment": {}, "train_images": 200}
    run = ranks.new_run(tmp_path, type(ranks.experiment()).model_validate(values))
    ranks.complete(run, digits_data, 1)
    command(run, digits_data, "evaluate", "--feature-maps")
    result = files.read_object(run.result_file)
    assert evaluation(run)["accuracy"] == pytest.approx(result["test_accuracy"], abs=1e-9)
    names = [path.name for path in (run.path / "evaluation" / "test").glob("maps-*.png")]
    assert len(names) > 8 and any("layer1_0_conv1" in name for name in names)
    command(run, digits_data, "export", "--out", str(tmp_path / "x.safetensors"))
    network, about = exported.load(tmp_path / "x.safetensors")
    assert network(torch.zeros(1, *about.image)).shape == (1, 10)
