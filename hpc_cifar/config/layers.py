"""The layers a sequential network is written in; ``shapes.py`` counts them, ``models/sequential.py`` builds them.

In YAML a layer without options is its name (``- relu``); one with options is a one-key mapping
(``- conv: {filters: 32, kernel: 3, padding: same}``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from .fields import Flag, Model, Positive, Real, Whole
from .fields import Share as Rate

Size = Annotated[Whole, Field(ge=1, le=1 << 20)]
Small = Annotated[Real, Field(gt=0, lt=1)]
Penalty = Annotated[Real, Field(ge=0)]


class Conv(Model):
    """2-d convolution; ``padding: same`` keeps height and width at stride 1 (kernel must be odd), ``valid`` pads nothing.

    ``l2`` times the sum of the squared weights is added to the loss, as Keras' ``kernel_regularizer=l2(...)``; reported losses
    are without it. ``max_norm`` is the largest length of a filter's weights, kept after every update (Srivastava et al. 2014).
    ``init: whiten`` (first layer only) begins with the main directions of the training images' patches, both signs of each.
    With ``fixed_weights`` the weights stay as they begin and only the bias is trained.
    """

    type: Literal["conv"]
    filters: Size
    kernel: Annotated[Size, Field(le=64)] = 3
    stride: Annotated[Size, Field(le=64)] = 1
    padding: Literal["same", "valid"] | Annotated[Whole, Field(ge=0, le=64)] = "same"
    bias: Flag = True
    l2: Penalty = 0.0
    max_norm: Positive | None = None
    init: Literal["model", "whiten"] = "model"
    fixed_weights: Flag = False

    @model_validator(mode="after")
    def _nothing_changes_fixed_weights(self) -> Conv:
        if self.fixed_weights and (self.l2 or self.max_norm is not None):
            raise ValueError("fixed_weights: l2 and max_norm are for weights that are trained")
        return self


class Dense(Model):
    """Fully connected layer on a flat input; ``l2`` and ``max_norm`` (of each unit's weights) as for ``conv``."""

    type: Literal["dense"]
    units: Size
    bias: Flag = True
    l2: Penalty = 0.0
    max_norm: Positive | None = None


class BatchNorm(Model):
    """Batch normalisation; ``momentum`` is the share of the old running statistics (Keras) that is kept. Without ``scale`` its
    factor stays 1.
    """

    type: Literal["batch_norm"]
    momentum: Small = 0.9
    eps: Small = 1e-5
    scale: Flag = True


class MaxPool(Model):
    """Largest value of each ``size`` x ``size`` square; a rest at the edge is dropped."""

    type: Literal["max_pool"]
    size: Annotated[Size, Field(le=64)] = 2


class AvgPool(Model):
    """Mean of each ``size`` x ``size`` square; a rest at the edge is dropped."""

    type: Literal["avg_pool"]
    size: Annotated[Size, Field(le=64)] = 2


class GlobalMaxPool(Model):
    """(channels, height, width) to (channels,)."""

    type: Literal["global_max_pool"]


class GlobalAvgPool(Model):
    """(channels, height, width) to (channels,)."""

    type: Literal["global_avg_pool"]


class Dropout(Model):
    """Zeroes a share ``rate`` of the values in training."""

    type: Literal["dropout"]
    rate: Rate


class DropBlock(Model):
    """Zeroes squares of ``size`` x ``size`` values (odd) in training, a share ``rate`` of all, and scales the rest up
    (Ghiasi et al. 2018).
    """

    type: Literal["drop_block"]
    rate: Rate
    size: Annotated[Size, Field(le=63)] = 3

    @field_validator("size")
    @classmethod
    def _has_a_middle(cls, size: int) -> int:
        if size % 2 == 0:
            raise ValueError(f"should be odd, not {size}")
        return size


class Flatten(Model):
    """(channels, height, width) to one row of values."""

    type: Literal["flatten"]


class ReLU(Model):
    """max(x, 0)."""

    type: Literal["relu"]


class GELU(Model):
    """x times the normal distribution function of x."""

    type: Literal["gelu"]


class SiLU(Model):
    """x times the sigmoid of x."""

    type: Literal["silu"]


class Tanh(Model):
    """Hyperbolic tangent."""

    type: Literal["tanh"]


class APTx(Model):
    """(alpha + tanh(beta x)) gamma x (Kumar 2022)."""

    type: Literal["aptx"]
    alpha: Real = 1.0
    beta: Real = 1.0
    gamma: Real = 0.5


PlainLayer = (
    Conv
    | Dense
    | BatchNorm
    | MaxPool
    | AvgPool
    | GlobalMaxPool
    | GlobalAvgPool
    | Dropout
    | DropBlock
    | Flatten
    | ReLU
    | GELU
    | SiLU
    | Tanh
    | APTx
)


def _spell_out(value: Any) -> Any:
    """``relu`` and ``{conv: {...}}`` become ``{type: ..., ...}``; anything else is left for pydantic to judge."""
    if isinstance(value, str):
        return {"type": value}
    if isinstance(value, dict) and "type" not in value and len(value) == 1:
        ((name, options),) = value.items()
        if options is None:
            return {"type": name}
        if isinstance(options, dict) and "type" not in options:
            return {"type": name, **options}
    return value


InnerLayer = Annotated[Annotated[PlainLayer, Field(discriminator="type")], BeforeValidator(_spell_out)]


class Residual(Model):
    """The sum of what ``layers`` and ``shortcut`` make of the same input (He et al. 2016). Without a shortcut the input itself
    is added. Blocks do not contain blocks.
    """

    type: Literal["residual"]
    layers: Annotated[tuple[InnerLayer, ...], Field(min_length=1, max_length=100)]
    shortcut: Annotated[tuple[InnerLayer, ...], Field(max_length=100)] = ()


AnyLayer = PlainLayer | Residual
Layer = Annotated[Annotated[AnyLayer, Field(discriminator="type")], BeforeValidator(_spell_out)]

LAYER_NAMES: tuple[str, ...] = tuple(get_args(cls.model_fields["type"].annotation)[0] for cls in get_args(AnyLayer))


def all_layers(layers: Iterable[AnyLayer]) -> Iterator[AnyLayer]:
    """Every layer, and after a block those in it."""
    for layer in layers:
        yield layer
        if isinstance(layer, Residual):
            yield from all_layers((*layer.layers, *layer.shortcut))
