"""Running statistics of batch normalisation, computed anew for the weights as they are: ``training.batch_norm_images``.

While a network trains, they are averages over the last steps, of weights that were others. Here they are those of one pass over
training images, as ``torch.optim.swa_utils.update_bn`` makes them (Izmailov et al. 2018, "Averaging Weights Leads to Wider
Optima and Better Generalization"). Every rank goes through all of these images, so the number of ranks does not matter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..config.experiment import Experiment
from ..data import draws
from ..errors import UsageError
from ..models.batch_norm import BatchNorm
from .setup import Prepared

Statistics = dict[str, Tensor]
"""Running means and variances, by the names of their buffers."""

MOST = 1000  # images of a batch, as in a validation


def images_of(experiment: Experiment, prepared: Prepared) -> tuple[npt.NDArray[np.int64], int]:
    """Indices (n,) of the training images that are gone through, and the size of a batch, of which n is a multiple.

    They are the first ones of the first epoch's order, and in that order.
    """
    order = draws.order(experiment.seed, 0, prepared.train_indices)
    count = min(experiment.training.batch_norm_images or 0, len(order))
    data = experiment.data
    size = min(count, max(2, min(data.batch_size, data.micro_batch_size or MOST, MOST)))  # one value has no variance
    return order[: count - count % size], size


def layers_of(network: nn.Module) -> dict[str, nn.Module]:
    """The layers whose running statistics follow from the training, by name: those of frozen parts do not."""
    was_training = network.training
    network.train()
    kinds = (BatchNorm, nn.modules.batchnorm._BatchNorm)
    found = {name: module for name, module in network.named_modules() if isinstance(module, kinds) and module.training}
    network.train(was_training)
    return {name: module for name, module in found.items() if module.running_mean is not None}


def check(experiment: Experiment, network: nn.Module) -> None:
    """UsageError if the job file asks for statistics and the network has none that follow from the training."""
    if experiment.training.batch_norm_images is not None and not layers_of(network):
        raise UsageError(
            "training.batch_norm_images: the layers of this network that are trained keep no running statistics; leave it out"
        )


@torch.no_grad()
def computed(
    network: nn.Module, batches: Iterable[Tensor], inference: Callable[[], Any], progress: Callable[[], None] = lambda: None
) -> Statistics:
    """Means over ``batches`` of each layer's mean and unbiased variance; the network itself stays as it is.

    The layers normalise by the statistics of the batch meanwhile, all else is in evaluation mode. Nothing is communicated.

    Args:
        batches: images (n, channels, height, width), of one size.
        inference: a context for a forward pass, such as autocast.
        progress: called after every batch.
    """
    layers = layers_of(network)
    with _as_before(network, layers):
        network.eval()
        for layer in layers.values():
            layer.training = True  # not train(), which is for what a library's layer has in it as well, such as dropout
            layer.get_buffer("running_mean").zero_()
            layer.get_buffer("running_var").fill_(1)
        for number, images in enumerate(batches, 1):
            for layer in layers.values():
                _count(layer, number)
            with inference():
                network(images)
            progress()
        names = [f"{name}.{kind}" for name in layers for kind in ("running_mean", "running_var")]
        return {name: network.get_buffer(name).clone() for name in names}


def _count(layer: Any, number: int) -> None:
    """Have batch ``number``, from 1, weigh as much as each before it."""
    if isinstance(layer, BatchNorm):
        layer.keep, layer.alone = 1 - 1 / number, True
    else:
        layer.momentum = 1 / number


@contextlib.contextmanager
def _as_before(network: nn.Module, layers: dict[str, nn.Module]) -> Iterator[None]:
    """After the block, modes, options and buffers of ``layers`` are those of before, in the same memory."""
    was_training = network.training
    options = ("keep", "alone", "momentum")
    own = [(layer, {name: getattr(layer, name) for name in options if hasattr(layer, name)}) for layer in layers.values()]
    buffers = [(buffer, buffer.clone()) for layer in layers.values() for buffer in layer.buffers()]
    try:
        yield
    finally:
        network.train(was_training)
        for layer, values in own:
            for name, value in values.items():
                setattr(layer, name, value)
        for buffer, value in buffers:
            buffer.copy_(value)


@torch.no_grad()
def put(network: nn.Module, values: Statistics) -> None:
    """Give the network these statistics."""
    for name, value in values.items():
        network.get_buffer(name).copy_(value)


@contextlib.contextmanager
def using(network: nn.Module, values: Statistics) -> Iterator[None]:
    """Within the block the network has these statistics; afterwards its own again, with which its training goes on."""
    own = {name: network.get_buffer(name).clone() for name in values}
    put(network, values)
    try:
        yield
    finally:
        put(network, own)
