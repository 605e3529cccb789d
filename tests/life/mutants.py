"""Plausible mistakes in the policy and its executor, each put in by changing a few words of one function."""

from __future__ import annotations

import contextlib
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from hpc_cifar.launch import ending, policy

# name: module, function, the words, the mistake
MUTANTS: dict[str, tuple[Any, str, str, str]] = {
    "a cancel mark is overlooked": (policy, "decide", "known.cancel_mark or ", ""),
    "scancel is overlooked": (policy, "decide", "(known.slurm and known.word is Word.CANCELLED)", "False"),
    "a job that is back already is sent back": (policy, "decide", "known.word is Word.QUEUED", "False"),
    "a TERM that nothing explains is a preemption": (
        policy, "what_it_was", "if event is Event.TERMINATED and known.preemptible", "if event is Event.TERMINATED",
    ),
    "a lost rank passes for a preemption": (policy, "what_it_was", "return Event.RANK_LOST", "return Event.PREEMPTED"),
    "faults are never too many": (policy, "too_many", "if event not in FAULTS", "if True"),
    "one fault too many": (policy, "too_many", "(event, 0) >= allowed", "(event, 0) > allowed"),
    "hangs have no bound of their own": (
        policy, "too_many", "min(known.restarts_allowed, FEWER_RESTARTS.get(event, known.restarts_allowed))",
        "known.restarts_allowed",
    ),
    "preemptions are counted as faults": (
        policy, "_go_on", 'reason = said(event, detail) if event in FAULTS else ""',
        'reason = ""\n    if sum(known.faults.values()) >= 5:\n        return Action(Act.END, "failed", "too many", event)',
    ),
    "links are forgotten": (policy, "_go_on", "    if known.link_waits:", "    if False:"),
    "an end has no remedy": (policy, "_last_words", "REMEDIES[event]", '""'),
    "a cancelled run begins again": (policy, "leaves_at_once", "if found.cancel_mark:", "if False:"),
    "a link takes up what was cancelled": (policy, "leaves_at_once", 'found.state == "cancelled"', "False"),
    "a pruned run begins again": (policy, "leaves_at_once", 'found.reason == "pruned"', "False"),
    "a refusal is final though Slurm ends the job": (
        policy, "after_refusal", "Word.PREEMPTED_ENDING, Word.QUEUED", "Word.ENDING",
    ),
    "two ranks end a segment": (
        ending, "settle", "if not records.claim(segment, row):", "if records.claim(segment, row) is None:",
    ),
    "the time limit is taken for a running job": (ending, "_carry_out", "scheduler.word() is Word.TIME_LIMIT", "False"),
    "faults before a checkpoint count": (ending, "faults", 'row.step == step', "True"),
    "nothing is counted": (ending, "_carry_out", "if action.event in _COUNTED:", "if False:"),
}  # fmt: skip


@contextlib.contextmanager
def mutated(name: str) -> Iterator[None]:
    """With one of them in place."""
    module, function, words, mistake = MUTANTS[name]
    right = getattr(module, function)
    source = textwrap.dedent(inspect.getsource(right))
    assert source.count(words) >= 1, f"{name}: {function} has no {words!r} any more"
    code = compile(source.replace(words, mistake), inspect.getfile(right), "exec", flags=_future())
    exec(code, module.__dict__)
    try:
        yield
    finally:
        setattr(module, function, right)


def _future() -> int:
    import __future__

    return __future__.annotations.compiler_flag
