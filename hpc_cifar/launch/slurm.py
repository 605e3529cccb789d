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
    # the user's own SQUEUE_FORMAT and the like change what these commands print
    return {name: value for name, value in os.environ.items() if not name.startswith(("SQUEUE_", "SACCT_"))}


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
        if job_id.strip() in wanted and state:
            found[job_id.strip()] = JobState(_word(state), "" if reason.strip() == "None" else reason.strip())
    if missing := wanted - set(found):
        accounts = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State,Reason"]
        listing = _ask([*accounts, f"--jobs={','.join(sorted(missing))}"])
        for line in (listing or "").splitlines():
            fields = line.split("|")
            if len(fields) == 3 and fields[0] in missing and fields[1]:
                found[fields[0]] = JobState(_word(fields[1]), "" if fields[2] == "None" else fields[2])
    if (wanted - set(found)) and not reachable:
        listing = _ask(["scontrol", "--oneliner", "show", "jobs"])
        reachable = listing is not None
        for line in (listing or "").splitlines():
            pairs = dict(re.findall(r"(JobId|JobState|Reason)=(\S+)", line))
            if pairs.get("JobId") in wanted and "JobState" in pairs:
                reason = pairs.get("Reason", "")
                found.setdefault(pairs["JobId"], JobState(pairs["JobState"], "" if reason == "None" else reason))
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
