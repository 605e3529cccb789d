"""The real DALI on the CPU: explicit draws give the crops of NumPy bit for bit."""

from __future__ import annotations

import os

import numpy as np
import pytest
from pixels import augmented, random_images

from hpc_cifar.config.experiment import Augment
from hpc_cifar.data import draws

pytestmark = pytest.mark.component("dali")

BATCH = 64


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    pytest.importorskip("nvidia.dali", reason="nvidia-dali-cuda130 is not installed")


@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_explicit_draws_equal_numpy(mode: str) -> None:
    from nvidia.dali import fn, pipeline_def, types

    images = random_images(BATCH)
    augment = Augment(crop_padding=4, flip="random", padding_mode=mode)
    drawn = draws.augmentation(11, 2, np.arange(BATCH), augment, 32)
    mean, std = [120.0, 121.0, 122.0], [60.0, 61.0, 62.0]

    float32 = types.FLOAT  # type: ignore[attr-defined]

    @pipeline_def(batch_size=BATCH, num_threads=len(os.sched_getaffinity(0)), device_id=None)
    def pipeline():  # type: ignore[no-untyped-def]
        pixels = fn.external_source(name="images", device="cpu", layout="HWC")
        start = fn.external_source(name="start", device="cpu")
        flip = fn.external_source(name="flip", device="cpu")
        cropped = fn.slice(pixels, start=start, shape=[32, 32], axes=[0, 1], out_of_bounds_policy="pad", fill_values=0)
        raw = fn.flip(cropped, horizontal=flip)
        normal = fn.crop_mirror_normalize(cropped, mirror=flip, mean=mean, std=std, dtype=float32, output_layout="CHW")
        return raw, normal

    # a reflected border cannot be drawn by `slice`: the images come with it already
    border = 4 if mode == "reflect" else 0
    fed = np.pad(images, ((0, 0), (border, border), (border, border), (0, 0)), mode="reflect") if border else images
    built = pipeline()
    built.build()
    built.feed_input("images", list(fed))
    starts = np.stack([drawn.dy, drawn.dx], axis=1).astype(np.int32) - 4 + border
    built.feed_input("start", list(starts))
    built.feed_input("flip", list(drawn.flip.astype(np.int32)))
    built.schedule_run()
    raw, normal = (part.as_array() for part in built.share_outputs())

    expected = augmented(images, drawn, augment)
    np.testing.assert_array_equal(raw, expected)
    # DALI multiplies by the reciprocal: the same crops to the last bit need the same arithmetic
    scale = (np.float32(1) / np.array(std, np.float32))[:, None, None]
    exact = (expected.transpose(0, 3, 1, 2).astype(np.float32) - np.array(mean, np.float32)[:, None, None]) * scale
    np.testing.assert_allclose(normal, exact, rtol=0, atol=2e-6)
    built.release_outputs()
