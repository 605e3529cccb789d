"""Both pipelines deliver the same pixels, on any number of ranks, from any batch on."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc_cifar.config.experiment import Augment, Data
from hpc_cifar.data import draws, pipeline, resident
from hpc_cifar.data.pipeline import Batch
from hpc_cifar.data.store import Arrays, moments_of
from hpc_cifar.errors import UsageError

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
COUNT = 700
NOTHING = Augment()
COMMON: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "channels_last": False, "mean": MEAN, "std": STD}


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8)
    images.setflags(write=False)  # as a memory-mapped store
    labels = np.arange(COUNT, dtype=np.int64) % 10
    return Arrays(images, labels, moments_of(images))


def make(arrays: Arrays, name: str, augment: Augment = NOTHING, indices: Any = None, **options: Any) -> pipeline.Pipeline:
    config = Data(
        batch_size=options.pop("batch_size", 64),
        pipeline=name,
        augment=augment,
        workers=options.pop("workers", 0),
        normalize=options.pop("normalize", "mean_std"),
    )
    settings = COMMON | {"seed": 3, "rank": 0, "world_size": 1}
    return pipeline.build(config, arrays, np.arange(COUNT) if indices is None else indices, **settings | options)


def plain(arrays: Arrays, samples: Sequence[int], augment: Augment, epoch: int, seed: int = 3) -> np.ndarray:
    """The raw pixels by numpy, as simply as can be: uint8 (n,H,W,C)."""
    drawn = draws.augmentation(seed, epoch, samples, augment, 32)
    result = []
    for row, sample in enumerate(samples):
        p = augment.crop_padding
        mode: Any = "constant" if augment.padding_mode == "zero" else "reflect"
        image = np.pad(arrays.images[sample], ((p, p), (p, p), (0, 0)), mode=mode)
        image = image[drawn.dy[row] : drawn.dy[row] + 32, drawn.dx[row] : drawn.dx[row] + 32]
        image = (image[:, ::-1] if drawn.flip[row] else image).copy()
        top, left = drawn.cut_y[row] - augment.cutout // 2, drawn.cut_x[row] - augment.cutout // 2
        image[max(top, 0) : max(top + augment.cutout, 0), max(left, 0) : max(left + augment.cutout, 0)] = 0
        result.append(image)
    return np.stack(result)


def raw(images: torch.Tensor) -> np.ndarray:
    """Back from normalised float32 (n,C,H,W) to uint8 (n,H,W,C)."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return ((images * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


AUGMENTS = [
    Augment(),
    Augment(flip="random"),
    Augment(flip="alternating", crop_padding=2),
    *(Augment(crop_padding=p, padding_mode=m, flip="random") for p in (1, 4, 31) for m in ("zero", "reflect")),
    Augment(crop_padding=40, flip="random"),  # a crop may miss the image altogether
    *(Augment(crop_padding=4, flip="random", cutout=c) for c in (1, 8, 13, 64)),
]


@pytest.mark.parametrize("augment", AUGMENTS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_pixels_are_the_same_everywhere(arrays: Arrays, augment: Augment, channels_last: bool) -> None:
    epoch = 5
    order = draws.order(3, epoch, np.arange(COUNT))
    made = [
        list(itertools.islice(make(arrays, name, augment, channels_last=channels_last).batches(epoch), 2))
        for name in ("resident", "reference")
    ]
    for fused, slow in zip(*made, strict=True):
        samples = order[64 * fused.number : 64 * (fused.number + 1)]
        torch.testing.assert_close(fused.images, slow.images, atol=1e-6, rtol=0)
        assert torch.equal(fused.labels, slow.labels)
        assert np.array_equal(fused.labels.numpy(), arrays.labels[samples])
        assert np.array_equal(raw(fused.images), plain(arrays, samples.tolist(), augment, epoch))
        layout = torch.channels_last if channels_last else torch.contiguous_format
        for batch in (fused, slow):
            assert batch.images.is_contiguous(memory_format=layout) and batch.images.shape == (64, 3, 32, 32)


@pytest.mark.parametrize("augment", AUGMENTS, ids=str)
def test_the_torch_operations_of_a_gpu_give_the_same_pixels(arrays: Arrays, augment: Augment) -> None:
    output = pipeline.Output(torch.device("cpu"), torch.float32, False, MEAN, STD)
    samples = np.arange(0, 200, 3)
    drawn = draws.augmentation(1, 2, samples, augment, 32)
    rows = torch.from_numpy(np.stack([samples, drawn.dy, drawn.dx, drawn.flip, drawn.cut_y, drawn.cut_x]).astype(np.int64))
    batch = resident.augment_batch(torch.tensor(arrays.images), rows, resident.lookup_table(output), augment, output)
    assert np.array_equal(raw(batch), plain(arrays, samples.tolist(), augment, 2, seed=1))
    fused, _ = resident.Normaliser(augment, arrays, output, resident=True)(samples, drawn)
    assert torch.equal(batch, fused)


@pytest.mark.parametrize("name", ["resident", "reference"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [333, 512])
def test_shards_together_are_the_global_batch(arrays: Arrays, name: str, world_size: int, batch_size: int) -> None:
    augment = Augment(crop_padding=4, flip="random")
    whole = list(make(arrays, "resident", augment, batch_size=batch_size).batches(1))
    assert [len(b.labels) for b in whole] == [min(batch_size, COUNT - s) for s in range(0, COUNT, batch_size)]
    ranks = [
        list(make(arrays, name, augment, batch_size=batch_size, rank=r, world_size=world_size).batches(1))
        for r in range(world_size)
    ]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.cat([p.images for p in parts]), batch.images)
        assert torch.equal(torch.cat([p.labels for p in parts]), batch.labels)
        assert {(p.number, p.global_size) for p in parts} == {(batch.number, len(batch.labels))}


@pytest.mark.parametrize("name", ["resident", "reference"])
def test_an_empty_shard_is_a_batch_without_images(arrays: Arrays, name: str) -> None:
    batches = list(make(arrays, name, indices=np.arange(9), batch_size=4, rank=0, world_size=3).batches(0))
    assert [(len(b.images), b.global_size) for b in batches] == [(1, 4), (1, 4), (0, 1)]
    assert batches[-1].images.shape == (0, 3, 32, 32) and batches[-1].labels.dtype == torch.int64


@pytest.mark.parametrize("name,workers", [("resident", 0), ("reference", 0), ("reference", 2)])
def test_an_epoch_continues_in_the_middle(arrays: Arrays, name: str, workers: int) -> None:
    one = make(arrays, name, Augment(crop_padding=4, cutout=5), workers=workers)
    whole, rest = list(one.batches(7)), list(one.batches(7, first=6))
    assert [b.number for b in rest] == list(range(6, 11))
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[6:], rest, strict=True))
    assert list(one.batches(7, first=11)) == []
    one.close()


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


@pytest.mark.parametrize("name", ["resident", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_rounded_batch(arrays: Arrays, name: str, dtype: torch.dtype) -> None:
    full = next(iter(make(arrays, name).batches(0)))
    half = next(iter(make(arrays, name, dtype=dtype, channels_last=True).batches(0)))
    assert half.images.dtype == dtype and torch.equal(half.images, full.images.to(dtype))
    assert half.images.is_contiguous(memory_format=torch.channels_last)


def test_epochs_and_seeds_differ_and_zero_one_ignores_the_mean(arrays: Arrays) -> None:
    def first(epoch: int, **options: Any) -> torch.Tensor:
        return next(iter(make(arrays, "auto", **options).batches(epoch))).images

    assert not torch.equal(first(0), first(1))
    assert not torch.equal(first(0), first(0, seed=4))
    batch = first(0, normalize="zero_one")
    assert batch.min() == 0 and batch.max() == 1
    assert make(arrays, "auto").name == "resident"


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(arrays: Arrays, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = next(iter(make(arrays, "reference", batch_size=COUNT).batches(0))).images
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert torch.equal(next(iter(make(arrays, "resident", batch_size=COUNT).batches(0))).images, expected)


def test_a_batch_stays_what_it_was(arrays: Arrays) -> None:
    """No buffer is used twice: a consumer may keep what it got."""
    kept: list[tuple[Batch, torch.Tensor]] = [(b, b.images.clone()) for b in make(arrays, "resident").batches(0)]
    assert all(torch.equal(batch.images, copy) for batch, copy in kept)


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


def test_a_closed_pipeline_says_so(arrays: Arrays) -> None:
    one = make(arrays, "resident")
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
