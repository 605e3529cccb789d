"""Every combination of what happened and what is known, against rules that are written without the policy's code."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from hpc_cifar.launch import policy
from hpc_cifar.launch.policy import Act, Action, Begin, Event, Knowledge, Word

BOUNDS = {Event.HUNG: 2, Event.NODE_BAD: 1, Event.OUT_OF_MEMORY: 1}
FAULTS = (
    Event.HUNG, Event.RANK_LOST, Event.KILLED, Event.OUT_OF_MEMORY, Event.NODE_BAD, Event.EARLY_EXIT, Event.LOCK_HELD,
)  # fmt: skip
INTERRUPTIONS = (Event.PREEMPTED, Event.TIME_LIMIT)
ENDS = (Event.FINISHED, Event.FAILED, Event.PRUNED, Event.CANCELLED)
SEEN_BY_OTHERS = (Event.RANK_LOST, Event.KILLED, Event.OUT_OF_MEMORY, Event.EARLY_EXIT)  # on this machine: the controller
ALLOWED = 5

Rule = Callable[[Event, Knowledge, Action], bool]


def knowledge(event: Event) -> Iterator[Knowledge]:
    """All that can be known with an event: counts up to one beyond each bound, also of another kind of fault."""
    other = Event.KILLED if event is Event.RANK_LOST else Event.RANK_LOST
    counts: list[dict[Event, int]] = [{}]
    if event in FAULTS:
        counts = [{event: mine, other: others} for mine in range(ALLOWED + 2) for others in (0, 1, ALLOWED - 1, ALLOWED)]
        counts += [{event: 0, Event.EARLY_EXIT: ALLOWED}] if event is not Event.EARLY_EXIT else []
    elif event is Event.TERMINATED:
        counts = [{Event.RANK_LOST: mine} for mine in range(ALLOWED + 2)]
    elif event in INTERRUPTIONS:
        counts = [{}, {Event.RANK_LOST: ALLOWED + 1}]
    for slurm, word in itertools.product((True, False), Word):
        for mark, link, requeue, scontrol, preemptible in itertools.product((False, True), repeat=5):
            for faults in counts:
                yield Knowledge(slurm, word, mark, link, requeue, scontrol, preemptible, faults, ALLOWED)


def is_cancelled(event: Event, known: Knowledge) -> bool:
    return event is Event.CANCELLED or known.cancel_mark or (known.slurm and known.word is Word.CANCELLED)


def is_ending(known: Knowledge) -> bool:
    """Whether Slurm ends the job, and ``scontrol requeue Incomplete`` would do nothing."""
    return known.slurm and known.word in (Word.ENDING, Word.NODE_LOST, Word.PREEMPTED_ENDING, Word.QUEUED)


def way_on(known: Knowledge) -> bool:
    """Whether something continues the run if it is allowed to."""
    if not known.slurm or known.link_waits or known.word is Word.QUEUED:
        return True
    by_itself = known.word in (Word.PREEMPTED, Word.PREEMPTED_ENDING) and known.requeue_allowed
    return by_itself or (known.requeue_allowed and known.has_scontrol and known.word not in (Word.ENDING, Word.NODE_LOST))


def used_up(event: Event, known: Knowledge) -> bool:
    """Early exits have a limit of their own, in the script."""
    mine, every = known.faults.get(event, 0), sum(known.faults[kind] for kind in known.faults if kind is not Event.EARLY_EXIT)
    return mine >= BOUNDS.get(event, ALLOWED) or every >= ALLOWED


def explained(known: Knowledge) -> bool:
    """Whether Slurm says that something other than a fault ended the segment."""
    return known.slurm and known.word in (Word.PREEMPTED, Word.PREEMPTED_ENDING, Word.TIME_LIMIT, Word.QUEUED)


def cancelled_never_returns(event: Event, known: Knowledge, action: Action) -> bool:
    if not is_cancelled(event, known) or event is Event.FINISHED:
        return True
    return action.act is Act.END and action.state == "cancelled" and not action.goes_on


def what_has_ended_stays_so(event: Event, known: Knowledge, action: Action) -> bool:
    if event is Event.FINISHED:
        return (action.act, action.state) == (Act.END, "finished")
    if is_cancelled(event, known) or event not in (Event.FAILED, Event.PRUNED):
        return True
    return (action.act, action.state) == (Act.END, "failed" if event is Event.FAILED else "stopped")


def interruptions_end_no_run(event: Event, known: Knowledge, action: Action) -> bool:
    if event not in INTERRUPTIONS or is_cancelled(event, known) or not way_on(known):
        return True
    return action.goes_on or (known.word is Word.ENDING and known.slurm and action.state is None)


def faults_go_on_within_their_bound(event: Event, known: Knowledge, action: Action) -> bool:
    if event not in FAULTS or is_cancelled(event, known) or used_up(event, known) or not way_on(known):
        return True
    if not known.slurm and event in SEEN_BY_OTHERS:
        return action.state == "failed"
    return action.goes_on or (known.word is Word.ENDING and known.slurm and action.state is None)


def faults_are_bounded(event: Event, known: Knowledge, action: Action) -> bool:
    """Slurm's own requeues, and the end that it makes of a job, are not the policy's."""
    if event not in FAULTS or not used_up(event, known) or is_cancelled(event, known) or explained(known):
        return True
    return not action.goes_on


def a_failure_says_why(event: Event, known: Knowledge, action: Action) -> bool:
    if action.state != "failed" or event is Event.FAILED:
        return True
    spent = (
        event in FAULTS and used_up(event, known) and not explained(known) and not (not known.slurm and event in SEEN_BY_OTHERS)
    )
    return bool(action.reason) and (not spent or policy.REMEDIES[event] in action.reason)


def one_way_on(event: Event, known: Knowledge, action: Action) -> bool:
    """Nothing is sent back that Slurm has sent back or ends, nothing handed over to nobody, and nothing without means."""
    if action.act is Act.REQUEUE:
        return not is_ending(known) and (not known.slurm or (known.requeue_allowed and known.has_scontrol))
    if action.act is Act.HAND_OVER:
        return known.slurm and known.link_waits and action.state == "requeued"
    return True


def the_state_is_what_happens(event: Event, known: Knowledge, action: Action) -> bool:
    """Whoever reads ``requeued`` can rely on it; nothing is undecided unless Slurm ends the job."""
    if action.state == "requeued":
        return action.act is not Act.END and (
            action.act is not Act.LEAVE_TO_SLURM or known.requeue_allowed or known.word is Word.QUEUED
        )
    return action.state is not None or (action.act is Act.LEAVE_TO_SLURM and known.slurm and known.word is Word.ENDING)


def a_bare_term_is_no_preemption(event: Event, known: Knowledge, action: Action) -> bool:
    """Where Slurm answers, it is what Slurm says; where it does not, the profile says what it is."""
    if event is not Event.TERMINATED or is_cancelled(event, known):
        return True
    if not known.slurm:
        return (action.act, action.state) == (Act.STOP, "stopped")
    if known.word is Word.NONE:
        return action.event is Event.PREEMPTED if known.preemptible else action.state == "stopped" and not action.goes_on
    if known.word is Word.ENDING:
        return action.state == "cancelled"
    if known.word in (Word.RUNNING, Word.NODE_LOST):
        return action.event is Event.RANK_LOST and (not used_up(Event.RANK_LOST, known) or action.state == "failed")
    return True


def the_same_for_the_same(event: Event, known: Knowledge, action: Action) -> bool:
    """What it was is found once: seen again with the same knowledge it is the same."""
    seen = policy.what_it_was(event, known)
    return policy.what_it_was(seen, known) is seen and policy.decide(event, known) == action


RULES: tuple[Rule, ...] = (
    cancelled_never_returns, what_has_ended_stays_so, interruptions_end_no_run, faults_go_on_within_their_bound,
    faults_are_bounded, a_failure_says_why, one_way_on, the_state_is_what_happens, a_bare_term_is_no_preemption,
    the_same_for_the_same,
)  # fmt: skip


def decisions() -> Iterator[tuple[Event, Knowledge, Action]]:
    for event in Event:
        for known in knowledge(event):
            yield event, known, policy.decide(event, known)


def begins() -> Iterator[Begin]:
    states = ("", "pending", "running", "requeued", "stopped", "cancelled", "failed", "finished")
    flags = [(False, True)] * 4
    for state, reason, restarts, (done, mark, link, final) in itertools.product(
        states, ("", "pruned", "terminated"), (0, 1, 2), itertools.product(*flags)
    ):
        yield Begin(state, reason, done, mark, link, restarts, final)


def begins_rightly(found: Begin, word: str) -> bool:
    if found.finished:
        return word == "finished"
    if found.cancel_mark:
        return word == "cancelled"
    first = not found.is_link and not found.restarts  # a person has just submitted it
    if first or found.state in ("", "pending", "running", "requeued"):
        return word == ""
    if found.state == "stopped" and found.reason == "pruned":
        return word == "stopped"
    if found.is_link and found.state == "cancelled":
        return word == "cancelled"
    if found.state == "failed":
        return word == ("failed" if found.failed_for_good else "")
    return word == ("cancelled" if found.is_link and found.state == "stopped" and not found.restarts else "")


def refusals() -> Iterator[tuple[Action, Knowledge, Word, Action]]:
    for event in (*FAULTS, *INTERRUPTIONS):
        for link, word in itertools.product((False, True), Word):
            tried = Action(Act.REQUEUE, "requeued", "why" if event in FAULTS else "", event)
            known = Knowledge(link_waits=link)
            yield tried, known, word, policy.after_refusal(tried, known, word, "refused")


def refused_rightly(known: Knowledge, word: Word, action: Action) -> bool:
    if word in (Word.ENDING, Word.PREEMPTED_ENDING, Word.QUEUED):
        return action.act is Act.LEAVE_TO_SLURM and action.state == "requeued"
    if word is Word.CANCELLED:
        return (action.act, action.state) == (Act.END, "cancelled")
    if known.link_waits:
        return action.act is Act.HAND_OVER and action.state == "requeued"
    return action.act is Act.END and action.state == "failed" and "refused" in action.reason


def broken() -> Iterator[str]:
    """Each combination that breaks a rule, in words."""
    for event, known, action in decisions():
        for rule in RULES:
            if not rule(event, known, action):
                yield f"{rule.__name__}: {event.name} {known}: {action}"
    for found in begins():
        if not begins_rightly(found, word := policy.leaves_at_once(found)):
            yield f"begins_rightly: {found}: {word!r}"
    for _, known, word, action in refusals():
        if not refused_rightly(known, word, action):
            yield f"refused_rightly: {known} {word}: {action}"
