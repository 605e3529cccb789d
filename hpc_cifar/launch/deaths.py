"""What killed a rank: Slurm's words in the job's log, and the kernel's count of processes that were killed for memory."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path

from .policy import Event

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
MOST_READ = 1 << 20  # of a log, from its end
# srun: error: n1: task 1: Killed / tasks 0-1: Segmentation fault (core dumped) / task 1: Out Of Memory
_TASK = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): ([^\n]+)")
_OOM = re.compile(r"detected \d+ oom[_ -]kill|oom[_ -]kill event|out of memory", re.IGNORECASE)


@dataclass(frozen=True)
class Death:
    """A rank that was ended by a signal, as srun told it."""

    ranks: str
    node: str
    signal: int | None  # None where Slurm says that it was for memory

    @property
    def event(self) -> Event:
        return Event.OUT_OF_MEMORY if self.signal is None else Event.KILLED

    def __str__(self) -> str:
        several = bool(set(self.ranks) & set(",-"))
        who = f"ranks {self.ranks} on {self.node} were" if several else f"rank {self.ranks} on {self.node} was"
        if self.signal is None:
            return f"{who} killed for memory"
        usually = ", usually for memory" if self.signal == signal.SIGKILL else ""
        return f"{who} killed by signal {self.signal} ({signal.Signals(self.signal).name}){usually}"


def signal_of(words: str) -> int | None:
    """The number of a signal that strsignal(3) describes so; None if it is none."""
    plain = re.sub(r" \(core dumped\)$", "", words.strip())
    return next((number for number in signal.Signals if signal.strsignal(number) == plain), None)


def in_log(text: str) -> Death | None:
    """The first rank that was killed, in what srun printed; for memory before others, whose TERM says nothing."""
    announced = signal.Signals.__members__.get(f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}", signal.SIGUSR2)
    found = [(match[2], match[1], match[3]) for match in _TASK.finditer(text)]
    for ranks, node, words in found:
        if _OOM.search(words):
            return Death(ranks, node, None)
    for ranks, node, words in found:
        number = signal_of(words)
        if number is not None and number not in (signal.SIGTERM, announced):
            memory = number == signal.SIGKILL and _OOM.search(text)
            return Death(ranks, node, None if memory else number)
    return None


def size(log: Path) -> int:
    """Bytes of a log; 0 if there is none."""
    try:
        return log.stat().st_size
    except OSError:
        return 0


def since(log: Path, begin: int) -> str:
    """What was added to a log."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(begin, size(log) - MOST_READ))
            return stream.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def killed_for_memory() -> dict[str, int]:
    """How many processes the kernel has killed for memory in each cgroup of this job, by path: from this process's own up to
    the job's, or its own alone where Slurm made none. What lies above is other jobs' too.

    cgroup v2 counts below a cgroup too (``memory.events``), v1 in the cgroup alone (``memory.oom_control``).
    """
    counts: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for line in OWN.read_text(encoding="utf-8").splitlines():
            number, controllers, inner = line.split(":", 2)
            if number == "0":
                root, name = CGROUPS, "memory.events"
                root = CGROUPS / "unified" if (CGROUPS / "unified").is_dir() else CGROUPS
            elif "memory" in controllers.split(","):
                root, name = CGROUPS / "memory", "memory.oom_control"
            else:
                continue
            parts = inner.strip("/").split("/")
            top = next((depth for depth, part in enumerate(parts, 1) if part.startswith("job_")), len(parts))
            for depth in range(len(parts), top - 1, -1):
                folder = root.joinpath(*parts[:depth])
                with contextlib.suppress(OSError, ValueError):
                    fields = dict(row.split() for row in (folder / name).read_text(encoding="utf-8").splitlines())
                    counts[str(folder)] = int(fields.get("oom_kill", 0))
    return counts
