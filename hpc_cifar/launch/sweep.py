"""Sweeps: which values each run tries. What the runs find, and tell each other, is in ``launch/trial.py``.

runs/.sweeps/<campaign>/<experiment>.log  the study, see ``launch/study.py``
runs/<run>/sweep.json       the run's place in it: ``journal`` (relative to the run), ``study``, ``number``, ``trial``,
                            ``values``; the last two are null until a run of ``method: bayes`` has asked for them
runs/<run>/sweep-base.yaml  the experiment before that, as far as its file says
"""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .. import files, owner
from ..config.expand import Element, Point
from ..config.load import load_experiment
from ..config.sweep import Sweep, as_sets
from ..errors import HpcCifarError, RunError, first_line
from ..plan import Plan, make_plan
from ..records import SweepPlace
from ..runs import Run, experiment_text
from . import study, submit
from .trial import Trial, place, sweep_of

FOLDER = ".sweeps"
BASE = "sweep-base.yaml"
WAIT_S = 900.0  # for rank 0 to have asked: many runs may want to at once
TRIES = 20  # values that the experiment refuses before the run gives up


def points(sweep: Sweep) -> list[Point]:
    """What the runs of a sweep try, one each; the same for the same file."""
    if sweep.method == "bayes":
        return [Point(sweep, number, None) for number in range(sweep.runs or 0)]
    if sweep.method == "grid":
        found = sweep.grid()
    else:
        library = study.optuna()
        drawn = library.create_study(sampler=library.samplers.RandomSampler(seed=sweep.seed))
        asked = (drawn.ask(study.distributions(sweep)) for _ in range(sweep.runs or 0))
        found = [study.values_of(sweep, trial.params) for trial in asked]
    return [Point(sweep, number, values) for number, values in enumerate(found)]


def begin(root: Path, name: str, members: Sequence[tuple[Run, Element]]) -> None:
    """Make the studies of what has just been submitted, one for each experiment, and give every run its place.

    Raises:
        OSError: a file cannot be written.
    """
    folder = owner.part(root, FOLDER) / f"{re.sub(r'[^A-Za-z0-9_-]+', '-', name)[:64]}-{secrets.token_hex(3)}"
    owner.make_part(folder.parent)
    folder.mkdir(mode=owner.PRIVATE)
    opened: dict[str, Any] = {}
    for run, element in members:
        point, title = element.point, element.experiment.name
        assert point is not None
        journal = folder / f"{title}.log"
        if title not in opened:
            opened[title] = study.open_study(journal, title, point)
        trial = None
        if point.values is not None:
            opened[title].enqueue_trial(study.parameters_of(point.sweep, point.values))
            trial = int(opened[title].ask(study.distributions(point.sweep)).number)
        else:
            given = element.experiment.model_dump(mode="json", exclude_unset=True)
            files.write_text(run.path / BASE, yaml.safe_dump(given, sort_keys=False), durable=False)
        about = {"journal": os.path.relpath(journal, run.path), "study": title, "number": point.number, "trial": trial}
        files.write_json(run.sweep_file, {**about, "values": point.values, "sweep": point.sweep.model_dump(mode="json")})


def take(run: Run, rank: int, data_root: Path) -> Trial | None:
    """Have a run of a sweep know its values, on every rank; on rank 0 its trial. Rank 0 asks, once for all segments.

    Raises:
        RunError: no values can be had.
    """
    deadline = time.monotonic() + WAIT_S
    while (about := place(run)) is None or about.trial is None:
        if rank == 0 and about is not None:
            try:
                with files.hold(run.path / ".sweep.lock"):
                    about = _ask(run, about, data_root)
                    break
            except BlockingIOError:  # another job of this run asks
                pass
            except HpcCifarError:
                raise
            except Exception as error:
                raise RunError(f"{run.id}: the sweep's file {run.path / about.journal}: {first_line(error)}") from None
        if time.monotonic() > deadline:
            raise RunError(f"{run.id}: rank 0 has not said within {WAIT_S:.0f} s which values of the sweep this run tries")
        time.sleep(0.2)
    if rank > 0:
        return None
    if about.sweep.get("prune"):
        study.optuna()  # takes seconds, which the end of an epoch does not wait for
    return Trial(run, about)


def _ask(run: Run, about: SweepPlace, data_root: Path) -> SweepPlace:
    """Values that the experiment takes; what the run trains is written anew with them."""
    point = Point(sweep_of(run, about), about.number, None)
    opened = study.open_study((run.path / about.journal).resolve(), about.study, point)
    before = run.plan()
    if before is None:
        raise RunError(f"{run.path / 'plan.json'}: is missing or damaged; the sweep's values are planned as it says")
    problem = ""
    for _ in range(TRIES):
        trial = opened.ask(study.distributions(point.sweep))
        values = study.values_of(point.sweep, trial.params)
        said = " ".join(as_sets(values))
        try:
            experiment = load_experiment(run.path / BASE, as_sets(values))
            stored = submit.checked_train_images(experiment, data_root)
            plan = _planned_again(before, make_plan(experiment, before.placement, stored))
        except HpcCifarError as error:
            problem = first_line(error)
            print(f"sweep: {said} is refused: {problem}", flush=True)
            opened.tell(trial, state=study.optuna().trial.TrialState.FAIL)
            continue
        made = run.experiment_file.stat()
        files.write_text(run.experiment_file, experiment_text(experiment))
        os.utime(run.experiment_file, ns=(made.st_atime_ns, made.st_mtime_ns))  # by which runs are in the order of their making
        files.write_sealed(run.path / "plan.json", plan.as_dict())
        about = dataclasses.replace(about, trial=trial.number, values=values)
        files.write_json(run.sweep_file, about.as_dict())  # the last: the other ranks wait for it
        print(f"sweep: {said}", flush=True)
        return about
    raise RunError(f"{run.id}: the experiment refused {TRIES} points of the sweep, the last one since {problem}")


def _planned_again(old: Plan, new: Plan) -> Plan:
    """The new plan in the time and budget of the old one: the job has been queued with them."""
    return dataclasses.replace(new, time_s=old.time_s, gpu_hours=old.gpu_hours, core_hours=old.core_hours, notes=old.notes)
