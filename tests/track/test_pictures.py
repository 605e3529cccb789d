"""What ``evaluate`` shows in W&B: pictures, tables and figures of the run, by the real client to a server on loopback."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from command_line import typed
from mirrored import at, job, sync
from reported import leave_evaluation, left_behind
from wandb_server import Kept, Server

from hpc_cifar.runs import Run
from hpc_cifar.track import evaluated, wandb_tables
from hpc_cifar.track.evaluated import Prediction

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
    assert all(value["_type"] in ("image-file", "table-file") and value["path"] in kept.files for value in shown.values())
    for name in shown:
        assert sum(name in row for row in kept.history) == 1, f"{name}: once"
    assert 0 < kept.summary["evaluation/test_accuracy"] <= 1 and kept.summary["evaluation/test_f1"] > 0
    assert [row["epoch"] for row in kept.history if "val_loss" in row] == [1, 2, 3, 4, 5]
    run = Run(tmp_path / "mirrored")
    assert_tables(server, kept, run.path / "evaluation" / "test")
    assert not server.unknown


def table(kept: Kept, name: str) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the one table of that name, as they arrived."""
    [where] = [row[name] for row in kept.history if name in row]
    found = json.loads(kept.files[where["path"]])
    assert found["ncols"] == len(found["columns"]) and found["nrows"] == len(found["data"]) if "nrows" in found else True
    return found["columns"], found["data"]


def in_artifact(server: Server, name: str) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the table of that name that the client keeps as an artifact, with its pictures."""
    [body] = [one.files[f"{name}.table.json"] for one in server.artifacts.values() if f"{name}.table.json" in one.files]
    found = json.loads(body)
    return found["columns"], found["data"]


def assert_tables(server: Server, kept: Kept, folder: Path) -> None:
    """The tables in W&B say what ``evaluate`` has written."""
    found = evaluated.read(folder)
    classes = wandb_tables.names(list(found["per_class"]))
    columns, rows = table(kept, "evaluation/test-classes")
    assert columns == ["class", "precision", "recall", "f1", "images"] and [row[0] for row in rows] == classes
    assert [row[2] for row in rows] == pytest.approx([one["recall"] for one in found["per_class"].values()])
    _, cells = table(kept, "evaluation/test-confusion-matrix_table")
    counts = {(actual, predicted): count for actual, predicted, count in cells}
    assert counts == {
        (classes[a], classes[b]): count for a, row in enumerate(found["confusion"]) for b, count in enumerate(row)
    }
    columns, rows = in_artifact(server, "evaluation/test-predictions")  # as W&B shows a table with pictures
    lines = evaluated.predictions(folder, len(classes))
    wrong = [one for one in lines if not one.right]
    assert len(lines) == found["images"] and len(wrong) == round(found["images"] * (1 - found["accuracy"]))
    assert len(rows) == min(len(lines), wandb_tables.MOST_ROWS)
    shown = [dict(zip(columns, row, strict=True)) for row in rows]
    assert [row["right"] for row in shown[: len(wrong) + 1]] == ([False] * len(wrong) + [True])[: len(rows)]
    worst = [one["image"] for one in found["misclassified"]]
    assert worst and {row["image"] for row in shown[: len(worst)]} == set(worst)
    for row in shown:
        assert (row["picture"] is not None) == (row["image"] in worst)
        if row["picture"]:
            path = folder / "mistakes" / f"{worst.index(row['image']):02}.png"
            assert row["picture"]["_type"] == "image-file"
            assert row["picture"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    for row in shown:
        [line] = [one for one in lines if one.image == row["image"]]
        assert (row["class"], row["predicted"]) == (classes[line.label], classes[line.predicted])
        assert (row["confidence"], row["probability of its class"]) == (line.confidence, line.own)


def test_hostile_names_and_many_images(server: Server, tmp_path: Path) -> None:
    long = "x" * 100_000
    classes = ["cat\x1b]0;owned\x07", long + "a", long + "b", f"1 {'x' * 60}"]
    rows = [Prediction(at, at % 4, 0 if at % 3 else at % 4, 0.3 + at / 10_000, 0.2) for at in range(3000)]
    run = left_behind(tmp_path)
    folder = leave_evaluation(run, classes, rows)
    sync(run, server)
    [kept] = server.runs.values()
    columns, data = table(kept, "evaluation/test-predictions")
    assert len(data) == wandb_tables.MOST_ROWS and not any(row[columns.index("right")] for row in data)
    confident = [row[columns.index("confidence")] for row in data]
    assert confident == sorted(confident, reverse=True)
    _, cells = table(kept, "evaluation/test-confusion-matrix_table")
    names = {row[0] for row in cells}
    assert len(names) == 4 and all(name.isprintable() and len(name) < 80 for name in names)
    assert sum(row[2] for row in cells) == len(rows)
    assert not any(b"\x1b" in body or b"\\u001b" in body or long.encode() in body for body in kept.files.values())
    sync(run, server)
    assert sum("evaluation/test-predictions" in row for row in kept.history) == 1, "once"
    evaluated.write_predictions(folder, rows[:10])
    sync(run, server)
    assert sum("evaluation/test-predictions" in row for row in kept.history) == 2, "another evaluation"


@pytest.mark.parametrize(
    "text",
    ["", "image\n", "a,b\n1,2\n", "image,class,predicted,confidence,probability_of_class\n0,9,0,0.5,0.5\n",
     "image,class,predicted,confidence,probability_of_class\n0,0,0,nan,0.5\n",
     "image,class,predicted,confidence,probability_of_class\n0,0,0,0.5\n", "\x00" * 10, '"' * 200_000],
)  # fmt: skip
def test_predictions_that_are_damaged_are_left_out(tmp_path: Path, text: str) -> None:
    (tmp_path / "predictions.csv").write_text(text)
    assert evaluated.predictions(tmp_path, 2) == []


def test_what_is_no_file_of_predictions_is_left_out(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "predictions.csv")
    assert evaluated.predictions(tmp_path, 2) == [] == evaluated.predictions(tmp_path / "none", 2)
    assert wandb_tables.files_of(tmp_path) == []
