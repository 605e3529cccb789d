"""Two jobs on one run directory exclude each other; a job that was restarted waits for what its node left behind.

<run>/.lock          locked by rank 0 as long as it lives; the kernel, or the file server, frees it
<run>/.holder.json   which job, segment and process that is; the time of the file is its heartbeat
<run>/waits.json     present while a restarted job waits for the lock of its earlier segment

On a file system without locks the record of the holder stands for the lock: only one process can make it, and one that is
silent is put aside.

After a crash of a node the file server may keep its locks for minutes (NFSv4: a lease of 90 s; Lustre: until it evicts the
node). Whether a holder lives is judged by its heartbeat: seen twice, it has changed or not. Clocks of nodes are not compared.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from .. import files, planted, processes, reading, records
from ..errors import LockHeld, RunBusy, RunError
from ..records import Holder
from ..runs import Run
from .distributed import World
from .stop import REASONS, StopFlag

VARIABLE = "HPC_CIFAR_LOCK_WAIT_S"  # another WAIT_S
WAIT_S = 600.0  # for the lock of an earlier segment of the same job
BEAT_S = 2.0  # between two heartbeats
WATCH_S = 8.0  # a holder whose heartbeat stays the same so long is silent
POLL_S = 0.5
HOLDER = ".holder.json"
WAITS = "waits.json"


def is_held_by_another(run: Run, job: str) -> bool:
    """Whether another job trains the run right now, as far as the file system can tell.

    Args:
        job: of the caller, as ``<job id>.<restart>``; what its own earlier segment left behind does not count.
    """
    try:
        with (run.path / ".lock").open(encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return not is_earlier(run, job, Beat.read(run.path).who)
    except OSError as error:
        return error.errno in files.NO_LOCKS and _beats(run, job)
    return False


def _beats(run: Run, job: str) -> bool:
    """Whether the heartbeat of another job moves, where there are no locks."""
    first, deadline = Beat.read(run.path), time.monotonic() + 2 * BEAT_S
    if not first.who or is_earlier(run, job, first.who):
        return False
    while time.monotonic() < deadline:
        time.sleep(min(POLL_S, BEAT_S / 4))
        if (now := Beat.read(run.path)) != first:
            return bool(now.who)
    return False


def is_earlier(run: Run, job: str, holder: Holder) -> bool:
    """Whether the holder is an earlier segment of the job ``<job id>.<restart>``, or a job of the run that came before it."""
    here, _, restart = job.rpartition(".")
    there, _, before = holder.job.rpartition(".")
    if here and here == there:
        earlier, this = files.whole(before), files.whole(restart)
        return earlier is not None and this is not None and earlier < this
    jobs = [row.job_id for row in run.jobs()]
    return here in jobs and any(name in jobs[: jobs.index(here)] for name in (there, holder.segment))


@dataclass(frozen=True)
class Beat:
    """What the holder says of itself, and the state of its heartbeat; equal ones mean that it was silent in between."""

    who: Holder = field(default_factory=Holder)
    time_ns: int = 0

    @staticmethod
    def read(folder: Path, name: str = HOLDER) -> Beat:
        try:
            with reading.opened(folder / name, reading.MAX_JSON) as descriptor:  # has NFS ask the server for its time
                time_ns = os.fstat(descriptor).st_mtime_ns
        except (FileNotFoundError, reading.Damaged):
            return Beat()
        return Beat(records.read(Holder, folder / name) or Holder(), time_ns)

    def __str__(self) -> str:
        return f"process {self.who.pid} on {self.who.host}"


class RunLock:
    """Held by rank 0 for as long as the process lives; the kernel frees it however the process ends.

    Args:
        job: this job and how often it was restarted, as ``<job id>.<restart>``.
        segment: names this stretch of the run.
        console: whether rank 0 prints that it waits.

    Attributes:
        asked: why the ranks agreed to stop while they waited, and do not hold it; else "".
        held_by_another: on rank 0, whether another job held it when they were asked to.

    Raises:
        RunBusy: on every rank, if another process trains the run; the message names that process.
        LockHeld: on every rank: an earlier segment of this job still had the lock after ``WAIT_S``.
    """

    def __init__(self, run: Run, world: World, flag: StopFlag, job: str, segment: str, console: bool = False) -> None:
        self._run, self._world, self._flag, self._job, self._segment = run, world, flag, job, segment
        self._console = console and world.main
        self._stream: TextIO | None = None
        self._begun = self._moved = time.monotonic()  # since when it has tried; when a heartbeat was seen last
        self._seen: Beat | None = None
        self._moves = self._waits = self._claimed = False
        self._stop = threading.Event()
        self.asked = ""
        self.held_by_another = False

    def __enter__(self) -> RunLock:
        while True:
            flags = self._world.gather(self._flag.code)  # in short rounds, so that no rank waits long in a collective
            said = self._world.share(self._look(max(flags)) if flags is not None else None)
            if isinstance(said, RunError):
                raise said
            if said is not None:
                self.asked = said
                return self
            time.sleep(POLL_S)

    def _look(self, code: int) -> RunError | str | None:
        """On rank 0: "" if the lock is ours, why to stop, an error, or None: look again."""
        if code:
            self._end_wait()
            self.held_by_another = is_held_by_another(self._run, self._job)
            return REASONS[code]
        beat, now = Beat.read(self._run.path), time.monotonic()
        if self._seen is not None and beat.who and beat != self._seen:
            self._moves, self._moved = True, now
        self._seen = beat
        silent = now - self._moved > WATCH_S
        try:
            held = not self._lock(free_without_locks=not beat.who or silent)
            if not held:
                self._keep()
                return ""
        except OSError as error:
            return RunError(f"{self._run.path / '.lock'}: cannot be locked: {error.strerror or error}")
        if not is_earlier(self._run, self._job, beat.who):
            return self._busy(beat, silent) if self._moves or silent else None
        if not self._waits:
            self._begin_wait(beat)
        text = os.environ.get(VARIABLE, "")
        limit = WAIT_S if (told := files.whole(text)) is None else float(told)
        if now - self._begun < limit:
            return None
        self._end_wait()
        if not silent:
            return self._busy(beat, silent)
        return LockHeld(
            f"{self._run.path}: the lock is still that of this job's earlier segment, {beat}, after {limit:.0f} s, though its "
            "heartbeat does not move; the file server frees the lock of a dead node by itself"
        )

    def _lock(self, *, free_without_locks: bool) -> bool:
        """Whether the lock is ours now.

        Args:
            free_without_locks: whether nobody beats, on a file system that has none; then one of those who see it gets it.
        """
        stream = planted.open_there(self._run.path / ".lock")
        try:
            if files.flock(stream) or (free_without_locks and self._claim()):
                files.write_holder(stream)
                self._stream = stream
        except BlockingIOError:
            pass
        finally:
            if self._stream is None:
                stream.close()
        return self._stream is not None

    def _claim(self) -> bool:
        """On a file system without locks: be the one that makes the record of the holder; a silent one is put aside before."""
        path = self._run.path / HOLDER
        mine = path.with_name(f"{HOLDER}.{secrets.token_hex(4)}")
        try:
            if (self._seen or Beat()).time_ns:
                path.rename(mine)
                if Beat.read(self._run.path, mine.name) != self._seen:  # somebody was faster, and has it now
                    with contextlib.suppress(FileExistsError):
                        _link(mine, path)
                    return False
                mine.unlink()
            files.write_json(mine, self._who(), durable=False)
            _link(mine, path)
            self._claimed = True
        except (FileExistsError, FileNotFoundError):
            return False
        finally:
            mine.unlink(missing_ok=True)
        return True

    def _who(self) -> dict[str, Any]:
        who = {"job": self._job, "segment": self._segment, "host": os.uname().nodename, "pid": os.getpid()}
        return {**who, "pid_started": processes.start_time(os.getpid())}

    def _busy(self, beat: Beat, silent: bool) -> RunBusy:
        holder = str(beat)
        if not beat.who:
            with contextlib.suppress(OSError):
                holder = (self._run.path / ".lock").read_text(encoding="utf-8").strip() or "another process"
        words = f"{self._run.path}: this run is being trained already, by {holder}; wait for it or cancel it"
        if silent:
            words += " (its heartbeat does not move: if it died with its node, the file server frees the lock in some minutes)"
        return RunBusy(words)

    # ---- waiting -------------------------------------------------------------------------------------------------------

    def _begin_wait(self, beat: Beat) -> None:
        self._waits = True
        words = f"waits for the lock of its earlier segment on {beat.who.host} (process {beat.who.pid})"
        if self._console:
            print(f"{words}, which the file server frees some time after a crash", flush=True)
        with contextlib.suppress(OSError):
            files.write_json(self._run.path / WAITS, {"job": self._job.rpartition(".")[0], "reason": words}, durable=False)

    def _end_wait(self) -> None:
        with contextlib.suppress(OSError):
            (self._run.path / WAITS).unlink(missing_ok=True)  # also that of a segment which was killed as it waited
        if self._waits and self._console:
            print(f"waited {time.monotonic() - self._begun:.0f} s for the lock", flush=True)

    # ---- holding -------------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """The lock is ours: say so, again and again."""
        self._end_wait()
        if not self._claimed:
            files.write_json(self._run.path / HOLDER, self._who(), durable=False)
        threading.Thread(target=self._beat, name="lock heartbeat", daemon=True).start()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a file system that is away says so to the training
                os.utime(self._run.path / HOLDER)

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        if self._stream is not None:
            with contextlib.suppress(OSError):
                (self._run.path / HOLDER).unlink(missing_ok=True)  # nobody need wait for its heartbeat
            self._stream.close()


def _link(mine: Path, path: Path) -> None:
    """Have ``path`` hold what ``mine`` holds, unless it is there, where a rename would replace it.

    Raises:
        FileExistsError: it is.
    """
    try:
        os.link(mine, path)
    except FileExistsError:
        raise
    except OSError:  # no hard links there
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(mine.read_bytes())
