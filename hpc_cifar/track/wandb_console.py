"""What rank 0 logs, for W&B's tab Logs: of a job of submitit or of the local executor, whose logs lie in the run directory.

What was handed over is noted before it is, so that no line comes twice; where W&B has not got everything of an upload, the note
is taken back. So a process that was killed may leave a few lines out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from .. import files, redaction, terminal
from ..reading import is_regular
from ..runs import Run

LEDGER = "wandb-console.json"  # bytes that were handed over, by log
LOGS = "*_0_log.out"
MOST = 4 << 20  # bytes of all logs of a run
AT_ONCE = 1 << 18
LONGEST = 2000  # characters of a line
ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\n]*(?:\x07|\x1b\\)?|[PX^_][^\x1b\n]*(?:\x1b\\)?|[ -/]*[0-~])?")


class Console:
    """The logs of one run, as they grow."""

    def __init__(self, run: Run) -> None:
        self._folder, self._ledger = run.submitit, run.path / LEDGER
        found = files.read_object(self._ledger)
        self._known = {name: place for name, place in found.items() if type(place) is int and place >= 0}
        self._before = dict(self._known)

    def new(self, ended: bool) -> Iterator[str]:
        """Whole lines that were added, without keys and escape sequences; those of earlier jobs first.

        Args:
            ended: a last line without an end counts as well.
        """
        for path in sorted(filter(is_regular, self._folder.glob(LOGS)), key=lambda path: (path.stat().st_mtime, path.name)):
            while (text := self._next(path, ended)) is not None:
                yield text

    def back(self) -> None:
        """What was handed over since the upload began has not arrived."""
        files.write_json(self._ledger, self._before)

    def _next(self, path: Path, ended: bool) -> str | None:
        begin, left = self._known.get(path.name, 0), MOST - sum(self._known.values())
        if left <= 0:
            return None
        with path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size < begin:  # another file of that name
                begin = 0
            stream.seek(begin)
            data = stream.read(min(AT_ONCE, left))
        whole = data[: data.rfind(b"\n") + 1]
        if not whole and (ended or len(data) == min(AT_ONCE, left)):
            whole = data
        if not whole:
            return None
        self._known[path.name] = begin + len(whole)
        files.write_json(self._ledger, self._known)
        over = sum(self._known.values()) >= MOST
        said = f"\n(more than {MOST >> 20} MiB: the rest is in {path.name})" if over else ""
        return plain(whole.decode(errors="replace")) + said


def plain(text: str) -> str:
    """Lines of a log as they may be shown anywhere."""
    lines = redaction.redact(terminal.of_log(ESCAPE.sub("", text))).splitlines()
    return "\n".join(line if len(line) <= LONGEST else f"{line[:LONGEST]} ..." for line in lines)
