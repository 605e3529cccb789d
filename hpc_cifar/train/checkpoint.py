"""Checkpoints: written whole, verified when read, the newest good one wins.

checkpoints/
  step-00000391/state.pt        tensors and plain values (loads with weights_only=True)
                manifest.json   format, step, epoch, size and sha256 of state.pt, validation metrics
  latest -> step-00000391       best -> ...
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import files
from ..errors import CheckpointError

FORMAT = 1


@dataclass(frozen=True)
class Saved:
    """One checkpoint on disk; its manifest is empty if it cannot be read."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.folder.resolve().name.removeprefix("step-"))


def save(
    folder: Path,
    state: dict[str, Any],
    *,
    step: int,
    epoch: int,
    metrics: dict[str, float] | None = None,
    best: bool = False,
    keep_last: int = 3,
) -> Path:
    """Write one checkpoint and move ``latest`` (and ``best``) to it; old ones beyond ``keep_last`` go, the best stays.

    Raises:
        CheckpointError: the file system refused; what was there before is untouched.
    """
    name = f"step-{step:08d}"
    building = folder / f".{name}.{os.getpid()}.new"
    target = folder / name
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    manifest = {
        "format": FORMAT,
        "step": step,
        "epoch": epoch,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "metrics": metrics or {},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        with files.atomic_file(building / "state.pt") as stream:
            stream.write(data)
        files.write_json(building / "manifest.json", manifest)
        if target.exists():  # the same step again, after a fall-back past a damaged one
            shutil.rmtree(target)
        building.rename(target)
        files.fsync_folder(folder)
        _point(folder, "latest", name)
        if best:
            _point(folder, "best", name)
    except OSError as error:
        shutil.rmtree(building, ignore_errors=True)
        raise CheckpointError(f"{target}: cannot save the checkpoint: {error.strerror or error}") from None
    _prune(folder, keep_last)
    return target


def _point(folder: Path, link: str, name: str) -> None:
    """Move a relative symbolic link atomically."""
    temporary = folder / f".{link}.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    temporary.replace(folder / link)


def _prune(folder: Path, keep_last: int) -> None:
    keep = {os.path.realpath(folder / link) for link in ("latest", "best")}
    for old in stored(folder)[keep_last:]:
        if os.path.realpath(old.folder) not in keep:
            shutil.rmtree(old.folder, ignore_errors=True)
    for leftover in folder.glob(".step-*.new"):  # a save that was killed
        shutil.rmtree(leftover, ignore_errors=True)


def stored(folder: Path) -> list[Saved]:
    """Every checkpoint, newest step first; nothing is verified yet."""
    folders = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return [_open(path) for path in sorted(folders, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)]


def _open(folder: Path) -> Saved:
    manifest = files.read_json(folder / "manifest.json")
    return Saved(folder, manifest if isinstance(manifest, dict) else {})


def read(saved: Saved) -> dict[str, Any]:
    """Verify and load one checkpoint onto the CPU.

    Raises:
        CheckpointError: the file is missing, short, altered, of another format, or not loadable.
    """
    path = saved.folder / "state.pt"
    if not saved.manifest:
        raise CheckpointError(f"{saved.folder}: its manifest.json cannot be read")
    if saved.manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {saved.manifest.get('format')!r}, this version reads {FORMAT}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    if len(data) != saved.manifest.get("bytes"):
        raise CheckpointError(f"{path}: {len(data)} bytes, should be {saved.manifest.get('bytes')}")
    if hashlib.sha256(data).hexdigest() != saved.manifest.get("sha256"):
        raise CheckpointError(f"{path}: its sha256 is not the one in manifest.json")
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be loaded: {error}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds no checkpoint")
    return state


def newest_good(folder: Path) -> tuple[Saved | None, list[str]]:
    """The newest checkpoint that verifies, and a line about each damaged newer one.

    Raises:
        CheckpointError: there are checkpoints and none of them can be used (starting anew would lose the work silently).
    """
    damaged: list[str] = []
    for saved in stored(folder):
        try:
            read(saved)
            return saved, damaged
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        raise CheckpointError("no checkpoint of this run can be used:\n  " + "\n  ".join(damaged))
    return None, []


def remove_after(folder: Path, step: int) -> None:
    """Drop checkpoints newer than ``step``: they are damaged, and would hide the good ones written from now on."""
    for saved in stored(folder):
        if saved.step > step:
            shutil.rmtree(saved.folder, ignore_errors=True)


def named(folder: Path, link: str) -> Saved | None:
    """The checkpoint called ``link`` (``latest``, ``best`` or a folder's name), if it is there."""
    target = folder / link
    return _open(target) if target.is_dir() else None
