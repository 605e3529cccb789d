"""Runs of a published record script on a CPU, where none of its GPUs is: `benchmarks/published.py --on-cpu` calls it.

    python benchmarks/published_on_cpu.py published/airbench94_muon.py

Its text stays as it is; what it calls is another: tensors and networks stay on the CPU, half precision is float32 with bf16
autocast in the network (weights have more digits than in the original, not fewer), CUDA's events are clocks, and nothing is
compiled, so that no run is needed to warm up. So accuracies can be compared here; times only with ours on the same CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch
from torch import nn


class Clock:
    """In the place of ``torch.cuda.Event``."""

    def __init__(self, **_: Any) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, later: Clock) -> float:
        return 1000 * (later.seconds - self.seconds)


def stay_on_the_cpu() -> None:
    """Change what torch does for code that wants a GPU and half precision."""
    read = torch.load
    changes: list[tuple[Any, str, Any]] = [
        (torch.cuda, "Event", Clock),
        (torch.cuda, "synchronize", lambda *_: None),
        (torch, "load", lambda path, **_: read(path, map_location="cpu")),
    ]
    for kind in (torch.Tensor, nn.Module):
        changes += [(kind, "half", kind.float), (kind, "cuda", lambda self, *_: self)]
    for owner, name, other in changes:
        setattr(owner, name, other)


def module_of(script: Path) -> ModuleType:
    """What the script defines; it reads its own text from ``sys.argv``."""
    sys.argv = [str(script)]
    spec = importlib.util.spec_from_file_location("published_script", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path)
    script = parser.parse_args().script
    stay_on_the_cpu()
    record = module_of(script)
    forward = record.CifarNet.forward

    def in_bf16(network: nn.Module, *arguments: Any, **options: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits: torch.Tensor = forward(network, *arguments, **options)
        return logits.float()

    record.CifarNet.forward = in_bf16
    network = record.CifarNet().to(memory_format=torch.channels_last)
    record.print_columns(record.logging_columns_list, is_head=True)
    for run in itertools.count():  # ended by who reads the table
        torch.manual_seed(run)
        record.main(run, network)


if __name__ == "__main__":
    main()
