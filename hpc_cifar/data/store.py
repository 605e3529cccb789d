"""A prepared dataset: verified uint8 arrays on disk, memory-mapped and so shared by all ranks of a node.

<root>/<dataset>/manifest.json         format, label, classes, counts, mean, std, source, SHA-256 of each file
<root>/<dataset>/train-images.npy      uint8 (N,H,W,C)
<root>/<dataset>/train-labels.npy      int64 (N,)
<root>/<dataset>/train-moments.npy     int64 (N,2,C), sum and sum of squares of each image and channel
<root>/<dataset>/test-*.npy            the same for the test set
<root>/<dataset>/train.beton           FFCV's file of the training images, where FFCV is installed; and train.beton.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import __version__, files, owner
from ..errors import DataError, UsageError, first_line
from . import beton, verified
from .sources import Dataset
from .split import mean_std

FORMAT = 1
SPLITS = ("train", "test")
PARTS = ("images", "labels", "moments")
MANIFEST = "manifest.json"
DATASET_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")  # as data.dataset of an experiment


@dataclasses.dataclass(frozen=True)
class Arrays:
    """One split of a dataset, memory-mapped and read-only."""

    images: npt.NDArray[np.uint8]  # (N,H,W,C)
    labels: npt.NDArray[np.int64]  # (N,)
    moments: npt.NDArray[np.int64]  # (N,2,C)
    beton: Path | None = None  # FFCV's file of the same images, if there is one


@dataclasses.dataclass(frozen=True)
class Store:
    """A dataset that can be trained on."""

    path: Path
    manifest: dict[str, Any]
    train: Arrays
    test: Arrays
    inodes: dict[str, tuple[int, int]]  # of the mapped files: device and number
    _read: verified.Seen = dataclasses.field(default_factory=dict)  # as the files looked that this process has verified

    @property
    def dataset(self) -> str:
        return self.path.name

    @property
    def label(self) -> str:
        """What its figures may be called: "CIFAR-10", "JPEG CIFAR-10", "digits", "custom ..."."""
        return str(self.manifest["label"])

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.manifest["classes"])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        _, height, width, channels = self.train.images.shape
        return channels, height, width

    @property
    def digest(self) -> str:
        """SHA-256 over the files' own; equal stores have equal pixels and labels in equal order."""
        return str(self.manifest["digest"])

    @classmethod
    def open(cls, root: Path, dataset: str, *, verify: bool = False) -> Store:
        """Open ``<root>/<dataset>``.

        Args:
            verify: :meth:`verify` it as well. Without, the manifest, the sizes and the headers are compared, which finds a
                truncated or exchanged file.

        Raises:
            DataError: it is missing, incomplete or damaged; the message has the command that fixes it.
            UsageError: ``dataset`` is no name of a dataset.
        """
        if not DATASET_NAME.fullmatch(dataset):
            raise UsageError(f"dataset {dataset!r}: should be lower-case letters, digits, '_' or '-', 32 at most")
        folder = root / dataset
        try:
            there = folder.is_dir()
        except OSError as error:
            raise DataError(f"{folder}: {owner.cannot_be_read(folder, error)}") from None
        if not there:
            raise DataError(f"{folder}: dataset {dataset!r} is not prepared; run: {prepare_command(root, dataset)}")
        try:
            manifest = _read_manifest(folder / MANIFEST)
            inodes = {name: _inode(folder / name) for name in manifest["files"]}
            train, test = (_open_split(folder, split, manifest) for split in SPLITS)
            if inodes != {name: _inode(folder / name) for name in manifest["files"]}:
                raise ValueError("it was exchanged while it was opened")
        except PermissionError as error:
            hidden = Path(str(error.filename or folder))
            words = owner.cannot_be_read(hidden, error)
            raise DataError(f"{folder}: {words}: chmod -R a+rX {shlex.quote(str(folder))}") from None
        except _DAMAGE as error:
            raise _damaged(folder, f"no {error}" if isinstance(error, KeyError) else first_line(error)) from None
        train = dataclasses.replace(train, beton=beton.find(folder, manifest["digest"]))
        made = cls(folder, manifest, train, test, inodes)
        if verify:
            made.verify()
        return made

    def verify(self, *splits: str) -> None:
        """Read every byte of ``splits`` (both, unless named) of the files that are mapped here, and compare its SHA-256.

        It takes 0.1 to 0.5 s for CIFAR-10, a sixth of that for its test images.

        Raises:
            DataError: something is not what was written; the message has the command that fixes it.
        """
        mapped = {f"{split}-{part}.npy": getattr(getattr(self, split), part) for split in splits or SPLITS for part in PARTS}
        before = self._seen(mapped)
        for name, array in mapped.items():
            if self._sha256(name, array) != self.manifest["files"][name]["sha256"]:
                raise _damaged(self.path, f"{name} is not what was written: its SHA-256 differs")
        if self._seen(mapped) != before:
            return
        self._read.update(before)
        if not splits:
            verified.note(self.path, self.digest, before)

    def _sha256(self, name: str, array: Any) -> str:
        """Of a mapped file, read as a file: where the disk fails, or the file was cut off, a map ends the process."""
        path = self.path / name
        try:
            if _inode(path) == self.inodes[name]:
                digest = files.sha256_of(path)
                if _inode(path) == self.inodes[name]:
                    return digest
        except OSError as error:
            raise _damaged(self.path, f"{name}: {error.strerror or error}") from None
        return hashlib.sha256(array._mmap).hexdigest()  # the store was made anew; nobody can cut off the old file any more

    def verify_again(self, split: str) -> None:
        """:meth:`verify` one split, unless this process has done it and the files look as they did then; for a short process.

        Raises:
            DataError: see :meth:`verify`.
        """
        names = [f"{split}-{part}.npy" for part in PARTS]
        if self._seen(names) != {name: self._read.get(name) for name in names}:
            self.verify(split)

    def verify_once(self) -> None:
        """:meth:`verify`, unless a process of this user has done it on this host since that was started.

        Raises:
            DataError: see :meth:`verify`.
        """
        names = list(self.manifest["files"])
        if verified.is_known(self.path, self.digest, self._seen(names)):
            return
        with verified.by_one(self.path):  # another process may have done it meanwhile
            if not verified.is_known(self.path, self.digest, self._seen(names)):
                self.verify()

    def _seen(self, names: Iterable[str]) -> verified.Seen:
        try:
            return verified.seen(self.path, names)
        except OSError as error:
            raise _damaged(self.path, f"{Path(str(error.filename)).name}: {error.strerror or error}") from None


def _inode(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_dev, facts.st_ino


_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def _damaged(folder: Path, why: str) -> DataError:
    return DataError(f"{folder}: the store is damaged ({why}); run: {prepare_command(folder.parent, folder.name, force=True)}")


def prepare_command(root: Path, dataset: str, *, force: bool = False) -> str:
    """The command that prepares ``dataset`` under ``root``, to be copied from a message."""
    words = ["hpc-cifar", "prepare", dataset]
    if root.absolute() != files.data_root():
        words += ["--root", str(root)]
    if dataset not in ("cifar10", "cifar100", "digits"):
        words += ["--archive", "PATH"]
    return shlex.join([*words, *(["--force"] if force else [])])


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():  # nobody waits for a writer of a pipe
        raise ValueError(f"{path.name} is missing, or no plain file")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path.name} has format {manifest['format']!r}, this version reads {FORMAT}")
    if manifest["digest"] != _digest(manifest["files"]):
        raise ValueError(f"{path.name} does not fit its own digest")
    if set(manifest["files"]) != {f"{split}-{part}.npy" for split in SPLITS for part in PARTS}:
        raise ValueError(f"{path.name} does not name the six files")
    if "seal" in manifest and manifest["seal"] != _seal(manifest):
        raise ValueError(f"{path.name} is not what was written: classes, counts or another of its words differ")
    return dict(manifest)


def _seal(manifest: dict[str, Any]) -> str:
    """SHA-256 of the whole manifest, so that neither the names of classes nor the label of figures change unseen."""
    text = json.dumps({name: value for name, value in manifest.items() if name != "seal"}, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _open_split(folder: Path, split: str, manifest: dict[str, Any]) -> Arrays:
    arrays: dict[str, Any] = {}
    for part in PARTS:
        name = f"{split}-{part}.npy"
        expected = manifest["files"][name]
        path = folder / name
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise ValueError(f"{name} has {size:,} bytes instead of {expected['bytes']:,}")
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if [*array.shape] != expected["shape"] or str(array.dtype) != expected["dtype"] or not array.flags.c_contiguous:
            raise ValueError(f"{name} holds {array.dtype} {array.shape} instead of {expected['dtype']} {expected['shape']}")
        arrays[part] = array
    return Arrays(**arrays)


def _digest(entries: dict[str, dict[str, Any]]) -> str:
    text = "".join(f"{entry['sha256']}  {name}\n" for name, entry in sorted(entries.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def moments_of(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Sum and sum of squares of the raw pixels per image and channel: int64 (N,2,C) of uint8 (N,H,W,C)."""
    result = np.empty((len(images), 2, images.shape[3]), np.int64)
    for first in range(0, len(images), 2048):  # in parts, since the wide copy is four times as large
        wide = images[first : first + 2048].astype(np.uint32)
        result[first : first + 2048, 0] = wide.sum(axis=(1, 2))
        result[first : first + 2048, 1] = (wide * wide).sum(axis=(1, 2))
    return result


class _Hashed:
    """Passes writes on and hashes them."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B") if not isinstance(data, bytes) else memoryview(data)
        self._stream.write(view)
        self.sha256.update(view)
        self.bytes += len(view)


def _write_array(path: Path, array: npt.NDArray[Any]) -> dict[str, Any]:
    """Write one .npy file; not by numpy.save, whose error on a full disk does not say that the disk is full."""
    array = np.ascontiguousarray(array)
    with path.open("xb") as stream:
        os.fchmod(stream.fileno(), 0o644)  # as every file of a store, which others may read
        hashed = _Hashed(stream)
        np.lib.format.write_array_header_1_0(hashed, np.lib.format.header_data_from_array_1_0(array))
        hashed.write(array.data)
        stream.flush()
        os.fsync(stream.fileno())
    return {
        "bytes": hashed.bytes,
        "sha256": hashed.sha256.hexdigest(),
        "shape": list(array.shape),
        "dtype": str(array.dtype),
    }


def bytes_needed(data: Dataset) -> int:
    """Bytes on disk of the store of ``data``, to within a few KiB."""
    count = len(data.train_labels) + len(data.test_labels)
    return int(data.train_images.nbytes + data.test_images.nbytes + count * 8 * (1 + 2 * data.train_images.shape[3]) + 2**14)


def write(folder: Path, data: Dataset, source: dict[str, Any], created: str) -> None:
    """Write a whole store into the empty ``folder``.

    Args:
        source: what the data came from, kept in the manifest.
        created: time stamp, ISO 8601.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    splits = {"train": (data.train_images, data.train_labels), "test": (data.test_images, data.test_labels)}
    entries: dict[str, dict[str, Any]] = {}
    summary: dict[str, Any] = {}
    for split, (images, labels) in splits.items():
        moments = moments_of(images)
        parts: tuple[npt.NDArray[Any], ...] = (images, labels, moments)
        for part, array in zip(PARTS, parts, strict=True):
            entries[f"{split}-{part}.npy"] = _write_array(folder / f"{split}-{part}.npy", array)
        counts = np.bincount(labels, minlength=len(data.classes)).tolist()
        summary[split] = {"images": len(labels), "per_class": dict(zip(data.classes, counts, strict=True))}
        if split == "train":
            mean, std = mean_std(moments, np.arange(len(labels)), images.shape[1] * images.shape[2])
            summary["train"] |= {"mean": mean.tolist(), "std": std.tolist()}
    manifest = {
        "format": FORMAT,
        "label": data.label,
        "verified": data.verified,
        "classes": list(data.classes),
        "digest": _digest(entries),
        **summary,
        "files": entries,
        "source": source,
        "warnings": list(data.warnings),
        "created": created,
        "versions": {"hpc-cifar": __version__, "numpy": np.__version__},
    }
    files.write_json(folder / MANIFEST, {**manifest, "seal": _seal(manifest)})
    with contextlib.suppress(OSError):
        files.fsync_folder(folder.parent)
