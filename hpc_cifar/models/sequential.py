"""The sequential family: a list of layers from the job file becomes an ``nn.Sequential``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..config import layers as spec
from ..config.model import SequentialModel
from ..config.shapes import chain
from .batch_norm import BatchNorm


class Scale(nn.Module):
    """Multiply by a constant (temperature on the logits)."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class APTx(nn.Module):
    """(alpha + tanh(beta x)) gamma x (Kumar 2022)."""

    def __init__(self, alpha: float, beta: float, gamma: float) -> None:
        super().__init__()
        self.alpha, self.beta, self.gamma = alpha, beta, gamma

    def forward(self, x: Tensor) -> Tensor:
        return (self.alpha + torch.tanh(self.beta * x)) * (self.gamma * x)


class Residual(nn.Module):
    """The sum of two ways through the network."""

    def __init__(self, body: nn.Sequential, shortcut: nn.Sequential) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.body(x) + self.shortcut(x)
        return total


def build(model: SequentialModel, input_shape: tuple[int, int, int], joint_batch_norm: bool = False) -> nn.Sequential:
    """Build the network and initialise it from torch's current random state.

    Args:
        model: layers and initialisation.
        input_shape: (channels, height, width) of one image.
        joint_batch_norm: BatchNorm takes its statistics over all ranks, not over each rank's own batch.

    Returns:
        A module that maps (n, channels, height, width) to (n, classes).
    """
    modules = _modules(model.layers, input_shape, joint_batch_norm)
    if model.logit_scale != 1.0:
        modules.append(Scale(model.logit_scale))
    network = nn.Sequential(*modules)
    _initialise(network, model.init)
    return network


def _modules(layers: Sequence[spec.AnyLayer], shape: tuple[int, ...], joint_batch_norm: bool) -> list[nn.Module]:
    rows = chain(layers, shape)
    return [_module(layer, row.in_shape, joint_batch_norm) for layer, row in zip(layers, rows, strict=True)]


def _module(layer: spec.AnyLayer, shape: tuple[int, ...], joint_batch_norm: bool) -> nn.Module:
    """The module of one layer, given the shape it takes in; shapes were checked when the file was read."""
    match layer:
        case spec.Conv():
            padding = {"same": layer.kernel // 2, "valid": 0}.get(str(layer.padding), layer.padding)
            conv = nn.Conv2d(shape[0], layer.filters, layer.kernel, layer.stride, int(padding), bias=layer.bias)
            conv.weight.requires_grad_(not layer.fixed_weights)
            return conv
        case spec.Dense():
            return nn.Linear(shape[0], layer.units, bias=layer.bias)
        case spec.BatchNorm():
            norm = BatchNorm(shape[0], layer.momentum, layer.eps, joint_batch_norm)
            norm.weight.requires_grad_(layer.scale)
            return norm
        case spec.MaxPool():
            return nn.MaxPool2d(layer.size)
        case spec.AvgPool():
            return nn.AvgPool2d(layer.size)
        case spec.GlobalMaxPool():
            return nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
        case spec.GlobalAvgPool():
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        case spec.Dropout():
            return nn.Dropout(layer.rate)
        case spec.DropBlock():
            from torchvision.ops import DropBlock2d  # torchvision takes a while to import

            return DropBlock2d(layer.rate, layer.size)
        case spec.Flatten():
            return nn.Flatten()
        case spec.ReLU():
            return nn.ReLU()
        case spec.GELU():
            return nn.GELU()
        case spec.SiLU():
            return nn.SiLU()
        case spec.Tanh():
            return nn.Tanh()
        case spec.APTx():
            return APTx(layer.alpha, layer.beta, layer.gamma)
        case spec.Residual():
            both = (nn.Sequential(*_modules(part, shape, joint_batch_norm)) for part in (layer.layers, layer.shortcut))
            return Residual(*both)


@torch.no_grad()
def _initialise(network: nn.Sequential, init: str) -> None:
    """Set the weights by one of the named rules.

    ``torch`` keeps torch's own. ``glorot_uniform`` (Glorot & Bengio 2010) and ``he_normal`` (He et al. 2015) also set biases
    to 0, as Keras does. ``dirac`` keeps torch's own, but the first filters of every convolution but the first pass their input
    channels through unchanged, which shortens short trainings (Jordan 2024).
    """
    if init == "torch":
        return
    if init == "dirac":
        for conv in [module for module in network.modules() if isinstance(module, nn.Conv2d)][1:]:
            nn.init.dirac_(conv.weight[: conv.in_channels])
        return
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if init == "glorot_uniform":
                nn.init.xavier_uniform_(module.weight)
            else:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def weighted(layers: Sequence[spec.AnyLayer], network: nn.Module) -> Iterator[tuple[spec.Conv | spec.Dense, nn.Module]]:
    """The layers that have weights, and their modules."""
    for layer, module in zip(layers, network.children(), strict=False):  # a scale may follow
        if isinstance(layer, spec.Conv | spec.Dense):
            yield layer, module
        if isinstance(layer, spec.Residual):
            yield from weighted(layer.layers, module.get_submodule("body"))
            yield from weighted(layer.shortcut, module.get_submodule("shortcut"))


def whitening(model: SequentialModel) -> spec.Conv | None:
    """The first layer, if it begins with directions of the training images."""
    first = model.layers[0]
    return first if isinstance(first, spec.Conv) and first.init == "whiten" else None


@torch.no_grad()
def whiten(network: nn.Module, images: Tensor, eps: float) -> None:
    """Give the first convolution the main directions of its input patches, each divided by its standard deviation.

    The first half of its filters are eigenvectors of the covariance of all patches of ``images``, largest eigenvalue first; the
    second half are the same with the other sign (Page 2019; Jordan 2024). Its bias becomes 0.

    Args:
        images: float32 (n, c, h, w).
        eps: added to the eigenvalues.
    """
    conv = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    patches = nn.functional.unfold(images.double(), conv.kernel_size).transpose(1, 2).flatten(0, 1)  # (patches, c * k * k)
    covariance = patches.T @ patches / len(patches)
    values, vectors = torch.linalg.eigh(covariance)
    half = conv.out_channels // 2
    # a direction has no sign of its own: its largest entry is positive, on every machine
    vectors = vectors * torch.sign(vectors.gather(0, vectors.abs().argmax(0, keepdim=True)))
    scaled = (vectors / (values + eps).sqrt()).T.flip(0)[:half].reshape(half, *conv.weight.shape[1:])
    conv.weight.copy_(torch.cat([scaled, -scaled]))
    if conv.bias is not None:
        conv.bias.zero_()
