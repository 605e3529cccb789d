"""Model families of the experiment file: a list of layers, or a backbone of a library with a head of layers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from .fields import Flag, Model, Positive, Whole, matching
from .layers import Layer

Layers = Annotated[tuple[Layer, ...], Field(min_length=1, max_length=1000)]
Init = Literal["torch", "glorot_uniform", "he_normal", "dirac"]

_name = matching(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", "a model's name in the library, such as vgg16 or resnet50")
_part = matching(r"frozen|all|last[1-9][0-9]{0,3}", "frozen, all, or such as last4: the last four layers")


class SequentialModel(Model):
    """A network written as a list of layers, applied in order to a (channels, height, width) input."""

    family: Literal["sequential"]
    layers: Layers
    init: Init = "torch"
    logit_scale: Positive = 1.0


class PretrainedModel(Model):
    """A backbone of torchvision or timm without its own classifier, and a head of layers.

    Attributes:
        weights: ``imagenet`` are the library's, fetched by ``hpc-cifar prepare --weights`` or found in its own cache; else a
            file; null begins at random.
        train: which layers of the backbone are trained besides the head. Convolutions, dense layers, normalisations and pools
            count, in the order in which the library defines them, so that ``last4`` of VGG16 is Keras' ``layers[-4:]``.
        resize: side in pixels to which images are enlarged on the device.
        preprocessing: ``weights`` gives pixels the mean and spread that the weights were trained with, ``zero_one`` leaves
            them in 0..1; ``data.normalize`` does not count here.
        head: layers on the backbone's maps; global average pooling and one dense layer unless it says else.
        backbone_lr_factor: on the rate of the backbone's layers.
        batch_norm: ``frozen`` keeps the backbone's running statistics; ``auto`` does so in layers that are not trained.
        cache_features: the maps of a frozen backbone are computed once where nothing is augmented.
    """

    family: Literal["torchvision", "timm"]
    name: Annotated[str, AfterValidator(_name)]
    weights: str | None = "imagenet"
    train: Annotated[str, AfterValidator(_part)] = "frozen"
    resize: Annotated[Whole, Field(ge=8, le=1024)] | None = None
    preprocessing: Literal["weights", "zero_one"] = "weights"
    head: Layers | None = None
    init: Init = "torch"
    backbone_lr_factor: Annotated[Positive, Field(le=1)] = 1.0
    batch_norm: Literal["auto", "frozen"] = "auto"
    cache_features: Literal["auto"] | Flag = "auto"

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
