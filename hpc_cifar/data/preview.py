"""A contact sheet: the same augmented images from every pipeline, one row each, below the originals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from .. import files
from ..config.experiment import Augment
from . import bench, draws
from .store import Arrays

COLUMNS = 12
SCALE = 2  # each pixel is drawn so large, for images up to 64 pixels wide
AUGMENT = Augment(crop_padding=4, flip="random", cutout=8, rotation_degrees=10, shift_fraction=0.05)
_MARGIN, _TEXT = 6, 16


def write(arrays: Arrays, path: Path) -> tuple[list[str], dict[str, str]]:
    """Write a PNG.

    Returns:
        The names of the pipelines on it, and why the others are not.
    """
    count = min(COLUMNS, len(arrays.labels))
    names, missing = bench.installed(arrays)
    order = draws.order(0, 0, np.arange(count))
    rows = [("originals", np.asarray(arrays.images[order]))]
    for name in names:
        one = bench.build(name, arrays, count, count, augment=AUGMENT, workers=0 if name == "reference" else "auto")
        try:
            images = next(iter(one.batches(0))).images
        finally:
            one.close()
        pixels = ((images * 0.25 + 0.48) * 255).round().clamp(0, 255).to(torch.uint8)
        rows.append((name, pixels.permute(0, 2, 3, 1).numpy()))
    height, width = arrays.images.shape[1:3]
    scale = SCALE if width <= 64 else 1
    cell = (width * scale + _MARGIN, height * scale + _MARGIN + _TEXT)
    sheet = Image.new("RGB", (cell[0] * count + _MARGIN, cell[1] * len(rows) + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (name, images_) in enumerate(rows):
        top = number * cell[1] + _MARGIN
        draw.text((_MARGIN, top), name, fill="black")
        for column, image in enumerate(images_):
            picture = Image.fromarray(image if image.shape[2] == 3 else np.repeat(image[..., :1], 3, axis=2))
            enlarged = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (_MARGIN + column * cell[0], top + _TEXT))
    with files.atomic_file(path) as stream:
        sheet.save(stream, "PNG")
    return names, missing
