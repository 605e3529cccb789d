"""The rows of a growing ``metrics.jsonl``, in order, each with a number that stays its own.

The number follows from the step that a row is of, so that a row which a resumed run computes again has the same one: whoever
has taken the rows up to some number goes on with those above it, whatever happened in between.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import files, reading
from ..config.experiment import Experiment
from ..config.optimization import Monitor, lower_is_better
from ..reading import is_regular
from ..records import MetricRow, is_sound

_FIGURE = rb'(, "[a-z0-9_]{1,40}": (-?[0-9][0-9.e+-]{0,30}|null))'
STEP_LINE = re.compile(rb'\{"kind": "step"' + _FIGURE + rb"{2,30}\}")
NODES_LINE = re.compile(rb'\{"kind": "system"' + _FIGURE + rb"{2,30000}\}")
EPOCH = b'{"kind": "epoch"'
# numbers of one step: its row, pictures, a row of the nodes, pictures, that of an epoch that ends there, pictures
A_STEP = 1000
CURVES = {"step": 0, "system": A_STEP // 4, "epoch": A_STEP // 2}  # kinds of rows that have a number; events have none


def number_of(row: dict[str, Any]) -> int:
    """Larger than that of every row before."""
    return A_STEP * int(row["step"]) + CURVES[row["kind"]]


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
    """The rows of the file in their order, and how many lines hold something else; see :class:`MetricRow` for what they have.

    A last line that is being written counts as neither.

    Raises:
        Damaged: the file cannot be read at all.
    """
    found, damaged = files.json_lines(path)
    rows = [row for row in found if is_row(row)]
    return rows, damaged + len(found) - len(rows)


def rows_but_steps(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The same rows without those of nodes and of steps, for which nobody asks but for the last step of a segment.

    Their lines are looked at, not read: a thousand long files are read in seconds so.

    Raises:
        Damaged: the file cannot be read at all.
    """
    rows: list[dict[str, Any]] = []
    damaged, skipped = 0, b""
    for line, ended in reading.lines(path):
        if line is not None and ended and STEP_LINE.fullmatch(line):
            skipped = line
            continue
        if line is not None and ended and NODES_LINE.fullmatch(line):
            continue
        for one, whole in ([(skipped, True)] if skipped and not (line or b"").startswith(EPOCH) else []) + [(line, ended)]:
            row = reading.row_of(one)
            if row is not None and is_row(row):
                rows.append(row)
            elif whole and (one is None or one.strip()):
                damaged += 1
        skipped = b""
    return rows, damaged


def is_row(row: Any) -> bool:
    """Whether it is a row: it has a kind, an epoch and a step, and every figure is a number."""
    if not isinstance(row, dict) or row.get("kind") is None or not is_sound(MetricRow, row):
        return False
    return all(row.get(name) is not None and row[name] >= 0 for name in ("epoch", "step"))


def epochs_of(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of epochs, without damaged ones."""
    return [row for row in rows if row.get("kind") == "epoch" and row.get("epoch") is not None and is_sound(MetricRow, row)]


class Tail:
    """Reads what was added to the file since the last time; a file that was replaced, from its beginning.

    Args:
        path: the file, which need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._offset = -1, 0
        self._rest = b""  # of a line whose end is not there yet
        self.damaged = 0  # lines that cannot be read, which are left out

    def new(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows and their numbers; all of them again where the file was replaced."""
        if not is_regular(self._path):
            return
        try:
            stream = self._path.open("rb")
        except OSError:
            return
        with stream:
            about = os.fstat(stream.fileno())
            if about.st_ino != self._inode or about.st_size < self._offset:
                self._inode, self._offset, self._rest, self.damaged = about.st_ino, 0, b"", 0
            stream.seek(self._offset)
            data = stream.read()
            self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            try:
                row = files.parse_json(line)
            except files.Damaged:
                row = None
            if not is_row(row):
                self.damaged += 1
                continue
            if row["kind"] in CURVES:
                yield number_of(row), row
