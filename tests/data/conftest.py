"""Fixtures of the data tests."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def no_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPC_CIFAR_ARCHIVE", raising=False)


@pytest.fixture
def lossless_archive(cifar_archive: Path) -> Path:
    """The lossless subset, which lies beside the archive that HPC_CIFAR_ARCHIVE names where both are at hand."""
    path = cifar_archive if "lossless" in cifar_archive.name else cifar_archive.parent / "cifar10-lossless-subset.tar.gz"
    if not path.is_file():
        pytest.skip(f"{path.name} is not beside HPC_CIFAR_ARCHIVE")
    return path
