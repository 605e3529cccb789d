"""Which checkpoint a run has on disk, as the run directory says outside of ``checkpoints/``; without torch.

Shared disks clear old files away. A run whose checkpoints are gone must not begin at step 0 without a word, while one that was
killed before its first checkpoint must. So every checkpoint on disk is noted beside the folder.

<run>/saved.json    step of the newest checkpoint, 0 where none is to be found any more on purpose; when it was written
"""

from __future__ import annotations

import contextlib
import datetime
from typing import Any

from .. import files, records
from ..errors import CheckpointError
from ..records import Result, Saved
from ..runs import Run, now

FILE = "saved.json"
WAY_OUT = "restore it from a copy, or begin again at step 0 with --fresh (of train, or of resume)"
AFTER_A_SAVE = ("stopped", "requeued", "cancelled", "finished")  # events that are written once a checkpoint is on disk


def note(run: Run, step: int) -> None:
    """The newest checkpoint is that of ``step``; a full disk is told by the checkpoint itself."""
    with contextlib.suppress(OSError):
        files.write_json(run.path / FILE, {"step": step, "time": now()}, durable=False)


def newest(run: Run) -> tuple[int, str]:
    """Step of the newest checkpoint that was written, and when (ISO 8601); (0, "") where none was, or nobody knows."""
    said = records.read(Saved, run.path / FILE)
    if said is not None and said.step is not None:
        return said.step, said.time
    return (0, "") if (run.path / "left-out.json").exists() else _by_events(run)


def _by_events(run: Run) -> tuple[int, str]:
    """What follows from the events of the last segment of a run that an older version trained."""
    events = [row for row in files.read_json_lines(run.metrics_file) if row.get("kind") == "event"]
    begun = max((index for index, row in enumerate(events) if row.get("event") == "started"), default=None)
    if begun is None:
        result = run.result() or Result()
        return result.steps or 0, result.ended or ""
    known = [events[begun], *(row for row in events[begun:] if row.get("event") in AFTER_A_SAVE)]
    return _step(known[-1].get("step")), _time(known[-1].get("time"))


def _step(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _time(seconds: Any) -> str:
    try:
        return datetime.datetime.fromtimestamp(float(seconds), datetime.UTC).isoformat(timespec="seconds")
    except (TypeError, ValueError, OverflowError, OSError):
        return ""


def missing(run: Run) -> CheckpointError | None:
    """What to say of a run that has saved checkpoints and has none; None where it may go on, or begin."""
    step, when = newest(run)
    if not step or any(files.whole(path.name.removeprefix("step-")) is not None for path in run.checkpoints.glob("step-*")):
        return None
    return CheckpointError(
        f"{run.checkpoints}: no checkpoint is there, though that of step {step} was written{f' at {when}' if when else ''}; "
        f"some sites clear old files away: {WAY_OUT}"
    )


def older(run: Run, step: int) -> list[str]:
    """A line about checkpoints that are missing where the newest one is that of ``step``."""
    expected, when = newest(run)
    if expected <= step:
        return []
    return [f"the checkpoint of step {expected}{f', written at {when},' if when else ''} is gone; going on from an older one"]
