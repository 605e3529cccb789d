"""One story: a site, what is trained there, and what happens; played with the real policy and executor, then judged."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from life.edges import controller, script_goes_on
from life.own import OwnScheduler, SlowRecords
from life.ranks import Rank, Segment, Work
from life.slurm import Clock, Job, Site, Slurm
from life.stores import Memory, Store

from hpc_cifar.launch import ending, policy
from hpc_cifar.launch.ending import Records, Scheduler
from hpc_cifar.launch.policy import Action, Event

MOST_STARTS = 20  # of a story; one whose time limit is too short for a step goes on for ever, and rightly so
KILLS = ("kill", "oom", "node fails")


@dataclass(frozen=True)
class Happening:
    """What happens, ``at`` seconds after the beginning, or whenever training comes to a ``step``, so many ``times``."""

    what: str
    at: float = 0
    step: int | None = None
    times: int = 1
    rank: int = 0
    seconds: float = 0

    def __str__(self) -> str:
        when = f"after {self.at:g} s" if self.step is None else f"at step {self.step}, {self.times} times"
        return (
            f"{self.what} {when}"
            + (f", rank {self.rank}" if self.rank else "")
            + (f", {self.seconds:g} s" if self.seconds else "")
        )


@dataclass(frozen=True)
class Story:
    site: Site = field(default_factory=Site)
    work: Work = field(default_factory=Work)
    happenings: tuple[Happening, ...] = ()

    def __str__(self) -> str:
        """What differs from a plain story."""
        told = [str(one) for one in self.happenings]
        for mine, plain in ((self.site, Site()), (self.work, Work())):
            both = ((one.name, getattr(mine, one.name), getattr(plain, one.name)) for one in dataclasses.fields(mine))
            told += [f"{name}={value}" for name, value, usual in both if value != usual]
        return "; ".join(told)


@dataclass
class OneRun:
    """A run: what is true of it, whatever its records say."""

    store: Store
    jobs: list[Job] = field(default_factory=list)
    step: int = 0
    finished: bool = False
    pruned: bool = False
    failed_in: str = ""  # the segment of which a rank has said why a restart would fail too
    marked: bool = False  # cancelled with the program
    cancelled_by_slurm: str = ""  # with scancel: the segment that could have known
    scancelled: bool = False
    lock_free_at: float = 0
    faults: Counter[str] = field(default_factory=Counter)  # since the last checkpoint, where nothing else ended the segment
    every_fault: Counter[str] = field(default_factory=Counter)
    trains_in: Segment | None = None
    trained: int = 0
    idle: int = 0
    unused: int = 0  # starts that found nothing to do
    gave_up: str = ""  # why it may have ended without a word: an edge that the policy is no part of
    not_told: bool = False  # its grace time was used up, which Slurm does not tell from a cancel in it: taken for the latter
    unheard: bool = False  # Slurm did not answer when it was asked


Settle = Callable[..., Action | None]


class World:
    """Plays a story.

    Args:
        settle: the executor.
        begins: what a job that starts has to do.
        script: whether the lines behind srun send the job back.
        make: a store for each run.
    """

    def __init__(
        self,
        story: Story,
        *,
        make: Callable[[int], Store] = lambda _: Memory(),
        settle: Settle | None = None,
        begins: Callable[[policy.Begin], str] | None = None,
        script: Callable[[World, Segment, int], bool] | None = None,
        lock_wait_s: float = 600,
        aloud: bool = False,
    ) -> None:
        self.story, self.site, self.work = story, story.site, story.work
        self._settle = settle or ending.settle
        self._begins = begins or policy.leaves_at_once
        self._script = script or script_goes_on
        self.lock_wait_s = lock_wait_s
        self.clock = Clock()
        self.slurm = Slurm(self.site, self.clock, self._segment, self.say)
        self.lines: list[str] | None = [] if aloud else None
        self.met: set[str] = set()
        self.wrong: dict[str, str] = {}
        self.at_work: Segment | None = None  # whose rank decides just now
        self.starts, self.endless = 0, False
        self._lost_signals = 0
        self._struck: Counter[int] = Counter()
        self.runs = [OneRun(make(number)) for number in range(2 if self.site.array else 1)]
        for number, run in enumerate(self.runs):
            before: Job | None = None
            for link in range(1 + self.site.links):
                name = f"{1 + link}_{number}" if self.site.array else str(1 + link)
                before = Job(name, run, follows=before)
                run.jobs.append(before)
                run.store.add_job(before.id, before.follows.id if before.follows else None)
                self.slurm.submit(before)
        for one in story.happenings:
            if one.step is None:
                self.clock.after(one.at, self._happens, one)

    def say(self, line: str) -> None:
        if self.lines is not None:
            self.lines.append(f"{self.clock.now:9.1f}  {line}")

    def breaks(self, rule: str, words: str) -> None:
        """A rule is broken; the first time counts."""
        self.say(f"BROKEN: {rule}: {words}")
        self.wrong.setdefault(rule, words)

    def play(self) -> None:
        while self.starts <= MOST_STARTS and self.clock.step():
            pass
        self.endless = self.starts > MOST_STARTS

    # ---- what happens ------------------------------------------------------------------------------------------------------

    def _segment(self, job: Job) -> Segment:
        self.starts += 1
        return Segment(self, job)

    def _happens(self, one: Happening) -> None:
        self.met.add(one.what)
        run = self.runs[one.rank % len(self.runs)]
        job = next((job for job in run.jobs if job.alive and job.state != "PENDING"), None)
        if one.what == "controller down":
            self.slurm.down_until = max(self.slurm.down_until, self.clock.now + one.seconds)
            self.say(f"slurmctld does not answer for {one.seconds:g} s")
        elif one.what == "signal lost":
            self._lost_signals += 1
        elif one.what == "cancel":
            self.say("hpc-cifar cancel")
            run.marked = True
            run.store.cancel()
            for each in run.jobs:
                self.clock.after(0.5, self._cancelled, each)
        elif one.what == "scancel":
            waiting = next((job for job in run.jobs if job.alive), None)
            if (chosen := job or waiting) is not None:
                run.scancelled = run.scancelled or not self.site.slurm
                self._cancelled(chosen)
        elif job is None or job.segment is None:
            return
        elif one.what == "preempt" and self.site.slurm:
            self.slurm.preempt(job)
        elif one.what == "requeue" and self.site.slurm:  # by an administrator
            self.slurm.requeue(job)
        else:
            job.segment.strike(one.what, one.rank)

    def _cancelled(self, job: Job) -> None:
        if self.site.slurm:
            self.slurm.scancel(job)
        elif job.segment is not None:
            job.ends_as = "TERMINATED"
            job.segment.told("TERM")
            self.clock.after(60, job.segment.kill_all)

    def signal_is_lost(self) -> bool:
        if self._lost_signals:
            self._lost_signals -= 1
            self.say("the signal is lost")
            return True
        return False

    def due(self, segment: Segment) -> list[tuple[float, str, int]]:
        """What happens at steps that this segment comes to: seconds from now, what, rank."""
        found = []
        for index, one in enumerate(self.story.happenings):
            if one.step is not None and one.step >= segment.step and one.what != "bad node" and self._struck[index] < one.times:
                self._struck[index] += 1
                found.append(((one.step - segment.step) * self.work.step_s, one.what, one.rank))
        return found

    def strikes(self, what: str, segment: Segment) -> bool:
        """Whether it happens as a segment starts."""
        for index, one in enumerate(self.story.happenings):
            if one.what == what and one.step is not None and segment.run.step >= one.step and self._struck[index] < one.times:
                self._struck[index] += 1
                self.met.add(what)
                return True
        return False

    # ---- what ranks do to the run ------------------------------------------------------------------------------------------

    def store(self, segment: Segment) -> Store:
        return segment.run.store

    def failure(self, segment: Segment) -> str:
        return segment.run.store.failure(segment.name)

    def saved(self, segment: Segment, step: int) -> None:
        run = segment.run
        if step > run.step:
            run.step = step
            run.store.save(step)
            run.faults.clear()
            run.every_fault.clear()
            run.idle = 0

    def leaves_at_once(self, segment: Segment) -> str:
        run, records = segment.run, self.records(segment.job)
        state, reason = run.store.state()
        found = policy.Begin(
            state=state, reason=reason, finished=records.finished(), cancel_mark=records.cancelled(),
            is_link=segment.job.follows is not None, restarts=segment.job.restarts, failed_for_good=run.store.last_failed(),
        )  # fmt: skip
        word = self._begins(found)
        run.unused += bool(word)
        if word == "cancelled" and state == "stopped":
            records.set_state("cancelled", "cancelled with scancel")
        return word

    def trains(self, segment: Segment) -> None:
        run = segment.run
        run.trained += 1
        self.say(f"{segment.name} trains from step {run.step}")
        if run.trains_in is not None and any(rank.alive for rank in run.trains_in.ranks):
            self.breaks("one job at a time", f"{segment.name} trains beside {run.trains_in.name}")
        run.trains_in = segment
        if run.finished:
            self.breaks("an end is an end", "it trains though it has finished")
        if run.pruned:
            self.breaks("an end is an end", "it trains though its sweep has given it up")
        if run.marked and self.clock.now > self.marked_at(run):
            self.breaks("cancelled never returns", f"{segment.name} trains after hpc-cifar cancel")
        if run.cancelled_by_slurm:
            self.breaks("cancelled never returns", f"{segment.name} trains after the scancel that {run.cancelled_by_slurm} saw")

    def marked_at(self, run: OneRun) -> float:
        times = [
            one.at for one in self.story.happenings if one.what == "cancel" and self.runs[one.rank % len(self.runs)] is run
        ]
        return min(times) + 90  # what had begun before may have looked before

    def finishes(self, segment: Segment) -> None:
        self.say(f"{segment.name} finishes")
        segment.run.finished = True
        segment.run.store.finish()
        self.records(segment.job).set_state("finished", "")

    def pruned(self, segment: Segment) -> None:
        segment.run.pruned = True
        self.records(segment.job).set_state("stopped", "pruned")

    def fails(self, segment: Segment, rank: int) -> None:
        segment.run.failed_in = segment.run.failed_in or segment.name
        segment.run.store.fail(segment.name, "the loss is not finite", rank)
        records = self.records(segment.job)
        if not records.finished():
            records.set_state("cancelled" if records.cancelled() else "failed", self.failure(segment))

    def cancelled_early(self, segment: Segment, rank: Rank) -> None:
        if rank.number == 0 and not segment.run.finished:
            self.records(segment.job).set_state("cancelled", "")

    def stopped_by_term(self, segment: Segment) -> None:
        self.records(segment.job).set_state("stopped", "terminated")

    def records(self, job: Job) -> Records:
        return job.run.store.records(job.id)

    # ---- the end of segments -----------------------------------------------------------------------------------------------

    def settle(self, segment: Segment, rank: Rank, event: Event, detail: str, exclude: Sequence[str]) -> Action | None:
        records: Any = self.records(segment.job)
        if self.site.store_s:
            records = SlowRecords(records, segment, rank)
        scheduler: Scheduler = OwnScheduler(segment, rank)
        run = segment.run
        segment.claimed = True
        try:
            action = self._settle(
                event, records, scheduler, segment=segment.name, detail=detail, rank=rank.number,
                restarts_allowed=self.site.restarts_allowed, exclude=exclude,
            )  # fmt: skip
        finally:
            run.unheard = run.unheard or self.slurm.down or policy.Word.NONE in segment.words
        if action is None:
            return None
        self.say(f"{segment.name}: rank {rank.number} {event.value}: {action.act.value}, {action.state}: {action.reason}")
        segment.settled.append(action)
        told = event is not Event.TERMINATED or policy.Word.NONE not in segment.words  # else the profile says what a TERM is
        if segment.fault and event is not Event.PREEMPTED and not segment.truth and told:
            run.faults[segment.fault] += 1
        if len(segment.settled) > 1:
            self.breaks("one action a segment", f"{segment.name}: {[one.act.value for one in segment.settled]}")
        if action.event is not None:
            self.met.add(action.event.value)
        if action.state == "failed" and action.event in policy.FAULTS:
            run.store.fail(segment.name, action.reason, rank.number)
        if action.state == "failed" and not action.reason:
            self.breaks("an end says why", f"{segment.name} failed")
        if action.state == "cancelled" and segment.truth == "preempted" and policy.Word.ENDING in segment.words:
            run.not_told = True
        seen = segment.words and segment.words[-1] in (policy.Word.ENDING, policy.Word.CANCELLED)
        if seen and segment.truth == "CANCELLED":
            run.cancelled_by_slurm = segment.name
        return action

    def sent_back(self, segment: Segment, *, incomplete: bool = True) -> str:
        """``scontrol requeue`` on a node of the job."""
        if not self.site.scontrol:
            return "no scontrol on this machine"
        if self.slurm.down:
            segment.run.unheard = True
            return "Unable to contact slurm controller (connect failure)"
        before, cancelled = segment.job.restarts, segment.job.ends_as == "CANCELLED"
        problem = self.slurm.requeue(segment.job, incomplete=incomplete)
        if segment.job.restarts > before:
            segment.sent_back += 1
            if segment.sent_back > 1:
                self.breaks("one action a segment", f"{segment.name} is sent back to the queue twice")
            if cancelled:
                self.breaks("cancelled never returns", f"{segment.name} is sent back to the queue after scancel")
        return problem

    def segment_over(self, segment: Segment) -> None:
        """All processes of a segment are gone: the end of the script, or the controller on this machine."""
        job, run = segment.job, segment.run
        if job.segment is not segment:
            return
        if segment.fault:
            run.every_fault[segment.fault] += 1
        codes = [rank.code or 0 for rank in segment.ranks]
        if not self.site.slurm:
            controller(self, segment, codes)
            return
        code = max(codes)
        alone = job.state == "RUNNING" and job.preempted is None
        if alone and not segment.settled and segment.fault in KILLS and self.site.requeue:
            run.faults[segment.fault] += 1
        speaks = job.state == "RUNNING" and self.site.requeue and code == 137 and not run.marked
        if speaks and self._script(self, segment, code):
            self.sent_back(segment)
        if job.state == "COMPLETING" and job.ends_as in ("TIMEOUT", "PREEMPTED", "NODE_FAIL") and not segment.settled:
            run.gave_up = run.gave_up or f"no rank could speak before Slurm ended the job ({job.ends_as})"
        if alone and not self.site.requeue and not segment.settled and code:
            run.gave_up = run.gave_up or "all ranks were killed, and the site forbids requeueing"
        self.slurm.tasks_ended(job, segment, code)
        self.check_bound(run)

    def check_bound(self, run: OneRun) -> None:
        total = sum(run.faults.values())
        # each link finds out for itself that nothing can be done, and a Slurm that did not answer may preempt a job afterwards
        # which has ended
        more = ("controller down" in self.met) + (self.site.links if run.gave_up else 0)
        if total > self.site.restarts_allowed + 1 + more + self.site.starts_again:
            self.breaks("bounded", f"{total} faults without a checkpoint in between: {dict(run.faults)}")
