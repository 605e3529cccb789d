"""What interrupted a run, in its run directory: counted here, and nowhere else.

<run>/interruptions.jsonl        a row for each preemption, time limit and fault since a person last submitted the run
<run>/interruptions-past.jsonl   those before
<run>/endings/<segment>.json     who ended a segment, as what, and what was done; the first one to make the file does it

The script of a job adds rows too, for jobs whose ranks never spoke (``launch/script.py``).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import files, records, runs
from ..records import Ending, Interruption
from . import chain

if TYPE_CHECKING:
    from ..runs import Run

FILE, PAST, ENDINGS = "interruptions.jsonl", "interruptions-past.jsonl", "endings"


def saved_step(run: Run) -> int:
    """Step of the newest checkpoint, by the name that ``latest`` points to; 0 without any."""
    with contextlib.suppress(OSError):
        if found := re.fullmatch(r"step-0*(\d+)", (run.checkpoints / "latest").readlink().name):
            return int(found[1])
    return 0


def rows(run: Run) -> list[Interruption]:
    """Since a person last submitted the run, oldest first; without damaged ones."""
    return [row for row in records.rows(Interruption, run.path / FILE) if not row.problem]


def without_progress(run: Run) -> str | None:
    """What to say of a run that several interruptions in a row have found at the same checkpoint; None if there is nothing."""
    found = rows(run)
    step = found[-1].step if found else None
    same = [row for row in found if row.step == step]
    if len(same) < 2 or saved_step(run) != step:
        return None
    kinds = Counter(row.event for row in same)
    told = ", ".join(f"{kind}: {count} times" if count > 1 else kind for kind, count in kinds.items())
    return f"no checkpoint since step {step} ({told}): give it more time, or checkpoint more often (checkpoint.every_steps)"


def begin_anew(run: Run) -> None:
    """A person submits the run: what interrupted it before counts no more."""
    path = run.path / FILE
    with contextlib.suppress(FileNotFoundError):
        try:
            text = files.read_bytes(path)
        except files.Damaged:  # as a whole, so that nobody counts it
            path.rename(run.path / f"damaged-{FILE}")
            return
        with (run.path / PAST).open("ab") as stream:
            stream.write(text)
        path.unlink()


class RunRecords:
    """See :class:`hpc_cifar.launch.ending.Records`.

    Args:
        job_id: of the job that asks.
    """

    def __init__(self, run: Run, job_id: str) -> None:
        self._run, self._job_id = run, job_id

    def cancelled(self) -> bool:
        return self._run.cancel_marker.exists()

    def finished(self) -> bool:
        return self._run.finished()

    def saved_step(self) -> int:
        return saved_step(self._run)

    def interruptions(self) -> Sequence[Interruption]:
        return rows(self._run)

    def note(self, row: Mapping[str, Any]) -> None:
        files.append_json_line(self._run.path / FILE, {"time": runs.now(), **row})

    def claim(self, segment: str, row: Mapping[str, Any]) -> bool:
        folder = self._run.path / ENDINGS
        folder.mkdir(exist_ok=True)
        try:
            with (folder / f"{segment}.json").open("x", encoding="utf-8") as stream:
                stream.write(json.dumps({"time": runs.now(), **row}) + "\n")
        except FileExistsError:
            return False
        return True

    def settled(self, segment: str, row: Mapping[str, Any]) -> None:
        files.write_json(self._run.path / ENDINGS / f"{segment}.json", {"time": runs.now(), **row, "done": True}, durable=False)

    def outcome(self, segment: str) -> Ending | None:
        found = records.read(Ending, self._run.path / ENDINGS / f"{segment}.json")
        return found if found is not None and found.done else None

    def set_state(self, state: str, reason: str) -> None:
        self._run.update_state(state=state, reason=reason or None)

    def next_link(self) -> str | None:
        return chain.next_link(self._run, self._job_id)
