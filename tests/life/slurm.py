"""A Slurm in virtual time: what it does with jobs, and what it says about them. Nothing sleeps and nothing is started.

Each rule was seen on real clusters (22.05, 24.11, 26.05): the tests in tests/slurm hold the ones that the policy depends on.
"""

from __future__ import annotations

import datetime
import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hpc_cifar.launch.slurm import Evidence

if TYPE_CHECKING:
    from life.ranks import Segment
    from life.world import OneRun

KILL_WAIT_S = 30.0
HELD_AFTER = 5  # starts that Slurm itself repeated: MaxBatchRequeue
LIMIT_CHECK_S = 30.0


@dataclass(frozen=True)
class Site:
    """Where a story plays; times in seconds."""

    slurm: bool = True
    requeue: bool = True
    scontrol: bool = True
    preemptible: bool = False
    links: int = 0  # that follow the first job
    array: bool = False
    grace_s: float = 30
    user_signal: bool = True  # before a preemption too, else TERM alone
    limit_s: float = 3600
    warning_s: float = 120
    early_s: float = 0  # by which the warning comes too early
    hold_s: float = 5  # before a requeued job may start
    notice_s: float = 300  # until Slurm misses a node
    lease_s: float = 0  # for which a file server keeps the lock of a node that died
    silent_loss: bool = False  # connections to a dead node do not break
    starts_again: bool = False  # after a requeue within a grace time: 24.05 to 25.11
    answer_s: float = 0.1
    store_s: float = 0  # of each operation on the run directory
    restarts_allowed: int = 5


class Clock:
    """Calls in the order of their virtual time. A call may itself let time pass."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def after(self, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self.now + max(0.0, seconds), self._count, call, arguments))

    def advance(self, seconds: float, lives: Callable[[], bool]) -> None:
        """Let time pass, with all that happens in it, for as long as ``lives``."""
        until = self.now + seconds
        while lives() and self._heap and self._heap[0][0] <= until:
            self.step()
        if lives():
            self.now = max(self.now, until)

    def step(self) -> bool:
        """The next call; False if there is none."""
        if not self._heap:
            return False
        time, _, call, arguments = heapq.heappop(self._heap)
        self.now = max(self.now, time)
        call(*arguments)
        return True


@dataclass
class Job:
    """One job, as Slurm's books have it."""

    id: str
    run: OneRun
    follows: Job | None = None
    state: str = "PENDING"  # RUNNING, COMPLETING, or how it ended
    ends_as: str = ""
    why: str = ""
    restarts: int = 0
    preempted: float | None = None
    ended: float | None = None
    back: bool = False  # it goes back to the queue when its processes have ended
    held: bool = False
    repeated: int = 0  # by Slurm itself
    once_more: bool = False
    segment: Segment | None = None
    starts: list[float] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        return self.state in ("PENDING", "RUNNING", "COMPLETING")


def stamp(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.datetime.fromtimestamp(int(seconds), datetime.UTC).isoformat()


class Slurm:
    """The controller and its queue.

    Args:
        begin: makes a segment of a job that starts.
        say: one line of the story.
    """

    def __init__(self, site: Site, clock: Clock, begin: Callable[[Job], Segment], say: Callable[[str], None]) -> None:
        self.site, self.clock, self._begin, self.say = site, clock, begin, say
        self.jobs: list[Job] = []
        self.down_until = -1.0

    @property
    def down(self) -> bool:
        return self.clock.now < self.down_until

    def _later(self, call: Callable[..., None], *arguments: Any) -> bool:
        """Whether this must wait, since no controller is there."""
        if self.down:
            self.clock.after(self.down_until - self.clock.now + 0.01, call, *arguments)
        return self.down

    # ---- the queue ---------------------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        self.jobs.append(job)
        self.clock.after(1, self.try_start, job)

    def try_start(self, job: Job) -> None:
        if (
            job.state != "PENDING"
            or job.held
            or (job.follows is not None and job.follows.alive)
            or self._later(self.try_start, job)
        ):
            return
        job.state, job.why, job.preempted, job.ended, job.back, job.ends_as = "RUNNING", "", None, None, False, ""
        self.say(f"job {job.id} starts{f' for the {job.restarts + 1}. time' if job.restarts else ''}")
        segment = job.segment = self._begin(job)
        warned = self.site.limit_s - self.site.warning_s - self.site.early_s
        self.clock.after(max(0.0, warned), self._warn, job, segment)
        self.clock.after(self.site.limit_s, self._limit, job, segment)

    def _warn(self, job: Job, segment: Segment) -> None:
        if job.segment is segment and job.state == "RUNNING" and not self._later(self._warn, job, segment):
            self.say(f"job {job.id} is warned of its time limit")
            segment.told("USR")

    def _limit(self, job: Job, segment: Segment) -> None:
        if job.segment is segment and job.state == "RUNNING" and not self._later(self._limit, job, segment):
            self.say(f"job {job.id} is at its time limit")
            job.why = "TimeLimit"
            self._end(job, "TIMEOUT")

    def preempt(self, job: Job) -> None:
        """For a job of a higher partition."""
        if job.state != "RUNNING" or job.preempted is not None or self._later(self.preempt, job):
            return
        assert job.segment is not None
        job.preempted = self.clock.now
        segment = job.segment
        self.say(f"job {job.id} is preempted, {self.site.grace_s:g} s of grace")
        if self.site.grace_s:
            segment.told("USR" if self.site.user_signal else "TERM")
            self.clock.after(self.site.grace_s, self._grace_over, job, segment)
        else:
            if self.site.user_signal:
                segment.told("USR")
            self._grace_over(job, segment)

    def _grace_over(self, job: Job, segment: Segment) -> None:
        if job.segment is not segment or job.state != "RUNNING" or self._later(self._grace_over, job, segment):
            return
        if self.site.requeue:
            self._put_back(job)
            job.preempted = None
        self._end(job, "PREEMPTED")

    def _put_back(self, job: Job) -> None:
        job.back = True
        job.restarts += 1

    def _end(self, job: Job, word: str) -> None:
        """Slurm ends the processes."""
        assert job.segment is not None
        job.state, job.ends_as, job.ended = "COMPLETING", word, self.clock.now
        job.segment.told("TERM")
        self.clock.after(KILL_WAIT_S, job.segment.kill_all)

    # ---- the user and the administrator ----------------------------------------------------------------------------------

    def scancel(self, job: Job) -> None:
        if not job.alive or self._later(self.scancel, job):
            return
        self.say(f"scancel {job.id}")
        if job.state == "COMPLETING" and not job.back:
            return  # already completing or completed, says Slurm
        job.run.scancelled = True
        if job.state == "PENDING":
            job.state, job.held = "CANCELLED", False
            self._ended(job)
        elif job.state == "RUNNING":
            self._end(job, "CANCELLED")
        else:
            job.back, job.ends_as = False, "CANCELLED"

    def requeue(self, job: Job, *, incomplete: bool = True) -> str:
        """``scontrol requeue``; the problem, or ""."""
        if not self.site.requeue:
            return "Requested operation is presently disabled"
        if (
            job.state == "COMPLETING"
        ):  # without Incomplete it goes back, a cancelled one too; with it nothing happens, and all seems well
            if not incomplete and not job.back:
                self.say(f"job {job.id} is sent back to the queue as it ends")
                self._put_back(job)
            return ""
        if job.state != "RUNNING":
            return "Job/step already completing or completed"
        self.say(f"job {job.id} is sent back to the queue")
        if job.preempted is not None and self.site.starts_again:
            job.once_more = True
        self._put_back(job)
        job.preempted = None
        self._end(job, "REQUEUED")
        return ""

    # ---- nodes and processes ---------------------------------------------------------------------------------------------

    def node_missed(self, job: Job, segment: Segment, node: int) -> None:
        """Slurm finds that a node of a job has died."""
        if job.segment is not segment or self._later(self.node_missed, job, segment, node):
            return
        segment.buried(node)
        if job.state == "RUNNING":
            self.say(f"Slurm misses a node of job {job.id}")
            if self.site.requeue:
                self._put_back(job)
            else:
                job.why = "NodeDown"
            self._end(job, "NODE_FAIL")
        elif job.state == "COMPLETING":
            segment.check_over()

    def tasks_ended(self, job: Job, segment: Segment, code: int) -> None:
        """All processes of a job are gone."""
        if (
            job.segment is not segment
            or job.state not in ("RUNNING", "COMPLETING")
            or self._later(self.tasks_ended, job, segment, code)
        ):
            return
        if job.state == "RUNNING":
            job.ends_as = "FAILED" if code else "COMPLETED"
            preempted = job.preempted is not None
            if self.site.requeue and (preempted or job.once_more):
                job.repeated += preempted
                job.once_more = job.once_more and preempted
                self._put_back(job)
        job.segment = None
        if job.back:
            job.state, job.preempted, job.ended = "PENDING", None, None
            job.held = job.repeated >= HELD_AFTER
            self.say(f"job {job.id} is {'held: launch failure limit exceeded' if job.held else 'back in the queue'}")
            self.clock.after(self.site.hold_s, self.try_start, job)
        else:
            job.state = job.ends_as
            self.say(f"job {job.id} has ended: {job.state}")
            self._ended(job)

    def _ended(self, job: Job) -> None:
        for other in self.jobs:
            if other.follows is job:
                self.clock.after(1, self.try_start, other)

    def evidence(self, job: Job) -> Evidence:
        """As ``launch/slurm.py`` reads it."""
        if self.down or not self.site.scontrol:
            return Evidence()
        return Evidence(job.state, job.why, stamp(job.preempted), stamp(job.ended), job.restarts)
