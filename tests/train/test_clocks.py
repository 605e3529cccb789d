"""A clock that is set by a day in mid-run: what a run took, when it started and where it is stay what they are."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

import pytest
import ranks

from hpc_cifar import files, records
from hpc_cifar.cli.console import duration
from hpc_cifar.launch import remaining, status, submission
from hpc_cifar.launch.slurm import JobState
from hpc_cifar.plan import Plan
from hpc_cifar.report.facts import gather
from hpc_cifar.runs import Run
from hpc_cifar.train import loop

DAY = 86_400.0
REAL = time.time


class Clock:
    """That of the machine, which somebody sets."""

    offset = 0.0

    def __call__(self) -> float:
        return REAL() + self.offset


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "time", made)
    real = datetime.datetime

    class Datetime(real):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return real.fromtimestamp(made(), tz)

    monkeypatch.setattr("hpc_cifar.runs.datetime.datetime", Datetime)
    return made


@pytest.mark.parametrize("days", [-1, 1])
def test_a_run_takes_as_long_as_it_takes(tmp_path: Path, digits_data: Path, clock: Clock, days: int) -> None:
    run = ranks.new_run(tmp_path, ranks.experiment(epochs=3))
    started: list[Any] = []

    def set_clock(row: dict[str, Any]) -> bool:
        started.append(run.state().started)
        time.sleep(1.1)  # times are told in whole seconds
        clock.offset = days * DAY
        return False

    began = time.monotonic()
    loop.train(run, data_root=digits_data, console=False, gives_up=set_clock)
    took = time.monotonic() - began
    result, state = files.read_object(run.result_file), run.state()
    assert 3.3 < result["seconds"] <= took and 3.3 < state.seconds <= took
    assert {*started, state.started} == {started[0]}
    [segment] = gather(run).segments
    assert 3.3 < segment.ended - segment.begun <= took
    times = [row["time"] for row in files.read_json_lines(run.metrics_file)]
    assert times == sorted(times)


def test_gpu_hours_and_seconds_of_before_are_never_negative(tmp_path: Path, digits_data: Path) -> None:
    run = ranks.new_run(tmp_path, ranks.experiment())
    run.update_state(state="stopped", seconds=-DAY, gpu_hours=-24.0, restarts=0)
    assert not {"seconds", "gpu_hours"} & gather(run).cost.keys()
    loop.train(run, data_root=digits_data, console=False)
    result = files.read_object(run.result_file)
    assert 0 < result["seconds"] < DAY and result["gpu_hours"] == 0
    assert duration(-86_366.0) == "-"


@pytest.mark.parametrize("days", [-1, 1])
def test_a_dead_run_is_not_young_since_the_clock_was_set(tmp_path: Path, clock: Clock, days: int) -> None:
    run = ranks.new_run(tmp_path, ranks.experiment())
    run.add_job(executor="local", job_id="1")
    run.update_state(state="running", step=1)
    assert status.status(run).state == "running", "it was written just now, so its process may just be starting"
    clock.offset = days * DAY
    seen = status.status(run)
    assert (seen.state, seen.reason) == ("failed", status.VANISHED)


@pytest.mark.parametrize("days", [-1, 0, 1])
def test_the_budget_left_survives_a_clock_that_is_set(clock: Clock, days: int) -> None:
    start = datetime.datetime.fromtimestamp(REAL() - 1800, datetime.UTC).isoformat()
    plan = {"gpu_hours": 8.0, "time_s": 7200, "placement": {"nodes": 1, "gpus_per_node": 4}}
    clock.offset = days * DAY
    left = remaining.hours_left(records.of(Plan, plan), 1.9, JobState("RUNNING", start=start))
    assert left == pytest.approx(6.1 if days else 6.0, abs=0.01)


def test_a_submission_of_another_host_is_not_in_progress_for_a_day(tmp_path: Path, clock: Clock) -> None:
    run = Run(tmp_path)
    submission.begin(run, "mark", {})
    about = files.read_json(run.path / submission.FILE)
    files.write_json(run.path / submission.FILE, {**about, "process": {**about["process"], "host": "elsewhere"}})
    opened = submission.read(run)
    assert opened is not None and opened.in_progress
    clock.offset = -DAY
    opened = submission.read(run)
    assert opened is not None and not opened.in_progress
