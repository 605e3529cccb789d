"""Backbones of torchvision and timm: maps of features for any head, frozen as far as the job file wants."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.model import VERSIONS, PretrainedModel, SequentialModel
from ..config.shapes import ShapeError, head_layers
from ..errors import UsageError
from . import sequential

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

_TRANSFORMED = ("inception_v3", "googlenet")
# what a library's network has after its last maps, besides pools; an auxiliary classifier, too
CLASSIFIERS = ("fc", "classifier", "head", "heads", "AuxLogits", "aux1", "aux2", "dropout", "avgpool")
_COUNTED = (
    nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.MaxPool2d, nn.AvgPool2d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip


class Pretrained(nn.Module):
    """A backbone and a head; (n,3,h,w) images, or features of the backbone, to (n, classes) logits.

    Attributes:
        takes_features: whether what is given are features already.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, resize: int | None, frozen: list[nn.Module]) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.takes_features = False
        self._resize = resize
        self._frozen = frozen  # modules that always are in evaluation mode

    def train(self, mode: bool = True) -> Pretrained:
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """(n, channels, height, width) of images."""
        if self._resize is not None:
            images = F.interpolate(images, size=(self._resize, self._resize), mode="bilinear", antialias=False)
        few = self.training and len(images) < 2  # a rank's share of a small last batch: too few for statistics of their own
        with self._keeping_statistics() if few else contextlib.nullcontext():
            maps: Tensor = self.backbone(images)
        return maps

    @contextlib.contextmanager
    def _keeping_statistics(self) -> Iterator[None]:
        moving = [m for m in self.backbone.modules() if getattr(m, "running_mean", None) is not None and m.training]
        for module in moving:
            module.eval()
        try:
            yield
        finally:
            for module in moving:
                module.train()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x if self.takes_features else self.features(x))
        return logits


def build(model: PretrainedModel, input_shape: tuple[int, int, int], classes: int) -> Pretrained:
    """The network with random weights, initialised from torch's current random state.

    Raises:
        UsageError: the library has no such backbone, it cannot take such images, or the head does not fit its maps.
    """
    backbone = backbone_of(whole(model), model)
    side = model.resize
    shape = (input_shape[0], side, side) if side else input_shape
    try:
        backbone.eval()
        with torch.no_grad():
            maps = backbone(torch.zeros(2, *shape))
    except (RuntimeError, ValueError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise UsageError(
            f"model.name: {model.name} cannot take images of {'x'.join(map(str, shape))}; set model.resize, such as 224 "
            f"({first})"
        ) from None
    if maps.dim() != 4:
        raise UsageError(f"model.name: {model.name} delivers no maps (channels x height x width) but {tuple(maps.shape[1:])}")
    head = SequentialModel(family="sequential", layers=head_layers(model, classes), init=model.init)
    try:
        made = sequential.build(head, (maps.shape[1], maps.shape[2], maps.shape[3]))
    except ShapeError as error:
        raise UsageError(f"model.head[{error.index}]: {error.message}") from None
    trained = _trained_layers(backbone, model.last)
    kept = {id(parameter) for module in trained for parameter in module.parameters(recurse=False)}
    if model.last is None:
        kept = {id(parameter) for parameter in backbone.parameters()}
    for parameter in backbone.parameters():
        parameter.requires_grad_(id(parameter) in kept)
    return Pretrained(backbone, made, side, _frozen(backbone, model, trained))


def _frozen(backbone: nn.Module, model: PretrainedModel, trained: list[nn.Module]) -> list[nn.Module]:
    """Modules that stay in evaluation mode: a frozen backbone; else normalisations that are not trained, or all of them."""
    if model.last == 0:
        return [backbone]
    if model.batch_norm == "auto" and model.last is None:
        return []
    exempt = set() if model.batch_norm == "frozen" else {id(module) for module in trained}
    statistics = [module for module in backbone.modules() if getattr(module, "running_mean", None) is not None]
    return [module for module in statistics if id(module) not in exempt]


def counted_layers(backbone: nn.Module) -> list[nn.Module]:
    """The layers that ``last4`` counts: convolutions, dense layers, normalisations and pools, in the order of the library."""
    return [module for module in backbone.modules() if isinstance(module, _COUNTED)]


def _trained_layers(backbone: nn.Module, last: int | None) -> list[nn.Module]:
    layers = counted_layers(backbone)
    if last is None:
        return layers
    if last > len(layers):
        raise UsageError(f"model.train: last{last} is more than the {len(layers)} layers of the backbone; use all")
    return layers[len(layers) - last :]


def whole(model: PretrainedModel) -> nn.Module:
    """The library's own network with its classifier of ImageNet's classes and random weights, on torch's current device.

    Raises:
        UsageError: there is no such network.
    """
    return _torchvision(model.name) if model.family == "torchvision" else _timm(model.name)


def _torchvision(name: str) -> nn.Module:
    from torchvision import models
    from torchvision.models import _api as registry

    names = registry.list_models(module=models)
    if name not in names:
        raise UsageError(_unknown(name, "torchvision", names))
    # Inception's own rescaling of pixels is left to the preprocessing; torchvision warns unless it is asked for its slow init
    options = {"transform_input": False, "init_weights": False} if name in _TRANSFORMED else {}
    network: nn.Module = registry.get_model(name, weights=None, **options)
    return network


def torchvision_weights(model: PretrainedModel) -> tuple[Any, bool]:
    """torchvision's entry of the weights that ``model`` asks for, else of its default ones, and whether these are the default
    ones; None if it has none.

    Raises:
        UsageError: there is no such version of them.
    """
    from torchvision.models import _api as registry

    try:
        known: Any = registry.get_model_weights(model.name).__members__
    except ValueError:
        known = {}
    default = known.get("DEFAULT")
    if model.weights not in VERSIONS:
        return default, True
    kinds = {version: f"IMAGENET1K_{version.removeprefix('imagenet-').upper()}" for version in VERSIONS}
    if kinds[model.weights] not in known:
        there = " and ".join(version for version, kind in kinds.items() if kind in known) or "none"
        raise UsageError(f"model.weights: torchvision has no {model.weights} of {model.name}; there is {there}")
    entry = known[kinds[model.weights]]
    return entry, entry is default


def _timm(name: str) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise UsageError(_unknown(name, "timm", timm.list_models()))
    try:
        timm.get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError:
        plain, _, tag = name.partition(".")
        known = [full for full in timm.list_models(pretrained=True) if full.partition(".")[0] == plain]
        there = ", ".join(known[:8]) or "none"
        raise UsageError(f"model.name: timm's {plain} has no weights {tag!r}; there are {there}") from None
    return timm.create_model(name, pretrained=False)


def _unknown(name: str, library: str, names: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, names, 3)
    return f"model.name: {library} has no {name!r}" + (f"; did you mean {' or '.join(close)}?" if close else "")


def backbone_of(network: nn.Module, model: PretrainedModel) -> nn.Module:
    """The part of a library's network that delivers its last maps; it shares the weights.

    Raises:
        UsageError: it is of a kind that has no such part.
    """
    if model.family == "timm":
        reset: Any = getattr(network, "reset_classifier", None)
        if reset is None:
            raise UsageError(f"model.name: timm's {model.name} has no classifier that could be replaced")
        try:
            reset(0, "")
        except (TypeError, AssertionError, ValueError):
            raise UsageError(f"model.name: timm's {model.name} delivers no maps; choose a convolutional one") from None
        return network
    features = getattr(network, "features", None)
    # VGG, DenseNet, MobileNet, EfficientNet, ConvNeXt, ...; those of Swin have their channels last
    if isinstance(features, nn.Module) and not type(network).__name__.startswith("Swin"):
        last = [nn.ReLU()] if type(network).__name__ == "DenseNet" else []
        return nn.Sequential(features, *last) if last else features
    if type(network).__name__ not in ("ResNet", "RegNet", "Inception3", "GoogLeNet", "ShuffleNetV2", "MNASNet"):
        raise UsageError(f"model.name: torchvision's {model.name} delivers no maps; use family: timm, which has many backbones")
    parts = [(name, part) for name, part in network.named_children() if name not in CLASSIFIERS]
    return nn.Sequential(OrderedDict(parts))


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean and spread of each channel, in 0..1, that weights were trained with."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def statistics(model: PretrainedModel) -> Statistics:
    """What pixels have subtracted and are divided by; nothing for ``zero_one``."""
    if model.preprocessing == "zero_one":
        return Statistics((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    if model.family == "torchvision":
        if model.name in _TRANSFORMED:  # what its transform_input makes of the usual statistics
            return Statistics(*HALF)
        library, _ = torchvision_weights(model)
        if library is None:
            return Statistics(*IMAGENET)
        usual: Any = library.transforms()
        return Statistics(tuple(usual.mean), tuple(usual.std))
    import timm

    entry = timm.get_pretrained_cfg(model.name, allow_unregistered=True)
    return Statistics(tuple(entry.mean), tuple(entry.std)) if entry is not None else Statistics(*IMAGENET)
