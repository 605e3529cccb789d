"""Backbones of torchvision and timm: what is trained, weights that fit and that do not, heads, preprocessing."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from hpc_cifar.cli.main import main
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.config.load import load_experiment
from hpc_cifar.config.model import PretrainedModel
from hpc_cifar.config.packaged import job_files
from hpc_cifar.errors import DataError, UsageError
from hpc_cifar.launch.weights import with_weights
from hpc_cifar.models import build, pretrained, weights

pytestmark = pytest.mark.slow  # seconds of imports and of random weights


def model(**values: Any) -> PretrainedModel:
    return PretrainedModel.model_validate({"family": "torchvision", "name": "resnet18", "weights": None, **values})


def made(config: PretrainedModel, classes: int = 10) -> pretrained.Pretrained:
    network = build.build(config, (3, 32, 32), False, classes)
    assert isinstance(network, pretrained.Pretrained)
    return network


def trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_the_last_four_layers_of_vgg16_are_those_of_keras() -> None:
    network = made(model(name="vgg16", train="last4"))
    assert trained(network.backbone) == 7_079_424 and trained(network.head) == 5_130
    layers = pretrained.counted_layers(network.backbone)
    assert [type(layer).__name__ for layer in layers[-4:]] == ["Conv2d", "Conv2d", "Conv2d", "MaxPool2d"]
    assert sum(p.numel() for p in network.backbone.parameters()) == 14_714_688


@pytest.mark.parametrize("train", ["frozen", "last3", "all"])
def test_what_is_not_trained_stays_as_it_is(train: str) -> None:
    """Weights, and the statistics of normalisations, which training mode would move."""
    torch.manual_seed(0)
    network = made(model(train=train))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.train()
    network(torch.randn(8, 3, 32, 32)).square().sum().backward()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    named = {name for name in changed if not name.endswith("num_batches_tracked")}
    inside = {name for name in named if name.startswith("backbone.")}
    assert {name.partition(".")[0] for name in named} == ({"head"} if train == "frozen" else {"head", "backbone"})
    if train == "last3":  # layer4[1]: bn1, conv2, bn2
        assert {name.rsplit(".", 1)[0] for name in inside} == {f"backbone.layer4.1.{part}" for part in ("bn1", "conv2", "bn2")}
    if train == "all":
        assert inside == {f"backbone.{name}" for name in network.backbone.state_dict() if "num_batches" not in name}


def test_statistics_may_be_frozen_though_the_layers_are_trained() -> None:
    network = made(model(weights="imagenet", train="all", batch_norm="frozen")).train()
    kinds = {type(m).__name__: m.training for m in network.backbone.modules() if isinstance(m, nn.BatchNorm2d | nn.Conv2d)}
    assert kinds == {"BatchNorm2d": False, "Conv2d": True}
    assert trained(network.backbone) == sum(p.numel() for p in network.backbone.parameters())


def test_a_shard_of_one_image_or_none_moves_no_statistics() -> None:
    """As a rank may get of a small last batch; the library's own normalisation raises for one value a channel."""
    network = made(model(train="all")).train()
    before = network.backbone.get_buffer("bn1.running_mean").clone()
    for count in (1, 0):
        network(torch.randn(count, 3, 32, 32)).sum().backward()
        assert torch.equal(network.backbone.get_buffer("bn1.running_mean"), before)
    network(torch.randn(2, 3, 64, 64))
    assert not torch.equal(network.backbone.get_buffer("bn1.running_mean"), before)


def test_layers_of_timm_that_contain_their_activation_are_counted() -> None:
    network = made(model(family="timm", name="tf_efficientnet_lite0", train="last2"))
    names = [type(layer).__name__ for layer in pretrained.counted_layers(network.backbone)]
    assert names[-2:] == ["Conv2d", "BatchNormAct2d"]
    assert trained(network.backbone) == 320 * 1280 + 2 * 1280


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("torchvision", "densenet121"), ("torchvision", "mobilenet_v3_small"), ("torchvision", "regnet_y_400mf"),
        ("torchvision", "shufflenet_v2_x0_5"), ("torchvision", "squeezenet1_1"), ("torchvision", "mnasnet0_5"),
        ("torchvision", "googlenet"), ("timm", "resnet10t"), ("timm", "tf_efficientnet_lite0"), ("timm", "densenet121"),
    ],
)  # fmt: skip
def test_backbones_are_the_library_s_own(family: str, name: str) -> None:
    """The library's classifier on the mean of our maps gives what the library gives."""
    config = model(family=family, name=name, resize=64)
    whole = pretrained.whole(config).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = whole(images)
        if family == "timm":
            maps = whole.forward_features(images)  # type: ignore[operator]
            logits = whole.forward_head(maps)  # type: ignore[operator]
            torch.testing.assert_close(logits, expected)
            torch.testing.assert_close(pretrained.backbone_of(whole, config)(images), maps)
            return
        maps = pretrained.backbone_of(whole, config)(images)
        if name == "squeezenet1_1":  # its classifier is a convolution before the pool
            logits = whole.classifier(maps).flatten(1)  # type: ignore[operator]
        else:
            pooled = whole.avgpool(maps) if isinstance(getattr(whole, "avgpool", None), nn.Module) else maps.mean((2, 3))
            last = getattr(whole, "fc", None) or whole.classifier
            logits = last(pooled.flatten(1))  # type: ignore[operator]
        torch.testing.assert_close(logits, expected)


def test_inception_with_small_and_usual_images_and_no_second_head() -> None:
    for side in (75, 299):
        network = made(model(name="inception_v3", resize=side)).train()
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert not any("aux" in name.lower() for name, _ in network.named_modules())
    assert pretrained.statistics(model(name="inception_v3")).mean == (0.5, 0.5, 0.5)
    with pytest.raises(UsageError, match=r"inception_v3 cannot take images of 3x32x32; set model.resize, such as 224"):
        made(model(name="inception_v3"))


def test_heads_of_layers() -> None:
    head = ["global_avg_pool", {"dense": {"units": 64, "l2": 0.1}}, "relu", {"dense": {"units": 7, "max_norm": 2}}]
    config = model(head=head, train="all", backbone_lr_factor=0.1)
    network = made(config, classes=7)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    rules = build.rules(config, network)
    assert [(rule.l2, rule.max_norm) for rule in rules[:2]] == [(0.1, None), (0.0, 2)]
    slow = {id(rule.parameter) for rule in rules if rule.lr_factor == 0.1}
    assert slow == {id(p) for p in network.backbone.parameters()}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "resnet19"}, r"torchvision has no 'resnet19'; did you mean resnet1[08]"),
        ({"family": "timm", "name": "resnet19"}, "timm has no 'resnet19'; did you mean"),
        ({"name": "vit_b_16"}, "vit_b_16 delivers no maps; use family: timm"),
        ({"name": "swin_t"}, "swin_t delivers no maps; use family: timm"),
        ({"family": "timm", "name": "vit_tiny_patch16_224", "resize": 224}, "vit_tiny_patch16_224 delivers no maps"),
        ({"family": "timm", "name": "resnet18.nope"}, "timm's resnet18 has no weights 'nope'; there are resnet18."),
        ({"train": "last400"}, r"last400 is more than the \d+ layers of the backbone; use all"),
        ({"head": [{"max_pool": {"size": 3}}, "flatten", {"dense": {"units": 10}}]}, r"model.head\[0\]: max_pool of size 3"),
    ],
)
def test_what_cannot_be_built(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as error:
        made(model(**values))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "path", [path for path in job_files() if "family: sequential" not in path.read_text()], ids=lambda p: p.stem
)
def test_headers_of_transfer_jobs_count_what_is_trained(path: Path) -> None:
    config = load_experiment(path).model
    assert isinstance(config, PretrainedModel)
    network = made(config.model_copy(update={"weights": None}))
    header = " ".join(line.lstrip("# ") for line in path.read_text().partition("\nname:")[0].splitlines())
    numbers = [int(text.replace(",", "")) for text in re.findall(r"(\d[\d,]{3,})(?: trained parameters| in the head)", header)]
    assert sum(numbers) == trained(network)


# ---- weights -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torchvision's own, with random weights."""
    path = tmp_path_factory.mktemp("weights") / "resnet18-f37072fd.pth"
    torch.manual_seed(5)
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


def first_kernel(network: pretrained.Pretrained) -> torch.Tensor:
    return network.backbone.get_parameter("conv1.weight")


def test_weights_from_a_file_the_cache_and_the_data_folder(
    resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = torch.load(resnet, weights_only=True)
    from_file = model(weights=str(resnet))
    network = made(from_file)
    assert not torch.equal(first_kernel(network), expected["conv1.weight"])
    weights.load(from_file, network, tmp_path)
    state = network.backbone.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in state)

    library = model(weights="imagenet")
    missing = r"not here; on a machine with internet run: hpc-cifar prepare --weights torchvision/resnet18"
    with pytest.raises(UsageError, match=missing):
        weights.check(library, tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / resnet.name).write_bytes(resnet.read_bytes())
    assert weights.check(library, tmp_path) == cache / resnet.name

    assert main(["prepare", "--weights", "resnet18", "--root", str(tmp_path / "data")]) == 0
    assert "torchvision/resnet18: " in capsys.readouterr().out
    kept = tmp_path / "data" / "weights" / "torchvision-resnet18.safetensors"
    assert weights.check(library, tmp_path / "data") == kept
    assert not (tmp_path / "data" / "cifar10").exists(), "a dataset was not asked for"
    (cache / resnet.name).unlink()
    assert main(["prepare", "--weights", "resnet18", "--root", str(tmp_path / "data")]) == 0, "nothing need be downloaded"
    network = made(library)
    weights.load(library, network, tmp_path / "data")
    assert torch.equal(first_kernel(network), expected["conv1.weight"])


def test_real_weights_of_a_package_with_other_names(tmp_path: Path) -> None:
    """effnet-lite0: the same tensors in the same order."""
    config = model(family="timm", name="tf_efficientnet_lite0", weights="imagenet")
    network = made(config)
    weights.load(config, network, tmp_path)
    path = weights.check(config, tmp_path)
    assert path is not None and path.suffix == ".pth"
    given, ours = (
        [tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")]
        for state in (weights.read(path), network.backbone.state_dict())
    )
    assert all(torch.equal(a, b) for a, b in zip(given, ours, strict=False)) and len(ours) == len(given) - 2


def damage(path: Path, how: str, target: Path) -> Path:
    data = path.read_bytes()
    target.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "text": b"not found\n" * 50}[how])
    return target


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("how", ["truncated", "empty", "text"])
def test_damaged_files(resnet: Path, tmp_path: Path, how: str, suffix: str) -> None:
    from safetensors.torch import save_file

    source = tmp_path / f"good{suffix}"
    if suffix == ".pth":
        source.write_bytes(resnet.read_bytes())
    else:
        save_file(torch.load(resnet, weights_only=True), source)
    bad = damage(source, how, tmp_path / f"bad{suffix}")
    with pytest.raises(DataError, match="is truncated or damaged, or holds no weights") as error:
        weights.check(model(weights=str(bad)), tmp_path)
    assert str(bad) in str(error.value) and "\n" not in str(error.value)


def other(change: Callable[[dict[str, torch.Tensor]], object], resnet: Path, target: Path) -> Path:
    state = torch.load(resnet, weights_only=True)
    change(state)
    torch.save(state, target)
    return target


def test_weights_of_another_network(resnet: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"are not the weights of resnet50: \d+ of its tensors are missing, such as layer1"):
        weights.check(model(name="resnet50", weights=str(resnet)), tmp_path)
    wide = other(lambda s: s.update({"conv1.weight": torch.zeros(64, 1, 7, 7)}), resnet, tmp_path / "grey.pth")
    with pytest.raises(UsageError, match=r"conv1.weight is 64x1x7x7 and should be 64x3x7x7"):
        weights.check(model(weights=str(wide)), tmp_path)
    more = other(lambda s: s.update({"layer9.weight": torch.zeros(1)}), resnet, tmp_path / "more.pth")
    with pytest.raises(UsageError, match=r"1 are unknown to it, such as layer9.weight"):
        weights.check(model(weights=str(more)), tmp_path)
    headless = other(lambda s: [s.pop("fc.weight"), s.pop("fc.bias")], resnet, tmp_path / "headless.pth")
    assert weights.check(model(weights=str(headless)), tmp_path) == headless
    hundred = other(lambda s: s.update({"fc.weight": torch.zeros(100, 512)}), resnet, tmp_path / "hundred.pth")
    assert weights.check(model(weights=str(hundred)), tmp_path) == hundred
    with pytest.raises(UsageError, match=r"there is no file /nowhere/x.pth"):
        weights.check(model(weights="/nowhere/x.pth"), tmp_path)


def test_nothing_is_unpickled_but_tensors(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"conv1.weight": Experiment}, path)
    with pytest.raises(DataError, match="truncated or damaged, or holds no weights"):
        weights.check(model(weights=str(path)), tmp_path)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(DataError, match="holds no named tensors"):
        weights.check(model(weights=str(path)), tmp_path)


def test_prepare_names_what_it_cannot_fetch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    for name, words in (
        ("resnet19", "--weights resnet19: torchvision has no 'resnet19'; did you mean resnet1"),
        ("keras/vgg16", "--weights keras/vgg16: should be such as torchvision/vgg16, torchvision/resnet50:imagenet-v1 or timm"),
        ("torchvision/resnet34", "the weights of resnet34 cannot be downloaded (no route to host); copy the file from"),
    ):
        assert main(["prepare", "--weights", name, "--root", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1


def test_submit_copies_weights_to_where_all_nodes_see_them(resnet: Path, tmp_path: Path, digits_data: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(digits_data, root)
    values = experiment_with(resnet)
    [one, two] = with_weights([values, values.model_copy(update={"seed": 3})], root)
    assert isinstance(one.model, PretrainedModel) and one.model.weights is not None
    path = Path(one.model.weights)
    assert path.is_relative_to(root) and path.read_bytes() == resnet.read_bytes() and one.model == two.model
    again = with_weights([one], root)[0].model
    assert again == one.model and len(list((root / "weights").iterdir())) == 1


def experiment_with(weights_file: Path) -> Experiment:
    return Experiment.model_validate(
        {
            "name": "x",
            "epochs": 1,
            "model": {"family": "torchvision", "name": "resnet18", "weights": str(weights_file)},
            "data": {"dataset": "digits", "batch_size": 64},
            "optimizer": {"name": "sgd", "lr": 0.1},
        }
    )


@pytest.mark.parametrize("how", ["missing", "truncated", "another"])
def test_submit_finds_bad_weights_before_anything_is_made(
    how: str,
    resnet: Path,
    tmp_path: Path,
    digits_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(digits_data, tmp_path / "data")
    monkeypatch.setenv("HPC_CIFAR_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("HPC_CIFAR_DATA", str(tmp_path / "data"))
    path = resnet
    if how == "missing":
        path = tmp_path / "nowhere.pth"
    elif how == "truncated":
        path = damage(resnet, "truncated", tmp_path / "bad.pth")
    name = "resnet34" if how == "another" else "resnet18"
    job = tmp_path / "job.yaml"
    job.write_text(
        f"name: x\nepochs: 1\nmodel: {{family: torchvision, name: {name}, weights: {path}}}\n"
        "data: {dataset: digits, batch_size: 64}\noptimizer: {name: sgd, lr: 0.1}\n"
    )
    assert main(["submit", str(job), "--cluster", "local"]) == 2
    words = {"missing": "there is no file", "truncated": "truncated or damaged", "another": "are not the weights of resnet34"}
    said = capsys.readouterr().err
    assert words[how] in said and said.count("\n") == 1
    assert main(["submit", str(job), "--cluster", "local", "--dry-run"]) == 0
    assert f"warning: submit would refuse this: {said.removeprefix('hpc-cifar: error: ')}" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
