"""The process beside rank 0 that uploads to W&B, so that training never waits for it, whatever the server does.

It is ``hpc-cifar sync RUN --beside``: it reads what rank 0 writes to the run directory, and ends when its standard input does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

from .. import owner, processes
from ..config.experiment import Tracking
from ..runs import Run
from . import identity, underway
from .wandb_run import FINISH_TIMEOUT_S, mode, server

VARIABLE = "HPC_CIFAR_WANDB_START_S"  # another START_S, where Python starts slowly
OPENED = "opened"  # what it prints once W&B has answered
REQUEUE_S = 4.0
PATIENCE_S, START_S = 2.0, 15.0  # for one to which W&B has not answered: at the end, and since its start
SPARE_S = 5.0  # between the last word of a run and the end of its upload, in addition


class Companion:
    """Started by rank 0, for a job that wants W&B and can reach it; else nothing.

    Args:
        say: prints one line for people.
    """

    def __init__(self, run: Run, tracking: Tracking, say: Callable[[str], None]) -> None:
        self._run, self._say = run, say
        self.mode = mode(tracking.wandb, say)
        if self.mode != "disabled":
            identity.note(run, server(), say)
        self._begun = time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None
        underway.end(run)  # of an earlier segment
        if self.mode != "online":
            return
        command = [sys.executable, "-m", "hpc_cifar", "sync", str(run.path), "--beside"]
        if not owner.is_own(run.path):  # whoever resumed it has said whose code may run
            command += ["--code-of", str(owner.of(run.path))]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True  # a Ctrl-C is for the ranks
            )  # fmt: skip
        except OSError as error:
            self._say(f"W&B: no process for it ({error.strerror}); hpc-cifar sync {run.id} uploads later")
            return
        underway.begin(run, self._process.pid, max(_answer_s(), FINISH_TIMEOUT_S) + SPARE_S)

    def finish(self) -> None:
        """Let it upload the rest, in bounded time. Rank 0 has written how the segment ended."""
        process, self._process = self._process, None
        if process is None or process.stdin is None or process.stdout is None:
            return
        process.stdin.close()
        os.set_blocking(process.stdout.fileno(), False)
        closed, opened = time.monotonic(), False
        # a short run is to arrive, but nothing waits for W&B where the machine is wanted back
        answer, finish = (0.0, REQUEUE_S) if self._run.state().state == "requeued" else (_answer_s(), FINISH_TIMEOUT_S)
        while (code := process.poll()) is None:
            opened = opened or OPENED.encode() in (process.stdout.read() or b"")
            if time.monotonic() > (closed + finish if opened else max(closed + PATIENCE_S, self._begun + answer)):
                processes.end_family(process.pid)  # its service too, which may be reading an answer that has no end
                code = process.wait()
                break
            time.sleep(0.05)
        underway.end(self._run)
        if code:
            self._say(f"W&B has not got everything: hpc-cifar sync {self._run.id} uploads the rest")


def _answer_s() -> float:
    return float(os.environ.get(VARIABLE, START_S))
