"""Files of tensors that others may have written: one line, and no more memory than the file is long."""

from __future__ import annotations

import io
import os
import pickle
import random
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_cifar.errors import DataError
from hpc_cifar.models import exported, tensors, weights

STATE = {"a.weight": torch.arange(64.0).reshape(8, 8), "b.bias": torch.ones(3), "c": torch.zeros(2, dtype=torch.bfloat16)}


def saved(*, is_zip: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(STATE, stream, _use_new_zipfile_serialization=is_zip)
    return stream.getvalue()


@pytest.mark.parametrize("is_zip", [True, False])
def test_both_formats_are_read(is_zip: bool, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(saved(is_zip=is_zip))
    for found in (tensors.load(saved(is_zip=is_zip)), tensors.load(tmp_path / "a.pt"), weights.read(tmp_path / "a.pt")):
        assert found.keys() == STATE.keys() and all(torch.equal(found[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_damaged_file_is_one_line_wherever_it_is_damaged(is_zip: bool, tmp_path: Path) -> None:
    """Seeded: bytes changed, cut off, doubled; what is read has the right shapes at least, since no digest is there."""
    whole, dice = saved(is_zip=is_zip), random.Random(0)
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        how = dice.randrange(3)
        if how == 0:
            for _ in range(dice.randrange(1, 6)):
                data[dice.randrange(len(data))] = dice.randrange(256)
        elif how == 1:
            del data[dice.randrange(len(data)) :]
        else:
            at = dice.randrange(len(data))
            data[at:at] = data[at : at + dice.randrange(1, 64)]
        (tmp_path / "a.pt").write_bytes(bytes(data))
        try:
            weights.read(tmp_path / "a.pt")
        except DataError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
            refused += 1
    assert refused > 200


def test_a_compressed_or_overlapping_archive_is_refused(tmp_path: Path) -> None:
    whole = zipfile.ZipFile(io.BytesIO(saved(is_zip=True)))
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for member in whole.infolist():
            data = whole.read(member) if not member.filename.endswith("data/0") else b"\0" * 2**26
            packed.writestr(member.filename, data)
    with pytest.raises(DataError, match="its parts are compressed or overlap, which torch does not do"):
        weights.read(tmp_path / "a.pt")


def test_an_older_file_that_claims_more_than_it_has_is_refused() -> None:
    data = bytearray(saved(is_zip=False))
    at = data.index(b"K@t") if b"K@t" in data else data.index(b"K@")
    data[at : at + 2] = b"J" + struct.pack("<i", 2**30)
    with pytest.raises(tensors.Unreadable, match="it says that it holds 4,294,967,"):
        tensors.load(bytes(data))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("is_zip", [True, False])
def test_pickles_that_ask_for_time_or_memory(is_zip: bool) -> None:
    code = b")q\x00" + b"".join(b"h%ch%c\x86q%c" % (number, number, number + 1) for number in range(60))
    for evil in (b"\x80\x02}" + code + b"K\x01s.", b"\x80\x02" + b"}" * 3_000_000 + b".", b"\x80\x02B\xff\xff\xff\x9f."):
        if is_zip:
            stream = io.BytesIO()
            with zipfile.ZipFile(stream, "w") as packed:
                packed.writestr("archive/data.pkl", evil)
                packed.writestr("archive/version", "3\n")
            data = stream.getvalue()
        else:
            data = saved(is_zip=False)
            data = data[: data.index(b"}q", 40)] + evil[2:]
        with pytest.raises(tensors.Unreadable):
            tensors.load(data)


def test_types_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    network = torch.nn.Linear(3, 2)
    for value in (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.complex64), torch.ones(2, 3).bool()):
        found = {"weight": value, "bias": torch.ones(2)}
        with pytest.raises(Exception, match="weight has the type torch"):
            weights.matched(found, network, tmp_path / "a.pt", "linear")
    half = {"weight": torch.ones(2, 3).half(), "bias": torch.ones(2).half()}
    assert weights.matched(half, network, tmp_path / "a.pt", "linear").keys() == half.keys()


ONE = '{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,%s]}}'
HEADERS = {
    "longer than the file": (2**60, b"{}"),
    "a gigabyte": (2**30, b"{}"),
    "no JSON": (8, b"\xff" * 8),
    "deep": (2_000_000, b"[" * 2_000_000),
    "another type": (None, b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}'),
    "more than there is": (None, (ONE % (2**40, 2**42)).encode()),
    "fewer than it says": (None, (ONE % (2**62, 4)).encode()),
    "a product that wraps": (None, (ONE % ("4294967296,4294967296", 0)).encode()),
    "negative": (None, (ONE % (-1, 4)).encode()),
    "a hundred thousand of the same bytes": (
        None,
        b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}' % n for n in range(100_000)) + b"}",
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("read", [weights.read, exported.load])
@pytest.mark.parametrize("what", HEADERS)
def test_a_header_of_safetensors_asks_for_nothing(what: str, read: Any, tmp_path: Path) -> None:
    length, header = HEADERS[what]
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + b"\0" * 4)
    with pytest.raises(DataError, match=re.escape(str(path))) as caught:
        read(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.timeout(20)
@pytest.mark.parametrize("read", [weights.read, exported.load])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_what_is_no_file_of_weights_is_not_waited_for(read: Any, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    os.mkfifo(path)
    with pytest.raises(DataError, match="is not a regular file"):
        read(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="is not a regular file"):
        read(path)
    with pytest.raises(DataError, match="No such file"):
        read(tmp_path / "none.safetensors")


def test_a_program_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.mkdir, (tmp_path / "ran",)  # type: ignore[return-value]

    for data in (pickle.dumps(Evil()), pickle.dumps({"a": Evil()})):
        with pytest.raises(tensors.Unreadable):
            tensors.load(data)
    assert not (tmp_path / "ran").exists()
