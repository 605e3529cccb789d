"""Stands in for ``hpc_cifar.data.store``: a dataset is prepared if its folder exists."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from ..errors import DataError

MANIFEST, SPLITS, PARTS = "manifest.json", (), ()  # what data/staging.py would copy


class Store:
    @classmethod
    def open(cls, root: Path, dataset: str) -> SimpleNamespace:
        if not (root / dataset).is_dir():
            raise DataError(f"{dataset} is not prepared in {root}; run: hpc-cifar prepare {dataset}")
        classes = tuple("0123456789")
        train = SimpleNamespace(labels=range(1000))
        return SimpleNamespace(train=train, classes=classes, image_shape=(3, 32, 32), verify_once=lambda: None)
