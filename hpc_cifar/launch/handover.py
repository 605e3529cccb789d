"""From a batch script to a job that is known: what Slurm took is found again, whoever was cut off.

``sbatch`` may say that nobody answered though the job is queued, may never end, and may be interrupted with the command that
called it. So each submission has a mark (``launch/submission.py``), by which the queue is searched before sbatch is tried once
more.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from submitit.core.utils import DelayedSubmission

from .. import files, owner
from ..errors import HpcCifarError, Interrupted, LaunchError, NoAnswer, NoCluster
from ..runs import Run, now
from . import slurm, submission
from .script import NO_CONFIGURATION, SlurmExecutor, clean_environment, slurm_words
from .submission import Open

PAUSES_S = (2.0, 5.0, 10.0)  # before a look for the job, one after each try
SECOND_LOOK_S = 2.0  # after one without a find: a controller that answers again may not have read all yet
SBATCH_LIMIT_S = 60.0  # Slurm's own limit is 10 s where the site left it; while its queue is full, sbatch waits longer
LATER_LIMIT_S, TELL_S = 20.0, 10.0  # for a try after one without an answer; until it is said that nothing has come
LAST_WORD_S = 12.0  # for an sbatch under way, once the command has been interrupted
FORGETS_S = 200.0  # age from which Slurm may have forgotten an ended job (MinJobAge is 300 s), so that accounting is asked
POLL_S = 0.1
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
UNKNOWN = "whether it has the job is not known; hpc-cifar resume looks for it, and submits the run again if there is none"


# ---- signals -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def handled(handler: Any) -> Iterator[None]:
    """Have the stop signals go to ``handler``, except those that are ignored (nohup, a shell's background)."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in STOPS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def raise_interrupted(number: int, frame: FrameType | None) -> None:
    """As a handler: TERM and HUP become errors as Ctrl-C is one, so that what is half done can be put in order."""
    raise Interrupted(number)


# ---- look ----------------------------------------------------------------------------------------------------------------


def look(marks: Collection[str], age_s: float = 0.0) -> dict[str, list[str]] | None:
    """Numbers of the jobs or arrays with each mark, those first that wait or run; None if Slurm does not answer.

    Args:
        age_s: since when the oldest of them may be there.
    """
    reply = slurm.ask(["squeue", "--all", "--noheader", f"--user={owner.uid()}", "--states=all", "--format=%F|%T|%o|%k"])
    if reply.code != 0 and not reply.unanswered:  # some sites do without squeue
        reply = slurm.ask(["scontrol", "--all", "--oneliner", "show", "jobs"])
    if reply.code != 0:
        return None
    lines = reply.out.splitlines()
    if age_s > FORGETS_S and not all(any(mark in line for line in lines) for mark in marks):
        since = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - age_s - 3600))
        told = slurm.ask(["sacct", "-nPX", f"--starttime={since}", "--format=JobID,State,SubmitLine,Comment"])
        lines += told.out.splitlines() if told.code == 0 else []
    found: dict[str, dict[str, bool]] = {mark: {} for mark in marks}
    for line in lines:
        for mark in marks:
            number = re.match(r"(\d+)", line) or re.search(r"\bArrayJobId=(\d+)", line) or re.match(r"JobId=(\d+)", line)
            state = re.search(r"^\S+?\|(\w+)|\bJobState=(\w+)", line)
            if mark in line and number and state:
                word = state[1] or state[2]
                alive = word in slurm.WAITING | slurm.ACTIVE
                if word != "REVOKED":  # it went to another cluster of the federation
                    found[mark][number[1]] = alive or found[mark].get(number[1], False)
    return {mark: sorted(ids, key=lambda one: not ids[one]) for mark, ids in found.items()}


# ---- submit --------------------------------------------------------------------------------------------------------------


class _Try:
    """One submission: ``ids`` are the jobs that are known of it, ``unsure`` is whether there may be others."""

    def __init__(self, made: SlurmExecutor, path: Path, noted: list[int]) -> None:
        self.made, self.path, self.noted = made, path, noted
        self.ids: list[str] = []
        self.unsure = False

    def number(self) -> str:
        """Ask sbatch until there is a job; its number.

        Raises:
            LaunchError: Slurm refused; its own words in one line.
            NoAnswer: it said nothing, again and again, and no job can be seen.
            Interrupted: a stop signal came.
        """
        words, may_ask, told = "", True, False
        for pause in PAUSES_S:
            if may_ask:
                reply = self._sbatch()
                if reply.code == 0 and (said := re.search(r"job (\d+)", reply.out)):
                    return self._keep([said[1]])
                words = slurm_words(f"{reply.err}\n{reply.out}")
                if any(sign in words.lower() for sign in NO_CONFIGURATION):
                    raise NoCluster(
                        "no Slurm cluster answers here, though its programs are installed: use --cluster local to run on this "
                        f"machine, or --dry-run to see the script ({words})"
                    )
                if (reply.code or 0) > 0 and not reply.unanswered:
                    raise LaunchError(f"sbatch refused the job: {words}")
                self.unsure = True
                self._end_if_interrupted()
            if not told:
                _say(f"Slurm did not answer ({words}); looking for the job")
                told = True
            for seconds in (pause, SECOND_LOOK_S):
                self._rest(seconds)
                seen = look([self.made.mark])
                if seen and (ids := seen[self.made.mark]):
                    _say(f"Slurm has the job: {ids[0]}")
                    return self._keep(ids)
                self._end_if_interrupted()
                may_ask = seen is not None  # while nobody can say what is queued, another sbatch might be one too many
                if not may_ask:
                    break
        raise NoAnswer(f"Slurm did not answer ({words}): {UNKNOWN}")

    def _keep(self, ids: list[str]) -> str:
        self.ids = ids
        if self.unsure and ids:  # one try may have come through late, beside the next one
            seen = look([self.made.mark]) or {}
            self.ids = list(dict.fromkeys([*ids, *seen.get(self.made.mark, [])]))
        if extra := self.ids[1:]:
            with contextlib.suppress(LaunchError):  # else it ends as soon as it starts
                slurm.cancel(extra)
        return self.ids[0]

    def _sbatch(self) -> slurm.Reply:
        command = self.made._make_submission_command(self.path)
        try:  # out of the reach of a Ctrl-C: what it has begun, it tells
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                encoding="utf-8", errors="replace", process_group=0,
            )  # fmt: skip
        except OSError as error:
            raise LaunchError(f"{command[0]} cannot be run: {error}") from None
        first_s = min(SBATCH_LIMIT_S, LATER_LIMIT_S) if self.unsure else SBATCH_LIMIT_S
        began, limit_s, told = time.monotonic(), first_s, False
        with child:
            while True:
                try:
                    out, err = child.communicate(timeout=POLL_S)
                    return slurm.Reply(out, err, child.returncode)
                except subprocess.TimeoutExpired:
                    pass
                past_s = time.monotonic() - began
                if past_s > TELL_S and not told and not self.noted:
                    _say(f"sbatch has not answered for {TELL_S:.0f} s; it is waited for up to {limit_s:.0f} s")
                    told = True
                if self.noted and limit_s == first_s:
                    limit_s = min(limit_s, past_s + LAST_WORD_S)
                    _say("interrupted; waiting for sbatch, which may have submitted already")
                if past_s > limit_s:
                    return self._ended(child, past_s)

    def _ended(self, child: subprocess.Popen[str], past_s: float) -> slurm.Reply:
        out = err = ""
        os.killpg(child.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process of a wrapper may have left the group, and live on
            out, err = child.communicate(timeout=1)
        return slurm.Reply(out, f"{err}\nsbatch: error: sbatch did not answer within {past_s:.0f} s", None)

    def _rest(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.noted and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(POLL_S, left))

    def _end_if_interrupted(self) -> None:
        if self.noted:
            self.ids = (look([self.made.mark]) or {}).get(self.made.mark, [])
            raise Interrupted(self.noted[0])


def submit(
    made: SlurmExecutor,
    jobs: Sequence[Any],
    members: Sequence[tuple[Run, dict[str, Any]]] = (),
    waiting: list[Run] | None = None,
) -> str:
    """Hand jobs to sbatch, as one array if the executor is for one; the number of the job or array.

    However this ends, each run's job is in its list, or has been cancelled, or the run directory says that nobody knows; and
    the pickles are where the job finds them.

    Args:
        members: the run of each job, and its row for ``jobs.jsonl`` without the job id.
        waiting: these runs are taken off this list once their jobs are known: what goes wrong later is not about them.

    Raises:
        LaunchError: Slurm refused, or a file cannot be written.
        NoAnswer: whether there is a job is not known.
        Interrupted: a stop signal came: the job is withdrawn, or, where it was known already, submitted all the same.
    """
    array = "map_count" in made.parameters
    folders = [made.folder.parent.parent / str(index) / "submitit" for index in range(len(jobs))] if array else [made.folder]
    path = (made.folder.parent.parent if array else made.folder) / f".submission_file_{made.mark}.sh"
    text, noted = made.script(), list[int]()
    attempt = _Try(made, path, noted)
    with handled(lambda number, _: noted.append(number)), clean_environment(text):
        try:
            for folder, job in zip(folders, jobs, strict=True):
                owner.make(folder, owner.PRIVATE)
                delayed = DelayedSubmission(job)
                delayed.set_timeout(made.parameters["time"], made.max_num_timeout)
                delayed.dump(folder / submission.pickle_name(made.mark))
                (folder / submission.pickle_name(made.mark)).chmod(0o600)  # whoever writes it decides what the job runs
            files.write_text(path, text, durable=False)
            for index, (run, row) in enumerate(members):
                submission.begin(run, made.mark, row, index if array else None)
            if noted:
                raise Interrupted(noted[0])
            number = attempt.number()
            if noted:
                raise Interrupted(noted[0])
            attempt.ids = attempt.ids[:1]
            ids = [f"{number}_{index}" for index in range(len(jobs))] if array else [number]
            for folder, job_id in zip(folders, ids, strict=True):
                submission.place(folder, made.mark, job_id)
                files.write_text(folder / f"{job_id}_submission.sh", text, durable=False)
            path.rename(path.with_name(f"{number}_submission.sh"))
            with ThreadPoolExecutor(16) as pool:  # each is one fsync
                list(pool.map(lambda one, job_id: _settle(one[0], one[1], made.mark, job_id), members, ids))
        except BaseException as error:
            _put_in_order(attempt, members, error)
            if isinstance(error, OSError):
                raise LaunchError(f"the job's files cannot be written: {error}") from None
            raise
        for run, _ in members:
            if waiting and run in waiting:
                waiting.remove(run)
    if noted:
        _say(f"job {number} is submitted all the same")
        raise Interrupted(noted[0])
    return number


def _settle(run: Run, row: dict[str, Any], mark: str, job_id: str) -> None:
    submission.settle(run, mark, job_id, row, submission.replaced(run, mark))


def _put_in_order(attempt: _Try, members: Sequence[tuple[Run, dict[str, Any]]], error: BaseException) -> None:
    """After a submission that failed: its job is cancelled, or there is none, or the run directory says that one may come."""
    array, mark = "map_count" in attempt.made.parameters, attempt.made.mark
    stays, said = True, ""
    if attempt.ids:
        try:
            slurm.cancel(attempt.ids)
            stays, said = False, f"job {attempt.ids[0]} was withdrawn"
        except LaunchError as problem:
            said = f"job {attempt.ids[0]} could not be withdrawn: {problem}"
    elif attempt.unsure and isinstance(error, Interrupted):
        said = "whether Slurm has the job is not known; it would end as soon as it starts"
    for index, (run, row) in enumerate(members):
        with contextlib.suppress(OSError):
            for number in attempt.ids:
                submission.settle(run, mark, f"{number}_{index}" if array else number, row, submission.replaced(run, mark))
            if said and stays and "follows" not in row:
                files.write_text(run.cancel_marker, now() + "\n", durable=False)
            if attempt.unsure and not attempt.ids:
                submission.give_up(run)
            else:
                submission.close(run)
    if isinstance(error, Interrupted):
        error.args = (said,) if said else ()
    if said:
        _say(said)


def _say(words: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
        print(f"hpc-cifar: {words}", file=sys.stderr, flush=True)


# ---- afterwards ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unsettled:
    """An open submission of which no job was found; ``answered`` is False if Slurm could not be asked."""

    opened: Open
    answered: bool


def adopt(runs: Sequence[Run], *, anew: bool = False) -> dict[Run, Unsettled]:
    """Find the jobs of submissions that were cut off, with one question; the runs of which none was found.

    Args:
        anew: ask also where Slurm had no such job long after the submission.
    """
    left = {}
    due: dict[Run, Open] = {}
    for run in runs:
        if (opened := submission.read(run)) is None:
            continue
        settled = not anew and opened.looked_s > submission.LATE_S
        left[run] = Unsettled(opened, settled or opened.in_progress)
        if not settled and not opened.in_progress and _is_ours(run, opened):
            due[run] = opened
    if not due:
        return left
    found = look({opened.mark for opened in due.values()}, max(opened.age_s for opened in due.values()))
    for run, opened in due.items():
        if found is None:
            continue
        left[run] = Unsettled(opened, True)
        with contextlib.suppress(OSError):  # somebody who may only read
            if not found[opened.mark]:
                submission.looked(run)
            for number in found[opened.mark]:
                _take(run, opened, opened.job_id(number))
                left.pop(run, None)
    return left


def _is_ours(run: Run, opened: Open) -> bool:
    """Whether this user's queue on this cluster is where its job would be."""
    with contextlib.suppress(OSError):
        here, name = slurm.configuration().get("ClusterName"), opened.row.get("slurm_cluster")
        return owner.is_own(run.path) and (not name or not here or name == here)
    return False


def _take(run: Run, opened: Open, job_id: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        submission.place(run.submitit, opened.mark, job_id)
    if not opened.is_link:  # it failed since nobody answered; the job itself has not begun
        run.update_state(when=lambda old: old.state == "failed", state="pending", reason=None)
    submission.settle(run, opened.mark, job_id, opened.row, opened.replaces)


def told(error: BaseException) -> str:
    """Why a run was not submitted, for its state."""
    if isinstance(error, HpcCifarError):
        return str(error)
    if isinstance(error, Exception):
        return f"not submitted: {type(error).__name__}: {error}"
    more = f"; {error}" if isinstance(error, Interrupted) and str(error) else ""
    return f"not submitted: the command was interrupted{more}"
