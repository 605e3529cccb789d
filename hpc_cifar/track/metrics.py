"""``metrics.jsonl``: one JSON object a row, the truth about a run's curves.

``kind`` is ``step``, ``epoch`` or ``event``; rows carry ``epoch`` and ``step`` (updates made so far) and where they apply
``train_loss``, ``train_accuracy``, ``val_loss``, ``val_accuracy``, ``lr``, ``images_per_second``, ``time`` (Unix seconds).
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from .. import files
from .rows import rows_of


class MetricsLog:
    """Appends rows, each flushed; on a resume the rows that will be computed again are dropped first.

    Args:
        path: the file; its folder exists.
        resume_step: the step the run continues from. Later ``step`` and ``epoch`` rows go, events stay.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        rows, _ = rows_of(path)
        begun = max((index for index, row in enumerate(rows) if row.get("event") == "started"), default=0)
        # by the segment before, as far as was logged; those before it were counted when it began
        self.reached = max((int(row.get("step", 0)) for row in rows[begun:]), default=0)
        kept = [row for row in rows if row.get("kind") == "event" or int(row.get("step", 0)) <= resume_step]
        if path.exists():
            # always rewritten: a killed writer may have left a torn last line
            files.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._path, self._stream = path, path.open("a", encoding="utf-8")

    def write(self, kind: str, *, epoch: int, step: int, **values: Any) -> dict[str, Any]:
        """Append one row and return it; a number that JSON cannot hold becomes null."""
        row = {"kind": kind, "epoch": epoch, "step": step, "time": round(time.time(), 3)}
        for key, value in values.items():
            row[key] = None if isinstance(value, float) and not math.isfinite(value) else value
        with files.named_in_errors(self._path):
            self._stream.write(json.dumps(row, allow_nan=False) + "\n")
            self._stream.flush()
        return row

    def close(self) -> None:
        with files.named_in_errors(self._path):  # of what is not written yet
            self._stream.close()
