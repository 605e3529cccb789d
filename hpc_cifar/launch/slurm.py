"""What Slurm says about jobs. Accounting may be off, and Slurm may not answer at all: each is an answer of its own."""

from __future__ import annotations

import datetime
import functools
import os
import re
import subprocess
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from .. import owner
from ..errors import LaunchError
from ..files import whole
from ..records import JOB_ID
from .policy import Word

WAITING = frozenset("PENDING CONFIGURING EXPEDITING REQUEUED REQUEUE_FED REQUEUE_HOLD SPECIAL_EXIT RESV_DEL_HOLD".split())  # noqa: SIM905
ACTIVE = frozenset("RUNNING COMPLETING SUSPENDED STOPPED SIGNALING STAGE_OUT RESIZING".split())  # noqa: SIM905
ENDED_ALREADY = ("already completing or completed", "Invalid job id")
TIMEOUT_S = 30
LONGEST_LIST = 1 << 20  # characters of a list of elements that are read
_SPAN = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?(?::([0-9]{1,9}))?")
LOOK_TIMEOUT_S = 15  # for a question only; Slurm's own programs give up after 10 s where the site left that as it is
NO_ANSWER = (
    *("timed out", "unable to contact", "connection refused", "zero bytes were transmitted", "in standby mode"),
    *("communication connection failure", "communication shutdown failure", "message send failure", "message receive failure"),
    *("fetch_config", "fetch config"),
)
"""Words of Slurm's programs when nobody answers; none of them is about the request itself."""


@dataclass(frozen=True)
class JobState:
    """One job as Slurm sees it: ``state`` is Slurm's long word, ``reason`` why it waits or ended.

    ``start`` is when it started or, as Slurm estimates, will start (UTC, ISO 8601); ``nodes`` is Slurm's list of them.
    """

    state: str
    reason: str = ""
    start: str | None = None
    nodes: str | None = None

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
    """States of the jobs that Slurm knows. ``reachable`` tells "not there any more" from "nobody answered".

    ``hidden`` are jobs of other users that Slurm may have and not show to this one.
    """

    jobs: dict[str, JobState]
    reachable: bool
    hidden: frozenset[str] = frozenset()

    def is_gone(self, job_id: str) -> bool:
        """Whether Slurm has said that it has no such job."""
        return self.reachable and job_id not in self.jobs and job_id not in self.hidden


@dataclass(frozen=True)
class Reply:
    """What a Slurm command printed; ``code`` is None where it is not there or did not come back."""

    out: str
    err: str
    code: int | None

    @property
    def unanswered(self) -> bool:
        """Whether it is Slurm that did not answer, rather than the request that was wrong."""
        return self.code is None or (self.code != 0 and any(sign in self.err.lower() for sign in NO_ANSWER))


def ask(command: list[str], *, text: str | None = None, timeout_s: float = LOOK_TIMEOUT_S) -> Reply:
    """Run one of Slurm's programs with ``text`` on its standard input; never raises."""
    try:
        done = subprocess.run(
            command, input=text or "", capture_output=True, encoding="utf-8", errors="replace", timeout=timeout_s, check=False,
            env=_environment(),
        )  # fmt: skip
    except FileNotFoundError:
        return Reply("", f"no {command[0]} on this machine", None)
    except subprocess.TimeoutExpired:
        return Reply("", f"{command[0]} did not answer within {timeout_s:g} s", None)
    except (OSError, subprocess.SubprocessError) as error:
        return Reply("", f"{command[0]} cannot be run: {error}", None)
    return Reply(done.stdout, done.stderr, done.returncode)


def is_job_id(text: str) -> bool:
    """Whether it is a number of a job of Slurm's, and not an option of its programs."""
    return JOB_ID.fullmatch(text) is not None


def checked_ids(job_ids: Iterable[str]) -> list[str]:
    """Job ids that came out of files, before one of Slurm's programs gets them as arguments.

    Raises:
        LaunchError: one is something else.
    """
    found = list(job_ids)
    for one in found:
        if not is_job_id(one):
            raise LaunchError(f"{one[:40]!a}: is not the number of a Slurm job, such as 123 or 123_4; jobs.jsonl is damaged")
    return found


def _environment() -> dict[str, str]:
    # the user's own SQUEUE_FORMAT, SLURM_TIME_FORMAT and the like change what these commands print
    others = ("SQUEUE_", "SACCT_", "SINFO_", "SCONTROL_", "SCANCEL_", "SLURM_TIME_FORMAT")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    return {**kept, "SLURM_BITSTR_LEN": "0"}  # else the elements of an array end in "..."


@functools.cache
def configuration() -> dict[str, str]:
    """``scontrol show config`` of the Slurm that answers here; empty where none does."""
    lines = (line.partition("=") for line in ask(["scontrol", "show", "config"]).out.splitlines())
    return {name.strip(): value.strip() for name, sign, value in lines if sign}


def utc_of(stamp: str) -> str | None:
    """Slurm's local time as UTC, ISO 8601; None for ``N/A``, ``Unknown`` and the like."""
    try:
        return datetime.datetime.fromisoformat(stamp.strip()).astimezone(datetime.UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError):
        return None


def _elements(text: str) -> tuple[str, list[range]]:
    """Array and elements meant by an id as Slurm prints it: waiting ones are one line, ``123_[0-2,7,10-20:5%4]``."""
    array, _, rest = text.partition("_[")
    found = []
    for part in rest[:LONGEST_LIST].rstrip("]").partition("%")[0].split(","):
        if form := _SPAN.fullmatch(part):
            first, last, step = int(form[1]), int(form[2] or form[1]), int(form[3] or 1)
            found.append(range(first, last + 1, max(1, step)))
    return array, found


def expand_ids(text: str, wanted: Collection[str]) -> list[str]:
    """The jobs of ``wanted`` that are meant by an id as Slurm prints it: an array may have millions of others."""
    if "_[" not in text:
        return [text] if text in wanted else []
    array, spans = _elements(text)
    asked = {one: whole(one.removeprefix(f"{array}_")) for one in wanted if one.startswith(f"{array}_")}
    return [one for one, index in asked.items() if index is not None and any(index in span for span in spans)]


def _word(text: str) -> str:
    return text.split()[0].rstrip("+") if text.split() else ""


def _plain(text: str) -> str:
    return "" if text.strip() in ("None", "(null)", "N/A") else text.strip()


def query(job_ids: Iterable[str], ended: Collection[str] = (), others: Collection[str] = ()) -> Answer:
    """States of many jobs: one ``squeue``, and one ``sacct`` for those it does not know, where there is accounting.

    Args:
        ended: jobs whose end is known already; only ``squeue`` is asked whether they are back.
        others: those of other users, for which ``squeue`` is asked once more.
    """
    wanted = {one for one in job_ids if is_job_id(one)}  # another one is known to nobody
    if not wanted:
        return Answer({}, True)
    found: dict[str, JobState] = {}
    # By user, not by id: squeue fails as a whole for a single id that it has forgotten.
    # --all: else jobs in hidden partitions are left out. In a federation it also lists those that another cluster took.
    queue = ["squeue", "--all", "--noheader", "--states=all", "--format=%i|%T|%r|%S|%N"]
    listing = ask([*queue, f"--user={owner.uid()}"])
    reachable = listing.code == 0
    lines = listing.out.splitlines() if reachable else []
    hidden: set[str] = set()
    if reachable and (theirs := wanted & set(others)):
        told = ask([*queue, f"--jobs={','.join(sorted(theirs))}"])
        lines += told.out.splitlines() if told.code == 0 else []
        # "Invalid job id" is said of one, and does not say of which of several
        certain = told.code == 0 or (len(theirs) == 1 and ENDED_ALREADY[1] in told.err)
        if not certain or "jobs" in configuration().get("PrivateData", "").split(","):
            hidden = theirs
    for line in lines:
        job_id, state, reason, start, nodes, *_ = [*line.split("|"), "", "", "", ""]
        if state and _word(state) != "REVOKED":
            seen = JobState(_word(state), _plain(reason), utc_of(start), _plain(nodes) or None)
            found |= dict.fromkeys(expand_ids(job_id.strip(), wanted), seen)
    if missing := wanted - set(found) - set(ended):
        # without accounting this ends at once and asks nobody
        accounts = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State,Reason,Start,NodeList"]
        told = ask([*accounts, f"--jobs={','.join(sorted(missing))}"])
        for line in told.out.splitlines() if told.code == 0 else ():
            job_id, state, reason, start, nodes, *_ = [*line.split("|"), "", "", "", ""]
            if state:
                seen = JobState(_word(state), _plain(reason), utc_of(start), _hosts(nodes))
                found |= dict.fromkeys(expand_ids(job_id, missing), seen)
    if (wanted - set(found)) and not reachable and not listing.unanswered:
        told = ask(["scontrol", "--all", "--oneliner", "show", "jobs"])
        reachable = told.code == 0
        for line in told.out.splitlines() if reachable else ():
            pairs = dict(re.findall(r"\b(\w+)=(\S+)", line))
            name = pairs.get("JobId", "")
            if index := pairs.get("ArrayTaskId"):
                name = f"{pairs.get('ArrayJobId', '')}_" + (index if whole(index) is not None else f"[{index}]")
            if "JobState" in pairs:
                begun, hosts = utc_of(pairs.get("StartTime", "")), _plain(pairs.get("NodeList", ""))
                seen = JobState(pairs["JobState"], _plain(pairs.get("Reason", "")), begun, hosts or None)
                found = dict.fromkeys(expand_ids(name, wanted), seen) | found
    return Answer(found, reachable, frozenset(hidden - set(found)))


@dataclass(frozen=True)
class Evidence:
    """What a job sees of its own end: ``state`` and ``reason`` in Slurm's words, "" where nobody could be asked.

    Slurm calls a job COMPLETING while its processes are told to end, whatever ended it. What tells the cases apart was the same
    on 22.05, 24.11 and 26.05: a cancelled job has ``PreemptTime=None``; a preempted one that is not requeued has the time
    there; one that Slurm has put back into the queue has no such field, but one restart more. The next start knows no time.

    ``preempted`` and ``ended`` are these times (UTC, ISO 8601); ``restarts`` is how often the job was requeued. They are known
    only if the answer is ``whole``, and not ``squeue``'s.
    """

    state: str = ""
    reason: str = ""
    preempted: str | None = None
    ended: str | None = None
    restarts: int = 0
    whole: bool = True

    @property
    def by_preemption(self) -> bool:
        """Whether a preemption ends the job: it has a grace time, or had none.

        A job that was cancelled in its grace time has the time of the preemption too, but ends later than that. So does one
        that used up its grace time; Slurm does not tell these two apart, and both are taken for the first.
        """
        if self.preempted is None:
            return False
        if self.state != "COMPLETING" or self.ended is None:
            return not self.state.startswith("CANCELLED")
        between = datetime.datetime.fromisoformat(self.ended) - datetime.datetime.fromisoformat(self.preempted)
        return between.total_seconds() <= 1


def evidence(job_id: str) -> Evidence:
    """Ask about one job from inside; never raises.

    Args:
        job_id: ``123_4`` for an element of an array: the plain number of one of the elements means the whole array.
    """
    if not is_job_id(job_id):
        return Evidence()
    told = ask(["scontrol", "--oneliner", "show", "job", job_id])
    # what stands before and after these may hold anything: names, comments, command lines
    found = re.search(r" JobState=(\S+) Reason=(.*?) Dependency=(.*?) Partition=", told.out) if told.code == 0 else None
    if found is not None:
        fields = dict(re.findall(r"\b(\w+)=(\S+)", found[3]))
        preempted, ended = (utc_of(fields.get(name, "")) for name in ("PreemptTime", "EndTime"))
        restarts = fields.get("Restarts", "")
        return Evidence(found[1], _plain(found[2]), preempted, ended, whole(restarts) or 0)
    told = ask(["squeue", "--noheader", "--states=all", "--format=%T %r", "--jobs", job_id])
    state, _, reason = (told.out.strip().splitlines() or [""])[0].strip().partition(" ")
    return Evidence(state, _plain(reason), whole=False) if told.code == 0 else Evidence()


def word_of(seen: Evidence, restarts: int) -> Word:
    """The word on a job that asks about itself.

    COMPLETING without any reason is a cancel; after the loss of a node of a job that may not be requeued it has the reason
    NodeDown, at the time limit TimeLimit (seen on 22.05).

    Args:
        restarts: how often the job had been requeued when it began.
    """
    if not seen.state:
        return Word.NONE
    if seen.restarts > restarts or seen.state in WAITING:
        return Word.QUEUED
    if seen.state.startswith("CANCELLED"):
        return Word.CANCELLED
    if seen.reason == "TimeLimit":
        return Word.TIME_LIMIT
    if seen.by_preemption:
        return Word.PREEMPTED if seen.state == "RUNNING" else Word.PREEMPTED_ENDING
    if seen.state != "COMPLETING":
        return Word.RUNNING
    if seen.reason == "NodeDown":
        return Word.NODE_LOST
    if not seen.whole:  # a preemption and a cancel look the same
        return Word.NONE
    return Word.ENDING if seen.reason or seen.preempted else Word.CANCELLED


def _hosts(text: str) -> str | None:
    return None if text.strip() in ("", "None assigned") else text.strip()


def cancel(job_ids: list[str]) -> None:
    """``scancel``.

    Raises:
        LaunchError: Slurm refused or is not there, or an id is none; that a job has ended already is no error.
    """
    from .script import slurm_words  # what jobs ask of this module needs no configuration

    reply = ask(["scancel", *checked_ids(job_ids)], timeout_s=TIMEOUT_S)
    if reply.code is None:
        raise LaunchError(f"{reply.err}; the run is marked as cancelled: try again, where it was submitted")
    if reply.unanswered:
        raise LaunchError(f"Slurm did not answer ({slurm_words(reply.err)}): try again")
    bad = [line for line in reply.err.splitlines() if line.strip() and not any(ok in line for ok in ENDED_ALREADY)]
    if reply.code != 0 and bad:
        raise LaunchError(f"scancel failed: {slurm_words(chr(10).join(bad))}")
