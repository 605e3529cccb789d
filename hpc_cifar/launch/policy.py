"""The one decision about a job that was interrupted or has ended: an event and what is known give an action.

Pure: no input, no output, no clock. ``launch/ending.py`` asks Slurm and the run directory, and carries the action out. The page
on resuming has a picture of this module, made of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

MOST_SHOWN = 300  # characters of a detail in a reason


class Event(StrEnum):
    """What happened to a segment of a run; the values are the words of ``interruptions.jsonl``."""

    FINISHED = "finished"
    FAILED = "failed"  # a rank has said why, and a restart would fail in the same way
    PRUNED = "pruned"  # its sweep has given it up
    CANCELLED = "cancelled"
    PREEMPTED = "preempted"  # by the signal that goes before a preemption and before the time limit
    TERMINATED = "terminated"  # a TERM alone: a cancel, a preemption, or a job step that is ended
    TIME_LIMIT = "time limit"
    HUNG = "hang"
    RANK_LOST = "lost rank"
    KILLED = "killed rank"
    OUT_OF_MEMORY = "out of memory"
    NODE_BAD = "bad node"
    EARLY_EXIT = "early exit"  # a task ended before its program listened; seen by the script
    LOCK_HELD = "held lock"  # by an earlier segment of the job, which has died


INTERRUPTIONS = frozenset({Event.PREEMPTED, Event.TIME_LIMIT})
"""They never end a run."""
FAULTS = frozenset(
    {Event.HUNG, Event.RANK_LOST, Event.KILLED, Event.OUT_OF_MEMORY, Event.NODE_BAD, Event.EARLY_EXIT, Event.LOCK_HELD}
)
"""They end a run that has had too many of them since its last checkpoint."""

DEFAULT_RESTARTS = 5
FEWER_RESTARTS: Mapping[Event, int] = {Event.HUNG: 2, Event.NODE_BAD: 1, Event.OUT_OF_MEMORY: 1}
"""Restarts after faults of one kind without a checkpoint in between, where that is fewer than the job file allows."""


class Word(StrEnum):
    """What Slurm says about the job while its ranks are still there."""

    NONE = "no answer"
    RUNNING = "running"
    PREEMPTED = "preempted"  # it runs within its grace time
    PREEMPTED_ENDING = "preempted, ending"  # Slurm ends its processes
    TIME_LIMIT = "at its time limit"
    NODE_LOST = "ending, a node was lost"  # and the job does not go back to the queue
    ENDING = "ending"  # for another reason, or after a grace time: used up, or cancelled in it
    QUEUED = "queued again"  # Slurm has requeued it already
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Knowledge:
    """What is known when the decision is made.

    Attributes:
        slurm: whether the job is one of Slurm's, and not of this machine's own controller.
        word: Slurm's word.
        cancel_mark: a user has cancelled the run.
        link_waits: a job that was submitted beforehand continues the run when this one has ended.
        requeue_allowed: the profile lets jobs go back to the queue.
        has_scontrol: the program that sends them there is on this node.
        preemptible: the profile says that a TERM is a preemption where Slurm cannot be asked.
        faults: of each kind since the last checkpoint, without this event.
        restarts_allowed: after faults without a checkpoint in between; the job file's ``resources.fault_restarts``.
        run: name of the run, for words.
    """

    slurm: bool = True
    word: Word = Word.RUNNING
    cancel_mark: bool = False
    link_waits: bool = False
    requeue_allowed: bool = True
    has_scontrol: bool = True
    preemptible: bool = False
    faults: Mapping[Event, int] = field(default_factory=dict)
    restarts_allowed: int = DEFAULT_RESTARTS
    run: str = "RUN"

    @property
    def can_requeue(self) -> bool:
        return not self.slurm or (self.requeue_allowed and self.has_scontrol)


class Act(StrEnum):
    """What is done."""

    REQUEUE = "requeue"
    HAND_OVER = "hand over"  # the next link goes on
    LEAVE_TO_SLURM = "leave to Slurm"  # it requeues or ends the job by itself
    STOP = "stop"  # saved; a person may resume it
    END = "end"  # nothing goes on by itself


@dataclass(frozen=True)
class Action:
    """What to do, the state that the run gets (None keeps it), and the reason that ``status`` tells."""

    act: Act
    state: str | None
    reason: str = ""
    event: Event | None = None  # as which the decision took it

    @property
    def goes_on(self) -> bool:
        """Whether the run continues without a person."""
        return self.act in (Act.REQUEUE, Act.HAND_OVER) or self.state == "requeued"


def decide(event: Event, known: Knowledge, detail: str = "") -> Action:
    """The action.

    Args:
        detail: what is known about the event, such as the rank; a part of the reason.
    """
    if event is Event.FINISHED:
        return Action(Act.END, "finished", event=event)
    if event is Event.CANCELLED or known.cancel_mark or (known.slurm and known.word is Word.CANCELLED):
        reason = "" if known.cancel_mark else "cancelled with scancel"
        return Action(Act.END, "cancelled", reason, Event.CANCELLED)
    if event is Event.PRUNED:
        return Action(Act.END, "stopped", "pruned", event)
    if event is Event.FAILED:
        return Action(Act.END, "failed", detail, event)
    if known.slurm and known.word is Word.QUEUED:
        return Action(Act.LEAVE_TO_SLURM, "requeued", event=event)
    return _interrupted(what_it_was(event, known), known, detail)


def what_it_was(event: Event, known: Knowledge) -> Event:
    """The event, seen with Slurm's word: what ends a job also kills its ranks, and sends them a TERM."""
    if not known.slurm or event in (Event.FINISHED, Event.FAILED, Event.PRUNED, Event.CANCELLED):
        return event
    if known.word in (Word.PREEMPTED, Word.PREEMPTED_ENDING):
        return Event.PREEMPTED
    if known.word is Word.TIME_LIMIT:
        return Event.TIME_LIMIT
    if event is Event.TERMINATED and known.word is Word.ENDING:
        return Event.CANCELLED
    if event is Event.TERMINATED and known.word in (Word.RUNNING, Word.NODE_LOST):
        return Event.RANK_LOST  # srun ends the ranks that are left when one has been killed
    if event is Event.TERMINATED and known.preemptible:
        return Event.PREEMPTED
    return event


def _interrupted(event: Event, known: Knowledge, detail: str) -> Action:
    if event is Event.CANCELLED:
        return Action(Act.END, "cancelled", "cancelled with scancel", event)
    if event is Event.TERMINATED:  # nobody can say why; Slurm requeues a job that it has preempted by itself
        return Action(Act.LEAVE_TO_SLURM if known.slurm else Act.STOP, "stopped", "terminated", event)
    if known.slurm and known.word is Word.ENDING:
        return Action(Act.LEAVE_TO_SLURM, None, event=event)
    if event in FAULTS:
        if not known.slurm and event in (Event.RANK_LOST, Event.KILLED, Event.OUT_OF_MEMORY, Event.EARLY_EXIT):
            return Action(Act.END, "failed", said(event, detail), event)
        if too_many(event, known):
            return Action(Act.END, "failed", _last_words(event, known, detail), event)
    return _go_on(event, known, detail)


def _go_on(event: Event, known: Knowledge, detail: str) -> Action:
    reason = said(event, detail) if event in FAULTS else ""
    if known.slurm and known.word is Word.NODE_LOST and not known.link_waits:
        return cannot_go_on(Action(Act.REQUEUE, "requeued", reason, event), known, "Slurm ends it, since a node was lost")
    if known.word is Word.PREEMPTED_ENDING and known.slurm and known.requeue_allowed:
        return Action(Act.LEAVE_TO_SLURM, "requeued", reason, event)
    if known.can_requeue and not (known.slurm and known.word is Word.NODE_LOST):
        return Action(Act.REQUEUE, "requeued", reason, event)
    if known.link_waits:
        return Action(Act.HAND_OVER, "requeued", reason, event)
    if known.word is Word.PREEMPTED and known.requeue_allowed:  # without scontrol, and Slurm requeues what it preempts
        return Action(Act.LEAVE_TO_SLURM, "requeued", reason, event)
    missing = "no scontrol on this node" if known.requeue_allowed else "the profile says requeue: false"
    return cannot_go_on(Action(Act.REQUEUE, "requeued", reason, event), known, f"{missing}, and no job waits to continue it")


def after_refusal(action: Action, known: Knowledge, word: Word, problem: str) -> Action:
    """What to do when the job could not be requeued.

    Args:
        word: what Slurm says now: it may be requeueing or ending the job by itself.
        problem: why not, in Slurm's words.
    """
    if word in (Word.ENDING, Word.PREEMPTED_ENDING, Word.QUEUED):
        return dataclasses.replace(action, act=Act.LEAVE_TO_SLURM)
    if word is Word.CANCELLED:
        return Action(Act.END, "cancelled", "cancelled with scancel", Event.CANCELLED)
    if known.link_waits:
        return dataclasses.replace(action, act=Act.HAND_OVER)
    return cannot_go_on(action, known, problem)


def cannot_go_on(action: Action, known: Knowledge, problem: str) -> Action:
    """The action in place of one by which the run would have gone on."""
    about = action.reason or "stopped with a checkpoint"
    reason = f"{about}; it could not be requeued ({problem}): continue it with hpc-cifar resume {known.run}"
    return dataclasses.replace(action, act=Act.END, state="failed", reason=reason)


def too_many(event: Event, known: Knowledge) -> bool:
    """Whether faults without a checkpoint in between have used up their restarts."""
    if event not in FAULTS:
        return False
    allowed = min(known.restarts_allowed, FEWER_RESTARTS.get(event, known.restarts_allowed))
    return known.faults.get(event, 0) >= allowed or faults_of(known) >= known.restarts_allowed


def faults_of(known: Knowledge) -> int:
    """Faults of all kinds; early exits are the script's, which has a limit of its own for them."""
    return sum(count for kind, count in known.faults.items() if kind is not Event.EARLY_EXIT)


def said(event: Event, detail: str) -> str:
    """The event in words: what is known about it, or its kind."""
    return detail[:MOST_SHOWN] if detail else f"{event.value}"


REMEDIES: Mapping[Event, str] = {
    Event.OUT_OF_MEMORY: "raise the memory of the job (resources.memory_gib_per_node) or lower data.micro_batch_size",
    Event.KILLED: "raise the memory of the job (resources.memory_gib_per_node) if that was why; its logs may say more",
    Event.HUNG: "hangs/ in the run directory tells what each rank did",
    Event.RANK_LOST: "its logs may say why",
    Event.NODE_BAD: "see the nodes that are named, then resume the run",
    Event.EARLY_EXIT: "see the first lines of the log",
    Event.LOCK_HELD: "the file server keeps the lock of a process that has died",
}


def _last_words(event: Event, known: Knowledge, detail: str) -> str:
    about, remedy = said(event, detail), REMEDIES[event]
    before = {kind: count for kind, count in known.faults.items() if count and (kind is event or kind is not Event.EARLY_EXIT)}
    counts = {**before, event: before.get(event, 0) + 1}
    if counts == {event: 1}:
        return f"{about}: {remedy}"
    often = f"{event.value}: {counts[event]} times"
    if len(counts) > 1:
        told = (f"{kind.value}: {count} times" if count > 1 else kind.value for kind, count in counts.items())
        often = f"{sum(counts.values())} faults ({', '.join(told)})"
    first = f"{about}; " if detail else ""
    return f"{first}{often} without a checkpoint in between, so it is not restarted: {remedy}"


# ---- the start of a job --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Begin:
    """What a job finds in the run directory when it starts.

    Attributes:
        state, reason: what the run last said.
        finished: there is its final result.
        cancel_mark: a user has cancelled the run.
        is_link: the job follows another one of the run.
        restarts: how often this job has been started before.
        failed_for_good: a rank of the last segment has said why, and a restart would fail in the same way.
    """

    state: str = ""
    reason: str = ""
    finished: bool = False
    cancel_mark: bool = False
    is_link: bool = False
    restarts: int = 0
    failed_for_good: bool = False


def leaves_at_once(found: Begin) -> str:
    """The state with which a job ends before it trains, since there is nothing to do for it; "" if it trains."""
    if found.finished:
        return "finished"
    if found.cancel_mark:
        return "cancelled"
    if not found.is_link and not found.restarts:
        return ""
    if (found.state == "stopped" and found.reason == "pruned") or (found.state == "failed" and found.failed_for_good):
        return found.state
    if found.is_link and found.state == "cancelled":  # also one that Slurm restarts: it may have been preempted as it left
        return "cancelled"
    if found.is_link and not found.restarts and found.state == "stopped":  # by a TERM that nothing explained
        return "cancelled"  # a link that Slurm itself restarts had taken the run up already
    return ""
