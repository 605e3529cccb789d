"""Damaged lines of metrics.jsonl: a report says so, and its figures stay those of the epoch that the run selected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import ranks

from hpc_cifar import files, owner
from hpc_cifar.report.facts import gather
from hpc_cifar.runs import Run
from hpc_cifar.train import checkpoint, loop


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, digits_data: Path) -> Run:
    """Four epochs, of which the third is the best one by what the rows and checkpoints say."""
    run = ranks.new_run(tmp_path_factory.mktemp("runs"), ranks.experiment(epochs=4, checkpoint={"select": "best"}))
    loop.train(run, data_root=digits_data, console=False)
    return run


@pytest.fixture
def run(finished: Run, tmp_path: Path) -> Run:
    shutil.copytree(finished.path, tmp_path / finished.id, symlinks=True)
    return Run(tmp_path / finished.id)


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics_file.read_text().splitlines()]


def write(run: Run, rows: list[Any]) -> None:
    run.metrics_file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def best_epoch(run: Run) -> int:
    found = checkpoint.named(run.checkpoints, "best")
    assert found is not None
    return int(found.manifest["epoch"])


def damage(run: Run, how: str) -> None:
    """Of the best epoch's row."""
    rows: list[Any] = lines(run)
    place = next(i for i, row in enumerate(rows) if row["kind"] == "epoch" and row["epoch"] == best_epoch(run))
    row = rows[place]
    rows[place] = {
        "torn": json.dumps(row)[:-20],
        "noise": "\x00\x01",
        "another type": [1, 2],
        "NaN": json.dumps(row).replace(str(row["val_accuracy"]), "NaN"),
        "a word": {**row, "val_accuracy": "0.99"},
        "too good": {**row, "val_accuracy": 0.999},
        "too bad": {**row, "val_accuracy": 0.001},
        "deep": "[" * 100_000,
        "no step": {key: value for key, value in row.items() if key != "step"},
        "joined": json.dumps(row) + json.dumps(row),
    }.get(how, row)
    if how == "gone":
        del rows[place]
    if how == "twice":
        rows.insert(place, row)
    if how == "cut":
        del rows[place:]
    write(run, rows)


HOW = (
    "torn",
    "noise",
    "another type",
    "NaN",
    "a word",
    "too good",
    "too bad",
    "deep",
    "no step",
    "joined",
    "gone",
    "twice",
    "cut",
)


@pytest.mark.parametrize("how", HOW)
def test_damage_is_told_and_changes_no_figure(run: Run, how: str) -> None:
    before = gather(run)
    assert before.warnings == ()
    damage(run, how)
    after = gather(run)
    [warning] = after.warnings
    assert "metrics.jsonl" in warning and "verified checkpoint" in warning
    assert after.figures == before.figures
    assert [(row["epoch"], row["val_accuracy"]) for row in after.epochs] == [
        (row["epoch"], row["val_accuracy"]) for row in before.epochs
    ]


def test_without_checkpoints_it_is_told_that_figures_may_be_others(run: Run) -> None:
    damage(run, "torn")
    shutil.rmtree(run.checkpoints)
    [warning] = gather(run).warnings
    assert "1 damaged line, and no checkpoint says what is missing: its figures may be those of another epoch" in warning


def test_a_checkpoint_that_is_damaged_too_is_no_witness(run: Run) -> None:
    for saved in checkpoint.stored(run.checkpoints):
        (saved.folder / "state.pt").write_bytes(b"x")
    damage(run, "torn")
    [warning] = gather(run).warnings
    assert "its checkpoints cannot be read" in warning and "figures may be wrong" in warning


def test_the_newest_checkpoint_without_a_manifest_leaves_the_word_to_the_one_before(run: Run) -> None:
    write(run, [row for row in lines(run) if row["kind"] != "epoch"])
    newest = checkpoint.stored(run.checkpoints)[0].folder
    (newest / "manifest.json").unlink()
    [warning] = gather(run).warnings
    assert "metrics.jsonl does not have the epochs 1 to 3 that the checkpoint of step" in warning


def test_the_checkpoint_of_another_user_is_not_unpickled(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(run, "torn")
    monkeypatch.setattr(owner, "uid", lambda: 12345)
    monkeypatch.setattr(checkpoint, "read", lambda _: pytest.fail("it was read"))
    assert "another user's" in gather(run).warnings[0]


def test_a_report_names_fields_that_were_edited_since(run: Run) -> None:
    text = run.experiment_file.read_text()
    run.experiment_file.write_text(text.replace("seed: 7", "seed: 8"))
    assert "experiment.yaml was changed since its last checkpoint was made: seed: 7 -> 8" in gather(run).warnings


def test_a_run_that_trains_on_has_its_epochs_again(run: Run, digits_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a resumed run leaves out of the file would be missing for ever."""
    before = [row["val_accuracy"] for row in gather(run).epochs]
    damage(run, "torn")
    run.result_file.unlink()
    loop.train(run, data_root=digits_data, console=True)
    assert "1 damaged line of metrics.jsonl" in capsys.readouterr().out
    after = gather(run)
    assert after.warnings == () and [row["val_accuracy"] for row in after.epochs] == before
    kinds = [(row["kind"], row["step"]) for row in files.read_json_lines(run.metrics_file) if row["kind"] == "epoch"]
    assert kinds == sorted(kinds)
