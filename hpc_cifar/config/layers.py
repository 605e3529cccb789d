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


def _needs_a_bias(layer: Any) -> Any:
    if not layer.bias and (layer.bias_lr_factor != 1 or layer.bias_epochs is not None):
        raise ValueError("bias_lr_factor and bias_epochs need a bias")
    return layer


class Conv(Model):
    """2-d convolution."""

    type: Literal["conv"]
    filters: Size
    """Output channels."""
    kernel: Annotated[Size, Field(le=64)] = 3
    """Side of the kernel."""
    stride: Annotated[Size, Field(le=64)] = 1
    """Step of the kernel."""
    padding: Literal["same", "valid"] | Annotated[Whole, Field(ge=0, le=64)] = "same"
    """``same`` keeps height and width at stride 1 (the kernel must be odd), ``valid`` pads nothing; or pixels a side."""
    bias: Flag = True
    """Whether there is a bias."""
    bias_lr_factor: Positive = 1.0
    """On the rate of the bias; its weight decay is divided by it."""
    bias_epochs: Positive | None = None
    """The rate of the bias falls linearly to 0 over so many epochs, instead of by the schedule; then the bias stays."""
    l2: Penalty = 0.0
    """Times the sum of the squared weights, added to the loss as Keras' ``l2`` does; reported in ``val_loss_with_l2`` only."""
    max_norm: Positive | None = None
    """Largest length of a filter's weights, kept after every update (Srivastava et al. 2014)."""
    init: Literal["model", "whiten"] = "model"
    """``whiten`` (first layer only) begins with the main directions of the training images' patches, both signs of each."""
    whiten_eps: Positive = 1e-3
    """Added to the variance along each direction, by whose root ``whiten`` divides."""
    fixed_weights: Flag = False
    """The weights stay as they begin, and only the bias is trained."""

    @model_validator(mode="after")
    def _nothing_changes_fixed_weights(self) -> Conv:
        if self.fixed_weights and (self.l2 or self.max_norm is not None):
            raise ValueError("fixed_weights: l2 and max_norm are for weights that are trained")
        return self

    @model_validator(mode="after")
    def _eps_is_where_it_is_used(self) -> Conv:
        if self.init != "whiten" and self.whiten_eps != type(self).model_fields["whiten_eps"].default:
            raise ValueError("whiten_eps counts only with init: whiten")
        return self

    _bias = model_validator(mode="after")(_needs_a_bias)


class Dense(Model):
    """Fully connected layer on a flat input."""

    type: Literal["dense"]
    units: Size
    """Outputs."""
    bias: Flag = True
    """Whether there is a bias."""
    bias_lr_factor: Positive = 1.0
    """As for ``conv``."""
    bias_epochs: Positive | None = None
    """As for ``conv``."""
    l2: Penalty = 0.0
    """As for ``conv``."""
    max_norm: Positive | None = None
    """Largest length of a unit's weights, as for ``conv``."""

    _bias = model_validator(mode="after")(_needs_a_bias)


class BatchNorm(Model):
    """Batch normalisation."""

    type: Literal["batch_norm"]
    momentum: Small = 0.9
    """Share of the old running statistics that is kept (Keras). The running variance is the unbiased one of each batch."""
    eps: Small = 1e-5
    """Added to the variance."""
    scale: Flag = True
    """Whether it has a factor that is trained."""


class MaxPool(Model):
    """Largest value of each square; a rest at the edge is dropped."""

    type: Literal["max_pool"]
    size: Annotated[Size, Field(le=64)] = 2
    """Side of the square."""


class AvgPool(Model):
    """Mean of each square; a rest at the edge is dropped."""

    type: Literal["avg_pool"]
    size: Annotated[Size, Field(le=64)] = 2
    """Side of the square."""


class GlobalMaxPool(Model):
    """(channels, height, width) to (channels,)."""

    type: Literal["global_max_pool"]


class GlobalAvgPool(Model):
    """(channels, height, width) to (channels,)."""

    type: Literal["global_avg_pool"]


class Dropout(Model):
    """Zeroes some values in training."""

    type: Literal["dropout"]
    rate: Rate
    """Share of the values."""


class DropBlock(Model):
    """Zeroes squares of values in training and scales the rest up (Ghiasi et al. 2018)."""

    type: Literal["drop_block"]
    rate: Rate
    """Share of the values."""
    size: Annotated[Size, Field(le=63)] = 3
    """Side of a square, odd."""

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
    """See there."""
    beta: Real = 1.0
    """See there."""
    gamma: Real = 0.5
    """See there."""


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
    """The sum of what two lists of layers make of the same input (He et al. 2016). Blocks do not contain blocks."""

    type: Literal["residual"]
    layers: Annotated[tuple[InnerLayer, ...], Field(min_length=1, max_length=100)]
    """The first list."""
    shortcut: Annotated[tuple[InnerLayer, ...], Field(max_length=100)] = ()
    """The second one; the input itself is added without it."""


AnyLayer = PlainLayer | Residual
Layer = Annotated[Annotated[AnyLayer, Field(discriminator="type")], BeforeValidator(_spell_out)]

LAYER_NAMES: tuple[str, ...] = tuple(get_args(cls.model_fields["type"].annotation)[0] for cls in get_args(AnyLayer))


def all_layers(layers: Iterable[AnyLayer]) -> Iterator[AnyLayer]:
    """Every layer, and after a block those in it."""
    for layer in layers:
        yield layer
        if isinstance(layer, Residual):
            yield from all_layers((*layer.layers, *layer.shortcut))
