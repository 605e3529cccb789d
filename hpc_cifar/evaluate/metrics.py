"""What a classifier's probabilities are worth: one dictionary of plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
BINS = 15
PAIRS = 10


def summary(probabilities: Floats, labels: Ints, classes: Sequence[str]) -> dict[str, Any]:
    """Loss, accuracies, figures by class, confusions and calibration.

    Args:
        probabilities: (n, classes), rows sum to 1.
        labels: (n,).
    """
    predicted = probabilities.argmax(1)
    names = list(range(len(classes)))
    scores = precision_recall_fscore_support(labels, predicted, labels=names, zero_division=0.0)
    precision, recall, f1, support = (np.asarray(values) for values in scores)
    matrix = confusion_matrix(labels, predicted, labels=names)
    bins = calibration(probabilities, labels)
    result: dict[str, Any] = {
        "images": len(labels),
        "accuracy": float((predicted == labels).mean()),
        "loss": float(-np.log(probabilities[np.arange(len(labels)), labels].clip(1e-300)).mean()),
        "top5_accuracy": top_k(probabilities, labels, 5),
        "macro": {"precision": float(precision.mean()), "recall": float(recall.mean()), "f1": float(f1.mean())},
        "per_class": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "images": int(n)}
            for name, p, r, f, n in zip(classes, precision, recall, f1, support, strict=True)
        },
        "confusion": matrix.tolist(),
        "most_confused": most_confused(matrix, classes),
        "ece": sum(row["images"] * abs(row["accuracy"] - row["confidence"]) for row in bins) / len(labels),
        "calibration": bins,
    }  # fmt: skip
    return result


def top_k(probabilities: Floats, labels: Ints, k: int) -> float:
    """Share, 0 to 1, of the images whose class is among the ``k`` most probable: probabilities (n, classes), labels (n,)."""
    k = min(k, probabilities.shape[1])
    best = np.argpartition(-probabilities, k - 1, axis=1)[:, :k]
    return float((best == labels[:, None]).any(1).mean())


def calibration(probabilities: Floats, labels: Ints, bins: int = BINS) -> list[dict[str, Any]]:
    """Images by the confidence of their prediction, in bins of equal width (Guo et al. 2017); empty ones are left out.

    Args:
        probabilities: (n, classes), each row of sum 1.
        labels: (n,).
    """
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    number = np.minimum((confidence * bins).astype(int), bins - 1)
    return [
        {
            "from": found / bins,
            "to": (found + 1) / bins,
            "images": int((number == found).sum()),
            "confidence": float(confidence[number == found].mean()),
            "accuracy": float(right[number == found].mean()),
        }
        for found in np.unique(number).tolist()
    ]


def most_confused(matrix: npt.ArrayLike, classes: Sequence[str], count: int = PAIRS) -> list[dict[str, Any]]:
    """Pairs of classes by how often one is taken for the other, either way.

    Args:
        matrix: (classes, classes) images, by their class and the predicted one.
    """
    wrong = np.asarray(matrix).copy()
    np.fill_diagonal(wrong, 0)
    both = [(int(wrong[a, b] + wrong[b, a]), a, b) for a in range(len(classes)) for b in range(a + 1, len(classes))]
    ordered = sorted((row for row in both if row[0]), key=lambda row: -row[0])[:count]
    return [
        {"pair": [classes[a], classes[b]], "images": images, "each_way": [int(wrong[a, b]), int(wrong[b, a])]}
        for images, a, b in ordered
    ]


def misclassified(probabilities: Floats, labels: Ints, count: int = 36) -> list[int]:
    """Positions of the wrong predictions that were made most confidently: probabilities (n, classes), labels (n,)."""
    predicted = probabilities.argmax(1)
    wrong = np.flatnonzero(predicted != labels)
    order = np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")
    return [int(position) for position in wrong[order][:count]]
