"""What Slurm says about jobs. Accounting may be off, and Slurm may not answer at all: each is an answer of its own."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import LaunchError
from .script import slurm_words

WAITING = frozenset("PENDING CONFIGURING REQUEUED REQUEUE_FED REQUEUE_HOLD SPECIAL_EXIT RESV_DEL_HOLD".split())  # noqa: SIM905
ACTIVE = frozenset("RUNNING COMPLETING SUSPENDED STOPPED SIGNALING STAGE_OUT RESIZING".split())  # noqa: SIM905
TIMEOUT_S = 30


@dataclass(frozen=True)
class JobState:
    """One job as Slurm sees it: ``state`` is Slurm's long word, ``reason`` why it waits or ended."""

    state: str
    reason: str = ""

    @property
    def waiting(self) -> bool:
        return self.state in WAITING

    @property
    def active(self) -> bool:
        return self.state in ACTIVE

    @property
    def alive(self) -> bool:
        return self.waiting or self.active


@dataclass(frozen=True)
class Answer:
    """States of the jobs that Slurm knows. ``reachable`` tells "not there any more" from "nobody answered"."""

    jobs: dict[str, JobState]
    reachable: bool


def _ask(command: list[str]) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False, env=_environment()
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def _environment() -> dict[str, str]:
    # the user's own SQUEUE_FORMAT and the like change what these commands print; without the length, 123_[0-7,9,...]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SQUEUE_", "SACCT_"))}
    return {**kept, "SLURM_BITSTR_LEN": "0"}


def expand_ids(text: str) -> list[str]:
    """Every job meant by an id as Slurm prints it: waiting elements of an array are one line, ``123_[0-2,7,10-20:5%4]``."""
    array, bracket, rest = text.partition("_[")
    if not bracket:
        return [text]
    found = []
    for part in rest.rstrip("]").partition("%")[0].split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        if first.isdigit() and (last or first).isdigit() and (step or "1").isdigit():
            found += [f"{array}_{index}" for index in range(int(first), int(last or first) + 1, int(step or 1))]
    return found


def _word(text: str) -> str:
    return text.split()[0].rstrip("+") if text.split() else ""


def query(job_ids: Iterable[str]) -> Answer:
    """States of many jobs: one ``squeue``, then one ``sacct`` and one ``scontrol`` for those it does not know."""
    wanted = set(job_ids)
    if not wanted:
        return Answer({}, True)
    found: dict[str, JobState] = {}
    # By user, not by id: squeue fails as a whole for a single id that it has forgotten.
    listing = _ask(["squeue", "--noheader", f"--user={os.getuid()}", "--states=all", "--format=%i|%T|%r"])
    reachable = listing is not None
    for line in (listing or "").splitlines():
        job_id, _, rest = line.partition("|")
        state, _, reason = rest.partition("|")
        if state:
            seen = JobState(_word(state), "" if reason.strip() == "None" else reason.strip())
            found |= {one: seen for one in expand_ids(job_id.strip()) if one in wanted}
    if missing := wanted - set(found):
        accounts = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State,Reason"]
        listing = _ask([*accounts, f"--jobs={','.join(sorted(missing))}"])
        for line in (listing or "").splitlines():
            fields = line.split("|")
            if len(fields) == 3 and fields[1]:
                seen = JobState(_word(fields[1]), "" if fields[2] == "None" else fields[2])
                found |= {one: seen for one in expand_ids(fields[0]) if one in missing}
    if (wanted - set(found)) and not reachable:
        listing = _ask(["scontrol", "--oneliner", "show", "jobs"])
        reachable = listing is not None
        for line in (listing or "").splitlines():
            pairs = dict(re.findall(r"(\w+)=(\S+)", line))
            name = pairs.get("JobId", "")
            if index := pairs.get("ArrayTaskId"):
                name = f"{pairs.get('ArrayJobId', '')}_" + (index if index.isdigit() else f"[{index}]")
            if "JobState" in pairs:
                reason = pairs.get("Reason", "")
                seen = JobState(pairs["JobState"], "" if reason == "None" else reason)
                found = {one: seen for one in expand_ids(name) if one in wanted} | found
    return Answer(found, reachable)


def cancel(job_ids: list[str]) -> None:
    """``scancel``.

    Raises:
        LaunchError: Slurm refused or is not there; that a job has ended already is no error.
    """
    try:
        done = subprocess.run(
            ["scancel", *job_ids], capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise LaunchError("no scancel on this machine: cancel the run where it was submitted") from None
    except subprocess.SubprocessError:
        raise LaunchError(f"scancel did not answer within {TIMEOUT_S} s; the run is marked as cancelled, try again") from None
    if done.returncode != 0 and "already completing or completed" not in done.stderr and "Invalid job id" not in done.stderr:
        raise LaunchError(f"scancel failed: {slurm_words(done.stderr or done.stdout)}")
