"""How a step is computed, and what is kept of a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .fields import Count, Flag, Model, Positive, Real, Share, Whole
from .optimization import EarlyStopping, Monitor, NotNegative


class Loss(Model):
    """Cross entropy."""

    label_smoothing: Share = 0.0
    """Share of the target that is spread over all classes."""


class Selection(Model):
    """Only the images of every batch that the network finds hardest are trained on (after Jiang et al. 2019).

    A forward pass without gradients, dropout or batch statistics gives each image's loss. A process chooses among its own part
    of the batch, as a whole. Loss and accuracy of the training are those of the chosen images.
    """

    share: Annotated[Real, Field(gt=0, lt=1)]
    """Share of the images that is trained on: those with the largest losses."""
    from_epoch: NotNegative = 1.0
    """Epochs that train on all images first: a network that has seen nothing finds nothing hard."""
    until_epoch: Positive | None = None
    """Train on all images again after so many epochs; never, unless it is given."""

    @model_validator(mode="after")
    def _some_epochs(self) -> Selection:
        if self.until_epoch is not None and self.until_epoch <= self.from_epoch:
            raise ValueError(f"until_epoch: should be after from_epoch, {self.from_epoch:g}, not {self.until_epoch:g}")
        return self

    def active(self, epoch: float) -> bool:
        """Whether images are chosen after so many epochs."""
        return self.from_epoch <= epoch and (self.until_epoch is None or epoch < self.until_epoch)

    def kept(self, images: int) -> int:
        """How many of so many images are trained on; of some, at least one."""
        return min(images, max(1, round(self.share * images)))


class Training(Model):
    """How a step is computed."""

    precision: Literal["auto", "float32", "bf16", "float64"] = "auto"
    """``auto``: bf16 autocast where a GPU or x86 processor computes in it, else float32. ``float64`` is for comparisons."""
    channels_last: Literal["auto"] | Flag = "auto"
    """Memory layout of images and convolutions; ``auto`` is true."""
    batch_norm: Literal["local", "global"] = "local"
    """Statistics of each process's own images, or of the batch over all processes."""
    batch_norm_images: Annotated[Whole, Field(ge=2)] | None = None
    """Before a validation or test, compute BatchNorm's running statistics anew, from so many training images."""
    gradient_sync: Literal["auto", "flat", "ddp"] = "auto"
    """One all-reduce in a fixed order, or torch's DistributedDataParallel; ``auto``: flat below 4 million parameters."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """``bf16`` sends half as many bytes, for large networks on slow links; weights stay float32."""
    compile: Literal["auto"] | Flag = "auto"
    """torch.compile; ``auto`` is false."""
    graph: Literal["auto"] | Flag = "auto"
    """Replay the step as one CUDA graph, with flat gradients; on a CPU its eager twin. ``auto`` is false."""
    clip_grad_norm: Positive | None = None
    """Largest norm of the gradient, which the ``l2`` of layers is part of."""
    ema_decay: Annotated[Real, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of the weights with this decay; it is what is validated and tested."""
    selection: Selection | None = None
    """Train on the hardest images of every batch only."""
    early_stopping: EarlyStopping | None = None
    """When a run is finished before its last epoch."""
    skip_non_finite: Annotated[Whole, Field(ge=0, le=1000)] = 0
    """How often a loss that is not finite sends the run back to its last checkpoint, to leave that batch out; 0 ends it."""
    log_every_steps: Count = 10
    """Steps of a row of ``metrics.jsonl``."""
    evaluate_every_epochs: Count = 1
    """Epochs between validations; the last epoch has one in any case."""
    test_time_augmentation: Flag = False
    """Also test with shifted and mirrored views: ``tta_accuracy`` beside ``test_accuracy``."""


class Checkpoint(Model):
    """How often to save, how many to keep, and which weights count."""

    every_epochs: Count = 1
    """Epochs between checkpoints; the last epoch has one in any case, and each that is the best so far."""
    every_steps: Count | None = None
    """Also after so many steps; for long epochs, and where a preemption comes without warning."""
    keep_last: Count = 3
    """How many of the newest ones stay; the best one stays, too."""
    keep_every_epochs: Count | None = None
    """Also keep that of every so many epochs."""
    select: Literal["last", "best"] = "last"
    """Weights that are tested and exported: of the last step, or of the best validation."""
    monitor: Monitor = "val_accuracy"
    """Figure that decides which epoch is ``best``; one that is not finite never is."""
