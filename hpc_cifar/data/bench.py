"""How fast the pipelines are on this machine: interleaved rounds of one process, so that what slows one slows all."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config.experiment import Augment, Data
from ..errors import HpcCifarError, first_line
from . import pipeline
from .choice import NAMES, problem
from .pipeline import Batch, Pipeline
from .store import Arrays, Store

_PARTS = ("torch", "torchvision", "numpy", "numba", "triton", "ffcv")
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


def measure(
    arrays: Arrays, images: int, batch_size: int, rounds: int, device: str, dtype: torch.dtype
) -> tuple[Rates, dict[str, str]]:
    """Every pipeline that can run here, side by side, and why the others cannot: not installed, or it could not begin."""
    names, missing = installed(arrays)
    few = min(images, max(batch_size, images // SLOW))
    counts = {name: few if name == "reference" else images for name in names}
    made: dict[str, Pipeline] = {}
    try:
        for name in names:
            try:
                made[name] = build(name, arrays, counts[name], batch_size, device=device, dtype=dtype)
            except HpcCifarError as error:
                missing[name] = first_line(error)
        rates = interleaved(
            {name: (counts[name], one.batches) for name, one in made.items()},
            rounds,
            torch.cuda.synchronize if device == "cuda" else lambda: None,
        )
        return rates, missing
    finally:
        for one in made.values():
            one.close()


def versions() -> dict[str, str]:
    """Of Python and what the pipelines are made of, as far as it is installed."""
    found = {"python": platform.python_version()}
    for distribution in metadata.distributions():
        name = (distribution.name or "").lower()
        if name in _PARTS or name.startswith("nvidia-dali"):
            found[name] = distribution.version
    return dict(sorted(found.items()))


def run(store: Store, images: int, batch_size: int, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure on the GPU if there is one, print a table line by line, and return the figures with all that belongs to them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    count = min(images, len(store.train.labels))
    facts = hardware()
    where = facts.get("gpu") or f"{facts['cpu']}, {facts['cores']} cores"
    kind = str(dtype).removeprefix("torch.")
    say(f"{store.label}, {count:,} images, batch {batch_size}, {kind}, crop and flip; {where}; n = {rounds} rounds")
    rates, missing = measure(store.train, count, batch_size, rounds, device, dtype)
    for name, why in missing.items():
        say(f"{name}: left out: {why}")
    for line in table(rates, "reference"):
        say(line)
    return {
        "data": store.label, "n": rounds, "batch_size": batch_size, "images": count, "dtype": kind, "device": device,
        "hardware": facts, "versions": versions(), "left_out": missing, "images_per_second": rates,
    }  # fmt: skip


def table(rates: Rates, beside: str) -> list[str]:
    """Lines for people: median, lowest and highest rate, and the ratio to the median of ``beside``, if it is there."""
    base = statistics.median(rates[beside]) if beside in rates else float("nan")
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
