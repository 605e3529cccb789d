"""The small protocol behind which every tracker stands, and which trackers there are.

A tracker is a module that has what :class:`Tracker` names; its name in :data:`MODULES` and in ``tracking.mirrors`` of job files
is all that the rest of the package knows of it. Each is fed from ``metrics.jsonl`` by a process of its own, so none waits for
another, and each goes on at the first row that it has not got.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, get_args

from ..config.experiment import MirrorName, Tracking
from ..errors import TrackingError
from ..records import RunState
from ..runs import Run
from .rows import Tail

WANDB = "wandb"
MODULES = {WANDB: "hpc_cifar.track.wandb_run", **{name: f"hpc_cifar.track.{name}" for name in get_args(MirrorName)}}
"""Imported when they are used; by the names that people type."""
# of figures by kind of row: other kinds are other panels; system/ is what the client of W&B measures itself
PREFIX = {"step": "step/", "system": "nodes/", "epoch": ""}
FINISH_S = 20  # seconds that a tracker which has answered gets beside a training to take the rest
NO_FIGURES = ("kind", "step", "epoch", "time")  # of a row: where and when it is, and what it is


class Hopeless(TrackingError):
    """Another attempt would fail as this one did."""


@dataclass(frozen=True)
class Rows:
    """What :class:`Feed` has found.

    Attributes:
        new: rows that the tracker has not got, in order, each with the number that stays its own.
        epochs: the rows of all epochs so far, those that the tracker has, too.
        kinds: the kind of row by the name of each figure so far, as :func:`figures` names it.
    """

    new: Sequence[tuple[int, dict[str, Any]]]
    epochs: Sequence[dict[str, Any]]
    kinds: Mapping[str, str]


class Mirror(Protocol):
    """A run that is open in a tracker; every error of it is a TrackingError."""

    taken: int
    """Rows whose number is smaller are there, or on their way."""

    def push(self, rows: Rows) -> None:
        """Hand over the new rows, and pictures of ``evaluate`` that are not there yet."""

    def finish(self, rows: Rows, state: RunState, left: bool) -> None:
        """Hand over the last rows and the outcome, in bounded time, and see that everything has arrived.

        Args:
            state: how the run, or this segment of it, ended; read before the rows.
            left: whoever trained has gone, so that a run that seems to run has failed.
        """


class Tracker(Protocol):
    """A module."""

    TITLE: str
    """What people call it."""

    def problem(self, run: Run | None) -> str:
        """Why nothing can reach it from here, in a line that begins with its title; "" if nothing speaks against it."""

    def begins(self, run: Run, tracking: Tracking, say: Callable[[str], None]) -> bool:
        """Whether a process beside a training is to feed it; why not, of one that was chosen, in one line."""

    def opened(self, run: Run, say: Callable[[str], None], beside: bool) -> AbstractContextManager[Mirror]:
        """The run, open there; its end lets go of everything, whatever happened.

        Args:
            beside: this is a process beside a training, whose end somebody waits for.

        Raises:
            TrackingError: it cannot be opened.
            Hopeless: the same, or in the midst of it: trying again is no use.
        """


def load(name: str) -> Tracker:
    """The tracker of that name."""
    return cast(Tracker, importlib.import_module(MODULES[name]))


def lock(run: Run, name: str) -> Path:
    """What whoever uploads to that tracker holds."""
    return run.path / f".{name}.lock"


def chosen(tracking: Tracking) -> tuple[str, ...]:
    """Names of the trackers of a job: W&B, which decides for itself what it does, and its mirrors."""
    return (WANDB, *dict.fromkeys(tracking.mirrors))


def lacking(tracking: Tracking) -> list[str]:
    """Why a mirror of a job cannot be written here, a line each; the training goes on without it."""
    return [words for name in dict.fromkeys(tracking.mirrors) if (words := load(name).problem(None))]


def figures(row: dict[str, Any]) -> dict[str, Any]:
    """What was measured, by the names that trackers show."""
    prefix = PREFIX[row["kind"]]
    return {prefix + name: value for name, value in row.items() if name not in NO_FIGURES and value is not None}


class Feed:
    """Reads a run's ``metrics.jsonl`` for one tracker, as it grows."""

    def __init__(self, run: Run) -> None:
        self._tail = Tail(run.metrics_file)
        self._epochs: list[dict[str, Any]] = []
        self._kinds: dict[str, str] = {}

    def new(self, taken: int) -> Rows:
        """Rows from that number on, of those that were added since the last call."""
        rows = []
        for number, row in self._tail.new():
            self._kinds |= dict.fromkeys(figures(row), row["kind"])
            if row["kind"] == "epoch":
                while self._epochs and self._epochs[-1]["epoch"] >= row["epoch"]:  # the file was replaced
                    self._epochs.pop()
                self._epochs.append(row)
            if number >= taken:
                rows.append((number, row))
        return Rows(rows, self._epochs, self._kinds)

    @property
    def damaged(self) -> int:
        """Lines that were left out."""
        return self._tail.damaged
