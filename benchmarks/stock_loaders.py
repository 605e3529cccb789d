"""What a user would write with each library, as its own examples do: torchvision, FFCV and DALI, nothing of ours in them.

Crop with 4 pixels of padding, flip, normalise; float32 NCHW on the CPU.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

MEAN, STD = (0.48, 0.48, 0.48), (0.25, 0.25, 0.25)
Loader = Callable[[int], Iterable[Any]]


class PlainDataset(Dataset[Any]):
    """What torchvision.datasets.CIFAR10 does with its array."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = np.array(images), labels.tolist()
        # the classes of almost every CIFAR-10 script; those of v2 are slower on single images and would flatter the rest
        steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        self.transform = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def torchvision(images: np.ndarray, labels: np.ndarray, batch_size: int, workers: int) -> Loader:
    loader = DataLoader(
        PlainDataset(images, labels), batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    return lambda _: loader


class _Samples:
    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        return np.array(self.images[index]), int(self.labels[index])


def ffcv(images: np.ndarray, labels: np.ndarray, batch_size: int, workers: int) -> Loader:
    """Its CIFAR example without a GPU and without cut-out: its writer, decoder, flip, translation. Its own normalisation takes
    the place of torchvision's, which the example runs on the GPU and which is slower here.
    """
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader as FfcvLoader
    from ffcv.loader import OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, RandomTranslate, Squeeze, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter

    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "stock.beton"
    threads = torch.get_num_threads()
    writer = DatasetWriter(str(path), {"image": RGBImageField(), "label": IntField()}, num_workers=workers)
    writer.from_indexed_dataset(_Samples(images, labels))
    mean, std = ([255 * value for value in values] for values in (MEAN, STD))
    steps: list[Any] = [
        SimpleRGBImageDecoder(), RandomHorizontalFlip(), RandomTranslate(padding=4, fill=tuple(map(int, mean))),
        NormalizeImage(np.array(mean), np.array(std), np.float32), ToTensor(), ToTorchImage(channels_last=False),
    ]  # fmt: skip
    loader = FfcvLoader(
        str(path), batch_size=batch_size, num_workers=workers, order=OrderOption.RANDOM, os_cache=True, drop_last=False,
        pipelines={"image": steps, "label": [IntDecoder(), ToTensor(), Squeeze()]},
    )  # fmt: skip
    torch.set_num_threads(threads)
    return lambda _, kept=folder: loader  # type: ignore[misc]  # the file goes with the loader


def dali(images: np.ndarray, labels: np.ndarray, batch_size: int, workers: int) -> Loader:
    """A shuffled external source and DALI's own random numbers, through its iterator for PyTorch."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    class Source:
        def __init__(self) -> None:
            self.random = np.random.default_rng(0)

        def __iter__(self) -> Iterator[Any]:
            order = self.random.permutation(len(labels))
            for first in range(0, len(order), batch_size):
                chosen = order[first : first + batch_size]
                yield images[chosen], labels[chosen]

    @pipeline_def(batch_size=batch_size, num_threads=workers, device_id=None, seed=1)
    def pipeline() -> Any:
        pixels, targets = fn.external_source(source=Source(), num_outputs=2, cycle="raise", layout=["HWC", ""])
        cropped = fn.crop_mirror_normalize(
            fn.paste(pixels, ratio=1.25, fill_value=0), crop=(32, 32), crop_pos_x=fn.random.uniform(range=(0.0, 1.0)),
            crop_pos_y=fn.random.uniform(range=(0.0, 1.0)), mirror=fn.random.coin_flip(),
            mean=[255 * value for value in MEAN], std=[255 * value for value in STD], dtype=types.FLOAT, output_layout="CHW",
        )  # fmt: skip
        return cropped, targets

    iterator = DALIGenericIterator(pipeline(), ["images", "labels"], last_batch_policy=LastBatchPolicy.PARTIAL, auto_reset=True)

    def epoch(_: int) -> Iterator[Any]:
        for [batch] in iterator:
            yield batch["images"], batch["labels"]

    return epoch


def threads() -> int:
    return len(os.sched_getaffinity(0))
