"""Staging with real processes, real locks and real full disks."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hpc_cifar.data import store
from hpc_cifar.data.sources import Dataset
from hpc_cifar.data.staging import staged
from hpc_cifar.data.store import Store

# copies, says so, and waits for a line before it leaves; one that is to halt is stopped by a signal in the middle of its copy
USER = """\
import os, signal, sys
from pathlib import Path
from hpc_cifar.data import staging
from hpc_cifar.data.staging import staged
whole, halts = staging._copy_file, sys.argv[4:]
def copied(source, target):
    whole(source, target)
    if halts:
        halts.clear()
        os.kill(os.getpid(), signal.SIGSTOP)
staging._copy_file = copied
with staged(Path(sys.argv[1]), sys.argv[2], sys.argv[3]) as found:
    print(found.local, found.mib > 0, found.data_root, found.note, sep="|", flush=True)
    sys.stdin.readline()
    from hpc_cifar.data.store import Store
    assert Store.open(found.data_root, sys.argv[2], verify=True)
"""


def make_store(root: Path, count: int) -> Path:
    """``<root>/noise``: two splits of ``count`` images each, 3 KiB an image."""
    generator = np.random.default_rng(count)
    images = generator.integers(0, 256, (2, count, 32, 32, 3), np.uint8)
    labels = np.arange(count, dtype=np.int64) % 10
    data = Dataset(images[0], labels, images[1], labels, tuple("abcdefghij"), "noise", True, "none")
    (root / "noise").mkdir(parents=True)
    store.write(root / "noise", data, {"path": "noise"}, "now")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("small"), 100)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 60 MiB, so that a copy takes a while."""
    return make_store(tmp_path_factory.mktemp("large"), 10_000)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    made = tmp_path / "scratch"
    made.mkdir()
    return made


class User:
    """Another process that stages.

    Args:
        halts: once the first file is copied; it goes on at SIGCONT.
    """

    def __init__(self, data: Path, scratch: Path, halts: bool = False) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", USER, str(data), "noise", str(scratch), *(["halts"] if halts else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def begun(self) -> tuple[bool, bool, Path, str]:
        """Whether it trains from a copy, whether it made it, where it is, and its note."""
        assert self.process.stdout is not None
        local, copied, root, note = self.process.stdout.readline().strip().split("|")
        return local == "True", copied == "True", Path(root), note

    def leave(self) -> None:
        self.process.communicate("\n", timeout=30)
        assert self.process.returncode == 0

    def halted(self) -> None:
        """Wait until it is."""
        eventually(lambda: Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2].startswith("T"))

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=30)


def partial(scratch: Path) -> list[Path]:
    return list(scratch.glob("hpc-cifar-*/*/.partial/noise/*"))


def eventually(check: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_without_scratch_nothing_is_staged(data: Path) -> None:
    with staged(data, "noise", "") as found:
        assert (found.data_root, found.note, found.local) == (data, "", False)


def test_a_copy_is_verified_and_goes_with_its_user(data: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SCRATCH", str(scratch))
    with staged(data, "noise", "$MY_SCRATCH") as found:
        assert found.local
        assert found.data_root.is_relative_to(scratch)
        assert Store.open(found.data_root, "noise", verify=True).digest == Store.open(data, "noise").digest
        assert found.note.startswith("staging: copied 0.6 MiB of noise to ")
        assert not partial(scratch)
        assert found.data_root.parent.stat().st_mode & 0o777 == 0o700
    assert list(scratch.iterdir()) == []


def test_two_processes_at_once_copy_once(large: Path, scratch: Path) -> None:
    users = [User(large, scratch) for _ in range(3)]
    begun = [user.begun() for user in users]
    assert [local for local, *_ in begun] == [True] * 3
    assert sorted(copied for _, copied, *_ in begun) == [False, False, True]
    assert len({root for *_, root, _ in begun}) == 1
    for user in users:  # the copy stays for the last one, who reads all of it before leaving
        assert begun[0][2].is_dir()
        user.leave()
    assert list(scratch.iterdir()) == []


def test_a_killed_user_neither_takes_the_copy_along_nor_keeps_it(data: Path, scratch: Path) -> None:
    first = User(data, scratch)
    assert first.begun()[1]
    second = User(data, scratch)
    assert second.begun()[:2] == (True, False)
    first.kill()
    second.leave()
    assert list(scratch.iterdir()) == []


def test_what_killed_users_left_is_used_or_swept(data: Path, large: Path, scratch: Path) -> None:
    user = User(data, scratch)
    _, _, left, _ = user.begun()
    user.kill()
    assert left.is_dir()
    again = User(data, scratch)
    assert again.begun()[:3] == (True, False, left)  # the same bytes, verified
    again.kill()
    with staged(large, "noise", str(scratch)):
        assert not left.exists()
    assert list(scratch.iterdir()) == []


def test_a_half_copy_of_a_killed_process_is_replaced(large: Path, scratch: Path) -> None:
    copier = User(large, scratch, halts=True)
    copier.halted()
    copier.process.send_signal(signal.SIGKILL)
    copier.process.wait()
    assert partial(scratch)
    assert not list(scratch.glob("hpc-cifar-*/*/noise"))
    with staged(large, "noise", str(scratch)) as found:
        assert found.mib > 0
        assert Store.open(found.data_root, "noise", verify=True)
        assert not partial(scratch)
    assert list(scratch.iterdir()) == []


def test_the_next_one_copies_when_the_copier_is_killed(large: Path, scratch: Path) -> None:
    copier = User(large, scratch, halts=True)
    copier.halted()
    waiting = User(large, scratch)
    copier.kill()
    assert waiting.begun()[:2] == (True, True)
    waiting.leave()


def test_a_stop_signal_ends_a_copy_at_once_and_leaves_nothing(large: Path, scratch: Path) -> None:
    user = User(large, scratch)
    eventually(lambda: partial(scratch))
    user.process.send_signal(signal.SIGINT)  # KeyboardInterrupt, as the job's own stop exception not an Exception
    user.process.communicate(timeout=10)
    assert user.process.returncode == -signal.SIGINT
    assert list(scratch.iterdir()) == []


def damage(folder: Path) -> None:
    path = folder / "noise" / "train-images.npy"
    with path.open("r+b") as stream:
        stream.seek(5000)
        byte = stream.read(1)
        stream.seek(5000)
        stream.write(bytes([byte[0] ^ 1]))


def test_an_altered_copy_is_replaced(data: Path, scratch: Path) -> None:
    user = User(data, scratch)
    _, _, left, _ = user.begun()
    user.kill()
    damage(left)
    with staged(data, "noise", str(scratch)) as found:
        assert found.mib > 0
        assert Store.open(found.data_root, "noise", verify=True)


def test_a_damaged_copy_in_use_is_left_alone(data: Path, scratch: Path) -> None:
    user = User(data, scratch)
    _, _, folder, _ = user.begun()
    os.truncate(folder / "noise" / "train-images.npy", 5000)
    with staged(data, "noise", str(scratch)) as found:
        assert found.data_root == data
        assert "is damaged and in use" in found.note
    assert folder.is_dir()
    user.kill()
    with staged(data, "noise", str(scratch)) as found:
        assert found.mib > 0


def test_a_damaged_store_is_not_staged(data: Path, scratch: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    damage(tmp_path / "data")
    with staged(tmp_path / "data", "noise", str(scratch)) as found:
        assert found.data_root == tmp_path / "data"
        assert "train-images.npy is not what was written" in found.note
    assert list(scratch.iterdir()) == []


@pytest.fixture
def small_disk(scratch: Path) -> Iterator[Path]:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "small", str(scratch)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no small file system can be mounted here")
    yield scratch
    subprocess.run(["umount", str(scratch)], check=True)


def test_no_room(data: Path, small_disk: Path) -> None:
    with staged(data, "noise", str(small_disk)) as found:
        assert not found.local
        assert found.note.startswith(
            f"warning: noise is not staged to {small_disk} (no room: it needs 1.6 MiB, 1.0 MiB are free)"
        )
        assert found.note.endswith(f"; training from {data}")
    assert list(small_disk.iterdir()) == []


def test_a_quota_that_ends_in_mid_copy(data: Path, scratch: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with staged(data, "noise", str(scratch)) as found:
            assert "(File too large)" in found.note
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("scratch", "words"),
    [
        ("/nowhere/at/all", "there is no folder /nowhere/at/all on "),
        ("$NOT_SET_HERE/x", "has a variable that is not set on "),
        ("relative", "there is no folder relative on "),
    ],
)
def test_a_scratch_that_is_not_there(data: Path, scratch: str, words: str) -> None:
    with staged(data, "noise", scratch) as found:
        assert found.data_root == data
        assert words in found.note
        assert "\n" not in found.note


def test_a_folder_that_others_can_write_is_not_trusted(data: Path, scratch: Path, tmp_path: Path) -> None:
    base = scratch / f"hpc-cifar-{os.getuid()}"
    base.mkdir()
    base.chmod(0o777)
    with staged(data, "noise", str(scratch)) as found:
        assert "not a folder that only you can write" in found.note
    base.rmdir()
    base.symlink_to(tmp_path)
    with staged(data, "noise", str(scratch)) as found:
        assert "not a folder that only you can write" in found.note


def test_waiting_has_a_bound(large: Path, scratch: Path) -> None:
    copier = User(large, scratch, halts=True)
    copier.halted()
    try:
        with staged(large, "noise", str(scratch), wait_s=0.2) as found:
            assert "another process has held" in found.note
            assert found.data_root == large
    finally:
        copier.process.send_signal(signal.SIGCONT)
    assert copier.begun()[1]
    copier.leave()
