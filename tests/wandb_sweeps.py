"""The part of the W&B server on loopback that has sweeps: what the real ``wandb sweep`` and ``wandb agent`` ask it."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from typing import Any

import yaml


@dataclass
class Sweep:
    """A grid; ``left`` are the values of the runs that no agent has been given yet."""

    id: str
    entity: str
    project: str
    config: dict[str, Any]
    left: list[dict[str, Any]] = field(default_factory=list)
    given: dict[str, dict[str, Any]] = field(default_factory=dict)  # by the id of the run


def answer(kept: dict[str, Sweep], entity: str, operation: str, variables: dict[str, Any]) -> dict[str, Any] | None:
    """What the server says to an operation about sweeps; None if it is about something else.

    Args:
        entity: of whoever asks without one.
    """
    match operation:
        case "UpsertSweep":
            config = yaml.safe_load(variables["config"])
            made = Sweep(f"sweep{len(kept)}", variables["entityName"] or entity, variables["projectName"], config)
            made.left = points(config["parameters"])
            kept[made.id] = made
            project = {"id": "p", "name": made.project, "entity": {"id": "e", "name": made.entity}}
            return {"upsertSweep": {"sweep": {"name": made.id, "project": project}, "configValidationWarnings": []}}
        case "SweepWithRuns":
            asked = kept.get(variables["sweep"])
            if asked is None or (asked.entity, asked.project) != (variables["entity"], variables["project"]):
                return {"project": None}
            about = {"id": asked.id, "name": asked.id, "state": "RUNNING", "config": yaml.safe_dump(asked.config)}
            return {"project": {"sweep": about | {"runs": {"edges": []}}}}
        case "Sweep":  # of 0.21, for a run that belongs to one
            known = kept.get(variables["name"])
            if known is None:
                return {"project": {"sweep": None}}
            about = {"id": known.id, "name": known.id, "state": "RUNNING", "config": yaml.safe_dump(known.config)}
            return {"project": {"sweep": about | {"runCountExpected": None, "bestLoss": None}}}
        case "CreateAgent":
            return {"createAgent": {"agent": {"id": variables["sweep"]}}}
        case "Heartbeat":
            sweep = kept[variables["id"]]
            return {"agentHeartbeat": {"agent": {"id": sweep.id}, "commands": json.dumps(commands(sweep, variables))}}
    return None


def points(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the values."""
    values = [one["values"] if "values" in one else [one["value"]] for one in parameters.values()]
    return [dict(zip(parameters, chosen, strict=True)) for chosen in itertools.product(*values)]


def commands(sweep: Sweep, variables: dict[str, Any]) -> list[dict[str, Any]]:
    """A run after the other for an agent; the end after the last one."""
    if any(json.loads(variables["runState"]).values()):
        return []
    if not sweep.left:
        return [{"type": "exit"}]
    name = f"{sweep.id}run{len(sweep.given)}"
    sweep.given[name] = sweep.left.pop(0)
    values = {key: {"value": value} for key, value in sweep.given[name].items()}
    return [{"type": "run", "run_id": name, "program": sweep.config["program"], "args": values}]
