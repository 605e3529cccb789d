"""Whether a checkpoint holds what this version writes: a right digest says that nothing has changed, and not who wrote it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

_PLAIN = (int, float, str, bool, type(None))


def problem(state: Any) -> str:
    """What is missing in the state of a run, or is of another type; "" if nothing is. Nothing is compared with a network."""
    if not isinstance(state, dict):
        return f"it is a {type(state).__name__}"
    checks = {
        "model": _are_tensors(state.get("model")),
        "optimizer": _is_of_an_optimizer(state.get("optimizer")),
        "ema": state.get("ema", 0) is None or _is_an_average(state.get("ema")),
        "position": _is_a_position(state.get("position")),
        "statistics": state.get("statistics") is None or _are_tensors(state["statistics"]),
        "per_rank": _are_of_ranks(state.get("per_rank"), state.get("world_size")),
        "split_digest": isinstance(state.get("split_digest"), str),
        "history": _are_rows(state.get("history")),
        "best": isinstance(state.get("best", ""), int | float | None),
        "best_step": isinstance(state.get("best_step", ""), int | None),
    }
    wrong = [name for name, right in checks.items() if not right]
    return f"{', '.join(wrong)}: missing, or of another kind" if wrong else ""


def difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """The first tensor of ``wanted`` that is missing in ``found`` or has another shape or type; or one too many; or ""."""
    for name, tensor in wanted.items():
        if name not in found:
            return f"{name} is missing"
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            return f"{name} is {_words(found[name])} and should be {_words(tensor)}"
    unknown = [name for name in found if name not in wanted]
    return f"{str(unknown[0])[:80]} is unknown" if unknown else ""


def listed(tensors: Iterable[Tensor], name: str) -> dict[str, Tensor]:
    """By number, for :func:`difference`."""
    return {f"{name} {number}": tensor for number, tensor in enumerate(tensors)}


def of_optimizer(state: dict[str, Any], optimizer: Any) -> str:
    """What of an optimizer's saved state has not the shape of its parameter, or is of another kind than numbers; or ""."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():
        if not 0 <= number < len(parameters):
            return f"it has a parameter number {number} of {len(parameters)}"
        for name, value in values.items():
            if not isinstance(value, Tensor) or not value.dim():
                continue
            wanted = parameters[number]
            if value.shape != wanted.shape or value.dtype != wanted.dtype:
                return f"{name} of parameter {number} is {_words(value)} and should be {_words(wanted)}"
    return ""


def _words(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape)) or 'of one number'}"


def _are_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) and isinstance(one, Tensor) for name, one in value.items())


def _is_of_an_optimizer(value: Any) -> bool:
    if (
        not isinstance(value, dict)
        or not isinstance(value.get("state"), dict)
        or not isinstance(value.get("param_groups"), list)
    ):
        return False
    values = value["state"].items()
    of_parameters = all(
        type(number) is int and isinstance(one, dict) and all(isinstance(part, (Tensor, *_PLAIN)) for part in one.values())
        for number, one in values
    )
    return of_parameters and all(_is_a_group(group) for group in value["param_groups"])


def _is_a_group(group: Any) -> bool:
    if not isinstance(group, dict) or not isinstance(group.get("params"), list):
        return False
    numbers = all(type(number) is int for number in group["params"])
    return numbers and all(isinstance(value, (Tensor, list, tuple, *_PLAIN)) for value in group.values())


def _is_an_average(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_count(value.get("updates")):
        return False
    return isinstance(value.get("shadow"), list) and all(isinstance(one, Tensor) for one in value["shadow"])


def _is_a_position(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"epoch", "batch", "step"} and all(map(_is_count, value.values()))


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_of_ranks(value: Any, size: Any) -> bool:
    if not isinstance(value, list) or type(size) is not int or len(value) != size or not value:
        return False
    return all(
        isinstance(one, dict) and isinstance(one.get("epoch_sums"), Tensor) and isinstance(one.get("buffers", 0), list | None)
        for one in value
    )


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, dict)
        and type(row.get("epoch")) is int
        and all(isinstance(name, str) and isinstance(one, _PLAIN) for name, one in row.items())
        for row in value
    )
