"""Images/s of one training epoch: this package's trainer beside a plain PyTorch + torchvision DataLoader script.

    python benchmarks/epoch.py                          # deep300's network, batch 664, three interleaved rounds
    python benchmarks/epoch.py --job quickstart --steps 20

Both train the same network with the same optimizer on the same stored images, in float32 with the same number of threads, turn
by turn in one process; the ratio of each round is what counts. ``plain`` is what a user would write: torchvision transforms
on PIL images (random crop with padding 4, flip, normalise), a DataLoader with two workers, NCHW tensors, SGD.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from hpc_cifar import files
from hpc_cifar.config.experiment import Augment, Experiment
from hpc_cifar.config.load import load_experiment
from hpc_cifar.config.packaged import find_job
from hpc_cifar.data import pipeline as data
from hpc_cifar.models.build import build
from hpc_cifar.plan import make_plan, requested_placement
from hpc_cifar.train import optim
from hpc_cifar.train.distributed import connect, gradient_sync
from hpc_cifar.train.setup import Prepared, choose_channels_last, prepare_data
from hpc_cifar.train.step import Stepper

Rows = tuple[Tensor, Tensor]


class Images(Dataset[Rows]):
    """What torchvision's CIFAR10 does for one sample: array to PIL, transform to a tensor."""

    def __init__(self, prepared: Prepared) -> None:
        self._images = prepared.store.train.images
        self._labels = prepared.store.train.labels
        self._indices = prepared.train_indices
        self._transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(self._images.shape[1], padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(prepared.mean.tolist(), prepared.std.tolist()),
            ]
        )

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> Rows:
        index = self._indices[position]
        return self._transform(self._images[index]), torch.tensor(self._labels[index])


def plain_steps(experiment: Experiment, prepared: Prepared) -> Iterator[int]:
    """Images of each step of a plain script, after the step was made."""
    torch.manual_seed(experiment.seed)
    network = build(experiment.model, prepared.store.image_shape)
    config = experiment.optimizer
    momentum = getattr(config, "momentum", 0.9)
    optimizer = torch.optim.SGD(network.parameters(), lr=config.lr / 10, momentum=momentum)
    loader = DataLoader(Images(prepared), batch_size=experiment.data.batch_size, shuffle=True, num_workers=2)
    for images, labels in itertools.chain.from_iterable(itertools.repeat(loader)):
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
        yield len(labels)


def our_steps(experiment: Experiment, prepared: Prepared, pipeline_name: str) -> Iterator[int]:
    """Images of each step of this package's trainer, after the step was made."""
    world = connect()
    torch.manual_seed(experiment.seed)
    network = build(experiment.model, prepared.store.image_shape)
    channels_last = choose_channels_last(experiment)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    plan = make_plan(experiment, requested_placement(experiment.resources), len(prepared.store.train.labels))
    optimizer = optim.build(experiment.optimizer, network.parameters())
    sync = gradient_sync("auto", network, world)
    stepper = Stepper(experiment, sync, optimizer, None, world, torch.float32, plan)
    pipeline = data.build(
        experiment.data.model_copy(update={"pipeline": pipeline_name}),
        prepared.store.train,
        prepared.train_indices,
        seed=experiment.seed,
        rank=0,
        world_size=1,
        device=world.device,
        dtype=torch.float32,
        channels_last=channels_last,
        mean=prepared.mean,
        std=prepared.std,
    )
    step = itertools.count()
    with contextlib.closing(pipeline):
        for epoch in itertools.count():
            for batch in pipeline.batches(epoch):
                stepper(batch, next(step))
                if stepper.window_full:
                    stepper.take_window().result()
                yield len(batch.labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", default="deep300", help="job file, or the name of a packaged one")
    parser.add_argument("--dataset", help="another dataset than the job's, such as digits")
    parser.add_argument("--steps", type=int, default=15, help="steps a round; a first round is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()

    experiment = load_experiment(find_job(options.job))
    values = experiment.model_dump()
    values["data"]["augment"] = Augment(crop_padding=4, flip="random").model_dump()  # what the plain script does
    values["data"]["normalize"] = "mean_std"
    values["resources"] = {}
    if options.dataset:
        values["data"]["dataset"] = options.dataset
    if options.batch_size:
        values["data"]["batch_size"] = options.batch_size
    experiment = Experiment.model_validate(values)
    prepared = prepare_data(experiment, files.data_root(), connect())
    runners = {
        "plain": plain_steps(experiment, prepared),
        "resident": our_steps(experiment, prepared, "resident"),
        "reference": our_steps(experiment, prepared, "reference"),
    }
    rates: dict[str, list[float]] = {name: [] for name in runners}
    for round_number in range(options.rounds + 1):
        for name, runner in runners.items():
            start = time.perf_counter()
            images = sum(next(runner) for _ in range(options.steps))
            if round_number:  # the first round warms up workers, kernels and caches
                rates[name].append(images / (time.perf_counter() - start))
    report = {
        "benchmark": "epoch",
        "job": experiment.name,
        "data": prepared.store.label,
        "batch_size": experiment.data.batch_size,
        "steps": options.steps,
        "rounds": options.rounds,
        "images_per_second": rates,
        "ratio_to_plain": {
            name: statistics.median(a / b for a, b in zip(values, rates["plain"], strict=True))
            for name, values in rates.items()
        },
        "machine": {
            "cpu": next(
                (line.split(":")[1].strip() for line in cpu_lines() if line.startswith("model name")), platform.machine()
            ),
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    print(f"{experiment.name}, {prepared.store.label}, batch {experiment.data.batch_size}, {report['machine']}")
    for name, found in rates.items():
        print(
            f"{name:10}  {statistics.median(found):8,.0f} images/s  ({min(found):,.0f} to {max(found):,.0f}, n = {len(found)})"
            f"  {report['ratio_to_plain'][name]:5.2f} x plain"  # type: ignore[index]
        )
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
