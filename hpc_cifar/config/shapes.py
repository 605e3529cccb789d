"""Layer shapes and parameter counts of a sequential network, by arithmetic and without torch.

``validate`` uses it to find a layer that does not fit in milliseconds, ``models/sequential.py`` to size its modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from ..errors import UsageError
from .layers import (
    GELU,
    AnyLayer,
    APTx,
    AvgPool,
    BatchNorm,
    Conv,
    Dense,
    DropBlock,
    Dropout,
    Flatten,
    GlobalAvgPool,
    GlobalMaxPool,
    Layer,
    MaxPool,
    ReLU,
    Residual,
    SiLU,
    Tanh,
    all_layers,
)
from .model import ModelConfig, PretrainedModel, SequentialModel

Shape = tuple[int, ...]

CIFAR_INPUT: Shape = (3, 32, 32)


@dataclass(frozen=True)
class LayerShape:
    """One layer of the network; shapes are without the batch, (channels, height, width) or (features,)."""

    index: int
    type: str
    in_shape: Shape
    out_shape: Shape
    parameters: int  # trainable: BatchNorm counts 2 a channel (Keras' summaries count 4, with the running statistics)
    buffers: int = 0  # not trained but saved: BatchNorm's running mean and variance, fixed weights


class ShapeError(ValueError):
    """A layer does not fit what the layer before it delivers; ``field`` is the list that it stands in, layers or head."""

    def __init__(self, index: int, message: str, field: str = "layers") -> None:
        self.index = index
        self.message = message
        self.field = field
        super().__init__(f"model.{field}[{index}]: {message}")


def layer_shapes(model: SequentialModel, input: Shape = CIFAR_INPUT, classes: int | None = None) -> list[LayerShape]:
    """Shapes and counts of every layer, in order.

    Args:
        input: shape of one image, (channels, height, width).
        classes: if given, the last layer must deliver exactly that many values.

    Raises:
        ShapeError: a layer does not fit, or the output is not one row of scores.
    """
    for index, layer in enumerate(model.layers):
        if any(part is not model.layers[0] for part in _whitening(layer)):
            raise ShapeError(index, "conv with init: whiten belongs at the beginning: it is computed from the training images")
    rows = chain(model.layers, input)
    shape = rows[-1].out_shape
    last = len(rows) - 1
    if len(shape) != 1:
        raise ShapeError(
            last,
            f"{rows[last].type} is the last layer and delivers {text_of(shape)}, but a network ends in one score a class; "
            f"end with flatten (or global_avg_pool) and dense: {{units: {classes or 10}}}",
        )
    _one_head(model, rows, shape)
    if classes is not None and shape != (classes,):
        raise ShapeError(
            last,
            f"{rows[last].type} is the last layer and delivers {text_of(shape)}, but there are {classes} classes; "
            f"end with dense: {{units: {classes}}}",
        )
    if not parameter_count(rows):
        raise ShapeError(last, f"{rows[last].type} is the last layer, and none has a weight: there is nothing to train")
    return rows


def chain(layers: Sequence[AnyLayer], shape: Shape) -> list[LayerShape]:
    """Shapes and counts of ``layers`` one after the other.

    Args:
        shape: of what goes into the first one.

    Raises:
        ShapeError: a layer does not fit.
    """
    rows: list[LayerShape] = []
    for index, layer in enumerate(layers):
        try:
            out, parameters, buffers = _apply(layer, shape)
        except ValueError as error:
            raise ShapeError(index, f"{layer.type} {error}") from None
        rows.append(LayerShape(index, layer.type, shape, out, parameters, buffers))
        shape = out
    return rows


def _whitening(layer: AnyLayer) -> list[AnyLayer]:
    """The convolutions of a layer or block that begin with directions of the training images."""
    return [part for part in all_layers([layer]) if isinstance(part, Conv) and part.init == "whiten"]


ANY_MAPS: Shape = (64, 64, 64)
"""For the head of a backbone, whose maps are known when torch has built it."""


def head_layers(model: PretrainedModel, classes: int) -> tuple[Layer, ...]:
    """The head of the job file, or the usual one."""
    return model.head or (GlobalAvgPool(type="global_avg_pool"), Dense(type="dense", units=classes))


def check_layers(model: ModelConfig, input: Shape = CIFAR_INPUT, classes: int | None = None) -> None:
    """Find a layer that does not fit, of a sequential network or of a backbone's head.

    Raises:
        ShapeError: with the list that it stands in.
    """
    if isinstance(model, SequentialModel):
        layer_shapes(model, input, classes)
        return
    if model.head is None:
        return
    last = len(model.head) - 1
    for index, layer in enumerate(model.head):
        if any(_whitening(layer)):
            raise ShapeError(index, "conv with init: whiten takes images, and a head takes the backbone's maps", "head")
    if not isinstance(model.head[last], Dense):
        raise ShapeError(last, f"{model.head[last].type} is the last layer; end with dense: {{units: {classes or 10}}}", "head")
    try:
        layer_shapes(SequentialModel(family="sequential", layers=model.head), ANY_MAPS, classes)
    except ShapeError as error:
        raise ShapeError(error.index, error.message, "head") from None


def _one_head(model: SequentialModel, rows: list[LayerShape], shape: Shape) -> None:
    """A dense layer right after one of as many units is a second head, which somebody forgot to remove."""
    dense = [index for index, layer in enumerate(model.layers) if isinstance(layer, Dense)]
    if len(dense) > 1 and dense[-1] == dense[-2] + 1 and rows[dense[-1]].in_shape == shape:
        raise ShapeError(dense[-1], f"dense is a second head: layer {dense[-2]} gives one score a class already; remove one")


def check_fits(model: ModelConfig, image: Shape, classes: int, dataset: str) -> None:
    """Refuse a network that cannot take a prepared dataset's images, (channels, height, width), or name its classes.

    Raises:
        UsageError: the layer, and what does not fit.
    """
    try:
        check_layers(model, image, classes)
    except ShapeError as error:
        raise UsageError(f"{error} (dataset {dataset!r}: {classes} classes, images of {text_of(image)})") from None


def parameter_count(rows: list[LayerShape]) -> int:
    """Trainable parameters of the whole network."""
    return sum(row.parameters for row in rows)


def text_of(shape: Shape) -> str:
    """``32x16x16`` for an image-like shape, ``128 values`` for a flat one."""
    return "x".join(map(str, shape)) if len(shape) != 1 else f"{shape[0]:,} values"


def _apply(layer: AnyLayer, shape: Shape) -> tuple[Shape, int, int]:
    """Output shape, trainable parameters and buffers of one layer; ValueError says why it does not fit."""
    match layer:
        case Conv():
            channels, height, width = _image(shape)
            out = (layer.filters, _conv_size(layer, height), _conv_size(layer, width))
            if min(out) < 1:
                raise ValueError(
                    f"with a {layer.kernel}x{layer.kernel} kernel does not fit its input of {text_of(shape)}; "
                    "use a smaller kernel or more padding"
                )
            weights = layer.kernel * layer.kernel * channels * layer.filters
            bias = layer.filters if layer.bias else 0
            if layer.init == "whiten" and (layer.filters % 2 or layer.filters > 2 * layer.kernel**2 * channels):
                most = 2 * layer.kernel**2 * channels
                raise ValueError(
                    f"with init: whiten needs an even number of filters, at most {most} (both signs of each of the "
                    f"{most // 2} directions of its input), not {layer.filters}"
                )
            return (out, bias, weights) if layer.fixed_weights else (out, weights + bias, 0)
        case Dense():
            if len(shape) != 1:
                raise ValueError(f"needs a flat input, but gets {text_of(shape)}; put flatten or global_avg_pool before it")
            return (layer.units,), shape[0] * layer.units + (layer.units if layer.bias else 0), 0
        case BatchNorm():
            return (shape, 2 * shape[0], 2 * shape[0]) if layer.scale else (shape, shape[0], 3 * shape[0])
        case MaxPool() | AvgPool():
            channels, height, width = _image(shape)
            if layer.size > min(height, width):
                raise ValueError(
                    f"of size {layer.size} is larger than its input of {text_of(shape)}; remove it or use a smaller size"
                )
            return (channels, height // layer.size, width // layer.size), 0, 0
        case GlobalMaxPool() | GlobalAvgPool():
            return (_image(shape)[0],), 0, 0
        case Flatten():
            return (prod(shape),), 0, 0
        case DropBlock():
            if layer.size > min(_image(shape)[1:]):
                raise ValueError(f"of size {layer.size} is larger than its input of {text_of(shape)}; use a smaller size")
            return shape, 0, 0
        case Dropout() | ReLU() | GELU() | SiLU() | Tanh() | APTx():
            return shape, 0, 0
        case Residual():
            return _sum(layer, shape)


def _sum(block: Residual, shape: Shape) -> tuple[Shape, int, int]:
    """As :func:`_apply`, of a block."""
    both = []
    for field, layers in (("layers", block.layers), ("shortcut", block.shortcut)):
        try:
            both.append(chain(layers, shape))
        except ShapeError as error:
            raise ValueError(f"{field}[{error.index}]: {error.message}") from None
    out, around = (rows[-1].out_shape if rows else shape for rows in both)
    if out != around:
        way = "its shortcut delivers" if block.shortcut else "it has no shortcut, so the input is added, which is"
        raise ValueError(
            f"cannot add its layers' {text_of(out)}: {way} {text_of(around)}; a shortcut such as "
            f"[conv: {{filters: {out[0]}, kernel: 1, stride: 2, bias: false}}] brings both to one shape"
        )
    rows = [*both[0], *both[1]]
    return out, parameter_count(rows), sum(row.buffers for row in rows)


def _image(shape: Shape) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise ValueError(
            f"needs an input of channels x height x width, but gets {text_of(shape)}; move it before flatten or the global pool"
        )
    return shape[0], shape[1], shape[2]


def _conv_size(layer: Conv, size: int) -> int:
    """Height or width after a convolution."""
    if layer.padding == "same":
        if layer.kernel % 2 == 0:
            raise ValueError(f"with padding: same needs an odd kernel, not {layer.kernel}; use an odd one or padding: valid")
        padding = layer.kernel // 2
    elif layer.padding == "valid":
        padding = 0
    else:
        padding = layer.padding
    return (size + 2 * padding - layer.kernel) // layer.stride + 1
