"""Archives, batches and images of others: one line in bounded memory, whatever they are made to ask for."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import re
import resource
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from data import makers

LIMIT_MIB = 700  # of what the process has beside the libraries, which the child measures
READ = """
import sys
from pathlib import Path
import numpy, PIL.Image, PIL.JpegImagePlugin, PIL.PngImagePlugin
from hpc_cifar.data import sources
from hpc_cifar.errors import HpcCifarError
sources.os.sched_getaffinity = lambda pid: {0, 1}
try:
    sources.read(Path(sys.argv[1]), sys.argv[2])
except HpcCifarError as error:
    print(error)
else:
    print("READ")
line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))  # ru_maxrss is that of the parent, too
print(int(line.split()[1]) // 1024)
"""
pytestmark = pytest.mark.slow
ZERO = b"\0" * 2**20


def read(source: Path, dataset: str = "mine", most_mib: int = LIMIT_MIB) -> str:
    """What is said of a source, after less than a minute and in so much memory."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(source), dataset], capture_output=True, text=True, check=False, timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30,) * 2),
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, (done.returncode, done.stderr)
    said, peak = done.stdout.splitlines()
    assert int(peak) < most_mib, (said, peak)
    assert len(said) < 1000 and str(source) in said, said
    return said


def header(name: str = "train/a/0.png", size: int = 0, kind: bytes = tarfile.REGTYPE, **more: object) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    for key, value in more.items():
        setattr(member, key, value)
    return member.tobuf(tarfile.GNU_FORMAT)


def packed(path: Path, kind: str) -> Any:
    """A compressed file that is written in parts."""
    if kind == "gz":
        return gzip.open(path, "wb", 1)
    return lzma.open(path, "wb", preset=0) if kind == "xz" else bz2.open(path, "wb", 1)


@pytest.mark.parametrize("packing", ["xz", "gz", "bz2"])
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_a_header_that_expands(tmp_path: Path, kind: bytes, packing: str) -> None:
    with packed(tmp_path / "a", packing) as stream:
        stream.write(header("x", 256 * 2**20, kind))
        for _ in range(256):
            stream.write(ZERO)
        stream.write(header() + b"\0" * 1024)
    assert (tmp_path / "a").stat().st_size < 2 * 2**20
    assert "holds what no dataset has: a header of 268,435,456 bytes" in read(tmp_path / "a", most_mib=200)


def test_a_chain_of_headers(tmp_path: Path) -> None:
    with packed(tmp_path / "a", "gz") as stream:
        for _ in range(50_000):
            stream.write(header("x", 11, tarfile.XHDTYPE) + b"11 a=bcdef\n".ljust(512, b"\0"))
        stream.write(header() + b"\0" * 1024)
    assert "number 17 of its member" in read(tmp_path / "a", most_mib=200)


def test_headers_for_all_members_add_up(tmp_path: Path) -> None:
    with packed(tmp_path / "a", "gz") as stream:
        for number in range(1000):
            record = f"{number:06}=".encode() + b"y" * 8000 + b"\n"
            record = f"{len(record) + 5} ".encode() + record
            stream.write(header("g", len(record), tarfile.XGLTYPE) + record.ljust(-(-len(record) // 512) * 512, b"\0"))
            stream.write(header("README"))
        stream.write(b"\0" * 1024)
    assert "holds what no dataset has: a header of" in read(tmp_path / "a", most_mib=200)


def test_empty_members_without_end(tmp_path: Path) -> None:
    with packed(tmp_path / "a", "gz") as stream:
        one = header("README") * 2048
        for _ in range(1100):
            stream.write(one)
    assert "expands to more than" in read(tmp_path / "a", most_mib=200)


@pytest.mark.parametrize("packing", ["xz", "gz", "bz2"])
def test_a_tail_without_end(tmp_path: Path, packing: str) -> None:
    with packed(tmp_path / "a", packing) as stream:
        stream.write(header("README") + b"\0" * 1024)
        for _ in range(1200):
            stream.write(ZERO)
    assert "expands to more than" in read(tmp_path / "a", most_mib=200)


@pytest.mark.parametrize("name", ["README", "train/a/0.png", "data_batch_1", "train"])
def test_a_member_that_expands(tmp_path: Path, name: str) -> None:
    with packed(tmp_path / "a", "xz") as stream:
        for _ in range(8):
            stream.write(header(name, 190 * 2**20))
            for _ in range(190):
                stream.write(ZERO)
        stream.write(b"\0" * 1024)
    said = read(tmp_path / "a", "cifar10", most_mib=600)
    assert re.search(r"is no image or batch|expands to more than|is no CIFAR-10 batch", said), said


def test_sparse_members(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(header("train/a/0.png", 0, tarfile.GNUTYPE_SPARSE) + b"\0" * 1024)
    assert "a sparse file; pack it without --sparse" in read(tmp_path / "a")
    with tarfile.open(tmp_path / "b", "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("train/a/0.png")
        member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "1000000000"}
        member.size = 512
        archive.addfile(member, io.BytesIO(b"100000\n" * 73))
    assert "a sparse file; pack it without --sparse" in read(tmp_path / "b")


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices(tmp_path: Path, kind: bytes) -> None:
    (tmp_path / "a").write_bytes(header("train/a/0.png", 0, kind, linkname="/etc/passwd") + b"\0" * 1024)
    assert "is a link or device" in read(tmp_path / "a")


@pytest.mark.parametrize("name", ["/train/a/0.png", "train/../../a/0.png", "../train/a/0.png"])
def test_names_that_lead_out(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").write_bytes(header(name) + b"\0" * 1024)
    assert "points outside the archive" in read(tmp_path / "a")


def test_sizes_that_are_none(tmp_path: Path) -> None:
    for number, size in enumerate(("9" * 4000, "1" + "0" * 30, "-5", "x")):
        with tarfile.open(tmp_path / f"{number}", "w", format=tarfile.PAX_FORMAT) as archive:
            member = tarfile.TarInfo("train/a/0.png")
            member.pax_headers = {"size": size}
            archive.addfile(member)
        assert "READ" not in read(tmp_path / f"{number}")


def test_a_dictionary_of_xz(tmp_path: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0}]
    data = bytearray(lzma.compress(header() + b"\0" * 1024, filters=filters))
    at = data.index(b"\x21\x01") + 2
    data[at] = 40  # of 4 GiB
    begin = 12
    length = (data[begin] + 1) * 4
    data[begin + length - 4 : begin + length] = struct.pack("<I", zlib.crc32(bytes(data[begin : begin + length - 4])))
    (tmp_path / "a").write_bytes(data)
    assert "xz asks for more than 512 MiB of memory" in read(tmp_path / "a")


def test_files_of_xz_that_are_put_together_are_read_as_one(tmp_path: Path) -> None:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for name, data in makers.image_files(2, ("a", "b"), kind="PNG").items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    plain = whole.getvalue()
    (tmp_path / "a").write_bytes(lzma.compress(plain[:5000]) + b"\0" * 8 + lzma.compress(plain[5000:]))
    said = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "a"), "mine"], capture_output=True, text=True, check=False
    )
    assert said.stdout.startswith("READ"), said


# -- images --------------------------------------------------------------------------------------------------------------


def png(width: int, height: int, tail: bytes = b"") -> bytes:
    """A black image, however large, in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compressobj(9)
    packed = b"".join(rows.compress(b"\0" * (3 * width + 1)) for _ in range(min(height, 2000))) + rows.flush()
    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", packed) + tail + chunk(b"IEND", b"")


@pytest.mark.parametrize("tail", [b"", b"\0" * 30_000])
def test_images_that_expand(tmp_path: Path, tail: bytes) -> None:
    """7 kB of an archive, 4.5 GiB of pixels."""
    data = png(1024, 1024) + tail
    names = [f"{split}/{label}/{number}.png" for number in range(400) for split in ("train", "test") for label in "ab"]
    made = makers.write_tar(tmp_path / "a", dict.fromkeys(names, data), "w:xz")
    assert made.stat().st_size < 200_000
    assert "MiB of pixels, hundreds of times its size" in read(made)


def test_the_first_image_may_be_the_small_one(tmp_path: Path) -> None:
    names = [f"{split}/{label}/{number:03}.png" for number in range(300) for split in ("train", "test") for label in "ab"]
    files = dict.fromkeys(names, png(1024, 1024))
    files[names[0]] = png(32, 32)
    assert "all should be equal" in read(makers.write_tar(tmp_path / "a", files, "w:xz"), most_mib=200)


@pytest.mark.parametrize("size", [(1025, 8), (20_000, 20_000), (2**31 - 1, 2**31 - 1), (12_000, 10_000)])
def test_images_of_any_size(tmp_path: Path, size: tuple[int, int]) -> None:
    said = read(makers.write_tar(tmp_path / "a", {"train/a/0.png": png(*size)}), most_mib=200)
    assert re.search(r"pixels in mode RGB; should be at most 1024 x 1024|has more pixels than 1024 x 1024", said), said


# -- pickles -------------------------------------------------------------------------------------------------------------


def nested(depth: int) -> bytes:
    """A tuple of the same tuple twice, and so on: a few bytes, 2^depth parts; left on the stack."""
    code = b")q\x00"
    for number in range(depth):
        code += b"h%ch%c\x86q%c" % (number, number, number + 1)
    return code


PICKLES = {
    "a length of bytes": b"\x80\x02B\xff\xff\xff\x9f.",
    "a length of text": b"\x80\x02X\xff\xff\xff\x9f.",
    "a long length": b"\x80\x04\x8e\xff\xff\xff\x9f\x00\x00\x00\x00.",
    "an array of bytes": b"\x80\x05\x96\xff\xff\xff\x9f\x00\x00\x00\x00.",
    "a place in the memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a place in words": b"\x80\x02}p2147483000\n.",
    "a frame": b"\x80\x04\x95\xff\xff\xff\xff\x00\x00\x00\x00}.",
    "dictionaries": b"\x80\x02" + b"}" * 60_000_000 + b".",
    "a nested key": b"\x80\x02}" + nested(60) + b"K\x01s.",
    "a nested type": b"\x80\x02}cnumpy\ndtype\n" + nested(60) + b"\x85R.",
    "a nested label": b"\x80\x02}U\x06labels]" + nested(60) + b"as.",
    "a number of many digits": b"\x80\x02}U\x06labels]\x8b" + struct.pack("<I", 2**20) + b"\x7f" * 2**20 + b"as.",
    "texts": b"\x80\x02]c_codecs\nencode\nq\x00X\x00\x00\x10\x00"
    + b"a" * 2**20
    + b"q\x01U\x06latin1\x86q\x02"
    + b"0h\x00h\x02Ra" * 4000
    + b".",
    "a program": b"cos\nsystem\n(S'true'\ntR.",
    "an object": b"(i__main__\nX\n.",
}


@pytest.mark.parametrize("what", PICKLES)
def test_batches_that_ask_for_time_or_memory(tmp_path: Path, what: str) -> None:
    files = {"cifar-10-batches-py/data_batch_1": PICKLES[what]}
    said = read(makers.write_tar(tmp_path / "a", files), "cifar10", most_mib=500)
    assert "data_batch_1" in said and "READ" not in said


def test_real_batches_of_every_protocol_are_read(tmp_path: Path) -> None:
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        made = makers.write_tar(tmp_path / f"{protocol}", makers.batch_files(protocol=protocol))
        done = subprocess.run([sys.executable, "-c", READ, str(made), "cifar10"], capture_output=True, text=True, check=False)
        assert done.stdout.startswith("READ"), done
