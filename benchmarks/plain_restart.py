"""What a user would write to go on from a checkpoint: deep300's network by hand, torch.save, torch.load, a DataLoader.

    python benchmarks/plain_restart.py STORE CHECKPOINT       one step; prints the seconds of each stage as JSON

A checkpoint that is missing is made first and nothing is timed. RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are torchrun's.
Of this project it takes only the clock; its data are the arrays of STORE, which torchvision would have unpickled instead.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler
from torchvision import transforms

from hpc_cifar import stages


class Images(Dataset[tuple[torch.Tensor, int]]):
    def __init__(self, store: Path) -> None:
        self.images = np.array(np.load(store / "train-images.npy"))
        self.labels = np.load(store / "train-labels.npy")
        self.transform = transforms.Compose(
            [transforms.ToPILImage(), transforms.RandomCrop(self.images.shape[1], padding=4), transforms.RandomHorizontalFlip(),
             transforms.ToTensor()]
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), int(self.labels[index])


KERAS = {"momentum": 0.01, "eps": 1e-3}  # its BatchNorm's defaults, as torch counts them; deep300 has them


def network(height: int, width: int, channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    before = channels
    for filters, rate in ((32, 0.3), (64, 0.5), (128, 0.5)):
        for _ in range(2):
            layers += [nn.Conv2d(before, filters, 3, padding=1), nn.BatchNorm2d(filters, **KERAS), nn.ReLU()]
            before = filters
        layers += [nn.MaxPool2d(2), nn.Dropout(rate)]
    flat = (height // 8) * (width // 8) * 128
    layers += [nn.Flatten(), nn.Linear(flat, 128), nn.BatchNorm1d(128, **KERAS), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)]
    return nn.Sequential(*layers)


def main() -> None:
    store, path = Path(sys.argv[1]), Path(sys.argv[2])
    batch = int(sys.argv[3]) if len(sys.argv) > 3 else 64
    stages.done("imports")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    device = torch.device("cuda", rank) if torch.cuda.device_count() >= world else torch.device("cpu")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    stages.done("process group")
    dataset = Images(store)
    sampler = DistributedSampler(dataset, world, rank) if world > 1 else None
    loader = DataLoader(dataset, batch // world, shuffle=sampler is None, sampler=sampler, num_workers=2)
    stages.done("data")
    plain = network(*dataset.images.shape[1:]).to(device)
    model = nn.parallel.DistributedDataParallel(plain) if world > 1 else plain
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.001, momentum=0.9)
    stages.done("network")
    known = path.exists()
    if known:
        state = torch.load(path, map_location=device)
        plain.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    stages.done("resume")
    images, labels = next(iter(loader))
    stages.done("pipeline")
    F.cross_entropy(model(images.to(device)), labels.to(device)).backward()
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    stages.done("first step")
    if not known:
        torch.save({"model": plain.state_dict(), "optimizer": optimizer.state_dict()}, path)
    elif rank == 0:
        print(json.dumps(stages.taken()))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
