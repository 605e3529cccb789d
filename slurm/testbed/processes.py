"""Daemons of the test cluster: started here, recorded with their start time, stopped only if they are still the same."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


class ClusterError(Exception):
    """One clear line for the user."""


def start_time(pid: int) -> int | None:
    """Clock ticks since boot at which ``pid`` began, or None if it is gone (a zombie is gone)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


class Daemons:
    """The daemons of one cluster folder; ``daemons.json`` outlives whoever started them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "daemons.json"
        try:
            self.known: dict[str, list[int]] = json.loads(self.file.read_text())
        except (OSError, ValueError):
            self.known = {}

    def start(self, name: str, command: Sequence[str], *, environment: dict[str, str] | None = None) -> None:
        """Start ``command`` in its own session; its output goes to ``log/<name>.out``."""
        with (self.folder / "log" / f"{name}.out").open("ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd=self.folder,
                env={**os.environ, **(environment or {})},
            )
        began = start_time(process.pid)
        if began is not None:
            self.known[name] = [process.pid, began]
            temporary = self.file.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.known))
            temporary.replace(self.file)

    def running(self, name: str) -> int | None:
        """The pid of daemon ``name`` if it is still the process that was started."""
        pid, began = self.known.get(name, (0, 0))
        return pid if pid and start_time(pid) == began else None

    def stop(self, names: Iterable[str], patience_s: float = 5.0) -> None:
        """Ask each to end, then kill it."""
        names = list(names)
        for number, wait_s in ((signal.SIGTERM, patience_s), (signal.SIGKILL, 2.0)):
            for name in names:
                if pid := self.running(name):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
            until(lambda: not any(self.running(name) for name in names), wait_s)

    def last_words(self, name: str) -> str:
        """The end of what a daemon wrote, for an error message."""
        lines: list[str] = []
        for path in (self.folder / "log" / f"{name}.log", self.folder / "log" / f"{name}.out"):
            with contextlib.suppress(OSError):
                lines += [line for line in path.read_text(errors="replace").splitlines() if line.strip()][-3:]
        return " | ".join(lines) or "it wrote nothing"


def until(condition: Callable[[], object], seconds: float) -> bool:
    """Whether ``condition`` became true in time; reaps children that ended meanwhile."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if condition():
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)


def members(hosts_file: Path) -> list[int]:
    """Every process that sees ``hosts_file`` as its /etc/hosts: exactly what runs on that node of this cluster."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            mounts = (entry / "mountinfo").read_text(errors="replace")
        except OSError:
            continue
        for line in mounts.splitlines():
            fields = line.split()
            # the fields are id, parent, device, root inside its file system, mount point: root ends in the file's own name
            if len(fields) > 4 and fields[4] == "/etc/hosts" and Path(fields[3]).name == hosts_file.name:
                found.append(int(entry.name))
                break
    return found


def kill_members(hosts_file: Path) -> int:
    """SIGKILL everything on a node, as when the machine loses power; the number of processes."""
    total = 0
    for _ in range(50):  # a process may fork between the listing and the kill
        pids = members(hosts_file)
        if not pids:
            break
        total += len(pids)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda pids=pids: all(start_time(pid) is None for pid in pids), 1.0)
    return total
