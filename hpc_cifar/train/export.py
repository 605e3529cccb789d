"""``export``: a run's weights as a file that stands alone, checked by loading it back."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..data import pipeline as data
from ..errors import RunError
from ..models import exported
from ..models.exported import Exported
from ..records import Result
from .trained import Trained

CHECKED = 256  # images whose logits are compared
TOLERANCE = 1e-3  # of the largest logit: other memory layouts add in other orders


def export(trained: Trained, path: Path) -> Exported:
    """Write ``path``, once what it gives was found to be what the run's own network gives.

    Raises:
        RunError: the file gives other logits than the network; nothing was kept.
    """
    prepared, experiment = trained.prepared, trained.experiment
    store = prepared.store
    height, width, channels = store.test.images.shape[1:]
    result = trained.run.result() or Result()
    facts = {
        "run": trained.run.id, "data": store.label, "checkpoint": trained.which, "epoch": trained.epoch, "step": trained.step,
        "test_accuracy": result.test_accuracy, "test_loss": result.test_loss,
    }  # fmt: skip
    about = Exported(
        experiment.model,
        tuple(store.classes),
        tuple(float(value) for value in prepared.mean),
        tuple(float(value) for value in prepared.std),
        (channels, height, width),
        facts,
    )
    draft = path.with_name(f".{path.stem}.{os.getpid()}.safetensors")
    try:
        exported.save(draft, trained.network, about)
        count = min(CHECKED, len(store.test.labels))
        network, read = exported.load(draft)
        raw = torch.from_numpy(store.test.images[:count].copy())
        own = trained.network.float().cpu()
        with torch.no_grad():
            expected = own(_normalised(trained, count))
            difference = (network(read.prepare(raw)) - expected).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
            raise RunError(f"{path}: the exported network differs from the run's by {difference:.2g}; nothing was kept")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return about


def _normalised(trained: Trained, count: int) -> torch.Tensor:
    """The first test images as the run's own pipeline delivers them, on the CPU in float32."""
    batches = data.evaluation_batches(
        trained.experiment.data, trained.prepared.store.test, range(count), batch_size=count, rank=0, world_size=1,
        device="cpu", dtype=torch.float32, channels_last=False, mean=trained.prepared.mean, std=trained.prepared.std,
    )  # fmt: skip
    return next(batches).images
