"""Why a job ended before its training could say so, in its own first words: what its logs hold.

A job's script and rank 0 write into ``<job>_0_log.err`` and ``.out``, the other ranks into ``<job>_<rank>_log.*``; a requeued
job appends to them. A line that begins with ``START`` stands where a start of the job begins (see ``launch/guard.sh``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import deaths
from .policy import REMEDIES, Event

MOST_READ = 64 << 10  # of a log, from its beginning and from its end: logs of many gigabytes exist
LONGEST = 300
MOST_RANKS = 4  # whose logs are read when srun says that they ended badly
OURS = "hpc-cifar: "
START = f"{OURS}start "
FOR_MEMORY = f"the job was killed for memory: {REMEDIES[Event.OUT_OF_MEMORY]}"
GOES_ON = "; the job goes on, since setup_may_fail is set"

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)")
# what ended the process that printed it
_ENDED_IT = re.compile(
    r"^Fatal Python error: |: No module named |Error while finding module specification for "
    r"|: exec: .*: (?:not found|Permission denied|No such file)|error: execve\(\): |^FATAL: |: error: pyxis: "
    r"|: bad interpreter: |error while loading shared libraries: |: cannot execute"
)
_LOOKS_WRONG = re.compile(
    r"\b(?:errors?|fatal|failed|failure|cannot|can't|could not|couldn't|unable|no such|not found|denied|unknown|exceeded"
    r"|no space left|unbound variable|killed|aborted|segmentation fault|bus error|core dumped|not permitted|invalid|undefined"
    r"|not recognized|oom[-_ ]kill)\b|\w(?:Error|Exception|NotFound)\b|DUE TO [A-Z ]+",
    re.IGNORECASE,
)
_NOISE = re.compile(
    r"(?i:\bwarnings?\b|\b(?:no|0) errors?\b|cannot be preloaded)|\bINFO\b|^\++ |^submitit INFO|couldn't chdir to|^hpc-cifar: "
)
# what Slurm's programs say when a task has ended: true of each, and the reason of none
_SLURMS = re.compile(r"srun: |slurmstepd(?:-[\w.-]+)?: ")
_TASK = re.compile(r"srun: error: \S+: tasks? ([0-9]{1,9})[\d,-]*: ([^\n]+)")
_DUE_TO = re.compile(r"CANCELLED AT \S+ DUE TO ([A-Z][A-Z ]+)")
_SETUP = re.compile(rf"{OURS}.+ (?:failed|ended the job) with exit code \d+")
_BASHS = re.compile(r"/\S*/(?:slurm_script|guard\.sh): line \d+: ")  # what bash puts before its words
_PYTHONHOME = re.compile(r"\s*PYTHONHOME = '")
_LMOD = "Lmod has detected the following error:"
TRACEBACK = "Traceback (most recent call last):"


@dataclass(frozen=True)
class Words:
    """``text``: one line of at most ``LONGEST`` characters; ``log``: where it stands; ``death``: that a rank was killed."""

    text: str
    log: Path
    death: bool = False


def read(log: Path, begin: int = 0) -> str:
    """The first and the last ``MOST_READ`` bytes of a log from ``begin`` on, as text; "" if there is none."""
    try:
        with log.open("rb") as stream:
            end = stream.seek(0, 2)
            stream.seek(begin)
            head = stream.read(MOST_READ)
            if (left := max(stream.tell(), end - MOST_READ)) > stream.tell():
                stream.seek(left)
                head = head.rpartition(b"\n")[0] + b"\n" + stream.read(MOST_READ).partition(b"\n")[2]
            else:
                head += stream.read(MOST_READ)
    except OSError:
        return ""
    return head.decode("utf-8", errors="replace")


def of_job(folder: Path, job_id: str, *, for_memory: bool = False, certain: bool = False) -> Words | None:
    """The words of a Slurm job whose logs are in ``folder``; None if there are none.

    Args:
        for_memory: Slurm says that the job was out of memory.
        certain: take only what ends a process for certain, such as a traceback; for logs that hold much else.
    """

    def logs(rank: int) -> list[Path]:
        return [folder / f"{job_id}_{rank}_log.{kind}" for kind in ("err", "out")]

    own = logs(0)
    errors = _last_start(read(own[0]))
    if death := _death(errors, for_memory):
        return Words(one_line(death), own[0], death=True)
    others = [path for rank in _tasks(errors) if rank for path in logs(rank)]
    return of_logs([*own, *others], certain=certain)


def of_logs(logs: Sequence[Path], begin: Mapping[Path, int] | None = None, *, certain: bool = False) -> Words | None:
    """The words of these logs, the most telling ones first; None if there are none.

    Args:
        begin: bytes of them that an earlier start wrote; those without a start mark need it.
        certain: as above.
    """
    looks = (_certain,) if certain else _LOOKS
    texts = [(log, _last_start(read(log, (begin or {}).get(log, 0)))) for log in logs]
    found = ((look(text), log) for look in looks for log, text in texts)
    return next((Words(one_line(words), log) for words, log in found if words), None)


def of_text(text: str) -> str:
    """The words of one log; "" if it is empty."""
    said = _last_start(text)
    return next((one_line(words) for look in _LOOKS if (words := look(said))), "")


def _death(errors: str, for_memory: bool) -> str:
    """That a rank was killed, with what helps; else "". srun kills those that are left when one has failed."""
    death, first = deaths.in_log(errors), _TASK.search(errors)
    if death is not None and (death.signal is None or for_memory or (first and not first[2].startswith("Exited"))):
        event = Event.OUT_OF_MEMORY if for_memory else death.event
        return f"{death}: {REMEDIES[event]}"
    return FOR_MEMORY if for_memory else ""


def one_line(text: str) -> str:
    """``text`` as one line that a terminal and a table can show: without control characters and keys."""
    from ..redaction import redact_beginning

    plain, _ = redact_beginning(_BASHS.sub("", " ".join(text[: 64 * LONGEST].split())), 32 * LONGEST)
    shown = "".join(char if char.isprintable() else _escaped(char) for char in plain)
    return shown if len(shown) <= LONGEST else shown[: LONGEST - 3] + "..."


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", errors="backslashreplace").decode("ascii")


def _last_start(text: str) -> str:
    """What was written since the last start mark, or all of it, without colours."""
    text = _ESCAPES.sub("", text)
    at = max(text.rfind(f"\n{START}"), 0 if text.startswith(START) else -1)
    return text if at < 0 else text[at:].lstrip("\n").partition("\n")[2]


def _tasks(text: str) -> list[int]:
    """The ranks that ended badly, by srun's word."""
    return list(dict.fromkeys(int(match[1]) for match in _TASK.finditer(text)))[:MOST_RANKS]


def _certain(text: str) -> str:
    """What ended the job for certain: a line of its setup, a Python traceback, a program that could not start."""
    lines = text.splitlines()
    begin = 0
    for number, line in enumerate(lines):
        if not _SETUP.match(line):
            continue
        said = line.removeprefix(OURS)
        if not said.endswith(GOES_ON):
            before = "\n".join(lines[begin:number])
            words = _likely(before) or _last(before)
            return f"{said}: {words}" if words else said
        begin = number + 1
    allowed = f" (before that, {_said(lines[begin - 1])})" if begin else ""
    rest = lines[begin:]
    for number, line in enumerate(rest):
        if line.startswith(TRACEBACK):
            return _end_of_traceback(rest[number:]) + allowed
        if _ENDED_IT.search(line) and not _NOISE.search(line):
            return _whole(line, rest) + allowed
    return ""


def _allowed(text: str) -> str:
    """What failed of the setup and was allowed to, with what went wrong after it."""
    found = [line for line in text.splitlines() if _SETUP.match(line) and line.endswith(GOES_ON)]
    if not found:
        return ""
    rest = text.rpartition(found[-1])[2]
    words = _likely(rest) or _last(rest)
    return f"{words} (before that, {_said(found[-1])})" if words else _said(found[-1])


def _said(line: str) -> str:
    return line.removeprefix(OURS).removesuffix(GOES_ON)


def _whole(line: str, lines: Sequence[str]) -> str:
    """A line that ended a process, with what the lines around it say more exactly."""
    if line.startswith("Fatal Python error"):
        home = next((other.strip() for other in lines if _PYTHONHOME.match(other)), "")
        return f"{line} ({home})" if home else line
    if "pyxis: " in line:  # it prints the log of enroot
        return next((other for other in lines if "pyxis: " in other and "[ERROR]" in other), line)
    return line


def _end_of_traceback(lines: Sequence[str]) -> str:
    """The last line of a traceback, or of the last one that goes with it."""
    found, inside = lines[0], False
    for number, line in enumerate(lines):
        if line.startswith(TRACEBACK):
            inside = True
        elif inside and line[:1].strip():  # neither empty nor indented
            found, inside = line, False
            following = [other for other in lines[number + 1 : number + 6] if other.strip()]
            if not any(other.startswith(TRACEBACK) for other in following[:2]):
                break
    return found


def _likely(text: str) -> str:
    """The first line that looks like an error, if it is not one of Slurm's."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if _LOOKS_WRONG.search(line) and not _NOISE.search(line) and not _SLURMS.match(line):
            return " ".join([line, *_rest_of_it(line, lines[number + 1 :])])
    return ""


def _rest_of_it(line: str, after: Sequence[str]) -> Sequence[str]:
    """The lines over which a program has broken its one sentence."""
    if line.startswith(_LMOD):
        ends = (number for number, more in enumerate(after) if not more.strip() or more.startswith("While processing"))
        return after[: next(ends, len(after))]
    return after[:1] if line.rstrip().endswith(":") else []


def _last(text: str) -> str:
    """The last line that says something, if it is not one of Slurm's."""
    lines = [line for line in text.splitlines() if line.strip() and not _NOISE.search(line) and not _SLURMS.match(line)]
    return lines[-1] if lines else ""


def _of_slurm(text: str) -> str:
    """What Slurm's programs say: true whenever a task has ended, and so the last resort."""
    if due := _DUE_TO.search(text):
        return f"Slurm ended the job due to {due[1].strip().lower()}"
    return next((line for line in text.splitlines() if _SLURMS.match(line)), "")


_LOOKS = (_certain, _allowed, _likely, _last, _of_slurm)
