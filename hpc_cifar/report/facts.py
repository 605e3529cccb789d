"""What a report says about one run, from its directory alone: figures, curves, segments, cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import files, records
from ..config.claim import Claim
from ..config.experiment import Experiment
from ..errors import RunError
from ..records import Provenance, Result, SweepPlace
from ..runs import Run
from ..track import evaluated, identity
from ..track.rows import rows_but_steps, selected
from ..train import begun
from . import history

FIGURES = ("train_accuracy", "train_loss", "val_accuracy", "val_loss", "test_accuracy", "test_loss")
ENDED = ("finished", "requeued", "stopped", "cancelled", "failed")
COST = ("seconds", "gpu_hours", "restarts", "lost_steps", "host_memory_mib", "device_memory_mib", "checkpoint_seconds")


@dataclass(frozen=True)
class Segment:
    """A stretch of training by one process group: Unix seconds and updates; ``lost`` where nothing says how it ended."""

    begun: float
    ended: float
    first_step: int
    last_step: int
    ending: str


@dataclass(frozen=True)
class Facts:
    """One run. ``epochs`` are the rows of that kind in ``metrics.jsonl``, as they stand there.

    ``metric`` is what runs are ranked by: that of the sweep, if it is of one.

    ``figures`` are those of :data:`FIGURES` that are known, of the epoch that the run selected; ``evaluation`` is what
    ``hpc-cifar evaluate`` wrote about the test images, or the validation images, or ``{}``.
    """

    run: Run
    experiment: Experiment
    state: str
    reason: str
    figures: dict[str, float]
    cost: dict[str, float]
    epochs: list[dict[str, Any]]
    segments: list[Segment]
    steps: int
    data: str
    device: str
    world_size: int
    metric: str
    provenance: dict[str, Any]
    evaluation: dict[str, Any]
    evaluation_folder: Path | None
    warnings: tuple[str, ...] = ()  # why its figures may not be what they seem
    wandb: str | None = None  # its address there

    @property
    def id(self) -> str:
        return self.run.id

    @property
    def claim(self) -> Claim | None:
        return self.experiment.claim

    @property
    def restarted(self) -> bool:
        """Whether it has more than one segment."""
        return len(self.segments) > 1

    @property
    def goodput(self) -> float | None:
        """Share of the steps made that were not lost to an interruption and made again."""
        made = self.steps + self.cost.get("lost_steps", 0)
        return self.steps / made if made else None

    @property
    def images_per_second(self) -> float | None:
        """Median over the epochs."""
        rates = [row["images_per_second"] for row in self.epochs if row.get("images_per_second")]
        return statistics.median(rates) if rates else None

    @property
    def label(self) -> str:
        """What tells it from runs of the same experiment: seed, and fold."""
        fold = self.experiment.data.fold
        return f"seed {self.experiment.seed}" + (f", fold {fold}" if fold is not None else "")


def gather(run: Run, state: str = "", reason: str = "") -> Facts:
    """Read a run directory.

    Args:
        state: what the queue says; else what the run last wrote.
        reason: why, as the state.

    Raises:
        RunError: it is not a run directory.
    """
    experiment, said, last = run.experiment(), run.state(), run.result() or Result()
    place = records.read(SweepPlace, run.sweep_file) or SweepPlace()
    about = records.read(Provenance, run.path / "provenance.json") or Provenance()
    if problem := said.problem or last.problem or place.problem or about.problem:
        raise RunError(f"{run.path}: {problem}")
    manifest = begun.manifest(run)  # before the rows: those of a run that goes on have all that this one knows
    try:
        rows, damaged = rows_but_steps(run.metrics_file)
    except files.Damaged as error:
        raise RunError(f"{run.metrics_file}: {error}") from None
    epochs, best_step, warnings = history.trusted_epochs(run, experiment, rows, damaged, manifest)
    if changed := begun.changes(manifest, experiment):
        warnings.append(f"experiment.yaml was changed since its last checkpoint was made: {begun.words(changed)}")
    result = last.as_dict() if last.state == (said.state or last.state) else {}  # else it is of before the run went on
    both = {name: getattr(said, name) for name in ("state", "reason", "data", *COST) if hasattr(said, name)} | result
    evaluation, folder = _evaluation(run)
    return Facts(
        run=run,
        experiment=experiment,
        state=state or both.get("state") or "pending",
        reason=reason or both.get("reason") or "",
        figures=figures_of(experiment, epochs, result, best_step),
        cost={name: both[name] for name in COST if _is_cost(both.get(name))},
        epochs=epochs,
        segments=segments_of(rows, state or both.get("state") or ""),
        steps=both.get("steps") or said.step or 0,
        data=both.get("data") or experiment.data.dataset,
        device=said.device or "",
        world_size=said.world_size or 0,
        metric=place.metric,
        provenance=files.read_object(run.path / "provenance.json"),
        evaluation=evaluation,
        evaluation_folder=folder,
        warnings=tuple(warnings),
        wandb=identity.url_of(run),
    )


def _is_cost(value: Any) -> bool:
    """An earlier version took a clock that was set back for time that passed."""
    return isinstance(value, int | float) and value >= 0


def figures_of(
    experiment: Experiment, epochs: Sequence[dict[str, Any]], result: dict[str, Any], best_step: int | None = None
) -> dict[str, float]:
    """Accuracies and losses of the selected epoch and of the test, those that are known.

    Args:
        best_step: of the checkpoint that was selected, where that is known.
    """
    chosen = next((row for row in epochs if row["step"] == best_step), None) or selected(experiment, epochs)
    known = {**chosen, **result}
    return {name: float(known[name]) for name in FIGURES if isinstance(known.get(name), int | float)}


def _evaluation(run: Run) -> tuple[dict[str, Any], Path | None]:
    """What was said of the test images, or of the validation images; a file that is damaged or of another version is none."""
    for split in ("test", "validation"):
        folder = run.path / "evaluation" / split
        if found := evaluated.read(folder):
            return found, folder
    return {}, None


def segments_of(rows: Sequence[dict[str, Any]], state: str = "") -> list[Segment]:
    """The segments of a run, by its rows in the order they were written; the state of the run is that of an open one."""
    found: list[Segment] = []
    open_row: dict[str, Any] | None = None
    last: dict[str, Any] = {}
    for row in rows:
        event = row.get("event") if row.get("kind") == "event" else None
        if event == "started":
            if open_row is not None:
                found.append(_segment(open_row, last, "lost"))
            open_row = row
        if event != "staged":  # that is of the next one
            last = row
        if open_row is not None and event in ENDED:
            found.append(_segment(open_row, row, str(event)))
            open_row = None
    if open_row is not None:
        found.append(_segment(open_row, last, state if state in ENDED else "open"))
    return found


def _segment(first: dict[str, Any], last: dict[str, Any], ending: str) -> Segment:
    begun = float(first.get("time") or 0)
    steps = (first.get("step") or 0, last.get("step") or 0)
    return Segment(begun, max(begun, float(last.get("time") or 0)), *steps, ending)


def ranking(one: Facts) -> float | None:
    """What a run may be chosen by, larger is better: its figure on validation images. None where those are the test images."""
    value = one.figures.get(one.metric)
    if value is None or one.experiment.data.validation == "test":
        return None
    return -value if one.metric == "val_loss" else value


def foremost(facts: Sequence[Facts]) -> Facts | None:
    """The best by validation; the first one, where nothing may choose."""
    return max(facts, key=lambda one: -math.inf if (rank := ranking(one)) is None else rank, default=None)


def shown(facts: Sequence[Facts]) -> Facts | None:
    """The run whose evaluation stands for many, of those that have one."""
    return foremost([one for one in facts if one.evaluation])
