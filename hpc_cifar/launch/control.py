"""What one does with a run that exists: read its logs, wait for it, cancel it, resume it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .. import files, owner, planted, reading
from ..config.cluster import Cluster
from ..errors import LaunchError, RunError
from ..records import Job
from ..runs import Run, begin_again, in_one_line, now
from ..track import underway
from ..train import begun, saved
from . import handover, process, slurm, submission
from .status import ENDED, chain_of, controller_of, elsewhere, is_live, status

CANCEL_GRACE_S = 75.0  # a little more than the controller gives the ranks
PIECE, MOST_SHOWN = 1 << 20, 16 << 20  # bytes of a log that are read at once, and shown of one unless all is asked for
READ_S = 0.25  # between looks into a run directory
LAST_LOOKS = 4  # at the logs of a run that has ended
ASK_S, RARELY_S = 3.0, 10.0  # between questions to the scheduler; where nobody looks on, they become rare


# ---- logs ----------------------------------------------------------------------------------------------------------


def log_files(run: Run, rank: int = 0) -> list[Path]:
    """Log files of one rank, oldest job first, standard output before standard error. A requeue appends to its job's files."""
    names = (f"{job.job_id}_{rank}_log.{kind}" for job in run.jobs() for kind in ("out", "err"))
    return [path for name in names if reading.is_regular(path := run.submitit / name)]


def log_begin(path: Path) -> int:
    """From which byte on a log is shown: its last :data:`MOST_SHOWN`, from a line's beginning on where there are lines."""
    begin = path.stat().st_size - MOST_SHOWN
    if begin <= 0:
        return 0
    with path.open("rb") as stream:
        stream.seek(begin)
        return begin + stream.read(PIECE).find(b"\n") + 1


def log_pieces(path: Path, begin: int = 0) -> Iterator[str]:
    """The text of a log from a byte on, in pieces of whole lines; a line longer than :data:`PIECE` is cut."""
    rest = b""
    with path.open("rb") as stream:
        stream.seek(begin)
        while data := stream.read(PIECE):
            whole = (rest + data).rfind(b"\n") + 1 or len(rest + data)
            yield (rest + data)[:whole].decode(errors="replace")
            rest = (rest + data)[whole:]
    if rest:
        yield rest.decode(errors="replace")


def follow_logs(run: Run, rank: int, begin: Callable[[Path], int] = log_begin) -> Iterator[tuple[Path, str]]:
    """Pieces of the logs as they are written, until the run has ended; new files of later jobs too.

    Args:
        begin: from which byte on a log that is there is shown.
    """
    offsets: dict[Path, int] = {}
    asked, ended, news, last_looks = 0.0, False, False, LAST_LOOKS
    while True:
        for path in log_files(run, rank):
            if path not in offsets:
                offsets[path] = begin(path)
            with path.open("rb") as stream:
                stream.seek(offsets[path])
                while data := stream.read(PIECE):
                    whole = data.rfind(b"\n") + 1  # a line that is still being written waits
                    if not whole and (len(data) == PIECE or last_looks == 1):
                        whole = len(data)
                    if not whole:
                        break
                    offsets[path] += whole
                    yield path, data[:whole].decode(errors="replace")
                    stream.seek(offsets[path])
        if ended and not (last_looks := last_looks - 1):
            return
        if ended:  # its processes may have a last word
            time.sleep(READ_S)
            continue
        if news or time.monotonic() - asked > ASK_S:
            ended, asked = status(run).ended, time.monotonic()
        if not ended:
            news = until_news([run], 2 * READ_S)


# ---- wait ----------------------------------------------------------------------------------------------------------


def until_news(runs: Sequence[Run], seconds: float) -> bool:
    """Sleep for some seconds, or until one of the runs writes that it has ended: then True.

    A run directory may be read often; the scheduler, which has the last word, is shared with everybody.
    """
    before = {run: _stamp(run) for run in runs}
    pause = max(READ_S, 0.02 * len(runs))  # a shared file system answers each look
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, pause))
        changed = [run for run in runs if _stamp(run) != before[run]]
        if any(run.state().state in ENDED for run in changed):
            return True
        before |= {run: _stamp(run) for run in changed}
    return False


def until_uploaded(runs: Sequence[Run]) -> None:
    """Wait, in bounded time, until what the jobs of ended runs still upload to W&B has arrived, or was given up."""
    begun = time.monotonic()
    while any(time.monotonic() - begun < underway.left_s(run) for run in runs):
        time.sleep(READ_S)


def _stamp(run: Run) -> tuple[int, int] | None:
    """Differs after every write, which replaces the file."""
    try:
        facts = run.state_file.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_mtime_ns


# ---- cancel --------------------------------------------------------------------------------------------------------


def cancel(run: Run, grace_s: float = CANCEL_GRACE_S, code_of: str | None = None) -> str:
    """Stop a run for good; it never requeues. Returns what happened, for people to read.

    Args:
        code_of: the user whose runs may be cancelled too.

    Raises:
        RunError: it is somebody else's.
        LaunchError: the scheduler refused, or the run is on a machine that cannot be reached from here.
    """
    owner.check_own(run.path, code_of)
    left = handover.adopt([run], anew=True).get(run)
    before = status(run)
    if before.state == "finished":
        return f"{run.id} has finished already"
    if left is not None and not left.opened.is_link:
        return _cancel_unsettled(run, left)
    if before.ended and is_live(run) is False:
        return f"{run.id} is not running: it is {before.state}"
    job = run.last_job()
    if damaged := damaged_jobs(run):
        raise LaunchError(f"{run.id}: {damaged}: nobody can say which job to cancel")
    if job.executor != "slurm":
        host = job.host or run.state().host
        if host is not None and host != socket.gethostname():
            raise LaunchError(f"{run.id} runs on {host}: cancel it there")
    elif cluster := elsewhere(chain_of(run)):
        raise LaunchError(f"{run.id} is on cluster {cluster}: cancel it there")
    files.write_text(run.cancel_marker, now() + "\n")  # first: whatever stops now must not requeue
    if job.executor == "slurm":
        slurm.cancel([one.job_id for one in chain_of(run)])  # older jobs have ended, and their numbers may be others'
        if before.state in ("pending", "requeued", "cancelled"):  # no process is there to say so
            _mark_cancelled(run)
            return f"{run.id}: cancelled while it was waiting (job {job.job_id})"
        return f"{run.id}: cancelling job {job.job_id}; it saves a checkpoint first"
    _cancel_local(run, job, grace_s)
    if not run.finished():
        _mark_cancelled(run)
        return f"{run.id}: cancelled"
    return f"{run.id} finished before it could be cancelled"


def _cancel_unsettled(run: Run, left: handover.Unsettled) -> str:
    """A run of which no job is known; one that turns up ends as soon as it starts."""
    if left.opened.in_progress:
        raise LaunchError(f"{run.id} is being submitted by {_who(left)}: end that, or cancel the run when it has a job")
    files.write_text(run.cancel_marker, now() + "\n")
    _mark_cancelled(run)
    if left.answered:
        return f"{run.id}: cancelled; Slurm has no job of it"
    raise LaunchError(
        f"{run.id}: Slurm did not answer, so it is not known whether it has a job of this run; the run is marked as cancelled, "
        "and such a job would end as soon as it starts: try again"
    )


def _who(left: handover.Unsettled) -> str:
    who = left.opened.process
    return f"process {who.pid} on {who.host}" if who else "another command"


def damaged_jobs(run: Run) -> str:
    """Why its jobs are not all known; "" if they are."""
    return next((job.problem for job in run.jobs() if job.problem), "") or submission.problem(run)


def _mark_cancelled(run: Run) -> None:
    run.update_state(state="cancelled")


def _cancel_local(run: Run, job: Job, grace_s: float) -> None:
    who = controller_of(run, job)
    deadline = time.monotonic() + 5
    while not who and job.executor == "local" and time.monotonic() < deadline:  # it is just starting
        time.sleep(0.1)
        who = controller_of(run, job)
    if process.is_alive(who):
        process.signal_exactly(who, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while process.is_alive(who) and time.monotonic() < deadline:
            time.sleep(0.1)
    if job.executor == "local":  # a session of our own, so that all of it may go
        process.kill_survivors(who)
    else:
        process.signal_exactly(who, signal.SIGKILL)


# ---- resume --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resumed:
    """``job_id`` is None if there was nothing to do, since the run has finished.

    ``found`` is whether that job had been submitted already, and only nobody knew of it.
    """

    run: Run
    job_id: str | None
    found: bool = False


@contextlib.contextmanager
def _alone(run: Run) -> Iterator[None]:
    """Two people must not resume one run at the same time."""
    try:
        stream = planted.open_there(run.path / ".submit.lock")
    except OSError as error:
        raise RunError(f"{run.path}: cannot be locked: {error.strerror or error}") from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{run.id}: another command is submitting this run right now") from None
        except OSError:  # a file system without locks
            pass
        yield


def resume(
    run: Run,
    *,
    data_root: Path,
    cluster: Cluster | None = None,
    max_gpu_hours: float | None = None,
    fresh: bool = False,
    code_of: str | None = None,
) -> Resumed:
    """Submit an existing run again, with its own experiment and code; it continues from its last checkpoint.

    Args:
        cluster: another place than last time.
        fresh: begin at step 0; what the run has so far is set aside. One that has finished stays as it is.
        code_of: the user whose runs may be resumed too, with their code.

    Raises:
        RunError: it is somebody else's, or lies where others can exchange it; it is queued or running; or its experiment is not
            what its newest checkpoint was made with.
        CheckpointError: its checkpoints are gone.
        LaunchError: the scheduler refused.
    """
    from . import estimate, submit

    owner.check_own(run.path, code_of, code=True)
    owner.check_root(run.path.parent)
    if run.finished():
        return Resumed(run, None)
    if damaged := damaged_jobs(run):
        raise RunError(f"{run.id}: {damaged}: nobody can say whether it has a job already; remove what is damaged, then resume")
    with _alone(run):
        was_open = submission.read(run)
        left = handover.adopt([run], anew=True).get(run)
        seen = status(run)
        if was_open and not was_open.is_link and left is None and is_live(run):
            run.cancel_marker.unlink(missing_ok=True)
            if seen.ended:
                run.update_state(state="pending")
            return Resumed(run, seen.job_id, found=True)
        if left is not None and not left.opened.is_link:
            if left.opened.in_progress:
                raise RunError(f"{run.id} is being submitted by {_who(left)}: wait for that")
            if not left.answered and (cluster is None or cluster.executor == "slurm"):
                raise RunError(
                    f"{run.id}: {_silent(run)}, so nobody can say whether it has a job of this run already; try again"
                    ", or, if you know that it has none, resume with --cluster local"
                )
        elif seen.ended and is_live(run) is None:
            if cluster is None or cluster.executor == "slurm":
                raise RunError(
                    f"{run.id}: {_silent(run)}, so nobody can say whether job {seen.job_id} is still queued; try again"
                    ", or, if you know that it is gone, resume with --cluster local"
                )
        elif is_live(run) is not False or not seen.ended:
            where = f" as job {seen.job_id}" if seen.job_id else ""
            raise RunError(f"{run.id} is {seen.state}{where}: wait for it or cancel it before resuming")
        if not fresh and (problem := saved.missing(run)):
            raise problem
        if not fresh:
            begun.check(run, begun.manifest(run), run.experiment())
        chosen = cluster or last_cluster(run)
        if chosen.executor == "slurm" and not submit.have_sbatch():
            raise LaunchError(submit.NO_SBATCH)
        experiment = run.experiment()
        plan = submit.plan_for(experiment, chosen, submit.checked_train_images(experiment, data_root))
        submit.check_budget(plan, chosen, max_gpu_hours)
        submit.tested(experiment, chosen, plan, run.path, data_root)
        if chosen.executor == "slurm":
            submit.check_time(experiment, chosen, plan, estimate.length_of(experiment, chosen, plan, run.path.parent))
        run.cancel_marker.unlink(missing_ok=True)
        files.write_sealed(run.path / "plan.json", plan.as_dict())
        if fresh:
            begin_again(run)
        return Resumed(run, submit.start(run, chosen, plan, data_root=data_root))


def _silent(run: Run) -> str:
    cluster = elsewhere(chain_of(run))
    return f"it was submitted on cluster {cluster}, which cannot be asked from here" if cluster else "Slurm does not answer"


def last_cluster(run: Run) -> Cluster:
    """The profile the run was last submitted with; this machine for a run begun by ``train``."""
    from ..config.cluster import LOCAL

    path = run.path / "cluster.json"
    try:
        saved = files.load_json(path)
        if isinstance(saved, dict) and saved.get("executor") == "local":  # an earlier version took these, and ignored them
            saved = {name: value for name, value in saved.items() if name not in ("python", "modules", "setup")}
        return Cluster.model_validate(saved)
    except FileNotFoundError:
        return LOCAL
    except files.Damaged as error:
        words = str(error)
    except ValidationError as error:
        words = f"cannot be read back: {in_one_line(error)}"
    raise RunError(f"{path}: {words}; name the profile with --cluster")


def here() -> dict[str, Any]:
    """The identity of this process, for the record of a bare ``train``."""
    return process.identity(os.getpid())
