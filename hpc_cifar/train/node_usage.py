"""How busy the nodes of a run are while it trains: processors, memory and GPUs, a row of ``metrics.jsonl`` an epoch.

The first rank of each node looks now and then, in a thread of its own. At the end of an epoch, where the ranks have just met,
the means of all nodes reach rank 0; on a single node nothing is sent.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import cgroups
from .distributed import World
from .nvml import Gpus

PROCESSORS, MEMORY = Path("/proc/stat"), Path("/proc/meminfo")
SOON_S, EVERY_S = 0.1, 5.0  # a short run is looked at, too: each time twice as long after the last one
MOST_NODES = 64  # that are told of: a row has some thousand figures then
MIB = 2**20


class NodeUsage:
    """The nodes of a run. Make, ask and close it on every rank."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._alone = world.local_size == world.size
        self._sampler = Sampler(_uuids(world)) if world.local_rank == 0 else None

    def taken(self) -> dict[str, float]:
        """Means since the last call on rank 0, such as ``node1_cpu_percent``; nodes are numbered in the order of their ranks.

        Empty on other ranks, and where nobody has looked since.
        """
        own = None if self._sampler is None else self._sampler.taken()
        every = [own] if self._alone else self._world.gather(own) or []
        if not self._world.main:
            return {}
        nodes = [one for one in every if one is not None][:MOST_NODES]
        return {f"node{number}_{name}": value for number, one in enumerate(nodes) for name, value in one.items()}

    def close(self) -> None:
        if self._sampler is not None:
            self._sampler.close()


class Sampler:
    """Looks at this node, and keeps sums.

    Args:
        uuids: of the GPUs to look at.
        look: makes what is called for each look, in the thread.
    """

    def __init__(self, uuids: Sequence[str] = (), look: Callable[[Sequence[str]], Look] | None = None) -> None:
        self._uuids, self._make = uuids, look or Look
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        threading.Thread(target=self._work, name="node usage", daemon=True).start()

    def taken(self) -> dict[str, float]:
        """Means since the last call; nothing that was not seen since."""
        with self._lock:
            sums, counts = self._sums, self._counts
            self._sums, self._counts = {}, {}
        return {name: round(value / counts[name], 1) for name, value in sums.items()}

    def close(self) -> None:
        self._closed.set()

    def _work(self) -> None:
        # nothing that is only looked at ends a training, whatever a driver does
        with contextlib.suppress(Exception):
            look, pause = self._make(self._uuids), SOON_S
            while not self._closed.wait(pause):
                found, pause = look(), min(2 * pause, EVERY_S)
                with self._lock:
                    for name, value in found.items():
                        self._sums[name] = self._sums.get(name, 0.0) + value
                        self._counts[name] = self._counts.get(name, 0) + 1


class Look:
    """One look at this node after the other: ``cpu_percent`` since the last one, ``memory_mib``, and its GPUs."""

    def __init__(self, uuids: Sequence[str] = ()) -> None:
        self._gpus = Gpus(uuids)
        self._before = ticks()
        self._allowed = cgroups.processors(self._before.keys())

    def __call__(self) -> dict[str, float]:
        now, before, found = ticks(), self._before, {}
        self._before = now
        pairs = [(now[number], before[number]) for number in self._allowed if number in now and number in before]
        if passed := sum(after[1] - earlier[1] for after, earlier in pairs):
            found["cpu_percent"] = 100 * sum(after[0] - earlier[0] for after, earlier in pairs) / passed
        if used := used_host_bytes():
            found["memory_mib"] = used / MIB
        return found | self._gpus.sample()


def _uuids(world: World) -> list[str]:
    """Of the GPUs that the ranks of this node use, as far as this rank is shown them."""
    if not world.on_gpu:
        return []
    count = min(torch.cuda.device_count(), world.local_size)
    return [str(torch.cuda.get_device_properties(index).uuid) for index in range(count)]


def ticks(stat: Path = PROCESSORS) -> dict[int, tuple[int, int]]:
    """Busy time and all time of each processor since the machine was started, in clock ticks."""
    found = {}
    for number, line in re.findall(r"^cpu(\d+) (.*)", stat.read_text(), re.MULTILINE):
        # user, nice, system, idle, iowait, irq, softirq, steal; what follows is in the first two already
        times = [int(one) for one in line.split()[:8]]
        found[int(number)] = sum(times) - sum(times[3:5]), sum(times)
    return found


def used_host_bytes(meminfo: Path = MEMORY, groups: Path = cgroups.GROUPS, own: Path = cgroups.OWN) -> int:
    """Memory in use, without files that the kernel can let go of: of what the job may use where that is limited, else of the
    machine; 0 where that is not known.
    """
    text = meminfo.read_text()
    total, free = (cgroups.number(rf"^{name}:\s+(\d+) kB", text) * 1024 for name in ("MemTotal", "MemAvailable"))
    limits = [(limit, -used) for limit, used in cgroups.memory_limits(groups, own) if limit < total]
    return -min(limits)[1] if limits else total - free  # of several with one limit the uppermost, which has the most
