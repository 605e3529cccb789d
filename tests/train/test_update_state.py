"""Several processes change the state of a run at once, on file systems with and without locks; none of them waits long."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import ranks

from hpc_cifar import files
from hpc_cifar.runs import STATE_LOCK, UPDATE_WAIT_S, Run
from hpc_cifar.train import loop

PROCESSES, FIELDS = 4, 60


def refuse(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def change(path: Path, name: str, locks: bool, ready: object) -> None:
    if not locks:
        fcntl.flock = refuse  # type: ignore[assignment]
    ready.wait()  # type: ignore[attr-defined]
    for number in range(FIELDS):
        Run(path).update_state(**{f"{name}{number}": number})


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_no_change_of_another_process_is_lost(tmp_path: Path, locks: bool) -> None:
    """Without a lock, which is how it was, some of the fields are missing in the end."""
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(PROCESSES)
    names = [f"process{number}_" for number in range(PROCESSES)]
    made = [context.Process(target=change, args=(tmp_path, name, locks, ready)) for name in names]
    for one in made:
        one.start()
    for one in made:
        one.join()
    found = files.read_object(Run(tmp_path).state_file)
    assert [f"{name}{number}" for name in names for number in range(FIELDS) if found.get(f"{name}{number}") != number] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [STATE_LOCK, "state.json"], "nothing is left behind"


def hold(path: Path, locks: bool, ready: object) -> None:
    if not locks:
        fcntl.flock = refuse  # type: ignore[assignment]
    with files.alone(path / STATE_LOCK, 1.0):
        ready.set()  # type: ignore[attr-defined]
        time.sleep(600)


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_a_process_that_was_killed_or_stopped_keeps_nobody_for_long(
    tmp_path: Path, locks: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=hold, args=(tmp_path, locks, ready), daemon=True)
    holder.start()
    request.addfinalizer(holder.kill)  # nobody waits for one that is stopped
    assert ready.wait(60) and holder.pid is not None
    if not locks:
        monkeypatch.setattr(fcntl, "flock", refuse)
    run, began = Run(tmp_path), time.monotonic()
    assert not run.update_state(wait_s=0, state="running"), "the training goes on, and tells it next time"
    assert time.monotonic() - began < 2 and not run.state_file.exists()
    os.kill(holder.pid, signal.SIGSTOP)
    assert run.update_state(wait_s=0.2, state="stopped") and run.state().state == "stopped"
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    monkeypatch.setattr(files, "LEFT_BEHIND_S", 0.2)
    assert run.update_state(state="cancelled") and run.update_state(wait_s=0, step=5)
    assert (run.state().state, run.state().step) == ("cancelled", 5)


def test_a_condition_and_a_value_that_is_removed(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.update_state(state="failed", reason="why", step=3)
    assert not run.update_state(when=lambda old: old.state == "running", state="pending")
    assert run.update_state(when=lambda old: old.state == "failed", state="pending", reason=None)
    assert (run.state().state, run.state().reason, run.state().step) == ("pending", None, 3)
    assert "reason" not in files.read_object(run.state_file)


def test_what_is_damaged_does_not_stay(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.state_file.write_text('{"state": ["x"], "step": 5, "of a later version": [1]}')
    assert run.state().problem == "state.json: state should be text, not a list"
    run.update_state(reason="why")
    assert (run.state().problem, run.state().state, run.state().step, run.state().reason) == ("", "", 5, "why")
    assert files.read_object(run.state_file)["of a later version"] == [1]
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / STATE_LOCK).unlink()
    (tmp_path / STATE_LOCK).symlink_to(victim)
    assert run.update_state(state="running") and victim.read_text() == "mine"


def test_rows_begin_after_what_a_killed_writer_has_left_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b')
    files.append_json_line(path, {"c": 3})
    assert files.json_lines(path) == ([{"a": 1}, {"c": 3}], 1)


def test_the_steps_wait_for_nobody_and_the_end_does(tmp_path: Path, digits_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[tuple[str, bool, float]] = []
    update = Run.update_state

    def noted(run: Run, *, wait_s: float = UPDATE_WAIT_S, **values: object) -> bool:
        waits.append((str(values.get("state")), "train_loss" in values, wait_s))
        return update(run, wait_s=wait_s, **values)  # type: ignore[arg-type]

    monkeypatch.setattr(Run, "update_state", noted)
    run = ranks.new_run(tmp_path, ranks.experiment(epochs=1))
    assert loop.train(run, data_root=digits_data, console=False)["state"] == "finished"
    assert {wait for state, progress, wait in waits if state == "running" and progress} == {0}
    assert {wait for state, _, wait in waits if state == "finished"} == {UPDATE_WAIT_S}
