"""How long ago something was, by the clock of this machine."""

from __future__ import annotations

import datetime
import math
import time
from pathlib import Path


def since_s(stamp: str | None) -> float:
    """Seconds since an ISO time; negative for a time to come, nan without a time."""
    try:
        return time.time() - datetime.datetime.fromisoformat(str(stamp)).timestamp()
    except (ValueError, OverflowError, OSError):  # no time at all, or of a year that the system does not know
        return math.nan


def age_s(stamp: str | None) -> float:
    """How far it is from now: a time to come is one of before the clock was set back, or of a machine with another clock."""
    seconds = abs(since_s(stamp))
    return math.inf if math.isnan(seconds) else seconds


def file_age_s(path: Path) -> float:
    """How far its last change is from now; inf without it."""
    try:
        return abs(time.time() - path.stat().st_mtime)
    except OSError:
        return math.inf
