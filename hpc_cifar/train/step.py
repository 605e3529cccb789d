"""One optimizer step: micro-batches, loss, gradient sum, clipping, update, average."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.experiment import Experiment
from ..config.training import Selection
from ..data.draws import key_of
from ..data.pipeline import Batch
from ..models.batch_norm import at_least_float32
from ..models.build import Rule
from ..plan import Plan, shard
from .distributed import GradientSync, World
from .graph import Graphs
from .norms import NAMES, Norms
from .optim import EMA, LR_EPOCHS, LR_FACTOR, add_l2, halves, keep_norms
from .schedule import History, factor

DROPOUT = 101  # stream of draws, apart from those in data/draws.py


def autocast(precision: torch.dtype, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast, or nothing for the full types."""
    if precision != torch.bfloat16:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=precision)


@functools.cache
def kept_images(selection: Selection, global_size: int, world_size: int) -> int:
    """What is left of a batch when every rank has chosen among its part."""
    shares = (shard(global_size, world_size, rank) for rank in range(world_size))
    return sum(selection.kept(end - begin) for begin, end in shares)


def seed_of_step(seed: int, step: int, rank: int) -> int:
    """Seed of the dropout draws of one step on one rank.

    Random state is thus a function of the position and need not be stored: any step can be resumed, by any process.
    """
    return key_of(key_of(seed, rank, DROPOUT), step, DROPOUT) >> 1  # torch takes 63 bits


def seed_device(seed: int, device: torch.device) -> None:
    """``torch.manual_seed`` for one device: that one also notes down where it was called, once for each kind of accelerator,
    which took a quarter of a small network's step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


class Stepper:
    """Makes optimizer steps and keeps their metrics on the device.

    What the host decides of a step (its rate, its seed, the share of the average) is set before :meth:`_update`, which is the
    device's part and may be replayed as a CUDA graph.

    Args:
        plan: gives the schedule its length, and every rank the same number of forward passes a step.
        rules: what holds for single parameters: L2 is added to their gradients, norms are kept after every update.
        graph: replay the device's part; the rate is a tensor then.
    """

    def __init__(
        self,
        experiment: Experiment,
        sync: GradientSync,
        optimizer: torch.optim.Optimizer,
        ema: EMA | None,
        world: World,
        precision: torch.dtype,
        plan: Plan,
        rules: Sequence[Rule] = (),
        graph: bool = False,
    ) -> None:
        self.rules = rules
        self._experiment = experiment
        self._sync = sync
        self._optimizer = optimizer
        self._fast, self._slow = halves(optimizer, graph)
        self._ema = ema
        self._world = world
        self._precision = precision
        self._plan = plan
        self._chooses = False  # in this step
        self.rate = 0.0  # learning rate of the last step
        self.rest: Callable[[], None] | None = None  # called after every step of a rehearsal
        self._parameters = [p for p in sync.module.parameters() if p.requires_grad]
        clips = experiment.training.clip_grad_norm is not None
        self._norms = Norms(self._parameters, clips) if experiment.tracking.norms else None
        window = experiment.training.log_every_steps
        # per step of the window: this rank's part of the batch loss; then correct and seen images of the window
        self._window = torch.zeros(window + 2, dtype=torch.float64, device=world.device)
        self._slot = torch.zeros(1, dtype=torch.int64, device=world.device)  # of the next step in the window
        self._seen = 0
        self._images = 0  # of all ranks, in the batches of these steps
        self._rate_on_device = graph
        self._graphs = Graphs(self._update, world.device) if graph else None
        self.start_clock()
        # this rank's sums over the epoch: loss, correct, images
        self.epoch_sums = torch.zeros(3, dtype=torch.float64, device=world.device)

    def __call__(self, batch: Batch, step: int, history: History = ()) -> float:
        """Make update number ``step`` (0-based), after the epochs in ``history``; returns the learning rate used."""
        experiment = self._experiment
        seed_device(seed_of_step(experiment.seed, step, self._world.rank), self._world.device)
        plan = self._plan
        self.rate = experiment.lr * factor(
            experiment.schedule, step, plan.steps_per_epoch, plan.total_steps, lr=experiment.optimizer.lr, history=history
        )
        self._set_rate(step)
        if self._ema is not None:
            self._ema.prepare()
        trained = self.trained_images(batch.global_size, step)
        self._chooses = trained < batch.global_size
        run = self._graphs or self._update
        run(batch.images, batch.labels, trained)
        if self._slow is not None:
            self._slow()
            self._settle()
        self._seen += 1
        self._images += batch.global_size
        if self.rest is not None:
            self.rest()
        return self.rate

    def trained_images(self, global_size: int, step: int) -> int:
        """How many of a batch's images all ranks train on in this step."""
        selection, plan = self._experiment.training.selection, self._plan
        if selection is None or not selection.active(step / plan.steps_per_epoch):
            return global_size
        return kept_images(selection, global_size, plan.placement.world_size)

    def _set_rate(self, step: int) -> None:
        for group in self._optimizer.param_groups:
            rate = self.rate
            if (epochs := group.get(LR_EPOCHS)) is not None:
                rate = self._experiment.lr * max(0.0, 1 - step / (epochs * self._plan.steps_per_epoch))
            rate *= group.get(LR_FACTOR, 1.0)  # a checkpoint of before has none
            if not self._rate_on_device:
                group["lr"] = rate
            elif isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = torch.tensor(rate, dtype=torch.float32, device=self._world.device)

    def _update(self, images: Tensor, labels: Tensor, global_size: int) -> None:
        """Gradients, their sum over the ranks, the update of the weights and of their average; nothing waits for the device."""
        experiment, parts = self._experiment, self._plan.accumulation
        self._sync.zero()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._world.device)
        correct = torch.zeros((), device=self._world.device)
        if self._chooses and len(labels):
            images, labels = self._hardest(images, labels)
        for index in range(parts):
            start, stop = shard(len(labels), parts, index)
            with self._sync.micro_batch(last=index == parts - 1):
                part = self._micro_batch(images[start:stop], labels[start:stop], global_size)
            loss_sum += part[0]
            correct += part[1]
        self._sync.finish()
        add_l2(self.rules)
        if experiment.training.clip_grad_norm is not None:
            norm = nn.utils.clip_grad_norm_(self._parameters, experiment.training.clip_grad_norm)
            if self._norms is not None:
                self._norms.clipped(norm)
        self._fast()
        if self._slow is None:
            self._settle()
        self._account(loss_sum, correct, len(labels), global_size)

    def _settle(self) -> None:
        keep_norms(self.rules)
        if self._ema is not None:
            self._ema.apply()

    @torch.no_grad()
    def _hardest(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The images with the largest losses, in their order, and their labels."""
        selection = self._experiment.training.selection
        assert selection is not None
        self._sync.module.eval()  # neither dropout nor the running statistics take part
        parts = [shard(len(labels), self._plan.accumulation, index) for index in range(self._plan.accumulation)]
        losses = [self._forward(images[start:stop], labels[start:stop], "none")[1] for start, stop in parts]
        self._sync.module.train()
        chosen = torch.cat(losses).topk(selection.kept(len(labels))).indices.sort().values
        wide = images.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if wide else torch.contiguous_format
        return images[chosen].contiguous(memory_format=layout), labels[chosen]

    def _forward(self, images: Tensor, labels: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
        """Logits and losses."""
        with autocast(self._precision, self._world.device):
            logits: Tensor = self._sync.module(images)
        smoothing = self._experiment.loss.label_smoothing
        return logits, F.cross_entropy(at_least_float32(logits), labels, reduction=reduction, label_smoothing=smoothing)

    def _micro_batch(self, images: Tensor, labels: Tensor, global_size: int) -> tuple[Tensor, Tensor]:
        """Forward and backward of one micro-batch; (sum of losses, number of correct predictions), detached."""
        logits, loss = self._forward(images, labels, "sum")
        (loss / global_size).backward()  # type: ignore[no-untyped-call]
        return loss.detach(), (logits.detach().argmax(1) == labels).sum()

    def _account(self, loss_sum: Tensor, correct: Tensor, count: int, global_size: int) -> None:
        self._window.index_copy_(0, self._slot, (loss_sum / global_size)[None])
        self._slot += 1
        self._window[-2] += correct
        self._window[-1] += count
        self.epoch_sums[0] += loss_sum
        self.epoch_sums[1] += correct
        self.epoch_sums[2] += count

    def close(self) -> None:
        """Let go of what was recorded."""
        if self._graphs is not None:
            self._graphs.close()

    def start_clock(self) -> None:
        """The window's steps begin now: call after anything else has used the device."""
        self._begin = Mark(self._world.device)

    @property
    def seen(self) -> int:
        """Steps in the window so far."""
        return self._seen

    @property
    def window_full(self) -> bool:
        return self._seen == len(self._window) - 2

    def take_window(self) -> PendingWindow:
        """Sum the window over the ranks and start its way to the host; call on every rank at the same step."""
        totals = self._world.sum(self._window.clone())
        if self._norms is not None:  # the same on every rank
            totals = torch.cat([totals, self._norms.now()])
        pending = PendingWindow(totals, self._seen, self._begin, self._images, NAMES if self._norms is not None else ())
        self._begin = pending.end
        self._window.zero_()
        self._slot.zero_()
        self._seen = self._images = 0
        return pending


class Mark:
    """A point in the device's work, to measure the time between two of them."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._time = time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        """Both must have been passed: see :meth:`wait`."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        return float(earlier._event.elapsed_time(self._event)) / 1000


class PendingWindow:
    """Metrics of the last few steps on their way from the device to the host, without stalling either.

    Args:
        images: size of their batches over all ranks; the last batch of an epoch is smaller than the others.
        more: names of what follows the window in ``totals``.
    """

    def __init__(self, totals: Tensor, steps: int, begin: Mark, images: int, more: Sequence[str] = ()) -> None:
        self.steps, self.images = steps, images
        self._begin, self._more = begin, more
        self._window = len(totals) - len(more)
        if totals.is_cuda:
            self._host = torch.empty(totals.shape, dtype=totals.dtype, pin_memory=True)
            self._host.copy_(totals, non_blocking=True)
        else:
            self._host = totals
        self.end = Mark(totals.device)

    def result(self) -> tuple[list[float], float, float]:
        """Global batch losses of the steps, training accuracy over them and their seconds; waits if they are not there yet."""
        self.end.wait()
        values = self._host[: self._window].tolist()
        return values[: self.steps], values[-2] / max(values[-1], 1.0), self.end.seconds_since(self._begin)

    def more(self) -> dict[str, float]:
        """What follows the window, by its names; waits as well."""
        self.end.wait()
        return dict(zip(self._more, self._host[self._window :].tolist(), strict=True))
