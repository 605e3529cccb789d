"""How a step is computed changes nothing but the speed: eager, compiled, and as a graph (on a CPU: its eager twin)."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

from hpc_cifar import files
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.runs import Run
from hpc_cifar.train import setup
from hpc_cifar.train.graph import WARM_UP, Graphs

pytestmark = pytest.mark.slow
# rounding grows from step to step, so it must be small from the start
EXACT = {"data": {"batch_size": 64}, "optimizer": {"lr": 0.02}, "training": {"precision": "float64", "batch_norm": "global"}}


def trained(folder: Path, data: Path, world: int = 1, **training: Any) -> tuple[Run, dict[str, Any]]:
    values = ranks.experiment(**ranks.merge(EXACT, {"epochs": 10, "training": training})).model_dump()
    values["model"]["layers"] = [layer for layer in values["model"]["layers"] if layer["type"] != "dropout"]
    run = ranks.new_run(folder, Experiment.model_validate(values))
    return run, ranks.complete(run, data, world)


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory, digits_data: Path) -> Run:
    return trained(tmp_path_factory.mktemp("eager"), digits_data, compile=False, graph=False)[0]


def validations(run: Run) -> list[float]:
    return [row["val_loss"] for row in files.read_json_lines(run.metrics_file) if row["kind"] == "epoch"]


@pytest.mark.parametrize(
    ("world", "training"),
    [(1, {"graph": True}), (2, {"graph": True}), (1, {"compile": True, "batch_norm": "local"})],
    ids=["graph", "ranks", "compile"],
)
def test_200_steps_are_those_of_the_eager_mode(
    world: int, training: dict[str, Any], eager: Run, tmp_path: Path, digits_data: Path
) -> None:
    """Tail batches, momentum, average, schedule, validation; no dropout, for which the compiler draws by its own rule."""
    run, result = trained(tmp_path, digits_data, world, **training)
    found, expected = ranks.losses(run), ranks.losses(eager)
    assert len(found) == len(expected) >= 200
    assert found == pytest.approx(expected, rel=1e-5)
    assert validations(run) == pytest.approx(validations(eager), rel=1e-5)
    assert result["test_accuracy"] > 0.8


SGD = {"name": "sgd", "lr": 0.02, "momentum": 0.9}
LOOKAHEAD = SGD | {"lookahead": {"steps": 5, "alpha": 0.5}}


MUON = {"name": "muon", "lr": 0.02, "other": "sgd", "other_lr": 0.02, "last_layer_lr": 0.05, "normalize_weights": True}
OPTIMIZERS = {"sgd": SGD, "lookahead": LOOKAHEAD, "adam": {"name": "adam", "lr": 0.002}, "muon": MUON}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_graph_is_resumed_bit_for_bit(tmp_path: Path, digits_data: Path, optimizer: dict[str, Any]) -> None:
    values = ranks.experiment(training={"graph": True}, checkpoint={"every_steps": 3}, epochs=3).model_dump()
    values["optimizer"] = optimizer
    config = Experiment.model_validate(values)
    undisturbed = ranks.new_run(tmp_path, config)
    expected = ranks.complete(undisturbed, digits_data, 1)
    run = ranks.new_run(tmp_path, config)
    for step in (7, 20):
        processes = ranks.start(run, digits_data, 1)
        ranks.wait_for_step(run, step, processes)
        ranks.kill_all(processes)
    result = ranks.complete(run, digits_data, 1)
    assert ranks.losses(run) == ranks.losses(undisturbed)
    assert result["test_loss"] == expected["test_loss"]


def test_300_epochs_in_graph_mode_preempted_twice_end_where_undisturbed_ones_end(tmp_path: Path, digits_data: Path) -> None:
    changes = {
        "epochs": 300,
        "data": {"batch_size": 664},
        "training": {"graph": True, "evaluate_every_epochs": 50},
        "checkpoint": {"every_epochs": 50},
    }
    config = ranks.experiment(**changes)
    undisturbed = ranks.new_run(tmp_path, config)
    expected = ranks.complete(undisturbed, digits_data, 1)
    assert expected["epochs"] == 300
    run = ranks.new_run(tmp_path, config)
    for step in (137, 411):
        processes = ranks.start(run, digits_data, 1)
        ranks.wait_for_step(run, step, processes)
        processes[0].send_signal(signal.SIGUSR2)
        assert ranks.finish(processes) == [0], ranks.logs(run)
        assert step <= run.state().step < 600, "stopped on the way"
    result = ranks.complete(run, digits_data, 1)
    assert (result["epochs"], result["restarts"], result["lost_steps"]) == (300, 2, 0)
    assert ranks.losses(run) == ranks.losses(undisturbed)
    assert (result["test_loss"], result["test_accuracy"]) == (expected["test_loss"], expected["test_accuracy"])


def test_a_graph_takes_up_a_checkpoint_of_the_eager_mode(tmp_path: Path, digits_data: Path) -> None:
    """And the other way round: its checkpoint says nothing of how a step was computed."""
    for first in (True, False):
        run = ranks.new_run(tmp_path, ranks.experiment(training={"graph": first}))
        assert ranks.complete(run, digits_data, 1, max_steps=9)["state"] == "stopped"
        text = run.experiment_file.read_text()
        assert f"graph: {str(first).lower()}" in text
        run.experiment_file.write_text(text.replace(f"graph: {str(first).lower()}", f"graph: {str(not first).lower()}"))
        assert ranks.complete(run, digits_data, 1)["state"] == "finished"


@pytest.mark.parametrize(
    ("flags", "wanted", "begun", "chosen"),
    [
        ("avx512f avx512_bf16", "auto", None, torch.bfloat16),
        ("avx512f amx_bf16", "auto", None, torch.bfloat16),
        ("avx2 avx512f", "auto", None, torch.float32),  # torch would emulate it, slower than float32
        ("avx2 avx512f", "bf16", None, torch.bfloat16),
        ("avx512_bf16", "float32", None, torch.float32),
        ("avx512_bf16", "auto", "float32", torch.float32),  # preempted elsewhere, it goes on as it began
        ("avx2 avx512f", "auto", "bf16", torch.bfloat16),
        ("avx2 avx512f", "float32", "bf16", torch.float32),
    ],
)
def test_a_processor_trains_in_bf16_where_it_computes_in_it(
    flags: str, wanted: str, begun: str | None, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "_processor", lambda: ["model name\t: a processor", f"flags\t\t: {flags}"])
    experiment = ranks.experiment(training={"precision": wanted})
    assert setup.choose_precision(experiment, torch.device("cpu"), begun) is chosen


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_a_run_goes_on_in_the_precision_that_it_began_in(tmp_path: Path, digits_data: Path, precision: str) -> None:
    run = ranks.new_run(tmp_path, ranks.experiment())
    ranks.complete(run, digits_data, 1, max_steps=3)
    run.update_state(precision=precision)  # as if it had begun on another processor
    result = ranks.complete(run, digits_data, 1)
    rows = [row for row in files.read_json_lines(run.metrics_file) if row.get("event") == "started"]
    assert (rows[-1]["precision"], run.state().precision, result["precision"]) == (precision,) * 3


def test_each_shape_is_recorded_once_after_its_warm_up() -> None:
    calls: list[tuple[int, int]] = []
    graphs = Graphs(lambda images, labels, size: calls.append((int(images.sum()), size)), torch.device("cpu"))
    for number in range(WARM_UP + 2):
        for rows, size in ((3, 6), (2, 4)):
            graphs(torch.full((rows, 1), float(number)), torch.zeros(rows, dtype=torch.int64), size)
        assert graphs.recorded == (0 if number < WARM_UP else 2)
    assert calls == [entry for number in range(WARM_UP + 2) for entry in ((3 * number, 6), (2 * number, 4))]


def test_the_first_step_is_timed_by_stage(tmp_path: Path, digits_data: Path) -> None:
    run, _ = trained(tmp_path, digits_data)
    [row] = [row for row in files.read_json_lines(run.metrics_file) if row.get("event") == "first step"]
    assert list(row["seconds"]) == ["process group", "lock", "data", "network", "resume", "pipeline", "first step"]
    assert all(0 <= seconds < 60 for seconds in row["seconds"].values())
