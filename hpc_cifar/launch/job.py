"""The tiny pickled object that every rank calls.

Nothing heavy is imported at the top: submitit unpickles this before the job has said anything, and a pickle that names few
modules can still be read after a requeue.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import chain

if TYPE_CHECKING:
    from ..errors import LostRank
    from ..runs import Run

FIRST_PORT, PORTS = 10_000, 20_000
MAX_TIMEOUTS = 1_000_000
"""submitit counts every preemption under a time limit of 10 minutes or less as a timeout; a run may be preempted often."""


LOCAL_REQUEUE = 144
"""Exit code by which submitit's local jobs, and ours, ask to be started again."""
MAX_HANGS = 3  # at one step
LAST_WORD_S = 3.0  # for a rank that failed to say why, after its peers have lost it


class EarlyStop(BaseException):
    """A stop signal before the training loop listens: nothing is at risk yet, so leave at once."""


class TrainJob:
    """Trains one run directory; what submitit pickles at submit and again at every requeue.

    Args:
        run: the run directory.
        data_root: where prepared datasets lie.
        after: run directories of the runs that must have finished before.
    """

    after: tuple[str, ...] = ()

    def __init__(self, run: Path, data_root: Path, after: Sequence[Path] = ()) -> None:
        self.run = str(run)
        self.data_root = str(data_root)
        if after:
            self.after = tuple(str(path) for path in after)

    def __call__(self) -> dict[str, Any]:
        import submitit

        from ..runs import Run

        run = Run(Path(self.run))
        env = submitit.JobEnvironment()
        usr: signal.Signals = env._usr_sig()
        hand_over = signal.getsignal(usr)  # submitit's own handler, before the training loop installs its flag
        set_environment(env)
        for number in (usr, signal.SIGTERM):
            signal.signal(number, _stop_early)
        try:
            result = self._train(run, env)
        except EarlyStop as early:
            if run.cancel_marker.exists():
                result = {"state": "cancelled"}
            else:
                result = {"state": "requeued"} if early.args[0] == usr else {"state": "stopped", "reason": "terminated"}
            if env.global_rank == 0:
                run.write_state(**{**run.state(), **result})
        except Exception as error:
            from ..errors import LostRank

            ignore_signals()
            if isinstance(error, LostRank) and restart_after_loss(run, env, error):
                raise SystemExit(0) from None
            record_failure(run, error, rank=env.global_rank, segment=segment())
            raise
        ignore_signals()
        if wants_requeue(result, env.cluster) and not run.cancel_marker.exists():
            _requeue(run, env, usr, hand_over, result)
        return result

    def _train(self, run: Run, env: Any) -> dict[str, Any]:
        if run.cancel_marker.exists():
            return {"state": "cancelled"}
        if run.finished():  # Slurm may requeue a job that ended during its grace time, or this is a link that is not needed
            return run.result() or {}
        # a link that Slurm itself restarts had taken the run up already
        if restart_count() == 0 and chain.is_link(run, env.job_id) and (word := chain.stays_ended(run, env.global_rank)):
            return {"state": word}
        from .dependency import check_finished

        check_finished(self.after)
        from ..train.loop import train
        from . import preflight

        with preflight.ready(run, env, Path(self.data_root)) as node:
            try:
                # rank 0 prints plain lines to the job's log
                return train(
                    run,
                    data_root=node.data_root,
                    console=True,
                    begin=node.record,
                    segment=segment(),
                    on_hang=lambda reason: restart_hung(run, env, reason),
                )
            finally:
                ignore_signals()  # nothing may interrupt the clean-up, and the result must not get lost in it

    def checkpoint(self) -> Any:
        """What the next segment calls: the same, since the training loop finds its checkpoint by itself."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _stop_early(number: int, frame: types.FrameType | None) -> NoReturn:
    raise EarlyStop(number)


def ignore_signals() -> None:
    """Once training has ended, signals only get in the way: a TERM that follows the USR2 would kill `scontrol requeue`, which
    inherits what is ignored here.
    """
    import submitit

    for number in (submitit.JobEnvironment._usr_sig(), signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def restart_count() -> int:
    """How often the scheduler or the local controller has restarted this job."""
    text = os.environ.get("SLURM_RESTART_COUNT") or os.environ.get("HPC_CIFAR_RESTART_COUNT") or "0"
    return int(text) if text.isdigit() else 0


def segment() -> str:
    """Names this stretch of the run: job id and restart count."""
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("SUBMITIT_LOCAL_JOB_ID") or ""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    return f"{job}.{restart_count()}"


def port_for(job_id: str, restart: int) -> int:
    """The port where ranks meet: every rank finds the same one, and a restart does not wait for the last one's socket."""
    digest = hashlib.sha256(f"{job_id}:{restart}".encode()).digest()
    return FIRST_PORT + int.from_bytes(digest[:8], "big") % PORTS


def set_environment(env: Any) -> None:
    """Describe this rank as torchrun would. CUDA_VISIBLE_DEVICES stays as the scheduler set it; LOCAL_RANK picks the device."""
    nodes, world = env.num_nodes, env.num_tasks
    local_world = max(1, world // nodes)
    # a free port that the local controller found, else one that follows from the job
    port = os.environ.get("HPC_CIFAR_MASTER_PORT") or str(port_for(env.job_id, restart_count()))
    os.environ.update(
        RANK=str(env.global_rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(env.local_rank),
        LOCAL_WORLD_SIZE=str(local_world),
        MASTER_ADDR="127.0.0.1" if nodes == 1 else str(env.hostnames[0]),
        MASTER_PORT=port,
    )
    per_task = os.environ.get("SLURM_CPUS_PER_TASK", "")
    threads = int(per_task) if per_task.isdigit() else max(1, len(os.sched_getaffinity(0)) // local_world)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # torchrun's agent would own the meeting point; here rank 0 does
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        del os.environ[name]


def one_line(error: BaseException, limit: int = 500) -> str:
    """The first line of an error that says something."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    name = type(error).__name__
    from ..errors import HpcCifarError

    line = text if isinstance(error, HpcCifarError) and text else f"{name}: {text}" if text else name
    return line[:limit]


def record_failure(run: Run, error: BaseException, *, rank: int, segment: str) -> None:
    """Say in the run directory why it failed.

    When one rank fails, its peers fail too, with a message about a lost connection; the first report of the segment counts.
    A run that another process trains keeps that one's records.
    """
    from .. import files, runs
    from ..errors import HpcCifarError, LostRank, RunBusy

    reports = run.path / "failures.jsonl"
    busy = isinstance(error, RunBusy)
    final = isinstance(error, HpcCifarError) and not isinstance(error, LostRank)  # a restart would fail like this one
    row = {"time": runs.now(), "segment": segment, "rank": rank, "reason": one_line(error), "busy": busy, "final": final}
    try:
        files.append_json_line(reports, row)
        if busy:
            return
        if run.cancel_marker.exists():  # a rank that is ended with the job loses its peers
            run.write_state(**{**run.state(), "state": "cancelled"})
            return
        first = next((old for old in files.read_json_lines(reports) if old.get("segment") == segment), row)
        reason = first["reason"] if first["rank"] == rank else f"rank {first['rank']}: {first['reason']}"
        run.write_state(**{**run.state(), "state": "failed", "reason": reason})
    except OSError as problem:  # a full disk must not hide the error itself
        print(f"hpc-cifar: the failure could not be recorded in {run.path}: {problem}", flush=True)


def restart_hung(run: Run, env: Any, reason: str) -> int:
    """Have a hung job start again from its checkpoint, though its main threads are stuck; the exit code of its ranks.

    Called from a thread of the rank that noticed. A run that hangs again and again at one step is not restarted for ever.
    """
    from .. import files, runs
    from ..train.watchdog import hangs_at

    row = {"time": runs.now(), "segment": segment(), "rank": env.global_rank, "reason": reason, "hang": True}
    files.append_json_line(run.path / "failures.jsonl", row)
    if is_ending(run, env):
        return 1
    if hangs_at(run.path, segment()) >= MAX_HANGS:
        reason = f"{reason}; this happened {MAX_HANGS} times at this step, so it is not restarted"
        run.write_state(**{**run.state(), "state": "failed", "reason": reason})
        return 1
    run.write_state(**{**run.state(), "state": "requeued", "reason": reason})
    if env.cluster != "slurm":
        return LOCAL_REQUEUE
    if chain.hand_over(run, env.job_id, {"state": "requeued"}, reason):
        return 1
    _requeue_as_slurm(run, env, reason)
    return 1


def is_ending(run: Run, env: Any) -> bool:
    """Whether Slurm is ending the job already: cancelled, or preempted and about to be requeued by Slurm itself.

    `scontrol requeue` would bring a cancelled job back.
    """
    if env.cluster != "slurm":
        return False
    word = _slurm_job_state(env.job_id)
    if run.cancel_marker.exists() or word.startswith("CANCELLED"):
        run.write_state(**{**run.state(), "state": "cancelled"})
        return True
    return word == "COMPLETING"


def _requeue_as_slurm(run: Run, env: Any, reason: str) -> None:
    """`scontrol requeue`; a problem with it ends the run."""
    try:  # by the id of the element: the plain number of an array's elements may mean the whole array
        done = subprocess.run(["scontrol", "requeue", env.job_id], capture_output=True, text=True, timeout=30, check=False)
        problem = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.SubprocessError) as error:
        problem = one_line(error)
    if problem:
        reason = f"{reason}; it could not be requeued ({problem}): continue it with hpc-cifar resume {run.id}"
        run.write_state(**{**run.state(), "state": "failed", "reason": reason})


def restart_after_loss(run: Run, env: Any, error: LostRank) -> bool:
    """Have a job go back to the queue that lost a rank which said nothing; whether that was done, by this rank or another.

    A node that dies takes its ranks with it at once, and Slurm notices after SlurmdTimeout (300 s): by then the ranks that are
    left have failed, and the job with them. A rank that could say why it failed is no loss but a failure.
    """
    from .. import files, runs

    if env.cluster != "slurm":
        return False
    here = segment()
    deadline = time.monotonic() + LAST_WORD_S
    while time.monotonic() < deadline:  # of the peer that was lost
        time.sleep(0.5)
        if any(row.get("segment") == here for row in files.read_json_lines(run.path / "failures.jsonl")):
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
    reason = f"a rank was lost without a word: {one_line(error)}"
    print(f"{reason}; the job goes back to the queue", flush=True)
    run.write_state(**{**run.state(), "state": "requeued", "reason": reason})
    if not chain.hand_over(run, env.job_id, {"state": "requeued"}, reason):
        _requeue_as_slurm(run, env, reason)
    return run.state().get("state") == "requeued"


def wants_requeue(result: dict[str, Any], cluster: str) -> bool:
    """Whether the run was interrupted rather than ended. Some sites announce a preemption by TERM alone."""
    terminated = result.get("state") == "stopped" and result.get("reason") == "terminated"
    return result.get("state") == "requeued" or (terminated and cluster == "slurm")


def _requeue(run: Run, env: Any, usr: signal.Signals, hand_over: Any, result: dict[str, Any]) -> None:
    """Leave the process; rank 0 hands over to submitit's own handler, which requeues the job.

    Returns only if the job must not be requeued, because it was cancelled.
    """
    if env.global_rank != 0:
        raise SystemExit(0)  # without a result: this rank is not done, and rank 0 speaks for all
    if env.cluster == "slurm":
        # scancel and preemption both send TERM; only the job's state tells them apart where no marker was left
        job_state = _slurm_job_state(env.job_id)
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
        except Exception as error:
            problem = error
            if env.cluster == "slurm" and _slurm_job_state(env.job_id) in ("PENDING", "REQUEUED", "PREEMPTED"):
                raise SystemExit(0) from None  # Slurm requeues it by itself
            time.sleep(1)
    text = "" if problem is None else one_line(problem)
    reason = f"stopped with a checkpoint but could not be requeued ({text}); continue it with: hpc-cifar resume {run.id}"
    run.write_state(**{**run.state(), "state": "failed", "reason": reason})
    raise SystemExit(1)


def _slurm_job_state(job_id: str) -> str:
    """Slurm's word for the state of a job, or "" where it cannot be asked.

    ``job_id`` is ``123_4`` for an element of an array: the plain number of one of the elements means the whole array.
    """
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--states=all", "--format=%T", "--jobs", job_id],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.split()[0] if done.stdout.split() else ""
