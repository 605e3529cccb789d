"""What ``evaluate`` has left in a folder of a run, read with care: its figures, and what it predicted of each image."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import files, reading, records
from ..records import Evaluation

FIGURES, PREDICTIONS, MISTAKES = "evaluation.json", "predictions.csv", "mistakes"
COLUMNS = ("image", "class", "predicted", "confidence", "probability_of_class")
MOST_BYTES = 2**26  # of predictions: more than a million images
EVALUATED = {"images", "split", "checkpoint", "step", "accuracy", "ece", "per_class", "confusion"}


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one image: its number in the split, numbers of classes, and probabilities of the predicted and of its own class."""

    image: int
    label: int
    predicted: int
    confidence: float
    own: float

    @property
    def right(self) -> bool:
        return self.label == self.predicted


def read(folder: Path) -> dict[str, Any]:
    """The figures; {} where they are missing, damaged, or of another version."""
    found = files.read_object(folder / FIGURES)
    return found if found.keys() >= EVALUATED and _is_evaluation(found) else {}


def write_predictions(folder: Path, rows: Sequence[Prediction]) -> None:
    """``predictions.csv``: a line an image, classes by number, probabilities with six digits."""
    lines = [",".join(COLUMNS)]
    lines += [f"{one.image},{one.label},{one.predicted},{one.confidence:.6g},{one.own:.6g}" for one in rows]
    files.write_text(folder / PREDICTIONS, "\n".join(lines) + "\n")


def predictions(folder: Path, classes: int) -> list[Prediction]:
    """Those of every image; none where the file is missing, or a line of it is not what was written.

    Args:
        classes: how many there are.
    """
    try:
        text = reading.read_bytes(folder / PREDICTIONS, MOST_BYTES).decode("ascii")
        head, *lines = csv.reader(text.splitlines(), strict=True)
        rows = [_prediction(line, classes) for line in lines]
    except (OSError, ValueError, csv.Error):
        return []
    return rows if tuple(head) == COLUMNS else []


def _prediction(line: list[str], classes: int) -> Prediction:
    image, label, predicted, confidence, own = line
    found = Prediction(int(image), int(label), int(predicted), float(confidence), float(own))
    inside = 0 <= found.label < classes and 0 <= found.predicted < classes and 0 <= found.image < 2**53
    if not (inside and all(math.isfinite(share) and 0 <= share <= 1.001 for share in (found.confidence, found.own))):
        raise ValueError("no prediction")
    return found


def _is_evaluation(found: dict[str, Any]) -> bool:
    """Whether all that is shown of it has the right shape."""
    scores, matrix, wrong = found["per_class"], found["confusion"], found.get("misclassified", [])
    if not records.is_sound(Evaluation, found) or not isinstance(scores, dict) or not isinstance(wrong, list):
        return False
    figures = [
        one.get(name) for one in scores.values() if isinstance(one, dict) for name in ("precision", "recall", "f1", "images")
    ]
    if len(figures) != 4 * len(scores) or not all(type(value) in (int, float) for value in figures):
        return False
    if not isinstance(matrix, list) or len(matrix) != len(scores):
        return False
    if not all(isinstance(row, list) and len(row) == len(matrix) and all(type(n) is int for n in row) for row in matrix):
        return False
    return all(isinstance(row, dict) and _is_mistake(row) for row in wrong)


def _is_mistake(row: dict[str, Any]) -> bool:
    names = isinstance(row.get("class"), str) and isinstance(row.get("predicted"), str)
    return names and type(row.get("image")) is int and type(row.get("confidence")) in (int, float)
