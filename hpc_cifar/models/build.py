"""The one ``match`` over model families."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..config.layers import AnyLayer
from ..config.model import ModelConfig, PretrainedModel, SequentialModel
from . import sequential
from .batch_norm import BatchNorm


@dataclasses.dataclass(frozen=True)
class Rule:
    """What holds for one parameter and not for all.

    Attributes:
        l2: times the sum of its squares is added to the loss.
        max_norm: the largest length of its rows, which are a filter's or a unit's weights.
        lr_factor: on the rate of its updates.
        decay_factor: on its weight decay.
        epochs: over which its rate falls linearly to 0, where that is not by the schedule.
    """

    parameter: nn.Parameter
    l2: float = 0.0
    max_norm: float | None = None
    lr_factor: float = 1.0
    decay_factor: float = 1.0
    epochs: float | None = None


def build(
    model: ModelConfig, input_shape: tuple[int, int, int], joint_batch_norm: bool = False, classes: int = 10
) -> nn.Module:
    """The network of a job file, initialised from torch's current random state; (n, c, h, w) -> (n, classes) logits.

    Args:
        joint_batch_norm: BatchNorm takes its statistics over all ranks, not over each rank's own batch; not in a backbone.
        classes: for the usual head of a backbone; layers in the job file name their units.
    """
    match model:
        case SequentialModel():
            return sequential.build(model, input_shape, joint_batch_norm)
        case PretrainedModel():
            from . import pretrained  # torchvision and timm take seconds to import

            return pretrained.build(model, input_shape, classes)


def trained_parameters(model: ModelConfig, input_shape: tuple[int, int, int], classes: int) -> int:
    """How many numbers an optimizer changes; no memory is taken for them."""
    with torch.device("meta"):
        network = build(model, input_shape, classes=classes)
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def rules(model: ModelConfig, network: nn.Module, norm_bias_lr_factor: float = 1.0) -> list[Rule]:
    """The rules of the job file for single parameters of ``network``, which was built from it; one a parameter.

    Args:
        norm_bias_lr_factor: see :class:`hpc_cifar.config.optimization.AnyOptimizer`.
    """
    found = {id(rule.parameter): rule for rule in _rules_of_model(model, network)}
    if norm_bias_lr_factor != 1:
        for bias in _norm_biases(network):
            known = found.get(id(bias), Rule(bias))
            found[id(bias)] = dataclasses.replace(
                known, lr_factor=known.lr_factor * norm_bias_lr_factor, decay_factor=1 / norm_bias_lr_factor
            )
    return list(found.values())


def _norm_biases(network: nn.Module) -> Iterator[nn.Parameter]:
    kinds = (BatchNorm, nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    for module in network.modules():
        if isinstance(module, kinds) and isinstance(module.bias, nn.Parameter) and module.bias.requires_grad:
            yield module.bias


def _rules_of_model(model: ModelConfig, network: nn.Module) -> list[Rule]:
    match model:
        case SequentialModel():
            return list(_rules_of_layers(model.layers, network))
        case PretrainedModel():
            head = list(_rules_of_layers(model.head or (), network.get_submodule("head")))
            if model.backbone_lr_factor == 1:
                return head
            backbone = network.get_submodule("backbone").parameters()
            return [*head, *(Rule(p, lr_factor=model.backbone_lr_factor) for p in backbone if p.requires_grad)]


def _rules_of_layers(layers: Sequence[AnyLayer], network: nn.Module) -> Iterator[Rule]:
    for layer, module in sequential.weighted(layers, network):
        if layer.l2 or layer.max_norm is not None:
            yield Rule(module.get_parameter("weight"), layer.l2, layer.max_norm)
        if (factor := layer.bias_lr_factor) != 1 or layer.bias_epochs is not None:
            yield Rule(module.get_parameter("bias"), lr_factor=factor, decay_factor=1 / factor, epochs=layer.bias_epochs)


def initialise_from_images(model: ModelConfig, network: nn.Module, images: Callable[[], Tensor]) -> None:
    """Set the weights that the job file wants computed from training images, if there are any.

    Args:
        images: gives float32 (n, c, h, w), as the network gets them; only called where they are needed.
    """
    match model:
        case SequentialModel():
            if (first := sequential.whitening(model)) is not None:
                sequential.whiten(network, images(), first.whiten_eps)
        case PretrainedModel():
            pass
