"""Whether torch, GPUs, FFCV, DALI, W&B's client and TensorBoard work here; ``doctor`` asks in processes that may crash or hang.

``python -m hpc_cifar.train.libraries WHICH GPUS`` prints a JSON list of findings as its last line. GPUS: of the job, "" if
there is none.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from ..errors import first_line
from ..findings import Finding, ok, problem, warning

DRIVER = Path("/proc/driver/nvidia/version")
Kind = Callable[[str, str, str], Finding]
OTHER_PIPELINES = "other jobs need nothing of it"


def torch_and_gpus(wanted: int | None) -> list[Finding]:
    """torch with torchvision, and every GPU that it sees.

    Args:
        wanted: GPUs that the job was given; None where no job looks.
    """
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return [_torchvision(f"{torch.__version__}, {cuda}"), *_gpus(wanted)]


def _torchvision(torch_words: str) -> Finding:
    try:
        import torchvision  # noqa: F401  # its operators are bound to one torch: a mismatch shows here
    except Exception as error:
        again = "pip install --force-reinstall torch torchvision"
        return problem("torch", f"{torch_words}; torchvision cannot be imported: {first_line(error)}", again)
    return ok("torch", f"{torch_words}; torchvision {importlib.metadata.version('torchvision')}")


def _gpus(wanted: int | None) -> list[Finding]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is not None and count < wanted:
        seen = f"torch sees {count} of the {wanted} GPUs that the job was given"
        return [problem("GPU", f"{seen} (CUDA_VISIBLE_DEVICES: {shown})", _why_none(torch.version.cuda))]
    if not count:
        if DRIVER.exists() and shown is None and wanted is None:
            return [problem("GPU", "there is a driver, but torch sees no GPU", _why_none(torch.version.cuda))]
        hidden = "CUDA_VISIBLE_DEVICES is empty" if shown == "" else "none here"
        return [ok("GPU", f"{hidden}: this machine trains on its processors")]
    bad = warning if wanted is None else problem  # others may use those of a login node
    return [_gpu(number, count, bad) for number in range(count)] + [_nccl(bad)]


def _why_none(built_for: str | None) -> str:
    if built_for is None:
        return "pip install torch, in a version for CUDA; this one was built without"
    return f"nvidia-smi (the driver must be new enough for CUDA {built_for}; else pip install a torch for an older CUDA)"


def _gpu(number: int, count: int, bad: Kind) -> Finding:
    import torch

    from .node_check import Broken, check_device

    name = f"GPU {number}"
    try:
        check_device(True, number, count)
        facts = torch.cuda.get_device_properties(number)
        free, whole = (value / 2**30 for value in torch.cuda.mem_get_info(number))
        return ok(name, f"{facts.name}, {free:.1f} of {whole:.1f} GiB free, compute capability {facts.major}.{facts.minor}")
    except Broken as error:
        return bad(name, str(error), "nvidia-smi shows who uses it; give the node to the site's staff if nobody does")
    except Exception as error:  # a driver may fail in any way
        return bad(name, first_line(error), "nvidia-smi; a broken device is the site's to repair: exclude the node")


def _nccl(bad: Kind) -> Finding:
    import torch
    import torch.distributed as dist

    try:
        version = ".".join(str(part) for part in torch.cuda.nccl.version())  # type: ignore[no-untyped-call]
        store = dist.HashStore()  # type: ignore[attr-defined, unused-ignore]  # not in __all__
        dist.init_process_group("nccl", store=store, rank=0, world_size=1)
        value = torch.ones(1, device="cuda:0")
        dist.all_reduce(value)
        torch.cuda.synchronize()
        dist.destroy_process_group()
        return ok("NCCL", f"{version}, sums on one GPU")
    except Exception as error:
        return bad("NCCL", first_line(error), "NCCL_DEBUG=INFO hpc-cifar doctor; reinstall torch")


def pipeline(name: str) -> list[Finding]:
    """FFCV or DALI, which are needed by jobs that name them."""
    from ..data.choice import problem as missing

    label = {"ffcv": "FFCV", "dali": "DALI"}[name]
    if words := missing(name):
        why, _, fix = words.removesuffix(")").rpartition(" (")
        return [warning(label, f"{why}: no job can name data.pipeline: {name}; {OTHER_PIPELINES}", fix)]
    module = {"ffcv": "ffcv", "dali": "nvidia"}[name]  # several packages bring parts of the latter
    brought = [one for one in importlib.metadata.packages_distributions().get(module, ()) if name in one]
    return [ok(label, importlib.metadata.version(brought[0]) if brought else "of unknown version")]


def wandb(_: int | None = None) -> list[Finding]:
    """W&B's client, its mode, server and login; the server is asked who we are."""
    from ..track import bounds, login

    bounds.bound_command()
    return [login.finding()]


def tensorboard(_: int | None = None) -> list[Finding]:
    """What jobs need that name it in ``tracking.mirrors``."""
    from ..track import tensorboard as mirror

    if mirror.problem(None):
        return [ok(mirror.TITLE, f"not installed: jobs that name it in tracking.mirrors train without; {mirror.GET}")]
    mirror.library()
    return [ok(mirror.TITLE, importlib.metadata.version("tensorboard"))]


CHECKS: dict[str, Callable[[int | None], list[Finding]]] = {
    "torch": torch_and_gpus,
    "FFCV": lambda _: pipeline("ffcv"),
    "DALI": lambda _: pipeline("dali"),
    "W&B": wandb,
    "TensorBoard": tensorboard,
}


def main(arguments: list[str]) -> int:
    which, gpus = arguments
    found = CHECKS[which](int(gpus) if gpus else None)
    sys.stdout.write("\n" + json.dumps([one.as_dict() for one in found]) + "\n")
    sys.stdout.flush()
    os._exit(0)  # a library that was only looked at need not be taken apart


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
