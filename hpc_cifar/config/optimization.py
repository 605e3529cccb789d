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
Monitor = Literal["val_loss", "val_accuracy"]


# ---- optimizers ----------------------------------------------------------------------------------------------------


class Lookahead(Model):
    """Every ``steps`` updates the weights go back to ``alpha`` of the way from where they were (Zhang et al. 2019)."""

    steps: Count = 6
    alpha: Annotated[Real, Field(gt=0, le=1)] = 0.5


class AnyOptimizer(Model):
    """Fields of every optimizer.

    ``base_batch_size``: ``lr`` is meant for a batch of that size and grows linearly with ``data.batch_size`` (Goyal et al.
    2017); a warm-up in the schedule usually goes with it. ``norm_bias_lr_factor`` is on the rate of the biases of
    normalisations, and their weight decay is divided by it: they move faster and shrink no faster (Jordan 2024).
    """

    base_batch_size: Count | None = None
    norm_bias_lr_factor: Positive = 1.0
    lookahead: Lookahead | None = None


class SGD(AnyOptimizer):
    """Stochastic gradient descent."""

    name: Literal["sgd"]
    lr: Positive
    momentum: Share = 0.0
    nesterov: Flag = False
    weight_decay: NotNegative = 0.0

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SGD:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class AnyAdam(AnyOptimizer):
    """Fields of Adam and AdamW."""

    lr: Positive = 1e-3
    beta1: Share = 0.9
    beta2: Share = 0.999
    eps: Positive = 1e-8


class Adam(AnyAdam):
    """Adam; ``weight_decay`` is added to the gradient (L2)."""

    name: Literal["adam"]
    weight_decay: NotNegative = 0.0


class AdamW(AnyAdam):
    """Adam with decoupled weight decay."""

    name: Literal["adamw"]
    weight_decay: NotNegative = 1e-2


class Muon(AnyOptimizer):
    """Orthogonalised momentum for the weights of convolutions and dense layers (Jordan 2024); AdamW for all others.

    ``other_lr`` is AdamW's rate, which follows the same schedule.
    """

    name: Literal["muon"]
    lr: Positive = 0.02
    momentum: Share = 0.95
    nesterov: Flag = True
    weight_decay: NotNegative = 0.0
    other_lr: Positive = 1e-3


class LARS(AnyOptimizer):
    """SGD whose step in each layer is relative to the norm of its weights, for large batches (You et al. 2017).

    Biases and normalisations take plain steps without decay.
    """

    name: Literal["lars"]
    lr: Positive
    momentum: Share = 0.9
    nesterov: Flag = False
    weight_decay: NotNegative = 0.0
    trust_coefficient: Positive = 1e-3


Optimizer = Annotated[SGD | Adam | AdamW | Muon | LARS, Field(discriminator="name")]


# ---- schedules -----------------------------------------------------------------------------------------------------


class Schedule(Model):
    """Fields shared by most schedules: the factor on ``lr`` rises linearly from 0 over ``warmup_epochs`` first."""

    warmup_epochs: NotNegative = 0.0


class Constant(Schedule):
    """The rate stays at ``lr``."""

    name: Literal["constant"]


class Cosine(Schedule):
    """Half a cosine from ``lr`` down to ``final_factor`` times ``lr``."""

    name: Literal["cosine"]
    final_factor: Fraction = 0.0


class OneCycle(Model):
    """Linear up to ``lr`` over the first ``peak`` of the steps, which is its warm-up, then linear down to ``final_factor``."""

    name: Literal["one_cycle"]
    peak: Annotated[Real, Field(gt=0, lt=1)] = 0.25
    initial_factor: Fraction = 0.0
    final_factor: Fraction = 0.0


class Step(Schedule):
    """``lr`` is multiplied by ``factor`` at the start of each epoch in ``epochs`` (counted from 1)."""

    name: Literal["step"]
    epochs: Annotated[tuple[Count, ...], Field(min_length=1)]
    factor: Annotated[Real, Field(gt=0, lt=1)] = 0.1

    @field_validator("epochs")
    @classmethod
    def _rising(cls, epochs: tuple[int, ...]) -> tuple[int, ...]:
        if list(epochs) != sorted(set(epochs)):
            raise ValueError("should be rising epoch numbers, each once")
        return epochs


class Stage(Model):
    """From the start of ``epoch`` (counted from 1) on, the rate is ``lr``."""

    epoch: Count
    lr: Positive


class Staged(Schedule):
    """Rates by stages: ``stages: [{epoch: 5, lr: 0.0012}, ...]``; the optimizer's ``lr`` holds before the first of them."""

    name: Literal["staged"]
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]

    @field_validator("stages")
    @classmethod
    def _rising(cls, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        epochs = [stage.epoch for stage in stages]
        if epochs != sorted(set(epochs)):
            raise ValueError("should have rising epoch numbers, each once")
        return stages


class Exponential(Schedule):
    """``lr`` is multiplied by ``factor`` after every epoch, smoothly over its steps if ``every_step``."""

    name: Literal["exponential"]
    factor: Annotated[Real, Field(gt=0, lt=1)]
    every_step: Flag = False


class InverseTime(Schedule):
    """``lr`` divided by 1 + ``decay`` times the number of updates: the ``decay`` of Keras' older optimizers."""

    name: Literal["inverse_time"]
    decay: Positive


class Triangular(Model):
    """Up from ``initial_factor`` to ``lr`` and down again, linearly, every ``period_epochs`` (Smith 2017); each triangle is
    ``decay`` times as high as the one before.
    """

    name: Literal["triangular"]
    period_epochs: Positive
    initial_factor: Fraction = 0.1
    decay: Annotated[Real, Field(gt=0, le=1)] = 1.0


class Plateau(Schedule):
    """``lr`` is multiplied by ``factor`` when ``monitor`` has not got better by more than ``min_delta`` for ``patience``
    evaluated epochs; the count begins anew after ``cooldown`` more. It never falls below ``min_lr``.
    """

    name: Literal["plateau"]
    monitor: Monitor = "val_loss"
    factor: Annotated[Real, Field(gt=0, lt=1)] = 0.1
    patience: Count = 10
    min_delta: NotNegative = 1e-4
    cooldown: Annotated[Whole, Field(ge=0)] = 0
    min_lr: NotNegative = 0.0


ScheduleConfig = Annotated[
    Constant | Cosine | OneCycle | Step | Staged | Exponential | InverseTime | Triangular | Plateau,
    Field(discriminator="name"),
]


class EarlyStopping(Model):
    """The run is finished when ``monitor`` has not got better by more than ``min_delta`` for ``patience`` evaluated epochs.

    ``checkpoint.select: best`` has the weights of the best epoch tested; its ``monitor`` should be the same.
    """

    monitor: Monitor = "val_loss"
    patience: Count
    min_delta: NotNegative = 0.0
