"""Fields as options of ``train``, as ``wandb agent`` writes them."""

from __future__ import annotations

import pytest

from hpc_cifar.cli.agent import as_sets
from hpc_cifar.cli.main import main

OWN = {"--set", "--name", "--max-steps", "--fresh", "--force", "--data", "--help", "-h"}


@pytest.mark.parametrize(
    ("passed", "sets"),
    [
        (["--optimizer.lr=0.1", "--data.batch_size=256"], ["optimizer.lr=0.1", "data.batch_size=256"]),
        (["--epochs=3", "--seed=1"], ["epochs=3", "seed=1"]),
        (["--optimizer.nesterov=True"], ["optimizer.nesterov=True"]),
        (["--optimizer.nesterov", "--seed=1"], ["optimizer.nesterov=true", "seed=1"]),
        (["--optimizer.lr", "1e-05", "--seed", "-1"], ["optimizer.lr=1e-05", "seed=-1"]),
        (["--data.fold=None"], ["data.fold=null"]),
        (["--optimizer={'lr': 0.1, 'name': 'sgd'}"], ["optimizer.lr=0.1", "optimizer.name=sgd"]),
        (
            ["--data={'augment': {'flip': 'none', 'cutout': None}, 'batch_size': 8}"],
            ["data.augment.flip=none", "data.augment.cutout=null", "data.batch_size=8"],
        ),
        (["--model.layers=['flatten', {'dense': {'units': 10}}]"], ["model.layers=['flatten', {'dense': {'units': 10}}]"]),
        (["--optimizer={name: sgd}"], ["optimizer={name: sgd}"]),
        (["--data={}"], []),
        (["--optimizer={" + "{" * 9999], ["optimizer={" + "{" * 9999]),
    ],
)
def test_a_field_is_a_change_of_it(passed: list[str], sets: list[str]) -> None:
    if not sets:  # the option of that name
        assert as_sets(passed, OWN) == passed
        return
    assert as_sets(["quickstart", *passed], OWN) == ["quickstart", *(word for one in sets for word in ("--set", one))]


@pytest.mark.parametrize(
    "words",
    [
        ["--name=net", "--data=folder", "--data", "folder", "--max-steps", "3", "--fresh", "--force", "-h", "quickstart"],
        ["--set", "seed=1", "--set=seed=1"],
        ["--", "--optimizer.lr=0.1"],
        ["--max_steps=3", "--forc", "--help"],
    ],
)
def test_its_own_options_stay_what_they_are(words: list[str]) -> None:
    assert as_sets(words, OWN) == words


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--optimizer.lrr=3", "optimizer.lrr: unknown key; did you mean 'lr'?"),
        ("--epoch=3", "epoch: unknown key; did you mean 'epochs'?"),
        ("--epoch", "epoch: unknown key; did you mean 'epochs'?"),
        ("--optimizer={'lrr': 3}", "optimizer.lrr: unknown key; did you mean 'lr'?"),
        ("--max-step=3", "No such option: --max-step. Did you mean '--max-steps'?"),
        ("--rate=3", "No such option: --rate"),
    ],
)
def test_what_is_no_field_is_one_line_with_the_nearest(word: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "quickstart", word]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("hpc-cifar: error: ") and said in line
