"""What each part of the training step is worth: rungs from a plain script to this package's trainer, in one process.

    python benchmarks/step.py --json docs/results/step-2-cores.json      deep300's network, batch 664
    python benchmarks/step.py --job quickstart --steps 20 --rungs plain,fused

``plain`` is what a user would write (benchmarks/plain.py). Every further rung adds one thing to the one before it, by the
trainer's own step: channels_last, torch.compile, the fused data; then the same in bf16, of which a processor that does not
compute in it climbs the first rung only, to show what its emulation costs. On a GPU, which any of these steps leaves waiting
for a DataLoader, the fused data come first, and the CUDA graph last. Rungs take turns; ratios of each round to its ``plain``
count. On a CPU all of them, ``plain`` too, profit from memory that stays with the process (train/heap.py). Kernels and
host synchronisations of a step are counted by torch's profiler.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plain
import torch
from torch.profiler import ProfilerActivity, profile

from hpc_cifar import files
from hpc_cifar.config.experiment import Augment, Experiment
from hpc_cifar.config.load import load_experiment
from hpc_cifar.config.packaged import find_job
from hpc_cifar.data import bench
from hpc_cifar.data import pipeline as data
from hpc_cifar.models.build import build
from hpc_cifar.plan import make_plan, requested_placement
from hpc_cifar.train import optim
from hpc_cifar.train.distributed import connect, gradient_sync
from hpc_cifar.train.setup import Prepared, compiled, computes_in_bf16, prepare_data
from hpc_cifar.train.step import Stepper

# on a GPU a launch or a wait of the host, on a CPU an operation, or one that reads a number from a tensor
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")


PROMISES = {"eager fused": 1.2, "bf16 eager fused": 1.9}  # of a CPU, beside ``plain``


@dataclasses.dataclass(frozen=True)
class Rung:
    """How a step is computed and fed."""

    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    compile: bool = False
    graph: bool = False
    fused: bool = False  # data by the resident pipeline


def rungs(on_gpu: bool, native: bool) -> dict[str, Rung | None]:
    """By name, each one more than the one before; None is the plain script.

    Args:
        native: the device computes in bf16.
    """
    kind = torch.bfloat16 if native else torch.float32
    if on_gpu:
        return {
            "plain": None,
            "fused data": Rung(fused=True),
            "channels_last": Rung(channels_last=True, fused=True),
            "eager fused": Rung(kind, channels_last=True, fused=True),
            "compiled": Rung(kind, channels_last=True, compile=True, fused=True),
            "graphed": Rung(kind, channels_last=True, compile=True, graph=True, fused=True),
        }
    ladder = {
        "channels_last": Rung(channels_last=True),
        "compiled": Rung(channels_last=True, compile=True),
        "eager fused": Rung(channels_last=True, fused=True),
        "fused": Rung(channels_last=True, compile=True, fused=True),
    }
    in_bf16 = {f"bf16 {name}": dataclasses.replace(rung, dtype=torch.bfloat16) for name, rung in ladder.items()}
    return {"plain": None, **ladder, **(in_bf16 if native else dict(itertools.islice(in_bf16.items(), 1)))}


def steps(experiment: Experiment, prepared: Prepared, rung: Rung) -> Iterator[int]:
    """Images of each step of this package's trainer, after it was made."""
    world = connect()
    torch.manual_seed(experiment.seed)
    network = build(experiment.model, prepared.store.image_shape).to(world.device)
    if rung.channels_last:
        network = network.to(memory_format=torch.channels_last)
    plan = make_plan(experiment, requested_placement(experiment.resources), len(prepared.store.train.labels))
    optimizer = optim.build(experiment.optimizer, network.parameters(), capturable=rung.graph and world.on_gpu)
    sync = gradient_sync("flat", network, world)
    if rung.compile:
        sync.module = compiled(sync.module)
    stepper = Stepper(experiment, sync, optimizer, None, world, rung.dtype, plan, graph=rung.graph)
    number = itertools.count()
    source = fused if rung.fused else loaded
    for batch in source(experiment, prepared, rung, world.device):
        stepper(batch, next(number))
        if stepper.window_full:
            stepper.take_window()
        yield len(batch.labels)


def loaded(experiment: Experiment, prepared: Prepared, rung: Rung, device: torch.device) -> Iterator[data.Batch]:
    for batch in plain.batches(prepared, experiment.data.batch_size, device):
        if rung.channels_last:
            batch = dataclasses.replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))
        yield batch


def fused(experiment: Experiment, prepared: Prepared, rung: Rung, device: torch.device) -> Iterator[data.Batch]:
    arguments: dict[str, Any] = {
        "seed": experiment.seed, "rank": 0, "world_size": 1, "device": device, "dtype": rung.dtype,
        "channels_last": rung.channels_last, "mean": prepared.mean, "std": prepared.std,
    }  # fmt: skip
    resident = experiment.data.model_copy(update={"pipeline": "resident"})
    with contextlib.closing(data.build(resident, prepared.store.train, prepared.train_indices, **arguments)) as pipeline:
        for epoch in itertools.count():
            for batch in pipeline.batches(epoch):
                if len(batch.labels) == experiment.data.batch_size:  # as the loader drops its last one
                    yield batch


def counted(runner: Iterator[int], on_gpu: bool) -> dict[str, int]:
    """Launches and waits of the host in one step."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as seen:
        next(runner)
    events = seen.key_averages()
    last = 1 if on_gpu else 0  # the profiler's own wait for the device, as it ends
    waits = sum(event.count for event in events if event.key in WAITS) - last
    if on_gpu:
        return {"launches": sum(event.count for event in events if event.key in LAUNCHES), "waits": waits}
    return {"operations": sum(event.count for event in events if event.key.startswith("aten::")), "waits": waits}


def synchronise(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def flops_of_an_image(experiment: Experiment, prepared: Prepared) -> float:
    """Of forward and backward, as torch counts them: multiplications and additions of convolutions and dense layers."""
    from torch.utils.flop_counter import FlopCounterMode

    network = build(experiment.model, prepared.store.image_shape)
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(2, *prepared.store.image_shape)).sum().backward()
    return counter.get_total_flops() / 2


def bytes_of_an_image(experiment: Experiment, prepared: Prepared, itemsize: int) -> float:
    """That an unfused step must move: the output of every layer is written and read once forward, and the same backward."""
    network, moved = build(experiment.model, prepared.store.image_shape), [0]

    def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        moved[0] += 4 * output.numel() * itemsize

    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(hook)
    network(torch.zeros(2, *prepared.store.image_shape))
    return moved[0] / 2


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What the device does at its best: FLOP/s of a large product of matrices, bytes/s of a copy (read and written)."""
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1536
    left = torch.randn(size, size, device=device).to(dtype)
    source = torch.empty((2**30 if on_gpu else 2**27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def best(work: Any, rounds: int = 5) -> float:
        times = []
        for _ in range(rounds):
            synchronise(on_gpu)
            began = time.perf_counter()
            work()
            synchronise(on_gpu)
            times.append(time.perf_counter() - began)
        return min(times)

    torch.backends.cuda.matmul.allow_tf32 = on_gpu  # as cuDNN computes float32 convolutions unless it is told not to
    return {
        "flops_per_second": 2 * size**3 / best(lambda: left @ left),
        "bytes_per_second": 2 * len(source) / best(lambda: target.copy_(source)),
    }


def occupied_mib(on_gpu: bool) -> float:
    """Memory of the device that is in use; on a CPU the most that the process has used so far."""
    if not on_gpu:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**20


def peak_mib(on_gpu: bool) -> float:
    """The most that was in use since :func:`occupied_mib`."""
    if not on_gpu:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return torch.cuda.max_memory_allocated() / 2**20


def experiment_of(options: argparse.Namespace) -> Experiment:
    """The job, with the augmentation and the normalisation of the plain script."""
    values = load_experiment(find_job(options.job)).model_dump()
    values["data"]["augment"] = Augment(crop_padding=4, flip="random").model_dump()
    values["data"]["normalize"] = "mean_std"
    values["resources"] = {}
    if options.dataset:
        values["data"]["dataset"] = options.dataset
    if options.batch_size:
        values["data"]["batch_size"] = options.batch_size
    return Experiment.model_validate(values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", default="deep300", help="job file, or the name of a packaged one")
    parser.add_argument("--dataset", help="another dataset than the job's, such as digits")
    parser.add_argument("--steps", type=int, default=6, help="steps a round; a first round is not counted")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--rungs", help="only these, with commas between; plain is always one")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    experiment = experiment_of(options)
    device = connect().device
    on_gpu = device.type == "cuda"
    prepared = prepare_data(experiment, files.data_root(), connect())
    tops = {str(kind).removeprefix("torch."): ceilings(device, kind) for kind in (torch.float32, torch.bfloat16)}
    known = rungs(on_gpu, computes_in_bf16(device))
    wanted = ["plain", *(options.rungs.split(",") if options.rungs else known)]
    if unknown := set(wanted) - set(known):
        parser.error(f"--rungs: unknown {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    chosen = {name: rung for name, rung in known.items() if name in wanted}
    runners = {
        name: plain.steps(experiment, prepared, device) if rung is None else steps(experiment, prepared, rung)
        for name, rung in chosen.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in runners}
    figures: dict[str, dict[str, Any]] = {}
    for round_number in range(options.rounds + 1):
        for name, runner in runners.items():
            synchronise(on_gpu)
            before = 0.0 if round_number else occupied_mib(on_gpu)  # it empties the cache, which costs the steps after it
            began = time.perf_counter()
            images = sum(next(runner) for _ in range(options.steps))
            synchronise(on_gpu)
            if round_number:  # the first round warms up workers, compilers and caches
                rates[name].append(images / (time.perf_counter() - began))
            else:
                figures[name] = {"first_round_s": time.perf_counter() - began, "peak_mib": peak_mib(on_gpu) - before}
    size, flops = experiment.data.batch_size, flops_of_an_image(experiment, prepared)
    for name, runner in runners.items():
        rung = chosen[name] or Rung()
        top = tops[str(rung.dtype).removeprefix("torch.")]
        rate = statistics.median(rates[name])
        moved = bytes_of_an_image(experiment, prepared, rung.dtype.itemsize)
        figures[name] |= dataclasses.asdict(rung) | {
            "dtype": str(rung.dtype).removeprefix("torch."),
            "images_per_second": rates[name],
            "milliseconds_per_step": 1000 * size / rate,
            "beside_plain": statistics.median(a / b for a, b in zip(rates[name], rates["plain"], strict=True)),
            "share_of_matmul_rate": rate * flops / top["flops_per_second"],
            "share_of_copy_rate_unfused": rate * moved / top["bytes_per_second"],
            "per_step": counted(runner, on_gpu),
        }
    report = {
        "job": experiment.name, "data": prepared.store.label, "device": device.type, "batch_size": size,
        "steps": options.steps, "n": options.rounds,
        "flops_per_image": flops, "ceilings": tops, "threads": torch.get_num_threads(), "rungs": figures,
        "hardware": bench.hardware(), "versions": bench.versions(),
    }  # fmt: skip
    print("\n".join(table(report)))
    if options.json:
        files.write_json(options.json.absolute(), report)
    return 0


def table(report: dict[str, Any]) -> list[str]:
    lines = [f"{report['job']}, {report['data']}, batch {report['batch_size']}, n = {report['n']}, {report['hardware']}"]
    lines.append("| rung | images/s, median (least to most) | ms a step | beside plain | of matmul | launches, waits a step |")
    lines.append("|---" * 6 + "|")
    for name, row in report["rungs"].items():
        found = row["images_per_second"]
        counts = row["per_step"]
        lines.append(
            f"| {name} | {statistics.median(found):,.0f} ({min(found):,.0f} to {max(found):,.0f}) "
            f"| {row['milliseconds_per_step']:.1f} | {row['beside_plain']:.2f} | {row['share_of_matmul_rate']:.0%} "
            f"| {counts.get('launches', counts.get('operations'))}, {counts['waits']} |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
