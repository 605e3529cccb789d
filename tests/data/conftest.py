"""Fixtures of the data tests."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pipelines import COUNT
from rich.console import Console

from hpc_cifar.data import beton
from hpc_cifar.data.choice import problem
from hpc_cifar.data.store import Arrays, moments_of


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def no_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPC_CIFAR_ARCHIVE", raising=False)


@pytest.fixture(scope="session")
def arrays() -> Arrays:
    """Random images as a memory-mapped store holds them."""
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8)
    images.setflags(write=False)  # as a memory-mapped store
    labels = np.arange(COUNT, dtype=np.int64) % 10
    return Arrays(images, labels, moments_of(images))


@pytest.fixture(scope="session")
def readable(arrays: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Arrays]:
    """The same images with what a pipeline of this name reads beside them; a test is skipped where it is not installed."""
    made: dict[str, Arrays] = {}

    def of(name: str) -> Arrays:
        if why := problem(name):
            pytest.skip(why)
        if name != "ffcv":
            return arrays
        if name not in made:
            folder: Path = tmp_path_factory.mktemp("beton")
            path = beton.write(folder, arrays.images, arrays.labels, "digest")
            made[name] = dataclasses.replace(arrays, beton=path)
        return made[name]

    return of
