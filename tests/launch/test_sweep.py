"""Sweeps: their files, their points, their study, and whole ones on the local executor with a training loop without torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from launch_site import Site, eventually
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from hpc_cifar import files, runs
from hpc_cifar.config.expand import Element, Point
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.config.load import load_sweep
from hpc_cifar.config.sweep import Sweep
from hpc_cifar.errors import ConfigError
from hpc_cifar.launch import sweep as sweeps
from hpc_cifar.runs import Run

RATES = {"optimizer.lr": {"min": 0.001, "max": 1, "scale": "log"}}
GRID = {"method": "grid", "parameters": {"optimizer.lr": [0.1, 0.2], "data.augment.flip": ["none", "random"]}}


def values(given: dict[str, Any]) -> list[dict[str, Any] | None]:
    return [point.values for point in sweeps.points(Sweep.model_validate(given))]


def test_a_grid_is_every_combination_and_the_last_changes_fastest() -> None:
    assert values(GRID) == [{"optimizer.lr": lr, "data.augment.flip": flip} for lr in (0.1, 0.2) for flip in ("none", "random")]
    stepped = {"method": "grid", "parameters": {"epochs": {"min": 2, "max": 7, "step": 2}}}
    assert values(stepped) == [{"epochs": 2}, {"epochs": 4}, {"epochs": 6}]


def test_a_random_sweep_is_the_same_for_its_seed() -> None:
    layers = [["flatten", {"dense": {"units": units}}] for units in (8, 16)]
    given = {"method": "random", "runs": 30, "parameters": {**RATES, "epochs": {"min": 1, "max": 9}, "model.layers": layers}}
    first = values(given)
    assert values(given) == first != values({**given, "seed": 1})
    assert all(one is not None and 0.001 <= one["optimizer.lr"] <= 1 and one["model.layers"] in layers for one in first)
    assert {type(one["epochs"]) for one in first if one} == {int} and len({one["epochs"] for one in first if one}) > 4
    low = sum(one is not None and one["optimizer.lr"] < math.sqrt(0.001) for one in first)
    assert 7 <= low <= 23, "half of them, on a logarithmic scale"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: grid\nparameters: {optimizer.lr: {min: 1, max: 2}}", "a grid needs a list of values, or a step"),
        ("method: random\nparameters: {optimizer.lr: [1]}", "needs the number of runs"),
        ("method: grid\nruns: 3\nparameters: {optimizer.lr: [1]}", "as many as there are combinations"),
        ("method: bayes\nruns: 3\nparameters: {resources.nodes: [1, 2]}", "is the same for all runs"),
        ("method: bayes\nruns: 3\nparameters: {optimizer.lr: {min: 2, max: 1}}", "should be below max"),
        ("method: bayes\nruns: 3\nparameters: {optimizer.lr: {min: 0, max: 1, scale: log}}", "needs a min above 0"),
        ("method: bayes\nruns: 3\nparameters: {optimizer.lr: []}", "at least one value"),
        ("method: anneal\nparameters: {epochs: [1]}", "should be one of grid"),
        ("method: grid\nparameters: {epochs: [1]}\nprune: {warmup_epochs: -1}", "prune.warmup_epochs: should be at least 0"),
        ("method: grid\nparametres: {epochs: [1]}", "parameters"),
        ("", "one sweep"),
    ],
)
def test_what_is_wrong_in_a_sweep_file_is_told_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_sweep(path)
    assert words in str(error.value) and "sweep.yaml" in str(error.value)


# ---- the study -----------------------------------------------------------------------------------------------------------


def a_run(root: Path, number: int, sweep: Sweep, given: dict[str, Any] | None) -> tuple[Run, Element]:
    values = {
        "name": "net",
        "epochs": 5,
        "model": {"family": "sequential", "layers": ["flatten", {"dense": {"units": 10}}]},
        "data": {"dataset": "digits", "batch_size": 144},
        "optimizer": {"name": "sgd", "lr": 0.01},
    }
    experiment = Experiment.model_validate(values)
    run = runs.create(root, f"net-t{number}", experiment, {}, {})
    return run, Element(experiment, f"t{number}", Point(sweep, number, given))


def study_of(root: Path) -> optuna.Study:
    [journal] = root.glob(".sweeps/*/net.log")
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
    return optuna.load_study(study_name="net", storage=storage)


def test_a_run_below_the_median_is_given_up_and_a_resumed_one_keeps_its_place(tmp_path: Path) -> None:
    sweep = Sweep.model_validate({**GRID, "prune": {"warmup_epochs": 1, "startup_runs": 2}})
    members = [a_run(tmp_path, point.number, sweep, point.values) for point in sweeps.points(sweep)]
    sweeps.begin(tmp_path, "x", members)
    for index, (run, _) in enumerate(members[:2]):
        trial = sweeps.take(run, 0, tmp_path)
        assert trial is not None
        for epoch in range(1, 6):
            row = {"kind": "epoch", "epoch": epoch, "val_accuracy": 0.8 + index / 10}
            files.append_json_line(run.metrics_file, row)
            assert not trial.gives_up(row)
        trial.ended({"state": "finished"})
    poor = members[2][0]
    for epoch, wanted in ((1, False), (2, True)):
        trial = sweeps.take(poor, 0, tmp_path)  # as after a preemption, in between
        assert trial is not None and trial.gives_up({"kind": "epoch", "epoch": epoch, "val_accuracy": 0.1}) is wanted
    assert sweeps.take(poor, 1, tmp_path) is None
    trial.ended({"state": "stopped", "reason": "pruned"})
    trial.ended({"state": "finished"})  # told twice
    trials = study_of(tmp_path).trials
    assert [one.state for one in trials] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING]
    assert [one.value for one in trials[:2]] == [0.8, 0.9]
    assert trials[1].params == {"optimizer.lr": "0.1", "data.augment.flip": '"random"'}


def test_a_run_that_has_failed_and_is_resumed_tells_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = Sweep.model_validate({**GRID, "prune": {"startup_runs": 1}})
    run, element = a_run(tmp_path, 0, sweep, {"optimizer.lr": 0.1, "data.augment.flip": "none"})
    sweeps.begin(tmp_path, "x", [(run, element)])
    trial = sweeps.take(run, 0, tmp_path)
    assert trial is not None
    trial.ended({"state": "failed"})
    assert not trial.gives_up({"epoch": 2, "val_accuracy": 0.1}) and not capsys.readouterr().out
    assert [one.state for one in study_of(tmp_path).trials] == [TrialState.FAIL]
    files.append_json_line(run.metrics_file, {"kind": "epoch", "epoch": 5, "val_accuracy": 0.7})
    for _ in range(2):  # a requeued job that finds its run finished tells it again
        trial.ended({"state": "finished"})
    first, second = study_of(tmp_path).trials
    assert (first.state, second.state, second.value) == (TrialState.FAIL, TrialState.COMPLETE, 0.7)
    assert first.params == second.params


def test_a_study_that_cannot_be_read_costs_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = Sweep.model_validate(GRID)
    run, element = a_run(tmp_path, 0, sweep, {"optimizer.lr": 0.1, "data.augment.flip": "none"})
    sweeps.begin(tmp_path, "x", [(run, element)])
    [journal] = tmp_path.glob(".sweeps/*/net.log")
    journal.write_text("no journal\n")
    trial = sweeps.take(run, 0, tmp_path)
    assert trial is not None and not trial.gives_up({"epoch": 1, "val_accuracy": 0.1})
    trial.ended({"state": "finished"})
    assert capsys.readouterr().out.count("the run goes on") == 1


# ---- whole sweeps --------------------------------------------------------------------------------------------------------


def swept(site: Site, sweep: dict[str, Any], *options: str) -> list[Run]:
    path = site.work / "rates.yaml"
    path.write_text(json.dumps(sweep))
    job = site.job("hill=1", "step_s=0.01", epochs=3, processes=2)
    done = site.cli("submit", job, "--sweep", str(path), "--cluster", "local", "--json", "--wait", *options, timeout=240)
    return [Run(site.runs / row["run"]) for row in json.loads(done.stdout)]


@pytest.mark.slow
def test_a_bayesian_sweep_asks_as_its_runs_start(site: Site) -> None:
    """One after another, so that each knows what those before it have found; both ranks train what rank 0 asked for."""
    made = swept(site, {"method": "bayes", "runs": 4, "parameters": RATES}, "--campaign", "rates")
    rates = [run.experiment().optimizer.lr for run in made]
    assert len(set(rates)) == 4 and all(run.finished() for run in made)
    [journal] = site.runs.glob(".sweeps/rates-*/tiny.log")
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
    opened = optuna.load_study(study_name="tiny", storage=storage)
    # a run tells the study after its result is written
    trials = eventually(lambda: all(one.state.is_finished() for one in opened.trials) and opened.trials)
    assert [one.value for one in trials] == [pytest.approx(1 - abs(rate - 0.3)) for rate in rates]
    assert [one.params["optimizer.lr"] for one in trials] == rates
    site.cli("report", "--campaign", "rates", "--winner", "best.yaml")
    best = max(rates, key=lambda rate: 1 - abs(rate - 0.3))
    assert f"lr: {best}" in (site.work / "best.yaml").read_text()
    assert "plan of best" in site.cli("submit", "best.yaml", "--dry-run", "--cluster", "local").stdout


@pytest.mark.slow
def test_a_grid_prunes_and_the_winner_is_a_job_file(site: Site) -> None:
    sweep = {"method": "grid", "parameters": {"optimizer.lr": [0.3, 0.25, 0.9]}, "prune": {"startup_runs": 2}}
    made = swept(site, sweep)
    results = [files.read_object(run.result_file) for run in made]
    assert [(one["state"], one.get("reason")) for one in results] == [("finished", None)] * 2 + [("stopped", "pruned")]
    assert results[2]["epochs"] == 1
    assert [run.id.rpartition("-t")[2][0] for run in made] == ["0", "1", "2"]
    [campaign] = {run.campaign for run in made}
    assert campaign is not None and campaign.startswith("rates-")
    rows = json.loads(site.cli("list", "--campaign", campaign, "--json").stdout)
    assert [row["run"] for row in rows] == [run.id for run in made]


@pytest.mark.parametrize(
    ("sweep", "options", "words"),
    [
        ({"method": "grid", "parameters": {"optimizer.rate": [1]}}, (), "optimizer.rate"),
        ({"method": "grid", "parameters": {"optimizer.lr": [0.1, -1]}}, (), "optimizer.lr"),
        ({"method": "bayes", "runs": 2, "parameters": RATES}, ("--seeds", "2"), "choose their own values"),
        (
            {"method": "grid", "parameters": {"optimizer.lr": [0.1]}},
            ("--set", "data.validation=test"),
            "choose by the test set",
        ),
    ],
)
def test_a_sweep_that_the_experiment_does_not_take_is_refused(site: Site, sweep: Any, options: Any, words: str) -> None:
    path = site.work / "rates.yaml"
    path.write_text(json.dumps(sweep))
    done = site.cli("submit", site.job(), "--sweep", str(path), "--cluster", "local", *options, code=2)
    assert words in done.stderr and not list(site.runs.glob("*"))
