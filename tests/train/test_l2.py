"""The L2 of layers in the validation loss that Keras reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks

from hpc_cifar import files
from hpc_cifar.train import checkpoint

pytestmark = pytest.mark.slow

PLAIN: dict[str, Any] = {"data": {"augment": {"padding_mode": "zero", "cutout": 0}}, "training": {"precision": "float32"}}


@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_validation_loss_with_l2_is_that_of_keras(tmp_path: Path, digits_data: Path, decay: float | None) -> None:
    """The loss plus l2 times the sum of squares of the weights that were validated, on any number of ranks."""
    layers = ["flatten", {"dense": {"units": 10, "l2": 0.02}}]
    changes: dict[str, Any] = {
        "model": {"layers": layers},
        "training": {"ema_decay": decay, "early_stopping": {"monitor": "val_loss_with_l2", "patience": 2}},
        "checkpoint": {"select": "best", "monitor": "val_loss_with_l2", "keep_last": 9},
    }
    config = ranks.experiment(**ranks.merge(PLAIN, changes))
    run = ranks.new_run(tmp_path, config)
    ranks.complete(run, digits_data, 2)
    rows = [row for row in files.read_json_lines(run.metrics_file) if row["kind"] == "epoch"]
    assert len(rows) == 2
    for row in rows:
        saved = checkpoint.named(run.checkpoints, f"step-{row['step']:08d}")
        assert saved is not None
        state = checkpoint.read(saved)
        weight = state["ema"]["shadow"][0] if decay else state["model"]["1.weight"]
        penalty = 0.02 * weight.double().square().sum().item()
        assert penalty > 0.01
        assert row["val_loss_with_l2"] == pytest.approx(row["val_loss"] + penalty, rel=1e-6)
