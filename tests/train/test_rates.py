"""Rates count the images that were trained, however small the last batch is; what is told of a run follows from them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import ranks
from pipelines import NAMES

from hpc_cifar import files
from hpc_cifar.data import choice
from hpc_cifar.launch.status import status
from hpc_cifar.runs import Run
from hpc_cifar.train import loop, step

SECONDS = 2.0  # of every window, by a clock of our own
BATCH, IMAGES = 107, 1294  # twelve whole batches, and one of 10 images
STEPS = math.ceil(IMAGES / BATCH)
FIELDS: dict[str, Any] = {"data": {"batch_size": BATCH, "validation": 0.1, "train_images": IMAGES}}


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step.Mark, "seconds_since", lambda self, earlier: SECONDS)


def images_of(row: dict[str, Any], before: int) -> int:
    """Images of the steps after ``before`` up to that of the row."""
    return sum(IMAGES - (STEPS - 1) * BATCH if number % STEPS == 0 else BATCH for number in range(before + 1, row["step"] + 1))


def check(run: Run) -> list[dict[str, Any]]:
    rows = [row for row in files.read_json_lines(run.metrics_file) if row["kind"] == "step"]
    for before, row in zip([0, *(row["step"] for row in rows)], rows, strict=False):
        assert row["images_per_second"] == round(images_of(row, before) / SECONDS, 1), f"step {row['step']}"
    return rows


@pytest.mark.parametrize("pipeline", NAMES)
def test_a_small_last_batch_counts_as_what_it_has(tmp_path: Path, digits_data: Path, pipeline: str) -> None:
    if why := choice.problem(pipeline):
        pytest.skip(why)
    config = ranks.experiment(**ranks.merge(FIELDS, {"training": {"log_every_steps": 6}, "data": {"pipeline": pipeline}}))
    run = ranks.new_run(tmp_path, config)
    loop.train(run, data_root=digits_data, console=False)
    rows = check(run)
    assert [row["step"] for row in rows] == [6, 12, 13, 19, 25, 26], "the windows of a small last batch are there"
    rate = run.state().images_per_second
    assert rate == round((6 * BATCH + 10) / (2 * SECONDS), 1), "a few images alone say nothing of those to come"


def test_after_a_resume_within_an_epoch_only_the_new_steps_count(tmp_path: Path, digits_data: Path) -> None:
    every = {"checkpoint": {"every_steps": 4}, "training": {"log_every_steps": 5}}
    run = ranks.new_run(tmp_path, ranks.experiment(**ranks.merge(FIELDS, every)))
    loop.train(run, max_steps=7, data_root=digits_data, console=False)
    loop.train(run, max_steps=15, data_root=digits_data, console=False)
    loop.train(run, data_root=digits_data, console=False)
    check(run)


def test_a_step_that_is_left_out_trains_no_image(tmp_path: Path, digits_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ranks.new_run(tmp_path, ranks.experiment(**ranks.merge(FIELDS, {"epochs": 1, "training": {"log_every_steps": 50}})))
    files.write_json(run.path / "left-out.json", {"steps": [1, 2, STEPS], "times": 1})
    monkeypatch.setattr("hpc_cifar.train.trainer.time.perf_counter", iter(range(10**6)).__next__)
    loop.train(run, data_root=digits_data, console=False)
    [row] = [row for row in files.read_json_lines(run.metrics_file) if row["kind"] == "step"]
    assert row["images_per_second"] == (STEPS - 3) * BATCH / SECONDS
    [epoch] = [row for row in files.read_json_lines(run.metrics_file) if row["kind"] == "epoch"]
    seconds = (STEPS - 3) * BATCH / epoch["images_per_second"]
    assert seconds == pytest.approx(round(seconds), abs=0.01), "whole seconds by this clock"


@pytest.mark.parametrize(
    ("at", "left"), [(0, 3 * IMAGES), (1, 3 * IMAGES - BATCH), (STEPS, 2 * IMAGES), (3 * STEPS - 1, 10), (3 * STEPS, 0)]
)
def test_the_time_left_is_that_of_the_images_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, left: int) -> None:
    run = ranks.new_run(tmp_path, ranks.experiment(epochs=3))
    plan = {"batch_size": BATCH, "train_images": IMAGES, "steps_per_epoch": STEPS, "total_steps": 3 * STEPS}
    files.write_json(run.path / "plan.json", plan)
    run.update_state(state="running", step=at, total_steps=3 * STEPS, epochs=3, images_per_second=10.0)
    monkeypatch.setattr("hpc_cifar.launch.status._alive", lambda *_: True)
    assert status(run).eta_s == left / 10
