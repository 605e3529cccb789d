"""Class probabilities of a network, of the images as they are or averaged over views of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.pipeline import Batch


@dataclasses.dataclass(frozen=True)
class View:
    """One way to look at an image: mirrored or not, shifted by so many pixels with the edge reflected."""

    flip: bool = False
    down: int = 0
    across: int = 0

    def __call__(self, images: Tensor) -> Tensor:
        """``images`` (n, c, h, w) as seen."""
        reach = max(abs(self.down), abs(self.across))
        if reach:
            height, width = images.shape[2:]
            padded = F.pad(images, (reach,) * 4, mode="reflect")
            images = padded[:, :, reach - self.down :, reach - self.across :][:, :, :height, :width]
        return images.flip(3) if self.flip else images


PLAIN = (View(),)


def tta_views(shift: int = 2) -> tuple[View, ...]:
    """The image and its mirror image, each as it is and shifted diagonally in four directions."""
    places = [(0, 0), *((down, across) for down in (-shift, shift) for across in (-shift, shift))]
    return tuple(View(flip, down, across) for flip in (False, True) for down, across in (places if shift else places[:1]))


@torch.no_grad()
def probabilities(
    network: nn.Module,
    batches: Iterable[Batch],
    views: Sequence[View] = PLAIN,
    inference: Callable[[], Any] = contextlib.nullcontext,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Softmax of the logits, averaged over ``views``: float64 (n, classes), and labels (n,).

    Args:
        network: in evaluation mode.
        inference: a context for the forward pass, such as autocast.
    """
    found, labels = [], []
    for batch in batches:
        total: Tensor | None = None
        for view in views:
            with inference():
                logits = network(view(batch.images))
            softmax = logits.double().softmax(1)
            total = softmax if total is None else total + softmax
        assert total is not None
        found.append((total / len(views)).cpu())
        labels.append(batch.labels.cpu())
    return torch.cat(found).numpy(), torch.cat(labels).numpy()
