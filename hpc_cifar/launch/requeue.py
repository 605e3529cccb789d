"""Back to the queue: after a preemption or a time limit, a hang, the loss of a rank. A cancelled job stays cancelled."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

from .. import files, runs
from ..errors import LockHeld
from . import chain
from .job import LOCAL_REQUEUE, has_failed, one_line, segment

if TYPE_CHECKING:
    from ..errors import LostRank
    from ..runs import Run

MAX_HANGS = 3  # at one step
REQUEUED = ("PENDING", "REQUEUED", "PREEMPTED")  # what Slurm calls a job that it will start again
LAST_WORD_S = 3.0  # for a rank that failed to say why, after its peers have lost it


def restart_hung(run: Run, env: Any, reason: str) -> int:
    """Have a hung job start again from its checkpoint, though its main threads are stuck; the exit code of its ranks.

    Called from a thread of the rank that noticed. A run that hangs again and again at one step is not restarted for ever.
    """
    from ..train.watchdog import hangs_at

    row = {"time": runs.now(), "segment": segment(), "rank": env.global_rank, "reason": reason, "hang": True}
    files.append_json_line(run.path / "failures.jsonl", row)
    if is_ending(run, env):
        return 1
    if env.cluster == "slurm":
        _wake(run, env)
    if hangs_at(run.path, segment()) >= MAX_HANGS:
        reason = f"{reason}; this happened {MAX_HANGS} times at this step, so it is not restarted"
        run.write_state(**{**run.state(), "state": "failed", "reason": reason})
        return 1
    run.write_state(**{**run.state(), "state": "requeued", "reason": reason})
    if env.cluster != "slurm":
        return LOCAL_REQUEUE
    if chain.hand_over(run, env.job_id, {"state": "requeued"}, reason):
        return 1
    _ask_for_requeue(run, env, reason)
    return 1


def _wake(run: Run, env: Any) -> None:
    """Let ranks that were stopped go on, on whatever node: each writes what it was doing, and leaves with the others."""
    try:
        subprocess.run(["scancel", "--signal=CONT", env.job_id], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return
    deadline = time.monotonic() + LAST_WORD_S
    stacks = run.path / "hangs" / segment()
    while time.monotonic() < deadline and len(list(stacks.glob("rank-*[0-9].txt"))) < env.num_tasks:
        time.sleep(0.2)


def is_ending(run: Run, env: Any) -> bool:
    """Whether Slurm is ending the job already: cancelled, or preempted and about to be requeued by Slurm itself.

    `scontrol requeue` would bring a cancelled job back.
    """
    if env.cluster != "slurm":
        return False
    word, _ = _slurm_job_state(env.job_id)
    if run.cancel_marker.exists() or word.startswith("CANCELLED"):
        run.write_state(**{**run.state(), "state": "cancelled"})
        return True
    return word == "COMPLETING"


def _ask_for_requeue(run: Run, env: Any, reason: str) -> None:
    """`scontrol requeue`; a problem with it ends the run."""
    # by the id of the element: the plain number of an array's elements may mean the whole array. Incomplete: only one that runs
    command = ["scontrol", "requeue", "Incomplete", env.job_id]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        problem = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.SubprocessError) as error:
        problem = one_line(error)
    if problem and not _slurm_deals_with(run, env.job_id):
        reason = f"{reason}; it could not be requeued ({problem}): continue it with hpc-cifar resume {run.id}"
        run.write_state(**{**run.state(), "state": "failed", "reason": reason})


def restart_after_loss(run: Run, env: Any, error: LostRank | LockHeld) -> bool:
    """Have a job go back to the queue that lost a rank which said nothing, or found the lock of its earlier segment held for
    too long; whether that was done, by this rank or another.

    A node that dies takes its ranks with it at once, and Slurm notices after SlurmdTimeout (300 s): by then the ranks that are
    left have failed, and the job with them. A rank that could say why it failed is no loss but a failure.
    """
    if env.cluster != "slurm":
        return False
    here = segment()
    deadline = time.monotonic() + LAST_WORD_S
    while time.monotonic() < deadline:  # of the peer that was lost
        time.sleep(0.5)
        if has_failed(run, here):
            return False
    losses = run.path / "losses"
    losses.mkdir(exist_ok=True)
    step = run.state().get("step")
    row = {"time": runs.now(), "rank": env.global_rank, "step": step, "reason": one_line(error)}
    try:
        with (losses / f"{here}.json").open("x", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
    except FileExistsError:  # another rank does it; this one stays until the job is ended, so that its exit code does not count
        time.sleep(LAST_WORD_S + 60)
        return True
    before = [files.read_json(path) or {} for path in losses.glob("*.json")]
    if is_ending(run, env) or [row.get("step") for row in before].count(step) > MAX_HANGS:
        return False
    reason = one_line(error) if isinstance(error, LockHeld) else f"a rank was lost without a word: {one_line(error)}"
    print(f"{reason}; the job goes back to the queue", flush=True)
    run.write_state(**{**run.state(), "state": "requeued", "reason": reason})
    if not chain.hand_over(run, env.job_id, {"state": "requeued"}, reason):
        _ask_for_requeue(run, env, reason)
    return run.state().get("state") == "requeued"


def wants_requeue(result: dict[str, Any], cluster: str) -> bool:
    """Whether the run was interrupted rather than ended. Some sites announce a preemption by TERM alone."""
    terminated = result.get("state") == "stopped" and result.get("reason") == "terminated"
    return result.get("state") == "requeued" or (terminated and cluster == "slurm")


def requeue(run: Run, env: Any, usr: signal.Signals, hand_over: Any, result: dict[str, Any]) -> None:
    """Leave the process; rank 0 hands over to submitit's own handler, which requeues the job.

    Returns only if the job must not be requeued, because it was cancelled.
    """
    if env.global_rank != 0:
        raise SystemExit(0)  # without a result: this rank is not done, and rank 0 speaks for all
    if env.cluster == "slurm":
        # scancel and preemption both send TERM; only the job's state tells them apart where no marker was left
        job_state, why = _slurm_job_state(env.job_id)
        if why == "TimeLimit":  # the signal before it was lost, as when it came before Python could hear it
            result = {**result, "state": "requeued"}
        if job_state.startswith("CANCELLED") or (job_state == "COMPLETING" and result["state"] == "stopped"):
            # while its ranks still run, Slurm calls a job that was cancelled COMPLETING; a preempted one that is to come
            # back is requeued by Slurm itself
            run.write_state(**{**run.state(), "state": "cancelled", "reason": "cancelled with scancel"})
            result["state"] = "cancelled"
            return
        if not job_state and chain.term_means_preemption(run):
            result = {**result, "state": "requeued"}
        if chain.hand_over(run, env.job_id, result):
            raise SystemExit(0)
        if result["state"] == "stopped" and not job_state:
            return  # nobody can say whether this was a cancel; a preempted job is requeued by Slurm itself
    run.write_state(**{**run.state(), "state": "requeued"})
    if not callable(hand_over):
        raise RuntimeError("submitit's requeue handler is missing")
    problem: BaseException | None = None
    for _ in range(3):
        # a handler killed half-way leaves this file, and submitit then refuses to write
        leftover = env.paths.submitted_pickle
        leftover.with_suffix(leftover.suffix + ".save_tmp").unlink(missing_ok=True)
        try:
            hand_over(usr, None)
        except SystemExit:
            _cancel_again(run, env)
            raise
        except Exception as error:
            problem = error
            if env.cluster == "slurm" and _slurm_job_state(env.job_id)[0] in REQUEUED:
                raise SystemExit(0) from None
            time.sleep(1)
    if env.cluster == "slurm" and _slurm_deals_with(run, env.job_id):
        raise SystemExit(0)
    text = "" if problem is None else one_line(problem)
    reason = f"stopped with a checkpoint but could not be requeued ({text}); continue it with: hpc-cifar resume {run.id}"
    run.write_state(**{**run.state(), "state": "failed", "reason": reason})
    raise SystemExit(1)


def _cancel_again(run: Run, env: Any) -> None:
    """What was cancelled in the moment in which it was requeued: Slurm may have heard of the cancel first."""
    if env.cluster == "slurm" and run.cancel_marker.exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # the marker ends it anyway, as it begins
            subprocess.run(["scancel", env.job_id], capture_output=True, timeout=20, check=False)
        run.write_state(**{**run.state(), "state": "cancelled"})


def _slurm_deals_with(run: Run, job_id: str) -> bool:
    """Whether Slurm itself requeues the job or ends it, so that it matters little that it refused to requeue it.

    COMPLETING is what it calls both while processes are left: a preempted job without a grace time, and a cancelled one.
    """
    state, _ = _slurm_job_state(job_id)
    if state.startswith("CANCELLED"):
        run.write_state(**{**run.state(), "state": "cancelled", "reason": "cancelled with scancel"})
    return state in (*REQUEUED, "COMPLETING") or state.startswith("CANCELLED")


def _slurm_job_state(job_id: str) -> tuple[str, str]:
    """Slurm's words for the state of a job and for the reason of that, or "" where it cannot be asked.

    ``job_id`` is ``123_4`` for an element of an array: the plain number of one of the elements means the whole array.
    """
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--states=all", "--format=%T %r", "--jobs", job_id],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "", ""
    state, _, reason = (done.stdout.strip().splitlines() or [""])[0].strip().partition(" ")
    return state, reason.strip()
