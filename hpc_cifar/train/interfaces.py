"""The network interfaces that gloo and NCCL are told to use: whether this machine has them; else C++ says so, in its words."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence


def problems(*, gpu: bool, environment: Mapping[str, str] = os.environ, here: Sequence[str] | None = None) -> list[str]:
    """What is wrong with these variables, a line for each; every job needs gloo, one on GPUs NCCL as well.

    Args:
        here: names of the interfaces of this machine, if they are known.
    """
    here = _here() if here is None else here
    listed = f"this machine has {', '.join(here) or 'none'}"
    found = []
    gloo = environment.get("GLOO_SOCKET_IFNAME", "")
    if missing := [name for name in gloo.split(",") if gloo and name not in here]:
        found.append(f"GLOO_SOCKET_IFNAME={gloo}: no interface {', '.join(missing) or '(an empty name)'} here; {listed}")
    nccl = environment.get("NCCL_SOCKET_IFNAME", "")
    if gpu and nccl and not _of_nccl(nccl, here):
        found.append(f"NCCL_SOCKET_IFNAME={nccl}: no interface here is meant by it; {listed}")
    return found


def _of_nccl(text: str, here: Sequence[str]) -> list[str]:
    """The interfaces that NCCL would use: names begin with one of a list; ``=`` means whole names, ``^`` all others.

    Source: NCCL's documentation of NCCL_SOCKET_IFNAME.
    """
    others = text.startswith("^")
    exact = text.removeprefix("^").startswith("=")
    names = [name for name in text.removeprefix("^").removeprefix("=").split(",") if name]
    meant = [name for name in here if any(name == one if exact else name.startswith(one) for one in names)]
    return [name for name in here if name not in meant] if others else meant


def _here() -> list[str]:
    try:
        return [name for _, name in socket.if_nameindex()]
    except OSError:
        return []
