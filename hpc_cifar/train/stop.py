"""Stopping: signals set a flag; the ranks agree on one step boundary."""

from __future__ import annotations

import os
import signal
import time
import types
from typing import Any

import torch
import torch.distributed as dist

from .distributed import World

# what a signal asks for; a larger number wins when ranks differ
REASONS = {0: "", 1: "interrupted", 2: "terminated", 3: "preempted", 4: "pruned"}


def preemption_signal() -> signal.Signals:
    """The signal submitit sends before preemption and time limits: USR2, or what ``SUBMITIT_PREEMPT_SIGNAL`` names."""
    name = "SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")
    return signal.Signals.__members__.get(name, signal.SIGUSR2)


def word_for(reason: str, cancelled: bool) -> str:
    """The state of a run that stops for ``reason`` before its end."""
    requeue = reason == "preempted" and "SUBMITIT_EXECUTOR" in os.environ
    return "cancelled" if cancelled else "requeued" if requeue else "stopped"


class StopAsked(Exception):
    """The ranks agreed to stop where no step can be broken off; ``reason`` is the agreement's."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class StopFlag:
    """While active, INT, TERM and the preemption signal only set a flag; a second INT ends the process at once."""

    def __init__(self) -> None:
        self.code = 0
        self._since: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopFlag:
        codes = {signal.SIGINT: 1, signal.SIGTERM: 2}
        codes[preemption_signal()] = 3

        def handle(number: int, _: types.FrameType | None) -> None:
            if number == signal.SIGINT and self.code == 1:
                raise KeyboardInterrupt
            self.code = max(self.code, codes[signal.Signals(number)])
            self._since = self._since or time.monotonic()

        for which in codes:
            self._previous[which] = signal.signal(which, handle)
        return self

    def prune(self) -> None:
        """As a signal would: the run is given up, whatever else is asked of it."""
        self.code = 4

    def milliseconds(self) -> int | None:
        """Since this process heard of the first signal; None if it heard of none."""
        return None if self._since is None else round(1000 * (time.monotonic() - self._since))

    def __exit__(self, *_: Any) -> None:
        for which, handler in self._previous.items():
            signal.signal(which, handler)


class StopAgreement:
    """Every rank learns of a stop at the same step boundary, without waiting for the device.

    At each boundary a one-number all-reduce (gloo, in the background) starts with this rank's flag; its result is read at
    the next boundary. So all ranks act one step after the first of them was signalled, and a step hides the exchange.
    """

    def __init__(self, flag: StopFlag, world: World) -> None:
        self._flag = flag
        self._group = world.control
        self._pending: tuple[Any, torch.Tensor] | None = None

    def at_boundary(self) -> str:
        """Why to stop here, or "". Call once after every step, on every rank."""
        if self._group is None:
            return REASONS[self._flag.code]
        agreed = self.settle()
        vote = torch.tensor([self._flag.code])
        self._pending = (dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self._group, async_op=True), vote)
        return agreed

    def settle(self) -> str:
        """Finish the exchange in flight and return its outcome."""
        if self._pending is None:
            return ""
        work, vote = self._pending
        self._pending = None
        work.wait()
        return REASONS[int(vote)]
