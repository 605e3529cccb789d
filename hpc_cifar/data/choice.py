"""Which pipeline runs: the one that the job file names, or the fastest that this device, memory and installation allow."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Mapping

import torch

from ..errors import UsageError, first_line
from .store import Arrays

NAMES = ("resident", "ffcv", "dali", "reference")
SPARE = 0.5  # of the free memory of a GPU, left to the network

_MODULES = {"ffcv": "ffcv", "dali": "nvidia.dali"}
_GET = {
    "ffcv": "pip install the wheel that `make ffcv-wheel` builds, which needs neither root nor OpenCV; or 'hpc-cifar[ffcv]' "
    "where g++, pkg-config, libopencv-dev and libturbojpeg0-dev are; or have it from conda, a module or the container: "
    "docs/install.md",
    "dali": "pip install 'hpc-cifar[dali]', or have it from the container: docs/install.md",
}
_DISTRIBUTIONS = {"cv2": "opencv-python-headless", "nvidia": "nvidia-dali-cuda130", "nvidia.dali": "nvidia-dali-cuda130"}
_NO_LIBRARY = re.compile(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object file")


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
        except Exception as error:  # it, what it imports or a library is missing; or it does not fit the installation
            return _missing(name, module, error)
        finally:
            torch.set_num_threads(threads)  # ffcv sets it to 1
    if name == "ffcv" and arrays is not None and arrays.beton is None:
        return "there is no train.beton beside the dataset; run hpc-cifar prepare --beton for it"
    return ""


def _missing(name: str, module: str, error: Exception) -> str:
    """What is not there, and how to get it."""
    if isinstance(error, ModuleNotFoundError):
        lacking = error.name or module
        package = _DISTRIBUTIONS.get(lacking, lacking)
        if module == lacking or module.startswith(f"{lacking}."):
            return f"{package} is not installed ({_GET[name]})"
        return f"{package}, which {name} needs, is not installed (pip install {package})"
    found = _NO_LIBRARY.search(str(error))
    if found and found[1].startswith("libGL.so"):  # of the package that ffcv asks for, beside ours or instead of it
        remedy = "pip uninstall opencv-python, then pip install --force-reinstall opencv-python-headless"
        return f"{found[1]}, which opencv-python needs, is not on this machine ({remedy})"
    if found:
        return f"{found[1]}, a library that {name} needs, is not on this machine ({_GET[name]})"
    return f"{module} cannot be imported: {first_line(error)} ({_GET[name]})"


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
