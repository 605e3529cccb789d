"""A checkpoint with a right digest and other contents is refused in one line, by whoever reads it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

from hpc_cifar.errors import CheckpointError
from hpc_cifar.train import checkpoint, contents, trained

pytestmark = pytest.mark.slow
State = dict[str, Any]


def first(values: dict[str, Any]) -> str:
    return next(name for name, value in values.items() if value.dim() > 1)


def changed(change: Callable[[torch.Tensor], torch.Tensor], *path: Any) -> Callable[[State], None]:
    """A tensor of the state by another one; of a dictionary of tensors the first with two dimensions."""

    def apply(state: State) -> None:
        place: Any = state
        for name in path:
            place = place[name]
        key = first(place) if isinstance(place, dict) else 0
        place[key] = change(place[key])

    return apply


def without(name: str, *path: str) -> Callable[[State], None]:
    def apply(state: State) -> None:
        place: Any = state
        for part in path:
            place = place[part]
        place.pop() if isinstance(place, list) else place.pop(name or first(place))

    return apply


def with_value(name: str, value: Any) -> Callable[[State], None]:
    return lambda state: state.update({name: value})


CHANGES: dict[str, Callable[[State], None]] = {
    **{
        f"no {name}": without(name) for name in ("model", "optimizer", "ema", "position", "per_rank", "split_digest", "history")
    },
    **{f"no {name}": without(name) for name in ("best", "best_step", "world_size")},
    **{
        f"text as {name}": with_value(name, "text") for name in ("model", "optimizer", "ema", "position", "per_rank", "history")
    },
    "weights of another type": changed(lambda value: value.double(), "model"),
    "whole numbers as weights": changed(lambda value: value.long(), "model"),
    "weights of another shape": changed(lambda value: value[:1], "model"),
    "one number for all weights": changed(lambda value: value.flatten()[:1].reshape([1] * value.dim()), "model"),
    "a tensor too many": lambda state: state["model"].update(more=torch.ones(1)),
    "a tensor too few": without("", "model"),
    "an average of one number": changed(lambda value: value.flatten()[:1].reshape([1] * value.dim()), "ema", "shadow"),
    "an average of another type": changed(lambda value: value.double(), "ema", "shadow"),
    "an average too few": without("", "ema", "shadow"),
    "no average": with_value("ema", None),
    "momentum of one number": changed(lambda value: value.flatten()[:1].reshape([1] * value.dim()), "optimizer", "state", 0),
    "momentum of another type": changed(lambda value: value.double(), "optimizer", "state", 0),
    "momentum of no parameter": lambda state: state["optimizer"]["state"].update({99: {}}),
    "a negative step": lambda state: state["position"].update(step=-1),
    "no batch": without("batch", "position"),
    "sums of one number": lambda state: state["per_rank"][0].update(epoch_sums=torch.zeros(1, dtype=torch.float64)),
    "rows that are none": with_value("history", [1, 2]),
    "more processes than there are": with_value("world_size", 3),
}
ONLY_OF_THE_TRAINING = ("momentum", "sums")  # evaluate has no use for them


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, digits_data: Path) -> tuple[Any, State]:
    """A run that was stopped after three steps, and its state."""
    run = ranks.new_run(tmp_path_factory.mktemp("contents"), ranks.experiment(epochs=1))
    ranks.complete(run, digits_data, 1, max_steps=3)
    saved = checkpoint.named(run.checkpoints, "latest")
    assert saved is not None
    return run, checkpoint.read(saved)


def test_what_was_written_is_accepted(made: tuple[Any, State]) -> None:
    assert contents.problem(made[1]) == ""


@pytest.mark.parametrize("what", CHANGES)
def test_other_contents_are_one_line(made: tuple[Any, State], digits_data: Path, what: str) -> None:
    run, right = made
    state = copy.deepcopy(right)
    CHANGES[what](state)
    manifest = checkpoint.stored(run.checkpoints)[0].manifest
    checkpoint.save(run.checkpoints, state, step=3, epoch=0, best_step=manifest["best_step"])
    if not what.startswith(ONLY_OF_THE_TRAINING):
        with pytest.raises(CheckpointError) as error:
            trained.load(run, digits_data, "latest")
        assert "\n" not in str(error.value)
    if what in IN_A_PROCESS:
        codes = ranks.finish(ranks.start(run, digits_data, 1))
        said = ranks.logs(run).rpartition("error: ")[2]
        assert codes == [1] and said.count("\n") == 1 and "the checkpoint" in said, ranks.logs(run)


IN_A_PROCESS = (
    "no model", "no average", "an average of one number", "momentum of one number", "momentum of another type",
    "momentum of no parameter", "sums of one number",
)  # fmt: skip
