"""The state of a run in memory: what a checkpoint holds, and how it is put back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, first_line
from . import contents, optim
from .distributed import World
from .saver import copy_of
from .setup import AveragedStatistics
from .statistics import Statistics
from .step import Stepper


@dataclass
class Position:
    """Where a run is: ``step`` updates made, ``batch`` of them in epoch number ``epoch`` (0-based)."""

    epoch: int = 0
    batch: int = 0
    step: int = 0


@dataclass
class Session:
    """The live objects of one rank."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    ema: optim.EMA | None
    stepper: Stepper
    world: World
    local_statistics: bool
    split_digest: str
    position: Position = field(default_factory=Position)
    history: list[dict[str, Any]] = field(default_factory=list)  # rows of finished epochs
    best: float | None = None  # of checkpoint.monitor
    best_step: int | None = None
    statistics: dict[int, Statistics] = field(default_factory=dict)  # as validated after a step; of the last one only

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint holds, on rank 0; None elsewhere. Call on every rank. Its tensors are copies, on their devices."""
        own = {
            "epoch_sums": self.stepper.epoch_sums.cpu().clone(),  # on a CPU the same tensor, which the next step changes
            "buffers": [b.cpu().clone() for b in self.network.buffers()] if self.local_statistics else None,
        }
        per_rank = self.world.gather(own)
        with AveragedStatistics(self.network, self.world, self.local_statistics):
            model = copy_of(dict(self.network.state_dict())) if self.world.main else {}
        if not self.world.main:
            return None
        optimizer = copy_of(self.optimizer.state_dict())
        for group in optimizer["param_groups"]:  # set anew before every step; a tensor where the step is a CUDA graph
            group["lr"] = float(group["lr"])
        return {
            "model": model,
            "optimizer": optimizer,
            "ema": None if self.ema is None else {"shadow": copy_of(self.ema.shadow), "updates": self.ema.updates},
            "position": {"epoch": self.position.epoch, "batch": self.position.batch, "step": self.position.step},
            "statistics": copy_of(self.statistics.get(self.position.step)),
            "per_rank": per_rank,
            "world_size": self.world.size,
            "split_digest": self.split_digest,
            "history": [dict(row) for row in self.history],
            "best": self.best,
            "best_step": self.best_step,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``; the world size may differ from the one that saved it.

        Raises:
            CheckpointError: it belongs to another network, optimizer or dataset.
        """
        if problem := contents.problem(state):
            raise CheckpointError(f"the checkpoint is not what this version writes: {problem}")
        if state["split_digest"] != self.split_digest:
            raise CheckpointError(
                "the checkpoint was trained on other images (another dataset, or another validation split); "
                "prepare the dataset it was made with, or start a new run"
            )
        self._restore_weights(state)
        try:
            optim.restore(self.optimizer, state["optimizer"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            self._check(first_line(error))
        if self.ema is not None:
            self.ema.updates = state["ema"]["updates"]
        self.position = Position(**state["position"])
        self._restore_statistics(state)
        self.history = state["history"]
        self.best, self.best_step = state["best"], state["best_step"]
        if state["world_size"] == self.world.size:
            own = state["per_rank"][self.world.rank]
            self._check(contents.difference({"epoch_sums": own["epoch_sums"]}, {"epoch_sums": self.stepper.epoch_sums}))
            self.stepper.epoch_sums.copy_(own["epoch_sums"])
            if self.local_statistics and own["buffers"] is not None:
                buffers = contents.listed(self.network.buffers(), "buffer")
                self._check(contents.difference(contents.listed(own["buffers"], "buffer"), buffers))
                for buffer, saved in zip(buffers.values(), own["buffers"], strict=True):
                    buffer.copy_(saved)
        elif self.world.main:  # other ranks start their sums at zero; the total is what counts
            for own in state["per_rank"]:
                self._check(contents.difference({"epoch_sums": own["epoch_sums"]}, {"epoch_sums": self.stepper.epoch_sums}))
            sums: Tensor = torch.stack([own["epoch_sums"] for own in state["per_rank"]]).sum(0)
            self.stepper.epoch_sums.copy_(sums)

    def use_weights(self, state: dict[str, Any]) -> None:
        """Take only the weights of a checkpoint, to evaluate them; training cannot go on from here.

        Raises:
            CheckpointError: they are those of another network.
        """
        if problem := contents.problem(state):
            raise CheckpointError(f"the checkpoint is not what this version writes: {problem}")
        self._restore_weights(state)
        self._restore_statistics(state)
        self.local_statistics = False  # the checkpoint holds the mean over the ranks already

    def _restore_statistics(self, state: dict[str, Any]) -> None:
        found = state.get("statistics")  # a checkpoint of before has none
        if found is not None:
            buffers = dict(self.network.named_buffers())
            self._check(contents.difference(found, {name: buffers[name] for name in found if name in buffers}))
        self.statistics = {} if found is None else {self.position.step: found}

    def _restore_weights(self, state: dict[str, Any]) -> None:
        """Weights and their average, each of the same shape and type: torch would fit what is another's."""
        self._check(contents.difference(state["model"], self.network.state_dict()))
        self.network.load_state_dict(state["model"])
        if self.ema is None:
            return
        if state["ema"] is None:
            self._check("it has no average of the weights")
        wanted = contents.listed(self.ema.shadow, "average")
        self._check(contents.difference(contents.listed(state["ema"]["shadow"], "average"), wanted))
        for shadow, saved in zip(self.ema.shadow, state["ema"]["shadow"], strict=True):
            shadow.copy_(saved)

    @staticmethod
    def _check(problem: str) -> None:
        if problem:
            raise CheckpointError(f"the checkpoint does not fit this experiment's network or optimizer: {problem}")
