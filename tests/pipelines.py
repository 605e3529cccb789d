"""Pipelines over random images, and the slow, obvious way to the same pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from hpc_cifar.config.experiment import Augment, Data
from hpc_cifar.data import draws, pipeline
from hpc_cifar.data.store import Arrays

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
COUNT = 700
SEED = 3
COMMON: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "channels_last": False, "mean": MEAN, "std": STD}
NOTHING = Augment()
FFCV = pytest.param("ffcv", marks=pytest.mark.component("ffcv"))
DALI = pytest.param("dali", marks=pytest.mark.component("dali"))
NAMES = ["resident", "reference", FFCV, DALI]
AUGMENTS = [
    Augment(),
    Augment(flip="random"),
    Augment(flip="alternating", crop_padding=2),
    *(Augment(crop_padding=p, padding_mode=m, flip="random") for p in (1, 4, 31) for m in ("zero", "reflect")),
    Augment(crop_padding=40, flip="random"),  # a crop may miss the image altogether
    Augment(crop_padding=5, padding_mode="constant", padding_value=200, flip="random"),
    Augment(crop_padding=9, padding_mode="constant", padding_value=(10, 255, 77), flip="alternating", cutout=11),
    *(Augment(crop_padding=4, flip="random", cutout=c) for c in (1, 8, 13, 64)),
]


def shown(augment: Augment) -> str:
    """A short name of a case."""
    return "-".join(f"{name}={value}" for name, value in augment.model_dump(exclude_defaults=True).items()) or "nothing"


def make(arrays: Arrays, name: str, augment: Augment = NOTHING, indices: Any = None, **options: Any) -> pipeline.Pipeline:
    config = Data(
        batch_size=options.pop("batch_size", 64),
        pipeline=name,
        augment=augment,
        workers=options.pop("workers", "auto" if name != "reference" else 0),
        normalize=options.pop("normalize", "mean_std"),
    )
    settings = COMMON | {"seed": SEED, "rank": 0, "world_size": 1}
    return pipeline.build(config, arrays, np.arange(COUNT) if indices is None else indices, **settings | options)


def plain(arrays: Arrays, samples: Sequence[int], augment: Augment, epoch: int, seed: int = SEED) -> npt.NDArray[np.uint8]:
    """The raw pixels by numpy, as simply as can be: uint8 (n,H,W,C)."""
    height, width, channels = arrays.images.shape[1:]
    drawn = draws.augmentation(seed, epoch, samples, augment, height, width)
    result = []
    for row, sample in enumerate(samples):
        p = augment.crop_padding
        if augment.padding_mode == "reflect":
            image = np.pad(arrays.images[sample], ((p, p), (p, p), (0, 0)), mode="reflect")
        else:
            image = np.empty((height + 2 * p, width + 2 * p, channels), np.uint8)
            image[:] = augment.padding_values(channels)
            image[p : p + height, p : p + width] = arrays.images[sample]
        image = image[drawn.dy[row] : drawn.dy[row] + height, drawn.dx[row] : drawn.dx[row] + width]
        image = (image[:, ::-1] if drawn.flip[row] else image).copy()
        top, left = drawn.cut_y[row] - augment.cutout // 2, drawn.cut_x[row] - augment.cutout // 2
        image[max(top, 0) : max(top + augment.cutout, 0), max(left, 0) : max(left + augment.cutout, 0)] = 0
        result.append(image)
    return np.stack(result)


def raw(images: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Back from normalised (n,C,H,W) to uint8 (n,H,W,C)."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    result: npt.NDArray[np.uint8] = ((images.float() * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return result
