"""The one ``match`` over model families."""

from __future__ import annotations

from torch import nn

from ..config.experiment import ModelConfig, SequentialModel
from . import sequential


def build(model: ModelConfig, input_shape: tuple[int, int, int], joint_batch_norm: bool = False) -> nn.Module:
    """The network of a job file, initialised from torch's current random state; (n, c, h, w) -> (n, classes) logits.

    Args:
        joint_batch_norm: BatchNorm takes its statistics over all ranks, not over each rank's own batch.
    """
    match model:
        case SequentialModel():
            return sequential.build(model, input_shape, joint_batch_norm)
