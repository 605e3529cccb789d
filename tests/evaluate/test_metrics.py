"""Figures of a classifier against their definitions, and the views of test-time augmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hpc_cifar.data.pipeline import Batch
from hpc_cifar.evaluate import metrics
from hpc_cifar.evaluate.predict import PLAIN, View, probabilities, tta_views

CLASSES = ("cat", "dog", "bird")
# three cats, two dogs, no bird; a cat is taken for a dog, a dog for a bird
GIVEN = np.array([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.9, 0.0], [0.3, 0.2, 0.5]])
LABELS = np.array([0, 0, 0, 1, 1])


def test_figures_are_those_of_their_definitions() -> None:
    found = metrics.summary(GIVEN, LABELS, CLASSES)
    assert (found["images"], found["accuracy"]) == (5, 0.6)
    assert found["loss"] == pytest.approx(-np.log([0.8, 0.6, 0.2, 0.9, 0.2]).mean())
    assert found["per_class"]["cat"] == {
        "precision": 1.0,
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(0.8),
        "images": 3,
    }
    assert found["per_class"]["dog"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "images": 2}
    assert found["per_class"]["bird"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "images": 0}
    assert found["macro"]["f1"] == pytest.approx((0.8 + 0.5) / 3)
    assert found["confusion"] == [[2, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert found["most_confused"] == [
        {"pair": ["cat", "dog"], "images": 1, "each_way": [1, 0]},
        {"pair": ["dog", "bird"], "images": 1, "each_way": [1, 0]},
    ]
    assert found["top5_accuracy"] == 1.0 and metrics.top_k(GIVEN, LABELS, 2) == 0.8
    assert metrics.misclassified(GIVEN, LABELS) == [2, 4], "the most confident first"


def test_calibration_is_the_mean_gap_between_confidence_and_accuracy() -> None:
    sure = np.array([[0.95, 0.05]] * 10)
    labels = np.array([0] * 7 + [1] * 3)
    found = metrics.summary(sure, labels, ("a", "b"))
    [row] = found["calibration"]
    assert (row["images"], row["confidence"], row["accuracy"]) == (10, pytest.approx(0.95), 0.7)
    assert found["ece"] == pytest.approx(0.25)
    perfect = metrics.summary(np.array([[1.0, 0.0]] * 4), np.zeros(4, np.int64), ("a", "b"))
    assert (perfect["ece"], perfect["loss"], perfect["most_confused"]) == (0.0, 0.0, [])


def test_an_impossible_class_has_a_finite_loss() -> None:
    assert np.isfinite(metrics.summary(np.array([[1.0, 0.0]]), np.array([1]), ("a", "b"))["loss"])


def test_views_mirror_and_shift_with_a_reflected_edge() -> None:
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert torch.equal(View()(image), image)
    assert torch.equal(View(flip=True)(image), image.flip(3))
    down = View(down=1)(image)[0, 0]
    assert torch.equal(down[1:], image[0, 0, :3]) and torch.equal(down[0], image[0, 0, 1])
    across = View(across=-2)(image)[0, 0]
    assert torch.equal(across[:, :2], image[0, 0, :, 2:]) and torch.equal(across[:, 2], image[0, 0, :, 2])
    views = tta_views(2)
    assert len(set(views)) == 10 and View() in views and View(True, -2, 2) in views
    assert tta_views(0) == (View(), View(True))


def test_probabilities_are_averaged_over_the_views() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)).eval()
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    batches = [Batch(images[:4], labels[:4], 0, 6), Batch(images[4:], labels[4:], 1, 6)]
    found, seen = probabilities(network, batches, tta_views(1))
    expected = sum(network(view(images)).double().softmax(1) for view in tta_views(1)) / 10
    assert np.allclose(found, expected.detach().numpy(), atol=1e-7) and np.array_equal(seen, labels.numpy())  # type: ignore[attr-defined]
    plain, _ = probabilities(network, batches, PLAIN)
    assert np.allclose(plain, network(images).double().softmax(1).detach().numpy(), atol=1e-7)
    assert not np.allclose(plain, found)


def test_the_name_of_a_class_is_no_formula(tmp_path: Path) -> None:
    from hpc_cifar.evaluate import figures

    names = [r"$\bad_{$", "a$b", "$", "_^{}"]
    figures.confusion(np.eye(4, dtype=int), names, tmp_path / "confusion.png")
    figures.images(np.zeros((4, 8, 8, 3), np.uint8), names, tmp_path / "images.png", names[0])
    assert (tmp_path / "confusion.png").stat().st_size and (tmp_path / "images.png").stat().st_size
