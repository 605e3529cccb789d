"""The augmentation kernel on a GPU beside the copy bandwidth and a training step of deep300, interleaved in one process.

    python benchmarks/kernel.py --rounds 20 --json docs/results/kernel-gpu.json

Bytes moved are those that must be: the raw image in, the finished one out. Times are CUDA events; the medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpc_cifar import files
from hpc_cifar.config.experiment import Augment
from hpc_cifar.config.load import load_experiment
from hpc_cifar.data import bench, pipeline
from hpc_cifar.data.store import Arrays, moments_of
from hpc_cifar.models.build import build as build_model

COUNT, SHAPE = 50_000, (32, 32, 3)
STEP = "deep300 step"
JOB = Path(__file__).resolve().parents[1] / "jobs" / "deep300.yaml"


SLEEP_CYCLES = 1_000_000  # about half a millisecond


def milliseconds(work: Callable[[], Any], launched: bool) -> float:
    """Of the device; with ``launched`` without the time that its launch takes the host, since the device is busy until then."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if launched:
        torch.cuda._sleep(SLEEP_CYCLES)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch sees no GPU here", file=sys.stderr)
        return 2
    from hpc_cifar.data.triton_kernel import Kernel

    images = np.random.default_rng(0).integers(0, 256, (COUNT, *SHAPE), dtype=np.uint8)
    arrays = Arrays(images, np.arange(COUNT, dtype=np.int64) % 10, moments_of(images))
    output = pipeline.Output(torch.device("cuda"), torch.bfloat16, True, (0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
    kernel = Kernel(Augment(crop_padding=4, flip="random"), arrays, output, 0)
    kernel.begin(0, np.random.default_rng(1).permutation(COUNT))
    whole, labels = kernel.empty(COUNT)
    experiment = load_experiment(JOB)
    size = experiment.data.batch_size
    batch, batch_labels = kernel.empty(size)
    moved = COUNT * (images[0].size + kernel.image_bytes)
    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    network = build_model(experiment.model, (3, 32, 32), False).cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(network(batch), batch_labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    candidates: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(source),
        "kernel, epoch": lambda: kernel.launch(whole, labels),
        "kernel, batch": lambda: kernel.launch(batch, batch_labels),
        STEP: step,
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(options.rounds + 3):
        for name, work in candidates.items():
            took = milliseconds(work, launched=name != STEP)  # an eager step is bound by its launches, and is meant to be
            if number >= 3:  # compilation and warm-up
                times[name].append(took)
    middle = {name: statistics.median(values) for name, values in times.items()}
    bandwidth = moved / middle["copy"] * 1e3
    share = moved / middle["kernel, epoch"] * 1e3 / bandwidth
    print(f"{torch.cuda.get_device_name()}, n = {options.rounds}; copy {bandwidth / 1e12:.2f} TB/s")
    for name, values in times.items():
        print(f"{name:16}{middle[name]:10.4f} ms ({min(values):.4f} to {max(values):.4f})")
    print(f"the kernel moves an epoch at {100 * share:.0f} % of the copy bandwidth (at least 60)")
    print(f"a batch of {size} takes {100 * middle['kernel, batch'] / middle[STEP]:.2f} % of an eager step (below 1)")
    if options.json:
        result = {"n": options.rounds, "hardware": bench.hardware(), "versions": bench.versions(), "milliseconds": times}
        files.write_json(options.json.absolute(), {**result, "copy_bytes_per_second": bandwidth, "share_of_copy": share})
    return 0


if __name__ == "__main__":
    sys.exit(main())
