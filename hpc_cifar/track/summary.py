"""What W&B is told of a run beside its rows: the config that people filter and group by, the summary that they sort by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import files
from ..config import difference
from ..records import Provenance, Result, RunState, is_sound
from ..redaction import redact_words
from ..runs import Run
from . import identity
from .rows import selected

SUMMARY = (
    *("state", "reason"),
    *("test_accuracy", "test_loss", "tta_accuracy", "tta_loss", "gpu_hours", "seconds", "restarts", "lost_steps"),
    *("host_memory_mib", "device_memory_mib", "checkpoints", "checkpoint_seconds", "data", "device", "world_size", "precision"),
)
USED = {"started": ("parameters", "gpus", "gpu"), "pipeline": ("pipeline",)}  # what the newest event of a kind says was used
VALIDATION = {"val_accuracy": max, "val_loss": min, "val_loss_with_l2": min}  # which of all epochs is the best
NO_HYPER_PARAMETERS = ("tracking", "resources", "claim")
INTERRUPTED = ("preempted", "terminated")  # reasons of a run that was stopped where nobody queues it again, as under torchrun


def interrupted(state: RunState) -> bool:
    """Whether the run was sent away before its end, and is to go on: by its scheduler, or a TERM, as torchrun passes it on."""
    return state.state == "requeued" or (state.state == "stopped" and state.reason in INTERRUPTED)


def provenance(run: Run) -> dict[str, Any]:
    """That of the training, without keys; {} where it is missing or damaged."""
    found = files.read_object(run.path / "provenance.json")
    if not is_sound(Provenance, found):
        return {}
    if isinstance(words := found.get("command"), list):  # an earlier version knew fewer keys
        found["command"] = redact_words([str(word) for word in words])
    return found


def commit(run: Run) -> str:
    """Of the code that trains; "" where it is not known."""
    found = (provenance(run).get("git") or {}).get("commit")
    return found if isinstance(found, str) else ""


def command(run: Run) -> list[str]:
    """What started the training, word by word."""
    return list(provenance(run).get("command") or [])


def config(run: Run) -> dict[str, Any]:
    """The experiment's fields at their names, such as ``optimizer.lr``; what is no hyper-parameter is below ``about``.

    Runs that differ in seed and fold only have the same ``system``. Parameters of a sweep of W&B have their whole name at the
    top as well, where its search looks for them.
    """
    experiment = run.experiment()
    fields = experiment.model_dump(mode="json")
    by_name = difference.flat(fields)
    swept = {name: by_name[name] for name in identity.kept(run).swept if "." in name and name in by_name}
    aside = {name: fields.pop(name) for name in NO_HYPER_PARAMETERS if name in fields}
    origin = provenance(run)
    known = {name: origin[name] for name in ("packages", "python", "host", "command") if name in origin}
    git = {name: value for name, value in (origin.get("git") or {}).items() if name in ("commit", "dirty")}
    plan = files.read_object(run.path / "plan.json")
    names = {"run": run.id, "system": difference.system(experiment)}
    return {**fields, **swept, **names, "about": {**aside, "plan": plan, "data": run.state().data, "git": git, **known}}


def best_and_last(epochs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """``val_accuracy.max``, ``val_loss.min``, and both ``.last``, of all epochs so far.

    The client's own minimum and maximum begin anew with every segment, and so would call a later epoch the best one.
    """
    found = {}
    for name, best in VALIDATION.items():
        values = [row[name] for row in epochs if row.get(name) is not None]
        if values:
            found[name] = {best.__name__: best(values), "last": values[-1]}
    return found


def outcome(run: Run, epochs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The whole summary, as far as the run has got."""
    state = run.state()
    ended = (run.result() if state.state != "requeued" else None) or Result()
    values: dict[str, Any] = {
        key: value for one in (state, ended) for key in SUMMARY if (value := getattr(one, key, None)) not in (None, "")
    }
    events = [row for row in files.read_json_lines(run.metrics_file) if row.get("kind") == "event"]
    values["preemptions"] = sum(_is_preemption(row) for row in events)
    for row in events:
        values |= {name: row[name] for name in USED.get(str(row.get("event")), ()) if row.get(name) is not None}
    chosen = selected(run.experiment(), epochs)
    kept = {name: chosen[name] for name in ("epoch", *VALIDATION) if chosen.get(name) is not None}
    return values | best_and_last(epochs) | ({"selected": kept} if kept else {}) | _evaluations(run)


def _is_preemption(event: dict[str, Any]) -> bool:
    word, reason = event.get("event"), event.get("reason")
    return (word == "requeued" and reason == "preempted") or (word == "stopped" and reason in INTERRUPTED)


def _evaluations(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in (run.path / "evaluation").glob("*/evaluation.json"):
        result = files.read_object(path)
        numbers = {name: result.get(name) for name in ("accuracy", "loss", "top5_accuracy", "ece")}
        macro, tta = result.get("macro"), result.get("tta")
        numbers |= macro if isinstance(macro, dict) else {}
        numbers |= {"tta_accuracy": tta.get("accuracy")} if isinstance(tta, dict) else {}
        numbers = {name: value for name, value in numbers.items() if isinstance(value, int | float)}
        found |= {f"evaluation/{path.parent.name}_{name}": value for name, value in numbers.items()}
    return found
