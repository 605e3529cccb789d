"""The device's part of a step as one CUDA graph: recorded once for each shape of a batch, and replayed.

A replay launches every kernel of a step with one call, so that the host no longer sets the pace of a small network. What
changes from step to step (images, rate, share of the average, place in the metrics) lies in device memory that stays where it
is. Source: the CUDA graphs chapter of torch's notes on CUDA semantics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Update = Callable[[Tensor, Tensor, int], None]
WARM_UP = 3  # eager steps of a shape before it is recorded: torch allocates and chooses kernels in them


@dataclass
class Recorded:
    """One graph, if it is one, and the memory that it reads."""

    images: Tensor
    labels: Tensor
    replay: Callable[[], None]
    graph: Any = None


class Graphs:
    """Calls ``update(images, labels, global_size)`` or replays what it did.

    Whatever ``update`` keeps must lie in memory that it made before, and it must neither wait for the device nor decide by what
    lies there. On a CPU this is its eager twin: the same copies and the same calls, with no graph between.

    Args:
        update: one step; it is also what the first steps of every shape are made with.
    """

    def __init__(self, update: Update, device: torch.device) -> None:
        self._update, self._device = update, device
        self._recorded: dict[tuple[torch.Size, int], Recorded] = {}
        self._made: Counter[tuple[torch.Size, int]] = Counter()
        self._stream: Any = None
        self._pool: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, images: Tensor, labels: Tensor, global_size: int) -> None:
        shape = (images.shape, global_size)
        known = self._recorded.get(shape)
        if known is None and self._made[shape] < WARM_UP:
            self._made[shape] += 1
            self._eager(images, labels, global_size)
            return
        if known is None:
            known = self._recorded[shape] = self._record(images, labels, global_size)
        known.images.copy_(images)
        known.labels.copy_(labels)
        known.replay()

    @property
    def recorded(self) -> int:
        """Graphs there are."""
        return len(self._recorded)

    def close(self) -> None:
        """Forget what was recorded: NCCL does not let go of a process group while a graph holds a collective of it."""
        for known in self._recorded.values():
            if known.graph is not None:
                known.graph.reset()
        self._recorded.clear()

    def _eager(self, images: Tensor, labels: Tensor, global_size: int) -> None:
        """On the stream of the recording: autograd remembers the stream on which a parameter was first used."""
        if self._stream is None:
            self._update(images, labels, global_size)
            return
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._update(images, labels, global_size)
        current.wait_stream(self._stream)

    def _record(self, images: Tensor, labels: Tensor, global_size: int) -> Recorded:
        images, labels = torch.empty_like(images), torch.empty_like(labels)
        if self._stream is None:
            return Recorded(images, labels, lambda: self._update(images, labels, global_size))
        graph = torch.cuda.CUDAGraph()
        # other threads (NCCL's, the pipelines') go on using the device meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            self._update(images, labels, global_size)
        return Recorded(images, labels, graph.replay, graph)
