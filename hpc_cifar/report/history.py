"""The epochs of a run: the rows of ``metrics.jsonl``, or, where those are damaged, the history that its checkpoint holds.

Which epoch a run selected follows from the rows, so a line that is gone would change its figures without a word. The manifests
of its checkpoints say what the rows have to agree with; only where they do not is a checkpoint read, and verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import owner
from ..config.experiment import Experiment
from ..errors import HpcCifarError, first_line
from ..runs import Run
from ..track.rows import selected
from ..train import begun


def trusted_epochs(
    run: Run, experiment: Experiment, rows: Sequence[dict[str, Any]], damaged: int, manifest: dict[str, Any]
) -> tuple[list[dict[str, Any]], int | None, list[str]]:
    """Its rows of epochs, the step of the checkpoint that is the best one (None where nothing says so), and what to warn of.

    Args:
        rows, damaged: from :func:`hpc_cifar.track.rows.rows_but_steps`.
        manifest: of its newest checkpoint.
    """
    epochs = [row for row in rows if row["kind"] == "epoch"]
    problem = _disagreement(run, experiment, epochs, manifest)
    best = manifest.get("best_step") if experiment.checkpoint.select == "best" else None
    if not damaged and not problem:
        return epochs, best, []
    lines = f"metrics.jsonl has {damaged} damaged line{'s' if damaged > 1 else ''}" if damaged else ""
    what = "; ".join(filter(None, (lines, problem)))
    if not manifest:
        return epochs, best, [f"{what}, and no checkpoint says what is missing: its figures may be those of another epoch"]
    if not owner.is_own(run.path):
        return epochs, best, [f"{what}; its checkpoint is another user's and is not read: its figures may be wrong"]
    from ..train import checkpoint  # with torch

    try:
        good, state, _ = checkpoint.newest_read(run.checkpoints)
        history = state["history"] if good is not None else []
    except (HpcCifarError, KeyError) as error:
        return epochs, best, [f"{what}; its checkpoints cannot be read ({first_line(error)}): its figures may be wrong"]
    if good is None:
        return epochs, best, [f"{what}, and no checkpoint says what is missing: its figures may be those of another epoch"]
    kept = [row for row in epochs if row["step"] > good.step]
    best = good.best_step if experiment.checkpoint.select == "best" else None
    return [*history, *kept], best, [f"{what}; the epochs are those of its verified checkpoint of step {good.step}"]


def _disagreement(run: Run, experiment: Experiment, epochs: Sequence[dict[str, Any]], manifest: dict[str, Any]) -> str:
    """In what the rows differ from what the newest checkpoint, and the best one, say of them; "" where they agree."""
    step, epoch = manifest.get("step"), manifest.get("epoch")
    if not isinstance(step, int) or not isinstance(epoch, int):
        return ""
    until = [row for row in epochs if row["step"] <= step]
    if len(until) != epoch or [row["epoch"] for row in until] != list(range(1, epoch + 1)):
        return f"metrics.jsonl does not have the epochs 1 to {epoch} that the checkpoint of step {step} has"
    best = manifest.get("best_step")
    if experiment.checkpoint.select == "best" and isinstance(best, int):
        told = selected(experiment, until).get("step")
        if told != best:
            return (
                f"by metrics.jsonl the best epoch is that of step {told}, by the checkpoint of step {step} that of step {best}"
            )
    newest = until[-1:]
    of_best = [row for row in until if row["step"] == best]
    about = begun.manifest(run, "best") if best is not None and best != step else {}
    about = about if about.get("step") == best else {}  # a run that goes on has a better one by now
    for row, said in ((newest, manifest), (of_best, about)):
        figures = said.get("metrics")
        if row and isinstance(figures, dict) and (wrong := [name for name in figures if row[0].get(name) != figures[name]]):
            return f"the {wrong[0]} of epoch {row[0]['epoch']} in metrics.jsonl is not that of the checkpoint"
    return ""
