"""scikit-learn's bundled digits as 32 x 32 x 3 images: real data that needs no download."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .split import split

CLASSES = tuple("0123456789")
_TEST_SHARE = 0.2
_SPLIT_SEED = 0


def read() -> tuple[
    tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]], tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]], tuple[str, ...]
]:
    """1,797 digits, 80 % for training and 20 % for the test, stratified, always the same ones, and the names of the classes.

    Images are uint8 (n, 32, 32, 3), labels int64 (n,).

    Each of the 8 x 8 values from 0 to 16 becomes 4 x 4 pixels from 0 to 255, the same in three channels.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    values = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(values.repeat(4, axis=1).repeat(4, axis=2)[..., None], 3, axis=3)
    labels = digits.target.astype(np.int64)
    train, test = split(labels, _TEST_SHARE, _SPLIT_SEED)
    return (images[train], labels[train]), (images[test], labels[test]), CLASSES
