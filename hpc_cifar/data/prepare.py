"""Find or download a dataset, verify it and build its store: whole or not at all, by one process at a time."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from .. import files, owner, planted
from ..errors import DataError, HpcCifarError, UsageError
from . import archive as archives
from . import beton, choice, sources, store
from . import download as downloads
from .store import Store

# errno of a full disk, an exhausted quota, and a file larger than the process may write
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def prepare(
    dataset: str,
    *,
    archive: Path | None,
    root: Path,
    force: bool = False,
    download: bool = True,
    wait: bool = False,
    write_beton: bool | None = None,
    console: Console,
    url: str = "",
    md5: str = "",
) -> Store:
    """Make sure that ``<root>/<dataset>`` is a good store and return it, every byte verified.

    The source is ``archive``, else (for cifar10) the file or folder that HPC_CIFAR_ARCHIVE names, else the store that is
    there, else the download. A store that was made from the same source is kept; a damaged one is built anew.

    Args:
        dataset: ``cifar10``, ``cifar100``, ``digits``, or another name for class folders of your own.
        root: folder of all datasets, see :func:`hpc_cifar.files.data_root`.
        force: build anew, and replace a store that was made from another source.
        download: whether the network may be used.
        wait: wait for another process that prepares the same dataset, instead of an error.
        write_beton: also write FFCV's file; None means wherever FFCV is installed.
        console: where progress and facts are printed.
        url, md5: of the official archive, if another than that of the dataset's authors.

    Raises:
        DataError: the source is missing or bad, the disk is full, or another process is preparing the dataset. No half store
            is left, and a good store that was there before is still there.
        hpc_cifar.data.download.Unreachable: there is no archive, no store and no network.
        UsageError: ``dataset`` is no name, or takes no archive.
    """
    if not store.DATASET_NAME.fullmatch(dataset):
        raise UsageError(f"dataset {dataset!r}: should be lower-case letters, digits, '_' or '-', 32 at most")
    if dataset == "digits" and archive:
        raise UsageError("--archive: digits come with scikit-learn and take no archive; leave it out or name another dataset")
    source = _source_of(dataset, archive)
    try:
        owner.make(root, owner.ROOT_MODE)
        with _only_one(root, dataset, wait, console):
            _sweep(root, dataset)
            made = _prepare(dataset, source, root, force, download, console, url, md5)
            return _with_beton(made, write_beton, console)
    except HpcCifarError:
        raise
    except OSError as error:
        read_only = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        if read_only and not force and _existing(root, dataset)[0]:
            _say(console, f"{dataset}: is prepared already, in a folder that cannot be written")
            return _with_beton(_prepare(dataset, source, root, False, download, console, url, md5), write_beton, console)
        raise DataError(f"{root / dataset}: cannot be prepared: {error.strerror or error}") from None


def _source_of(dataset: str, archive: Path | None) -> Path | None:
    if archive is None and dataset == "cifar10" and os.environ.get("HPC_CIFAR_ARCHIVE"):
        archive = Path(os.environ["HPC_CIFAR_ARCHIVE"])
    if archive is None:
        return None
    archive = files.expanded(archive, f"--archive {archive}")
    if not archive.exists():
        raise DataError(f"{archive}: no such file or folder; --archive and HPC_CIFAR_ARCHIVE take an archive or a folder")
    return archive


def _prepare(
    dataset: str, source: Path | None, root: Path, force: bool, download: bool, console: Console, url: str, md5: str
) -> Store:
    existing, damage = _existing(root, dataset)
    identity = _identity(dataset, source)
    if existing and not force:
        if source is None or _same_source(existing.manifest["source"], identity, source):
            _say(console, f"{dataset}: already prepared")
            return _report(existing, console)
        raise DataError(
            f"{existing.path}: was made from {existing.manifest['source'].get('path', 'another source')}, not from {source}; "
            f"add --force to replace it"
        )
    if damage:
        _say(console, f"{dataset}: {damage}; building it anew")
    if dataset == "digits":
        data = sources.read_digits()
    else:
        if source is None:
            source = _downloaded(dataset, root, download, console, url, md5)
            identity = _identity(dataset, source)
        _say(console, f"{dataset}: reading {source}")
        with _reading(console) as tell:
            data = sources.read(source, dataset, tell)
    if source is not None and source.is_file():
        identity["sha256"] = files.sha256_of(source)
    _build(root, dataset, data, {**identity, "content": data.content})
    return _report(Store.open(root, dataset, verify=True), console)


@contextlib.contextmanager
def _reading(console: Console) -> Iterator[archives.Tell]:
    """On a terminal, a bar of how much has been read."""
    if not console.is_terminal:
        yield lambda done, total: None
        return
    from rich import progress

    columns = (
        progress.TextColumn("reading"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _with_beton(made: Store, wanted: bool | None, console: Console) -> Store:
    """The store with FFCV's file beside it, verified, written or left out."""
    if wanted is False:
        return made
    if why := choice.problem("ffcv"):
        if wanted:
            raise UsageError(f"--beton: {why}")
        return made
    if made.image_shape[0] != 3:
        if wanted:
            raise UsageError(f"--beton: FFCV holds RGB images; these have {made.image_shape[0]} channel(s)")
        return made
    for left in made.path.glob(f".{beton.NAME}.*.tmp"):  # of a killed process: the lock is held
        with contextlib.suppress(OSError):
            left.unlink(missing_ok=True)
    path = made.train.beton
    try:
        if path is not None:
            beton.verify(path, made.train.images, made.train.labels, "")
    except DataError as error:
        _say(console, f"{str(error).partition('; run:')[0]}; writing it anew")
        path = None
    if path is None:
        try:
            path = beton.write(made.path, made.train.images, made.train.labels, made.digest)
        except (OSError, DataError) as error:
            why = str(error)
            if isinstance(error, OSError):
                needed = made.train.images.nbytes // 2**20 + 16
                full = f"the disk is full: it needs {needed:,} MiB beside the store, which is good"
                why = f"{made.path / beton.NAME}: {full if error.errno in _FULL else error.strerror}"
            if wanted:
                raise DataError(f"{why}; fix that, or leave it out by --no-beton") from None
            _say(console, f"without FFCV's file: {why}")
            return made
    _say(console, f"ffcv: {path} ({path.stat().st_size / 2**20:.0f} MiB)")
    return Store.open(made.path.parent, made.dataset)


def _existing(root: Path, dataset: str) -> tuple[Store | None, str | None]:
    """The store if it is good; else what is wrong with it, if it is there at all."""
    if not (root / dataset).exists():
        return None, None
    try:
        return Store.open(root, dataset, verify=True), None
    except DataError as error:
        return None, str(error).partition("; run:")[0]


def _downloaded(dataset: str, root: Path, download: bool, console: Console, url: str, md5: str) -> Path:
    official = {
        "cifar10": (downloads.URL, downloads.MD5), "cifar100": (downloads.HUNDRED_URL, downloads.HUNDRED_MD5),
    }  # fmt: skip
    if dataset not in official:
        raise UsageError(
            f"dataset {dataset!r}: only cifar10, cifar100 and digits need no archive; give class folders by --archive PATH"
        )
    if not download:
        how = "--archive PATH or HPC_CIFAR_ARCHIVE" if dataset == "cifar10" else "--archive PATH"
        raise downloads.Unreachable(f"{dataset}: no archive and no download; give a copy by {how}")
    if not url:
        url, md5 = official[dataset]
    folder = root / "downloads"
    try:
        return downloads.download(folder, console, url=url, md5=md5)
    except OSError as error:
        if error.errno in _FULL:
            raise DataError(f"{folder}: the disk is full; the download needs 163 MiB ({error.strerror})") from None
        raise


def _identity(dataset: str, source: Path | None) -> dict[str, Any]:
    """What tells quickly that a source is the one of last time."""
    if source is None:
        return {"path": "scikit-learn digits"} if dataset == "digits" else {}
    if source.is_file():
        facts = source.stat()
        return {"path": str(source), "bytes": facts.st_size, "modified_ns": facts.st_mtime_ns}
    entries = hashlib.sha256()
    for path in archives.folder_paths(source):
        facts = path.stat()
        entries.update(f"{path.relative_to(source)}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return {"path": str(source), "listing": entries.hexdigest()}


def _same_source(recorded: dict[str, Any], identity: dict[str, Any], source: Path) -> bool:
    if all(recorded.get(key) == value for key, value in identity.items()):
        return True
    if source.is_file() and recorded.get("bytes") == identity["bytes"]:  # copied, moved or touched: compare the bytes
        return bool(recorded.get("sha256") == files.sha256_of(source))
    return False


@contextlib.contextmanager
def _only_one(root: Path, dataset: str, wait: bool, console: Console) -> Iterator[None]:
    """Hold the lock of ``dataset``; the kernel frees it when the process ends, however it ends. What fails removes its file."""
    path = root / f".{dataset}.lock"
    while True:
        stream = planted.open_there(path)
        try:
            if not _locked(stream, root / dataset, wait):
                _say(console, f"warning: {root}: this file system has no locks: prepare {dataset} by one command at a time")
            if path.lstat().st_ino == os.fstat(stream.fileno()).st_ino:
                break
            stream.close()  # whoever had it has removed it since
        except FileNotFoundError:
            stream.close()
        except BaseException:
            stream.close()
            raise
    with stream:
        try:
            files.write_holder(stream)
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        with contextlib.suppress(OSError):
            stream.truncate(0)


def _locked(stream: TextIO, store_folder: Path, wait: bool) -> bool:
    """Lock the open file; False on a file system without locks.

    Raises:
        DataError: another process has it.
        OSError: it cannot be locked.
    """
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        who = stream.read().strip()
        raise DataError(
            f"{store_folder}: is being prepared by {who or 'another process'}; try again when it is done, or add --wait"
        ) from None
    except OSError as error:
        if error.errno not in files.NO_LOCKS:
            raise
        return False
    return True


def _sweep(root: Path, dataset: str) -> None:
    """Remove what a killed process left (the lock is held, so nobody works there); bring back a store set aside."""
    for left in _own(root, f".{dataset}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    for old in _own(root, f".{dataset}.*.old"):
        if (root / dataset).exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(root / dataset)


def _own(root: Path, pattern: str) -> Iterator[Path]:
    """Folders of this user: what somebody else calls like that is not the store that was set aside."""
    for path in list(root.glob(pattern)):
        facts = path.lstat()
        if stat.S_ISDIR(facts.st_mode) and facts.st_uid == owner.uid():
            yield path


def _build(root: Path, dataset: str, data: sources.Dataset, source: dict[str, Any]) -> None:
    needed = -(-store.bytes_needed(data) // 2**20)
    target = root / dataset
    temporary: Path | None = None
    try:
        temporary = Path(tempfile.mkdtemp(dir=root, prefix=f".{dataset}.", suffix=".tmp"))
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        store.write(temporary, data, source, created)
        temporary.chmod(0o755)
        if target.exists():
            aside = temporary.with_suffix(".old")
            target.rename(aside)
            temporary.rename(target)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            temporary.rename(target)
        files.fsync_folder(root)
    except OSError as error:
        if error.errno in _FULL:
            free = shutil.disk_usage(root).free // 2**20
            raise DataError(
                f"{target}: the disk is full: the store needs {needed:,} MiB, {free:,} MiB are free ({error.strerror}); "
                "make room or choose another folder by HPC_CIFAR_DATA"
            ) from None
        raise
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
        if not target.exists():
            _sweep(root, dataset)


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _report(made: Store, console: Console) -> Store:
    """One line for each fact."""
    manifest = made.manifest
    verified = "verified" if manifest["verified"] else "NOT verified"
    _say(console, f"{made.dataset}: {made.label} ({verified})")
    for split in store.SPLITS:
        counts = list(manifest[split]["per_class"].values())
        each = f"{counts[0]:,}" if len(set(counts)) == 1 else f"{min(counts):,} to {max(counts):,}"
        _say(console, f"{split}: {manifest[split]['images']:,} images, {len(counts)} classes, {each} a class")
    for name in ("mean", "std"):
        _say(console, f"{name}: " + ", ".join(f"{value:.4f}" for value in manifest["train"][name]))
    for warning in manifest["warnings"]:
        _say(console, f"warning: {warning}")
    _say(console, f"store: {made.path} ({sum(entry['bytes'] for entry in manifest['files'].values()) / 2**20:.0f} MiB)")
    return made
