"""Schedules, the average, the metrics file: small parts of the trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import nn

from hpc_cifar.config.experiment import ScheduleConfig
from hpc_cifar.track.metrics import MetricsLog
from hpc_cifar.train.optim import EMA
from hpc_cifar.train.schedule import factor
from hpc_cifar.train.step import seed_of_step


def schedule(**values: Any) -> Any:
    return TypeAdapter(ScheduleConfig).validate_python(values)


def test_constant_with_warmup() -> None:
    values = [factor(schedule(name="constant", warmup_epochs=1), step, 4, 12) for step in range(12)]
    assert values == [0.25, 0.5, 0.75, 1.0] + [1.0] * 8


def test_cosine_falls_from_one_to_its_end() -> None:
    values = [factor(schedule(name="cosine", final_factor=0.1), step, 10, 100) for step in range(100)]
    assert values[0] == 1.0 and values == sorted(values, reverse=True)
    assert values[50] == pytest.approx(0.55) and 0.1 < values[-1] < 0.102


def test_step_drops_at_the_start_of_an_epoch() -> None:
    values = [factor(schedule(name="step", epochs=[2, 4], factor=0.5), step, 3, 12) for step in range(12)]
    assert values == [1.0] * 3 + [0.5] * 6 + [0.25] * 3


@settings(deadline=None)
@given(
    st.sampled_from(
        [
            {"name": "constant", "warmup_epochs": 2.5},
            {"name": "cosine", "warmup_epochs": 1},
            {"name": "one_cycle", "peak": 0.3},
            {"name": "one_cycle", "peak": 0.01, "initial_factor": 0.5, "final_factor": 0.2},
            {"name": "step", "epochs": [1, 3]},
        ]
    ),
    st.integers(1, 50),
    st.integers(1, 20),
)
def test_every_factor_is_between_zero_and_one(values: dict[str, Any], per_epoch: int, epochs: int) -> None:
    config, total = schedule(**values), per_epoch * epochs
    found = [factor(config, step, per_epoch, total) for step in range(total)]
    assert all(0 < value <= 1 for value in found)


def test_one_cycle_rises_then_falls() -> None:
    values = [factor(schedule(name="one_cycle", peak=0.25), step, 25, 100) for step in range(100)]
    top = values.index(max(values))
    assert 23 <= top <= 25
    assert values[:top] == sorted(values[:top]) and values[top:] == sorted(values[top:], reverse=True)


def test_average_swaps_and_restores() -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    average = EMA([parameter], 0.9)
    with torch.no_grad():
        parameter.fill_(2.0)
    average.update()
    assert float(average.shadow[0]) == 2.0  # the first update copies
    with torch.no_grad():
        parameter.fill_(3.0)
    average.update()
    with torch.no_grad():
        parameter.fill_(2.0)
    assert 2.0 < float(average.shadow[0]) < 3.0
    value = float(average.shadow[0])
    average.swap()
    assert float(parameter) == value and float(average.shadow[0]) == 2.0
    average.swap()
    assert float(parameter) == 2.0


def test_seeds_of_steps_differ_by_step_rank_and_seed() -> None:
    seeds = {seed_of_step(seed, step, rank) for seed in range(5) for step in range(40) for rank in range(8)}
    assert len(seeds) == 5 * 40 * 8 and all(0 <= seed < 2**63 for seed in seeds)


def test_metrics_drop_what_will_be_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (1, 2, 3):
        log.write("step", epoch=1, step=step, train_loss=float("nan") if step == 2 else 0.5)
    log.write("event", epoch=1, step=3, event="stopped")
    log.close()
    with path.open("a") as stream:
        stream.write('{"kind": "step", "ep')  # a torn line
    MetricsLog(path, resume_step=2).close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["kind"], row["step"]) for row in rows] == [("step", 1), ("step", 2), ("event", 3)]
    assert rows[1]["train_loss"] is None


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400))
def test_damaged_metrics_never_stop_a_resume(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "step", "epoch": 1, "step": 1}\n' + content)
    log = MetricsLog(path, resume_step=1)
    log.write("step", epoch=1, step=2)
    log.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0]["step"] == 1 and rows[-1]["step"] == 2
