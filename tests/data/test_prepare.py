"""``prepare``: the whole store or none, from the right source, by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data import makers
from rich.console import Console

from hpc_cifar import owner
from hpc_cifar.data import prepare as preparing
from hpc_cifar.data.download import Unreachable
from hpc_cifar.data.prepare import prepare
from hpc_cifar.data.store import Store
from hpc_cifar.errors import DataError, UsageError

pytestmark = pytest.mark.usefixtures("no_archive")


def said(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def left_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name != ".cifar10.lock")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return makers.write_tar(tmp_path / "cifar.tar.gz", makers.batch_files())


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return makers.write_tar(tmp_path / "other.tar", makers.image_files())


def test_a_store_is_whole(tmp_path: Path, archive: Path, console: Console) -> None:
    root = tmp_path / "deep" / "root"
    made = prepare("cifar10", archive=archive, root=root, console=console)
    assert made.path == root / "cifar10" and made.train.images.shape == (100, 32, 32, 3)
    assert isinstance(made.train.images, np.memmap) and not made.train.images.flags.writeable
    manifest = json.loads((made.path / "manifest.json").read_text())
    assert manifest["train"]["per_class"]["cat"] == 10 and manifest["test"]["images"] == 20
    pixels = np.asarray(made.train.images).reshape(-1, 3) / 255
    np.testing.assert_allclose(manifest["train"]["mean"], pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(manifest["train"]["std"], pixels.std(0), rtol=1e-12)
    assert manifest["source"]["path"] == str(archive) and len(manifest["source"]["sha256"]) == 64
    assert left_in(root) == ["cifar10"]
    assert "NOT verified" in said(console) and "warning: unverified" in said(console)
    assert Store.open(root, "cifar10", verify=True).digest == made.digest


def test_the_same_source_is_not_read_again(
    tmp_path: Path, archive: Path, other: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    first = prepare("cifar10", archive=archive, root=root, console=console)
    with monkeypatch.context() as patch:
        patch.setattr(preparing.sources, "read", lambda *_: pytest.fail("read again"))
        for source in (archive, None):
            assert prepare("cifar10", archive=source, root=root, console=console).digest == first.digest
        os.utime(archive)
        moved = archive.rename(tmp_path / "moved.tar.gz")
        assert prepare("cifar10", archive=moved, root=root, console=console).digest == first.digest
        assert said(console).count("already prepared") == 3
        with pytest.raises(DataError, match=r"was made from .*cifar\.tar\.gz, not from .*other\.tar; add --force"):
            prepare("cifar10", archive=other, root=root, console=console)
        patch.setenv("HPC_CIFAR_ARCHIVE", str(other))
        with pytest.raises(DataError, match="add --force"):
            prepare("cifar10", archive=None, root=root, console=console)
    replaced = prepare("cifar10", archive=other, root=root, force=True, console=console)
    assert replaced.digest != first.digest and left_in(root) == ["cifar10"]


def test_a_folder_is_recognised(tmp_path: Path, console: Console) -> None:
    folder = makers.write_folder(tmp_path / "images", makers.image_files())
    root = tmp_path / "root"
    prepare("cifar10", archive=folder, root=root, console=console)
    prepare("cifar10", archive=folder, root=root, console=console)
    assert "already prepared" in said(console)
    (folder / "train" / "cat" / "0000.jpg").write_bytes(makers.image_bytes(999))
    with pytest.raises(DataError, match="add --force"):
        prepare("cifar10", archive=folder, root=root, console=console)


@pytest.mark.parametrize("colour", [True, False])
def test_a_terminal_is_told_how_much_has_been_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, colour: bool) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    files = makers.image_files()
    folder = makers.write_folder(tmp_path / "images", files)
    terminal = Console(file=io.StringIO(), force_terminal=True)
    prepare("cifar10", archive=folder, root=tmp_path / "root", console=terminal)
    assert isinstance(terminal.file, io.StringIO)
    said = terminal.file.getvalue()
    shares = re.findall(r"reading .*?(\d+)%", re.sub(r"\x1b\[[0-9;]*m", "", said))
    assert int(shares[-1]) == round(100 * (len(files) - 1) / len(files)), "before the last file"
    assert bool(re.search(r"\x1b\[(?:[0-9;]*;)?3[0-8][;m]", said)) == colour


def test_digits_and_names(tmp_path: Path, archive: Path, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_CIFAR_ARCHIVE", str(archive))  # is about CIFAR-10
    made = prepare("digits", archive=None, root=tmp_path / "root", console=console)
    assert made.label == "digits" and made.classes == tuple("0123456789")
    for name in ("../x", "A", "", "a" * 33, "a/b", ".hidden"):
        with pytest.raises(UsageError, match="should be lower-case"):
            prepare(name, archive=archive, root=tmp_path / "root", console=console)
        with pytest.raises(UsageError):
            Store.open(tmp_path, name)
    with pytest.raises(UsageError, match="take no archive"):
        prepare("digits", archive=archive, root=tmp_path, console=console)
    with pytest.raises(UsageError, match="--archive"):
        prepare("mine", archive=None, root=tmp_path, console=console)


def test_without_anything_it_says_what_to_give(tmp_path: Path, console: Console) -> None:
    with pytest.raises(Unreachable, match="HPC_CIFAR_ARCHIVE"):
        prepare("cifar10", archive=None, root=tmp_path / "root", download=False, console=console)
    with pytest.raises(DataError, match="no such file"):
        prepare("cifar10", archive=tmp_path / "none", root=tmp_path / "root", console=console)


def test_a_bad_archive_leaves_nothing_and_keeps_the_good_store(tmp_path: Path, archive: Path, console: Console) -> None:
    root = tmp_path / "root"
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(archive.read_bytes()[:-5])
    with pytest.raises(DataError, match="truncated or damaged"):
        prepare("cifar10", archive=cut, root=root, console=console)
    assert left_in(root) == []
    good = prepare("cifar10", archive=archive, root=root, console=console)
    with pytest.raises(DataError):
        prepare("cifar10", archive=cut, root=root, force=True, console=console)
    assert Store.open(root, "cifar10", verify=True).digest == good.digest and left_in(root) == ["cifar10"]


@pytest.mark.parametrize("part", ["manifest.json", *(f"{s}-{p}.npy" for s in ("train", "test") for p in ("images", "labels"))])
@pytest.mark.parametrize("damage", ["gone", "cut", "altered", "header", "empty"])
def test_a_damaged_store_is_refused_and_mended(tmp_path: Path, archive: Path, console: Console, part: str, damage: str) -> None:
    root = tmp_path / "root"
    good = prepare("cifar10", archive=archive, root=root, console=console).digest
    path = root / "cifar10" / part
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-1] if part.endswith("npy") else data[: len(data) // 2])
    elif damage == "altered":
        place = data.index(b'"sha256": "') + 12 if part == "manifest.json" else len(data) - 20
        data[place] = data[place] ^ 3
        path.write_bytes(data)
    elif damage == "header":
        path.write_bytes(b"x" * 8 + data[8:])
    else:
        path.write_bytes(b"")
    command = rf"hpc-cifar prepare cifar10 --root {root} --force"
    with pytest.raises(DataError, match=rf"the store is damaged \(.*\); run: {command}$"):
        Store.open(root, "cifar10", verify=True)
    if damage != "altered" or part == "manifest.json":  # found without reading every byte
        with pytest.raises(DataError, match=command):
            Store.open(root, "cifar10")
    fixed = prepare("cifar10", archive=archive, root=root, console=console)
    assert fixed.digest == good and "building it anew" in said(console)


def test_a_missing_store_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_CIFAR_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"is not prepared; run: hpc-cifar prepare cifar10$"):
        Store.open(tmp_path, "cifar10")


# -- processes and disks ---------------------------------------------------------------------------------------------------

SLOW = """
    import sys, time
    from pathlib import Path
    from rich.console import Console
    from hpc_cifar.data import prepare, store
    write = store.write
    def slow(*arguments):
        print("building", flush=True)
        time.sleep(float(sys.argv[3]))
        write(*arguments)
    store.write = slow
    prepare.prepare("cifar10", archive=Path(sys.argv[1]), root=Path(sys.argv[2]), console=Console(stderr=True))
"""


@contextlib.contextmanager
def slow_prepare(archive: Path, root: Path, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """Another process that has begun to build."""
    command = [sys.executable, "-c", textwrap.dedent(SLOW), str(archive), str(root), str(seconds)]
    repository = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout and process.stdout.readline() == "building\n"
            yield process
        finally:
            process.kill()


def test_a_second_prepare_is_told_who_works(tmp_path: Path, archive: Path, console: Console) -> None:
    root = tmp_path / "root"
    with slow_prepare(archive, root, 30) as first:
        begin = time.monotonic()
        with pytest.raises(DataError, match=rf"is being prepared by process {first.pid} on \S+; .* --wait"):
            prepare("cifar10", archive=archive, root=root, console=console)
        assert time.monotonic() - begin < 5
        assert prepare("digits", archive=None, root=root, console=console).label == "digits"  # another dataset may go on
    assert any(name.endswith(".tmp") for name in left_in(root))  # it was killed
    prepare("cifar10", archive=archive, root=root, console=console)
    assert left_in(root) == [".digits.lock", "cifar10", "digits"]


@pytest.mark.slow
def test_waiting_for_the_other_prepare(tmp_path: Path, archive: Path, console: Console) -> None:
    root = tmp_path / "root"
    with slow_prepare(archive, root, 1.5) as first:
        made = prepare("cifar10", archive=archive, root=root, wait=True, console=console)
        assert first.wait() == 0
    assert made.manifest["train"]["images"] == 100 and "already prepared" in said(console)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a real file system of 1 MiB; skipped where it may not be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "hpc-cifar-test", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_no_half_store(tmp_path: Path, small_disk: Path, console: Console) -> None:
    big = makers.write_tar(tmp_path / "big.tar", makers.batch_files(100))
    with pytest.raises(DataError, match=r"the disk is full: the store needs 2 MiB, \d+ MiB are free .*HPC_CIFAR_DATA$"):
        prepare("cifar10", archive=big, root=small_disk, console=console)
    assert left_in(small_disk) == []
    small = makers.write_tar(tmp_path / "small.tar", makers.batch_files(20))
    good = prepare("cifar10", archive=small, root=small_disk, console=console).digest
    with pytest.raises(DataError, match="the disk is full"):
        prepare("cifar10", archive=big, root=small_disk, force=True, console=console)
    assert Store.open(small_disk, "cifar10", verify=True).digest == good


def test_a_file_size_limit_is_a_full_disk(tmp_path: Path, archive: Path, console: Console) -> None:
    root = tmp_path / "root"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(DataError, match="the disk is full"):
            prepare("cifar10", archive=archive, root=root, console=console)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert left_in(root) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_an_error_at_any_moment_leaves_the_old_store(
    tmp_path: Path, archive: Path, other: Path, console: Console, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    root = tmp_path / "root"
    good = prepare("cifar10", archive=archive, root=root, console=console).digest
    for place in ("write", "rename"):
        with monkeypatch.context() as patch:
            if place == "write":
                patch.setattr(preparing.store, "write", fails(number))
            else:
                patch.setattr(Path, "rename", fails(number, Path.rename, lambda path: path.name.endswith(".tmp")))
            with pytest.raises(DataError, match=os.strerror(number)):
                prepare("cifar10", archive=other, root=root, force=True, console=console)
        assert Store.open(root, "cifar10", verify=True).digest == good and left_in(root) == ["cifar10"]


def fails(number: int, otherwise: Any = None, when: Any = None) -> Any:
    def function(*arguments: Any, **options: Any) -> Any:
        if when is None or when(arguments[0]):
            raise OSError(number, os.strerror(number))
        return otherwise(*arguments, **options)

    return function


def test_a_folder_that_cannot_be_written(tmp_path: Path, archive: Path, console: Console) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be prepared"):
        prepare("cifar10", archive=archive, root=tmp_path / "file" / "root", console=console)


def test_the_real_archive(cifar_data: Path) -> None:
    made = Store.open(cifar_data, "cifar10", verify=True)
    assert made.label in ("CIFAR-10", "JPEG CIFAR-10", "CIFAR-10 lossless subset") and made.manifest["verified"]
    if made.label != "CIFAR-10 lossless subset":
        assert np.bincount(made.train.labels).tolist() == [5000] * 10 and np.bincount(made.test.labels).tolist() == [1000] * 10
        np.testing.assert_allclose(made.manifest["train"]["mean"], [0.4914, 0.4822, 0.4465], atol=1e-3)


def test_the_lossless_subset(lossless_archive: Path, tmp_path: Path, console: Console) -> None:
    prepare("cifar10", archive=lossless_archive, root=tmp_path, console=console)
    made = Store.open(tmp_path, "cifar10", verify=True)
    assert made.label == "CIFAR-10 lossless subset" and made.manifest["verified"]
    assert (len(made.train.labels), len(made.test.labels)) == (5085, 1017)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    prepare("digits", archive=None, root=tmp_path, console=console)
    words = f"warning: {tmp_path}: this file system has no locks: prepare digits by one command at a time"
    assert said(console).splitlines()[0] == words
    assert Store.open(tmp_path, "digits").label == "digits"


@pytest.mark.parametrize("hard", [False, True])
def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path, console: Console, hard: bool) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    root = tmp_path / "root"
    root.mkdir()
    (os.link if hard else os.symlink)(precious, root / ".digits.lock")
    with pytest.raises(
        DataError, match=r"cannot be prepared: \.digits\.lock is (a link, which is not followed|no file of its own)"
    ):
        prepare("digits", archive=None, root=root, console=console)
    assert precious.read_text() == "precious"
    assert [path.name for path in root.iterdir()] == [".digits.lock"]


def test_what_is_refused_leaves_no_lock(tmp_path: Path, archive: Path, console: Console) -> None:
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(archive.read_bytes()[:2000])
    for name, source in (("cifar10", cut), ("mine", cut)):
        with pytest.raises(DataError):
            prepare(name, archive=source, root=tmp_path / "root", console=console)
        assert list((tmp_path / "root").iterdir()) == []


def test_a_store_that_somebody_else_set_aside_is_not_brought_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    prepare("digits", archive=None, root=tmp_path, console=console)
    (tmp_path / "digits").rename(tmp_path / ".digits.planted.old")
    monkeypatch.setattr(owner, "uid", lambda: os.geteuid() + 1)
    prepare("digits", archive=None, root=tmp_path, console=console)
    assert (tmp_path / ".digits.planted.old").is_dir() and (tmp_path / "digits").is_dir()
