"""``train.beton`` is compared with the store, and not with facts that may have been exchanged with it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from hpc_cifar.data import beton
from hpc_cifar.data.choice import problem
from hpc_cifar.data.store import Store
from hpc_cifar.errors import DataError

pytestmark = [pytest.mark.component("ffcv"), pytest.mark.skipif(bool(problem("ffcv")), reason="ffcv is not installed")]


@pytest.fixture
def store(digits_data: Path, tmp_path: Path) -> Store:
    shutil.copytree(digits_data, tmp_path / "data")
    made = Store.open(tmp_path / "data", "digits")
    beton.write(made.path, made.train.images, made.train.labels, made.digest)
    return Store.open(tmp_path / "data", "digits")


def exchanged(path: Path, data: bytes) -> None:
    """The file and the facts about it, as somebody would who wants them to be believed."""
    path.write_bytes(data)
    facts = json.loads((path.parent / beton.FACTS).read_text())
    facts |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path.parent / beton.FACTS).write_text(json.dumps(facts))


def test_what_was_written_is_accepted(store: Store) -> None:
    assert store.train.beton is not None
    beton.verify(store.train.beton, store.train.images, store.train.labels, "")


@pytest.mark.parametrize("place", ["header", "label", "pixel", "gap", "table", "longer", "shorter"])
def test_a_file_of_other_images_with_facts_that_fit(store: Store, place: str) -> None:
    path = store.train.beton
    assert path is not None
    data = bytearray(path.read_bytes())
    where = {"header": 4, "label": 2000, "pixel": beton.PAGE_BYTES + 1000, "gap": beton.PAGE_BYTES - 10, "table": -8}
    if place in where:
        data[where[place]] ^= 1
    elif place == "longer":
        data += b"\0"
    else:
        del data[-1]
    exchanged(path, bytes(data))
    with pytest.raises(DataError, match=r"not the file of this store|truncated or exchanged") as error:
        beton.verify(path, store.train.images, store.train.labels, "hpc-cifar prepare digits --beton")
    assert "run: hpc-cifar prepare digits --beton" in str(error.value)


def test_the_file_of_another_order_of_labels(store: Store) -> None:
    path = beton.write(store.path, store.train.images, store.train.labels[::-1].copy(), store.digest)
    with pytest.raises(DataError, match="not the file of this store"):
        beton.verify(path, store.train.images, store.train.labels, "")
