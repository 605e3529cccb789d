"""Schedules, the average, the metrics file: small parts of the trainer."""

from __future__ import annotations

import json
import math
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import nn

from hpc_cifar.config.optimization import EarlyStopping, ScheduleConfig
from hpc_cifar.data.store import Arrays
from hpc_cifar.track.metrics import MetricsLog
from hpc_cifar.track.rows import improvements, is_better, selected
from hpc_cifar.train.optim import EMA
from hpc_cifar.train.schedule import factor, stopped_early
from hpc_cifar.train.setup import Prepared, some_images
from hpc_cifar.train.step import seed_device, seed_of_step

WITH_L2 = {"family": "sequential", "layers": ["flatten", {"dense": {"units": 10, "l2": 1e-3}}]}


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
            {"name": "linear", "warmup_epochs": 0.5, "final_factor": 0.1},
            {"name": "one_cycle", "peak": 0.3},
            {"name": "one_cycle", "peak": 0.01, "initial_factor": 0.5, "final_factor": 0.2},
            {"name": "step", "epochs": [1, 3]},
            {"name": "exponential", "factor": 0.9, "every_step": True},
            {"name": "triangular", "period_epochs": 1.5, "decay": 0.8},
            {"name": "plateau"},
            {"name": "inverse_time", "decay": 0.01},
        ]
    ),
    st.integers(1, 50),
    st.integers(1, 20),
)
def test_every_factor_is_between_zero_and_one(values: dict[str, Any], per_epoch: int, epochs: int) -> None:
    config, total = schedule(**values), per_epoch * epochs
    found = [factor(config, step, per_epoch, total) for step in range(total)]
    assert all(0 < value <= 1 for value in found)


def test_linear_falls_by_the_same_every_step() -> None:
    values = [factor(schedule(name="linear", final_factor=0.2), step, 5, 10) for step in range(10)]
    assert values == pytest.approx([1 - 0.08 * step for step in range(10)])
    warmed = [factor(schedule(name="linear", warmup_epochs=1), step, 5, 10) for step in range(10)]
    assert warmed == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_one_cycle_rises_then_falls() -> None:
    values = [factor(schedule(name="one_cycle", peak=0.25), step, 25, 100) for step in range(100)]
    top = values.index(max(values))
    assert 23 <= top <= 25
    assert values[:top] == sorted(values[:top]) and values[top:] == sorted(values[top:], reverse=True)


def test_stages_hold_from_the_start_of_their_epochs() -> None:
    stages = schedule(name="staged", stages=[{"epoch": 2, "lr": 0.0012}, {"epoch": 4, "lr": 0.003}])
    values = [factor(stages, step, 2, 8, lr=0.0015) * 0.0015 for step in range(8)]
    assert values == pytest.approx([0.0015] * 2 + [0.0012] * 4 + [0.003] * 2)


def test_exponential_falls_with_every_epoch_or_step() -> None:
    steps = range(6)
    assert [factor(schedule(name="exponential", factor=0.5), step, 2, 6) for step in steps] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    smooth = [factor(schedule(name="exponential", factor=0.25, every_step=True), step, 2, 6) for step in steps]
    assert smooth == pytest.approx([1, 0.5, 0.25, 0.125, 0.0625, 0.03125])


def test_inverse_time_is_the_decay_of_keras() -> None:
    values = [factor(schedule(name="inverse_time", decay=0.5), step, 2, 6) for step in range(4)]
    assert values == pytest.approx([1, 1 / 1.5, 1 / 2, 1 / 2.5])


def test_triangles() -> None:
    made = schedule(name="triangular", period_epochs=2, initial_factor=0.2, decay=0.5)
    values = [factor(made, step, 2, 8) for step in range(9)]
    assert values == pytest.approx([0.2, 0.6, 1.0, 0.6, 0.2, 0.4, 0.6, 0.4, 0.2])


def history(losses: list[float]) -> list[dict[str, float]]:
    return [{"val_loss": loss, "val_accuracy": -loss} for loss in losses]


LOSSES = st.lists(st.integers(0, 12).map(lambda value: value / 4), max_size=40)


@settings(deadline=None)
@given(LOSSES, st.integers(1, 4), st.sampled_from([0.0, 0.3]), st.sampled_from(["val_loss", "val_accuracy"]))
def test_plateau_is_the_one_of_torch(losses: list[float], patience: int, min_delta: float, monitor: str) -> None:
    """torch lowers the rate one epoch later than Keras, whose count is ours, for the same patience."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=patience - 1, threshold=min_delta, threshold_mode="abs", min_lr=0.01, eps=0.0
    )
    ours = schedule(name="plateau", factor=0.5, patience=patience, min_delta=min_delta, min_lr=0.01, monitor=monitor)
    for number, loss in enumerate(losses, 1):
        theirs.step(loss)
        rate = 0.1 * factor(ours, number, 1, 100, lr=0.1, history=history(losses[:number]))
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("warmup", [0, 1])
def test_a_plateau_never_raises_the_rate_to_its_least(warmup: int) -> None:
    ours = schedule(name="plateau", factor=0.5, patience=1, min_lr=0.5, warmup_epochs=warmup)
    for lr, expected in ((0.1, [1, 1]), (0.8, [0.625, 0.625]), (2.0, [0.5, 0.25])):
        rates = [factor(ours, number, 1, 100, lr=lr, history=history([1.0] * number)) for number in range(2, 4)]
        assert rates == pytest.approx(expected)


@pytest.mark.parametrize("monitor", ["val_loss", "val_accuracy", "val_loss_with_l2"])
def test_a_figure_that_is_not_finite_is_never_the_best(monitor: str) -> None:
    sign = -1.0 if monitor == "val_accuracy" else 1.0
    figures = [math.nan, math.inf, -math.inf, 2.0, math.nan, 1.0, -sign * math.inf, 1.5]
    rows = [{monitor: sign * value, "epoch": number} for number, value in enumerate(figures, 1)]
    assert list(improvements(rows, monitor)) == [number in (4, 6) for number in range(1, 9)]
    config = ranks.experiment(checkpoint={"select": "best", "monitor": monitor}, model=WITH_L2)
    assert selected(config, rows)["epoch"] == 6
    assert is_better(1.0, math.nan, monitor), "a checkpoint of before may hold one"
    stopping = EarlyStopping(patience=3, monitor=monitor)
    assert stopped_early(stopping, rows[:3]) and not stopped_early(stopping, rows[3:7])


def test_the_best_epoch_is_the_one_that_early_stopping_saw() -> None:
    rows = [{"val_loss": loss, "epoch": number} for number, loss in enumerate([3.0, 2.0, 1.9, 1.4, 1.3], 1)]
    for monitor, epoch in (("val_loss", 4), ("val_accuracy", 5)):  # it counts for the figure that stopping watches
        stopping = {"monitor": monitor, "patience": 3, "min_delta": 0.5}
        config = ranks.experiment(checkpoint={"select": "best", "monitor": "val_loss"}, training={"early_stopping": stopping})
        assert selected(config, rows)["epoch"] == epoch


def test_a_plateau_cools_down() -> None:
    ours = schedule(name="plateau", factor=0.5, patience=1, cooldown=2)
    rates = [factor(ours, n, 1, 100, history=history([1.0] * n)) for n in range(8)]
    assert rates == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]  # the epoch in which it ends counts again, as in Keras


def test_early_stopping_waits_for_better_epochs() -> None:
    three = EarlyStopping(patience=3)
    assert not stopped_early(None, history([1.0] * 50))
    assert not stopped_early(three, history([3, 2, 2, 2]))
    assert stopped_early(three, history([3, 2, 2, 2, 2]))
    assert stopped_early(three, history([3, 2, 2, 2, 2, 1])), "it has ended then, whatever follows"
    assert not stopped_early(three, [*history([3, 2, 2, 2]), {"train_loss": 1.0}]), (
        "epochs that were not evaluated do not count"
    )
    assert stopped_early(EarlyStopping(patience=2, min_delta=0.5), history([3, 2.8, 2.6]))
    assert stopped_early(EarlyStopping(patience=1, monitor="val_accuracy"), [{"val_accuracy": 0.5}, {"val_accuracy": 0.5}])


@pytest.mark.parametrize("on_device", [False, True])
def test_average_swaps_and_restores(on_device: bool) -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    average = EMA([parameter], 0.9, on_device)

    def update() -> None:
        average.prepare()
        average.apply()

    with torch.no_grad():
        parameter.fill_(2.0)
    update()
    assert float(average.shadow[0]) == 2.0  # the first update copies
    with torch.no_grad():
        parameter.fill_(3.0)
    update()
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


def test_seeding_a_device_is_torch_s() -> None:
    torch.manual_seed(123)
    expected = torch.rand(3)
    seed_device(123, torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)


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


def test_steps_that_were_lost_are_counted_once(tmp_path: Path) -> None:
    """An event of an earlier segment stays in the file, at a step that a later one has not reached yet."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write("event", epoch=0, step=0, event="started")
    log.write("step", epoch=1, step=9)
    log.write("event", epoch=1, step=10, event="went back")
    log.close()
    assert MetricsLog(path, 5).reached == 10
    log = MetricsLog(path, 5)
    log.write("event", epoch=1, step=5, event="started")
    log.write("step", epoch=1, step=7)
    log.close()
    assert MetricsLog(path, 7).reached == 7


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


def test_whitening_looks_at_all_classes() -> None:
    """A store of class folders lies class by class."""
    images = np.repeat(np.arange(10, dtype=np.uint8) * 25, 50)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    arrays = Arrays(images, np.repeat(np.arange(10), 50), np.zeros((500, 2, 3), np.int64))
    store: Any = types.SimpleNamespace(train=arrays)
    prepared = Prepared(store, np.arange(500), np.arange(0), np.zeros(3), np.ones(3))
    found = (some_images(prepared, 20)[:, 0, 0, 0] * 255 / 25).round().int()
    assert found.tolist() == [label for label in range(10) for _ in range(2)]
