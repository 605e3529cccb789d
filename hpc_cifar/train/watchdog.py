"""Notices a run that hangs, records what every rank was doing, and ends the segment so that it can restart.

A rank that is stopped, or blocked on a dead disk, cannot speak for itself, and its peers wait for it in a collective. So every
rank has a thread that watches the rank's own progress. The first to run out of patience raises the alarm with a file; all who
see it write the stacks of their threads; what is left without a word is the rank that hangs.

<run>/heartbeat/rank-<r>.json       who and where a rank is, its step and phase; rewritten every few seconds
<run>/hangs/<segment>/alarm.json    who noticed first, when, at which step
<run>/hangs/<segment>/rank-<r>.txt  stacks of the threads of a rank
<run>/hangs/<segment>/rank-<r>-process.txt  what /proc says of a rank that does not answer, seen from a rank of its node
<run>/hangs/<segment>/report.json   the verdict; the other ranks wait for it before they leave
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .. import files, processes
from ..runs import now
from .distributed import World, is_lost_peer

POLL_S = 0.5
HEARTBEAT_S = 5.0
START_S = 900.0  # from the first heartbeat to the first step: loading, compiling
SLOW_PHASE = 5.0  # evaluation and saving may take this many times the limit
PATIENCE = 10.0  # a step may take this many times the slowest one so far
ASLEEP_S = 5.0  # between two polls: the whole process was stopped, as by Slurm's suspend, and that is no hang
ANSWER_S = 4.0  # for the other ranks to write their stacks
REPORT_S = 90.0  # for the rank that noticed to report and to ask for the restart: Slurm may be busy
GONE_S = 2.0  # for a rank that closed its connections to end
EXIT_CODE = 1
LEFT, FAILED = "left", "failed"  # last phases: it lost another rank; it was the first to go

OnHang = Callable[[str], int]
"""Called once, on the rank that noticed, with the reason; asks for the restart and gives the exit code of all ranks."""


class Watchdog:
    """Watches this rank's progress from a thread of its own, while the block lasts.

    Args:
        run: the run directory.
        segment: names this stretch of the run, the same on every rank.
        timeout_s: how long a step may take before the run counts as hung; None switches the watchdog off.
        on_hang: see :data:`OnHang`; None ends the process with :data:`EXIT_CODE`.
    """

    def __init__(
        self, run: Path, segment: str, world: World, timeout_s: float | None, on_hang: OnHang | None, say: Callable[[str], None]
    ) -> None:
        self._beats, self._alarm_folder = run / "heartbeat", run / "hangs" / segment
        self._segment, self._world, self._timeout_s, self._on_hang, self._say = segment, world, timeout_s, on_hang, say
        self._step, self._phase, self._moved = -1, "start", time.monotonic()
        self._longest_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._timeout_s is not None:
            self._beats.mkdir(exist_ok=True)
            self._write_beat()
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
            self.left(kind, error, None)

    # ---- called by the training loop ---------------------------------------------------------------------------------

    def step(self, step: int) -> None:
        """An update was made; costs well under a microsecond."""
        clock = time.monotonic()
        if self._step >= 0 and self._phase == "train":
            self._longest_s = max(self._longest_s, clock - self._moved)
        self._step, self._phase, self._moved = step, "train", clock

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Something slower than a step, such as ``evaluate`` or ``save``; ``compile`` may take as long as a start."""
        before = self._phase
        self._phase, self._moved = name, time.monotonic()
        try:
            yield
        finally:
            self._phase, self._moved = before, time.monotonic()

    def moved(self) -> None:
        """Within a phase of many parts: one of them is done."""
        self._moved = time.monotonic()

    def left(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Say if this rank ends with an error: whoever lost a rank can tell the first to go from those that follow.

        Its peers wait for it from now on, while it closes files and W&B; that is no hang.
        """
        if error is None or self._timeout_s is None:
            return
        self._phase = LEFT if isinstance(error, RuntimeError) and is_lost_peer(error) else FAILED
        self._moved = time.monotonic()
        with contextlib.suppress(OSError):
            self._write_beat()

    # ---- the thread ----------------------------------------------------------------------------------------------------

    @property
    def limit_s(self) -> float:
        """How long the rank may stay where it is."""
        assert self._timeout_s is not None
        if self._step < 0 or self._phase == "compile":
            return max(START_S, self._timeout_s)
        return max(self._timeout_s, PATIENCE * self._longest_s) * (1.0 if self._phase == "train" else SLOW_PHASE)

    def _watch(self) -> None:
        written, looked = 0.0, time.monotonic()
        alarm = self._alarm_folder / "alarm.json"
        while not self._stop.wait(POLL_S):
            clock = time.monotonic()
            if clock - looked > ASLEEP_S:
                self._moved += clock - looked
            looked = clock
            if clock - written > HEARTBEAT_S:
                written = clock
                with contextlib.suppress(OSError):  # a full disk is the training loop's to report
                    self._write_beat()
            with contextlib.suppress(OSError):
                if clock - self._moved > self.limit_s and not self._waits_for_a_failed_rank(clock):
                    self._raise_alarm(alarm)
                elif alarm.exists():
                    self._answer_and_leave()

    def _waits_for_a_failed_rank(self, clock: float) -> bool:
        if clock - self._moved > self.limit_s * SLOW_PHASE:
            return False
        beats = [self._last_beat(rank) for rank in range(self._world.size) if rank != self._world.rank]
        return any(beat.get("phase") == FAILED for beat in beats)

    def _write_beat(self) -> None:
        files.write_json(self._beats / f"rank-{self._world.rank}.json", self._beat(), durable=False)

    def _beat(self) -> dict[str, Any]:
        return {
            "rank": self._world.rank,
            "segment": self._segment,
            **processes.identity(os.getpid()),
            "step": self._step,
            "phase": self._phase,
            "still_s": round(time.monotonic() - self._moved, 1),
            "time": now(),
        }

    def _raise_alarm(self, alarm: Path) -> None:
        self._alarm_folder.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(alarm, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:
            self._answer_and_leave()
        files.write_json(alarm, self._beat(), durable=False)
        self._dump()
        reason = self._report()
        code = EXIT_CODE
        try:
            if self._on_hang is not None:
                code = self._on_hang(reason)
        finally:
            files.write_json(self._alarm_folder / "report.json", {"reason": reason, "exit_code": code, "time": now()})
            time.sleep(2 * POLL_S)  # the others read it and leave; the first to leave takes the rest of the job with it
            os._exit(code)

    def _answer_and_leave(self) -> None:
        """Say what this rank is doing; leave once the rank that noticed has reported."""
        self._dump()
        deadline = time.monotonic() + REPORT_S
        report = None
        while report is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
            report = files.read_json(self._alarm_folder / "report.json")
        os._exit(int(report["exit_code"]) if isinstance(report, dict) else EXIT_CODE)

    def _dump(self) -> None:
        path = self._alarm_folder / f"rank-{self._world.rank}.txt"
        if path.exists():
            return
        with path.open("w", encoding="utf-8") as stream:
            stream.write(f"{self._beat()}\n")
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)

    # ---- the verdict ---------------------------------------------------------------------------------------------------

    def _report(self) -> str:
        """Which rank hangs, as far as can be told; silent processes on this machine are examined and ended."""
        others = [rank for rank in range(self._world.size) if rank != self._world.rank]
        self._wait_for(others)
        silent = [rank for rank in others if not self._answered(rank)]
        words = [self._examine(rank) for rank in silent]
        if silent:
            self._wait_for(silent)
        else:
            beat = self._beat()
            steps = {rank: self._last_beat(rank).get("step", -1) for rank in others} | {self._world.rank: beat["step"]}
            behind = [rank for rank, step in steps.items() if step < max(steps.values())]
            who = f"rank{'s' if len(behind) > 1 else ''} {', '.join(map(str, behind))} behind" if behind else "no rank moved"
            words = [f"{who} for {beat['still_s']:.0f} s in phase {beat['phase']!r}"]
        reason = f"hung after step {self._step}: {'; '.join(words)}; what each rank did is in {self._alarm_folder}"
        self._say(f"rank {self._world.rank}: {reason}")
        return reason

    def _answered(self, rank: int) -> bool:
        return (self._alarm_folder / f"rank-{rank}.txt").exists()

    def _wait_for(self, ranks: list[int]) -> None:
        deadline = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline and not all(self._answered(rank) for rank in ranks):
            time.sleep(POLL_S / 2)

    def _last_beat(self, rank: int) -> dict[str, Any]:
        found = files.read_json(self._beats / f"rank-{rank}.json")
        return found if isinstance(found, dict) and found.get("segment") == self._segment else {}

    def _examine(self, rank: int) -> str:
        """A rank that does not answer: what can be seen of it from here."""
        beat = self._last_beat(rank)
        host, pid = beat.get("host", "an unknown node"), beat.get("pid", 0)
        seen = f"rank {rank} on {host} (process {pid}) has not answered since {beat.get('time', 'its start')}"
        if not processes.is_alive(beat):  # it has ended, or is on another node, and its number may be somebody else's
            return seen
        state = _proc_state(pid)
        text = f"{seen}\nstate: {state}\nwaits in the kernel in: {_read(pid, 'wchan')}\n{_read(pid, 'stack')}\n"
        (self._alarm_folder / f"rank-{rank}-process.txt").write_text(text, encoding="utf-8")
        with contextlib.suppress(OSError):
            # stopped by a signal: once it goes on, it writes its own stacks and leaves; else it will never leave by itself
            processes.signal_exactly(beat, signal.SIGCONT if state.startswith("T") else signal.SIGKILL)
        return f"{seen} (state {state})"


def lost_ranks(run: Path, segment: str, world: World, patience_s: float = GONE_S) -> str:
    """Which other ranks have ended, as far as heartbeats and the processes of this node tell; empty where they do not.

    Args:
        patience_s: how long to look for one: a process closes its connections a moment before it is seen to have ended.
    """
    deadline = time.monotonic() + patience_s
    while not (seen := _lost(run, segment, world)).startswith("rank") and time.monotonic() < deadline:
        time.sleep(POLL_S / 10)
    return seen


def _lost(run: Path, segment: str, world: World) -> str:
    found = (files.read_json(run / "heartbeat" / f"rank-{rank}.json") for rank in range(world.size) if rank != world.rank)
    beats = [beat for beat in found if isinstance(beat, dict) and beat.get("segment") == segment and beat["phase"] != LEFT]
    elsewhere = [beat for beat in beats if beat["host"] != os.uname().nodename]  # their processes cannot be seen
    gone = [beat for beat in beats if beat["phase"] == FAILED or (beat not in elsewhere and not _lives(beat))]
    words = [f"rank {beat['rank']} on {beat['host']} (process {beat['pid']})" for beat in gone or elsewhere]
    return ("" if gone else "one of ") + ", ".join(words) if words else ""


def _lives(beat: dict[str, Any]) -> bool:
    """Whether the process of a heartbeat runs; of one of an earlier version only its number is known."""
    pid = beat["pid"]
    return processes.is_alive(beat if "pid_started" in beat else processes.identity(pid))


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "(not readable)"


def _proc_state(pid: int) -> str:
    """``T (stopped)``, ``D (disk sleep)``, ...."""
    line = next((line for line in _read(pid, "status").splitlines() if line.startswith("State:")), "State: unknown")
    return line.removeprefix("State:").strip()
