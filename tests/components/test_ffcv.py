"""The real FFCV: what goes into a .beton comes out, and our draws decide what is cropped, whatever its own seed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from pixels import Pixels, augmented, random_images

from hpc_cifar.config.experiment import Augment
from hpc_cifar.data import draws

pytestmark = pytest.mark.component("ffcv")

NUMBER, BATCH = 96, 32


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    pytest.importorskip("ffcv", reason="ffcv is not installed: it needs libopencv-dev libturbojpeg0-dev pkg-config g++")


class Images:
    def __init__(self, images: Pixels) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Pixels, int]:
        return self.images[index], int(index)


@pytest.fixture(scope="module")
def images() -> Pixels:
    return random_images(NUMBER)


@pytest.fixture(scope="module")
def beton(images: Pixels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    path = tmp_path_factory.mktemp("ffcv") / "images.beton"
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(Images(images))
    return path


def loader(beton: Path, operations: list[object]) -> object:
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    return Loader(
        str(beton),
        batch_size=BATCH,
        num_workers=len(os.sched_getaffinity(0)),  # -1 would ignore the affinity that Slurm sets
        order=OrderOption.SEQUENTIAL,
        os_cache=True,
        drop_last=False,
        pipelines={"image": [SimpleRGBImageDecoder(), *operations], "label": [IntDecoder()]},
    )


def everything(batches: object) -> tuple[Pixels, list[int]]:
    pixels, labels = [], []
    for image, label in batches:  # type: ignore[attr-defined]
        pixels.append(np.array(image))  # its buffers are used again
        labels += np.array(label).ravel().tolist()
    return np.concatenate(pixels), labels


def test_reads_back_exactly(beton: Path, images: Pixels) -> None:
    pixels, labels = everything(loader(beton, []))
    assert labels == list(range(NUMBER))
    np.testing.assert_array_equal(pixels, images)


def test_our_draws_decide(beton: Path, images: Pixels) -> None:
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.operation import Operation

    augment = Augment(crop_padding=4, flip="random")
    drawn = draws.augmentation(7, 3, np.arange(NUMBER), augment, 32)

    class Drawn(Operation):  # type: ignore[misc]
        def generate_code(self):  # type: ignore[no-untyped-def]
            def crop(batch, destination, indices):  # type: ignore[no-untyped-def]
                part = draws.augmentation(7, 3, indices, augment, 32)
                destination[: len(batch)] = augmented(batch, part, augment)
                return destination[: len(batch)]

            crop.with_indices = True  # type: ignore[attr-defined]
            return crop

        def declare_state_and_memory(self, previous_state):  # type: ignore[no-untyped-def]
            from dataclasses import replace

            return replace(previous_state, jit_mode=False), AllocationQuery(previous_state.shape, previous_state.dtype)

    pixels, labels = everything(loader(beton, [Drawn()]))
    assert labels == list(range(NUMBER))
    np.testing.assert_array_equal(pixels, augmented(images, drawn, augment))
    assert (pixels != images).any()
