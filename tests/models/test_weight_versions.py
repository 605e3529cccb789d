"""torchvision's older and newer weights of one network: asked for by name, fetched, kept and found apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from hpc_cifar.cli.main import main
from hpc_cifar.config.load import load_experiment
from hpc_cifar.config.model import PretrainedModel
from hpc_cifar.config.packaged import job_files
from hpc_cifar.errors import UsageError
from hpc_cifar.models import build, pretrained, weights

pytestmark = pytest.mark.slow  # seconds of imports and of random weights


def model(**values: Any) -> PretrainedModel:
    return PretrainedModel.model_validate({"family": "torchvision", **values})


def test_the_older_and_the_newer_weights_of_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two files as torchvision's own, with random weights; neither stands for the other in the cache or the data folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    cache, root = tmp_path / "torch" / "hub" / "checkpoints", tmp_path / "data"
    cache.mkdir(parents=True)
    entries = torchvision.models.MobileNet_V2_Weights
    assert entries.DEFAULT is entries.IMAGENET1K_V2
    first = {}
    for entry in (entries.IMAGENET1K_V1, entries.IMAGENET1K_V2):
        state = torchvision.models.mobilenet_v2().state_dict()
        torch.save(state, cache / entry.url.rpartition("/")[2])
        first[entry] = state["features.0.0.weight"]

    def loaded(version: str, root: Path) -> torch.Tensor:
        config = model(name="mobilenet_v2", weights=version)
        network = build.build(config, (3, 32, 32))
        weights.load(config, network, root)
        return network.get_submodule("backbone").get_parameter("0.0.weight")

    for folder in (tmp_path / "empty", root):  # of the cache, then of what prepare keeps
        if folder == root:
            asked = ["mobilenet_v2:imagenet-v1", "torchvision/mobilenet_v2"]
            assert main(["prepare", *(word for name in asked for word in ("--weights", name)), "--root", str(root)]) == 0
            said = capsys.readouterr().out
            assert "torchvision/mobilenet_v2:imagenet-v1: " in said and "torchvision/mobilenet_v2: " in said
            for path in cache.iterdir():
                path.unlink()
        assert torch.equal(loaded("imagenet-v1", folder), first[entries.IMAGENET1K_V1])
        assert torch.equal(loaded("imagenet-v2", folder), first[entries.IMAGENET1K_V2])
        assert torch.equal(loaded("imagenet", folder), first[entries.IMAGENET1K_V2])
    assert {path.name for path in (root / "weights").iterdir()} == {
        "torchvision-mobilenet_v2-imagenet-v1.safetensors", "torchvision-mobilenet_v2.safetensors",
    }  # fmt: skip
    missing = r"not here; on a machine with internet run: hpc-cifar prepare --weights torchvision/mobilenet_v2:imagenet-v1$"
    with pytest.raises(UsageError, match=missing):
        weights.check(model(name="mobilenet_v2", weights="imagenet-v1"), tmp_path / "empty")


def test_a_version_of_weights_that_there_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="torchvision has no imagenet-v2 of vgg16; there is imagenet-v1"):
        weights.check(model(name="vgg16", weights="imagenet-v2"), tmp_path)
    with pytest.raises(ValueError, match="weights: imagenet-v1 is torchvision's; timm has them in the name"):
        model(family="timm", name="resnet18", weights="imagenet-v1")
    only = model(name="vgg16", weights="imagenet-v1")
    assert weights.name_of(only) == "torchvision/vgg16" and weights.kept(only, tmp_path).name == "torchvision-vgg16.safetensors"
    assert main(["prepare", "--weights", "torchvision/vgg16:imagenet-v2", "--root", str(tmp_path)]) == 2
    assert "--weights torchvision/vgg16:imagenet-v2: torchvision has no imagenet-v2 of vgg16" in capsys.readouterr().err
    assert main(["prepare", "--weights", "torchvision/vgg16:v1", "--root", str(tmp_path)]) == 2
    assert "--weights torchvision/vgg16:v1: should be such as" in capsys.readouterr().err


def test_source_003_s_backbones_take_the_weights_of_keras_kind() -> None:
    for path in job_files():
        config = load_experiment(path)
        if isinstance(config.model, PretrainedModel) and (config.claim is not None or "-frozen-expected" in path.stem):
            entry, _ = pretrained.torchvision_weights(config.model)
            assert entry.name == "IMAGENET1K_V1" and config.model.init == "glorot_uniform", path.stem
