"""Trainings beside other work: at the lowest priority, and stopped at a step boundary while the machine is wanted."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import quiet

from hpc_cifar import files
from hpc_cifar.launch.status import is_live
from hpc_cifar.runs import Run

POLL_S = 0.5
CALM_S = 5.0  # for which nobody may have held the lock: the parts of a test follow one another
PR_SET_PDEATHSIG = 1
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """A signal asked this program to end; the training has stopped at a checkpoint. ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


class Attendant:
    """While active: the priority, the signals, and the lock of those who want the machine.

    Args:
        wanted: lock that others hold while trainings are to wait.
        trained: lock that is held here while a training runs.
        niceness: how much lower the priority becomes; 0 leaves it, and that of the disk, as it is.
    """

    def __init__(self, wanted: Path, trained: Path, niceness: int) -> None:
        self._wanted, self._trained, self._niceness = wanted, trained, niceness
        self._signals = 0
        self._number = 0
        self._previous: dict[int, Any] = {}
        self._descriptor = -1
        self.asked = False  # the training that runs now, to stop

    def __enter__(self) -> Attendant:
        lower_priority(self._niceness)
        for number in SIGNALS:
            before = signal.getsignal(number)
            if number == signal.SIGHUP and before is signal.SIG_IGN:  # under nohup
                continue
            self._previous[number] = signal.signal(number, self._heard)
        self._descriptor = quiet.opened(self._trained)
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self._descriptor)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _heard(self, number: int, _: types.FrameType | None) -> None:
        self._number = number
        self._signals += 1

    def begun(self) -> None:
        """A training begins; who wants the machine waits for its end. Raises Stopped instead, if that was asked for before."""
        if self._signals:
            raise Stopped(self._number)
        self.asked = False
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def ended(self) -> None:
        """Raises Stopped if that was asked for meanwhile."""
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        if self._signals:
            raise Stopped(self._number)

    def look(self, child: subprocess.Popen[bytes]) -> None:
        """Have the training stop at its next step boundary if it should; at once if a signal came again."""
        if self._signals > 1:
            child.kill()
        elif not self.asked and (self._signals or quiet.is_held(self._wanted)):
            self.asked = True
            if not self._signals:
                print("systems: the machine is wanted; the training stops at a checkpoint", flush=True)
            child.terminate()

    def wait_until_free(self, run: Run) -> None:
        """Until nobody has held the lock for some seconds, and no other process trains the run."""
        self._wait(lambda: quiet.is_held(self._wanted), CALM_S, "waits while the machine is wanted")
        self._wait(lambda: is_live(run) is True, 0.0, f"waits until {run.id} is trained by nobody else")

    def _wait(self, is_busy: Callable[[], bool], calm_s: float, words: str) -> None:
        busy_at, told = float("-inf"), False
        while True:
            if self._signals:
                raise Stopped(self._number)
            if is_busy():
                busy_at = time.monotonic()
                if not told:
                    print(f"systems: {words}", flush=True)
                told = True
            elif time.monotonic() - busy_at >= calm_s:
                return
            time.sleep(POLL_S)

    def prepare(self, dataset: str) -> None:
        """Its images, if they are not there yet."""
        while not (files.data_root() / dataset).exists():
            self._wait(lambda: quiet.is_held(self._wanted), CALM_S, "waits while the machine is wanted")
            status = watched([sys.executable, "-m", "hpc_cifar", "prepare", dataset], self)
            if status != 0 and not self.asked:
                raise SystemExit(f"systems: {dataset} cannot be prepared; hpc-cifar prepare {dataset} says why")


def lower_priority(niceness: int) -> None:
    """Of this process and what it starts: processors, and the disk where that can be had."""
    os.nice(niceness)
    if niceness and (program := shutil.which("ionice")):
        subprocess.run([program, "-c", "3", "-p", str(os.getpid())], check=False, capture_output=True)


def watched(command: Sequence[str], attendant: Attendant | None) -> int:
    """The exit code of a command that an attendant may stop. If this process is killed, the command is asked to stop, too."""
    if attendant is not None:
        attendant.begun()
    parent, libc = os.getpid(), ctypes.CDLL(None)

    def stops_with_parent() -> None:
        if attendant is None:
            return
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a training would end at once; the attendant asks it to stop
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    child = subprocess.Popen(command, preexec_fn=stops_with_parent)
    if attendant is None:
        return child.wait()
    while child.poll() is None:
        attendant.look(child)
        time.sleep(POLL_S)
    attendant.ended()
    return child.returncode
