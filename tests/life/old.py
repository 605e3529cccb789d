"""What commit 8631392 decided, written from its ``requeue.py``, ``preflight.py``, ``chain.py``, ``job.py`` and ``script.py``.

It plays the same stories as the policy of today, to show what that one is for.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from life.own import OwnScheduler
from life.ranks import Segment
from life.world import Story, World

from hpc_cifar.launch import policy
from hpc_cifar.launch.ending import Records
from hpc_cifar.launch.policy import Act, Action, Event

MOST = 3  # hangs and losses at one step
BACK = ("PENDING", "REQUEUED", "PREEMPTED")


def begins(found: policy.Begin) -> str:
    if found.cancel_mark:
        return "cancelled"
    if found.finished:
        return "finished"
    pruned = found.state == "stopped" and found.reason == "pruned"
    if found.restarts == 0 and found.is_link:
        if pruned:
            return "stopped"
        if found.state == "stopped":
            return "cancelled"
        if found.state == "cancelled" or (found.state == "failed" and found.failed_for_good):
            return found.state
    return "stopped" if found.restarts and pruned else ""


def script(world: World, segment: Segment, code: int) -> bool:
    """It begins again after early signals and lost connections only, not after a kill."""
    return False


class Old:
    """Its decisions; one object a story, as they have notes of their own."""

    def __init__(self) -> None:
        self._claimed: set[str] = set()
        self._losses: dict[int, Counter[int]] = defaultdict(Counter)
        self._hangs: dict[int, Counter[int]] = defaultdict(Counter)
        self._bad: dict[str, int] = {}

    def __call__(
        self, event: Event, records: Records, scheduler: OwnScheduler, *, segment: str, detail: str = "", rank: int = 0,
        restarts_allowed: int = 0, exclude: Sequence[str] = (),
    ) -> Action | None:  # fmt: skip
        mine = scheduler.segment
        if event in (Event.PREEMPTED, Event.TERMINATED):
            return self._stopped(event, records, scheduler)
        if segment in self._claimed:
            return None
        self._claimed.add(segment)
        if event is Event.LOCK_HELD:  # taken for another job that trains the run
            return Action(Act.END, None, "", event)
        if event is Event.NODE_BAD:
            return self._bad_node(records, scheduler, detail)
        if event is Event.RANK_LOST:
            for _ in range(6):
                mine.spend(scheduler.rank, 0.5)
                if reason := mine.world.failure(mine):
                    return _said(records, Action(Act.END, "failed", reason))
            self._losses[id(mine.run)][mine.step] += 1
            too_many = self._losses[id(mine.run)][mine.step] > MOST
        else:
            self._hangs[id(mine.run)][mine.step] += 1
            too_many = self._hangs[id(mine.run)][mine.step] >= MOST
        if self._is_ending(records, scheduler):
            if event is Event.HUNG:
                return Action(Act.LEAVE_TO_SLURM, None)
            return _said(records, Action(Act.END, "cancelled" if records.cancelled() else "failed", detail))
        if too_many:
            return _said(records, Action(Act.END, "failed", f"{detail}; this happened {MOST} times at this step"))
        _said(records, Action(Act.REQUEUE, "requeued", detail))
        if not scheduler.slurm:
            return Action(Act.REQUEUE, "requeued", detail)
        if self._hands_over(records, scheduler):
            return Action(Act.HAND_OVER, "requeued", detail)
        problem = scheduler.requeue((), False)
        if problem and not self._slurm_deals_with(scheduler):
            return _said(records, Action(Act.END, "failed", f"{detail}; it could not be requeued ({problem})"))
        return Action(Act.REQUEUE, "requeued", detail)

    def _stopped(self, event: Event, records: Records, scheduler: OwnScheduler) -> Action:
        if records.cancelled():
            return _said(records, Action(Act.END, "cancelled"))
        again = event is Event.PREEMPTED
        if scheduler.slurm:
            state, why = self._ask(scheduler)
            again = again or why == "TimeLimit"
            if state.startswith("CANCELLED") or (state == "COMPLETING" and not again):
                return _said(records, Action(Act.END, "cancelled", "cancelled with scancel"))
            again = again or (not state and scheduler.preemptible)
            if again and self._hands_over(records, scheduler):
                return _said(records, Action(Act.HAND_OVER, "requeued"))
            if not again and not state:
                return _said(records, Action(Act.END, "stopped", "terminated"))
        _said(records, Action(Act.REQUEUE, "requeued"))
        if not scheduler.slurm:
            return Action(Act.REQUEUE, "requeued")
        problem = ""
        for _ in range(3):
            if not (problem := scheduler.requeue((), True)):
                if records.cancelled():
                    scheduler.cancel()
                    return _said(records, Action(Act.END, "cancelled"))
                return Action(Act.REQUEUE, "requeued")
            if self._ask(scheduler)[0] in BACK:
                return Action(Act.LEAVE_TO_SLURM, "requeued")
            scheduler.segment.spend(scheduler.rank, 1)
        if self._slurm_deals_with(scheduler):
            return Action(Act.LEAVE_TO_SLURM, "requeued")
        return _said(records, Action(Act.END, "failed", f"stopped with a checkpoint but could not be requeued ({problem})"))

    def _bad_node(self, records: Records, scheduler: OwnScheduler, detail: str) -> Action:
        mine = scheduler.segment
        before = self._bad.get(mine.job.id) == mine.run.trained  # since a check was good
        self._bad[mine.job.id] = mine.run.trained
        if before:
            reason = f"{detail}; the job had been requeued for that once already"
            return _said(records, Action(Act.END, "failed", reason, Event.NODE_BAD))
        if records.cancelled() or self._ask(scheduler)[0] in ("CANCELLED", "COMPLETING"):
            return _said(records, Action(Act.END, "cancelled"))
        _said(records, Action(Act.REQUEUE, "requeued", detail))
        if problem := scheduler.requeue((), True):
            reason = f"{detail}; the job could not be requeued: {problem}"
            return _said(records, Action(Act.END, "failed", reason, Event.NODE_BAD))
        return Action(Act.REQUEUE, "requeued", detail)

    def _ask(self, scheduler: OwnScheduler) -> tuple[str, str]:
        """``squeue``: the state and the reason."""
        scheduler.word()
        mine = scheduler.segment
        seen = mine.world.slurm.evidence(mine.job)
        return seen.state, seen.reason

    def _is_ending(self, records: Records, scheduler: OwnScheduler) -> bool:
        if not scheduler.slurm:
            return False
        state = self._ask(scheduler)[0]
        if records.cancelled() or state.startswith("CANCELLED"):
            records.set_state("cancelled", "")
            return True
        return state == "COMPLETING"

    def _slurm_deals_with(self, scheduler: OwnScheduler) -> bool:
        return self._ask(scheduler)[0] in (*BACK, "COMPLETING", "CANCELLED")

    def _hands_over(self, records: Records, scheduler: OwnScheduler) -> bool:
        return records.next_link() is not None and not (scheduler.requeue_allowed and scheduler.has_scontrol)


def _said(records: Records, action: Action) -> Action:
    if action.state is not None and not records.finished():
        records.set_state(action.state, action.reason)
    return action


def old_world(story: Story, **options: Any) -> World:
    """A world that decides as it was."""
    return World(story, settle=Old(), begins=begins, script=script, lock_wait_s=0, **options)
