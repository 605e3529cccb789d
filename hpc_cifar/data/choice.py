"""Which pipeline runs: the one that the job file names, or the fastest that this device, memory and installation allow."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping

import torch

from ..errors import UsageError, first_line
from .store import Arrays

NAMES = ("resident", "ffcv", "dali", "reference")
SPARE = 0.5  # of the free memory of a GPU, left to the network

_GET = {
    "ffcv": "pip install 'hpc-cifar[ffcv]' builds it where libopencv-dev, libturbojpeg0-dev, pkg-config and g++ are; else use "
    "conda, a module or a container",
    "dali": "pip install 'hpc-cifar[dali]'",
}
_MODULES = {"ffcv": "ffcv", "dali": "nvidia.dali"}


@dataclasses.dataclass(frozen=True)
class Choice:
    name: str
    why: str


def problem(name: str, arrays: Arrays | None = None) -> str:
    """Why a pipeline cannot run here, "" if it can.

    Args:
        arrays: also ask whether the pipeline has what it reads of these.
    """
    module = _MODULES.get(name)
    if module:
        threads = torch.get_num_threads()
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            missing = error.name or module
            return f"{missing} is not installed ({_GET[name]})"
        except Exception as error:  # a library of it is missing, or it does not fit the rest of the installation
            return f"{module} cannot be imported: {first_line(error)} ({_GET[name]})"
        finally:
            torch.set_num_threads(threads)  # ffcv sets it to 1
    if name == "ffcv" and arrays is not None and arrays.beton is None:
        return "there is no train.beton beside the dataset; run hpc-cifar prepare --beton for it"
    return ""


def choose(wanted: str, device: torch.device, arrays: Arrays, failed: Mapping[str, str] | None = None) -> Choice:
    """The pipeline for ``arrays`` on ``device``.

    Args:
        failed: pipelines that could not begin, and why: ``auto`` takes another one.

    Raises:
        UsageError: the one that is wanted cannot run here.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"no GPU can be used here, though {device} is asked for: is there a driver? (nvidia-smi shows it)")
    if wanted != "auto":
        if why := problem(wanted, arrays):
            raise UsageError(f"data.pipeline: {wanted}: {why}; or use pipeline: auto")
        return Choice(wanted, "the job file asks for it")
    if device.type != "cuda":
        return Choice("resident", "on a CPU its fused pass over the memory-mapped images is the fastest")
    failed = failed or {}
    needed, free = arrays.images.nbytes, torch.cuda.mem_get_info(device)[0]
    reasons = [f"the images take {needed / 2**20:,.0f} MiB of {free / 2**20:,.0f} MiB free on the GPU"]
    if needed <= (1 - SPARE) * free:
        if "resident" not in failed:
            return Choice("resident", reasons[0])
        reasons.append(f"resident: {failed['resident']}")
    for name in ("ffcv", "dali"):
        if not (why := failed.get(name) or problem(name, arrays)):
            return Choice(name, "; ".join(reasons))
        reasons.append(f"{name}: {why}")
    return Choice("reference", "; ".join(reasons))
