"""How long a process took to its first training step, stage by stage."""

from __future__ import annotations

import os
import time
from pathlib import Path

_ends: list[tuple[str, float]] = []  # stages and when they ended, in seconds since the boot of the machine


def done(stage: str) -> None:
    """``stage`` ends now; it began where the last one ended, the first one with the process."""
    _ends.append((stage, time.clock_gettime(time.CLOCK_BOOTTIME)))


def taken() -> dict[str, float]:
    """Seconds of each stage, in their order; the next call begins anew."""
    found: dict[str, float] = {}
    begin = _process_began()
    for stage, end in _ends:
        found[stage] = round(found.get(stage, 0.0) + end - begin, 3)
        begin = end
    _ends.clear()
    return found


def _process_began() -> float:
    """Seconds from the boot to the start of this process; see proc_pid_stat(5), field 22."""
    after_name = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return int(after_name[19]) / os.sysconf("SC_CLK_TCK")
