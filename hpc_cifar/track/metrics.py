"""``metrics.jsonl``: one JSON object a row, the truth about a run's curves.

``kind`` is ``step``, ``epoch``, ``system`` or ``event``; rows carry ``epoch`` and ``step`` (updates made so far) and where they
apply ``train_loss``, ``train_accuracy``, ``val_loss``, ``val_accuracy``, ``lr``, ``images_per_second``, ``grad_norm``,
``weight_norm``, ``time`` (Unix seconds); those of ``system``, how busy the nodes are: see ``train/node_usage.py``.
Between two rows of one segment as much time has passed as their times say, also where the machine's clock was set.
A rate counts the images of the batches of the steps that were made, over all ranks, and no image that was not there.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import files
from ..errors import RunError
from .rows import rows_of


class MetricsLog:
    """Appends rows, each flushed; on a resume the rows that will be computed again are dropped first.

    Args:
        path: the file; its folder exists.
        resume_step: the step the run continues from. Later rows go, but for events.
        history: rows of the epochs until then, as the checkpoint has them; those that are damaged in the file are put back.

    Attributes:
        notes: what was damaged, for people.

    Raises:
        RunError: something else is in its place.
    """

    def __init__(self, path: Path, resume_step: int = 0, history: Sequence[Mapping[str, Any]] = ()) -> None:
        try:
            rows, damaged = rows_of(path)
        except files.Damaged as error:
            raise RunError(f"{path}: {error}") from None
        begun = max((index for index, row in enumerate(rows) if row.get("event") == "started"), default=0)
        # by the segment before, as far as was logged; those before it were counted when it began
        self.reached = max((int(row.get("step", 0)) for row in rows[begun:]), default=0)
        kept = [row for row in rows if row.get("kind") == "event" or int(row.get("step", 0)) <= resume_step]
        kept, back = _with_history(kept, history)
        self.notes = [f"{damaged} damaged line{'s' if damaged > 1 else ''} of metrics.jsonl left out"] if damaged else []
        if back:
            self.notes.append(f"metrics.jsonl has epoch {', '.join(map(str, back))} again, as the checkpoint has it")
        if kept or path.exists():
            # always rewritten: a killed writer may have left a torn last line
            files.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._epoch = time.time() - time.monotonic()
        self._path, self._stream = path, path.open("a", encoding="utf-8")

    def write(self, kind: str, *, epoch: int, step: int, **values: Any) -> dict[str, Any]:
        """Append one row and return it; a number that JSON cannot hold becomes null."""
        row = {"kind": kind, "epoch": epoch, "step": step, "time": round(self._epoch + time.monotonic(), 3)}
        row |= _finite(values)
        with files.named_in_errors(self._path):
            self._stream.write(json.dumps(row, allow_nan=False) + "\n")
            self._stream.flush()
        return row

    def close(self) -> None:
        with files.named_in_errors(self._path):  # of what is not written yet
            self._stream.close()


def _with_history(rows: list[dict[str, Any]], history: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
    """Rows in which every epoch of the history is there as it says, and the epochs that were not."""
    there = [
        {key: value for key, value in row.items() if key not in ("kind", "time")} for row in rows if row["kind"] == "epoch"
    ]
    wanted = [_finite(row) for row in history]
    if not history or there == wanted:
        return rows, []
    back = [row["epoch"] for row in wanted if there.count(row) != 1]
    times = {row["epoch"]: row.get("time") for row in rows if row["kind"] == "epoch"}
    made = [row for row in rows if row["kind"] != "epoch"]
    for row in wanted:
        place = max((number for number, one in enumerate(made, 1) if one["step"] <= row["step"]), default=0)
        while place and made[place - 1]["kind"] == "event" and made[place - 1]["step"] == row["step"]:  # of the next segment
            place -= 1
        near = made[place - 1].get("time") if place else None
        made.insert(
            place, {"kind": "epoch", "epoch": row["epoch"], "step": row["step"], "time": times.get(row["epoch"]) or near, **row}
        )
    return made, back


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
