"""The rows of a growing ``metrics.jsonl``, in order, each with a number that stays its own.

The number follows from the step that a row is of, so that a row which a resumed run computes again has the same one: whoever
has taken the rows up to some number goes on with those above it, whatever happened in between.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.experiment import Experiment
from ..config.optimization import Monitor, lower_is_better

CURVES = ("step", "epoch")  # kinds of rows that have a number; events have none
A_STEP = 1000  # numbers of one step: its row, pictures, from the middle on the row of an epoch that ends there, pictures


def number_of(row: dict[str, Any]) -> int:
    """Larger than that of every row before."""
    return A_STEP * int(row["step"]) + (A_STEP // 2 if row["kind"] == "epoch" else 0)


def is_better(value: float, best: float | None, monitor: Monitor, min_delta: float = 0.0) -> bool:
    """Whether a figure is better than the best before by more than ``min_delta``; one that is not finite never is."""
    if best is None or not math.isfinite(best):
        return math.isfinite(value)
    sign = 1.0 if lower_is_better(monitor) else -1.0
    return math.isfinite(value) and sign * value < sign * best - min_delta


def improvements(rows: Iterable[Mapping[str, Any]], monitor: Monitor, min_delta: float = 0.0) -> Iterator[bool]:
    """For each row that has the figure, in order, whether it is better than all before, as :func:`is_better` says."""
    best: float | None = None
    for row in rows:
        if (value := row.get(monitor)) is not None:
            better = is_better(value, best, monitor, min_delta)
            if better:
                best = value
            yield better


def least_improvement(experiment: Experiment) -> float:
    """Difference that makes an epoch the best one: the ``min_delta`` of early stopping where it watches the same figure."""
    stopping = experiment.training.early_stopping
    return stopping.min_delta if stopping is not None and stopping.monitor == experiment.checkpoint.monitor else 0.0


def selected(experiment: Experiment, epochs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of the epoch whose weights a run reports, of its rows of epochs; ``{}`` without any."""
    monitor = experiment.checkpoint.monitor
    monitored = [row for row in epochs if row.get(monitor) is not None]
    better = list(improvements(monitored, monitor, least_improvement(experiment)))
    if experiment.checkpoint.select == "best" and True in better:
        return next(row for row, best in zip(reversed(monitored), reversed(better), strict=True) if best)
    return epochs[-1] if epochs else {}


def rows_of(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Rows of ``metrics.jsonl``, and the number of lines that are none; a last line that is being written counts as neither."""
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except OSError:
        return [], 0
    rows, damaged = [], 0
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and _is_row(row):
            rows.append(row)
        else:
            damaged += 1
    return rows, damaged


def _is_row(row: dict[str, Any]) -> bool:
    if not isinstance(row.get("kind"), str) or not all(_is_count(row.get(name)) for name in ("epoch", "step")):
        return False
    figures = [value for name, value in row.items() if name.endswith(("_loss", "_accuracy", "_per_second", "time"))]
    return all(value is None or (_is_number(value) and math.isfinite(value)) for value in figures)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Tail:
    """Reads what was added to the file since the last time; a file that was replaced, from its beginning.

    Args:
        path: the file, which need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._offset = -1, 0
        self._rest = b""  # of a line whose end is not there yet
        self.last = 0  # the largest number so far
        self.damaged = 0  # lines that cannot be read, which are left out

    def new(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows and their numbers; all of them again where the file was replaced."""
        try:
            stream = self._path.open("rb")
        except OSError:
            return
        with stream:
            about = os.fstat(stream.fileno())
            if about.st_ino != self._inode or about.st_size < self._offset:
                self._inode, self._offset, self._rest, self.last, self.damaged = about.st_ino, 0, b"", 0, 0
            stream.seek(self._offset)
            data = stream.read()
            self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            try:
                row = json.loads(line)
                number = number_of(row) if row["kind"] in CURVES else None
            except (ValueError, KeyError, TypeError):
                self.damaged += 1
                continue
            if number is not None:
                self.last = max(self.last, number)
                yield number, row
