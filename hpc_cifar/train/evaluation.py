"""``evaluate``: figures and pictures of a trained run, in ``<run>/evaluation/<split>/``."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .. import files
from ..data.store import Arrays
from ..errors import UsageError
from ..evaluate import figures, maps, metrics
from ..evaluate.predict import PLAIN, probabilities, tta_views
from ..runs import now
from ..track import evaluated
from ..track.evaluated import Prediction
from .step import autocast
from .trained import Trained

SHIFT = 2  # pixels of the views of test-time augmentation


def evaluate(
    trained: Trained, split: str, *, tta: bool, pictures: bool, maps_of: int | None, out: Path | None = None
) -> tuple[dict[str, Any], Path]:
    """Write the evaluation of one split; its figures, and the folder.

    Args:
        split: ``test`` or ``validation``.
        tta: also average over mirrored and shifted views, beside the plain figures.
        pictures: draw them.
        maps_of: number of the image of the split whose feature maps are drawn.
        out: the folder, instead of that of the run.

    Raises:
        UsageError: there is no such split or image, or the folder cannot be written.
        DataError: its files are not what was written.
    """
    arrays, indices = trained.images(split)
    store = trained.prepared.store
    store.verify_again("test" if arrays is store.test else "train")
    if maps_of is not None and not 0 <= maps_of < len(indices):
        raise UsageError(f"--image {maps_of}: the {split} images are numbered 0 to {len(indices) - 1}")
    classes = trained.prepared.store.classes
    inference = partial(autocast, trained.precision, trained.device)
    plain, labels = probabilities(trained.network, trained.batches(arrays, indices), PLAIN, inference)
    result: dict[str, Any] = {
        "run": trained.run.id, "split": split, "data": trained.prepared.store.label, "checkpoint": trained.which,
        "epoch": trained.epoch, "step": trained.step, "evaluated": now(), **metrics.summary(plain, labels, classes),
    }  # fmt: skip
    folder = out or trained.run.path / "evaluation" / split
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written: {error.strerror or error}; --out FOLDER names another folder") from None
    wrong = metrics.misclassified(plain, labels)
    result["misclassified"] = [
        {
            "image": position,
            "class": classes[labels[position]],
            "predicted": classes[plain[position].argmax()],
            "confidence": float(plain[position].max()),
        }
        for position in wrong
    ]
    if tta:
        views = tta_views(SHIFT)
        averaged, _ = probabilities(trained.network, trained.batches(arrays, indices), views, inference)
        result["tta"] = {"views": len(views), **metrics.summary(averaged, labels, classes)}
    figures.tiles(arrays.images[indices[wrong]], folder / evaluated.MISTAKES)
    chosen = plain.argmax(1)
    evaluated.write_predictions(
        folder,
        [
            Prediction(position, int(label), int(chosen[position]), float(row[chosen[position]]), float(row[label]))
            for position, (row, label) in enumerate(zip(plain, labels, strict=True))
        ],
    )
    if pictures:
        figures.confusion(result["confusion"], classes, folder / "confusion.png")
        figures.reliability(result["calibration"], result["ece"], folder / "reliability.png")
        if trained.history:
            figures.curves(trained.history, folder / "curves.png")
        if wrong:
            titles = [f"{row['class']}\n{row['predicted']} {row['confidence']:.0%}" for row in result["misclassified"]]
            figures.images(
                arrays.images[indices[wrong]],
                titles,
                folder / "misclassified.png",
                "Most confident mistakes: class, prediction",
            )
    if maps_of is not None:
        _draw_maps(trained, arrays, indices[maps_of : maps_of + 1], maps_of, folder)
    files.write_sealed(folder / evaluated.FIGURES, result)
    return result, folder


def _draw_maps(trained: Trained, arrays: Arrays, chosen: npt.NDArray[np.int64], number: int, folder: Path) -> None:
    """The kernels of the first convolution, the chosen image, and the maps of every convolution and pool for it."""
    for old in folder.glob("maps-*.png"):
        old.unlink()
    kernels = maps.first_kernels(trained.network)
    if kernels is not None:
        figures.maps(kernels, folder / "kernels.png", f"{len(kernels)} kernels of the first convolution")
    image = next(trained.batches(arrays, chosen)).images
    with torch.no_grad(), autocast(trained.precision, trained.device):
        logits = trained.network(image).float().softmax(1)[0]
        found = maps.feature_maps(trained.network, image)
    name = trained.prepared.store.classes[int(logits.argmax())]
    title = f"image {number}: {name} {float(logits.max()):.0%}"
    figures.images(arrays.images[chosen], [title], folder / "maps-00-image.png", columns=1)
    for layer, (words, values) in enumerate(found, 1):
        plain = words.partition(" ")[0].replace(".", "_")
        shape = "x".join(map(str, values.shape))
        figures.maps(values, folder / f"maps-{layer:02}-{plain}.png", f"image {number}, layer {words}: {shape}")
