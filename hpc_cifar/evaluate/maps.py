"""What a network sees: the kernels of its first convolution, and the maps of every convolution and pool for one image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Floats = npt.NDArray[np.float32]
SHOWN = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
MOST = 256  # channels of a layer


def first_kernels(network: nn.Module) -> Floats | None:
    """(filters, h, w, 3) of the first convolution, if it takes colours; (filters, h, w) means over its inputs if not."""
    conv = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if conv is None:
        return None
    weight: Floats = conv.weight.detach().float().cpu().numpy()[:MOST]
    return weight.transpose(0, 2, 3, 1) if weight.shape[1] == 3 else weight.mean(1)


@torch.no_grad()
def feature_maps(network: nn.Module, image: Tensor) -> list[tuple[str, Floats]]:
    """Name and (channels, h, w) maps of every convolution and pool, in the order in which ``image`` (1, c, h, w) passes them.

    At most 256 channels of a layer; maps of one pixel are left out.
    """
    seen: list[tuple[str, Floats]] = []

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if output.shape[2] > 1:
                seen.append((f"{name} ({type(module).__name__})", output[0].float().cpu().numpy()[:MOST]))

        return hook

    handles = [
        module.register_forward_hook(keep(name.removeprefix("backbone.")))
        for name, module in network.named_modules()
        if isinstance(module, SHOWN)
    ]
    try:
        network(image)
    finally:
        for handle in handles:
            handle.remove()
    return seen
