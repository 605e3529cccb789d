"""What the control groups of this process, of version 1 or 2, allow it and say of it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Set
from pathlib import Path

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def memory_limits(groups: Path = GROUPS, own: Path = OWN) -> Iterator[tuple[int, int]]:
    """Bytes that each group may use and does use, without files that the kernel can let go of.

    Args:
        groups: where the control groups are mounted.
        own: what lists those of this process.
    """
    for folder in _folders("memory", groups, own):
        v1 = (folder / "memory.limit_in_bytes").exists()
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
        with contextlib.suppress(OSError, ValueError):  # no limit there, or the text "max"
            limit, used = (int((folder / name).read_text()) for name in names)
            cached = number(rf"^{'total_' if v1 else ''}inactive_file (\d+)", (folder / "memory.stat").read_text())
            yield limit, used - cached


def processors(every: Set[int], groups: Path = GROUPS, own: Path = OWN) -> Set[int]:
    """Those of the uppermost group that does not have all of the machine: the job's, below which are those of its tasks.

    Args:
        every: numbers of the processors of the machine; the answer where no group has fewer.
    """
    for folder in reversed([*_folders("cpuset", groups, own)]):
        for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
            with contextlib.suppress(OSError, ValueError):
                some = every & _listed((folder / name).read_text())
                if some and some != every:
                    return some
    return every


def _folders(controller: str, groups: Path, own: Path) -> Iterator[Path]:
    """Groups of this process with a controller, from its own upwards; in a container its own is the uppermost one."""
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            hierarchy, controllers, path = [*line.split(":", 2), "", ""][:3]
            if hierarchy != "0" and controller not in controllers.split(","):
                continue
            mounted = groups / controller if controllers else groups
            group = mounted / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mounted))


def _listed(text: str) -> set[int]:
    """Numbers as the kernel lists them: ``0-3,8``."""
    ends = [part.partition("-")[::2] for part in text.strip().split(",") if part]
    return {number for first, last in ends for number in range(int(first), int(last or first) + 1)}


def number(pattern: str, text: str) -> int:
    """The first group of a pattern as a number, 0 without a match."""
    found = re.search(pattern, text, re.MULTILINE)
    return int(found[1]) if found else 0
