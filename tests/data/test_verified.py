"""A damaged store is never used without a word, and a good one is read whole once a host and boot."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpc_cifar import caches, processes
from hpc_cifar.data import verified
from hpc_cifar.data.store import MANIFEST, PARTS, SPLITS, Store
from hpc_cifar.errors import DataError


@pytest.fixture
def root(digits_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the digits that nothing has looked at."""
    shutil.copytree(digits_data, tmp_path / "data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "data"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What was read whole, so far."""
    made: list[tuple[str, ...]] = []
    whole = Store.verify

    def verify(store: Store, *splits: str) -> None:
        made.append(splits)
        whole(store, *splits)

    monkeypatch.setattr(Store, "verify", verify)
    return made


def change_labels(root: Path, split: str = "test") -> None:
    """200 labels of the digits, all in range: neither size nor header tell."""
    path = root / "digits" / f"{split}-labels.npy"
    labels = np.load(path, mmap_mode="r+")
    labels[:200] = (labels[:200] + 1) % 10
    labels.flush()


def test_it_is_read_once(root: Path, reads: list[tuple[str, ...]]) -> None:
    Store.open(root, "digits").verify_once()
    Store.open(root, "digits").verify_once()
    assert reads == [()]


@pytest.mark.parametrize("name", [f"{split}-{part}.npy" for split in SPLITS for part in PARTS])
def test_every_file_counts_before_and_after_the_first_time(root: Path, name: str) -> None:
    path = root / "digits" / name

    def damage() -> None:
        with path.open("r+b") as stream:
            stream.seek(-3, 2)
            byte = stream.read(1)
            stream.seek(-1, 1)
            stream.write(bytes([byte[0] ^ 1]))

    damage()
    with pytest.raises(DataError, match=f"damaged \\({name} is not what was written.*run: hpc-cifar prepare digits"):
        Store.open(root, "digits").verify_once()
    damage()
    Store.open(root, "digits").verify_once()
    damage()
    with pytest.raises(DataError, match="is not what was written"):
        Store.open(root, "digits").verify_once()


def test_a_file_that_is_exchanged_for_one_of_equal_size_and_time_is_read_again(
    root: Path, reads: list[tuple[str, ...]]
) -> None:
    Store.open(root, "digits").verify_once()
    path = root / "digits" / "test-labels.npy"
    shutil.copy2(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    Store.open(root, "digits").verify_once()
    assert len(reads) == 2


def test_a_host_that_was_started_anew_reads_again(
    root: Path, reads: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is known of the boots before goes, since each store that was copied to it has left a record."""
    Store.open(root, "digits").verify_once()
    (record,) = (tmp_path / "cache").rglob("*.json")
    kept = [record.with_name(f"{name}-{'0' * 16}.json") for name in ("another-host", f"{os.uname().nodename}-2")]
    gone = record.with_name(f"{os.uname().nodename}-{'0' * 16}.json")
    for path in (*kept, gone):
        shutil.copy(record, path)
    monkeypatch.setattr(processes, "boot_id", lambda: "another")
    Store.open(root, "digits").verify_once()
    assert len(reads) == 2
    assert set((tmp_path / "cache").rglob("*.json")) == {record, *kept}


def test_a_process_that_was_suspended_keeps_nobody_for_long(
    root: Path, reads: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified, "WAIT_S", 0.2)
    store = Store.open(root, "digits")
    with verified.by_one(root / "digits"):
        thread = threading.Thread(target=store.verify_once, daemon=True)  # a lock is of an open file
        thread.start()
        thread.join(20)
        assert not thread.is_alive() and reads == [()]


def test_a_file_that_is_cut_off_while_it_is_mapped_ends_no_process(root: Path) -> None:
    """Whoever reads a map past the end of its file gets SIGBUS; so the file itself is read."""
    store = Store.open(root, "digits")
    path = root / "digits" / "test-images.npy"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match=r"test-images\.npy is not what was written"):
        store.verify("test")
    path.unlink()
    with pytest.raises(DataError, match=r"test-images.npy: No such file or directory.*hpc-cifar prepare digits"):
        store.verify("test")


def test_a_store_that_is_made_anew_meanwhile_does_not_change_the_mapped_one(root: Path) -> None:
    """What is mapped is verified, and not what has its name by now."""
    store = Store.open(root, "digits")
    shutil.copytree(root / "digits", root / "new")
    (root / "digits").rename(root / "old")
    (root / "new").rename(root / "digits")
    change_labels(root)
    store.verify("test")
    with pytest.raises(DataError, match="is not what was written"):
        Store.open(root, "digits").verify("test")


def test_a_short_process_reads_a_split_once(root: Path, reads: list[tuple[str, ...]]) -> None:
    """Until its files change, even back."""
    store = Store.open(root, "digits")
    store.verify_again("test")
    store.verify_again("test")
    assert reads == [("test",)]
    change_labels(root)
    with pytest.raises(DataError, match="is not what was written"):
        store.verify_again("test")
    store.verify_again("train")
    assert reads == [("test",), ("test",), ("train",)]


def test_a_folder_that_has_gone_has_no_record(root: Path) -> None:
    with verified.by_one(root / "gone"):
        assert not verified.is_known(root / "gone", "", {})


@pytest.mark.parametrize("what", ["folder", "torn", "other"])
def test_a_record_that_others_could_have_written_is_not_believed(
    root: Path, reads: list[tuple[str, ...]], tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Store.open(root, "digits").verify_once()
    record = next((tmp_path / "cache").rglob("*.json"))
    if what == "folder":
        (tmp_path / "cache" / "hpc-cifar").chmod(0o777)
    elif what == "torn":
        record.write_text(record.read_text()[:-40])
    else:
        record.write_text(json.dumps([1]))
    change_labels(root)
    with pytest.raises(DataError, match=r"test-labels.npy is not what was written"):
        Store.open(root, "digits").verify_once()


def test_without_a_private_folder_everyone_reads(
    root: Path, reads: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches, "cache_folder", lambda name: None)
    Store.open(root, "digits").verify_once()
    Store.open(root, "digits").verify_once()
    assert len(reads) == 2


def test_one_reads_and_the_others_wait(root: Path, reads: list[tuple[str, ...]]) -> None:
    threads = [threading.Thread(target=Store.open(root, "digits").verify_once) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert reads == [()]


def test_prepare_and_a_renamed_copy_need_not_be_read_again(root: Path, reads: list[tuple[str, ...]], tmp_path: Path) -> None:
    """As the copies on a node's scratch are: verified first, and then called what they are."""
    Store.open(root, "digits", verify=True)
    (tmp_path / "elsewhere").mkdir()
    (root / "digits").rename(tmp_path / "elsewhere" / "digits")
    Store.open(tmp_path / "elsewhere", "digits").verify_once()
    assert reads == [()]


def rewritten(change: Callable[[dict[str, Any]], None], root: Path) -> None:
    path = root / "digits" / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["classes"].reverse(),
        lambda manifest: manifest.update(label="CIFAR-10"),
        lambda manifest: manifest["train"].update(images=1),
        lambda manifest: manifest["source"].clear(),
    ],
)
def test_the_words_of_the_manifest_count_too(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    rewritten(change, root)
    with pytest.raises(DataError, match=r"manifest.json is not what was written"):
        Store.open(root, "digits")


def test_the_manifest_of_an_older_version_is_read(root: Path) -> None:
    rewritten(lambda manifest: manifest.pop("seal"), root)
    Store.open(root, "digits").verify_once()


@pytest.mark.parametrize("text", ["[" * 100_000, "null", '{"format": 1}', '{"format": 1, "digest": 0, "files": []}', ""])
def test_a_manifest_that_is_none_is_one_line(root: Path, text: str) -> None:
    (root / "digits" / MANIFEST).write_text(text)
    with pytest.raises(DataError, match="the store is damaged") as error:
        Store.open(root, "digits")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [MANIFEST, "test-labels.npy"])
@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_a_file_keeps_nobody_waiting(root: Path, name: str) -> None:
    (root / "digits" / name).unlink()
    os.mkfifo(root / "digits" / name)
    with pytest.raises(DataError, match="the store is damaged"):
        Store.open(root, "digits")
