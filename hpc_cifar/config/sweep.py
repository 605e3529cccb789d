"""The sweep file: which fields of a job file are tried with which values, how these are chosen, when a run is given up."""

from __future__ import annotations

import itertools
import json
import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, model_validator

from .fields import Count, Model, Real, Whole
from .optimization import Monitor

MOST_POINTS = 1000


_REAL: TypeAdapter[float] = TypeAdapter(Real)


def _number(value: Any) -> Any:
    """Whole numbers stay whole: a range of them has whole values only."""
    return value if isinstance(value, int) and not isinstance(value, bool) else _REAL.validate_python(value)


Number = Annotated[int | float, BeforeValidator(_number)]


class Range(Model):
    """Numbers from ``min`` to ``max``, whole ones if both are whole."""

    min: Number
    """The smallest."""
    max: Number
    """The largest."""
    scale: Literal["linear", "log"] = "linear"
    """Draw evenly, or evenly in the logarithm."""
    step: Annotated[Number, Field(gt=0)] | None = None
    """Distance of neighbours; a grid needs one."""

    @model_validator(mode="after")
    def _a_range(self) -> Range:
        if self.min >= self.max:
            raise ValueError(f"min: should be below max, which is {self.max}, not {self.min}")
        if self.scale == "log" and (self.min <= 0 or self.step is not None):
            raise ValueError("scale: log needs a min above 0 and no step")
        return self

    @property
    def whole(self) -> bool:
        return all(isinstance(value, int) for value in (self.min, self.max, self.step or 1))

    @property
    def count(self) -> int:
        """Values of a range that has a step."""
        assert self.step is not None
        return int((self.max - self.min) / self.step + 1e-9) + 1

    def steps(self) -> list[Any]:
        """These values."""
        assert self.step is not None
        return [self.min + number * self.step for number in range(self.count)]


class Prune(Model):
    """A run is given up where its figure is worse than the median of the others' at the same epoch."""

    warmup_epochs: Annotated[Whole, Field(ge=0)] = 0
    """Epochs that every run may make before."""
    startup_runs: Annotated[Whole, Field(ge=1)] = 4
    """Runs that must have ended before."""


class Sweep(Model):
    """One sweep file."""

    method: Literal["grid", "random", "bayes"]
    """Every combination; drawn; or chosen as a run starts, from what the others have found (Optuna's TPE)."""
    parameters: Annotated[dict[str, list[Any] | Range], Field(min_length=1)]
    """Names of fields, such as ``optimizer.lr``, and their values: a list, or a range."""
    runs: Annotated[Count, Field(le=MOST_POINTS)] | None = None
    """How many, with ``random`` and ``bayes``; a grid has as many as there are combinations."""
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = 0
    """Of what is drawn."""
    metric: Monitor = "val_accuracy"
    """What runs are compared by: the figure of the epoch that a run selects."""
    prune: Prune | None = None
    """When a run is given up."""

    @model_validator(mode="after")
    def _parameters_are_the_experiments(self) -> Sweep:
        for name, values in self.parameters.items():
            place = f"parameters.{name}"
            if name.partition(".")[0] in ("resources", "tracking", "name", "seed", "claim") or name == "data.dataset":
                raise ValueError(f"{place}: is the same for all runs of a sweep; seeds are --seeds")
            if isinstance(values, list) and not values:
                raise ValueError(f"{place}: should have at least one value")
            if self.method == "grid" and isinstance(values, Range) and values.step is None:
                raise ValueError(f"{place}: a grid needs a list of values, or a step")
        return self

    @model_validator(mode="after")
    def _so_many_runs(self) -> Sweep:
        if self.method == "grid":
            if self.runs is not None:
                raise ValueError("runs: a grid has as many as there are combinations; leave it out")
            count = math.prod(len(value) if isinstance(value, list) else value.count for value in self.parameters.values())
            if count > MOST_POINTS:
                raise ValueError(f"parameters: {count:,} combinations; at most {MOST_POINTS:,} runs make a sweep")
        elif self.runs is None:
            raise ValueError(f"runs: {self.method} needs the number of runs, such as runs: 20")
        return self

    def grid(self) -> list[dict[str, Any]]:
        """Every combination, the last parameter changing fastest."""
        lists = [value if isinstance(value, list) else value.steps() for value in self.parameters.values()]
        return [dict(zip(self.parameters, one, strict=True)) for one in itertools.product(*lists)]

    def corners(self) -> list[dict[str, Any]]:
        """Points that show whether the experiment takes such values: the first of each, and the last."""
        ends = {
            name: (values[0], values[-1]) if isinstance(values, list) else (values.min, values.max)
            for name, values in self.parameters.items()
        }
        return [{name: pair[end] for name, pair in ends.items()} for end in (0, 1)]


def as_sets(values: dict[str, Any]) -> list[str]:
    """``--set`` changes; JSON is YAML."""
    return [f"{name}={json.dumps(value)}" for name, value in values.items()]
