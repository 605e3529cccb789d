"""The processes beside rank 0 that upload, one a tracker, so that neither the training nor another tracker waits for one.

Each is ``hpc-cifar sync RUN --beside --to NAME``: it reads what rank 0 writes to the run directory, and ends when its standard
input does.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable

from .. import owner, processes
from ..config.experiment import Tracking
from ..runs import Run
from . import underway
from .tracker import FINISH_S, MODULES, WANDB, chosen, load

VARIABLE = "HPC_CIFAR_WANDB_START_S"  # another START_S, where Python starts slowly
OPENED = "opened"  # what it prints once its tracker has answered
REQUEUE_S = 4.0
PATIENCE_S, START_S = 2.0, 15.0  # for one whose tracker has not answered: at the end, and since its start
SPARE_S = 5.0  # between the last word of a run and the end of its upload, in addition


class Companions:
    """Those of one segment, started by rank 0.

    Args:
        say: prints one line for people.
    """

    def __init__(self, run: Run, tracking: Tracking, say: Callable[[str], None]) -> None:
        self._run = run
        for name in MODULES:  # of an earlier segment
            underway.end(run, name)
        self._all = [Companion(run, name, say) for name in chosen(tracking) if load(name).begins(run, tracking, say)]

    def finish(self) -> None:
        """Let them upload the rest, all at once, in bounded time. Rank 0 has written how the segment ended."""
        requeued = self._run.state().state == "requeued"
        for companion in self._all:
            companion.close(requeued)
        waiting = self._all
        while waiting := [companion for companion in waiting if not companion.ended()]:
            time.sleep(0.05)
        self._all = []


class Companion:
    """The process that feeds one tracker."""

    def __init__(self, run: Run, tracker: str, say: Callable[[str], None]) -> None:
        self._run, self._tracker, self._title, self._say = run, tracker, load(tracker).TITLE, say
        self._later = f"hpc-cifar sync {run.id}" + (f" --to {tracker}" if tracker != WANDB else "")
        self._begun = self._closed = time.monotonic()
        self._answer_s, self._finish_s, self._opened = 0.0, 0.0, False
        self.process: subprocess.Popen[bytes] | None = None
        command = [sys.executable, "-m", "hpc_cifar", "sync", str(run.path), "--beside", "--to", tracker]
        if not owner.is_own(run.path):  # whoever resumed it has said whose code may run
            command += ["--code-of", str(owner.of(run.path))]
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True  # a Ctrl-C is for the ranks
            )  # fmt: skip
        except OSError as error:
            say(f"{self._title}: no process for it ({error.strerror}); {self._later} uploads later")
            return
        underway.begin(run, tracker, self.process.pid, max(_answer_s(), FINISH_S) + SPARE_S)

    def close(self, requeued: bool) -> None:
        """Tell it that the training has ended; it is not waited for. A short run is to arrive, but nothing waits for a tracker
        where the machine is wanted back.
        """
        self._closed = time.monotonic()
        self._answer_s, self._finish_s = (0.0, REQUEUE_S) if requeued else (_answer_s(), FINISH_S)
        if self.process is not None and self.process.stdin is not None and self.process.stdout is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
            os.set_blocking(self.process.stdout.fileno(), False)

    def ended(self) -> bool:
        """Whether it has ended by now; it is made to, once its time is up."""
        process = self.process
        if process is None or process.stdout is None:
            return True
        code = process.poll()
        if code is None:
            self._opened = self._opened or OPENED.encode() in (process.stdout.read() or b"")
            patience = max(self._closed + PATIENCE_S, self._begun + self._answer_s)
            if time.monotonic() <= (self._closed + self._finish_s if self._opened else patience):
                return False
            processes.end_family(process.pid)  # a service of its client, too, which may be reading an answer that has no end
            code = process.wait()
        self.process = None
        underway.end(self._run, self._tracker)
        if code:
            self._say(f"{self._title} has not got everything: {self._later} uploads the rest")
        return True


def _answer_s() -> float:
    return float(os.environ.get(VARIABLE, START_S))
