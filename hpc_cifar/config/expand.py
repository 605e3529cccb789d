"""From experiment files to the experiments that are run: every seed and every fold of each. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ..errors import UsageError
from .experiment import Data, Experiment
from .explain import first_problem
from .sweep import Sweep

LARGEST_SEED = 2**63 - 1
MOST_RUNS = 10_000  # of one submission


@dataclass(frozen=True)
class Point:
    """One run's place in a sweep: ``values`` by the names of their fields, None where the run asks for them as it starts."""

    sweep: Sweep
    number: int
    values: dict[str, Any] | None


@dataclass(frozen=True)
class Element:
    """One experiment of a submission. ``label`` tells it from its siblings of the same name, as in ``s43-f2`` or ``t07``."""

    experiment: Experiment
    label: str = ""
    point: Point | None = None

    @property
    def title(self) -> str:
        """What its run is called, before the time."""
        return f"{self.experiment.name}-{self.label}" if self.label else self.experiment.name


def expand(
    experiments: Sequence[Experiment],
    *,
    seeds: int | None = None,
    folds: int | None = None,
    label: str = "",
    point: Point | None = None,
    before: int = 0,
) -> list[Element]:
    """Every experiment with ``seeds`` seeds (its own and those after it) and each of ``folds`` folds held out in turn.

    The name stays the same, so that a report can put the elements of one experiment together.

    Args:
        label: what the labels of all of them begin with.
        point: the place of all of them in a sweep.
        before: elements that the submission has already.

    Raises:
        UsageError: a seed would be too large, or the experiment cannot be split into that many folds.
    """
    if (runs := before + len(experiments) * (seeds or 1) * (folds or 1)) > MOST_RUNS:
        every = "experiments x seeds x folds x points of a sweep"
        raise UsageError(f"{runs:,} runs ({every}) are more than {MOST_RUNS:,}, the most of one submission")
    return [element for experiment in experiments for element in _expand(experiment, seeds, folds, label, point)]


def _expand(experiment: Experiment, seeds: int | None, folds: int | None, label: str, point: Point | None) -> Iterator[Element]:
    if experiment.seed + (seeds or 1) - 1 > LARGEST_SEED:
        raise UsageError(f"--seeds {seeds}: {experiment.name} has seed {experiment.seed}; the largest is {LARGEST_SEED}")
    held_out = [None] if folds is None else [_with_fold(experiment, folds, number) for number in range(folds)]
    for seed in range(experiment.seed, experiment.seed + (seeds or 1)):
        for number, data in enumerate(held_out):
            changes = {"seed": seed} | ({} if data is None else {"data": data})
            labels = [label, *([] if seeds is None else [f"s{seed}"]), *([] if data is None else [f"f{number}"])]
            yield Element(experiment.model_copy(update=changes), "-".join(filter(None, labels)), point)


def _with_fold(experiment: Experiment, folds: int, number: int) -> Data:
    try:
        return Data.model_validate(experiment.data.model_dump() | {"folds": folds, "fold": number})
    except ValidationError as error:
        raise UsageError(f"--kfold {folds}: {experiment.name}: {first_problem(error)[1]}") from None
