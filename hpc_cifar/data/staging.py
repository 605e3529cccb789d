"""A prepared dataset on node-local scratch: copied once a node, verified, shared by all who train there.

<scratch>/hpc-cifar-<uid>/lock                  held while a copy is made or removed; goes with the last copy
<scratch>/hpc-cifar-<uid>/<digest>/users        everyone who uses the copy holds a shared lock on it
<scratch>/hpc-cifar-<uid>/<digest>/<dataset>/   the copy; it gets this name when it is whole and verified
<scratch>/hpc-cifar-<uid>/<digest>-ffcv/         the same with FFCV's file
<scratch>/hpc-cifar-<uid>/<digest>/.partial/    one that is being made, or that a killed process left

The kernel frees the locks of a process however it ends, so a killed user neither keeps a copy for ever nor takes it from the
others. What the last user of a copy left by being killed is removed by the next one who stages anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from .. import owner
from ..errors import DataError
from . import beton
from .store import MANIFEST, PARTS, SPLITS, Store

COPY_WAIT_S = 300.0  # for another process that copies; after it the shared store serves
LEAVE_WAIT_S = 10.0
POLL_S = 0.02
BLOCK = 4 * 2**20  # bytes between two looks at the signals
SPARE = 2**20  # bytes for folders and file system blocks


class NotStaged(Exception):
    """Why the shared store has to serve."""


@dataclasses.dataclass(frozen=True)
class Staged:
    """Where to train from; ``note`` is one line for the log, "" without a scratch folder."""

    data_root: Path
    note: str = ""
    local: bool = False  # whether data_root is the copy, every byte of which was verified
    mib: float = 0.0  # copied by this process
    seconds: float = 0.0  # copying, verifying and waiting


@contextlib.contextmanager
def staged(
    data_root: Path, dataset: str, scratch: str, *, with_beton: bool = False, wait_s: float = COPY_WAIT_S
) -> Iterator[Staged]:
    """Train from a copy of ``<data_root>/<dataset>`` on this node while the context lasts, or from ``data_root`` itself.

    Every process of the node calls it; the first one copies, the others wait for it, the last one to leave removes the copy.

    Args:
        scratch: a folder of this node; variables such as ``$TMPDIR`` are expanded here. "" means no staging.
        with_beton: copy FFCV's file too.
        wait_s: how long to wait for another process's copy.
    """
    if not scratch:
        yield Staged(data_root)
        return
    use: _Use | None = None
    try:
        use = _Use(Store.open(data_root, dataset), _own_folder(scratch), with_beton)
        result = use.begin(wait_s)
    except (NotStaged, DataError, OSError) as error:
        why = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        why = why.partition("; run:")[0]
        result = Staged(data_root, f"warning: {dataset} is not staged to {scratch} ({why}); training from {data_root}")
    except BaseException:  # a stop signal
        if use is not None:
            use.end()
        raise
    try:
        yield result
    finally:
        if use is not None:
            use.end()


def _own_folder(scratch: str) -> Path:
    """This user's folder in ``scratch``, not made yet; refused if it is somebody else's."""
    expanded = os.path.expandvars(scratch)
    if "$" in expanded:
        raise NotStaged(f"{expanded} has a variable that is not set on {os.uname().nodename}")
    folder = Path(expanded)
    if not folder.is_absolute() or not folder.is_dir():
        raise NotStaged(f"there is no folder {expanded} on {os.uname().nodename}")
    return folder / f"hpc-cifar-{owner.uid()}"


class _Use:
    """This process's use of one copy."""

    def __init__(self, source: Store, base: Path, with_beton: bool) -> None:
        self.source, self.base = source, base
        self.beton = source.train.beton if with_beton else None
        self.folder = base / (source.digest[:16] + ("-ffcv" if self.beton else ""))
        self.bytes = sum(int(entry["bytes"]) for entry in source.manifest["files"].values())
        self.bytes += self.beton.stat().st_size if self.beton else 0
        self.users: int | None = None  # file descriptor, locked as long as the copy is used

    def begin(self, wait_s: float) -> Staged:
        began = time.monotonic()
        with _only_one(self.base, wait_s):
            try:
                copied = self._find_or_copy()
            except BaseException:
                self._leave()
                raise
        seconds = time.monotonic() - began
        label, mib = self.source.label, copied / 2**20
        what = f"copied {mib:.1f} MiB of {label} to" if copied else f"uses the copy of {label} in"
        note = f"staging: {what} {self.folder} on {os.uname().nodename} in {seconds:.2f} s"
        return Staged(self.folder, note, True, mib, seconds)

    def end(self) -> None:
        """Let go of the copy, and remove it if nobody else uses it. Never raises: it costs some scratch at worst."""
        with contextlib.suppress(OSError, NotStaged):
            if self.users is not None:
                with _only_one(self.base, LEAVE_WAIT_S):
                    self._leave()
        if self.users is not None:
            os.close(self.users)
            self.users = None

    def _find_or_copy(self) -> int:
        """Become a user of a good copy; the number of bytes that had to be copied. The lock is held."""
        self._sweep()
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.users = _open(self.folder / "users")
        alone = _lock(self.users, fcntl.LOCK_EX)
        copied = 0
        if not self._is_good(verify=alone):
            if not alone:  # it must not be taken from under those who use it
                raise NotStaged(f"the copy in {self.folder} is damaged and in use")
            copied = self._copy()
        if not _lock(self.users, fcntl.LOCK_SH):  # cannot be: who wants it alone has to hold the lock that is held here
            raise NotStaged(f"{self.folder / 'users'} is locked")
        return copied

    def _leave(self) -> None:
        """A folder goes only with its users' lock held alone, so that no user ever loses it. The lock is held."""
        if self.users is not None:
            if _lock(self.users, fcntl.LOCK_EX):
                shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self.users)
            self.users = None

    def _is_good(self, *, verify: bool) -> bool:
        """Whether the copy is whole. Others rely on one in use: its first user has verified it, so a quick look is enough."""
        try:
            return Store.open(self.folder, self.source.dataset, verify=verify).digest == self.source.digest
        except DataError:
            return False

    def _copy(self) -> int:
        """Replace whatever is there by a verified copy; the number of bytes."""
        needed = self.bytes + SPARE
        partial = self.folder / ".partial"
        for left in (partial, self.folder / self.source.dataset):
            shutil.rmtree(left, ignore_errors=True)
        free = shutil.disk_usage(self.base).free
        if free < needed:
            raise NotStaged(f"no room: it needs {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free")
        target = partial / self.source.dataset
        target.mkdir(parents=True)
        more = (beton.NAME, beton.FACTS) if self.beton else ()
        for name in (*(f"{split}-{part}.npy" for split in SPLITS for part in PARTS), *more, MANIFEST):
            _copy_file(self.source.path / name, target / name)
        if Store.open(partial, self.source.dataset, verify=True).digest != self.source.digest:
            raise NotStaged("the store was exchanged while it was copied")
        if self.beton:
            try:
                beton.verify_copy(target / beton.NAME)
            except DataError:
                raise NotStaged(f"{beton.NAME} is damaged or was exchanged while it was copied") from None
        target.rename(self.folder / self.source.dataset)
        partial.rmdir()
        return self.bytes

    def _sweep(self) -> None:
        """Remove other copies that nobody uses any more; the lock is held, so nobody is about to."""
        for other in self.base.iterdir():
            if other.is_dir() and other != self.folder and not _in_use(other):
                shutil.rmtree(other, ignore_errors=True)


def _copy_file(source: Path, target: Path) -> None:
    with source.open("rb") as reader, target.open("xb") as writer:
        while block := reader.read(BLOCK):
            writer.write(block)


def _in_use(folder: Path) -> bool:
    try:
        users = _open(folder / "users")
    except OSError:
        return False
    try:
        return not _lock(users, fcntl.LOCK_EX)
    finally:
        os.close(users)


def _open(path: Path) -> int:
    return os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _lock(descriptor: int, kind: int) -> bool:
    """Take or convert a lock without waiting."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _only_one(base: Path, wait_s: float) -> Iterator[None]:
    """Hold the lock of ``base``, which is made if needed and removed again once it holds no copy.

    Raises:
        NotStaged: another process held it for ``wait_s``, or the folder is not ours alone.
        OSError: the file system cannot be written, or has no locks.
    """
    deadline = time.monotonic() + wait_s
    path = base / "lock"
    while True:
        with contextlib.suppress(FileExistsError):
            base.mkdir(mode=0o700)
        descriptor = -1
        try:
            about = base.lstat()  # in /dev/shm or /tmp anybody may have made it
            if not stat.S_ISDIR(about.st_mode) or about.st_uid != owner.uid() or about.st_mode & 0o022:
                raise NotStaged(f"{base} is not a folder that only you can write")
            descriptor = _open(path)
            # the file may have been removed, and another one made, between the opening and the lock
            if _lock(descriptor, fcntl.LOCK_EX) and path.stat().st_ino == os.fstat(descriptor).st_ino:
                break
        except FileNotFoundError:
            pass
        except BaseException:
            if descriptor >= 0:
                os.close(descriptor)
            raise
        if descriptor >= 0:
            os.close(descriptor)
        if time.monotonic() > deadline:
            raise NotStaged(f"another process has held {path} for {wait_s:.0f} s")
        time.sleep(POLL_S)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if all(entry.name == "lock" for entry in base.iterdir()):
                path.unlink()
                base.rmdir()
        os.close(descriptor)
