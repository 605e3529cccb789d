"""Figures of an evaluation as PNG files, by matplotlib without a display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Images = npt.NDArray[np.uint8]
DPI = 110
matplotlib.rcParams.update({"text.parse_math": False, "text.usetex": False})  # the name of a class is no formula


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=DPI)
    return path


def _new(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def confusion(matrix: npt.ArrayLike, classes: Sequence[str], path: Path) -> Path:
    """Rows are what the images are, columns what they are taken for; numbers where there are few enough classes."""
    table = np.asarray(matrix)
    side = max(5.0, 0.55 * len(classes) + 2) if len(classes) <= 30 else 12.0
    figure = _new(side + 1, side)
    axes = figure.subplots()
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axes, label="share of the class")
    axes.set(xlabel="predicted", ylabel="class", title=f"Confusion: {np.trace(table) / max(table.sum(), 1):.2%} right")
    if len(classes) <= 30:
        axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
        axes.set_yticks(range(len(classes)), classes)
        for row, column in np.ndindex(*table.shape):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(table[row, column]), ha="center", va="center", color=colour, fontsize=8)
    return _save(figure, path)


def tiles(images: Images, folder: Path) -> None:
    """Each image (N, H, W, C) as a file of its own, ``00.png`` and on; those of an earlier evaluation go."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for number, image in enumerate(images):
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(folder / f"{number:02}.png")


def reliability(bins: Sequence[Mapping[str, Any]], ece: float, path: Path) -> Path:
    """Accuracy over confidence, and how many images have it."""
    figure = _new(5.5, 6.5)
    upper, lower = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    left = [row["from"] for row in bins]
    width = bins[0]["to"] - bins[0]["from"] if bins else 1.0
    upper.plot([0, 1], [0, 1], "--", color="grey", label="calibrated")
    upper.bar(left, [row["accuracy"] for row in bins], width, align="edge", edgecolor="white", label="accuracy")
    upper.plot([row["confidence"] for row in bins], [row["accuracy"] for row in bins], "o", color="black", markersize=4)
    upper.set(ylabel="accuracy", ylim=(0, 1), xlim=(0, 1), title=f"Calibration: expected error {ece:.2%}")
    upper.legend()
    lower.bar(left, [row["images"] for row in bins], width, align="edge", edgecolor="white", color="grey")
    lower.set(xlabel="confidence", ylabel="images")
    return _save(figure, path)


def curves(history: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Loss, accuracy and learning rate over the epochs."""
    figure = _new(12, 3.8)
    loss, accuracy, rate = figure.subplots(1, 3)
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        for part, label in (("train", "training"), ("val", "validation")):
            rows = [row for row in history if row.get(f"{part}_{name}") is not None]
            marker = "o" if len(rows) == 1 else None
            axes.plot([row["epoch"] for row in rows], [row[f"{part}_{name}"] for row in rows], label=label, marker=marker)
        axes.set(xlabel="epoch", title=name.capitalize())
        axes.legend()
    rate.step([row["epoch"] for row in history], [row["lr"] for row in history], where="post", color="black")
    rate.set(xlabel="epoch", title="Learning rate")
    return _save(figure, path)


def images(pictures: Images, titles: Sequence[str], path: Path, title: str = "", columns: int = 9) -> Path:
    """A grid of uint8 (n, h, w, c) images with a line above each."""
    rows = max(1, math.ceil(len(pictures) / columns))
    figure = _new(1.35 * columns, 1.6 * rows + 0.5)
    if title:
        figure.suptitle(title)
    for axes, picture, words in zip(figure.subplots(rows, columns, squeeze=False).flat, pictures, titles, strict=False):
        axes.imshow(picture if picture.shape[2] >= 3 else picture[..., 0], cmap=None if picture.shape[2] >= 3 else "gray")
        axes.set_title(words, fontsize=7)
    for axes in figure.axes:
        axes.set_axis_off()
    return _save(figure, path)


def maps(values: npt.NDArray[np.float32], path: Path, title: str) -> Path:
    """A grid of (n, h, w) maps or (n, h, w, 3) kernels, each scaled to its own range."""
    columns = min(16, max(1, math.ceil(math.sqrt(len(values)))))
    rows = math.ceil(len(values) / columns)
    gap = max(1, values.shape[1] // 12)
    height, width = values.shape[1] + gap, values.shape[2] + gap
    sheet = np.full((rows * height + gap, columns * width + gap, *values.shape[3:]), np.nan if values.ndim == 3 else 1.0)
    for number, value in enumerate(values):
        low, high = float(value.min()), float(value.max())
        top, left = gap + number // columns * height, gap + number % columns * width
        scaled = (value - low) / (high - low) if high > low else np.zeros_like(value)
        sheet[top : top + value.shape[0], left : left + value.shape[1]] = scaled
    figure = _new(max(4.0, 0.55 * columns), max(2.0, 0.55 * rows * height / width + 0.5))
    axes = figure.subplots()
    axes.imshow(sheet, cmap="viridis" if sheet.ndim == 2 else None, interpolation="nearest", vmin=0, vmax=1)
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()
    return _save(figure, path)
