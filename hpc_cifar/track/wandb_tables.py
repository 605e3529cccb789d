"""An evaluation as tables of W&B: predictions with the worst ones first, a confusion matrix to point at, figures by class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import reading
from ..terminal import one_line
from . import evaluated
from .evaluated import Prediction

PANELS = ("classes", "confusion-matrix", "confusion-matrix_table", "predictions")  # a chart has its data as a table
MOST_ROWS = 1000  # of predictions
MOST_CLASSES = 100  # of a confusion matrix, so that its cells are no more than W&B shows of a table
MOST_LETTERS = 60  # of the name of a class


def files_of(folder: Path) -> list[Path]:
    """What the tables of a folder are made of; with another content they are other tables."""
    if not evaluated.read(folder):
        return []
    predictions = folder / evaluated.PREDICTIONS  # as it says when, evaluation.json is another file each time
    return [predictions if reading.is_regular(predictions) else folder / evaluated.FIGURES]


def tables(folder: Path) -> dict[str, Any]:
    """Tables and a chart for ``log`` of the client, by the names of panels; {} without a sound evaluation."""
    import wandb

    found = evaluated.read(folder)
    if not found:
        return {}
    known = names(list(found["per_class"]))
    figures = [
        [name, *(scores[key] for key in ("precision", "recall", "f1", "images"))]
        for name, scores in zip(known, found["per_class"].values(), strict=True)
    ]
    prefix = f"evaluation/{folder.name}"
    made: dict[str, Any] = {
        f"{prefix}-classes": wandb.Table(columns=["class", "precision", "recall", "f1", "images"], data=figures)
    }
    if len(known) <= MOST_CLASSES:
        cells = [
            [known[row], known[column], count]
            for row, counts in enumerate(found["confusion"])
            for column, count in enumerate(counts)
        ]
        made[f"{prefix}-confusion-matrix"] = wandb.plot_table(
            "wandb/confusion_matrix/v1",
            wandb.Table(columns=["Actual", "Predicted", "nPredictions"], data=cells),
            {name: name for name in ("Actual", "Predicted", "nPredictions")},
            {"title": f"Confusion of {found['images']:,} {folder.name} images"},
        )
    if rows := worst_first(evaluated.predictions(folder, len(known))):
        pictures = _pictures(folder, found)
        data = [
            [
                row.image, pictures.get(row.image), known[row.label], known[row.predicted], row.right, row.confidence, row.own,
            ]
            for row in rows
        ]  # fmt: skip
        columns: list[str | int] = ["image", "picture", "class", "predicted", "right", "confidence", "probability of its class"]
        made[f"{prefix}-predictions"] = wandb.Table(columns=columns, data=data)
    return made


def names(classes: Sequence[str]) -> list[str]:
    """Of classes, which an archive may have given any name: of bounded length, without what a terminal obeys, all different."""
    short = [one_line(name[: 2 * MOST_LETTERS])[:MOST_LETTERS] for name in classes]
    return short if len(set(short)) == len(short) else [f"{number} {name}" for number, name in enumerate(short)]


def worst_first(rows: Sequence[Prediction]) -> list[Prediction]:
    """Wrong ones, the most confident first; behind them the right ones of which it was least sure; a bounded number."""
    return sorted(rows, key=lambda row: (row.right, row.confidence if row.right else -row.confidence, row.image))[:MOST_ROWS]


def _pictures(folder: Path, found: dict[str, Any]) -> dict[int, Any]:
    """Those of the most confident mistakes, by the number of the image, as far as ``evaluate`` has kept them."""
    import wandb

    paths = {
        row["image"]: folder / evaluated.MISTAKES / f"{at:02}.png" for at, row in enumerate(found.get("misclassified", []))
    }
    return {image: wandb.Image(str(path)) for image, path in paths.items() if path.is_file() and not path.is_symlink()}
