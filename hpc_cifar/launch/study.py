"""The study of a sweep, as Optuna keeps it: a journal file that all runs append to, under a lock that works on NFS."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

from ..config.expand import Point
from ..config.sweep import Range, Sweep


def optuna() -> Any:
    """The library, quiet."""
    import optuna

    optuna.logging.set_verbosity(logging.ERROR)
    return optuna


def open_study(journal: Path, name: str, point: Point) -> Any:
    """The study as the run of this point sees it: its sampler draws other numbers than the next one's. Made if absent."""
    library, begun = optuna(), journal.exists()  # what opens it makes an empty one
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    sweep, prune = point.sweep, point.sweep.prune
    seed = (sweep.seed + 7919 * point.number) % 2**32
    pruner = (
        library.pruners.NopPruner()
        if prune is None  # Optuna counts steps from 0, we epochs from 1
        else library.pruners.MedianPruner(n_startup_trials=prune.startup_runs, n_warmup_steps=prune.warmup_epochs + 1)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", library.exceptions.ExperimentalWarning)
        options: dict[str, Any] = {
            "storage": library.storages.JournalStorage(JournalFileBackend(str(journal), JournalFileOpenLock(str(journal)))),
            "study_name": name,
            "sampler": library.samplers.TPESampler(seed=seed, constant_liar=True),
            "pruner": pruner,
        }
        if begun:
            return library.load_study(**options)
        direction = "maximize" if sweep.metric == "val_accuracy" else "minimize"
        return library.create_study(**options, direction=direction)


def distributions(sweep: Sweep) -> dict[str, Any]:
    """A list's values are told apart by their text, since Optuna knows plain ones only."""
    kinds = optuna().distributions
    found: dict[str, Any] = {}
    for name, values in sweep.parameters.items():
        if not isinstance(values, Range):
            found[name] = kinds.CategoricalDistribution(list(dict.fromkeys(json.dumps(value) for value in values)))
        elif sweep.method == "grid":
            found[name] = kinds.CategoricalDistribution([json.dumps(value) for value in values.steps()])
        else:
            kind = kinds.IntDistribution if values.whole else kinds.FloatDistribution
            step = {"step": values.step} if values.step is not None else {}
            found[name] = kind(values.min, values.max, log=values.scale == "log", **step)
    return found


def values_of(sweep: Sweep, parameters: dict[str, Any]) -> dict[str, Any]:
    """What the experiment is given, in the order of the file."""
    listed = _listed(sweep)
    return {name: json.loads(parameters[name]) if name in listed else parameters[name] for name in sweep.parameters}


def parameters_of(sweep: Sweep, values: dict[str, Any]) -> dict[str, Any]:
    """The way back."""
    listed = _listed(sweep)
    return {name: json.dumps(value) if name in listed else value for name, value in values.items()}


def _listed(sweep: Sweep) -> set[str]:
    return {name for name, values in sweep.parameters.items() if not isinstance(values, Range) or sweep.method == "grid"}
