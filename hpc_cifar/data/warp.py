"""Rotate and shift whole batches on their device, after any pipeline.

The same torch operations for all pipelines, so these images are the same if those before were. Bilinear, as in the sources'
Keras generators, which turn an image about its centre first and shift it then.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.experiment import Augment
from .draws import Warps

_MODES = {"nearest": "border", "reflect": "reflection", "black": "zeros"}


class Warp:
    """Warps normalised batches.

    Args:
        black: (C,) the normalised value of a black pixel.
    """

    def __init__(self, augment: Augment, black: Tensor, device: torch.device) -> None:
        self._mode = _MODES[augment.warp_fill]
        self._black = black.to(device)[:, None, None] if augment.warp_fill == "black" else None

    def __call__(self, images: Tensor, warps: Warps) -> Tensor:
        """``images`` (n,C,H,W) after its n warps, in the same type and memory format."""
        if not len(images):
            return images
        height, width = images.shape[2:]
        wide = images.to(torch.promote_types(images.dtype, torch.float32))
        rows = torch.stack([torch.from_numpy(values) for values in (warps.angle, warps.down, warps.across)])
        angle, down, across = rows.to(images.device, wide.dtype, non_blocking=True)
        # where each finished pixel lies in the given image, in units of half its size: undo the shift, then the rotation
        cos, sin, ratio = angle.cos(), angle.sin(), height / width
        x, y = -2 * across, -2 * down
        # element by element: torch's affine_grid is a matrix product, which TF32 or autocast would round to parts of a pixel
        column, row = (2 * torch.arange(side, device=wide.device, dtype=wide.dtype) + 1 for side in (width, height))
        column = column / width - 1 + x[:, None]  # (n,W)
        row = row / height - 1 + y[:, None]  # (n,H)
        cos, sin = cos[:, None, None], sin[:, None, None]
        grid = torch.stack(
            [
                cos * column[:, None, :] - sin * ratio * row[:, :, None],
                sin / ratio * column[:, None, :] + cos * row[:, :, None],
            ],
            dim=3,
        )
        if self._black is not None:
            wide = wide - self._black
        wide = F.grid_sample(wide, grid, mode="bilinear", padding_mode=self._mode, align_corners=False)
        if self._black is not None:
            wide = wide + self._black
        channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
        return wide.to(images.dtype).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
