"""Training itself: read ``Trainer.train`` top to bottom."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import lifetime, stages
from ..config.experiment import Experiment
from ..data import pipeline as data
from ..errors import HpcCifarError, NonFiniteLoss, RunError
from ..models import build
from ..plan import Plan
from ..runs import Run, now
from ..track.rows import is_better, least_improvement
from . import begun, checkpoint, features, optim, saved
from .distributed import World, gradient_sync
from .graph import WARM_UP
from .records import Records, peak_memory
from .recovery import left_out
from .saver import Saver
from .schedule import stopped_early
from .session import Session
from .setup import (
    Prepared,
    actual_plan,
    choose_channels_last,
    choose_precision,
    compiled,
    make_network,
    name_of,
    prepare_data,
    split_digest,
)
from .step import PendingWindow, Stepper, autocast
from .stop import StopAgreement, StopAsked, StopFlag, word_for
from .validation import Validation
from .watchdog import Watchdog


class Trainer:
    """Rank-local objects of one segment, and the loop over epochs."""

    watchdog: Watchdog
    begun = False  # a step was made

    def __init__(self, run: Run, world: World, flag: StopFlag, max_steps: int | None, data_root: Path, console: bool) -> None:
        self.run, self.world = run, world
        self.experiment: Experiment = run.experiment()
        self.prepared: Prepared = prepare_data(self.experiment, data_root, world)
        stages.done("data")
        self.plan: Plan = actual_plan(self.experiment, self.prepared, world)
        self.last_step = min(self.plan.total_steps, max_steps or self.plan.total_steps)
        begun = run.state().precision
        self.precision = world.share(choose_precision(self.experiment, world.device, begun))  # nodes may differ
        self.channels_last = choose_channels_last(self.experiment)
        self.flag, self.agreement = flag, StopAgreement(flag, world)
        self.session = self._make_session(data_root)
        stages.done("network")
        self.validation = Validation(self.experiment, self.prepared, self.session, self.precision, self.channels_last)
        self.shapes: Counter[tuple[torch.Size, int]] = Counter()  # steps made with each, where a shape has to be prepared
        self.saver = Saver(run.checkpoints, self.experiment.checkpoint, world.device, partial(saved.note, run))
        self.saved_step = -1
        self.left_out = world.share(left_out(run))  # steps that are not made
        self.saving: list[float] = []  # seconds of each checkpoint, in which no step was made
        self.pending: list[tuple[PendingWindow, int, int, float]] = []  # with its epoch, step and learning rate
        notes = [*self.plan.notes, *self._resume()]
        stages.done("resume")
        self.records = Records(
            run, world, self.experiment, self.plan, self.session, self.prepared.store.label, self.last_step, console
        )
        self.records.announce(sum(p.numel() for p in self.session.network.parameters()), name_of(self.precision), notes)

    def _make_session(self, data_root: Path) -> Session:
        experiment, world, plan = self.experiment, self.world, self.plan
        fresh = world.share(not checkpoint.stored(self.run.checkpoints))
        network = make_network(experiment, self.prepared, world, self.channels_last, data_root if fresh else None)
        rules = build.rules(experiment.model, network, experiment.optimizer.norm_bias_lr_factor)
        graph = experiment.training.graph is True  # `auto` is off: no GPU has shown yet what it is worth
        optimizer = optim.build(experiment.optimizer, network.parameters(), rules, capturable=graph and world.on_gpu)
        decay = experiment.training.ema_decay
        ema = None if decay is None else optim.EMA(network.parameters(), decay, on_device=graph)
        mode = "flat" if graph else experiment.training.gradient_sync
        compress = experiment.training.gradient_compression == "bf16"
        static = plan.accumulation == 1 and experiment.training.compile is not True
        sync = gradient_sync(mode, network, world, compress, static)
        if experiment.training.compile is True:
            sync.module = compiled(sync.module)
        stepper = Stepper(experiment, sync, optimizer, ema, world, self.precision, plan, rules, graph)
        return Session(
            network,
            optimizer,
            ema,
            stepper,
            world,
            local_statistics=experiment.training.batch_norm == "local" and world.size > 1,
            split_digest=split_digest(self.prepared),
        )

    def _resume(self) -> list[str]:
        """Continue from the newest good checkpoint, if there is one; rank 0 decides which. Returns what to tell people."""
        folder = self.run.checkpoints
        choice: tuple[str | None, list[str], bool] | HpcCifarError = (None, [], True)
        state: dict[str, Any] = {}  # on rank 0, which has read it
        if self.world.main:
            try:
                good, state, notes = checkpoint.newest_read(folder)
                if good is not None:
                    notes = [f"skipped a damaged checkpoint: {line}" for line in notes] or saved.older(self.run, good.step)
                    notes += begun.check(self.run, good.manifest, self.experiment)
                    choice = (good.folder.name, notes, checkpoint.settle(folder, good))
                    saved.note(self.run, good.step)
            except HpcCifarError as error:
                choice = error
        choice = self.world.share(choice)
        if isinstance(choice, HpcCifarError):
            raise choice
        name, notes, has_best = choice
        if name is None:
            return []
        if (good := checkpoint.named(folder, name)) is None:
            raise RunError(f"rank {self.world.rank} cannot read {folder / name}, which rank 0 can: is it on a shared disk?")
        self.session.restore(state or checkpoint.read(good))
        if not has_best:  # the next validation gives a new one
            notes.append(f"the best checkpoint so far, of step {good.best_step}, is gone; the best of what follows counts")
            self.session.best = self.session.best_step = None
        self.saved_step = good.step
        where = f"epoch {self.session.position.epoch + 1}, batch {self.session.position.batch}"
        return [*notes, f"resuming at step {good.step} of {self.plan.total_steps} ({where})"]

    # ---- the whole run -------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        with contextlib.ExitStack() as opened:
            opened.callback(self.session.stepper.close)
            opened.callback(self.validation.close)
            opened.push(self.records.left)
            opened.push(self.watchdog.left)
            opened.callback(self._settle)
            lifetime.collect_again()
            try:
                reason = self._epochs(opened.enter_context(contextlib.closing(self._pipeline())))
            except StopAsked as asked:  # before the first step
                reason = asked.reason
            late = self.agreement.settle()  # on every rank: an exchange is always in flight after a boundary
            return self._end(reason or late)

    def _epochs(self, pipeline: data.Pipeline | features.Features) -> str:
        """Train to the end of the run; the reason if the ranks agreed to stop before."""
        stages.done("pipeline")
        self.session.network.train()
        reason = ""
        while not self._is_through() and self.session.position.step < self.last_step and not reason:
            reason = self._epoch(pipeline)
        return reason

    def _pipeline(self) -> data.Pipeline | features.Features:
        experiment, prepared, arguments = self.experiment, self.prepared, self.validation.arguments
        inference = partial(autocast, self.precision, self.world.device)
        cached, why = features.begin(
            experiment, self.session.network, prepared, self.world, inference, arguments, self.watchdog,
            self.agreement.at_boundary,
        )  # fmt: skip
        if cached is not None:
            self.validation.cached = cached
            self.records.pipeline(cached.name, why)
            return cached
        images = data.build(experiment.data, prepared.store.train, prepared.train_indices, seed=experiment.seed, **arguments)
        self.records.pipeline(images.name, "; ".join(filter(None, (images.choice.why, why))))
        return images

    def _is_through(self) -> bool:
        """Whether no epoch is left to train. Early stopping follows from the history: a resumed run stops where it should."""
        stopped = stopped_early(self.experiment.training.early_stopping, self.session.history)
        return stopped or self.session.position.epoch >= self.experiment.epochs

    def _epoch(self, pipeline: data.Pipeline | features.Features) -> str:
        """Train the rest of the current epoch; the reason if the ranks agreed to stop in it."""
        session, position, every = self.session, self.session.position, self.experiment.checkpoint.every_steps
        self.epoch_clock = time.perf_counter()
        session.stepper.start_clock()
        self.epoch_images = 0
        for batch in pipeline.batches(position.epoch, position.batch):
            rate = session.stepper.rate
            if position.step + 1 not in self.left_out:
                with self._patience(batch):
                    rate = session.stepper(batch, position.step, session.history)
                self.epoch_images += batch.global_size
            if not self.begun:
                self._first_step_is_made()
                self.records.first_batch(batch.images)
            position.batch += 1
            position.step += 1
            self.watchdog.step(position.step)
            self.saver.check()
            if position.batch % self.experiment.training.log_every_steps == 0:  # the same steps after a resume
                self._take_window(rate)
            if position.batch == self.plan.steps_per_epoch:
                self._finish_epoch(rate)
            elif every is not None and position.step % every == 0:
                self._save()
            if reason := self.agreement.at_boundary():
                return reason
            if position.step >= self.last_step:
                break
        return ""

    def _patience(self, batch: data.Batch) -> contextlib.AbstractContextManager[None]:
        """A shape that is new is compiled or recorded first, which takes long and is no hang."""
        training, step = self.experiment.training, self.session.position.step
        shape = (batch.images.shape, self.session.stepper.trained_images(batch.global_size, step))
        if True not in (training.compile, training.graph) or self.shapes[shape] > WARM_UP:
            return contextlib.nullcontext()
        self.shapes[shape] += 1
        return self.watchdog.phase("compile")

    def _first_step_is_made(self) -> None:
        self.begun = True
        if self.world.on_gpu:
            torch.cuda.synchronize(self.world.device)
        stages.done("first step")
        self.records.startup(stages.taken())

    def _finish_epoch(self, rate: float) -> None:
        """Metrics, validation and checkpoint at the end of an epoch."""
        session, position = self.session, self.session.position
        self._take_window(rate)
        self._report_windows()
        seconds = time.perf_counter() - self.epoch_clock
        loss, correct, count = self.world.sum(session.stepper.epoch_sums.clone()).tolist()
        number = position.epoch + 1
        row: dict[str, Any] = {
            "epoch": number,
            "step": position.step,
            "train_loss": loss / max(count, 1),
            "train_accuracy": correct / max(count, 1),
            "lr": rate,
            "images_per_second": round(self.epoch_images / seconds, 1),
        }
        last = number == self.experiment.epochs
        better = False
        if number % self.experiment.training.evaluate_every_epochs == 0 or last:
            row["val_loss"], row["val_accuracy"] = self._validate()
            if (penalty := self.validation.penalty()) is not None:
                row["val_loss_with_l2"] = row["val_loss"] + penalty
            better = self._is_better(row)
        position.epoch, position.batch = number, 0
        session.stepper.epoch_sums.zero_()
        session.history.append(row)
        self.records.epoch(row)
        if number % self.experiment.checkpoint.every_epochs == 0 or last or better:
            self._save(best=better)

    # ---- metrics of the last steps -----------------------------------------------------------------------------------

    def _take_window(self, rate: float) -> None:
        """Send the last steps' metrics on their way to the host, and report the ones that have arrived."""
        self._report_windows()
        position = self.session.position
        self.pending.append((self.session.stepper.take_window(), position.epoch + 1, position.step, rate))
        if self.world.device.type == "cpu":  # nothing is in flight there
            self._report_windows()

    def _report_windows(self) -> None:
        """Raises NonFiniteLoss, on every rank alike, since the losses are sums over the ranks."""
        for window, epoch, step, rate in self.pending:
            losses, accuracy, seconds = window.result()
            for index, loss in enumerate(losses):
                if not math.isfinite(loss):
                    raise self._non_finite(step - window.steps + index + 1, loss)
            if losses:
                self.records.window(epoch, step, losses, accuracy, rate, seconds, window.images, window.more())
        self.pending.clear()

    def _non_finite(self, step: int, loss: float) -> NonFiniteLoss:
        problem = self._settle()
        good = checkpoint.named(self.run.checkpoints, "latest")
        kept = f"the last good checkpoint is {good.folder.resolve()}" if good else "no checkpoint was written yet"
        kept += f" (the one after it: {problem})" if problem else ""
        error = NonFiniteLoss(
            f"the training loss became {loss} at step {step} (epoch {(step - 1) // self.plan.steps_per_epoch + 1}); {kept}. "
            "A lower lr, a warm-up or training.clip_grad_norm usually helps"
        )
        error.step = step
        return error

    # ---- evaluation and checkpoints ----------------------------------------------------------------------------------

    def _test(self, augmented: bool = False) -> tuple[float, float]:
        with self.watchdog.phase("evaluate"):
            return self.validation.test(augmented)

    def _validate(self) -> tuple[float, float]:
        with self.watchdog.phase("evaluate"):
            return self.validation()

    def _is_better(self, row: dict[str, Any]) -> bool:
        if self.experiment.data.validation == "test":
            return False
        monitor = self.experiment.checkpoint.monitor
        better = is_better(row[monitor], self.session.best, monitor, least_improvement(self.experiment))
        if better:
            self.session.best, self.session.best_step = row[monitor], self.session.position.step
        return better

    def _save(self, best: bool = False) -> None:
        position = self.session.position
        if position.step == self.saved_step and not best:
            return
        if self.session.stepper.seen:  # a loss that is not finite must not reach a checkpoint
            self._take_window(self.session.stepper.rate)
        self._report_windows()
        self._check_weights()
        began = time.perf_counter()
        with self.watchdog.phase("save"):
            self.saver.wait()  # before there is another copy of the state
            state = self.session.state()
            if state is not None:
                last = (self.session.history or [{}])[-1]
                self.saver.save(
                    state,
                    step=position.step,
                    epoch=position.epoch,
                    whole_epoch=position.batch == 0 and position.step > 0,
                    metrics={key: value for key, value in last.items() if isinstance(value, float)},
                    best_step=self.session.best_step,
                    experiment=self.experiment.model_dump(mode="json"),
                )
            self.world.barrier()  # else the others wait for rank 0 in a step, which is to be quicker than a checkpoint
        self.saved_step = position.step
        self.saving.append(time.perf_counter() - began)

    def _settle(self) -> str:
        with self.watchdog.phase("save"):
            return self.saver.settle()

    def _is_saved(self) -> None:
        """Wait until the last checkpoint is on disk, on every rank."""
        with self.watchdog.phase("save"):
            self.saver.wait()
            self.world.barrier()

    def _check_weights(self) -> None:
        """A finite loss can still have an update that overflows; the weights are the same on all ranks, so all raise alike."""
        largest = torch.nn.utils.get_total_norm([p.detach() for p in self.session.network.parameters()], math.inf)
        if not math.isfinite(largest.item()):
            raise self._non_finite(self.session.position.step, math.nan)

    def _use_selected_weights(self) -> None:
        """Load the best checkpoint's weights for the test, if the file asks for it."""
        if self.experiment.checkpoint.select != "best":
            return
        best = checkpoint.named(self.run.checkpoints, "best")
        if best is None:
            raise RunError(f"{self.run.checkpoints}: the best checkpoint, which is to be tested, is gone; {saved.WAY_OUT}")
        self.session.use_weights(checkpoint.read(best))

    # ---- ending ----------------------------------------------------------------------------------------------------

    def _end(self, reason: str) -> dict[str, Any]:
        """Save, evaluate what may be evaluated, write result and state, close the trackers."""
        position = self.session.position
        taken = {"heard": self.flag.milliseconds()}
        self._save()
        self._is_saved()
        taken["saved"] = self.flag.milliseconds()
        result: dict[str, Any] = {"run": self.run.id, "data": self.prepared.store.label}
        if self._is_through():
            self._use_selected_weights()
            result["test_loss"], result["test_accuracy"] = self._test()
            if not math.isfinite(result["test_loss"]):  # the same sum on every rank
                raise self._non_finite(position.step, result["test_loss"])
            if self.experiment.training.test_time_augmentation:
                result["tta_loss"], result["tta_accuracy"] = self._test(augmented=True)
            result["state"] = "finished"
            if position.epoch < self.experiment.epochs:
                result["reason"] = f"early stopping after epoch {position.epoch} of {self.experiment.epochs}"
        elif reason:
            result["state"] = word_for(reason, self.world.share(self.run.cancel_marker.exists()))
            result["reason"] = reason
            result |= {f"{name}_after_ms": value for name, value in taken.items() if value is not None}
        else:
            result["state"], result["reason"] = "stopped", f"--max-steps {self.last_step}"
            result["val_loss"], result["val_accuracy"] = self._validate()
        result |= {"epochs": position.epoch, "steps": position.step}
        result |= {"checkpoints": len(self.saving), "checkpoint_seconds": round(sum(self.saving), 3)}  # of this segment
        result |= peak_memory(self.world)
        result |= {"selected": self.experiment.checkpoint.select, "ended": now()}
        self.records.result(result)
        with self.watchdog.phase("finish"):
            self.records.finish(result)
            self.world.barrier()
        return result
