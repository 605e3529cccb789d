"""The end of a segment: what happened is looked at once, ``policy.py`` decides, and this carries it out.

Whichever rank gets there first does it for all ranks; the others find its claim and leave. Two edges are no part of it and are
documented as such: the lines behind ``srun`` in the script, for jobs whose ranks never spoke, and the controller of local jobs.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..records import Ending, Interruption
from . import policy
from .policy import FAULTS, INTERRUPTIONS, Act, Action, Event, Knowledge, Word


class Records(Protocol):
    """What the run directory holds of a run's life; a test keeps it in memory."""

    def cancelled(self) -> bool:
        """Whether a user has cancelled the run."""

    def finished(self) -> bool:
        """Whether there is its final result."""

    def saved_step(self) -> int:
        """Step of the newest checkpoint; 0 without any."""

    def interruptions(self) -> Sequence[Interruption]:
        """Rows ``event``, ``step`` (of the newest checkpoint), ``segment``, ... since a person last submitted the run."""

    def note(self, row: Mapping[str, Any]) -> None:
        """Add a row to these."""

    def claim(self, segment: str, row: Mapping[str, Any]) -> bool:
        """Whether this is the first one to end the segment."""

    def settled(self, segment: str, row: Mapping[str, Any]) -> None:
        """Say what was done about the segment that was claimed."""

    def outcome(self, segment: str) -> Ending | None:
        """What was done; None as long as nothing was."""

    def set_state(self, state: str, reason: str) -> None:
        """What ``status`` shows; an empty reason removes the old one."""

    def next_link(self) -> str | None:
        """The job that waits behind this one to continue the run."""


class Scheduler(Protocol):
    """What a job can ask of Slurm, or of the controller on this machine, and have it do."""

    @property
    def slurm(self) -> bool:
        """See :class:`hpc_cifar.launch.policy.Knowledge`, as for the next three."""

    @property
    def requeue_allowed(self) -> bool: ...

    @property
    def has_scontrol(self) -> bool: ...

    @property
    def preemptible(self) -> bool: ...

    def word(self) -> Word:
        """Slurm's word on this job."""

    def death(self) -> tuple[Event, str] | None:
        """What killed a rank of this segment, and its words; None if nothing is known."""

    def requeue(self, exclude: Sequence[str], at_limit: bool) -> str:
        """Send the job back to the queue, without some nodes from now on; "", or the problem.

        Args:
            at_limit: Slurm ends the job at its time limit. ``scontrol requeue Incomplete`` says nothing and does nothing then
                (22.05); without that word the job goes back, as one that was cancelled would, so it is tried second.
        """

    def exclude_behind(self, nodes: Sequence[str]) -> None:
        """Have the jobs that wait behind this one not get some nodes."""

    def cancel(self) -> None:
        """Cancel the job once more."""


def settle(
    event: Event,
    records: Records,
    scheduler: Scheduler,
    *,
    segment: str,
    detail: str = "",
    rank: int = 0,
    restarts_allowed: int = policy.DEFAULT_RESTARTS,
    exclude: Sequence[str] = (),
    run: str = "RUN",
) -> Action | None:
    """Decide about a segment and carry it out; None for whoever comes second.

    Args:
        segment: ``<job id>.<restart>``.
        detail: what is known about the event.
        exclude: nodes that the job should not get again.
        run: name of the run, for words.
    """
    row: dict[str, Any] = {"segment": segment, "event": event.value, "rank": rank}
    if not records.claim(segment, row):
        return None
    known = dataclasses.replace(_known(records, scheduler, restarts_allowed), run=run)
    if records.finished():
        event = Event.FINISHED
    seen = policy.what_it_was(event, known)
    if seen in (Event.RANK_LOST, Event.KILLED) and (death := scheduler.death()):
        seen, detail = death
    action = policy.decide(seen, known, detail)
    action = _carry_out(action, known, records, scheduler, row, exclude)
    records.settled(segment, {**row, "event": _kind(action, event), "action": action.act.value, "state": action.state})
    return action


def _known(records: Records, scheduler: Scheduler, restarts_allowed: int) -> Knowledge:
    step = records.saved_step()
    return Knowledge(
        slurm=scheduler.slurm,
        word=scheduler.word() if scheduler.slurm else Word.NONE,
        cancel_mark=records.cancelled(),
        link_waits=records.next_link() is not None,
        requeue_allowed=scheduler.requeue_allowed,
        has_scontrol=scheduler.has_scontrol,
        preemptible=scheduler.preemptible,
        faults=faults(records.interruptions(), step),
        restarts_allowed=restarts_allowed,
    )


def faults(rows: Sequence[Interruption], step: int) -> Counter[Event]:
    """Faults of each kind that happened since the checkpoint at ``step`` was the newest."""
    return Counter(Event(row.event) for row in rows if row.step == step and row.event in _FAULT_WORDS)


_FAULT_WORDS = frozenset(event.value for event in FAULTS)
_COUNTED = FAULTS | INTERRUPTIONS


def _kind(action: Action, event: Event) -> str:
    return (action.event or event).value


def _carry_out(
    action: Action,
    known: Knowledge,
    records: Records,
    scheduler: Scheduler,
    row: dict[str, Any],
    exclude: Sequence[str],
) -> Action:
    if action.event in _COUNTED:
        # in this order: the script of a job counts rows by the text of event and step
        kind, step = action.event.value, records.saved_step()
        noted = {"segment": row["segment"], "event": kind, "step": step, "rank": row["rank"], "reason": action.reason}
        records.note({**noted, "nodes": list(exclude)} if exclude else noted)
    _say(action, records)  # first: what follows may end this process
    if action.act is Act.REQUEUE and scheduler.slurm:
        problem = scheduler.requeue(exclude, False)
        if not problem and scheduler.word() is Word.TIME_LIMIT:
            problem = scheduler.requeue(exclude, True)
        if problem:
            action = policy.after_refusal(action, known, scheduler.word(), problem)
            _say(action, records)
        elif records.cancelled():  # in the same moment; Slurm may have heard of the cancel first
            scheduler.cancel()
            action = policy.decide(Event.CANCELLED, dataclasses.replace(known, cancel_mark=True))
            _say(action, records)
    if action.act is Act.HAND_OVER and exclude:
        scheduler.exclude_behind(exclude)
    return action


def _say(action: Action, records: Records) -> None:
    """The run's state; a run that has finished stays so."""
    if action.state is None or (records.finished() and action.state != "finished"):
        return
    reason = action.reason
    if action.act is Act.HAND_OVER:
        reason = "; ".join(filter(None, (reason, f"it goes on as job {records.next_link()}")))
    records.set_state(action.state, reason)
