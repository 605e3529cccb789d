"""The FFCV pipeline where things go wrong, and its file."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import COUNT, make, raw
from rich.console import Console

from hpc_cifar.config.experiment import Augment
from hpc_cifar.data import beton, choice, draws
from hpc_cifar.data.prepare import prepare
from hpc_cifar.data.staging import staged
from hpc_cifar.data.store import Arrays, Store
from hpc_cifar.errors import DataError, UsageError

pytestmark = pytest.mark.component("ffcv")


@pytest.fixture
def own(readable: Callable[[str], Arrays], tmp_path: Path) -> Arrays:
    """A copy of the file to damage."""
    arrays = readable("ffcv")
    assert arrays.beton is not None
    for name in (beton.NAME, beton.FACTS):
        shutil.copy(arrays.beton.parent / name, tmp_path)
    return dataclasses.replace(arrays, beton=tmp_path / beton.NAME)


def test_ffcvs_own_loader_reads_the_file(own: Arrays) -> None:
    from ffcv.loader import Loader, OrderOption

    loader = Loader(str(own.beton), batch_size=50, num_workers=1, os_cache=True, order=OrderOption.SEQUENTIAL, drop_last=False)
    read = [(np.array(image), np.array(label).ravel()) for image, label in loader]
    assert np.array_equal(np.concatenate([image for image, _ in read]), own.images)
    assert np.array_equal(np.concatenate([label for _, label in read]), own.labels)


@pytest.mark.parametrize("shape", [(3, 700, 900), (5, 20, 28)])
def test_images_of_other_sizes(shape: tuple[int, int, int], tmp_path: Path) -> None:
    """Some images fit on a page of the file, or less than one."""
    count, height, width = shape
    images = np.random.default_rng(1).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    labels = np.arange(count, dtype=np.int64)
    path = beton.write(tmp_path, images, labels, "d")
    arrays = Arrays(images, labels, np.zeros((count, 2, 3), np.int64), path)
    augment = Augment(crop_padding=3, flip="random", cutout=9)
    made, slow = (make(arrays, name, augment, indices=labels, batch_size=2).batches(0) for name in ("ffcv", "reference"))
    for mine, theirs in zip(made, slow, strict=True):
        assert np.array_equal(raw(mine.images), raw(theirs.images)) and torch.equal(mine.labels, theirs.labels)


@pytest.mark.parametrize("damage", ["truncated", "altered", "longer", "missing", "other images", "other count"])
def test_a_damaged_file_is_refused_before_training(own: Arrays, damage: str) -> None:
    path = own.beton
    assert path is not None
    content = path.read_bytes()
    match damage:
        case "truncated":
            path.write_bytes(content[:-1000])
        case "altered":
            path.write_bytes(content[:9_000_000] + bytes([content[9_000_000] ^ 1]) + content[9_000_001:])
        case "longer":
            path.write_bytes(content + b"x")
        case "missing":
            path.unlink()
        case "other images":
            own = dataclasses.replace(own, images=own.images[::-1])
        case _:
            own = dataclasses.replace(own, labels=own.labels[:-1])
    with pytest.raises(DataError, match=r"train\.beton: .*; run: hpc-cifar prepare .* --beton") as refused:
        make(own, "ffcv", indices=np.arange(20))
    assert "\n" not in str(refused.value)


def test_a_failing_worker_is_an_error_within_seconds(own: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFCV alone would wait for ever."""
    one = make(own, "ffcv")
    real = draws.augmentation

    def failing(seed: int, epoch: int, samples: Any, *rest: Any) -> Any:
        if draws.order(3, 0, np.arange(COUNT))[200] in samples:
            raise ValueError("a broken image")
        return real(seed, epoch, samples, *rest)

    monkeypatch.setattr(draws, "augmentation", failing)
    began, seen = time.monotonic(), 0
    with pytest.raises(DataError, match=r"ffcv: the loading thread failed \(ValueError: a broken image"):
        for _ in one.batches(0):
            seen += 1
    assert seen == 3 and time.monotonic() - began < 10
    monkeypatch.undo()
    assert sum(len(batch.labels) for batch in one.batches(0)) == COUNT  # it can be used again


def test_no_thread_is_left_and_training_keeps_its_threads(own: Arrays) -> None:
    before, torchs = set(threading.enumerate()), torch.get_num_threads()
    one = make(own, "ffcv", workers=1)
    for epoch in range(3):
        iterator = one.batches(epoch)
        next(iterator)
        next(iterator)
        iterator.close()  # type: ignore[attr-defined]
        list(one.batches(epoch))
    one.batches(9)
    one.close()
    with ThreadPoolExecutor(1) as fresh:  # FFCV would change it for threads that begin later
        assert fresh.submit(torch.get_num_threads).result() == torchs
    assert set(threading.enumerate()) <= before and torch.get_num_threads() == torchs


def in_a_process(code: str, *, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    script = textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=check, **options)


def test_one_processor_is_enough(own: Arrays) -> None:
    assert own.beton is not None
    np.save(own.beton.parent / "images.npy", own.images)
    done = in_a_process(f"""
        import os
        os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        import numpy as np
        from pathlib import Path
        from pipelines import make
        from hpc_cifar.data.fused import threads_for
        from hpc_cifar.data.store import Arrays
        images = np.load({str(own.beton.parent / "images.npy")!r})
        labels = np.array({own.labels.tolist()})
        arrays = Arrays(images, labels, np.zeros(({COUNT}, 2, 3), np.int64), Path({str(own.beton)!r}))
        made = make(arrays, "ffcv", workers=3)
        print(sum(len(batch.labels) for batch in made.batches(0)), threads_for(3), threads_for("auto"))
    """)
    assert done.stdout.split() == [str(COUNT), "1", "1"]


@pytest.mark.component("root")
@pytest.mark.skipif(os.geteuid() != 0, reason="hiding a library needs root")
def test_a_missing_library_is_one_clear_line() -> None:
    code = "from hpc_cifar.data.choice import problem; print(problem('ffcv'))"
    listed = in_a_process("import ffcv; print(open('/proc/self/maps').read())").stdout.splitlines()
    libraries = {line.split()[-1] for line in listed if "turbojpeg" in line}
    assert libraries, "ffcv loads libturbojpeg"
    hide = "".join(f"mount --bind /dev/null {library} && " for library in libraries)
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f'{hide}exec "$@"', "sh", sys.executable, "-c", code],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert (
        "ffcv cannot be imported: " in done.stdout
        and "make ffcv-wheel" in done.stdout
        and "turbojpeg" in done.stdout
        and "libturbojpeg0-dev" in done.stdout
    )
    assert done.stdout.count("\n") == 1


def test_without_ffcv_a_file_that_asks_for_it_is_refused(own: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ffcv", None)
    with pytest.raises(UsageError, match=r"data.pipeline: ffcv: .*ffcv.* or use pipeline: auto"):
        make(own, "ffcv")
    assert choice.problem("ffcv") != "" and choice.problem("resident") == ""


def test_prepare_writes_mends_and_leaves_it_out(tmp_path: Path, readable: Callable[[str], Arrays]) -> None:
    readable("ffcv")
    silent = Console(quiet=True)

    def prepared(wanted: bool | None) -> Path | None:
        return prepare("digits", archive=None, root=tmp_path, write_beton=wanted, console=silent).train.beton

    assert prepared(False) is None
    path = prepared(None)
    assert path is not None and path.stat().st_mode & 0o777 == 0o644
    written = path.stat().st_mtime_ns
    assert prepared(True) == path and path.stat().st_mtime_ns == written
    path.write_bytes(path.read_bytes()[:-5])
    assert prepared(None) == path and path.stat().st_mtime_ns != written
    made = Store.open(tmp_path, "digits").train
    beton.verify(path, made.images, made.labels, "")
    assert not [left for left in path.parent.iterdir() if left.name.endswith(".tmp")]
    prepare("digits", archive=None, root=tmp_path, force=True, write_beton=False, console=silent)
    assert Store.open(tmp_path, "digits").train.beton is None, "a new store has no old file"


def test_the_file_of_another_store_is_none(tmp_path: Path, readable: Callable[[str], Arrays]) -> None:
    readable("ffcv")
    made = prepare("digits", archive=None, root=tmp_path, write_beton=False, console=Console(quiet=True))
    beton.write(made.path, made.train.images, made.train.labels, "another digest")
    assert Store.open(tmp_path, "digits").train.beton is None


@pytest.mark.component("root")
@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system needs root")
def test_a_full_disk_leaves_the_store_and_no_half_file(tmp_path: Path, readable: Callable[[str], Arrays]) -> None:
    readable("ffcv")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "small", str(tmp_path)], check=True)
    try:
        with pytest.raises(DataError, match=r"train.beton: the disk is full.*--no-beton"):
            prepare("digits", archive=None, root=tmp_path, write_beton=True, console=Console(quiet=True))
        assert Store.open(tmp_path, "digits", verify=True).train.beton is None
        assert not list((tmp_path / "digits").glob(".*"))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_copy_on_scratch_has_the_file_too(tmp_path: Path, readable: Callable[[str], Arrays]) -> None:
    readable("ffcv")
    prepare("digits", archive=None, root=tmp_path / "data", write_beton=True, console=Console(quiet=True))
    (tmp_path / "scratch").mkdir()
    for wanted in (True, False):
        with staged(tmp_path / "data", "digits", str(tmp_path / "scratch"), with_beton=wanted) as found:
            arrays = Store.open(found.data_root, "digits").train
            assert found.local and (arrays.beton is not None) == wanted
            if wanted:
                assert len(next(iter(make(arrays, "ffcv", indices=np.arange(64)).batches(0))).labels) == 64
    assert list((tmp_path / "scratch").iterdir()) == []
