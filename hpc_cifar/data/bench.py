"""How fast the pipelines are on this machine: interleaved rounds of one process, so that what slows one slows all."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config.experiment import Augment, Data
from . import pipeline
from .choice import NAMES, problem
from .pipeline import Batch, Pipeline
from .store import Arrays, Store

SLOW = 5  # `reference` gets a fifth of the images: it is many times slower
AUGMENT = Augment(crop_padding=4, flip="random")
Candidate = tuple[int, Callable[[int], Iterable[Any]]]  # images of a round; from the epoch to its batches
Rates = dict[str, list[float]]


def interleaved(candidates: Mapping[str, Candidate], rounds: int, synchronize: Callable[[], None] = lambda: None) -> Rates:
    """Images per second of every candidate in every round. A first round, which loads and warms up, is left out.

    Args:
        synchronize: waits for the device.

    Raises:
        AssertionError: a candidate delivered other than the images it should.
    """
    rates: Rates = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, (images, batches) in candidates.items():
            began = time.perf_counter()
            seen = sum(len(batch.labels if isinstance(batch, Batch) else batch[1]) for batch in batches(number))
            synchronize()
            seconds = time.perf_counter() - began
            assert seen == images, f"{name} delivered {seen} of {images} images"
            if number:
                rates[name].append(seen / seconds)
    return rates


def build(
    name: str,
    arrays: Arrays,
    images: int,
    batch_size: int,
    *,
    augment: Augment = AUGMENT,
    workers: Any = "auto",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Pipeline:
    """A pipeline of one rank over the first ``images`` of ``arrays``."""
    config = Data(batch_size=batch_size, pipeline=name, augment=augment, workers=workers)  # type: ignore[arg-type]
    channels = arrays.images.shape[3]
    return pipeline.build(
        config, arrays, np.arange(images), seed=0, rank=0, world_size=1, device=device, dtype=dtype,
        channels_last=channels_last, mean=(0.48,) * channels, std=(0.25,) * channels,
    )  # fmt: skip


def installed(arrays: Arrays) -> tuple[list[str], dict[str, str]]:
    """The pipelines that can run here, and why the others cannot."""
    reasons = {name: problem(name, arrays) for name in NAMES}
    return [name for name, why in reasons.items() if not why], {name: why for name, why in reasons.items() if why}


def measure(arrays: Arrays, images: int, batch_size: int, rounds: int, device: str, dtype: torch.dtype) -> Rates:
    """Every pipeline that can run here, side by side."""
    names, _ = installed(arrays)
    few = min(images, max(batch_size, images // SLOW))
    made = {
        name: build(name, arrays, few if name == "reference" else images, batch_size, device=device, dtype=dtype)
        for name in names
    }
    counts = {name: few if name == "reference" else images for name in names}
    try:
        return interleaved(
            {name: (counts[name], one.batches) for name, one in made.items()},
            rounds,
            torch.cuda.synchronize if device == "cuda" else lambda: None,
        )
    finally:
        for one in made.values():
            one.close()


def run(store: Store, images: int, batch_size: int, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure on the GPU if there is one, print a table line by line, and return the figures with all that belongs to them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    count = min(images, len(store.train.labels))
    facts = hardware()
    where = facts.get("gpu") or f"{facts['cpu']}, {facts['cores']} cores"
    kind = str(dtype).removeprefix("torch.")
    say(f"{store.label}, {count:,} images, batch {batch_size}, {kind}, crop and flip; {where}; n = {rounds} rounds")
    for name, why in installed(store.train)[1].items():
        say(f"{name}: left out: {why}")
    rates = measure(store.train, count, batch_size, rounds, device, dtype)
    for line in table(rates, "reference"):
        say(line)
    return {
        "data": store.label, "n": rounds, "batch_size": batch_size, "images": count, "dtype": kind, "hardware": facts,
        "versions": {"torch": torch.__version__, "numpy": np.__version__}, "images_per_second": rates,
    }  # fmt: skip


def table(rates: Rates, beside: str) -> list[str]:
    """Lines for people: the median, the lowest and the highest rate, and the ratio to the median of ``beside``."""
    base = statistics.median(rates[beside])
    lines = [f"{'pipeline':28}{'images/s':>13}{'lowest':>13}{'highest':>13}{'x ' + beside:>26}"]
    for name, values in rates.items():
        middle = statistics.median(values)
        lines.append(f"{name:28}{middle:13,.0f}{min(values):13,.0f}{max(values):13,.0f}{middle / base:26.1f}")
    return lines


def hardware() -> dict[str, Any]:
    """What a figure was measured on."""
    facts: dict[str, Any] = {"machine": platform.machine(), "cores": len(os.sched_getaffinity(0)), "cpu": cpu_name()}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def cpu_name() -> str:
    """The processor's model, as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
