"""The one ``match`` over model families."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from ..config.experiment import ModelConfig, SequentialModel
from . import sequential


def build(model: ModelConfig, input_shape: tuple[int, int, int], group: dist.ProcessGroup | None = None) -> nn.Module:
    """The network of a job file, initialised from torch's current random state; (n, c, h, w) -> (n, classes) logits.

    Args:
        group: process group for BatchNorm statistics over all ranks, or None for local ones.
    """
    match model:
        case SequentialModel():
            return sequential.build(model, input_shape, group)
