"""An experiment.yaml that was edited by hand is not what its checkpoints were made with: each way to go on says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import yaml

from hpc_cifar import files
from hpc_cifar.cli import train as command
from hpc_cifar.config.cluster import LOCAL
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.errors import RunError
from hpc_cifar.launch import control
from hpc_cifar.runs import Run
from hpc_cifar.train import begun, checkpoint, loop, trained


@pytest.fixture
def run(tmp_path: Path, digits_data: Path) -> Run:
    """Stopped in its first epoch, with one checkpoint."""
    found = ranks.new_run(tmp_path, ranks.experiment())
    loop.train(found, max_steps=3, data_root=digits_data, console=False)
    return found


def edit(run: Run, change: Callable[[dict[str, Any]], object]) -> None:
    values = yaml.safe_load(run.experiment_file.read_text())
    change(values)
    run.experiment_file.write_text(yaml.safe_dump(values))


def ways(run: Run, data: Path) -> dict[str, Callable[[], object]]:
    """Who would train on, or say figures, under another experiment's name."""
    return {
        "train, a requeued job, a chain link": lambda: loop.train(run, data_root=data, console=False),
        "resume": lambda: control.resume(run, data_root=data, cluster=LOCAL),
        "evaluate, export": lambda: trained.load(run, data),
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v["optimizer"].update(lr=0.5), "optimizer.lr: 0.1 -> 0.5"),
        (lambda v: v.update(seed=8), "seed: 7 -> 8"),
        (lambda v: v.update(epochs=3), "epochs: 2 -> 3"),
        (lambda v: v["data"]["augment"].update(cutout=2), "data.augment.cutout: 4 -> 2"),
        (lambda v: v["data"].update(validation=0.2), "data.validation: 0.1 -> 0.2"),
    ],
)
def test_another_experiment_is_refused_by_its_fields(run: Run, digits_data: Path, change: Any, words: str) -> None:
    edit(run, change)
    for way, go in ways(run, digits_data).items():
        with pytest.raises(RunError) as caught:
            go()
        assert words in str(caught.value) and "--fresh" in str(caught.value), way
    assert run.state().step == 3


def test_a_claim_is_named_and_goes_on(run: Run, digits_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(run, lambda values: values.update(claim={"source": "nobody", "test_accuracy": 0.01}))
    assert loop.train(run, data_root=digits_data, console=True)["state"] == "finished"
    assert "note: experiment.yaml was changed since the last checkpoint: claim" in capsys.readouterr().out
    assert begun.changes(begun.manifest(run), run.experiment()) == {}, "the last checkpoint knows it"


def test_the_file_put_back_goes_on_and_so_does_a_checkpoint_of_before(run: Run, digits_data: Path) -> None:
    edit(run, lambda values: values["optimizer"].update(lr=0.5))
    edit(run, lambda values: values["optimizer"].update(lr=0.1))
    loop.train(run, max_steps=4, data_root=digits_data, console=False)
    for saved in checkpoint.stored(run.checkpoints):  # as an earlier version wrote them
        files.write_json(saved.folder / "manifest.json", {k: v for k, v in saved.manifest.items() if k != "experiment"})
    edit(run, lambda values: values["optimizer"].update(lr=0.5))
    assert loop.train(run, data_root=digits_data, console=False)["state"] == "finished"


def go_on_as(run: Run, experiment: Experiment, *, force: bool = False) -> None:
    command._go_on_as(run, experiment, lambda: (experiment, {}), force=force)


def test_train_compares_the_job_with_the_checkpoint_and_not_with_what_was_edited(run: Run, digits_data: Path) -> None:
    original, other = ranks.experiment(), ranks.experiment(optimizer={"lr": 0.5})
    edit(run, lambda values: values["optimizer"].update(lr=0.5))
    with pytest.raises(RunError, match=r"begun with another experiment \(optimizer.lr: 0.1 -> 0.5\)"):
        go_on_as(run, other)
    go_on_as(run, original)
    assert run.experiment() == original
    go_on_as(run, other, force=True)
    loop.train(run, max_steps=4, data_root=digits_data, console=False)
    go_on_as(run, other)
    with pytest.raises(RunError, match=r"0\.5 -> 0\.1"):
        go_on_as(run, original)


def test_force_outlives_a_process_that_was_killed_before_its_first_checkpoint(run: Run, digits_data: Path) -> None:
    other = ranks.experiment(optimizer={"lr": 0.5})
    go_on_as(run, other, force=True)
    go_on_as(run, other)
    assert loop.train(run, data_root=digits_data, console=False)["state"] == "finished"
