"""Random stories of runs, played in virtual time with the real policy and executor; see world.py.

HPC_CIFAR_HISTORIES (5,000) are played over records in memory, HPC_CIFAR_HISTORIES_ON_DISK (200) over real run directories.
"""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path

import pytest
from life import enumeration, old, stories, told
from life.mutants import MUTANTS, mutated
from life.stores import Folder, Memory, Store
from life.world import World

HISTORIES = int(os.environ.get("HPC_CIFAR_HISTORIES", "5000"))
ON_DISK = int(os.environ.get("HPC_CIFAR_HISTORIES_ON_DISK", "200"))
PARTS = 4
FOR_A_MUTANT = 3000


def fails(first: int, last: int) -> str:
    """The shortest story found of the first rule that one of these seeds breaks; "" if none does."""
    for seed in range(first, last):
        story = stories.drawn(random.Random(seed))
        if wrong := stories.play(story).wrong:
            rule = next(iter(wrong))
            return f"seed {seed}: {stories.told(stories.shortest(story, rule), rule)}"
    return ""


@pytest.mark.parametrize("part", range(PARTS))
def test_no_history_breaks_a_rule(part: int) -> None:
    assert not (found := fails(HISTORIES * part // PARTS, HISTORIES * (part + 1) // PARTS)), found


def test_the_same_over_real_run_directories(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Both stores lead to the same ends."""
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path_factory.getbasetemp()
    with tempfile.TemporaryDirectory(dir=base) as folder:
        for seed in range(ON_DISK):
            story = stories.drawn(random.Random(seed))
            real = World(story, make=lambda number, seed=seed: Folder(Path(folder, f"{seed}-{number}")))  # type: ignore[misc]
            real.play()
            assert not stories.judge(real), stories.told(story, next(iter(real.wrong)))
            assert [run.store.state() for run in real.runs] == [run.store.state() for run in stories.play(story).runs], story


@pytest.fixture(params=[Memory, lambda: None], ids=["memory", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return request.param() or Folder(tmp_path / "run")


def test_both_stores_keep_the_same_records(store: Store) -> None:
    store.add_job("1", None)
    store.add_job("2", "1")
    first, second = store.records("1"), store.records("2")
    assert (first.next_link(), second.next_link()) == ("2", None)
    assert (first.saved_step(), first.cancelled(), first.finished(), list(first.interruptions())) == (0, False, False, [])
    store.save(50)
    store.save(100)
    assert second.saved_step() == 100
    assert first.claim("1.0", {"event": "hang"}) and not second.claim("1.0", {"event": "lost rank"})
    assert first.outcome("1.0") is None
    first.settled("1.0", {"event": "hang", "state": "requeued"})
    outcome = second.outcome("1.0")
    assert outcome and (outcome.event, outcome.state, outcome.done) == ("hang", "requeued", True)
    assert not second.claim("1.0", {}) and second.claim("1.1", {})
    first.note({"event": "hang", "step": 100})
    second.note({"event": "lost rank", "step": 100})
    assert [row.event for row in first.interruptions()] == ["hang", "lost rank"]
    first.set_state("failed", "why")
    assert store.state() == ("failed", "why")
    second.set_state("requeued", "")
    assert store.state() == ("requeued", "")
    assert not store.last_failed()
    store.fail("1.1", "because", 0)
    store.fail("1.1", "lost it", 1)
    assert store.failure("1.1") == "because" and store.failure("1.0") == "" and store.last_failed()
    store.cancel()
    store.finish()
    assert first.cancelled() and second.finished()


@pytest.mark.parametrize("name", told.STORIES)
def test_a_story_that_broke_once(name: str) -> None:
    story, state, _ = told.STORIES[name]
    world = stories.play(story)
    assert not world.wrong, stories.told(story, next(iter(world.wrong)))
    assert [run.store.state()[0] for run in world.runs] == [state], stories.told(story, "")


@pytest.mark.parametrize("name", [name for name, (_, _, rule) in told.STORIES.items() if rule])
def test_it_broke_under_the_behaviour_before(name: str) -> None:
    story, _, rule = told.STORIES[name]
    world = old.old_world(story)
    world.play()
    assert rule in stories.judge(world), stories.told(story, rule, old.old_world)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_in_the_policy_is_caught(name: str) -> None:
    """By the enumeration or by the histories."""
    with mutated(name):
        assert any(enumeration.broken()) or fails(0, FOR_A_MUTANT)


def test_a_story_is_shortened_and_told() -> None:
    with mutated("scancel is overlooked"):
        seed = next(seed for seed in range(FOR_A_MUTANT) if "cancelled never returns" in played(seed))
        story = stories.drawn(random.Random(seed))
        short = stories.shortest(story, "cancelled never returns")
        text = stories.told(short, "cancelled never returns")
    assert len(short.happenings) <= len(story.happenings) and "scancel" in text.splitlines()[1]
    assert text.splitlines()[-1].count("BROKEN: cancelled never returns") == 1


def played(seed: int) -> dict[str, str]:
    return stories.play(stories.drawn(random.Random(seed))).wrong
