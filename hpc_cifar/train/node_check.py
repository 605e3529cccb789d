"""Whether this node can train: its device, memory, folders and data, and a sum over all ranks."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined, unused-ignore]  # not in __all__

from ..data.store import Store
from ..errors import DataError, HpcCifarError, first_line
from . import cgroups, interfaces
from .distributed import device_for
from .meeting import Meeting

GIB = 2**30
HOST_GIB_PER_RANK = 0.5  # free, beyond what the process has already; little training does with less
DEVICE_GIB = 2.0
POLL_S = 0.002


class Broken(Exception):
    """A check that failed, in words."""


def problems_here(
    run: Path, data_root: Path, dataset: str, *, gpu: bool, local_rank: int, local_size: int, verify: bool
) -> list[str]:
    """What is wrong with this rank's device and, on the first rank of a node, with the node; nothing if all is well.

    Args:
        run: the run directory, where a small file is written and read back.
        data_root: where the dataset is read from.
        gpu: whether the job asked for GPUs.
        verify: read every byte of the dataset and compare its digests.
    """
    checks: dict[str, Callable[[], None]] = {"device": lambda: check_device(gpu, local_rank, local_size)}
    if local_rank == 0:
        checks |= {
            "memory": lambda: _check_memory(local_size),
            "network": lambda: _check_interfaces(gpu),
            "run directory": lambda: _check_folder(run),
            "data": lambda: _check_data(data_root, dataset, verify),
        }
    found = []
    for name, check in checks.items():
        try:
            check()
        except Broken as error:
            found.append(f"{name}: {error}")
        except HpcCifarError as error:
            found.append(f"{name}: {first_line(error, 400)}")
        except Exception as error:  # a driver may fail in any way
            found.append(f"{name}: {type(error).__name__}: {first_line(error)}")
    return found


def check_device(gpu: bool, local_rank: int, local_size: int) -> None:
    """A small product on a rank's device, and enough free memory there.

    Raises:
        Broken: the device is missing, wrong, or full.
    """
    device = device_for(gpu, local_rank, local_size)
    if gpu and device.type != "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise Broken(f"torch sees {count} GPUs for {local_size} processes (CUDA_VISIBLE_DEVICES: {shown})")
    left = torch.arange(64 * 64).reshape(64, 64) % 7
    right = torch.arange(64 * 64).reshape(64, 64) % 5
    product = (left.float().to(device) @ right.float().to(device)).cpu()
    if not torch.equal(product.long(), left @ right):  # small whole numbers, exact in every precision
        raise Broken(f"a small matrix product on {device} is wrong")
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] / GIB
        if free < DEVICE_GIB:
            raise Broken(f"{free:.1f} GiB free on {torch.cuda.get_device_name(device)}, needed are {DEVICE_GIB:.1f}")


def _check_interfaces(gpu: bool) -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and (found := interfaces.problems(gpu=gpu)):
        raise Broken("; ".join(found))


def _check_memory(local_size: int) -> None:
    free, needed = free_host_bytes() / GIB, HOST_GIB_PER_RANK * local_size
    if free < needed:
        raise Broken(f"{free:.1f} GiB free for {local_size} processes, needed are {needed:.1f}")


def free_host_bytes(groups: Path = cgroups.GROUPS, own: Path = cgroups.OWN) -> int:
    """Memory that can still be had: of the machine, and of the control groups this process is in.

    Args:
        groups, own: see :mod:`hpc_cifar.train.cgroups`.
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    free = int(found[1]) * 1024 if found else 2**62
    return max(0, min([free, *(limit - used for limit, used in cgroups.memory_limits(groups, own))]))


def _check_folder(folder: Path) -> None:
    probe = folder / f".preflight-{os.uname().nodename}-{os.getpid()}"
    content = secrets.token_bytes(4096)
    try:
        with probe.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if probe.read_bytes() != content:
            raise Broken(f"{folder}: a file reads back other than it was written")
    except OSError as error:
        raise Broken(f"{folder}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _check_data(data_root: Path, dataset: str, verify: bool) -> None:
    try:
        Store.open(data_root, dataset, verify=verify)
    except DataError as error:
        raise Broken(str(error).partition("; run:")[0]) from None


def problems_of_sum(meeting: Meeting, *, gpu: bool, local_rank: int, local_size: int) -> list[str]:
    """What is wrong with an all-reduce over all ranks. It may hang for ever, so a thread does it, which is left behind then."""
    if meeting.size == 1:
        return []
    found: list[str] = []

    def attempt() -> None:
        try:
            found.append(_sum(meeting, device_for(gpu, local_rank, local_size)))
        except Exception as error:
            found.append(f"all-reduce: {first_line(error)}")

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    deadline = time.monotonic() + meeting.timeout_s
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(0.05)  # short, since a stop signal is heard in between
    if not found:
        return [f"all-reduce: no end within {meeting.timeout_s:.0f} s"]
    return [line for line in found if line]


def _sum(meeting: Meeting, device: torch.device) -> str:
    """Sum over a process group of its own, which does not outlive the check; "" if the sum is right."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    # NCCL's watchdog would end the process at its timeout, before anyone could say why
    timeout = datetime.timedelta(seconds=meeting.timeout_s + (600 if on_gpu else 0))
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=PrefixStore("sum", meeting.store),
        rank=meeting.rank, world_size=meeting.size, timeout=timeout, device_id=device if on_gpu else None,
    )  # fmt: skip
    deadline = time.monotonic() + meeting.timeout_s
    said = _summed(meeting, device, None, deadline, "all-reduce")
    if on_gpu and not said:  # flags and Python objects travel by gloo there too
        control = dist.new_group(backend="gloo")
        assert isinstance(control, dist.ProcessGroup)
        said = _summed(meeting, torch.device("cpu"), control, deadline, "all-reduce by gloo")
    if "no end" not in said:
        dist.destroy_process_group()
    return said


def _summed(meeting: Meeting, device: torch.device, group: dist.ProcessGroup | None, deadline: float, what: str) -> str:
    values = torch.full((1024,), meeting.rank + 1.0, device=device)
    work = dist.all_reduce(values, group=group, async_op=True)
    assert work is not None
    while not work.is_completed():
        if time.monotonic() > deadline:
            return f"{what}: no end within {meeting.timeout_s:.0f} s"
        time.sleep(POLL_S)
    work.wait()
    got, expected = values.cpu(), meeting.size * (meeting.size + 1) / 2
    wrong = got[got != expected]
    return f"{what}: {wrong[0].item():g} instead of {expected:g}" if len(wrong) else ""
