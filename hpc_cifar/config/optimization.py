"""Optimizers, learning-rate schedules and early stopping of the experiment file.

A new one is one class here, one entry in its union and one ``match`` where it is built (``train/optim.py``,
``train/schedule.py``).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from .fields import Count, Flag, Model, Positive, Real, Share, Whole

NotNegative = Annotated[Real, Field(ge=0)]
Fraction = Annotated[Real, Field(ge=0, le=1)]
Monitor = Literal["val_loss", "val_accuracy", "val_loss_with_l2"]
"""Figures of a validation that can be watched; ``val_loss_with_l2`` adds the ``l2`` of layers, as Keras' ``val_loss`` does."""


def lower_is_better(monitor: Monitor) -> bool:
    """Whether smaller values of a figure are better."""
    return monitor != "val_accuracy"


# ---- optimizers ----------------------------------------------------------------------------------------------------


class Lookahead(Model):
    """Slow weights that the optimizer's weights return to (Zhang et al. 2019)."""

    steps: Count = 6
    """Updates between returns."""
    alpha: Annotated[Real, Field(gt=0, le=1)] = 0.5
    """Fraction of the way from the slow weights to the fast ones that both are set to."""


class AnyOptimizer(Model):
    """Fields of every optimizer."""

    base_batch_size: Count | None = None
    """``lr`` is meant for this batch size and grows linearly with ``data.batch_size`` (Goyal et al. 2017), as all rates do."""
    norm_bias_lr_factor: Positive = 1.0
    """On the rate of the biases of normalisations; their weight decay is divided by it (Jordan 2024)."""
    lookahead: Lookahead | None = None
    """Slow weights that the optimizer's weights return to."""


class SGD(AnyOptimizer):
    """Stochastic gradient descent."""

    name: Literal["sgd"]
    lr: Positive
    """Learning rate, which the schedule multiplies."""
    momentum: Share = 0.0
    """Momentum."""
    nesterov: Flag = False
    """Nesterov momentum."""
    weight_decay: NotNegative = 0.0
    """Added to the gradient (L2)."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SGD:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class AnyAdam(AnyOptimizer):
    """Fields of Adam and AdamW."""

    lr: Positive = 1e-3
    """Learning rate, which the schedule multiplies."""
    beta1: Share = 0.9
    """Decay of the first moment."""
    beta2: Share = 0.999
    """Decay of the second moment."""
    eps: Positive = 1e-8
    """Added to the denominator."""


class Adam(AnyAdam):
    """Adam."""

    name: Literal["adam"]
    weight_decay: NotNegative = 0.0
    """Added to the gradient (L2)."""


class AdamW(AnyAdam):
    """Adam with decoupled weight decay."""

    name: Literal["adamw"]
    weight_decay: NotNegative = 1e-2
    """Decoupled weight decay."""


class Muon(AnyOptimizer):
    """Orthogonalised momentum for the weights of convolutions and dense layers (Jordan 2024); ``other`` for the rest."""

    name: Literal["muon"]
    lr: Positive = 0.02
    """Learning rate, which the schedule multiplies."""
    momentum: Share = 0.95
    """Momentum."""
    nesterov: Flag = True
    """Nesterov momentum."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay; ``normalize_weights`` leaves it little effect."""
    newton_schulz_steps: Annotated[Whole, Field(ge=1, le=20)] = 5
    """Iterations that make an update nearly orthogonal."""
    newton_schulz_coefficients: Literal["quintic", "original"] = "quintic"
    """``quintic``: another polynomial for each of five iterations; ``original``: Jordan's, for fewer iterations, too."""
    normalize_weights: Flag = False
    """Before each of its updates, bring the rows of a weight (a filter or unit each) to a mean square length of 1."""
    other: Literal["adamw", "sgd"] = "adamw"
    """Optimizer of biases, normalisations and, with ``last_layer_lr``, of the last layer."""
    other_lr: Positive = 1e-3
    """Its rate, which follows the same schedule."""
    other_beta1: Share = 0.9
    """Decay of the first moment of ``other: adamw``."""
    other_beta2: Share = 0.999
    """Decay of the second moment of ``other: adamw``."""
    other_eps: Positive = 1e-8
    """Added to the denominator of ``other: adamw``."""
    other_momentum: Share = 0.9
    """Momentum of ``other: sgd``; Nesterov's where ``nesterov`` is true."""
    other_weight_decay: NotNegative | None = None
    """Its weight decay, decoupled with ``adamw``, added to the gradient with ``sgd``; ``null``: ``weight_decay``."""
    last_layer_lr: Positive | None = None
    """Rate at which ``other`` updates the last layer's weights, its decay in inverse proportion; ``null``: Muon does."""

    @model_validator(mode="after")
    def _fields_of_the_other_optimizer(self) -> Muon:
        for name, other in (
            *((field, "adamw") for field in ("other_beta1", "other_beta2", "other_eps")), ("other_momentum", "sgd"),
        ):  # fmt: skip
            if self.other != other and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} counts only with other: {other}")
        if self.other == "sgd" and self.nesterov and self.other_momentum == 0:
            raise ValueError("nesterov needs an other_momentum above 0")
        return self


class LARS(AnyOptimizer):
    """SGD whose step in each layer is relative to the norm of its weights, for large batches (You et al. 2017).

    Biases and normalisations take plain steps without decay.
    """

    name: Literal["lars"]
    lr: Positive
    """Learning rate, which the schedule multiplies."""
    momentum: Share = 0.9
    """Momentum."""
    nesterov: Flag = False
    """Nesterov momentum."""
    weight_decay: NotNegative = 0.0
    """Added to the gradient (L2)."""
    trust_coefficient: Positive = 1e-3
    """Length of a layer's step relative to that of its weights."""


Optimizer = Annotated[SGD | Adam | AdamW | Muon | LARS, Field(discriminator="name")]


# ---- schedules -----------------------------------------------------------------------------------------------------


class Schedule(Model):
    """Fields shared by most schedules."""

    warmup_epochs: NotNegative = 0.0
    """Epochs over which the factor on ``lr`` rises linearly from 0 first."""


class Constant(Schedule):
    """The rate stays at ``lr``."""

    name: Literal["constant"]


class Cosine(Schedule):
    """Half a cosine from ``lr`` down."""

    name: Literal["cosine"]
    final_factor: Fraction = 0.0
    """What it ends at, as a factor on ``lr``."""


class Linear(Schedule):
    """Straight from ``lr`` down."""

    name: Literal["linear"]
    final_factor: Fraction = 0.0
    """What it ends at, as a factor on ``lr``."""


class OneCycle(Model):
    """Linear up to ``lr``, which is its warm-up, then linear down."""

    name: Literal["one_cycle"]
    peak: Annotated[Real, Field(gt=0, lt=1)] = 0.25
    """Share of the steps until the peak."""
    initial_factor: Fraction = 0.0
    """What it begins at, as a factor on ``lr``."""
    final_factor: Fraction = 0.0
    """What it ends at, as a factor on ``lr``."""


class Step(Schedule):
    """``lr`` is multiplied by a factor at the start of some epochs."""

    name: Literal["step"]
    epochs: Annotated[tuple[Count, ...], Field(min_length=1)]
    """Numbers of these epochs, counted from 1, rising."""
    factor: Annotated[Real, Field(gt=0, lt=1)] = 0.1
    """The factor."""

    @field_validator("epochs")
    @classmethod
    def _rising(cls, epochs: tuple[int, ...]) -> tuple[int, ...]:
        if list(epochs) != sorted(set(epochs)):
            raise ValueError("should be rising epoch numbers, each once")
        return epochs


class Stage(Model):
    """The rate from an epoch on."""

    epoch: Count
    """From the start of this epoch, counted from 1."""
    lr: Positive
    """Learning rate from there on."""


class Staged(Schedule):
    """Rates by stages."""

    name: Literal["staged"]
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    """Such as ``[{epoch: 5, lr: 0.0012}, ...]``, rising; the optimizer's ``lr`` holds before the first of them."""

    @field_validator("stages")
    @classmethod
    def _rising(cls, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        epochs = [stage.epoch for stage in stages]
        if epochs != sorted(set(epochs)):
            raise ValueError("should have rising epoch numbers, each once")
        return stages


class Exponential(Schedule):
    """``lr`` is multiplied by a factor after every epoch."""

    name: Literal["exponential"]
    factor: Annotated[Real, Field(gt=0, lt=1)]
    """The factor."""
    every_step: Flag = False
    """Spread smoothly over the steps of an epoch."""


class InverseTime(Schedule):
    """``lr`` divided by 1 + ``decay`` times the number of updates: the ``decay`` of Keras' older optimizers."""

    name: Literal["inverse_time"]
    decay: Positive
    """For each update."""


class Triangular(Model):
    """Up to ``lr`` and down again, linearly, again and again (Smith 2017)."""

    name: Literal["triangular"]
    period_epochs: Positive
    """Epochs of one triangle."""
    initial_factor: Fraction = 0.1
    """What each begins at, as a factor on ``lr``."""
    decay: Annotated[Real, Field(gt=0, le=1)] = 1.0
    """Height of each triangle relative to the one before."""


class Plateau(Schedule):
    """``lr`` is multiplied by a factor when validation has not got better for some epochs."""

    name: Literal["plateau"]
    monitor: Monitor = "val_loss"
    """Figure that is watched; ``val_loss_with_l2`` adds the ``l2`` of layers, as Keras' ``val_loss`` does."""
    factor: Annotated[Real, Field(gt=0, lt=1)] = 0.1
    """Factor by which the rate is multiplied."""
    patience: Count = 10
    """Evaluated epochs without getting better."""
    min_delta: NotNegative = 1e-4
    """What has to be exceeded to count as better."""
    cooldown: Annotated[Whole, Field(ge=0)] = 0
    """Evaluated epochs after a change until the count begins anew."""
    min_lr: NotNegative = 0.0
    """The rate is not lowered below it; one that begins below it stays."""


ScheduleConfig = Annotated[
    Constant | Cosine | Linear | OneCycle | Step | Staged | Exponential | InverseTime | Triangular | Plateau,
    Field(discriminator="name"),
]


class EarlyStopping(Model):
    """The run is finished when validation has not got better for some epochs."""

    monitor: Monitor = "val_loss"
    """Figure that is watched; with the same ``checkpoint.monitor``, ``checkpoint.select: best`` tests the best epoch."""
    patience: Count
    """Evaluated epochs without getting better."""
    min_delta: NotNegative = 0.0
    """Difference that has to be exceeded to count as better, for ``best`` too where ``checkpoint.monitor`` is the same."""
