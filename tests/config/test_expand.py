"""Seeds and folds: which experiments a submission is."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import pytest

from hpc_cifar.config.expand import LARGEST_SEED, Element, expand
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.errors import UsageError
from hpc_cifar.runs import experiment_text, new_run_id


def experiment(name: str = "x", seed: int = 7, **data: Any) -> Experiment:
    return Experiment.model_validate(
        {
            "name": name,
            "seed": seed,
            "epochs": 1,
            "model": {"family": "sequential", "layers": ["flatten", {"dense": {"units": 10}}]},
            "data": {"batch_size": 4, **data},
            "optimizer": {"name": "sgd", "lr": 0.1},
        }
    )


def test_without_options_the_experiments_are_what_they_were() -> None:
    one, two = experiment(), experiment("y")
    assert expand([one, two]) == [Element(one), Element(two)]
    assert Element(one).title == "x"


def test_seeds_follow_the_seed_of_the_file() -> None:
    made = expand([experiment(), experiment("y", seed=40)], seeds=3)
    assert [(element.experiment.name, element.experiment.seed) for element in made] == [
        *(("x", 7), ("x", 8), ("x", 9)),
        *(("y", 40), ("y", 41), ("y", 42)),
    ]
    assert [element.title for element in made[:3]] == ["x-s7", "x-s8", "x-s9"]
    # nothing but the seed differs
    assert [element.experiment.model_copy(update={"seed": 7}) for element in made[:3]] == [experiment()] * 3


def test_every_fold_with_every_seed() -> None:
    made = expand([experiment()], seeds=2, folds=3)
    assert [element.label for element in made] == [f"s{seed}-f{fold}" for seed in (7, 8) for fold in (0, 1, 2)]
    assert [(element.experiment.seed, element.experiment.data.fold) for element in made] == [
        (seed, fold) for seed in (7, 8) for fold in (0, 1, 2)
    ]
    assert {element.experiment.data.folds for element in made} == {3}
    assert len({experiment_text(element.experiment) for element in made}) == 6
    assert made[0].title == "x-s7-f0"
    assert expand([experiment()], folds=3)[1].title == "x-f1"


def test_what_is_expanded_is_valid() -> None:
    for element in expand([experiment(validation=0.3)], seeds=2, folds=2):
        again = Experiment.model_validate(element.experiment.model_dump())
        assert again == element.experiment


def test_the_longest_name_still_names_a_run() -> None:
    from hpc_cifar.runs import named

    [*_, last] = expand([experiment("n" * 64, seed=LARGEST_SEED - 1)], seeds=2, folds=1000)
    assert named(Path("/runs"), new_run_id(last.title, Path("/runs"))).id.startswith(f"{'n' * 64}-s{LARGEST_SEED}-f999-")


def test_what_cannot_be_expanded_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"^--seeds 2: x has seed 9223372036854775807; the largest is 9223372036854775807$"):
        expand([experiment(seed=LARGEST_SEED)], seeds=2)
    with pytest.raises(UsageError, match=r"^--kfold 5: x: folds hold out training images: leave validation: test out$"):
        expand([experiment(validation="test")], folds=5)
    with pytest.raises(UsageError, match=r"^--kfold 1: x: should be at least 2, not 1$"):
        expand([experiment()], folds=1)


def test_no_run_gets_the_name_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever second: four hex digits are soon drawn twice."""
    drawn = iter(["aaaa", "aaaa", "bbbb"])
    monkeypatch.setattr(secrets, "token_hex", lambda _: next(drawn))
    monkeypatch.setattr(os.path, "lexists", lambda path: str(path).endswith("aaaa"))
    assert new_run_id("net", tmp_path).endswith("-bbbb")
