"""The Triton kernel in Triton's interpreter: the same pixels without a GPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from pipelines import AUGMENTS, COMMON, COUNT, MEAN, SEED, STD, make, plain, raw, shown

from hpc_cifar.config.experiment import Augment, Data
from hpc_cifar.data import pipeline, resident
from hpc_cifar.data.store import Arrays, moments_of

SAMPLES = np.arange(0, COUNT, 35)


@pytest.fixture(scope="module")
def triton_kernel() -> Iterator[ModuleType]:
    """The module as it is where TRITON_INTERPRET is set, which Triton reads when a kernel is defined."""
    name = "hpc_cifar.data.triton_kernel"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module(name)
        yield module
    sys.modules.pop(name, None)


def source(arrays: Arrays, augment: Augment, **options: object) -> resident.Resident:
    config = Data(batch_size=int(options.pop("batch_size", 8)), augment=augment)  # type: ignore[call-overload]
    settings = COMMON | options
    output = pipeline.Output(torch.device("cpu"), settings["dtype"], settings["channels_last"], MEAN, STD)
    indices = np.asarray(options.get("indices", SAMPLES))
    return resident.Resident(pipeline.Epochs(config, indices, SEED, 0, 1, 32, 32), arrays, output, triton=True)


@pytest.mark.usefixtures("triton_kernel")
@pytest.mark.parametrize("augment", AUGMENTS, ids=shown)
def test_the_kernel_gives_the_same_pixels(arrays: Arrays, augment: Augment) -> None:
    """Draws, too, are its own."""
    channels_last = AUGMENTS.index(augment) % 2 == 0
    made = source(arrays, augment, channels_last=channels_last)
    slow = make(arrays, "reference", augment, indices=SAMPLES, batch_size=8, channels_last=channels_last)
    for epoch in (1, 2) if augment.flip == "alternating" else (1,):
        for mine, theirs in zip(made.batches(epoch), slow.batches(epoch), strict=True):
            torch.testing.assert_close(mine.images, theirs.images, atol=1e-6, rtol=0)
            assert np.array_equal(raw(mine.images), raw(theirs.images)) and torch.equal(mine.labels, theirs.labels)
            assert (mine.number, mine.global_size) == (theirs.number, theirs.global_size)
            layout = torch.channels_last if channels_last else torch.contiguous_format
            assert mine.images.is_contiguous(memory_format=layout)


@pytest.mark.slow
@pytest.mark.usefixtures("triton_kernel")
@pytest.mark.parametrize("shape", [(32, 32, 3), (20, 28, 1), (33, 17, 4)])
def test_ranks_together_have_the_whole_batch_of_images_of_any_shape(shape: tuple[int, int, int]) -> None:
    """Of one, two and three ranks; the last batch is smaller."""
    images = np.random.default_rng(1).integers(0, 256, (60, *shape), dtype=np.uint8)
    arrays = Arrays(images, np.arange(60, dtype=np.int64), moments_of(images))
    augment = Augment(crop_padding=3, padding_mode="reflect", flip="random", cutout=5)
    mean, std = (0.5,) * shape[2], (0.25,) * shape[2]
    output = pipeline.Output(torch.device("cpu"), torch.float32, False, mean, std)
    chosen = np.arange(1, 60, 3)

    def ranks(world_size: int, triton: bool) -> list[resident.Resident]:
        config = Data(batch_size=9, augment=augment)
        places = [pipeline.Epochs(config, chosen, SEED, rank, world_size, *shape[:2]) for rank in range(world_size)]
        return [resident.Resident(place, arrays, output, triton=triton) for place in places]

    for world_size in (1, 2, 3):
        [whole] = ranks(1, False)
        for batch, *parts in zip(whole.batches(4), *(one.batches(4) for one in ranks(world_size, True)), strict=True):
            torch.testing.assert_close(torch.cat([part.images for part in parts]), batch.images, atol=1e-6, rtol=0)
            assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)


@pytest.mark.usefixtures("triton_kernel")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_the_rounded_batch(arrays: Arrays, dtype: torch.dtype) -> None:
    augment = Augment(crop_padding=4, flip="random")
    full, half = (next(iter(source(arrays, augment, dtype=d).batches(0))).images for d in (torch.float32, dtype))
    assert half.dtype == dtype
    ulp = torch.finfo(dtype).eps * full.abs().clamp_min(torch.finfo(torch.float16).tiny)
    assert ((half.float() - full).abs() <= ulp).all()


@pytest.mark.usefixtures("triton_kernel")
def test_launches_of_one_batch_of_some_and_of_an_epoch_are_equal(arrays: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    augment = Augment(crop_padding=4, flip="random", cutout=7)
    whole = list(source(arrays, augment).batches(3))
    for images in (1, 17):
        monkeypatch.setattr(resident, "CHUNK_BYTES", images * 3072 * 4)
        parts = list(source(arrays, augment).batches(3))
        assert all(torch.equal(a.images, b.images) for a, b in zip(whole, parts, strict=True))
        rest = list(source(arrays, augment).batches(3, first=2))
        assert all(torch.equal(a.images, b.images) for a, b in zip(whole[2:], rest, strict=True))


def test_the_place_of_a_batch_lies_in_device_memory(arrays: Arrays, triton_kernel: ModuleType) -> None:
    """So that a captured launch can be replayed for the next batch, in the memory of the last."""
    augment = Augment(crop_padding=4, flip="alternating")
    output = pipeline.Output(torch.device("cpu"), torch.float32, False, MEAN, STD)
    kernel = triton_kernel.Kernel(augment, arrays, output, SEED)
    samples = np.arange(30, dtype=np.int64)
    kernel.begin(4, samples)
    images, labels = kernel.empty(10)
    for start in (0, 10, 20):
        kernel.position.fill_(start)
        kernel.launch(images, labels)
        assert np.array_equal(raw(images), plain(arrays, samples[start : start + 10].tolist(), augment, 4))
        assert np.array_equal(labels.numpy(), arrays.labels[samples[start : start + 10]])
    order = kernel.order.data_ptr()
    for some in (samples[:20], np.arange(COUNT, dtype=np.int64)):  # the rest of an epoch, a whole one
        kernel.begin(5, some)
        assert kernel.order.data_ptr() == order


def test_where_the_kernel_does_not_work_torch_operations_serve(arrays: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    """As without Triton, or without the C compiler that it needs. No tensor goes to a GPU."""
    monkeypatch.setitem(sys.modules, "triton", None)
    output = pipeline.Output(torch.device("cuda"), torch.float32, False, MEAN, STD)
    epochs = pipeline.Epochs(Data(batch_size=8), SAMPLES, SEED, 0, 1, 32, 32)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor)
    one = resident.Resident(epochs, arrays, output)
    assert "Triton's kernel does not work here" in one.note and one._kernel is None and one._normaliser is not None
