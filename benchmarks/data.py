"""Images per second of the data pipelines, beside a plain torchvision script, in interleaved rounds of one process.

    python benchmarks/data.py --images 20000 --rounds 5 --json data.json

Every round runs each candidate once on the same images, so that a busy machine slows all of them; the medians are compared.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from hpc_cifar import files
from hpc_cifar.config.experiment import Augment, Data
from hpc_cifar.data import pipeline
from hpc_cifar.data.store import Arrays, Store, moments_of
from hpc_cifar.errors import DataError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class PlainDataset(Dataset[Any]):
    """What torchvision.datasets.CIFAR10 does with its array."""

    def __init__(self, arrays: Arrays, count: int) -> None:
        self.images, self.labels = np.array(arrays.images[:count]), arrays.labels[:count].tolist()
        # the classes of almost every CIFAR-10 script; those of v2 are slower on single images and would flatter the rest
        steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        self.transform = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def arrays_of(dataset: str, count: int) -> tuple[Arrays, str]:
    try:
        store = Store.open(files.data_root(), dataset)
        return store.train, store.label
    except DataError:
        images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        return Arrays(images, np.arange(count, dtype=np.int64) % 10, moments_of(images)), "random pixels"


def candidates(arrays: Arrays, count: int, batch_size: int) -> dict[str, tuple[int, Callable[[int], Iterable[Any]]]]:
    """Name -> images of a round, and a function from the epoch to its batches. Slow ones get fewer images."""

    def ours(
        name: str, images: int, workers: int = 0, channels_last: bool = False
    ) -> tuple[int, Callable[[int], Iterable[Any]]]:
        augment = Augment(crop_padding=4, flip="random")
        config = Data(batch_size=batch_size, pipeline=name, augment=augment, workers=workers)  # type: ignore[arg-type]
        made = pipeline.build(
            config, arrays, np.arange(images), seed=0, rank=0, world_size=1, device="cpu", dtype=torch.float32,
            channels_last=channels_last, mean=MEAN, std=STD,
        )  # fmt: skip
        return images, made.batches

    def plain(images: int, workers: int) -> tuple[int, Callable[[int], Iterable[Any]]]:
        loader = DataLoader(PlainDataset(arrays, images), batch_size, shuffle=True, num_workers=workers)
        return images, lambda _: loader

    few = min(count, max(batch_size, count // 5))
    return {
        "torchvision, 0 workers": plain(few, 0),
        "torchvision, 2 workers": plain(few, 2),
        "reference, 0 workers": ours("reference", few, 0),
        "reference, 2 workers": ours("reference", few, 2),
        "resident": ours("resident", count),
        "resident, channels_last": ours("resident", count, channels_last=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="cifar10", help="a prepared dataset; random pixels where there is none")
    parser.add_argument("--images", type=int, default=50_000, help="of an epoch; a fifth of it for the slow pipelines")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="where the figures are written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    arrays, label = arrays_of(options.dataset, options.images)
    count = min(options.images, len(arrays.labels))
    rates: dict[str, list[float]] = {}
    for round_number in range(options.rounds + 1):
        for name, (images, batches) in candidates(arrays, count, options.batch_size).items():
            begin = time.perf_counter()
            seen = sum(len(batch.labels if isinstance(batch, pipeline.Batch) else batch[1]) for batch in batches(round_number))
            seconds = time.perf_counter() - begin
            assert seen == images
            if round_number:  # the first round loads and warms up
                rates.setdefault(name, []).append(seen / seconds)
    fastest = max(statistics.median(values) for name, values in rates.items() if name.startswith("torchvision"))
    print(f"{label}, batch {options.batch_size}, {options.threads} threads, median of {options.rounds} rounds")
    print(f"{'pipeline':26}{'images/s':>12}{'lowest':>12}{'highest':>12}{'x fastest plain':>17}")
    for name, values in rates.items():
        middle = statistics.median(values)
        print(f"{name:26}{middle:12,.0f}{min(values):12,.0f}{max(values):12,.0f}{middle / fastest:17.1f}")
    if options.json:
        versions = {module.__name__: module.__version__ for module in (torch, torchvision, np, numba)}
        facts = {"machine": platform.machine(), "cores": len(os.sched_getaffinity(0)), "cpu": cpu_name()}
        result = {"data": label, "n": options.rounds, "batch_size": options.batch_size, "threads": options.threads}
        result |= {"hardware": facts, "versions": {"python": platform.python_version(), **versions}, "images_per_second": rates}
        files.write_json(options.json.absolute(), result)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
