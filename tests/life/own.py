"""What one rank can ask and have done in virtual time: the two faces that the executor knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hpc_cifar.launch.ending import Records
from hpc_cifar.launch.policy import Event, Word
from hpc_cifar.launch.slurm import word_of

if TYPE_CHECKING:
    from life.ranks import Rank, Segment

LAST_WORD_S = 3.0


class Killed(BaseException):
    """The process that was at work is gone."""


class OwnScheduler:
    """See :class:`hpc_cifar.launch.ending.Scheduler`: what a rank can ask and have done; each takes time."""

    def __init__(self, segment: Segment, rank: Rank) -> None:
        self.segment, self.rank = segment, rank
        site = segment.world.site
        self.slurm, self.requeue_allowed = site.slurm, site.requeue
        self.has_scontrol, self.preemptible = site.scontrol and site.slurm, site.preemptible

    def word(self) -> Word:
        segment = self.segment
        down = segment.world.slurm.down
        segment.spend(self.rank, 15 if down else segment.world.site.answer_s)
        job = segment.job
        if segment.truth is None:
            segment.truth = (
                "" if job.state == "RUNNING" and job.preempted is None else "preempted" if job.preempted else job.ends_as
            )
        word = word_of(segment.world.slurm.evidence(segment.job), segment.restart)
        segment.words.append(word)
        return word

    def death(self) -> tuple[Event, str] | None:
        segment = self.segment
        if not segment.lost_how:
            segment.spend(self.rank, LAST_WORD_S)
        if segment.lost_how in ("kill", "oom"):
            event = Event.OUT_OF_MEMORY if segment.lost_how == "oom" else Event.KILLED
            return event, f"rank {segment.lost_rank} was killed{' for memory' if event is Event.OUT_OF_MEMORY else ''}"
        reason = segment.world.failure(segment)
        return (Event.FAILED, reason) if reason else None

    def requeue(self, exclude: Sequence[str], at_limit: bool) -> str:
        segment = self.segment
        segment.spend(self.rank, 30 if segment.world.slurm.down else segment.world.site.answer_s)
        return segment.world.sent_back(segment, incomplete=not at_limit)

    def exclude_behind(self, nodes: Sequence[str]) -> None:
        self.segment.spend(self.rank, self.segment.world.site.answer_s)

    def cancel(self) -> None:
        self.segment.spend(self.rank, self.segment.world.site.answer_s)
        self.segment.world.slurm.scancel(self.segment.job)


class SlowRecords:
    """Records each of whose operations lets time pass, in which the process may be killed."""

    def __init__(self, records: Records, segment: Segment, rank: Rank) -> None:
        self._records, self._segment, self._rank = records, segment, rank

    def __getattr__(self, name: str) -> Any:
        self._segment.spend(self._rank, self._segment.world.site.store_s)
        return getattr(self._records, name)
