"""Small datasets in every layout that ``prepare`` reads."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hpc_cifar.data.pickles import CLASSES

BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")


def batch_bytes(number: int, count: int = 20, protocol: int = 2, **changes: Any) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (count, 3072), dtype=np.uint8)
    fields = {b"batch_label": b"batch", b"labels": [row % 10 for row in range(count)], b"data": pixels}
    fields |= {name.encode(): value for name, value in changes.items()}
    return pickle.dumps(fields, protocol=protocol)


def batch_files(count: int = 20, **options: Any) -> dict[str, bytes]:
    folder = "cifar-10-batches-py"
    made = {f"{folder}/{name}": batch_bytes(number, count, **options) for number, name in enumerate(BATCHES)}
    made[f"{folder}/batches.meta"] = pickle.dumps({b"label_names": [name.encode() for name in CLASSES]}, protocol=2)
    return made


def hundred_files(count: int = 60, classes: int = 20, **changes: Any) -> dict[str, bytes]:
    """CIFAR-100's layout with ``classes`` classes."""
    names = [f"class {number}".encode() for number in range(classes)]
    made = {}
    for number, name in enumerate(("train", "test")):
        pixels = np.random.default_rng(number).integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = [row % classes for row in range(count)]
        fields = {b"data": pixels, b"fine_labels": labels, b"coarse_labels": [label // 5 for label in labels]}
        made[name] = pickle.dumps(fields | {key.encode(): value for key, value in changes.items()}, protocol=2)
    made["meta"] = pickle.dumps({b"fine_label_names": names, b"coarse_label_names": names[:4]}, protocol=2)
    return {f"cifar-100-python/{name}": data for name, data in made.items()}


def image_bytes(seed: int, size: tuple[int, int] = (32, 32), mode: str = "RGB", kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, kind)
    return stream.getvalue()


def image_files(each: int = 3, classes: tuple[str, ...] = CLASSES, **options: Any) -> dict[str, bytes]:
    suffix = "png" if options.get("kind") == "PNG" else "jpg"
    made = {}
    for split in ("train", "test"):
        for label, name in enumerate(classes):
            for number in range(each):
                seed = 1000 * label + 10 * number + (split == "test")
                made[f"{split}/{name}/{number:04}.{suffix}"] = image_bytes(seed, **options)
    return made


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path
