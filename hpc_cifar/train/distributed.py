"""Ranks, process groups, and the sum of gradients over the ranks."""

from __future__ import annotations

import contextlib
import datetime
import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import caches, files
from ..errors import RunError
from . import interfaces
from .heap import keep_freed_memory

FLAT_LIMIT = 4_000_000  # parameters; below, one flat all-reduce beats overlapping buckets, which hide no communication
GPU_CODE = {"CUDA_CACHE_PATH": "cuda", "PYTORCH_KERNEL_CACHE_PATH": "torch-kernels"}  # what the driver and torch compile


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    control: dist.ProcessGroup | None  # gloo, for flags and Python objects; None in a single process

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's ``value`` in rank order on rank 0, None elsewhere."""
        if self.control is None:
            return [value]
        out: list[Any] | None = [None] * self.size if self.main else None
        dist.gather_object(value, out, dst=0, group=self.control)
        return out

    def share(self, value: Any) -> Any:
        """Rank 0's ``value`` on every rank."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def barrier(self) -> None:
        if self.control is not None:
            dist.barrier(group=self.control)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum ``tensor``, of any shape, over the ranks, in place, on the device's own backend; alone it stays as it is."""
        if self.control is not None:
            dist.all_reduce(tensor)
        return tensor


def available_cpus(local_size: int) -> int:
    """CPUs this process may use: Slurm's share of the task if there is one, else its part of the affinity mask."""
    allowed = len(os.sched_getaffinity(0))
    per_task = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if told := files.whole(per_task):
        return max(1, min(allowed, told))
    return max(1, allowed // local_size)


def device_for(use_gpu: bool, local_rank: int, local_size: int) -> torch.device:
    """A GPU of its own for each rank of this node, or the CPU for all of them."""
    if use_gpu:
        for variable, name in GPU_CODE.items():
            caches.use(variable, name)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # Slurm may show each task only its own GPU, as number 0; otherwise NCCL refuses two ranks on one, so they share the CPU
    own_gpu = gpus == 1 and "SLURM_PROCID" in os.environ
    if use_gpu and gpus and (gpus >= local_size or own_gpu):
        return torch.device("cuda", local_rank % gpus)
    return torch.device("cpu")


def connect(use_gpu: bool = True, timeout_s: float = 600.0) -> World:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR/PORT describe; alone without them.

    Args:
        use_gpu: take a GPU if each rank of this node can have its own; a job that asks for none trains on the CPU.

    Raises:
        RunError: the variables do not fit together, or the other ranks did not come within ``timeout_s``.
    """
    try:
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    except ValueError as error:
        raise RunError(f"RANK, WORLD_SIZE, LOCAL_RANK: should be whole numbers ({error})") from None
    device = device_for(use_gpu, local_rank, local_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    torch.set_num_threads(files.whole(os.environ.get("HPC_CIFAR_THREADS", "")) or available_cpus(local_size))
    if size > 1 and (missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]):
        raise RunError(f"rank {rank} of {size}: {' and '.join(missing)} not set, by which the ranks would find each other")
    if size == 1:
        return World(0, 1, 0, 1, device, None)
    if wrong := interfaces.problems(gpu=device.type == "cuda"):
        raise RunError(f"rank {rank} on {os.uname().nodename}: {'; '.join(wrong)}")
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        if device.type == "cuda":
            dist.init_process_group("nccl", timeout=timeout, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=timeout)
        # a group of its own, so that flags in flight never mix with gradients
        control = dist.new_group(backend="gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:  # DistStoreError and DistNetworkError are RuntimeErrors
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RunError(f"rank {rank} of {size} could not join the others at {address}: {error}") from None
    assert isinstance(control, dist.ProcessGroup)
    return World(rank, size, local_rank, local_size, device, control)


@contextlib.contextmanager
def connected(use_gpu: bool = True) -> Iterator[World]:
    """:func:`connect`, and leave the process group at the end."""
    world = connect(use_gpu)
    try:
        yield world
    except BaseException:
        # NCCL would wait here for work that a lost rank never finishes; gloo ends the process with an abort if it is left open
        if not world.on_gpu:
            _leave(world)
        raise
    _leave(world)


def _leave(world: World) -> None:
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone, as gloo and NCCL report it."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        "gloo" in text and ("peer" in text or "connect" in text or "timed out" in text)
    )


class GradientSync(Protocol):
    """Sums gradients over the ranks; the loss is already divided by the global batch size."""

    module: nn.Module  # what the forward pass calls

    def zero(self) -> None: ...

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]: ...

    def finish(self) -> None: ...


class FlatSync:
    """Gradients are views of one buffer, which one all-reduce sums.

    The layout never changes, so that at any world size a resumed run adds in the same order as an undisturbed one (DDP
    rebuilds its buckets after the first step of every process).
    """

    def __init__(self, module: nn.Module, world: World, compress: bool = False) -> None:
        self.module = module
        self._world, self._compress = world, compress
        parameters = [p for p in module.parameters() if p.requires_grad]
        self._flat = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=world.device)
        offset = 0
        for p in parameters:
            view = self._flat[offset : offset + p.numel()]
            # parameters are dense, so their own strides (channels_last, say) fit the slice; fused optimizers ask for equal ones
            p.grad = view.as_strided(p.shape, p.stride())
            offset += p.numel()

    def zero(self) -> None:
        self._flat.zero_()

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def finish(self) -> None:
        if self._compress:
            self._flat.copy_(self._world.sum(self._flat.to(torch.bfloat16)))
        else:
            self._world.sum(self._flat)


_OPTIONS = inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers"  # its older name


class DDPSync:
    """torch's DistributedDataParallel, summing instead of averaging, overlapping communication with the backward pass.

    Args:
        static: tell torch that each pass is like the others; it cannot begin with one of several micro-batches then.
    """

    def __init__(self, module: nn.Module, world: World, compress: bool, static: bool) -> None:
        buffers: dict[str, Any] = {_BUFFERS: False}  # BatchNorm statistics are averaged where they are used
        self._ddp = nn.parallel.DistributedDataParallel(
            module,
            device_ids=[world.device] if world.on_gpu else None,
            gradient_as_bucket_view=True,
            static_graph=static,
            **buffers,
        )
        self._ddp.register_comm_hook(None, _sum_compressed if compress else _sum_bucket)
        self.module: nn.Module = self._ddp

    def zero(self) -> None:
        self.module.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        with contextlib.nullcontext() if last else self._ddp.no_sync():
            yield

    def finish(self) -> None:
        pass  # the backward pass of the last micro-batch has summed everything


def _sum_bucket(_, bucket):  # type: ignore[no-untyped-def]  # torch refuses any annotation but its own private one
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future


def _sum_compressed(_, bucket):  # type: ignore[no-untyped-def]
    whole = bucket.buffer()
    work = dist.all_reduce(whole.to(torch.bfloat16), async_op=True)
    assert work is not None
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: whole.copy_(done.value()[0]))
    return future


def gradient_sync(mode: str, module: nn.Module, world: World, compress: bool = False, static: bool = False) -> GradientSync:
    """``flat``, ``ddp``, or ``auto``: flat below :data:`FLAT_LIMIT` parameters. A single process needs no communication.

    Args:
        compress: send bf16, whatever the gradients are.
        static: every step is one pass through an uncompiled network.
    """
    size = sum(p.numel() for p in module.parameters() if p.requires_grad)
    if world.size == 1:
        return FlatSync(module, world)
    if mode == "flat" or (mode == "auto" and size < FLAT_LIMIT):
        return FlatSync(module, world, compress)
    return DDPSync(module, world, compress, static)
