"""Processes as the records of a run name them, and their sessions: what a controller started, and all that its ranks left."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

from .. import processes, records
from ..files import Damaged
from ..processes import ENDED, boot_id, start_time, stat
from ..processes import identity as identity
from ..processes import send as send
from ..records import Process


def recorded(path: Path) -> Process:
    """The identity that a file holds; of no process where it is missing or damaged."""
    try:
        return records.load(Process, path)
    except (FileNotFoundError, Damaged):
        return Process()


def is_alive(who: Process) -> bool:
    """Whether exactly the recorded process runs on this machine."""
    return processes.is_alive(dataclasses.asdict(who))


def signal_exactly(who: Process, number: signal.Signals) -> bool:
    """Signal the recorded process and no other, whoever has its pid by now; whether it was there."""
    return processes.signal_exactly(dataclasses.asdict(who), number)


def in_session(pid: int, session: int) -> bool:
    """Whether a process runs and is of that session."""
    fields = stat(pid)
    return fields is not None and fields[0] not in ENDED and int(fields[3]) == session


def session_members(session: int) -> list[int]:
    """Processes of a session that still run."""
    numbers = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isascii() and entry.name.isdecimal())
    return [pid for pid in numbers if in_session(pid, session)]


def survivors(leader: Process) -> list[int]:
    """Running processes of the session that the recorded process leads, itself included.

    A number stays taken as long as its session has members; if another process has the leader's pid, all of ours are gone.
    """
    return session_members(leader.pid) if leader.pid is not None and _is_its_session(leader) else []


def _is_its_session(leader: Process) -> bool:
    if leader.pid is None or leader.boot != boot_id():
        return False
    began = start_time(leader.pid)
    return began is None or began == leader.pid_started


def kill_survivors(leader: Process) -> None:
    """End what is left of the session that the recorded process leads."""
    left = survivors(leader)
    for pid in left:
        send(pid, signal.SIGKILL, lambda pid: _is_its_session(leader) and in_session(pid, leader.pid or 0))


def kill_session(session: int, spared: int) -> None:
    """End the processes of a session, but for one."""
    for pid in session_members(session):
        if pid != spared:
            send(pid, signal.SIGKILL, lambda pid: in_session(pid, session))
