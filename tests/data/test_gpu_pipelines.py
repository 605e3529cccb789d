"""All pipelines on a real GPU, where there is one: the pixels of the CPU, graphs, and what stays as it was."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from pipelines import AUGMENTS, COUNT, DALI, FFCV, MEAN, SEED, STD, make, plain, raw, shown

from hpc_cifar.config.experiment import Augment
from hpc_cifar.data import choice, pipeline, resident
from hpc_cifar.data.store import Arrays

pytestmark = [pytest.mark.component("gpu"), pytest.mark.slow]


@pytest.fixture(autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device here")


@pytest.mark.parametrize("augment", AUGMENTS, ids=shown)
@pytest.mark.parametrize("name", ["resident", "reference", FFCV, DALI])
def test_the_pixels_are_those_of_the_cpu(readable: Callable[[str], Arrays], name: str, augment: Augment) -> None:
    arrays = readable(name)
    for channels_last in (False, True):
        one = make(arrays, name, augment, device="cuda", channels_last=channels_last)
        slow = make(arrays, "reference", augment)
        for mine, theirs in zip(one.batches(3), slow.batches(3), strict=True):
            assert mine.images.is_cuda and mine.labels.is_cuda
            layout = torch.channels_last if channels_last else torch.contiguous_format
            assert mine.images.is_contiguous(memory_format=layout)
            torch.testing.assert_close(mine.images.cpu(), theirs.images, atol=1e-6, rtol=0)
            assert np.array_equal(raw(mine.images.cpu()), raw(theirs.images)) and torch.equal(mine.labels.cpu(), theirs.labels)
        one.close()


@pytest.mark.parametrize("name", ["resident", "reference", FFCV, DALI])
def test_batches_stay_what_they_were(readable: Callable[[str], Arrays], name: str) -> None:
    one = make(readable(name), name, Augment(crop_padding=4, rotation_degrees=5), device="cuda", dtype=torch.bfloat16)
    kept = [(batch, batch.images.clone(), batch.labels.clone()) for batch in one.batches(0)]
    list(one.batches(1))
    torch.cuda.synchronize()
    assert all(torch.equal(batch.images, images) and torch.equal(batch.labels, labels) for batch, images, labels in kept)
    one.close()


def test_a_captured_launch_is_replayed_for_each_batch_and_epoch(arrays: Arrays) -> None:
    from hpc_cifar.data.triton_kernel import Kernel

    augment = Augment(crop_padding=4, flip="random", cutout=8)
    output = pipeline.Output(torch.device("cuda"), torch.float32, True, MEAN, STD)
    kernel = Kernel(augment, arrays, output, SEED)
    samples = np.random.default_rng(0).permutation(COUNT)
    kernel.begin(0, samples)
    images, labels = kernel.empty(64)
    kernel.launch(images, labels)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.launch(images, labels)
        kernel.position += 64
    for epoch in (0, 1):
        kernel.begin(epoch, samples)
        kernel.position.zero_()
        for first in range(0, COUNT - 63, 64):
            graph.replay()
            chosen = samples[first : first + 64]
            assert np.array_equal(raw(images.cpu()), plain(arrays, chosen.tolist(), augment, epoch))
            assert np.array_equal(labels.cpu().numpy(), arrays.labels[chosen])


@pytest.mark.parametrize("augment", AUGMENTS, ids=shown)
def test_the_kernel_equals_the_torch_operations(arrays: Arrays, augment: Augment) -> None:
    output = pipeline.Output(torch.device("cuda"), torch.float32, True, MEAN, STD)
    config = make(arrays, "resident", augment)._epochs
    both = [resident.Resident(config, arrays, output, triton=wanted) for wanted in (True, False)]
    for mine, theirs in zip(*(one.batches(1) for one in both), strict=True):
        torch.testing.assert_close(mine.images, theirs.images, atol=1e-6, rtol=0)
        assert torch.equal(mine.labels, theirs.labels)


def test_auto_takes_the_resident_one(arrays: Arrays) -> None:
    assert choice.choose("auto", torch.device("cuda"), arrays).name == "resident"
