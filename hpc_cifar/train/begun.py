"""Which experiment a run's checkpoints were made with, and what of ``experiment.yaml`` has changed since; without torch.

Each checkpoint holds the experiment that it was made with, in its manifest. So a run whose file was edited by hand does not go
on as another one, and does not give its figures another name.

<run>/forced.json    digest of an experiment that the run was told to go on with all the same (``train --force``)
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import ValidationError

from .. import files
from ..config.difference import differences, matters, without_weights
from ..config.experiment import Experiment
from ..config.fields import shown
from ..errors import RunError
from ..runs import Run

FORCED = "forced.json"


def manifest(run: Run, name: str = "") -> dict[str, Any]:
    """Of a checkpoint (``best``, ``latest``, a folder's name), by default of the newest one that has any; else ``{}``."""
    if name:
        return files.read_object(run.checkpoints / name / "manifest.json")
    folders = [path for path in run.checkpoints.glob("step-*") if files.whole(path.name.removeprefix("step-")) is not None]
    newest_first = sorted(folders, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)
    return next(filter(None, (files.read_object(folder / "manifest.json") for folder in newest_first)), {})


def experiment_of(manifest: dict[str, Any]) -> Experiment | None:
    """What the checkpoint was made with; None where an older version, or another one, has written it."""
    try:
        return Experiment.model_validate(manifest["experiment"])
    except (KeyError, ValidationError):
        return None


def changes(manifest: dict[str, Any], now: Experiment) -> dict[str, tuple[Any, Any]]:
    """Dotted names of the fields that differ, with what they were when the checkpoint was made and what they are."""
    if manifest.get("experiment") == now.model_dump(mode="json"):
        return {}
    before = experiment_of(manifest)
    return {} if before is None else differences(without_weights(before), without_weights(now))


def words(changed: dict[str, tuple[Any, Any]]) -> str:
    """``optimizer.lr: 0.1 -> 0.2; seed: 1 -> 2``."""
    return "; ".join(f"{name}: {shown(before)} -> {shown(now)}" for name, (before, now) in changed.items())


def check(run: Run, manifest: dict[str, Any], now: Experiment) -> list[str]:
    """What to tell people of a run whose experiment is ``now``, and that goes on from this checkpoint.

    Raises:
        RunError: it would make other updates than those of the experiment it was begun with; the message names the fields.
    """
    changed = changes(manifest, now)
    important = {name: values for name, values in changed.items() if matters(name, *values)}
    if important and not is_forced(run, now):
        raise RunError(
            f"{run.experiment_file} was changed since the checkpoint of step {manifest.get('step')} was made "
            f"({words(important)}); put that back, begin again at step 0 with --fresh (of train, or of resume), or go on all "
            f"the same with hpc-cifar train JOB --name {run.id} --force"
        )
    return [f"experiment.yaml was changed since the last checkpoint: {words(changed)}"] if changed else []


def force(run: Run, now: Experiment) -> None:
    """The run goes on as ``now``, whatever its checkpoints were made with."""
    files.write_json(run.path / FORCED, {"digest": _digest(now)})


def is_forced(run: Run, now: Experiment) -> bool:
    """Whether it was told to go on as that."""
    said = files.read_json(run.path / FORCED)
    return isinstance(said, dict) and said.get("digest") == _digest(now)


def _digest(experiment: Experiment) -> str:
    """Of all fields that do not have their default, so that a later version with one field more gives the same one."""
    values = without_weights(experiment).model_dump(mode="json", exclude_defaults=True)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
