"""The state of runs: from the run directory first, Slurm second, local processes third."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Sequence
from typing import Any

from .. import files, owner, reading, records
from ..plan import Plan
from ..records import Job, Process, Result, RunState, Waiting
from ..runs import Run
from ..track import identity
from . import age, first_words, handover, interruptions, local, process, remaining, slurm, submission
from .policy import Event

ENDED = frozenset(("finished", "failed", "cancelled", "stopped"))
HIDDEN = "its job is another user's, which Slurm does not show here; this is what the run last wrote"
VANISHED = "processes ended without a result"
# Slurm forgets a waiting element of an array as soon as it is cancelled
NEVER_STARTED = "the job left the queue before it started: cancelled there, or its node could not start it"
CUT_OFF = "its submission was cut off, and Slurm has no job of it: continue with hpc-cifar resume"
GONE = "its run directory is gone"
START_GRACE_S = 15.0  # between the record of a local job and its first process


@dataclasses.dataclass(frozen=True)
class Status:
    """One row of ``status --json``; the field names are the contract, and what does not apply is None.

    ``estimated_start`` (UTC, ISO 8601) and ``nodes`` (Slurm's list) are Slurm's word on a job that waits, or runs;
    ``images_per_second`` is that of the last steps of a run that trains; ``gpu_hours_planned`` is the most that one job of the
    run may use, ``gpu_hours_left`` what is left of that to the present job, both None without GPUs; ``wandb``
    is the address of the run in W&B, once it is there.
    """

    run: str
    state: str
    job_id: str | None
    epoch: int | None
    epochs: int | None
    step: int | None
    val_accuracy: float | None
    test_accuracy: float | None
    restarts: int
    gpu_hours: float | None
    eta_s: float | None
    reason: str | None
    estimated_start: str | None = None
    nodes: str | None = None
    images_per_second: float | None = None
    gpu_hours_planned: float | None = None
    gpu_hours_left: float | None = None
    wandb: str | None = None

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))  # of plain values: dataclasses.asdict copies each, which is a tenth of `status`


def statuses(runs: Sequence[Run]) -> list[Status]:
    """The state of each run; Slurm is asked once for all of them, and once more where a submission was cut off."""
    open_ones = {run: left for run, left in handover.adopt(runs).items() if not left.opened.is_link and not run.finished()}
    chains = {run.id: chain_of(run) for run in runs}
    # a finished run needs no question, whatever Slurm makes of its job
    away = {run.id: name for run in runs if (name := elsewhere(chains[run.id]))}
    others = [run for run in runs if run not in open_ones and run.id not in away]
    results = {run.id: run.result() for run in others if chains[run.id][0].executor == "slurm"}
    asked = {run_id for run_id, result in results.items() if result is None or result.state != "finished"}
    # one that says itself that it ended has only to be looked for in the queue, in case Slurm requeued it
    ended = {
        run.id for run in runs if run.id in asked and (state := run.state()).state in ENDED and not _may_be_cancelled(state)
    }
    theirs = {run.id for run in runs if run.id in asked and not _is_ours(run)}
    answer = slurm.query(_ids(chains, asked), set(_ids(chains, ended)), set(_ids(chains, theirs)))

    def seen(run: Run) -> Status:
        if run in open_ones:
            return _unsettled(run, open_ones[run])
        if run.id in away:
            return _away(run, chains[run.id], away[run.id])
        return _status(run, _current(chains[run.id], answer), answer, results.get(run.id))

    return [_told(run, seen(run), chains[run.id], answer) for run in runs]


def there(seen: Sequence[Status]) -> list[Status]:
    """Without runs that were removed while they were looked at."""
    return [row for row in seen if row.reason != GONE]


def _told(run: Run, seen: Status, chain: list[Job], answer: slurm.Answer) -> Status:
    """With a word on what cannot be read in the run directory."""
    problem = next((job.problem for job in chain if job.problem), "") or submission.problem(run)
    if not reading.is_regular(run.experiment_file):
        if not os.path.lexists(run.experiment_file):
            return dataclasses.replace(seen, state="failed", reason=GONE)
        problem = f"{run.experiment_file.name}: is not a regular file"
    if not problem:
        return seen
    queued = any(job.job_id in answer.jobs for job in chain)
    return dataclasses.replace(seen, state=_doubted(seen.state, queued), reason=f"damaged: {problem}")


def _doubted(word: str, queued: bool) -> str:
    """The state of a run of which something cannot be read: nobody will start what is in no queue."""
    return "failed" if word in ("pending", "requeued") and not queued else word


def _unsettled(run: Run, left: handover.Unsettled) -> Status:
    """A run of whose last submission no job is known."""
    state = run.state()
    word, reason = state.state or "pending", state.reason
    if left.opened.in_progress:
        word, reason = "pending", "it is being submitted"
    elif run.cancel_marker.exists() and word not in ENDED:
        word = "cancelled"
    elif not left.answered:
        reason = reason or "Slurm does not answer; whether it has a job of this run is not known"
    elif word not in ENDED:
        word, reason = "failed", CUT_OFF
    return _row(run, Job(), state, Result(), word, reason)


def elsewhere(chain: list[Job]) -> str | None:
    """The cluster of these jobs, if it is another one than this machine's, whose numbers mean other jobs."""
    name = chain[0].slurm_cluster
    here = slurm.configuration().get("ClusterName") if name else None
    return name if here and name != here else None


def _away(run: Run, chain: list[Job], cluster: str) -> Status:
    seen = _status(run, chain[0], slurm.Answer({}, False))
    reason = f"on cluster {cluster}, which cannot be asked from here; this is what the run last wrote"
    return seen if seen.ended else dataclasses.replace(seen, reason=reason)


def status(run: Run) -> Status:
    return statuses([run])[0]


def controller_of(run: Run, job: Job) -> Process:
    """The recorded identity of a local job's controller, or of a bare ``train``; of no process where there is none."""
    if job.executor == "train":
        return job.process
    return process.recorded(local.process_file(run.submitit, job.job_id))


def chain_of(run: Run) -> list[Job]:
    """The last submission: its job, and the follow-up jobs that wait behind it.

    It has several jobs where Slurm did not answer, was asked again, and has done both, or later records are damaged.
    """
    jobs = run.jobs()
    first = max((index for index, job in enumerate(jobs) if not job.follows and not job.problem), default=0)
    mark = jobs[first].submission if jobs else None
    first = next((index for index, job in enumerate(jobs) if mark and job.submission == mark), first)
    return jobs[first:] or [Job()]


def _is_ours(run: Run) -> bool:
    return owner.is_own(run.path) or not run.path.exists()


def _ids(chains: dict[str, list[Job]], which: set[str]) -> list[str]:
    return [job.job_id for run_id in which for job in chains[run_id]]


def _current(chain: list[Job], answer: slurm.Answer) -> Job:
    """The job of a chain that speaks for the run: the one that runs, else the next to run, else the last that Slurm knows."""
    if len(chain) == 1:
        return chain[0]
    known = [(job, answer.jobs[job.job_id]) for job in chain if job.job_id in answer.jobs]
    active = [job for job, seen in known if seen.active]
    waiting = [job for job, seen in known if seen.waiting]
    return (active or waiting or [job for job, _ in known[-1:]] or chain)[0]


def _status(run: Run, job: Job, answer: slurm.Answer, result: Result | None = None) -> Status:
    result, alive = result or run.result() or Result(), None
    if result.state != "finished":
        alive = _alive(run, job, answer)  # before the files are read: a process that ends in between has written its last word
        result = run.result() or Result()
    state = run.state()
    if result.state == "finished":
        return _row(run, job, state, result, "finished", None)
    known = answer.jobs.get(job.job_id) if job.executor == "slurm" else None
    if known is not None and known.state == "CANCELLED" and _may_be_cancelled(state):
        return _row(run, job, state, result, "cancelled", "cancelled with scancel", known)
    word, reason = state.state or ("running" if state.problem and alive else "pending"), state.reason
    if job.executor == "slurm":
        said = word in ENDED
        word, reason = _with_slurm(run, word, reason, state, known, job.job_id, answer)
        if word == "failed" and not said:
            reason = _with_words(run, job.job_id, str(reason), state, known)
    elif alive is False and word not in ENDED:
        cancelled = run.cancel_marker.exists()
        word, reason = ("cancelled", reason) if cancelled else ("failed", _vanished(run, job))
    elif word == "failed" and job.executor == "local" and process.is_alive(controller_of(run, job)):
        word, reason = "running", None  # a rank has said so; its job ends the others now, who may still write
    elif alive is None and word in ("running", "requeued"):
        reason = f"on {job.host or state.host or 'another host'}, last heard of {state.updated or 'never'}"
    if word in ("running", "requeued", "pending") and (alive if known is None else known.active):
        reason = reason or waits(run, job)
    return _row(run, job, state, result, word, reason, known)


def _may_be_cancelled(state: RunState) -> bool:
    """Whether its ranks stopped at a TERM and were ended, as it seems, before they could ask Slurm what it was."""
    return state.state == "stopped" and state.reason == Event.TERMINATED.value


def waits(run: Run, job: Job) -> str | None:
    """What a restarted job waits for before it trains, in its own words; see ``train/lock.py``."""
    said = records.read(Waiting, run.path / "waits.json")
    return said.reason if said is not None and said.job and said.job == job.job_id else None


def _alive(run: Run, job: Job, answer: slurm.Answer) -> bool | None:
    """Whether the run has processes or a place in the queue; None if that cannot be seen from here."""
    if job.executor == "slurm":
        known = answer.jobs.get(job.job_id)
        return known.alive if known else (False if answer.is_gone(job.job_id) else None)
    host = job.host or run.state().host
    if host is not None and host != socket.gethostname():
        return None
    who = controller_of(run, job)
    if who:
        return process.is_alive(who) or bool(job.executor == "local" and process.survivors(who))
    state = run.state()
    if not job.executor and state.state in ENDED:
        return False  # a submission that was refused
    return min(age.age_s(job.submitted), age.age_s(state.updated), age.file_age_s(run.experiment_file)) < START_GRACE_S


def is_live(run: Run) -> bool | None:
    """Whether a job of this run is queued or running, as far as can be seen from here; None if Slurm does not answer."""
    chain = chain_of(run)
    if elsewhere(chain):
        return None
    if chain[0].executor == "slurm":
        ids = _ids({run.id: chain}, {run.id})
        answer = slurm.query(ids, others=() if _is_ours(run) else ids)
        alive = [_alive(run, job, answer) for job in chain]
        return True if True in alive else None if None in alive else False
    return _alive(run, chain[0], slurm.Answer({}, True)) is True


def _with_slurm(
    run: Run,
    word: str,
    reason: str | None,
    state: RunState,
    job: slurm.JobState | None,
    job_id: str,
    answer: slurm.Answer,
) -> tuple[str, str | None]:
    """Slurm is the authority on whether a job is there; the run directory on what it did."""
    if job is None:
        if word in ENDED:
            return word, reason
        if job_id in answer.hidden:
            return word, HIDDEN
        if not answer.reachable:
            return word, "Slurm does not answer; this is what the run last wrote"
        if run.cancel_marker.exists():
            return "cancelled", None
        return "failed", NEVER_STARTED if word == "pending" else VANISHED
    if job.waiting:
        if run.cancel_marker.exists():
            return "cancelled", reason
        # a job that failed, or stopped, and waits again was requeued by Slurm
        waits = "; ".join(filter(None, (job.reason, interruptions.without_progress(run))))
        return ("requeued" if state.step is not None else "pending"), waits or None
    if job.active:
        # also when the last word was "failed": Slurm may have requeued the job since, and this one has not ended yet
        return "running", "being cancelled" if run.cancel_marker.exists() else interruptions.without_progress(run)
    if word in ENDED:
        return word, reason
    if job.state == "CANCELLED" and job.reason == "DependencyNeverSatisfied":
        names = ", ".join(chain_of(run)[0].after) or "a run"
        return "cancelled", f"{names}, after which it was to start, did not finish"
    if job.state == "CANCELLED" or run.cancel_marker.exists():
        return "cancelled", None if run.cancel_marker.exists() else "cancelled with scancel"
    words = {"TIMEOUT": "the time limit was reached before a checkpoint was saved", "COMPLETED": VANISHED}
    detail = f" ({job.reason})" if job.reason else ""
    return "failed", words.get(job.state, f"Slurm: {job.state}{detail}")


def _with_words(run: Run, job_id: str, reason: str, state: RunState, job: slurm.JobState | None) -> str:
    """Why a job failed whose ranks have not said so: what its first logs say, beside Slurm's word on it."""
    began = state.step is not None
    own_end = job is None or job.state in ("FAILED", "OUT_OF_MEMORY", "COMPLETED")  # else a node or the time ended it
    for_memory = job is not None and job.state == "OUT_OF_MEMORY"
    words = first_words.of_job(run.submitit, job_id, for_memory=for_memory, certain=began or not own_end)
    if words is None:
        return VANISHED if reason == NEVER_STARTED and (run.submitit / f"{job_id}_0_log.err").exists() else reason
    if words.death:
        about = words.text
    elif not own_end:
        about = f"{reason}: {words.text}"
    else:
        about = f"the job ended: {words.text}" if began else f"the job ended before training began: {words.text}"
    return f"{about} (log: {words.log.relative_to(run.path)})" if words.log.exists() else about


def _vanished(run: Run, job: Job) -> str:
    """A job of this machine that ended without a word in the run directory; its controller may have left some."""
    words = first_words.of_logs([run.submitit / f"{job.job_id}_controller.log"], certain=True)
    return f"{VANISHED}: {words.text}" if words else VANISHED


def _row(
    run: Run, job: Job, state: RunState, result: Result, word: str, reason: str | None, known: slurm.JobState | None = None
) -> Status:
    try:
        plan, problem = records.load(Plan, run.path / "plan.json"), ""
    except FileNotFoundError:
        plan, problem = remaining.NO_PLAN, ""
    except files.Damaged as error:
        plan, problem = remaining.NO_PLAN, f"plan.json: {error}"
    eta, speed, step = None, state.images_per_second, state.step
    if word == "running" and speed and speed > 0 and step is not None and state.total_steps:
        left = remaining.images_left(plan, step, state.total_steps)
        eta = None if left is None else round(min(left / speed, records.MOST), 1)
    # a result of an earlier segment lies there too, so it counts only once the run has finished
    last = result if word == "finished" else Result()
    used, planned = state.gpu_hours if last.gpu_hours is None else last.gpu_hours, plan.gpu_hours or None
    waiting = known is not None and known.waiting and word in ("pending", "requeued")
    if problem := state.problem or result.problem or problem:
        reason = f"damaged: {problem}"
        word = _doubted(word, known is not None)
    return Status(
        run=run.id,
        state=word,
        job_id=job.job_id or None,
        epoch=state.epoch,
        epochs=state.epochs or remaining.planned_epochs(plan),
        step=step,
        val_accuracy=state.val_accuracy,
        test_accuracy=last.test_accuracy,
        restarts=max(0, (state.restarts if last.restarts is None else last.restarts) or 0),
        gpu_hours=used,
        eta_s=eta,
        reason=reason or None,
        estimated_start=known.start if known is not None and waiting else None,
        nodes=known.nodes if known is not None and known.active and word == "running" else None,
        images_per_second=speed if word == "running" and speed else None,
        gpu_hours_planned=planned,
        gpu_hours_left=remaining.hours_left(plan, used, known) if planned and word not in ENDED else None,
        wandb=identity.url_of(run),
    )
