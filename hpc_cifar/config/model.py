"""Model families of the experiment file: a list of layers, or a backbone of a library with a head of layers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from .fields import Flag, Model, Positive, Whole, matching
from .layers import Layer

Layers = Annotated[tuple[Layer, ...], Field(min_length=1, max_length=1000)]
VERSIONS = ("imagenet-v1", "imagenet-v2")
"""Values of ``weights`` that name one of torchvision's, where ``imagenet`` is its newest."""
Init = Literal["torch", "glorot_uniform", "he_normal", "dirac"]

_name = matching(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", "a model's name in the library, such as vgg16 or resnet50")
_part = matching(r"frozen|all|last[1-9][0-9]{0,3}", "frozen, all, or such as last4: the last four layers")


class SequentialModel(Model):
    """A network written as a list of layers."""

    family: Literal["sequential"]
    layers: Layers
    """Layers, applied in order to a (channels, height, width) input. The last one has a value a class."""
    init: Init = "torch"
    """First weights: torch's own; Glorot or He, with biases 0; torch's own with convolutions that pass channels through."""
    logit_scale: Positive = 1.0
    """Factor on the outputs."""


class PretrainedModel(Model):
    """A backbone of torchvision or timm without its own classifier, and a head of layers."""

    family: Literal["torchvision", "timm"]
    name: Annotated[str, AfterValidator(_name)]
    """The library's name of it, such as ``vgg16``."""
    weights: str | None = "imagenet"
    """``imagenet``: the library's; its older or newer ones: ``imagenet-v1``, ``imagenet-v2``; a file; null: begin at random."""
    train: Annotated[str, AfterValidator(_part)] = "frozen"
    """Layers of the backbone that are trained beside the head: ``frozen`` (none), ``all``, or such as ``last4``."""
    resize: Annotated[Whole, Field(ge=8, le=1024)] | None = None
    """Side in pixels to which images are enlarged, on the device."""
    preprocessing: Literal["weights", "zero_one"] = "weights"
    """Mean and spread that the weights were trained with, or pixels from 0 to 1; ``data.normalize`` does not count."""
    head: Layers | None = None
    """Layers on the backbone's maps; without it global average pooling and one dense layer."""
    init: Init = "torch"
    """First weights of the head, as for ``sequential``."""
    backbone_lr_factor: Annotated[Positive, Field(le=1)] = 1.0
    """On the rate of the backbone's layers."""
    batch_norm: Literal["auto", "frozen"] = "auto"
    """``frozen`` keeps the backbone's running statistics; ``auto`` does so in layers that are not trained."""
    cache_features: Literal["auto"] | Flag = "auto"
    """Compute the maps of a frozen backbone once; ``auto``: where nothing is augmented."""

    @model_validator(mode="after")
    def _versions_are_torchvision_s(self) -> PretrainedModel:
        if self.weights in VERSIONS and self.family == "timm":
            raise ValueError(f"weights: {self.weights} is torchvision's; timm has them in the name, such as resnet50.tv_in1k")
        return self

    @model_validator(mode="after")
    def _random_weights_are_trained(self) -> PretrainedModel:
        if self.cache_features is True and self.train != "frozen":
            raise ValueError(f"cache_features: true needs train: frozen, not {self.train}, whose features change")
        if self.batch_norm == "frozen" and self.weights is None and self.train != "frozen":
            raise ValueError("batch_norm: frozen keeps the statistics of weights, and weights is null")
        return self

    @property
    def last(self) -> int | None:
        """How many layers of the backbone are trained; None means all of them."""
        if self.train == "all":
            return None
        return 0 if self.train == "frozen" else int(self.train.removeprefix("last"))


ModelConfig = Annotated[SequentialModel | PretrainedModel, Field(discriminator="family")]
