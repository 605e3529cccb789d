"""All pipelines deliver the same pixels, on any number of ranks, from any batch on."""

from __future__ import annotations

import itertools
import pickle
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import AUGMENTS, COMMON, COUNT, MEAN, NAMES, STD, make, plain, raw, shown

from hpc_cifar.config.experiment import Augment, Data
from hpc_cifar.data import draws, pipeline, reference, resident
from hpc_cifar.data.fused import lookup_table
from hpc_cifar.data.pipeline import Batch
from hpc_cifar.data.store import Arrays
from hpc_cifar.errors import DataError, UsageError

Readable = Callable[[str], Arrays]


@pytest.mark.parametrize("augment", AUGMENTS, ids=shown)
@pytest.mark.parametrize("name", NAMES)
def test_pixels_are_the_same_everywhere(readable: Readable, name: str, augment: Augment) -> None:
    """Bit for bit as raw pixels, to 1e-6 when normalised; in both memory formats."""
    epoch, arrays = 5, readable(name)
    order = draws.order(3, epoch, np.arange(COUNT))
    expected = list(itertools.islice(make(arrays, "reference", augment).batches(epoch), 2))
    both = name in ("resident", "reference")  # the others take turns, since each is built anew
    for channels_last in (False, True) if both else (AUGMENTS.index(augment) % 2 == 1,):
        one = make(arrays, name, augment, channels_last=channels_last)
        for batch, slow in zip(itertools.islice(one.batches(epoch), 2), expected, strict=True):
            samples = order[64 * batch.number : 64 * (batch.number + 1)]
            torch.testing.assert_close(batch.images, slow.images, atol=1e-6, rtol=0)
            assert np.array_equal(batch.labels.numpy(), arrays.labels[samples])
            assert np.array_equal(raw(batch.images), plain(arrays, samples.tolist(), augment, epoch))
            layout = torch.channels_last if channels_last else torch.contiguous_format
            assert batch.images.is_contiguous(memory_format=layout) and batch.images.shape == (64, 3, 32, 32)
        one.close()


@pytest.mark.parametrize("augment", AUGMENTS, ids=shown)
def test_the_torch_operations_of_a_gpu_give_the_same_pixels(arrays: Arrays, augment: Augment) -> None:
    output = pipeline.Output(torch.device("cpu"), torch.float32, False, MEAN, STD)
    samples = np.arange(0, 200, 3)
    drawn = draws.augmentation(1, 2, samples, augment, 32)
    rows = torch.from_numpy(np.stack([samples, drawn.dy, drawn.dx, drawn.flip, drawn.cut_y, drawn.cut_x]).astype(np.int64))
    border = torch.tensor(augment.padding_values(3), dtype=torch.uint8)
    batch = resident.augment_batch(torch.tensor(arrays.images), rows, lookup_table(output), border, augment, output)
    assert np.array_equal(raw(batch), plain(arrays, samples.tolist(), augment, 2, seed=1))
    fused, _ = resident.Normaliser(augment, arrays, output, resident=True, threads=2)(samples, drawn)
    assert torch.equal(batch, fused)


CASES = [(333, 1), (333, 3), (512, 1), (512, 3)]


@pytest.mark.parametrize("batch_size,workers", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_shards_together_are_the_global_batch(
    readable: Readable, name: str, batch_size: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one, two and three ranks, the last batch smaller than the others, from the beginning and from the middle."""
    modes: list[dict[str, Any]] = [
        {"padding_mode": "reflect"},
        {"padding_mode": "zero"},
        {"padding_mode": "constant", "padding_value": 99},
        {"padding_mode": "reflect"},
    ]
    mode = modes[CASES.index((batch_size, workers))]
    augment, arrays = Augment(crop_padding=4, flip="random", **mode), readable(name)
    if name == "reference" and (batch_size, workers) in CASES[1:3]:
        workers = 0  # processes are slow to start
    if name != "reference":  # as many threads as are asked for
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(3)))
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for first in (0, 1):
        whole = list(make(arrays, "resident", augment, batch_size=batch_size).batches(1, first))
        sizes = [min(batch_size, COUNT - start) for start in range(0, COUNT, batch_size)]
        assert [len(b.labels) for b in whole] == sizes[first:]
        for world_size in (1, 2, 3):
            options = {"batch_size": batch_size, "world_size": world_size, "workers": workers}
            made = [make(arrays, name, augment, rank=rank, **options) for rank in range(world_size)]
            for batch, *parts in zip(whole, *(one.batches(1, first) for one in made), strict=True):
                images = torch.cat([p.images for p in parts])
                torch.testing.assert_close(images, batch.images, atol=1e-6, rtol=0)
                assert np.array_equal(raw(images), raw(batch.images))
                assert torch.equal(torch.cat([p.labels for p in parts]), batch.labels)
                assert {(p.number, p.global_size) for p in parts} == {(batch.number, len(batch.labels))}
            for one in made:
                one.close()


@pytest.mark.parametrize("name", NAMES)
def test_shards_may_be_uneven_and_empty(readable: Readable, name: str) -> None:
    """Of five ranks, one has a larger share of the last batch than of the others."""
    arrays = readable(name)
    batches = list(make(arrays, name, indices=np.arange(9), batch_size=4, rank=0, world_size=3).batches(0))
    assert [(len(b.images), b.global_size) for b in batches] == [(1, 4), (1, 4), (0, 1)]
    assert batches[-1].images.shape == (0, 3, 32, 32) and batches[-1].labels.dtype == torch.int64
    growing = make(arrays, name, indices=np.arange(15), batch_size=8, rank=2, world_size=5)
    assert [len(b.images) for b in growing.batches(0)] == [1, 2]
    whole = list(make(arrays, "resident", indices=np.arange(15), batch_size=8).batches(0))
    for mine, batch, part in zip(growing.batches(0), whole, (slice(3, 4), slice(2, 4)), strict=True):
        assert np.array_equal(raw(mine.images), raw(batch.images[part])) and torch.equal(mine.labels, batch.labels[part])


@pytest.mark.parametrize("name", NAMES)
def test_an_epoch_continues_in_the_middle(readable: Readable, name: str) -> None:
    """From a number, from a state, and after an iterator that was left; the state counts what was taken, not what was made."""
    arrays, augment = readable(name), Augment(crop_padding=4, cutout=5, rotation_degrees=5)
    one = make(arrays, name, augment)
    whole, rest = list(one.batches(7)), list(one.batches(7, first=6))
    assert [b.number for b in rest] == list(range(6, 11))
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[6:], rest, strict=True))
    assert list(one.batches(7, first=11)) == []
    list(itertools.islice(one.batches(7, first=0), 4))
    assert one.state_dict() == {"epoch": 7, "batches": 4}
    another = make(arrays, name, augment)
    another.load_state_dict(one.state_dict())
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[4:], another.batches(7), strict=True))
    assert [b.number for b in another.batches(7)] == [b.number for b in another.batches(8)] == list(range(11))
    for each in (one, another):
        each.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_state_fits_any_pipeline_and_number_of_ranks(readable: Readable, name: str) -> None:
    arrays, augment = readable(name), Augment(crop_padding=4, flip="random", shift_fraction=0.1)
    before = make(arrays, name, augment, rank=1, world_size=2)
    list(itertools.islice(before.batches(2), 5))
    state = before.state_dict()
    before.close()
    whole = list(make(arrays, "resident", augment).batches(2, first=5))
    ranks = [make(arrays, other, augment, rank=r, world_size=3) for r, other in enumerate(("resident", "reference", name))]
    for one in ranks:
        one.load_state_dict(state)
    for batch, *parts in zip(whole, *(one.batches(2) for one in ranks), strict=True):
        torch.testing.assert_close(torch.cat([p.images for p in parts]), batch.images, atol=2e-6, rtol=0)
        assert torch.equal(torch.cat([p.labels for p in parts]), batch.labels)
    for one in ranks:
        one.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_step_takes_the_batches(readable: Readable, name: str) -> None:
    """The last one, which is smaller, too."""

    def step(images: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(images, weight).relu().mean(dim=(1, 2, 3))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    one = make(readable(name), name, Augment(crop_padding=4), batch_size=300, channels_last=True)
    sizes = []
    for batch in one.batches(0):
        torch.testing.assert_close(compiled(batch.images, weight), step(batch.images, weight))
        sizes.append(len(batch.labels))
    assert sizes == [300, 300, 100]
    one.close()


@pytest.mark.component("dali")
def test_dali_works_ahead(readable: Readable) -> None:
    """Two batches are in the making before the first is taken, and nothing of an iterator that was left comes with the next."""
    one = make(readable("dali"), "dali", batch_size=100)
    source: Any = one._source
    scheduled: list[int] = []
    run = source._pipeline.schedule_run
    source._pipeline.schedule_run = lambda: (scheduled.append(1), run())
    iterator = one.batches(0)
    next(iterator)
    assert len(scheduled) == 2
    next(iterator)
    assert len(scheduled) == 3
    expected = list(make(readable("dali"), "reference", batch_size=100).batches(1))
    for mine, theirs in zip(one.batches(1), expected, strict=True):
        torch.testing.assert_close(mine.images, theirs.images, atol=1e-6, rtol=0)
    one.close()


def test_a_worker_gets_the_place_of_a_mapped_file_and_a_part_of_one_as_it_is(tmp_path: Path) -> None:
    whole = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", whole)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    output = pipeline.Output(torch.device("cpu"), torch.float32, False, MEAN, STD)
    for images, small in ((mapped, True), (mapped[7:], False), (whole, False)):
        data = pickle.dumps(reference._Augmented(Arrays(images, np.zeros(len(images), np.int64), images), Augment(), output))
        assert np.array_equal(pickle.loads(data)._images, images)
        assert (len(data) < whole.nbytes / 2) == small


@pytest.mark.slow
def test_worker_processes_change_nothing_and_end(arrays: Arrays) -> None:
    import multiprocessing

    augment = Augment(crop_padding=4, flip="random")
    one = make(arrays, "reference", augment, workers=2)
    iterator = one.batches(0)
    expected = make(arrays, "resident", augment).batches(0)
    assert torch.equal(next(iterator).images, next(expected).images)
    assert multiprocessing.active_children()
    one.close()
    assert not multiprocessing.active_children()
    assert list(iterator) == []


@pytest.mark.parametrize("name", NAMES)
def test_float64_pixels_are_computed_in_float64(readable: Readable, name: str) -> None:
    """As numpy does it from raw values, to the last bits; not float32 values made wider."""
    arrays, augment = readable(name), Augment(crop_padding=4, flip="random", cutout=6)
    for rotation, most in ((0.0, 1e-14), (15.0, 1e-12)):
        turned = augment.model_copy(update={"rotation_degrees": rotation})
        batch = next(iter(make(arrays, name, turned, dtype=torch.float64, channels_last=True, batch_size=100).batches(2)))
        expected = next(iter(make(arrays, "reference", turned, dtype=torch.float64, batch_size=100).batches(2)))
        assert batch.images.dtype == torch.float64
        assert (batch.images - expected.images).abs().max() <= most
        if not rotation:
            pixels = plain(arrays, draws.order(3, 2, np.arange(COUNT))[:100].tolist(), augment, 2)
            exact = ((pixels / 255 - MEAN) / STD).transpose(0, 3, 1, 2)
            assert np.abs(batch.images.numpy() - exact).max() <= 1e-14
        assert not torch.equal(batch.images, batch.images.float().double())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_are_the_rounded_batch(readable: Readable, name: str, dtype: torch.dtype) -> None:
    arrays = readable(name)
    full = next(iter(make(arrays, "reference").batches(0)))
    half = next(iter(make(arrays, name, dtype=dtype, channels_last=True).batches(0)))
    assert half.images.dtype == dtype
    if name == "dali":  # it multiplies by 1 / std where the others divide: the last bit of a 16-bit float may differ
        ulp = torch.finfo(dtype).eps * full.images.abs().clamp_min(torch.finfo(torch.float16).tiny)
        assert ((half.images - full.images.to(dtype)).abs() <= ulp + 1e-6).all()
    else:
        assert torch.equal(half.images, full.images.to(dtype))
    assert half.images.is_contiguous(memory_format=torch.channels_last)


def test_epochs_and_seeds_differ(arrays: Arrays) -> None:
    def first(epoch: int, **options: Any) -> torch.Tensor:
        return next(iter(make(arrays, "auto", **options).batches(epoch))).images

    assert not torch.equal(first(0), first(1))
    assert not torch.equal(first(0), first(0, seed=4))
    assert make(arrays, "auto").name == "resident"


@pytest.mark.parametrize("name", NAMES)
def test_zero_one_ignores_the_mean(readable: Readable, name: str) -> None:
    arrays, augment = (
        readable(name),
        Augment(crop_padding=4, flip="random", padding_mode="constant", padding_value=40, cutout=6),
    )
    one = make(arrays, name, augment, normalize="zero_one", batch_size=100)
    for batch, samples in zip(one.batches(2), draws.order(3, 2, np.arange(COUNT)).reshape(7, 100), strict=True):
        pixels = (batch.images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(pixels, plain(arrays, samples.tolist(), augment, 2))
        assert batch.images.min() == 0 and batch.images.max() == 1
    one.close()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(arrays: Arrays, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = next(iter(make(arrays, "reference", batch_size=COUNT).batches(0))).images
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert torch.equal(next(iter(make(arrays, "resident", batch_size=COUNT).batches(0))).images, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_stays_what_it_was(readable: Readable, name: str) -> None:
    """No buffer is used twice: a consumer may keep what it got."""
    one = make(readable(name), name)
    kept: list[tuple[Batch, torch.Tensor, torch.Tensor]] = [(b, b.images.clone(), b.labels.clone()) for b in one.batches(0)]
    list(one.batches(1))
    one.close()
    assert all(torch.equal(batch.images, images) and torch.equal(batch.labels, labels) for batch, images, labels in kept)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_an_evaluation_has_each_sample_once(arrays: Arrays, world_size: int) -> None:
    indices = np.arange(5, 400, 7)
    config = Data(batch_size=10, augment=Augment(crop_padding=4, flip="random", cutout=8))
    common = COMMON | {"world_size": world_size}
    batches = [
        b
        for rank in range(world_size)
        for b in pipeline.evaluation_batches(config, arrays, indices, batch_size=16, rank=rank, **common)
    ]
    assert np.array_equal(raw(torch.cat([b.images for b in batches])), arrays.images[indices])
    assert np.array_equal(torch.cat([b.labels for b in batches]).numpy(), arrays.labels[indices])
    assert {b.global_size for b in batches} == {len(indices)}


def test_a_rank_may_have_nothing_to_evaluate(arrays: Arrays) -> None:
    batches = pipeline.evaluation_batches(Data(batch_size=4), arrays, [1], batch_size=4, rank=0, world_size=2, **COMMON)
    assert list(batches) == []


def test_reflection_needs_a_small_padding(arrays: Arrays) -> None:
    with pytest.raises(UsageError, match=r"crop_padding: 32 .* use 31 at most"):
        make(arrays, "resident", Augment(crop_padding=32, padding_mode="reflect"))


@pytest.mark.parametrize("name", NAMES)
def test_a_closed_pipeline_says_so(readable: Readable, name: str) -> None:
    one = make(readable(name), name)
    iterator = one.batches(0)
    next(iterator)
    one.close()
    assert list(iterator) == []
    with pytest.raises(RuntimeError, match="closed"):
        next(one.batches(0))


@pytest.mark.slow
def test_a_process_that_closes_nothing_ends(tmp_path: Path) -> None:
    """The workers ignore the TERM by which Python ends its children at exit."""
    script = tmp_path / "open.py"
    script.write_text(
        """
import numpy as np, torch
from hpc_cifar.config.experiment import Data
from hpc_cifar.data import pipeline
from hpc_cifar.data.store import Arrays, moments_of
if __name__ == "__main__":
    images = np.zeros((64, 32, 32, 3), np.uint8)
    arrays = Arrays(images, np.zeros(64, np.int64), moments_of(images + 1))
    one = pipeline.build(
        Data(batch_size=4, pipeline="reference", workers=2), arrays, np.arange(64), seed=1, rank=0, world_size=1, device="cpu",
        dtype=torch.float32, channels_last=False, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2),
    )
    iterator = one.batches(0)
    next(iterator)
"""
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("free", [64 * 2**10, 2 * 2**20])
def test_room_in_shared_memory_is_looked_at_first(arrays: Arrays, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that finds none is killed, or loses the batch on its way: 45 s of waiting, or for ever."""
    monkeypatch.setattr(shutil, "disk_usage", lambda place: types.SimpleNamespace(free=free))
    built = make(arrays, "reference", workers=2)
    with pytest.raises(DataError, match=r"its 2 workers need 4.6 MiB of /dev/shm, where [\d.]+ MiB are free; data.workers: 0"):
        next(iter(built.batches(0)))
    built.close()
    built = make(arrays, "reference", workers=0)
    assert next(iter(built.batches(0))).images.shape[0] == 64
    built.close()
