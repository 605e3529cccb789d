"""Checkpoints that are written beside the training."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_cifar.config.training import Checkpoint
from hpc_cifar.errors import CheckpointError
from hpc_cifar.train import checkpoint, saver
from hpc_cifar.train.saver import Saver, copy_of

CPU = torch.device("cpu")


def state(value: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((1000,), value)}, "optimizer": {"state": [(torch.ones(2), 3)]}, "ema": None}


def test_it_returns_before_the_disk_has_it_and_what_follows_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = checkpoint.save

    may_write = {1: threading.Event(), 2: threading.Event()}

    def slow(*arguments: Any, step: int, **options: Any) -> Path:
        assert may_write[step].wait(60)
        return written(*arguments, step=step, **options)

    monkeypatch.setattr(saver.checkpoint, "save", slow)
    made = Saver(tmp_path, Checkpoint(), CPU)
    made.save(state(1.0), step=1, epoch=0)
    assert not checkpoint.stored(tmp_path)
    threading.Timer(0.2, may_write[1].set).start()
    made.save(state(2.0), step=2, epoch=0)
    assert may_write[1].is_set() and [one.step for one in checkpoint.stored(tmp_path)] == [1]
    may_write[2].set()
    made.wait()
    assert [one.step for one in checkpoint.stored(tmp_path)] == [2, 1]


def test_a_disk_that_refuses_is_told_at_the_next_step(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be\n")
    made = Saver(tmp_path / "checkpoints", Checkpoint(), CPU)
    made.check()
    made.save(state(1.0), step=1, epoch=0)
    with pytest.raises(CheckpointError, match="cannot save the checkpoint"):
        for _ in range(200):
            made.check()
            time.sleep(0.05)
    made.check()  # told once
    made.save(state(1.0), step=2, epoch=0)
    assert "cannot save the checkpoint" in made.settle() and not made.settle()


def test_a_copy_has_nothing_of_what_changes_afterwards() -> None:
    live = state(1.0)
    copied = copy_of(live)
    live["model"]["w"].add_(1)
    live["optimizer"]["state"][0][0].add_(1)
    assert copied["model"]["w"][0] == 1 and copied["optimizer"]["state"][0][0][0] == 1 and copied["ema"] is None


def test_the_ends_of_every_so_many_epochs_stay(tmp_path: Path) -> None:
    made = Saver(tmp_path, Checkpoint(keep_last=1, keep_every_epochs=2), CPU)
    for epoch in range(1, 8):
        for batch in (1, 2):  # the second one ends the epoch
            made.save(state(1.0), step=2 * epoch + batch - 2, epoch=epoch - (batch == 1), whole_epoch=batch == 2)
    made.wait()
    assert [one.step for one in checkpoint.stored(tmp_path)] == [14, 12, 8, 4], "epochs 7 (the last), 6, 4 and 2"
