"""Run a command while the trainings of ``make systems`` on this machine wait at a checkpoint.

    python benchmarks/quiet.py COMMAND...

Whoever tests or measures holds a lock that any number of processes may share, and that the kernel frees however they end.
``make systems`` looks at it, stops its training at a step boundary as long as anybody has it, and goes on afterwards. Nothing
but Python's own modules is used here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import stat
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

WAIT_S = 60.0  # at most, for a training to have stopped: it ends its step, or its test, and saves


def lock_file() -> Path:
    """``HPC_CIFAR_BUSY_FILE``, else a file of this user where temporary files of the machine lie."""
    folder = os.environ.get("XDG_RUNTIME_DIR") or "/tmp"
    return Path(os.environ.get("HPC_CIFAR_BUSY_FILE") or Path(folder) / f"hpc-cifar-busy-{os.getuid()}.lock")


def trained_file() -> Path:
    """Its counterpart, which ``make systems`` holds while a training runs."""
    path = lock_file()
    return path.with_name(f"{path.name}.training")


def opened(path: Path) -> int:
    """A descriptor of a lock file, made if need be; it is closed in child processes.

    Raises:
        OSError: it cannot be opened, or it is a link or another user's: in a folder for everybody, somebody else laid it there.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    facts = os.fstat(descriptor)
    if facts.st_uid != os.getuid() or not stat.S_ISREG(facts.st_mode):
        os.close(descriptor)
        raise PermissionError(f"{path}: is not a file of this user; HPC_CIFAR_BUSY_FILE can name another one")
    return descriptor


@contextlib.contextmanager
def shared(path: Path) -> Iterator[None]:
    """Hold the lock, beside others who share it."""
    descriptor = opened(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether anybody shares the lock right now. Looking takes it for a moment, if it is free."""
    descriptor = opened(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Have trainings in the background wait; the block begins when they have stopped, or after a minute."""
    with shared(lock_file()):
        deadline = time.monotonic() + WAIT_S
        while is_held(trained_file()) and time.monotonic() < deadline:
            time.sleep(0.1)
        yield


def main(command: list[str]) -> int:
    if not command or command[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if command else 2
    with quiet():
        child: subprocess.Popen[bytes] | None = None
        early: list[int] = []

        def hand_on(number: int, _: types.FrameType | None) -> None:
            if child is None:
                early.append(number)
            elif number != signal.SIGINT:  # which a terminal sends to the command as well
                child.send_signal(number)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, hand_on)
        child = subprocess.Popen(command)
        for one in early:
            child.send_signal(one)
        status = child.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
