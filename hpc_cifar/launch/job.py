"""The tiny pickled object that every rank calls.

Nothing heavy is imported at the top: submitit unpickles this before the job has said anything, and a pickle that names few
modules can still be read after a requeue.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import lifetime, owner, stages, terminal

if TYPE_CHECKING:
    from ..config.experiment import Experiment
    from ..runs import Run
    from .own_job import OwnJob
    from .policy import Event

FIRST_PORT, PORTS = 10_000, 20_000
MAX_TIMEOUTS = 1_000_000
"""submitit counts every preemption under a time limit of 10 minutes or less as a timeout; a run may be preempted often."""


LOCAL_REQUEUE = 144
"""Exit code by which submitit's local jobs, and ours, ask to be started again."""


class EarlyStop(BaseException):
    """A stop signal before the training loop listens: nothing is at risk yet, so leave at once."""


class EarlySignals:
    """Handles stop signals that the training loop does not: the first one raises EarlyStop while ``armed``, all are noted.

    A preemption sends several within milliseconds; those after the first must not break off what the first one began. One that
    comes during an import waits for the next import: it may be a library in C++ that runs Python while it is initialised, which
    ends the process for an exception (seen in ``torch.distributed``).
    """

    def __init__(self) -> None:
        self.noted: list[int] = []
        self.armed = False

    def __call__(self, number: int, frame: types.FrameType | None) -> None:
        self.noted.append(number)
        if self.armed and not in_import(frame):
            self.armed = False
            raise EarlyStop

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """As a finder in ``sys.meta_path``, which every import of a new module asks: finds nothing."""
        if self.armed:
            self.check()

    def check(self) -> None:
        """Raise EarlyStop if a signal came: one that was only noted, or whose EarlyStop a library has swallowed."""
        if self.noted:
            self.armed = False
            raise EarlyStop


class TrainJob:
    """Trains one run directory; what submitit pickles at submit and again at every requeue.

    Args:
        run: the run directory.
        data_root: where prepared datasets lie.
        after: run directories of the runs that must have finished before.
        mark: that of the submission, where the job may have to enter itself in the run's list.
    """

    after: tuple[str, ...] = ()
    mark: str = ""

    def __init__(self, run: Path, data_root: Path, after: Sequence[Path] = (), mark: str = "") -> None:
        self.run = str(run)
        self.data_root = str(data_root)
        if after:
            self.after = tuple(str(path) for path in after)
        if mark:
            self.mark = mark

    def of(self, mark: str) -> TrainJob:
        """The same for another submission."""
        return TrainJob(Path(self.run), Path(self.data_root), [Path(path) for path in self.after], mark)

    def __call__(self) -> dict[str, Any]:
        try:
            result = self._run()
        except SystemExit as end:  # the job begins again, or has failed
            leave(end.code if isinstance(end.code, int) else int(end.code is not None))
            raise
        leave(0)  # when submitit has written the result
        return result

    def _run(self) -> dict[str, Any]:
        stages.done("process")
        terminal.guard(keeps_going=True)  # a full disk below the log must not end the training
        import submitit

        owner.narrow_umask()  # sbatch takes the user's along; pickles are written at every requeue
        lifetime.collect_later()  # the trainer does again
        env = submitit.JobEnvironment()
        usr: signal.Signals = env._usr_sig()
        # first of all: submitit's handler knows neither chains nor cancels. During the imports a signal is only noted.
        early = EarlySignals()
        for number in (usr, signal.SIGTERM):
            signal.signal(number, early)
        from ..runs import Run
        from . import trial as trials
        from .own_job import OwnJob
        from .policy import Event

        run = Run(Path(self.run))
        own = OwnJob(run, env)
        set_environment(env)
        sys.meta_path.insert(0, early)
        try:
            early.armed = True
            early.check()
            result = self._train(run, own, early)
            early.armed = False
        except EarlyStop:
            result = stopped_early(run, env, preempted=usr in early.noted)
        except Exception as error:
            early.armed = False
            from ..errors import LockHeld, LostRank

            ignore_signals()
            faults: dict[type[Exception], Event] = {LostRank: Event.RANK_LOST, LockHeld: Event.LOCK_HELD}
            fault = faults.get(type(error))  # of the ranks of this machine, the controller sees who was lost
            if fault and (own.slurm or fault is Event.LOCK_HELD) and own.lost(fault, one_line(error)):
                raise SystemExit(0 if own.slurm else LOCAL_REQUEUE) from None
            record_failure(run, error, rank=env.global_rank, segment=segment())
            trials.ended(run, env.global_rank, {"state": "failed"}, error)
            raise
        finally:
            sys.meta_path.remove(early)
            lifetime.collect_again()  # where training did not begin
            ignore_signals()
        if (event := interruption_of(result, own.slurm)) is not None:
            try:
                result = own.stopped(event, result)
            except SystemExit as end:
                if end.code == 1:  # a fault has ended the run
                    trials.ended(run, env.global_rank, {"state": "failed"})
                raise
        trials.ended(run, env.global_rank, result)
        return result

    def _train(self, run: Run, own: OwnJob, early: EarlySignals) -> dict[str, Any]:
        from . import submission

        env = own.env
        if self.mark and env.global_rank == 0 and (why := submission.enter(run, self.mark, own.job_id)):
            print(f"job {own.job_id} of {run.id} is one too many and ends: {why}", flush=True)
            raise SystemExit(1)  # srun ends the other ranks
        if word := leaves_at_once(run, own.job_id, env.global_rank):
            result = run.result() if word in ("finished", "stopped") else None
            return {"state": word} if result is None else result.as_dict()
        from .dependency import check_finished

        check_finished(self.after)
        trial = None
        if run.sweep_file.exists():
            from . import sweep

            trial = sweep.take(run, env.global_rank, Path(self.data_root))
        if env.local_rank == 0:
            read_ahead(run, Path(self.data_root), run.experiment())
        from ..train.loop import train
        from . import preflight

        early.check()
        stages.done("imports")
        with preflight.ready(own, Path(self.data_root)) as node:
            stages.done("preflight")
            early.check()
            try:
                # rank 0 prints plain lines to the job's log
                return train(
                    run,
                    data_root=node.data_root,
                    console=True,
                    begin=node.record,
                    segment=segment(),
                    on_hang=own.hung,
                    gives_up=trial.gives_up if trial else None,
                )
            finally:
                ignore_signals()  # nothing may interrupt the clean-up, and the result must not get lost in it

    def checkpoint(self) -> Any:
        """What the next segment calls: the same, since the training loop finds its checkpoint by itself."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def in_import(frame: types.FrameType | None) -> bool:
    """Whether Python imports something in this frame or in one that called it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def leave(code: int) -> None:
    """End the process soon, if this job is all that it is for."""
    if getattr(sys.modules["__main__"].__spec__, "name", "") == "submitit.core._submit":
        lifetime.leave_soon(code)


def ignore_signals() -> None:
    """Once training has ended, signals only get in the way: a TERM that follows the USR2 would kill `scontrol requeue`, which
    inherits what is ignored here.
    """
    import submitit

    for number in (submitit.JobEnvironment._usr_sig(), signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def read_ahead(run: Run, data_root: Path, experiment: Experiment) -> None:
    """Have the store and the newest checkpoint on their way to this node while torch is imported."""
    from .. import files

    files.read_ahead([run.checkpoints / "latest" / "*", data_root / experiment.data.dataset / "*.npy"])


def restart_count() -> int:
    """How often the scheduler or the local controller has restarted this job."""
    from .. import files

    text = os.environ.get("SLURM_RESTART_COUNT") or os.environ.get("HPC_CIFAR_RESTART_COUNT") or "0"
    return files.whole(text) or 0


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
    from .. import files

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
    threads = files.whole(per_task) or max(1, len(os.sched_getaffinity(0)) // local_world)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # torchrun's agent would own the meeting point; here rank 0 does
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        del os.environ[name]


def one_line(error: BaseException, limit: int = 500) -> str:
    """The first line of an error that says something."""
    from ..errors import HpcCifarError, first_line

    name = type(error).__name__
    text = first_line(error, limit) if str(error).strip() else ""
    line = text if isinstance(error, HpcCifarError) and text else f"{name}: {text}" if text else name
    return line[:limit]


def first_failure(run: Run, segment: str, *, hangs: bool = True) -> str:
    """Why this stretch of the run failed, as the first rank that could say so has said it; "" if none has.

    Args:
        hangs: whether a hang, after which the run goes on, counts.
    """
    ours = [row for row in run.failures() if row.segment == segment and (hangs or not row.hang)]
    return ours[0].words if ours else ""


def node_name() -> str:
    """This node, as Slurm calls it."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def stopped_early(run: Run, env: Any, *, preempted: bool) -> dict[str, Any]:
    """The result of a rank that a signal ended before its training listened."""
    if not preempted and first_failure(run, segment()):
        raise SystemExit(1) from None  # srun ends the ranks that are left
    if (result := run.result()) is not None and result.state == "finished":  # it came as training ended
        return result.as_dict()
    if run.cancel_marker.exists():
        said = {"state": "cancelled"}
    else:
        said = {"state": "requeued"} if preempted else {"state": "stopped", "reason": "terminated"}
    if env.global_rank == 0:
        run.update_state(state=said["state"], reason=said.get("reason"))
    return said


def interruption_of(result: dict[str, Any], slurm: bool) -> Event | None:
    """As what a run was interrupted rather than ended; None if it was not. Some sites announce a preemption by TERM alone."""
    from .policy import Event

    if result.get("state") == "requeued":
        return Event.PREEMPTED
    terminated = result.get("state") == "stopped" and result.get("reason") == "terminated"
    return Event.TERMINATED if terminated and slurm else None


def leaves_at_once(run: Run, job_id: str, rank: int) -> str:
    """The state with which this job ends before it trains; "" if it trains."""
    from . import chain, policy

    state, reports = run.state(), run.failures()
    last = [row for row in reports if row.segment == reports[-1].segment]
    found = policy.Begin(
        state=state.state,
        reason=state.reason or "",
        finished=run.finished(),
        cancel_mark=run.cancel_marker.exists(),
        is_link=chain.is_link(run, job_id),
        restarts=restart_count(),
        failed_for_good=any(row.final for row in last),
    )
    word = policy.leaves_at_once(found)
    if word == "cancelled" and found.state == "stopped" and rank == 0:
        run.update_state(state="cancelled", reason="cancelled with scancel")
    return word


def record_failure(run: Run, error: BaseException, *, rank: int, segment: str) -> None:
    """Say in the run directory why it failed.

    When one rank fails, its peers fail too, with a message about a lost connection; the first report of the segment counts.
    A run that another process trains keeps that one's records.
    """
    from .. import files, runs
    from ..errors import HpcCifarError, LockHeld, LostRank, RunBusy

    reports = run.path / "failures.jsonl"
    busy = isinstance(error, RunBusy)
    final = isinstance(error, HpcCifarError) and not isinstance(
        error, LostRank | LockHeld
    )  # a restart would fail like this one
    row = {"time": runs.now(), "segment": segment, "rank": rank, "reason": one_line(error), "busy": busy, "final": final}
    try:
        files.append_json_line(reports, row)
        if busy:
            return
        if run.cancel_marker.exists():  # a rank that is ended with the job loses its peers
            run.update_state(state="cancelled")
            return
        run.update_state(state="failed", reason=first_failure(run, segment))
    except OSError as problem:  # a full disk must not hide the error itself
        print(f"hpc-cifar: the failure could not be recorded in {run.path}: {problem}", flush=True)
