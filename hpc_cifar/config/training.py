"""How a step is computed, and what is kept of a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .fields import Count, Flag, Model, Positive, Real, Share
from .optimization import EarlyStopping


class Loss(Model):
    """Cross entropy, with label smoothing if wanted."""

    label_smoothing: Share = 0.0


class Training(Model):
    """How a step is computed.

    ``precision: auto`` is bf16 autocast on a GPU that has it, else float32; ``float64`` is slow, and tells rounding noise from
    a real difference between two runs. ``batch_norm: global`` takes the statistics over the batches of all ranks.
    ``gradient_sync: flat`` is one all-reduce in a fixed order (reproducible at any world size); ``ddp`` is torch's
    DistributedDataParallel with overlapping buckets; ``auto`` is flat below 4 million parameters.
    ``gradient_compression: bf16`` sends half as many bytes, for large networks on slow links; the ranks still add to float32
    weights. ``compile`` is torch.compile; ``graph`` replays the step as one CUDA graph, on a CPU as its eager twin: each shape
    of a batch from its fourth step on, and with flat gradients. ``auto`` is off in both.

    ``test_time_augmentation`` has the test set looked at in shifted and mirrored views, too: ``tta_accuracy`` stands beside
    ``test_accuracy``, as ``evaluate --tta`` shows it.
    """

    precision: Literal["auto", "float32", "bf16", "float64"] = "auto"
    channels_last: Literal["auto"] | Flag = "auto"
    batch_norm: Literal["local", "global"] = "local"
    gradient_sync: Literal["auto", "flat", "ddp"] = "auto"
    gradient_compression: Literal["none", "bf16"] = "none"
    compile: Literal["auto"] | Flag = "auto"
    graph: Literal["auto"] | Flag = "auto"
    clip_grad_norm: Positive | None = None
    ema_decay: Annotated[Real, Field(gt=0, lt=1)] | None = None
    early_stopping: EarlyStopping | None = None
    log_every_steps: Count = 10
    evaluate_every_epochs: Count = 1
    test_time_augmentation: Flag = False


class Checkpoint(Model):
    """How often to save, how many to keep, and which weights count: those of the last step or the best on validation."""

    every_epochs: Count = 1
    every_steps: Count | None = None
    keep_last: Count = 3
    select: Literal["last", "best"] = "last"
    monitor: Literal["val_accuracy", "val_loss"] = "val_accuracy"
