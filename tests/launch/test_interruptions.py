"""The records of what interrupted a run, and the words about what killed a rank."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from launch_site import run_with

from hpc_cifar.launch import deaths, interruptions
from hpc_cifar.launch.policy import Event
from hpc_cifar.runs import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return run_with(tmp_path / "runs", "9", {"state": "running", "step": 75})


def saved(run: Run, step: int) -> None:
    run.checkpoints.mkdir(exist_ok=True)
    (run.checkpoints / "latest").unlink(missing_ok=True)
    (run.checkpoints / "latest").symlink_to(f"step-{step:08d}")


def test_the_step_of_the_newest_checkpoint(run: Run) -> None:
    assert interruptions.saved_step(run) == 0
    for step in (0, 7, 70, 12_345_678, 123_456_789):
        saved(run, step)
        assert interruptions.saved_step(run) == step
    (run.checkpoints / "latest").unlink()
    (run.checkpoints / "latest").symlink_to("elsewhere")
    assert interruptions.saved_step(run) == 0


def test_interruptions_without_a_checkpoint_in_between_are_told(run: Run) -> None:
    records = interruptions.RunRecords(run, "9")

    def interrupted(event: Event) -> str | None:
        records.note({"segment": "9.0", "event": event.value, "step": interruptions.saved_step(run), "rank": 0, "reason": ""})
        return interruptions.without_progress(run)

    assert interruptions.without_progress(run) is None
    assert interrupted(Event.PREEMPTED) is None
    assert interrupted(Event.PREEMPTED) == (
        "no checkpoint since step 0 (preempted: 2 times): give it more time, or checkpoint more often (checkpoint.every_steps)"
    )
    assert "step 0 (preempted: 2 times, killed rank)" in (interrupted(Event.KILLED) or "")
    saved(run, 70)
    assert interruptions.without_progress(run) is None, "it has gained one since"
    assert interrupted(Event.TIME_LIMIT) is None
    assert "since step 70 (time limit: 2 times)" in (interrupted(Event.TIME_LIMIT) or "")
    interruptions.begin_anew(run)
    assert interruptions.without_progress(run) is None and interruptions.rows(run) == []
    assert len((run.path / interruptions.PAST).read_text().splitlines()) == 5
    interruptions.begin_anew(run)


def test_signals_are_known_by_the_words_of_srun() -> None:
    assert deaths.signal_of("Killed") == signal.SIGKILL
    assert deaths.signal_of("Segmentation fault (core dumped)") == signal.SIGSEGV
    assert deaths.signal_of("Exited with exit code 1") is None
    assert deaths.in_log("srun: error: n1: task 0: Exited with exit code 1\n") is None
    assert deaths.in_log("srun: error: n1: tasks 0-1: Terminated\n") is None, "that is how srun ends the ranks that are left"
    first = deaths.in_log("srun: error: n1: task 0: Terminated\nsrun: error: n2: task 1: Bus error (core dumped)\n")
    assert first is not None and (first.ranks, first.node, first.signal, first.event) == (
        "1",
        "n2",
        signal.SIGBUS,
        Event.KILLED,
    )


@pytest.mark.parametrize(
    ("version", "line", "name", "text"),
    [
        ("v2", "0::/job_9/step_0/task_1", "memory.events", "low 0\nmax 5\noom 1\noom_kill {}\n"),
        ("v1", "4:memory:/job_9/step_0/task_1", "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"),
    ],
)
def test_the_kernel_counts_what_it_kills_for_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, line: str, name: str, text: str
) -> None:
    """In the cgroup of the task or in one above it."""
    root = tmp_path if version == "v2" else tmp_path / "memory"
    step = root / "job_9" / "step_0"
    (step / "task_1").mkdir(parents=True)
    for folder, count in ((step / "task_1", 0), (step, 1), (root, 7)):  # above the job: of others, too
        (folder / name).write_text(text.format(count))
    listed = tmp_path / "cgroup"
    listed.write_text(f"3:cpu:/\n{line}\n")
    monkeypatch.setattr(deaths, "CGROUPS", tmp_path)
    monkeypatch.setattr(deaths, "OWN", listed)
    assert deaths.killed_for_memory() == {str(step / "task_1"): 0, str(step): 1}
    listed.unlink()
    assert deaths.killed_for_memory() == {}
