"""The records of a run in memory, and the real ones in a run directory, behind one face."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hpc_cifar import files, records
from hpc_cifar.launch.ending import Records
from hpc_cifar.launch.interruptions import RunRecords
from hpc_cifar.records import Ending, Interruption
from hpc_cifar.runs import Run


class Store(Protocol):
    """All that a story does with a run directory."""

    def records(self, job_id: str) -> Records:
        """As a job of the run sees them."""

    def add_job(self, job_id: str, follows: str | None) -> None: ...

    def cancel(self) -> None:
        """As ``hpc-cifar cancel`` marks it."""

    def save(self, step: int) -> None:
        """A checkpoint."""

    def finish(self) -> None:
        """The final result."""

    def state(self) -> tuple[str, str]:
        """State and reason."""

    def fail(self, segment: str, reason: str, rank: int) -> None:
        """A rank says why a restart would fail too."""

    def failure(self, segment: str) -> str:
        """What the first rank said about a segment; "" if none has."""

    def last_failed(self) -> bool:
        """Whether the last segment that a rank said anything about failed for good."""


class Memory:
    """See :class:`Store`; its own records too, but for the next link."""

    def __init__(self) -> None:
        self.marked = self.done = False
        self.step = 0
        self.rows: list[Mapping[str, Any]] = []
        self.endings: dict[str, Mapping[str, Any]] = {}
        self.jobs: list[tuple[str, str | None]] = []
        self.now = ("", "")
        self.failures: list[tuple[str, str]] = []

    def records(self, job_id: str) -> Records:
        return _View(self, job_id)

    def add_job(self, job_id: str, follows: str | None) -> None:
        self.jobs.append((job_id, follows))

    def cancel(self) -> None:
        self.marked = True

    def save(self, step: int) -> None:
        self.step = step

    def finish(self) -> None:
        self.done = True

    def state(self) -> tuple[str, str]:
        return self.now

    def fail(self, segment: str, reason: str, rank: int) -> None:
        self.failures.append((segment, f"rank {rank}: {reason}" if rank else reason))

    def failure(self, segment: str) -> str:
        return next((reason for where, reason in self.failures if where == segment), "")

    def last_failed(self) -> bool:
        return bool(self.failures)


class _View:
    """See :class:`hpc_cifar.launch.ending.Records`."""

    def __init__(self, store: Memory, job_id: str) -> None:
        self._store, self._job_id = store, job_id

    def cancelled(self) -> bool:
        return self._store.marked

    def finished(self) -> bool:
        return self._store.done

    def saved_step(self) -> int:
        return self._store.step

    def interruptions(self) -> Sequence[Interruption]:
        return [records.of(Interruption, row) for row in self._store.rows]

    def note(self, row: Mapping[str, Any]) -> None:
        self._store.rows.append(row)

    def claim(self, segment: str, row: Mapping[str, Any]) -> bool:
        if segment in self._store.endings:
            return False
        self._store.endings[segment] = row
        return True

    def settled(self, segment: str, row: Mapping[str, Any]) -> None:
        self._store.endings[segment] = {**row, "done": True}

    def outcome(self, segment: str) -> Ending | None:
        found = self._store.endings.get(segment)
        return records.of(Ending, found) if found and found.get("done") else None

    def set_state(self, state: str, reason: str) -> None:
        self._store.now = (state, reason)

    def next_link(self) -> str | None:
        return next((job for job, follows in self._store.jobs if follows == self._job_id), None)


class Folder:
    """See :class:`Store`: a real run directory."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True)
        self.run = Run(path)
        self.run.checkpoints.mkdir()

    def records(self, job_id: str) -> Records:
        return RunRecords(self.run, job_id)

    def add_job(self, job_id: str, follows: str | None) -> None:
        self.run.add_job(executor="slurm", job_id=job_id, **({"follows": follows} if follows else {}))

    def cancel(self) -> None:
        self.run.cancel_marker.touch()

    def save(self, step: int) -> None:
        """As the saver does: the link changes in one go."""
        new = self.run.checkpoints / "latest.new"
        new.symlink_to(f"step-{step:08d}")
        new.replace(self.run.checkpoints / "latest")

    def finish(self) -> None:
        files.write_json(self.run.result_file, {"state": "finished"}, durable=False)

    def state(self) -> tuple[str, str]:
        found = self.run.state()
        return found.state, found.reason or ""

    def fail(self, segment: str, reason: str, rank: int) -> None:
        row = {"segment": segment, "rank": rank, "reason": reason, "final": True}
        files.append_json_line(self.run.path / "failures.jsonl", row)

    def failure(self, segment: str) -> str:
        for row in files.read_json_lines(self.run.path / "failures.jsonl"):
            if row["segment"] == segment:
                return f"rank {row['rank']}: {row['reason']}" if row["rank"] else str(row["reason"])
        return ""

    def last_failed(self) -> bool:
        return (self.run.path / "failures.jsonl").exists()
