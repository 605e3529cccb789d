"""What a process leaves out, mostly one that trains: at its start, meanwhile and at its end."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import sys

OFTEN = gc.get_threshold()
_code: int | None = None


def collect_rarely() -> None:
    """For commands that read many runs and soon end: little of what they make is garbage, and to look for it takes a tenth."""
    gc.set_threshold(100_000)


def collect_later() -> None:
    """No garbage collection during the imports: it finds nothing and takes a tenth of the start."""
    gc.disable()


def collect_again() -> None:
    """Collect garbage, if that was switched off: what is here now stays, and is not looked at again."""
    if not gc.isenabled():
        gc.set_threshold(*OFTEN)  # what trains goes on for long, with much memory in its garbage
        gc.freeze()
        atexit.register(gc.unfreeze)  # libraries in C++ complain at the end of what was not freed
        gc.enable()


def leave_soon(code: int) -> None:
    """Have the process end with ``code`` once its exit handlers have run, without taking apart what the system takes back.

    To free every module of torch takes a processor most of a second, during which a job holds its nodes and a preempted one its
    grace time. An exception that ends the process after this call has its own exit code.
    """
    global _code
    _code = code


def _leave() -> None:
    # profilers that write when the process ends
    watched = os.environ.get("LD_PRELOAD") or os.environ.get("CUDA_INJECTION64_PATH")
    if _code is None or watched or hasattr(sys, "last_value"):
        return
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        ctypes.CDLL(None).fflush(None)  # what libraries in C have printed
    except (OSError, ValueError, AttributeError):
        return  # the interpreter says what is wrong
    os._exit(_code)


# handlers run in reverse order: this one, registered before torch is imported, runs after all that torch and others register
atexit.register(_leave)
