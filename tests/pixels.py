"""The slow, obvious way to apply draws: what every pipeline is compared with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hpc_cifar.config.experiment import Augment
from hpc_cifar.data.draws import Draws

Pixels = npt.NDArray[np.uint8]


def random_images(number: int, size: int = 32, seed: int = 0) -> Pixels:
    """uint8 (number, size, size, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (number, size, size, 3), dtype=np.uint8)


def augmented(images: Pixels, draws: Draws, augment: Augment) -> Pixels:
    """Pad, crop and flip, image by image; the padding is black or a reflection."""
    padding, size = augment.crop_padding, images.shape[1]
    mode = "reflect" if augment.padding_mode == "reflect" else "constant"
    result = np.empty_like(images)
    for number, image in enumerate(images):
        padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode=mode)
        y, x = int(draws.dy[number]), int(draws.dx[number])
        crop = padded[y : y + size, x : x + size]
        result[number] = crop[:, ::-1] if draws.flip[number] else crop
    return result
