"""The part of the W&B server on loopback that finds runs: filters as those of Mongo, an order, and files to be read back."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

MISSING = object()
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "$eq": operator.eq, "$ne": operator.ne, "$gt": operator.gt, "$gte": operator.ge, "$lt": operator.lt, "$lte": operator.le,
    "$in": lambda value, known: value in known, "$nin": lambda value, known: value not in known,
    "$regex": lambda value, pattern: re.search(pattern, value),
}  # fmt: skip


def answer(
    runs: Mapping[str, Any], told: Callable[[Any], dict[str, Any]], url: str, operation: str, variables: dict[str, Any]
) -> dict[str, Any] | None:
    """What the server says to a question for many runs, or for a run's files; None if it is about something else.

    Args:
        runs: all of them, by id.
        told: what the server says of one.
    """
    match operation:
        case "Runs":
            place = (variables["entity"], variables["project"])
            wanted = json.loads(variables.get("filters") or "{}")
            found = [run for run in runs.values() if (run.entity, run.project) == place and matches(wanted, document(run))]
            for key in reversed((variables.get("order") or "+created_at").split(",")):
                found = ordered(found, key)
            edges = [{"node": told(run), "cursor": run.id} for run in found]
            page = {"endCursor": None, "hasNextPage": False}
            about = {"internalId": "1", "runCount": len(found), "readOnly": False}
            return {"project": about | {"runs": {"edges": edges, "pageInfo": page}}}
        case "RunFiles":
            run = runs[variables["name"]]
            nodes = [
                {
                    "id": name,
                    "name": name,
                    "sizeBytes": str(len(body)),
                    "mimetype": "",
                    "updatedAt": None,
                    "md5": "",
                    **dict.fromkeys(("url", "directUrl"), f"{url}/upload/{run.id}/{name}"),
                }
                for name, body in run.files.items()
                if name in variables["fileNames"]
            ]
            page = {"endCursor": None, "hasNextPage": False}
            files = {"edges": [{"node": node, "cursor": node["name"]} for node in nodes], "pageInfo": page}
            return {"project": {"internalId": "1", "run": {"fileCount": len(run.files), "files": files}}}
    return None


def document(run: Any) -> dict[str, Any]:
    """A run as it is looked through; the entries of its config as a user gave them, as the client's docs name them."""
    state = "finished" if run.ended else "running"
    about = {"name": run.id, "display_name": run.name, "group": run.group, "sweep": run.sweep, "state": state, "tags": run.tags}
    return {**about, "config": run.values(), "summary_metrics": run.summary}


def found_at(value: Any, path: str) -> Any:
    """What lies at a dotted path; MISSING where nothing is. Keys that have dots are found by W&B as little."""
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            return MISSING
        value = value[key]
    return value


def matches(wanted: dict[str, Any], of: dict[str, Any]) -> bool:
    """Whether a run is one that is asked for."""
    for key, value in wanted.items():
        if key in ("$and", "$or"):
            if not (all if key == "$and" else any)(matches(one, of) for one in value):
                return False
            continue
        known = found_at(of, key)
        conditions = value if isinstance(value, dict) else {"$eq": value}
        if known is MISSING or not all(COMPARISONS[name](known, other) for name, other in conditions.items()):
            return False
    return True


def ordered(runs: list[Any], key: str) -> list[Any]:
    """By ``+path`` or ``-path``; those without such a value come last. As they were made for the time of that."""
    path = key.lstrip("+-")
    if path == "created_at":
        return runs if not key.startswith("-") else runs[::-1]
    known = [run for run in runs if found_at(document(run), path) is not MISSING]
    known.sort(key=lambda run: found_at(document(run), path), reverse=key.startswith("-"))
    return known + [run for run in runs if run not in known]
