"""What a run directory knows of a submission before its job has a number.

<run>/submitting.json   from just before sbatch until the job is in jobs.jsonl: the mark of the submission, the coming row of
                        that list without the job id, and the marks of earlier submissions that this one replaces

Whoever submits may be cut off between the two, and Slurm may take a job without saying so. The mark is in the name of the
batch script and in the comment, so that the job can be looked for (``launch/handover.py``); it is in the pickled job too, which
enters itself here when it starts. This module asks nobody: a job on a node needs it, where Slurm's programs may be missing.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import files, records
from ..records import Job, Process, Submission
from ..runs import Run
from . import process

FILE = "submitting.json"
LATE_S = 300.0  # after a submission began; by then a controller has dealt with all that it was sent, or has lost it


@dataclass(frozen=True)
class Open:
    """A submission without a known job.

    ``element`` is the number within an array; ``process`` is who submits, None once that gave up; ``looked_s`` is how long
    after its beginning (seconds) the queue was last found to have no job of it.
    """

    mark: str
    element: int | None
    row: dict[str, Any]
    replaces: tuple[str, ...]
    process: Process | None
    age_s: float
    looked_s: float

    @property
    def is_link(self) -> bool:
        """Whether the run has a job already, behind which this one waits."""
        return "follows" in self.row

    @property
    def in_progress(self) -> bool:
        """Whether somebody is submitting it right now, as far as can be seen from here."""
        if not self.process:
            return False
        if self.process.host != socket.gethostname():
            return self.age_s < LATE_S
        return process.is_alive(self.process)

    def job_id(self, number: str) -> str:
        """The run's own job, where ``number`` is the job, or the array, that Slurm made of the submission."""
        return number if self.element is None else f"{number}_{self.element}"


def new_mark() -> str:
    """Names one submission: what no other script or comment has in it."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"


def begin(run: Run, mark: str, row: dict[str, Any], element: int | None = None) -> None:
    """Before sbatch. An older submission whose job never turned up is replaced: should that job start one day, it ends at once.

    Raises:
        OSError: the file cannot be written.
    """
    values = {"mark": mark, "element": element, "row": row, "replaces": replaced(run), "process": process.identity(os.getpid())}
    # a crash of the machine may lose it; every sbatch is too much to wait for a disk, a hundred times for an array
    files.write_json(run.path / FILE, {**values, "began": time.time()}, durable=False)


def replaced(run: Run, mark: str | None = None) -> list[str]:
    """Marks of the open submissions that another one takes the place of; ``mark`` is that one, if it has begun."""
    old = read(run)
    return [] if old is None else [*old.replaces, *([] if old.mark == mark else [old.mark])]


def read(run: Run) -> Open | None:
    """The run's open submission, if there is one."""
    if not os.path.lexists(f"{run.path}/{FILE}"):  # of nearly all runs
        return None
    path = run.path / FILE
    found = records.read(Submission, path)
    if found is None or not found.mark:
        return None
    if any(job.submission == found.mark for job in run.jobs()):  # cut off between the two
        close(run)
        return None
    try:
        looked = path.stat().st_mtime
    except OSError:  # it has been settled since
        return None
    age_s, looked_s = abs(time.time() - found.began), looked - found.began  # a clock that was set back makes it no younger
    return Open(found.mark, found.element, found.row, found.replaces, found.process, age_s, looked_s)


def problem(run: Run) -> str:
    """Why nobody can say whether the run has an open submission; "" where it can be said."""
    if not os.path.lexists(f"{run.path}/{FILE}"):
        return ""
    found = records.read(Submission, run.path / FILE)
    if found is None:
        return ""
    row = records.row_of(Job, found.row, f"{FILE}: row").problem
    return found.problem or row or ("" if found.mark else f"{FILE}: names no submission")


def settle(run: Run, mark: str | None, job_id: str, row: dict[str, Any], replaces: Sequence[str] = ()) -> None:
    """The job is known. ``mark`` is None for one that is known from the beginning.

    Raises:
        OSError: the list of jobs cannot be written.
    """
    if not any(mark and job.submission == mark and job.job_id == job_id for job in run.jobs()):
        more = {"submission": mark, "replaces": list(replaces)}
        run.add_job(**row, job_id=job_id, **{name: value for name, value in more.items() if value})
    close(run)


def close(run: Run) -> None:
    """There is no job of it, or it is known."""
    with contextlib.suppress(OSError):
        (run.path / FILE).unlink(missing_ok=True)


def give_up(run: Run) -> None:
    """Whoever submits goes on to something else, and does not know whether there is a job."""
    path = run.path / FILE
    if found := files.read_object(path):
        files.write_json(path, {**found, "process": None}, durable=False)


def looked(run: Run) -> None:
    """Slurm has answered that it has no job of it."""
    with contextlib.suppress(OSError):  # the file's age is the record; writing it again might bring back what was settled
        os.utime(run.path / FILE)


def enter(run: Run, mark: str, job_id: str) -> str | None:
    """What a job does first: be in the list of its run. Why it must not train, if it is one too many.

    A submission may have been tried twice, or been replaced by another one, before this job of it was heard of.
    """
    opened, jobs = read(run), run.jobs()
    ours = [job.job_id for job in jobs if job.submission == mark]
    if job_id in ours:
        return None
    if ours:
        return f"job {ours[0]} of the same submission is known"
    if mark in (opened.replaces if opened else ()) or any(mark in job.replaces for job in jobs):
        return "it was submitted again, when nobody knew of this job"
    if opened is not None and opened.mark == mark:
        with contextlib.suppress(OSError):  # a full disk will be met with a better message
            settle(run, mark, job_id, opened.row, opened.replaces)
    return None


def pickle_name(mark: str) -> str:
    """In the run's folder of pickles, until the job has a number."""
    return f".{mark}.pkl"


def place(folder: Path, mark: str, job_id: str) -> None:
    """Have the pickle where submitit looks for it; the job's own script does the same when it starts.

    Raises:
        OSError: it cannot be moved.
    """
    pickle, wanted = folder / pickle_name(mark), folder / f"{job_id}_submitted.pkl"
    if wanted.exists():  # put there by the job; after a requeue it is a newer one
        pickle.unlink(missing_ok=True)
    else:
        pickle.rename(wanted)
