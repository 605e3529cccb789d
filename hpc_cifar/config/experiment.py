"""What to train: the experiment file as frozen pydantic models.

Nothing here knows where a run happens; that is :mod:`hpc_cifar.config.cluster`. A new model family is one class in
:mod:`hpc_cifar.config.model`, one entry in its union and one ``match`` where it is built; optimizers and schedules are in
:mod:`hpc_cifar.config.optimization`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from .claim import Claim
from .fields import Count, Duration, Flag, Model, Positive, Real, Whole, matching, shown
from .layers import AnyLayer, all_layers
from .model import ModelConfig, PretrainedModel
from .optimization import LARS, AdamW, Constant, Fraction, Muon, Optimizer, Plateau, ScheduleConfig, Staged, Step
from .training import Checkpoint, Loss, Training

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

KNOWN = {"cifar10": 10, "cifar10-jpeg": 10, "cifar10-lossless-subset": 10, "cifar100": 100, "digits": 10}
"""Classes of the datasets that ``prepare`` knows by name, of 32 x 32 RGB images; another one is known once it is prepared."""

RawValue = Annotated[Whole, Field(ge=0, le=255)]

_dataset = matching(r"[a-z0-9][a-z0-9_-]{0,31}", "1 to 32 lower-case letters, digits, '_' or '-' (a prepared dataset)")


# ---- data ----------------------------------------------------------------------------------------------------------


class Augment(Model):
    """Random changes of training images; every draw is a function of (seed, epoch, sample index)."""

    crop_padding: Annotated[Whole, Field(ge=0, le=256)] = 0
    """Pixels added on every side before a crop of the old size at a random place; 0 is no crop."""
    padding_mode: Literal["zero", "reflect", "constant"] = "zero"
    """What the border is made of; ``reflect`` does not repeat the edge."""
    padding_value: RawValue | Annotated[tuple[RawValue, ...], Field(min_length=1, max_length=4)] = 0
    """Raw pixel value, 0 to 255, of ``padding_mode: constant``: one for all channels, or a list of one each."""
    flip: Literal["none", "random", "alternating"] = "none"
    """Mirror left to right: ``random`` about half of the images, ``alternating`` every image in every other epoch."""
    cutout: Annotated[Whole, Field(ge=0, le=256)] = 0
    """Side in pixels of a black square at a random place; 0 is none."""
    rotation_degrees: Annotated[Real, Field(ge=0, le=180)] = 0.0
    """Rotate by up to so many degrees either way. Rotation and shift interpolate, after all else, on the device."""
    shift_fraction: Fraction | Annotated[tuple[Fraction, ...], Field(min_length=2, max_length=2)] = 0.0
    """Shift by up to that fraction of the size, both ways; a list is ``[vertical, horizontal]``."""
    warp_fill: Literal["nearest", "reflect", "black"] = "nearest"
    """What rotations and shifts bring into view: the nearest pixel, a reflection (which repeats the edge), or black."""

    @model_validator(mode="after")
    def _value_of_constant_padding(self) -> Augment:
        if self.padding_value != 0 and self.padding_mode != "constant":
            raise ValueError(f"padding_value goes with padding_mode: constant, not with {self.padding_mode}")
        return self

    @property
    def warps(self) -> bool:
        """Whether images are rotated or shifted."""
        return self.rotation_degrees > 0 or max(self.shifts) > 0

    @property
    def shifts(self) -> tuple[float, float]:
        """The largest vertical and horizontal shift, in fractions of the size."""
        both = self.shift_fraction if isinstance(self.shift_fraction, tuple) else (self.shift_fraction,) * 2
        return both[0], both[1]

    def padding_values(self, channels: int) -> tuple[int, ...]:
        """The raw value of each channel of a border; ValueError if there are other than that many."""
        value = self.padding_value if isinstance(self.padding_value, tuple) else (self.padding_value,) * channels
        if len(value) != channels:
            raise ValueError(f"data.augment.padding_value: {len(value)} values for images of {channels} channels")
        return value


class Data(Model):
    """Which images, in which batches."""

    dataset: Annotated[str, AfterValidator(_dataset)] = "cifar10"
    """A prepared dataset: ``cifar10``, ``cifar100``, ``digits``, or the name under which ``prepare`` took class folders."""
    pipeline: Literal["auto", "resident", "ffcv", "dali", "reference"] = "auto"
    """What delivers the images. All deliver the same pixels; ``auto`` takes the fastest that can run."""
    batch_size: Annotated[Count, Field(le=1_000_000)]
    """Images of one step over all processes together."""
    micro_batch_size: Count | None = None
    """Most images of one forward pass of a process; a larger share is done in parts, for the same update."""
    validation: Literal["test"] | Annotated[Real, Field(gt=0, lt=1)] = 0.1
    """Share of the training images held out; or ``test``, to repeat a source that validated on the test images."""
    train_images: Count | None = None
    """Train on so many of the images that are not held out, of each class its share; without it on all."""
    split_seed: Annotated[Whole, Field(ge=0, lt=2**63)] = 0
    """Seed of the split into training and validation images."""
    folds: Annotated[Whole, Field(ge=2, le=1000)] | None = None
    """Cut the training images into so many stratified parts and hold one out, instead of a share."""
    fold: Annotated[Whole, Field(ge=0)] | None = None
    """Number of the part that is held out, from 0; ``submit --kfold`` runs them all."""
    augment: Augment = Augment()
    """Random changes of training images."""
    normalize: Literal["mean_std", "zero_one"] = "mean_std"
    """By mean and standard deviation of the training images, by channel; or pixels from 0 to 1 as they are."""
    workers: Literal["auto"] | Annotated[Whole, Field(ge=0, le=256)] = "auto"
    """Threads of ``ffcv`` and ``dali``, by default the processors of a process; processes of ``reference``, by default 2."""

    @model_validator(mode="after")
    def _one_of_the_folds(self) -> Data:
        if (self.folds is None) != (self.fold is None):
            raise ValueError("folds and fold go together, such as folds: 5 and fold: 0; or submit with --kfold 5")
        if self.folds is not None and self.fold is not None:
            if self.fold >= self.folds:
                raise ValueError(f"fold: should be 0 to {self.folds - 1}, since folds is {self.folds}, not {self.fold}")
            if self.validation == "test":
                raise ValueError("folds hold out training images: leave validation: test out")
        return self


# ---- the rest ------------------------------------------------------------------------------------------------------


MirrorName = Literal["tensorboard"]  # a new one is a module of that name in track/, see track/tracker.py


class Tracking(Model):
    """Weights & Biases and others; a missing login, network, server or package never stops a run."""

    wandb: Literal["online", "offline", "disabled"] = "disabled"
    """``online`` uploads while the job runs; ``offline`` and ``disabled`` leave it to ``hpc-cifar sync``."""
    mirrors: tuple[MirrorName, ...] = ()
    """Trackers beside W&B, each fed by a process of its own while the job runs: ``[tensorboard]``."""
    project: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Project in W&B; without it ``WANDB_PROJECT``, else hpc-cifar."""
    entity: str | None = None
    """User or team in W&B; without it ``WANDB_ENTITY``, else the login's default."""
    name: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """The run's name in W&B; without it ``WANDB_NAME``, else the run's id."""
    notes: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """What W&B shows beside the run, in one's own words; without it ``WANDB_NOTES``."""
    group: Annotated[str, Field(max_length=128)] | None = None
    """Campaign of the run: W&B's group (without it ``WANDB_RUN_GROUP``), ``report --campaign``, ``list --campaign``;
    ``submit --campaign`` sets it."""
    tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = ()
    """Tags in W&B; without any those of ``WANDB_TAGS``."""
    alerts: Flag = False
    """A message by W&B when the run has finished or failed."""
    artifact: Flag = False
    """Keep the selected checkpoint of a finished run in W&B, too."""
    code: Flag = False
    """Keep the package as it was at submit in W&B, too."""
    console: Flag = False
    """Show what rank 0 logs in W&B, too, without keys."""
    norms: Flag = False
    """Also log two L2 norms every ``log_every_steps``: ``grad_norm`` of that step's whole gradient before it is clipped, the
    ``l2`` of layers included, and ``weight_norm`` of the trained weights after the update."""
    nodes: Flag = True
    """Also log how busy each node is, a row an epoch: processors, memory, and GPUs where NVML tells of them."""


class Resources(Model):
    """What one run asks for."""

    nodes: Annotated[Count, Field(le=10_000)] = 1
    """Nodes."""
    gpus_per_node: Annotated[Whole, Field(ge=0, le=64)] = 0
    """GPUs of each node, with one process each; 0 is a run on CPUs."""
    processes_per_node: Annotated[Count, Field(le=1024)] | None = None
    """Processes of each node of a run on CPUs: 1 on Slurm, 2 on this machine without it."""
    cpus_per_process: Annotated[Count, Field(le=1024)] | None = None
    """CPUs of each process; what the profile says without it."""
    memory_gib_per_node: Positive | None = None
    """Memory of each node; what the profile says without it."""
    time: Duration = "01:00:00"
    """Time limit of one job, in quotes. A run that needs more goes on in another job."""
    hang_timeout_s: Positive | None = 45.0
    """A step that takes longer than this, and ten times the slowest so far, is a hang; the run restarts. null: never."""
    fault_restarts: Annotated[Whole, Field(ge=0, le=1000)] = 5
    """Restarts after faults, such as a killed rank, without a checkpoint in between; fewer after hangs and out of memory."""

    @model_validator(mode="after")
    def _one_process_a_gpu(self) -> Resources:
        if self.gpus_per_node and self.processes_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"processes_per_node is {self.processes_per_node} but a run on GPUs has one process a GPU "
                f"({self.gpus_per_node}); leave processes_per_node out"
            )
        return self


class Experiment(Model):
    """One experiment file."""

    name: str
    """Names the run's folder and its Slurm job: 1 to 64 letters, digits, ``.``, ``_`` or ``-``, a letter or digit first."""
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = 0
    """Of weights, order of images, augmentation and dropout."""
    epochs: Annotated[Count, Field(le=1_000_000)]
    """Passes over the training images."""
    model: ModelConfig
    """The network."""
    data: Data
    """Images and batches."""
    optimizer: Optimizer
    """How weights are updated."""
    schedule: ScheduleConfig = Constant(name="constant")
    """How the rate changes during the run."""
    loss: Loss = Loss()
    """What is minimised."""
    training: Training = Training()
    """How a step is computed."""
    checkpoint: Checkpoint = Checkpoint()
    """What is saved, and which weights count."""
    tracking: Tracking = Tracking()
    """Weights & Biases."""
    resources: Resources = Resources()
    """Nodes, processes and time."""
    claim: Claim | None = None
    """Figures of a published source."""

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not NAME_PATTERN.fullmatch(name):
            raise ValueError(
                "should be 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit "
                f"(it names a folder and a Slurm job), not {shown(name)}"
            )
        return name

    @model_validator(mode="after")
    def _features_are_cached_only_where_nothing_changes_them(self) -> Experiment:
        if isinstance(self.model, PretrainedModel) and self.model.cache_features is True and self.data.augment != Augment():
            raise ValueError("model.cache_features: true needs data.augment: {}, since every epoch's images differ otherwise")
        return self

    @model_validator(mode="after")
    def _views_are_of_images(self) -> Experiment:
        model = self.model
        if not self.training.test_time_augmentation or not isinstance(model, PretrainedModel) or model.train != "frozen":
            return self
        if model.cache_features is True or (model.cache_features == "auto" and self.data.augment == Augment()):
            raise ValueError(
                "training.test_time_augmentation: views are of images, but this run keeps features of its frozen backbone; "
                "use hpc-cifar evaluate --tta afterwards, or model.cache_features: false"
            )
        return self

    @model_validator(mode="after")
    def _a_graph_decides_nothing_on_the_host(self) -> Experiment:
        if self.training.graph is not True:
            return self
        if isinstance(self.optimizer, LARS):
            raise ValueError("training.graph: lars keeps its rates on the host; use sgd, adam, adamw or muon")
        if self.training.gradient_sync == "ddp":
            raise ValueError(
                "training.graph: gradient_sync: ddp changes its buckets after the first step; use gradient_sync: flat"
            )
        return self

    @model_validator(mode="after")
    def _a_compiled_network_does_not_communicate(self) -> Experiment:
        if self.training.compile is True and self.training.batch_norm == "global":
            raise ValueError("training.compile: goes with batch_norm: local only")
        return self

    @model_validator(mode="after")
    def _statistics_over_all_ranks_are_ours(self) -> Experiment:
        if isinstance(self.model, PretrainedModel) and self.training.batch_norm == "global":
            raise ValueError(
                f"training.batch_norm: global goes with family: sequential; {self.model.name} has its library's own layers"
            )
        return self

    @model_validator(mode="after")
    def _there_are_statistics_to_compute(self) -> Experiment:
        model = self.model
        field, layers = self._written_layers()
        of_backbone = isinstance(model, PretrainedModel) and model.last != 0 and model.batch_norm != "frozen"
        if self.training.batch_norm_images is None or of_backbone:
            return self
        if not any(layer.type == "batch_norm" for layer in all_layers(layers)):
            raise ValueError(f"training.batch_norm_images: no layer in model.{field} is a batch_norm; leave it out")
        return self

    @model_validator(mode="after")
    def _one_preprocessing(self) -> Experiment:
        model = self.model
        if isinstance(model, PretrainedModel) and model.preprocessing == "weights" and self.data.normalize != "mean_std":
            raise ValueError(
                f"data.normalize: {self.data.normalize} does not count here: images get what the weights expect; "
                "use model.preprocessing: zero_one"
            )
        return self

    @model_validator(mode="after")
    def _augmentation_fits_an_image(self) -> Experiment:
        # numpy's reflection needs a border narrower than the image; the size of other datasets is known when they are opened
        augment = self.data.augment
        if self.data.dataset not in KNOWN:
            return self
        if isinstance(augment.padding_value, tuple) and len(augment.padding_value) != 3:
            raise ValueError(f"data.augment.padding_value: should be one value or 3, not {len(augment.padding_value)}")
        if augment.padding_mode == "reflect" and augment.crop_padding > 31:
            raise ValueError(
                f"data.augment.crop_padding: {augment.crop_padding} should be at most 31 with padding_mode: reflect"
            )
        if augment.cutout > 31:
            raise ValueError(f"data.augment.cutout: {augment.cutout} would hide whole images of 32 x 32; use at most 31")
        return self

    @model_validator(mode="after")
    def _schedule_fits_the_epochs(self) -> Experiment:
        warmup = getattr(self.schedule, "warmup_epochs", 0.0)
        if warmup >= self.epochs:
            raise ValueError(f"schedule.warmup_epochs: {warmup:g} should be fewer than the run's {self.epochs} epochs")
        if isinstance(self.schedule, Step) and self.schedule.epochs[-1] > self.epochs:
            raise ValueError(f"schedule.epochs: {self.schedule.epochs[-1]} lies after the run's last epoch, {self.epochs}")
        if isinstance(self.schedule, Staged) and self.schedule.stages[-1].epoch > self.epochs:
            late = self.schedule.stages[-1].epoch
            raise ValueError(f"schedule.stages: epoch {late} lies after the run's last epoch, {self.epochs}")
        return self

    def _written_layers(self) -> tuple[str, Sequence[AnyLayer]]:
        """The field of ``model`` that holds the file's own layers, and these."""
        model = self.model
        return ("head", model.head or ()) if isinstance(model, PretrainedModel) else ("layers", model.layers)

    @model_validator(mode="after")
    def _watched_figures_are_there(self) -> Experiment:
        field, layers = self._written_layers()
        if any(getattr(layer, "l2", 0.0) for layer in all_layers(layers)):
            return self
        watching = {
            "checkpoint": self.checkpoint,
            "training.early_stopping": self.training.early_stopping,
            "schedule": self.schedule if isinstance(self.schedule, Plateau) else None,
        }
        for name, one in watching.items():
            if one is not None and one.monitor == "val_loss_with_l2":
                raise ValueError(f"{name}.monitor: val_loss_with_l2 needs a layer in model.{field} with l2; use val_loss")
        return self

    @model_validator(mode="after")
    def _l2_is_a_part_of_the_gradient(self) -> Experiment:
        field, layers = self._written_layers()
        if isinstance(self.optimizer, AdamW | Muon) and any(getattr(layer, "l2", 0.0) for layer in all_layers(layers)):
            raise ValueError(
                f"model.{field}: l2 is a part of the gradient, which {self.optimizer.name} keeps apart from its decay; "
                "use optimizer.weight_decay, or adam or sgd"
            )
        return self

    @model_validator(mode="after")
    def _a_weight_has_one_length(self) -> Experiment:
        _, layers = self._written_layers()
        shortened = any(getattr(layer, "max_norm", None) is not None for layer in all_layers(layers))
        if shortened and isinstance(self.optimizer, Muon) and self.optimizer.normalize_weights:
            raise ValueError("optimizer.normalize_weights gives weights their length; leave the layers' max_norm out")
        return self

    @property
    def lr(self) -> float:
        """The rate that the schedule's factor is applied to: the optimizer's, scaled to the batch if it asks for that."""
        base = self.optimizer.base_batch_size
        return self.optimizer.lr * (self.data.batch_size / base if base else 1.0)

    @model_validator(mode="after")
    def _nothing_chosen_by_the_test_set(self) -> Experiment:
        if self.data.validation != "test":
            return self
        chosen = "since data.validation is test; use a validation fraction such as 0.1"
        if self.checkpoint.select == "best":
            raise ValueError(f"checkpoint.select: best would choose weights by the test set, {chosen}, or select: last")
        if self.training.early_stopping is not None:
            raise ValueError(f"training.early_stopping: would choose the last epoch by the test set, {chosen}")
        if isinstance(self.schedule, Plateau):
            raise ValueError(f"schedule.name: plateau would choose the rates by the test set, {chosen}")
        return self
