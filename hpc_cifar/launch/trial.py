"""What a run of a sweep tells the study while it trains and when it has ended; rank 0 only.

Nothing that goes wrong with the study's file reaches the training: whatever asks it is a thread of its own, which is waited for
so long and no longer, and what it says is printed once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .. import files, records
from ..config.expand import Point
from ..config.sweep import Sweep
from ..errors import RunBusy, RunError, first_line
from ..records import SweepPlace
from ..runs import Run, in_one_line
from ..track.rows import epochs_of, selected
from . import study

ANSWER_S = 5.0  # an epoch waits so long; a later answer counts at the next one's end
LAST_S = 20.0
RESUMED = "resumed"  # of a trial, the number of that which it goes on from


class Trial:
    """A run's trial.

    Args:
        about: what ``sweep.json`` holds.
    """

    def __init__(self, run: Run, about: SweepPlace) -> None:
        self._run, self._number, self._name = run, about.trial, about.study
        self._journal: Path = (run.path / about.journal).resolve()
        self._point = Point(sweep_of(run, about), about.number, about.values)
        self._experiment = run.experiment()
        self._asking: threading.Thread | None = None
        self._given_up = self._said = False

    def gives_up(self, row: dict[str, Any]) -> bool:
        """Tell the figure of a finished epoch; whether the run is to end here. A sweep that prunes nothing asks nobody."""
        value, epoch = row.get(self._point.sweep.metric), int(row["epoch"])
        if self._point.sweep.prune is None or value is None or epoch >= self._experiment.epochs:
            return False
        if self._asking is None or not self._asking.is_alive():
            self._asking = self._aside(lambda: self._report(float(value), epoch))
        self._asking.join(ANSWER_S)
        return self._given_up

    def _report(self, value: float, epoch: int) -> None:
        opened, trial = self._open()
        if opened.get_trials(deepcopy=False)[self._number].state.is_finished():  # it has failed once
            return
        trial.report(value, epoch)
        self._given_up = bool(trial.should_prune())

    def ended(self, result: dict[str, Any]) -> None:
        """Tell how a run ended, if it did: finished, with the figure of the epoch that it selected, pruned, or failed.

        One that has failed may be resumed, but what Optuna was told of a trial stays: such a run finishes as a second trial of
        the same values.
        """
        state = result.get("state")
        if state in ("finished", "failed") or result.get("reason") == "pruned":
            self._aside(lambda: self._tell(str(state))).join(LAST_S)

    def _tell(self, state: str) -> None:
        library = study.optuna()
        states = library.trial.TrialState
        rows = epochs_of(files.read_json_lines(self._run.metrics_file))
        value = selected(self._experiment, rows).get(self._point.sweep.metric)
        opened, trial = self._open()
        known = opened.get_trials(deepcopy=False)
        [before] = [one for one in known if one.number == self._number]
        if state == "finished" and value is not None:
            if not before.state.is_finished():
                opened.tell(trial, float(value))
            elif before.state == states.FAIL and not any(one.user_attrs.get(RESUMED) == self._number for one in known):
                about = {"params": before.params, "distributions": before.distributions, "user_attrs": {RESUMED: self._number}}
                opened.add_trial(library.trial.create_trial(state=states.COMPLETE, value=float(value), **about))
        else:
            told = states.PRUNED if state == "stopped" else states.FAIL
            opened.tell(trial, state=told, skip_if_finished=True)

    def _open(self) -> tuple[Any, Any]:
        opened = study.open_study(self._journal, self._name, self._point)
        [found] = [one for one in opened.get_trials(deepcopy=False) if one.number == self._number]
        return opened, study.optuna().Trial(opened, found._trial_id)

    def _aside(self, work: Callable[[], None]) -> threading.Thread:
        def tried() -> None:
            try:
                work()
            except Exception as error:
                if not self._said:
                    self._said = True
                    print(f"sweep: {self._journal}: {first_line(error)}; the run goes on without it", flush=True)

        thread = threading.Thread(target=tried, name="sweep", daemon=True)
        thread.start()
        return thread


def ended(run: Run, rank: int, result: dict[str, Any], error: Exception | None = None) -> None:
    """Tell the study of a run that has ended, if it is of a sweep. Another job that trains it tells for itself."""
    if rank != 0 or isinstance(error, RunBusy):
        return
    with contextlib.suppress(RunError):  # a damaged one has been told as the run began
        if (about := place(run)) is not None and about.trial is not None:
            Trial(run, about).ended(result)


def place(run: Run) -> SweepPlace | None:
    """The run's place in a sweep; None where nobody has written it.

    Raises:
        RunError: it is damaged.
    """
    found = records.read(SweepPlace, run.sweep_file)
    if found is not None and found.problem:
        raise RunError(f"{run.path}: {found.problem}")
    return found


def sweep_of(run: Run, about: SweepPlace) -> Sweep:
    """What was asked for.

    Raises:
        RunError: it is damaged, or of another version.
    """
    try:
        return Sweep.model_validate(about.sweep)
    except ValidationError as error:
        raise RunError(f"{run.sweep_file}: cannot be read back: {in_one_line(error)}") from None
