"""The policy, for every combination of what happened and what is known."""

from __future__ import annotations

from itertools import islice

import pytest
from life import enumeration

from hpc_cifar.launch import policy, slurm
from hpc_cifar.launch.policy import Act, Event, Knowledge, Word


def test_every_combination_keeps_every_rule() -> None:
    assert not list(islice(enumeration.broken(), 5))


def test_all_of_it_was_looked_at() -> None:
    seen = [(event, known.word, action.act) for event, known, action in enumeration.decisions()]
    assert {event for event, _, _ in seen} == set(Event)
    assert {word for _, word, _ in seen} == set(Word)
    assert {act for _, _, act in seen} == set(Act)
    assert set(enumeration.FAULTS) == policy.FAULTS == set(policy.REMEDIES)
    assert set(enumeration.INTERRUPTIONS) == policy.INTERRUPTIONS
    assert set(enumeration.FAULTS) | set(enumeration.INTERRUPTIONS) | set(enumeration.ENDS) | {Event.TERMINATED} == set(Event)


def test_the_last_words() -> None:
    known = Knowledge(faults={Event.OUT_OF_MEMORY: 1})
    action = policy.decide(Event.OUT_OF_MEMORY, known, "rank 1 on n1 was killed for memory")
    assert action.state == "failed"
    assert action.reason == (
        "rank 1 on n1 was killed for memory; out of memory: 2 times without a checkpoint in between, so it is not restarted: "
        "raise the memory of the job (resources.memory_gib_per_node) or lower data.micro_batch_size"
    )


def test_the_last_words_of_several_kinds() -> None:
    known = Knowledge(faults={Event.KILLED: 4, Event.EARLY_EXIT: 1, Event.HUNG: 1}, restarts_allowed=5)
    action = policy.decide(Event.RANK_LOST, known, "")
    assert action.reason == (
        "6 faults (killed rank: 4 times, hang, lost rank) without a checkpoint in between, so it is not restarted: "
        "its logs may say why"
    )
    action = policy.decide(Event.RANK_LOST, Knowledge(faults={Event.RANK_LOST: 5}), "")
    assert action.reason == "lost rank: 6 times without a checkpoint in between, so it is not restarted: its logs may say why"


@pytest.mark.parametrize(
    ("seen", "restarts", "word"),
    [
        (slurm.Evidence(), 0, Word.NONE),
        (slurm.Evidence("RUNNING"), 0, Word.RUNNING),
        (slurm.Evidence("RUNNING", restarts=2), 2, Word.RUNNING),
        (slurm.Evidence("RUNNING", preempted="2026-11-28T15:00:00+00:00"), 0, Word.PREEMPTED),
        (slurm.Evidence("COMPLETING", restarts=1), 0, Word.QUEUED),
        (slurm.Evidence("PENDING", "BeginTime", restarts=1), 1, Word.QUEUED),
        (slurm.Evidence("COMPLETING"), 0, Word.CANCELLED),
        (slurm.Evidence("CANCELLED"), 0, Word.CANCELLED),
        (slurm.Evidence("COMPLETING", "TimeLimit"), 0, Word.TIME_LIMIT),
        (slurm.Evidence("COMPLETING", "NodeDown"), 0, Word.NODE_LOST),
        (slurm.Evidence("COMPLETING", "NonZeroExitCode"), 0, Word.ENDING),
        (
            slurm.Evidence("COMPLETING", "", "2026-11-28T15:00:00+00:00", "2026-11-28T15:00:00+00:00"),
            0,
            Word.PREEMPTED_ENDING,
        ),
        (slurm.Evidence("COMPLETING", "", "2026-11-28T15:00:00+00:00", "2026-11-28T15:00:30+00:00"), 0, Word.ENDING),
    ],
)
def test_slurms_word(seen: slurm.Evidence, restarts: int, word: Word) -> None:
    assert slurm.word_of(seen, restarts) is word
