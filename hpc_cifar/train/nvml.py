"""What GPUs do, by NVML: a C library of the driver, so that nothing has to be installed for it.

Without the library, on an older driver or a part of a GPU (MIG), what cannot be had is left out. Source: NVIDIA's NVML API
reference.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

LIBRARY = "libnvidia-ml.so.1"


class _Rates(ctypes.Structure):  # nvmlUtilization_t, in percent of the last second or less
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class _Memory(ctypes.Structure):  # nvmlMemory_t, in bytes
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Gpus:
    """Those of this machine with these UUIDs, as far as the driver shows them to this process.

    Args:
        uuids: as torch has them, without ``GPU-``.
    """

    def __init__(self, uuids: Sequence[str], library: str = LIBRARY) -> None:
        self._of: dict[int, ctypes.c_void_p] = {}  # handles by place in ``uuids``
        try:
            self._nvml = ctypes.CDLL(library) if uuids else None
            if self._nvml is None or self._nvml.nvmlInit_v2() != 0:
                return
            for place, uuid in enumerate(uuids):
                handle = ctypes.c_void_p()
                if self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.byref(handle)) == 0:
                    self._of[place] = handle
        except (OSError, AttributeError):  # there is no such library, or it is another one
            self._of.clear()

    def sample(self) -> dict[str, float]:
        """Of each GPU ``gpu<place>_percent`` of time in which it computed, ``_memory_mib``, ``_power_watts``,
        ``_temperature_c``.
        """
        return {f"gpu{place}_{name}": value for place, handle in self._of.items() for name, value in self._figures(handle)}

    def _figures(self, handle: ctypes.c_void_p) -> Iterator[tuple[str, float]]:
        rates, memory, milliwatts, degrees = _Rates(), _Memory(), ctypes.c_uint(), ctypes.c_uint()
        if self._asked("nvmlDeviceGetUtilizationRates", handle, rates):
            yield "percent", float(rates.gpu)
        if self._asked("nvmlDeviceGetMemoryInfo", handle, memory):
            yield "memory_mib", memory.used / 2**20
        if self._asked("nvmlDeviceGetPowerUsage", handle, milliwatts):
            yield "power_watts", milliwatts.value / 1000
        if self._asked("nvmlDeviceGetTemperature", handle, ctypes.c_int(0), degrees):  # 0: of the GPU itself
            yield "temperature_c", float(degrees.value)

    def _asked(self, name: str, *arguments: Any) -> bool:
        """Whether the library has answered; it writes to the last argument."""
        *given, answer = arguments
        with contextlib.suppress(AttributeError):
            return int(getattr(self._nvml, name)(*given, ctypes.byref(answer))) == 0
        return False
