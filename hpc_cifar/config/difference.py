"""In which fields two experiments differ, and whether a run that trains one could go on as the other."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel

from .experiment import Experiment
from .model import PretrainedModel

# the same updates with other values of these: where it runs, what is told, what is kept, how pixels and steps get there
ASIDE = (
    *("name", "claim", "resources", "tracking", "checkpoint.every_epochs", "checkpoint.every_steps"),
    *("checkpoint.keep_last", "checkpoint.keep_every_epochs", "data.pipeline", "data.workers", "training.log_every_steps"),
    "training.graph",
)
REPEATED = ("seed", "data.fold", "claim", "tracking", "resources", "name")  # what does not make it another system


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted names; lists stay whole."""
    if not isinstance(value, dict):
        return {prefix: value}
    begin = f"{prefix}." if prefix else ""
    return {name: one for key, inner in value.items() for name, one in flat(inner, f"{begin}{key}").items()}


def differences(one: BaseModel, other: BaseModel) -> dict[str, tuple[Any, Any]]:
    """Dotted names of the fields that are not the same, with both values; None where one has no such field."""
    first, second = flat(one.model_dump(mode="json")), flat(other.model_dump(mode="json"))
    names = dict.fromkeys([*first, *second])
    return {name: (first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)}


def without_weights(experiment: Experiment) -> Experiment:
    """Where pretrained weights lie does not matter to a run that goes on from its checkpoint."""
    model = experiment.model
    if not isinstance(model, PretrainedModel):
        return experiment
    return experiment.model_copy(update={"model": model.model_copy(update={"weights": None})})


def matters(name: str, before: Any, now: Any) -> bool:
    """Whether a run with the other value of the field would make other updates."""
    if name == "resources.gpus_per_node":  # on a CPU it may have another precision
        return bool(before) != bool(now)
    return not any(name == aside or name.startswith(f"{aside}.") for aside in ASIDE)


def digest(experiment: BaseModel) -> str:
    """Hex SHA-256 of what decides the updates of an experiment, but for its seed: runs that have the same can be compared.

    Fields that say what they would say if they were left out do not count, so that a later version with one field more gives
    an old file its old digest.
    """
    fields = flat(experiment.model_dump(mode="json", exclude_defaults=True))
    counted = {name: value for name, value in fields.items() if name != "seed" and name not in ASIDE}
    counted = {name: value for name, value in counted.items() if not name.startswith(tuple(f"{one}." for one in ASIDE))}
    return hashlib.sha256(json.dumps(counted, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def comparable(experiment: BaseModel, **options: Any) -> dict[str, Any]:
    """The experiment's fields by dotted names, but those that only tell repetitions of one system apart, such as the seed.

    Args:
        options: of pydantic's ``model_dump``.
    """
    fields = flat(experiment.model_dump(mode="json", **options))
    return {name: value for name, value in fields.items() if not repeated(name)}


def repeated(name: str) -> bool:
    """Whether runs with other values of the field are repetitions of one system."""
    return name in REPEATED or name.partition(".")[0] in REPEATED


def system(experiment: Experiment) -> str:
    """``<name>-<8 hex digits>``, the same for runs that differ in seed and fold only: what people group runs by in W&B.

    Fields that have their default do not count, so that a field which a later version adds changes nothing.
    """
    fields = json.dumps(comparable(experiment, exclude_defaults=True), sort_keys=True)
    return f"{experiment.name}-{hashlib.sha256(fields.encode()).hexdigest()[:8]}"
