"""What ``evaluate`` shows in W&B: pictures and figures of the run, by the real client to a server on loopback."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import typed
from mirrored import at, job
from wandb_server import Server

pytestmark = [pytest.mark.component("wandb"), pytest.mark.slow]


def test_an_evaluation_is_shown_in_the_run_of_the_training(server: Server, tmp_path: Path, digits_data: Path) -> None:
    environment = at(server, tmp_path, digits_data)
    for command in (
        ["train", str(job(tmp_path)), "--name", "mirrored", "--set", "epochs=5"],
        ["evaluate", "mirrored", "--feature-maps"],
        ["evaluate", "mirrored", "--feature-maps"],  # the same pictures once more
    ):
        done = typed(command, environment, tmp_path, timeout_s=400)
        assert done.returncode == 0, done.stdout + done.stderr
    [kept] = server.runs.values()
    shown = {name: value for row in kept.history for name, value in row.items() if name.startswith("evaluation/")}
    assert {"evaluation/training-batch", "evaluation/test-confusion", "evaluation/test-misclassified"} <= shown.keys()
    assert any(name.startswith("evaluation/test-maps-") for name in shown), "feature maps"
    assert all(value["_type"] == "image-file" and value["path"] in kept.files for value in shown.values())
    for name in shown:
        assert sum(name in row for row in kept.history) == 1, f"{name}: once"
    assert 0 < kept.summary["evaluation/test_accuracy"] <= 1 and kept.summary["evaluation/test_f1"] > 0
    assert [row["epoch"] for row in kept.history if "val_loss" in row] == [1, 2, 3, 4, 5]
