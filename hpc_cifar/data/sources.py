"""From an archive, a folder or scikit-learn to checked uint8 images, and what they may be called.

A label such as "CIFAR-10" stands on every figure that a run reports. It is given to known contents only; everything else is
"custom", with a warning.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from ..errors import DataError, UsageError
from . import archive, digits, images, pickles

BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
_BATCH_NAME = re.compile(r"data_batch_\d+|test_batch|batches\.meta")
OFFICIAL_MD5 = dict(
    zip(
        BATCHES,
        (
            "c99cafc152244af753f735de768cd75f",
            "d4bba439e000b95fd0a9bffe97cbabec",
            "54ebc095f3ab1f0389bbae665268c751",
            "634d18415352ddfa80567beed471001a",
            "482c414d41f54cd18b22e5b47cb7c3cb",
            "40351d587109b95175f43aff81a1287e",
        ),
        strict=True,
    )
)
SUBSET_MD5 = dict(
    zip(
        BATCHES,
        (
            "4f4a5696296f1894991f494b84cec9a8",
            "149075861647a8283c37a490bd888265",
            "5ed76c512c844961ffeb4697fe35a524",
            "4543894f87dce4bb43033fa6a5bcec96",
            "a677422851bc70e9c50aa3bcaf4166fb",
            "eefa6eea41db6af6614054c78b3e5aa1",
        ),
        strict=True,
    )
)
HUNDRED = ("train", "test", "meta")  # CIFAR-100
HUNDRED_MD5 = {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}
JPEG_CONTENT = (
    "f10d4c9e536a564f17fa5e8d68ba087d1235e60cd1f21700e11ff43f0647bbb0"  # ContentDigest of the known JPEG files, packed or not
)
# images in each batch -> label and digests of the known data of that size
_KNOWN_BATCHES = {10_000: ("CIFAR-10", OFFICIAL_MD5), 1_017: ("CIFAR-10 lossless subset", SUBSET_MD5)}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset in memory: images uint8 (N,H,W,C) and labels int64 (N,) of train and test."""

    train_images: npt.NDArray[np.uint8]
    train_labels: npt.NDArray[np.int64]
    test_images: npt.NDArray[np.uint8]
    test_labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    label: str
    verified: bool  # the content is known, byte for byte
    content: str  # digest of what was read
    warnings: tuple[str, ...] = ()


def _kind(name: str) -> str | None:
    if _BATCH_NAME.fullmatch(PurePosixPath(name).name):
        return "batches"
    if PurePosixPath(name).name in HUNDRED and len(PurePosixPath(name).parts) <= 2:
        return "hundred"
    return "images" if images.place(name) else None


def _limit(name: str) -> int:
    """How many bytes of a file are read; 0 of one that is neither a batch nor an image."""
    kind = _kind(name)
    return images.LARGEST_FILE_BYTES if kind == "images" else archive.LARGEST_MEMBER_BYTES if kind else 0


def read(source: Path, dataset: str, tell: archive.Tell = lambda done, total: None) -> Dataset:
    """Read and check ``source``, an archive or folder with the official batches or with class folders.

    Args:
        tell: called before every file, see :func:`hpc_cifar.data.archive.files`.

    Raises:
        DataError: it is missing, truncated, damaged, altered, or does not hold what ``dataset`` needs.
    """
    found = archive.files(source, tell, _limit)
    for name, data in found:
        kind = _kind(name)
        if kind == "hundred" and not data.startswith(b"\x80"):  # any file may be called that; these are pickles
            continue
        if kind:
            reader = {"batches": _read_batches, "hundred": _read_hundred, "images": _read_images}[kind]
            return reader(source, itertools.chain([(name, data)], found), dataset)
    raise DataError(
        f"{source}: holds neither the official batches (data_batch_1, ... or CIFAR-100's train, test, meta) nor images as "
        "train|test/<class>/*.jpg or *.png"
    )


def _read_batches(source: Path, found: Iterator[tuple[str, bytes]], dataset: str) -> Dataset:
    if dataset != "cifar10":
        raise UsageError(f"{source}: holds CIFAR-10 batches; prepare it as cifar10, not as {dataset!r}")
    md5: dict[str, str] = {}
    parts: dict[str, images.Split] = {}
    digest = archive.ContentDigest()
    for path, data in found:
        name = PurePosixPath(path).name
        if _kind(path) != "batches":
            continue
        if name in md5:
            raise DataError(f"{source}: {path}: a second {name}")
        if name not in (*BATCHES, "batches.meta"):
            raise DataError(f"{source}: {path}: CIFAR-10 has no such batch; it has {', '.join(BATCHES)}")
        md5[name] = hashlib.md5(data, usedforsecurity=False).hexdigest()
        digest.add(name, data)
        if name in BATCHES:  # looked at as it comes, so that no more than one is in memory twice
            parts[name] = pickles.batch(data, f"{source}: {name}")
            continue
        names = pickles.label_names(data, f"{source}: {name}")
        if names != pickles.CLASSES:
            raise DataError(f"{source}: {name}: classes {', '.join(names[:20])}; should be {', '.join(pickles.CLASSES)}")
    missing = [name for name in BATCHES if name not in parts]
    if missing:
        raise DataError(f"{source}: {', '.join(missing)}: missing; CIFAR-10 has {', '.join(BATCHES)}")
    train_images, train_labels = (np.concatenate(arrays) for arrays in zip(*(parts[n] for n in BATCHES[:5]), strict=True))
    result = Dataset(train_images, train_labels, *parts["test_batch"], pickles.CLASSES, "", True, digest.hexdigest())
    known = _known_batches(source, md5, [len(labels) for _, labels in parts.values()])
    return _checked(source, dataclasses.replace(result, label=known or "custom CIFAR-10 batches", verified=bool(known)))


def _read_hundred(source: Path, found: Iterator[tuple[str, bytes]], dataset: str) -> Dataset:
    """CIFAR-100 with its 100 fine classes."""
    if dataset != "cifar100":
        raise UsageError(f"{source}: holds CIFAR-100; prepare it as cifar100, not as {dataset!r}")
    contents: dict[str, bytes] = {}
    for path, data in found:
        if _kind(path) == "hundred":
            name = PurePosixPath(path).name
            if name in contents:
                raise DataError(f"{source}: {path}: a second {name}")
            contents[name] = data
    if missing := [name for name in HUNDRED if name not in contents]:
        raise DataError(f"{source}: {', '.join(missing)}: missing; CIFAR-100 has {', '.join(HUNDRED)}")
    digest = archive.ContentDigest()
    for name in HUNDRED:
        digest.add(name, contents[name])
    classes = pickles.label_names(contents["meta"], f"{source}: meta", "fine_label_names")
    if len(set(classes)) != len(classes) or not classes:
        raise DataError(f"{source}: meta: class names should be there, each once")
    train, test = (pickles.batch(contents[n], f"{source}: {n}", "fine_labels", len(classes)) for n in HUNDRED[:2])
    known = False
    if (len(train[1]), len(test[1])) == (50_000, 10_000):
        for name, right in HUNDRED_MD5.items():
            md5 = hashlib.md5(contents[name], usedforsecurity=False).hexdigest()
            if md5 != right:
                raise DataError(
                    f"{source}: {name}: altered: as many images as CIFAR-100 but md5 {md5}, not {right}; get a fresh copy"
                )
        known = True
    label = "CIFAR-100" if known else "custom CIFAR-100 batches"
    return _checked(source, Dataset(*train, *test, classes, label, known, digest.hexdigest()))


def _known_batches(source: Path, md5: dict[str, str], counts: list[int]) -> str | None:
    """Label of known batches, None for unknown ones; known counts with other bytes are refused."""
    if len(set(counts)) != 1 or counts[0] not in _KNOWN_BATCHES:
        return None
    label, digests = _KNOWN_BATCHES[counts[0]]
    for name, right in digests.items():
        if md5[name] != right:
            raise DataError(
                f"{source}: {name}: altered: as many images as {label} but md5 {md5[name]}, not {right}; get a fresh copy"
            )
    return label


def _read_images(source: Path, found: Iterator[tuple[str, bytes]], dataset: str) -> Dataset:
    digest = archive.ContentDigest()
    suffixes: set[str] = set()

    def noted() -> Iterator[tuple[str, bytes]]:
        for path, data in found:
            where = images.place(path)
            top, _, name = path.partition("/")[0], *path.rpartition("/")[1:]
            if where:
                digest.add(f"{where[0]}/{where[1]}/{name}", data)
                suffixes.add(name[name.rfind(".") :].lower())
            elif top in images.SPLITS and not name.startswith("."):
                raise DataError(f"{source}: {path}: is no image; class folders hold {', '.join(images.EXTENSIONS)} files only")
            yield path, data

    for folder in sorted(path for split in images.SPLITS for path in source.glob(f"{split}/*/")):
        if not folder.name.startswith(".") and not any(
            images.place(f"{folder.parent.name}/{folder.name}/{path.name}") for path in folder.iterdir()
        ):
            place = f"{folder.parent.name}/{folder.name}"
            raise DataError(f"{source}: {place}: has no images; every class needs some in train and in test")
    cifar = dataset == "cifar10"
    threads = min(len(os.sched_getaffinity(0)), 8)
    most = images.EXPANDED_BYTES + images.EXPANSION * archive.bytes_of(source)
    order, side = (pickles.CLASSES, 32) if cifar else (None, None)
    train, test, classes = images.read(str(source), noted(), order, side, threads, most)
    result = Dataset(*train, *test, classes, f"custom {dataset}", False, digest.hexdigest())
    full = (len(train[1]), len(test[1])) == (50_000, 10_000)
    if cifar and result.content == JPEG_CONTENT:
        result = dataclasses.replace(result, label="JPEG CIFAR-10", verified=True)
    elif cifar and full and suffixes <= {".jpg", ".jpeg"}:
        for split, labels, right in (("train", train[1], 5_000), ("test", test[1], 1_000)):
            for name, count in zip(classes, np.bincount(labels, minlength=10).tolist(), strict=True):
                if count != right:
                    raise DataError(f"{source}: {split}/{name}: has {count:,} images; CIFAR-10 has {right:,} of each class")
        result = dataclasses.replace(
            result,
            label="JPEG CIFAR-10",
            warnings=("these are not the known JPEG files; the label stands on their number and class folders alone",),
        )
    return _checked(source, result)


def _checked(source: Path, result: Dataset) -> Dataset:
    """What holds for every dataset: no empty class; and warnings for people."""
    notes = list(result.warnings)
    if result.label.startswith("custom"):
        notes.append(f"unverified: {result.label} is no known dataset; figures from it are not CIFAR-10 figures")
    for split, labels in (("train", result.train_labels), ("test", result.test_labels)):
        counts = np.bincount(labels, minlength=len(result.classes)).tolist()
        empty = [name for name, count in zip(result.classes, counts, strict=True) if not count]
        if empty:
            raise DataError(f"{source}: {split} has no image of {', '.join(empty)}")
        if not result.verified and len(set(counts)) > 1:
            notes.append(f"{split} is not balanced: {min(counts):,} to {max(counts):,} images a class")
    return dataclasses.replace(result, warnings=tuple(notes))


def read_digits() -> Dataset:
    """scikit-learn's digits; see :mod:`hpc_cifar.data.digits`."""
    train, test, classes = digits.read()
    content = hashlib.sha256(train[0].tobytes() + test[0].tobytes()).hexdigest()
    return Dataset(*train, *test, classes, "digits", True, content)
