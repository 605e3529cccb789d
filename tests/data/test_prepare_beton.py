"""FFCV's file beside a store: by choice, where FFCV is, for RGB images; never at the cost of the store."""

from __future__ import annotations

import errno
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from hpc_cifar.data import prepare as preparing
from hpc_cifar.data.prepare import prepare
from hpc_cifar.errors import DataError, UsageError

ABSENT = "ffcv is not installed"


def prepared(root: Path, wanted: bool | None) -> tuple[Any, str]:
    said = io.StringIO()
    made = prepare("digits", archive=None, root=root, console=Console(file=said, width=200), write_beton=wanted)
    return made, said.getvalue()


def test_without_ffcv_there_is_none_unless_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing.choice, "problem", lambda pipeline: ABSENT)
    made, said = prepared(tmp_path, None)
    assert made.train.beton is None and "\nffcv: " not in said
    with pytest.raises(UsageError, match=f"--beton: {ABSENT}"):
        prepared(tmp_path, True)


@pytest.mark.parametrize("wanted", [None, True])
def test_it_holds_rgb_images_only(monkeypatch: pytest.MonkeyPatch, wanted: bool | None) -> None:
    monkeypatch.setattr(preparing.choice, "problem", lambda pipeline: None)
    grey: Any = SimpleNamespace(image_shape=(1, 8, 8))
    if wanted:
        with pytest.raises(UsageError, match=r"--beton: FFCV holds RGB images; these have 1 channel\(s\)"):
            preparing._with_beton(grey, wanted, Console(quiet=True))
    else:
        assert preparing._with_beton(grey, wanted, Console(quiet=True)) is grey


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full: it needs "),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (DataError("it does not read back"), "it does not read back"),
    ],
)
def test_where_it_cannot_be_written_the_store_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def write(*arguments: object) -> Path:
        raise error

    monkeypatch.setattr(preparing.choice, "problem", lambda pipeline: None)
    monkeypatch.setattr(preparing.beton, "write", write)
    made, said = prepared(tmp_path, None)
    assert made.train.beton is None and f"without FFCV's file: {words}" in said.replace(f"{made.path}/train.beton: ", "")
    with pytest.raises(DataError, match="fix that, or leave it out by --no-beton"):
        prepared(tmp_path, True)
    assert preparing.Store.open(tmp_path, "digits").digest == made.digest
