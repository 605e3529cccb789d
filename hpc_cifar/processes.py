"""Processes of this machine by identity: a pid and its start time, so that a recycled pid is never taken for ours."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

ENDED = "ZX"  # zombie, dead: such a process runs no more code


def stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third (state) on; the second, the command, may hold spaces and brackets."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def start_time(pid: int) -> int | None:
    """Clock ticks after boot at which ``pid`` began, or None if there is no such process."""
    fields = stat(pid)
    return int(fields[19]) if fields else None


def children(pid: int) -> list[int]:
    """Processes that ``pid`` started and that have not been waited for."""
    found: list[int] = []
    try:
        for path in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
                found += map(int, (path / "children").read_text().split())
    except OSError:
        return []
    return found


def descendants(pid: int) -> list[int]:
    """Its children, theirs, and so on: who came later after who came before."""
    found = children(pid)
    for one in found:
        found += children(one)
    return found


def end_family(pid: int) -> None:
    """Kill a child of this process, and before it all that it started, in whatever sessions they are."""
    for one in reversed(descendants(pid)):
        send(one, signal.SIGKILL, lambda one: one in descendants(pid))
    send(pid, signal.SIGKILL, lambda _: pid in children(os.getpid()))


def boot_id() -> str:
    """Differs after every boot, since pids and start times may repeat."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def identity(pid: int) -> dict[str, int | str]:
    """What to record in order to find this process again."""
    return {"pid": pid, "pid_started": start_time(pid) or 0, "boot": boot_id(), "host": socket.gethostname()}


def is_there(who: Mapping[str, object]) -> bool:
    """Whether exactly the recorded process is on this machine, ended or not."""
    pid = who.get("pid")
    if type(pid) is not int or pid < 1 or who.get("boot") != boot_id():
        return False
    return start_time(pid) == who.get("pid_started")


def is_alive(who: Mapping[str, object]) -> bool:
    """Whether exactly the recorded process runs on this machine."""
    pid = who.get("pid")
    if type(pid) is not int or pid < 1 or who.get("boot") != boot_id():
        return False
    fields = stat(pid)
    return fields is not None and fields[0] not in ENDED and int(fields[19]) == who.get("pid_started")


def signal_exactly(who: Mapping[str, object], number: signal.Signals) -> bool:
    """Signal the recorded process and no other, whoever has its pid by now; whether it was there."""
    pid = who.get("pid")
    return isinstance(pid, int) and is_there(who) and send(pid, number, lambda _: is_there(who))


def send(pid: int, number: signal.Signals, still: Callable[[int], bool] = lambda _: True) -> bool:
    """Signal one process; that it has gone already is no error. Returns whether it was signalled.

    Args:
        still: whether the process is the one that is meant; asked once the pid cannot pass to another process any more.

    Raises:
        PermissionError: it is another user's.
    """
    held = None
    try:
        try:
            held = os.pidfd_open(pid)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EPERM, errno.EINVAL):  # Linux before 5.3, and some containers
                return False
        if not still(pid):
            return False
        if held is None:
            os.kill(pid, number)
        else:
            signal.pidfd_send_signal(held, number)
    except ProcessLookupError:
        return False
    finally:
        if held is not None:
            os.close(held)
    return True
