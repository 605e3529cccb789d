"""Sessions of processes: what a controller started, and all that its ranks left behind. Single ones are ``processes``."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path

from ..processes import ENDED, boot_id, start_time, stat
from ..processes import identity as identity
from ..processes import is_alive as is_alive
from ..processes import send as send
from ..processes import signal_exactly as signal_exactly


def in_session(pid: int, session: int) -> bool:
    """Whether a process runs and is of that session."""
    fields = stat(pid)
    return fields is not None and fields[0] not in ENDED and int(fields[3]) == session


def session_members(session: int) -> list[int]:
    """Processes of a session that still run."""
    numbers = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isascii() and entry.name.isdecimal())
    return [pid for pid in numbers if in_session(pid, session)]


def survivors(leader: Mapping[str, object]) -> list[int]:
    """Running processes of the session that the recorded process leads, itself included.

    A number stays taken as long as its session has members; if another process has the leader's pid, all of ours are gone.
    """
    pid = leader.get("pid")
    return session_members(pid) if isinstance(pid, int) and _is_its_session(leader) else []


def _is_its_session(leader: Mapping[str, object]) -> bool:
    pid = leader.get("pid")
    if not isinstance(pid, int) or leader.get("boot") != boot_id():
        return False
    began = start_time(pid)
    return began is None or began == leader.get("pid_started")


def kill_survivors(leader: Mapping[str, object]) -> None:
    """End what is left of the session that the recorded process leads."""
    left = survivors(leader)
    for pid in left:
        send(pid, signal.SIGKILL, lambda pid: pid in survivors(leader))


def kill_session(session: int, spared: int) -> None:
    """End the processes of a session, but for one."""
    for pid in session_members(session):
        if pid != spared:
            send(pid, signal.SIGKILL, lambda pid: in_session(pid, session))
