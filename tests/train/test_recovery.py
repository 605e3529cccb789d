"""A loss that is not finite: the run ends, or goes back and leaves the batch out, so many times and no more."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from ranks import complete, experiment, finish, logs, losses, new_run, start

from hpc_cifar import files
from hpc_cifar.errors import RunError
from hpc_cifar.train import recovery
from hpc_cifar.train.distributed import World
from hpc_cifar.train.recovery import FILE

pytestmark = pytest.mark.slow
CONFIG = {"checkpoint": {"every_steps": 4}, "training": {"skip_non_finite": 2}}
DAMAGED = {"DAMAGED_BATCHES": "0:6"}  # of 13 batches; the update number 7


@pytest.mark.parametrize(("batch", "steps", "from_step", "world"), [(6, [6, 7], 4, 1), (6, [6, 7], 4, 2), (8, [8, 9], 4, 1)])
def test_a_damaged_batch_is_left_out_and_the_run_ends_as_one_that_never_saw_it(
    tmp_path: Path, digits_data: Path, batch: int, steps: list[int], from_step: int, world: int
) -> None:
    """The checkpoint of step 8 holds an update that is left out."""
    config = experiment(**CONFIG)
    run, other = new_run(tmp_path / "a", config), new_run(tmp_path / "b", config)
    result = complete(run, digits_data, world, environment={"DAMAGED_BATCHES": f"0:{batch}"})
    assert files.read_json(run.path / FILE) == {"steps": steps, "times": 1}
    assert result["restarts"] == 0
    events = [row["event"] for row in files.read_json_lines(run.metrics_file) if row["kind"] == "event"]
    assert events.count("went back") == 1 and "failed" not in events and events[-1] == "finished"
    assert "going back to the last checkpoint" in logs(run) and f"resuming at step {from_step} " in logs(run)
    files.write_json(other.path / FILE, {"steps": steps, "times": 1})
    expected = complete(other, digits_data, world)
    same = ("test_loss", "test_accuracy", "steps", "epochs")
    assert {name: result[name] for name in same} == {name: expected[name] for name in same}
    assert losses(run) == losses(other) and not set(steps) & losses(run).keys()


def test_before_the_first_checkpoint_it_begins_anew(tmp_path: Path, digits_data: Path) -> None:
    run = new_run(tmp_path, experiment(**CONFIG))
    complete(run, digits_data, 1, environment={"DAMAGED_BATCHES": "0:0"})
    assert files.read_json(run.path / FILE) == {"steps": [1], "times": 1}


def test_where_all_checkpoints_are_left_out_too_it_begins_anew(tmp_path: Path, digits_data: Path) -> None:
    run = new_run(tmp_path, experiment(**CONFIG))
    assert complete(run, digits_data, 1, environment={"DAMAGED_BATCHES": "0:4"})["state"] == "finished"
    assert files.read_json(run.path / FILE) == {"steps": [4, 5], "times": 1} and "resuming" not in logs(run)


def test_more_of_them_than_allowed_end_the_run(tmp_path: Path, digits_data: Path) -> None:
    run = new_run(tmp_path, experiment(**CONFIG))
    processes = start(run, digits_data, 2, environment={"DAMAGED_BATCHES": "0:2,0:5,0:8"})
    assert finish(processes) == [1, 1]
    assert files.read_json(run.path / FILE) == {"steps": [2, 3, 5, 6], "times": 2}
    assert run.state().state == "failed" and "became nan at step 9 (epoch 1)" in run.state().reason


def test_without_leave_it_ends_at_the_first(tmp_path: Path, digits_data: Path) -> None:
    run = new_run(tmp_path, experiment())
    assert finish(start(run, digits_data, 1, environment=DAMAGED)) == [1]
    assert "became nan at step 7" in run.state().reason and not (run.path / FILE).exists()


def test_a_disk_that_refuses_to_note_it_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = new_run(tmp_path, experiment(**CONFIG))
    monkeypatch.setattr(recovery.files, "write_json", full)
    with pytest.raises(RunError, match=r"left-out\.json: cannot leave out update 7: No space left on device"):
        recovery.leave_out(run, World(0, 1, 0, 1, torch.device("cpu"), None), 7)


def test_memory_that_is_full_is_told_with_batch_and_memory(tmp_path: Path, digits_data: Path) -> None:
    layers = [{"conv": {"filters": 4096, "kernel": 3, "padding": 1}}, "relu", "global_avg_pool", {"dense": {"units": 10}}]
    config = experiment(model={"family": "sequential", "layers": layers}, training={"ema_decay": None})
    run = new_run(tmp_path, config)
    limited = {"LIMITED_TO_MIB": "1500"}
    assert finish(start(run, digits_data, 1, environment=limited)) == [1]
    reason = run.state().reason
    assert "out of memory with 100 images at a time (batch 100 over 1 processes)" in reason
    assert "MiB of the host in use; data.micro_batch_size: 50 makes the same steps" in reason and reason.count("\n") == 0
