"""Checkpoints: written whole, verified when read, the newest good one wins.

checkpoints/
  step-00000391/state.pt        tensors and plain values (loads with weights_only=True)
                manifest.json   format, step, epoch, size and sha256 of state.pt, validation metrics, experiment
  latest -> step-00000391       best -> ...
  damaged-step-...              set aside when a run fell back past it; only the newest of them stays
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import files
from ..errors import CheckpointError, DamagedCheckpoint
from ..models import tensors
from .saved import WAY_OUT

FORMAT = 1


@dataclass(frozen=True)
class Saved:
    """One checkpoint on disk; its manifest is empty if it cannot be read."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.folder.resolve().name.removeprefix("step-"))

    @property
    def best_step(self) -> int | None:
        """Step of the best checkpoint at the time this one was written."""
        value = self.manifest.get("best_step")
        return value if isinstance(value, int) else None


def save(
    folder: Path,
    state: dict[str, Any],
    *,
    step: int,
    epoch: int,
    metrics: dict[str, float] | None = None,
    best_step: int | None = None,
    keep_last: int = 3,
    keep_every_epochs: int | None = None,
    whole_epoch: bool = False,
    experiment: dict[str, Any] | None = None,
) -> Path:
    """Write one checkpoint and move ``latest`` to it, and ``best`` if ``best_step`` is this one.

    Old ones beyond ``keep_last`` go; the best stays, and of every ``keep_every_epochs`` epochs the one at its end.

    Args:
        whole_epoch: it is at the end of ``epoch``, which counts from 1 then.
        experiment: what is trained, as plain values; see :mod:`hpc_cifar.train.begun`.

    Raises:
        CheckpointError: the file system refused; what was there before is untouched.
    """
    name = f"step-{step:08d}"
    building = folder / f".{name}.{os.getpid()}.new"
    target = folder / name
    buffer = io.BytesIO()
    torch.save(state, buffer)
    # given back even when the disk refuses: Python 3.12.1 crashes when it collects an exception that holds a memoryview
    with buffer.getbuffer() as data:
        manifest = {
            "format": FORMAT,
            "step": step,
            "epoch": epoch,
            "whole_epoch": whole_epoch,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "best_step": best_step,
            "metrics": metrics or {},
            "experiment": experiment,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            with files.atomic_file(building / "state.pt") as stream:
                stream.write(data)
            files.write_json(building / "manifest.json", manifest)
            if target.exists():  # the same step again, now as the best; never seen half removed
                target.rename(folder / f".{name}.{os.getpid()}.old.new")
            building.rename(target)
            files.fsync_folder(folder)
            _point(folder, "latest", name)
            if best_step == step:
                _point(folder, "best", name)
        except OSError as error:
            shutil.rmtree(building, ignore_errors=True)
            raise CheckpointError(f"{target}: cannot save the checkpoint: {error.strerror or error}") from None
    _prune(folder, keep_last, keep_every_epochs)
    return target


def _point(folder: Path, link: str, name: str) -> None:
    """Move a relative symbolic link atomically."""
    temporary = folder / f".{link}.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    temporary.replace(folder / link)


def _prune(folder: Path, keep_last: int, every: int | None) -> None:
    keep = {os.path.realpath(folder / link) for link in ("latest", "best")}
    for old in stored(folder)[keep_last:]:
        stays = every is not None and old.manifest.get("whole_epoch") and old.manifest["epoch"] % every == 0
        if os.path.realpath(old.folder) not in keep and not stays:
            shutil.rmtree(old.folder, ignore_errors=True)
    aside = sorted(folder.glob("damaged-*"), key=lambda path: path.stat().st_mtime)
    for old_damage in aside[:-1]:
        shutil.rmtree(old_damage, ignore_errors=True)
    for leftover in folder.glob(".step-*.new"):  # a save that was killed
        shutil.rmtree(leftover, ignore_errors=True)


def stored(folder: Path) -> list[Saved]:
    """Every checkpoint, newest step first; nothing is verified yet."""
    folders = [path for path in folder.glob("step-*") if files.whole(path.name.removeprefix("step-")) is not None]
    return [_open(path) for path in sorted(folders, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)]


def _open(folder: Path) -> Saved:
    manifest = files.read_json(folder / "manifest.json")
    return Saved(folder, manifest if isinstance(manifest, dict) else {})


def read(saved: Saved) -> dict[str, Any]:
    """Verify and load one checkpoint onto the CPU.

    Raises:
        DamagedCheckpoint: a file is missing, short, altered or not loadable.
        CheckpointError: it cannot be read at the moment, or its format is not of this version; it may well be good.
    """
    path = saved.folder / "state.pt"
    if not saved.manifest:
        raise DamagedCheckpoint(f"{saved.folder}: its manifest.json cannot be read")
    if saved.manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {saved.manifest.get('format')!r}, this version reads {FORMAT}")
    try:
        facts = path.stat()  # before it is read: a FIFO would be waited for, and what is too long would fill the memory
        if not stat.S_ISREG(facts.st_mode):
            raise DamagedCheckpoint(f"{path}: is not a regular file")
        if facts.st_size != saved.manifest.get("bytes"):
            raise DamagedCheckpoint(f"{path}: {facts.st_size} bytes, should be {saved.manifest.get('bytes')}")
        data = path.read_bytes()
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path}: is missing") from None
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror or error}; nothing was changed, try again. If this file is lost for good, "
            f"remove {saved.folder} and the run continues from the checkpoint before it"
        ) from None
    if len(data) != saved.manifest.get("bytes"):
        raise DamagedCheckpoint(f"{path}: {len(data)} bytes, should be {saved.manifest.get('bytes')}")
    if hashlib.sha256(data).hexdigest() != saved.manifest.get("sha256"):
        raise DamagedCheckpoint(f"{path}: its sha256 is not the one in manifest.json")
    try:
        state = tensors.load(data)
    except tensors.Unreadable as error:
        raise DamagedCheckpoint(f"{path}: cannot be loaded: {error}") from None
    if not isinstance(state, dict):
        raise DamagedCheckpoint(f"{path}: holds no checkpoint")
    return state


def newest_good(folder: Path) -> tuple[Saved | None, list[str]]:
    """As :func:`newest_read`, without what it holds."""
    good, _, damaged = newest_read(folder)
    return good, damaged


def newest_read(folder: Path) -> tuple[Saved | None, dict[str, Any], list[str]]:
    """The newest checkpoint that verifies, what it holds, on the CPU, and a line about each damaged newer one.

    Raises:
        CheckpointError: one cannot be read at the moment, or there are checkpoints and none of them can be used (starting
            anew would lose the work silently).
    """
    damaged: list[str] = []
    for saved in stored(folder):
        try:
            return saved, read(saved), damaged
        except DamagedCheckpoint as error:
            damaged.append(str(error))
    if damaged:
        newest, *others = damaged
        raise CheckpointError(
            "\n  ".join((f"no checkpoint of this run can be used, such as the newest one ({newest}); {WAY_OUT}", *others))
        )
    return None, {}, []


def settle(folder: Path, chosen: Saved) -> bool:
    """Make the folder what it was when ``chosen`` was written: newer ones are set aside, ``latest`` and ``best`` follow it.

    A newer one is damaged, and would hide the good ones written from now on. Returns False if the best of that time is gone.
    """
    try:
        set_aside(folder, chosen.step + 1)
        _point(folder, "latest", chosen.folder.name)
        best = None if chosen.best_step is None else _open(folder / f"step-{chosen.best_step:08d}")
        if best is not None and _is_whole(best):
            _point(folder, "best", best.folder.name)
        else:
            (folder / "best").unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be put in order: {error.strerror or error}") from None
    return best is None or _is_whole(best)


def _is_whole(saved: Saved) -> bool:
    """Whether its files are there; a clean-up may leave the folder. Their content is not verified."""
    try:
        return (saved.folder / "state.pt").stat().st_size == saved.manifest.get("bytes")
    except OSError:
        return False


def set_aside(folder: Path, step: int) -> None:
    """Have nobody find the checkpoints from ``step`` on."""
    for saved in stored(folder):
        if saved.step >= step:
            saved.folder.rename(folder / f"damaged-{saved.folder.name}-{secrets.token_hex(2)}")


def named(folder: Path, link: str) -> Saved | None:
    """The checkpoint called ``link`` (``latest``, ``best`` or a folder's name), if it is there."""
    target = folder / link
    return _open(target) if target.is_dir() else None


def same(one: Saved, other: Saved) -> bool:
    """Whether two checkpoints hold the same weights, optimizer state and average, bit for bit.

    Raises:
        CheckpointError: one cannot be read, or is damaged.
    """
    first, second = read(one), read(other)
    return all(_equal(first.get(name), second.get(name)) for name in ("model", "optimizer", "ema"))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)
