"""The local controller: starts the ranks of one job, watches them, and requeues without limit.

It runs as ``python -m hpc_cifar.launch.controller SPEC`` in a session of its own, from the run's code snapshot, so that it
survives the command line and the terminal. Its signals mean what Slurm's do: TERM ends the job, USR2 is a preemption.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from .. import files, owner, records
from ..records import Failure, RunState
from . import deaths, first_words, process
from .job import LOCAL_REQUEUE as REQUEUE
from .job import port_for
from .policy import REMEDIES, Event

PEER_GRACE_S = 5.0  # what the other ranks get when one died
TERM_GRACE_S = 60.0  # what all ranks get to save after a TERM
MAX_IDLE_SEGMENTS = 5  # requeues without a single step in between
POLL_S = 0.1


def _die_with_parent() -> Callable[[], None]:
    libc = ctypes.CDLL(None)  # loaded before the fork

    def set_signal() -> None:
        libc.prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG: no rank outlives the controller unseen

    return set_signal


def free_port(job_id: str, restart: int) -> int:
    """The job's own port, or the next one that is free on this machine."""
    first = port_for(job_id, restart)
    for offset in range(100):
        port = 10_000 + (first - 10_000 + offset) % 20_000
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    return first


def _is_alive(process_file: Path) -> bool:
    return process.is_alive(process.recorded(process_file))


def _runs_still(path: Path) -> bool:
    from ..runs import Run
    from .status import status

    return not status(Run(path)).ended


class Controller:
    """One local job: ``spec`` holds folder, job_id, command, tasks, timeout_s, signal_delay_s, signal, predecessor, after."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.folder = Path(spec["folder"])
        self.run = self.folder.parent
        self.job_id: str = spec["job_id"]
        self.command = shlex.split(spec["command"])
        self.tasks_count: int = spec["tasks"]
        self.timeout_s: float = spec["timeout_s"]
        self.signal_delay_s: float = spec["signal_delay_s"]
        self.usr = signal.Signals[spec["signal"]]
        self.predecessor: str = spec.get("predecessor", "")
        self.after = [Path(path) for path in spec.get("after", ())]
        self.peer_grace_s = float(spec.get("peer_grace_s", PEER_GRACE_S))
        self.term_grace_s = float(spec.get("term_grace_s", TERM_GRACE_S))
        self.tasks: list[subprocess.Popen[bytes]] = []
        self.log_begins: dict[Path, int] = {}  # of this segment
        self.killed_for_memory: dict[str, int] = {}  # before it
        self.terminated_at: float | None = None
        self.prepare_child = _die_with_parent()

    # ---- signals ---------------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Take over from whatever the parent blocked or ignored."""
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_term)
        signal.signal(self.usr, self._on_usr)
        if self.usr != signal.SIGHUP:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _on_term(self, *_: Any) -> None:
        if self.terminated_at is None:
            self.terminated_at = time.monotonic()
        self._forward(signal.SIGTERM)

    def _on_usr(self, *_: Any) -> None:
        self._forward(self.usr)

    def _forward(self, number: signal.Signals) -> None:
        for task in self.tasks:
            task.send_signal(number)  # none to one that has ended: its number may be another's

    # ---- one segment -----------------------------------------------------------------------------------------------

    def start(self, restart: int) -> None:
        port = str(free_port(self.job_id, restart))
        self.killed_for_memory = deaths.killed_for_memory()
        for rank in range(self.tasks_count):
            env = {
                **os.environ,
                "SUBMITIT_EXECUTOR": "local",
                "SUBMITIT_LOCAL_JOB_ID": self.job_id,
                "SUBMITIT_LOCAL_NTASKS": str(self.tasks_count),
                "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
                "SUBMITIT_LOCAL_NODEID": "0",
                "SUBMITIT_LOCAL_LOCALID": str(rank),
                "SUBMITIT_LOCAL_GLOBALID": str(rank),
                "HPC_CIFAR_RESTART_COUNT": str(restart),
                "HPC_CIFAR_MASTER_PORT": port,
            }
            with self._log(rank, "out") as out, self._log(rank, "err") as err:
                self.tasks.append(
                    subprocess.Popen(
                        self.command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env, preexec_fn=self.prepare_child
                    )
                )

    def _log(self, rank: int, kind: str) -> IO[bytes]:
        log = (self.folder / f"{self.job_id}_{rank}_log.{kind}").open("ab")
        self.log_begins[Path(log.name)] = log.tell()
        return log

    def watch(self) -> tuple[list[int], str]:
        """Wait for the ranks to end; their exit codes, and why the segment failed, or ""."""
        began = time.monotonic()
        deadline: float | None = None  # for the survivors of a rank that ended otherwise than with 0
        warned_at: float | None = None  # that the time is up; the time to save counts from then, however late it was
        reason = ""
        while True:
            codes = [task.poll() for task in self.tasks]
            now = time.monotonic()
            done = [code for code in codes if code is not None]
            if len(done) == len(codes):
                return done, reason or self._reason(codes)
            bad = [code for code in done if code != 0]
            if bad and deadline is None:
                deadline = now + (self.term_grace_s if set(bad) == {REQUEUE} else self.peer_grace_s)
                reason = self._reason(codes)
            if self.terminated_at is not None:
                deadline = min(deadline or 1e18, self.terminated_at + self.term_grace_s)
            elif warned_at is None and now - began >= self.timeout_s - self.signal_delay_s:
                warned_at = now
                self._forward(self.usr)
            elif warned_at is not None and now - warned_at >= min(self.signal_delay_s, self.timeout_s):
                self.kill()
                reason = reason or f"the time limit of {self.timeout_s:.0f} s was reached before a checkpoint was saved"
            if deadline is not None and now >= deadline:
                self.kill()
            time.sleep(POLL_S)

    def _reason(self, codes: list[int | None]) -> str:
        """What went wrong first; a rank that was killed explains why its peers lost their connections."""
        bad = [(rank, code) for rank, code in enumerate(codes) if code not in (None, 0, REQUEUE)]
        for rank, code in sorted(bad, key=lambda item: (item[1] or 0) > 0):
            assert code is not None
            if code < 0:
                return self._killed(rank, signal.Signals(-code))
            began = self._state().step is not None
            logs = [self.folder / f"{self.job_id}_{rank}_log.{kind}" for kind in ("err", "out")]
            words = first_words.of_logs(logs, self.log_begins, certain=began)
            return f"rank {rank} ended with exit code {code}" + (f": {words.text} (log: {words.log.name})" if words else "")
        return ""

    def _killed(self, rank: int, number: signal.Signals) -> str:
        counts = deaths.killed_for_memory()
        if number == signal.SIGKILL and any(counts[path] > self.killed_for_memory.get(path, 0) for path in counts):
            return f"rank {rank} was killed for memory: {REMEDIES[Event.OUT_OF_MEMORY]}"
        usually = f", usually for memory: {REMEDIES[Event.KILLED]}" if number == signal.SIGKILL else ""
        return f"rank {rank} was killed by {number.name}{usually}"

    def kill(self) -> None:
        """End whatever the ranks left behind, data workers too."""
        process.kill_session(os.getsid(0), spared=os.getpid())

    # ---- before the job --------------------------------------------------------------------------------------------

    def wait_for_its_turn(self) -> bool:
        """Until the predecessor and the runs to start after have ended; whether this job was ended while it waited.

        Whether those runs have finished is asked by the job itself, as it is on Slurm.
        """
        waits: list[tuple[Callable[[Path], bool], Path]] = [(_is_alive, Path(self.predecessor))] if self.predecessor else []
        waits += [(_runs_still, path) for path in self.after]
        for still, path in waits:
            while self.terminated_at is None and not self.cancelled() and still(path):
                time.sleep(POLL_S * 5)
        if self.cancelled():
            self._record("cancelled", None)
        elif self.terminated_at is not None:
            self._record("stopped", "terminated before it began; it goes on with: hpc-cifar resume " + self.run.name)
        return self.cancelled() or self.terminated_at is not None

    # ---- the job ---------------------------------------------------------------------------------------------------

    def run_all(self) -> int:
        """Segments until the job ends; the exit code."""
        restart = idle = 0
        if self.wait_for_its_turn():
            return 0
        while True:
            before = self._state().step
            self.tasks = []
            self.start(restart)
            codes, reason = self.watch()
            self.kill()
            if self.cancelled():
                self._record("cancelled", None)
                return 0
            if REQUEUE not in codes:
                break
            if self.terminated_at is not None:
                self._record("stopped", "terminated; it goes on with: hpc-cifar resume " + self.run.name)
                return 0
            idle = idle + 1 if self._state().step == before else 0
            if idle >= MAX_IDLE_SEGMENTS:
                self._record("failed", f"{idle} restarts without a single step: the time limit is too short")
                return 1
            restart += 1
        if reason:
            from ..runs import Run

            rows = [row for row in Run(self.run).failures() if row.segment == f"{self.job_id}.{restart}"]
            if not any(row.busy for row in rows):  # else another job trains this run, and its records are that one's
                self._record("failed", self._cause(reason, rows))
            return 1
        return 0

    @staticmethod
    def _cause(reason: str, rows: list[Failure]) -> str:
        """What the ranks themselves reported says more than an exit code, but not more than a kill."""
        if " was killed " in reason or "time limit" in reason:
            return reason
        if not rows:
            return reason
        return next((row for row in rows if row.final), rows[0]).words  # of a hang, what came of it

    def cancelled(self) -> bool:
        return (self.run / "cancelled").exists()

    def _state(self) -> RunState:
        return records.read(RunState, self.run / "state.json") or RunState()

    def _record(self, state: str, reason: str | None) -> None:
        from ..runs import Run

        def changes(old: RunState) -> bool:
            return old.state != "finished" and not old.state == state == "cancelled"

        extra: dict[str, Any] = {} if reason is None else {"reason": reason}
        Run(self.run).update_state(when=changes, state=state, **extra)


def main(arguments: list[str]) -> int:
    owner.narrow_umask()
    spec_file = Path(arguments[0])
    spec = files.read_json(spec_file)
    if not isinstance(spec, dict):
        print(f"hpc-cifar: {spec_file}: cannot be read", file=sys.stderr)
        return 2
    controller = Controller(spec)
    controller.listen()
    # The parent writes the same; it may have died before it could.
    files.write_json(Path(spec["process_file"]), process.identity(os.getpid()))
    return controller.run_all()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
