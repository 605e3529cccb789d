"""Plain PyTorch training of one small network: what a user would write, sharing nothing with hpc_cifar but the draws."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hpc_cifar.config.experiment import Augment
from hpc_cifar.data import draws

PAD = 2


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8, momentum=0.1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 8 * 8, 10),
    )


def train(
    images: np.ndarray, labels: np.ndarray, indices: np.ndarray, *, seed: int, epochs: int, batch: int, lr: float
) -> list[float]:
    """Loss of every step; images uint8 (n, 32, 32, 3), labels int64 (n,), indices those of the training split."""
    pixels = images[indices].astype(np.float64) / 255
    mean, std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))
    torch.manual_seed(seed)
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
    per_epoch = math.ceil(len(indices) / batch)
    warmup, total = round(0.5 * per_epoch), epochs * per_epoch
    losses: list[float] = []
    for epoch in range(epochs):
        order = draws.order(seed, epoch, indices)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            drawn = draws.augmentation(seed, epoch, chosen, Augment(crop_padding=PAD, flip="random"), 32)
            crops = []
            for i, sample in enumerate(chosen):
                padded = np.pad(images[sample], ((PAD, PAD), (PAD, PAD), (0, 0)))
                crop = padded[drawn.dy[i] : drawn.dy[i] + 32, drawn.dx[i] : drawn.dx[i] + 32]
                crops.append(crop[:, ::-1] if drawn.flip[i] else crop)
            x = torch.from_numpy(((np.stack(crops) / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32))
            step = len(losses)
            decay = (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
            optimizer.param_groups[0]["lr"] = lr * ((step + 1) / warmup if step < warmup else decay)
            loss = F.cross_entropy(net(x), torch.from_numpy(labels[chosen]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses
