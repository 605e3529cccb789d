"""Checkpoints written beside the training: a step waits for a copy of the state, not for the disk."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config.training import Checkpoint
from ..errors import first_line
from . import checkpoint


class Saver:
    """Writes one checkpoint at a time, in a thread of its own; rank 0 only.

    Args:
        folder: see :mod:`hpc_cifar.train.checkpoint`.
        device: where the state is.
        on_disk: called with the step of each checkpoint that has been written, in the thread that writes.
    """

    def __init__(
        self, folder: Path, config: Checkpoint, device: torch.device, on_disk: Callable[[int], None] = lambda step: None
    ) -> None:
        self._folder, self._device, self._on_disk = folder, device, on_disk
        self._kept = {"keep_last": config.keep_last, "keep_every_epochs": config.keep_every_epochs}
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None

    def save(self, state: dict[str, Any], **about: Any) -> None:
        """Write ``state``, whose tensors nobody changes any more; ``about``: see :func:`checkpoint.save`.

        Raises:
            CheckpointError: the checkpoint before this one could not be written.
        """
        self.wait()
        copied = torch.cuda.Event() if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
        if copied is not None:
            copied.record()
        work = partial(self._write, [state], copied, {**about, **self._kept})
        self._thread = threading.Thread(target=work, name="checkpoint")  # no daemon: the interpreter waits for it, too
        self._thread.start()

    def check(self) -> None:
        """Raise what :meth:`wait` would, if that is known already; costs nothing."""
        if self._problem is not None:
            self.wait()

    def wait(self) -> None:
        """Until the last one is on disk.

        Raises:
            CheckpointError: it is not.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def settle(self) -> str:
        """The same where something has gone wrong already: why the last one could not be written, or nothing."""
        try:
            self.wait()
        except Exception as error:
            return first_line(error)
        return ""

    def _write(self, given: list[dict[str, Any]], copied: torch.cuda.Event | None, about: dict[str, Any]) -> None:
        try:
            state = given.pop()  # nothing else holds the copies on the device, which are freed as soon as they are on the host
            if copied is not None:  # to the host, past the kernels of the training
                stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
                stream.wait_event(copied)
                with torch.cuda.stream(stream):
                    state = mapped(state, lambda tensor: tensor.to("cpu"))
            checkpoint.save(self._folder, state, **about)
            self._on_disk(about["step"])
        except BaseException as error:
            self._problem = error


def copy_of(value: Any) -> Any:
    """The same tensors in memory of their own, on the device they are on."""
    return mapped(value, lambda tensor: tensor.detach().clone())


def mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``value`` with every tensor in it changed; containers are new."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [mapped(inner, change) for inner in value]
    if isinstance(value, tuple):
        return tuple(mapped(inner, change) for inner in value)
    return value
