"""Processes of this machine by identity: a pid and its start time, so that a recycled pid is never taken for ours."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path

from .. import records
from ..files import Damaged
from ..records import Process

ENDED = "ZX"  # zombie, dead: such a process runs no more code


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third (state) on; the second, the command, may hold spaces and brackets."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def start_time(pid: int) -> int | None:
    """Clock ticks after boot at which ``pid`` began, or None if there is no such process."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def boot_id() -> str:
    """Differs after every boot, since pids and start times may repeat."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def identity(pid: int) -> dict[str, int | str]:
    """What to record in order to find this process again."""
    return {"pid": pid, "pid_started": start_time(pid) or 0, "boot": boot_id(), "host": socket.gethostname()}


def recorded(path: Path) -> Process:
    """The identity that a file holds; of no process where it is missing or damaged."""
    try:
        return records.load(Process, path)
    except (FileNotFoundError, Damaged):
        return Process()


def is_alive(who: Process) -> bool:
    """Whether exactly the recorded process runs on this machine."""
    if who.pid is None or who.boot != boot_id():
        return False
    fields = _stat(who.pid)
    return fields is not None and fields[0] not in ENDED and int(fields[19]) == who.pid_started


def session_members(session: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields and fields[0] not in ENDED and int(fields[3]) == session:
                found.append(int(entry.name))
    return found


def survivors(leader: Process) -> list[int]:
    """Running processes of the session that the recorded process leads, itself included.

    A number stays taken as long as its session has members; if another process has the leader's pid, all of ours are gone.
    """
    if leader.pid is None or leader.boot != boot_id():
        return []
    began = start_time(leader.pid)
    if began is not None and began != leader.pid_started:
        return []
    return session_members(leader.pid)


def send(pid: int, number: signal.Signals) -> None:
    """Signal one process; that it has gone already is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
