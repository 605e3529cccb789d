"""What a user would write without this package: torchvision transforms on PIL images, a DataLoader, an eager float32 loop."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from hpc_cifar.config.experiment import Experiment
from hpc_cifar.data.pipeline import Batch
from hpc_cifar.models.build import build
from hpc_cifar.train.setup import Prepared

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
                transforms.Normalize(np.asarray(prepared.mean).tolist(), np.asarray(prepared.std).tolist()),
            ]
        )

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> Rows:
        index = self._indices[position]
        return self._transform(self._images[index]), torch.tensor(self._labels[index])


def loader(prepared: Prepared, batch_size: int, device: torch.device) -> Iterator[Rows]:
    """Batches on the device, epoch after epoch; two workers stay."""
    found = DataLoader(
        Images(prepared), batch_size=batch_size, shuffle=True, num_workers=2, persistent_workers=True,
        pin_memory=device.type == "cuda", drop_last=True,
    )  # fmt: skip
    for images, labels in itertools.chain.from_iterable(itertools.repeat(found)):
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def batches(prepared: Prepared, batch_size: int, device: torch.device) -> Iterator[Batch]:
    """The same, as this package's trainer takes them."""
    for number, (images, labels) in enumerate(loader(prepared, batch_size, device)):
        yield Batch(images, labels, number, len(labels))


def steps(experiment: Experiment, prepared: Prepared, device: torch.device) -> Iterator[int]:
    """Images of each step of the plain loop, after it was made."""
    torch.manual_seed(experiment.seed)
    network = build(experiment.model, prepared.store.image_shape).to(device)
    config = experiment.optimizer
    optimizer = torch.optim.SGD(network.parameters(), lr=config.lr / 10, momentum=getattr(config, "momentum", 0.9))
    for images, labels in loader(prepared, experiment.data.batch_size, device):
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
        yield len(labels)
