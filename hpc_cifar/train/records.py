"""What rank 0 tells the outside: metrics.jsonl, state.json, trackers and the console. Silent on the other ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import files
from ..config.experiment import Experiment
from ..errors import LostRank, NonFiniteLoss, first_line
from ..plan import Plan
from ..records import RunState
from ..runs import UPDATE_WAIT_S, Run, now
from ..track.companion import Companions
from ..track.metrics import MetricsLog
from ..track.progress import Progress
from . import recovery
from .distributed import World, is_lost_peer
from .node_usage import NodeUsage
from .session import Session

SHOWN = 32  # images of the first batch


class Records:
    """Opened once a run has found its place; see :meth:`close`.

    Args:
        data_label: which data, for people: "CIFAR-10", "JPEG CIFAR-10", ....
        last_step: where this segment would end undisturbed.
        console: whether rank 0 prints.
    """

    on_epoch: Callable[[dict[str, Any]], None] | None = None  # on rank 0, with the row of each finished epoch

    def __init__(
        self,
        run: Run,
        world: World,
        experiment: Experiment,
        plan: Plan,
        session: Session,
        data_label: str,
        last_step: int,
        console: bool,
    ) -> None:
        self._run, self._world, self._experiment, self._plan = run, world, experiment, plan
        self._session, self._label, self._last_step = session, data_label, last_step
        self._before = run.state()
        self._clock = time.monotonic()  # that of the machine may be set while a run trains
        self._began = self._before.started or now()
        self._state_written = 0.0
        self.rate = 0.0  # images/s of the last windows
        self._recent: list[tuple[int, float]] = []  # images and seconds of each
        self.progress = Progress(console and world.main, last_step, session.position.step)
        self._precision = self._before.precision
        self._lost_steps = self._before.lost_steps  # trained, and to be trained again
        self._metrics: MetricsLog | None = None
        self._trackers: Companions | None = None
        self._nodes = NodeUsage(world) if experiment.tracking.nodes else None
        if world.main:
            self._metrics = MetricsLog(run.metrics_file, session.position.step, session.history)
            reached = max(self._metrics.reached, self._before.step or 0)
            self._lost_steps += max(0, reached - session.position.step)
            self.state("running")  # what trackers are told of the run
            self._trackers = Companions(run, experiment.tracking, self.progress.say)

    def announce(self, parameters: int, precision: str, notes: list[str]) -> None:
        """The first lines of a segment: what is trained on what, and what was adapted."""
        plan, world = self._plan, self._world
        self._precision = precision
        self.progress.say(
            f"{self._experiment.name}: {parameters:,} parameters, {self._label}, {plan.train_images:,} training images, "
            f"{plan.steps_per_epoch} steps x {self._experiment.epochs} epochs, batch {plan.batch_size} "
            f"on {world.size} x {world.device.type}, {precision}"
        )
        for note in [*notes, *(self._metrics.notes if self._metrics is not None else ())]:
            self.progress.say(f"note: {note}")
        facts = {"world_size": world.size, "device": str(world.device), "precision": precision}
        gpu = torch.cuda.get_device_name(world.device) if world.on_gpu else None
        used = {"parameters": parameters, "gpus": world.size if world.on_gpu else 0, "gpu": gpu}
        self.event("started", **facts, **used, lost_steps=self._lost_steps)
        self.state("running")

    def pipeline(self, name: str, why: str) -> None:
        """Which pipeline feeds the training, and why that one."""
        self.progress.say(f"pipeline: {name} ({why})")
        self.event("pipeline", pipeline=name, why=why)

    def first_batch(self, images: torch.Tensor) -> None:
        """What the network is given first, as a picture for trackers: (N, C, H, W), stretched to the range of a picture."""
        tracking = self._experiment.tracking
        if not self._world.main or (tracking.wandb == "disabled" and not tracking.mirrors) or images.dim() != 4:
            return
        path = self._run.path / "evaluation" / "training" / "batch.png"
        if path.exists():
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.atomic_file(path) as stream:
                _sheet(images[:SHOWN]).save(stream, "PNG")
        except Exception as error:  # nothing that is only looked at ends a training
            self.progress.say(f"note: no picture of the first batch: {first_line(error)}")

    def startup(self, seconds: dict[str, float]) -> None:
        """How long this rank took to its first step, by stage."""
        slowest = sorted(seconds, key=lambda stage: -seconds[stage])[:3]
        parts = ", ".join(f"{stage} {seconds[stage]:.1f} s" for stage in slowest)
        self.progress.say(f"first step after {sum(seconds.values()):.1f} s ({parts})")
        self.event("first step", seconds=seconds)

    def window(
        self,
        epoch: int,
        step: int,
        losses: list[float],
        accuracy: float,
        rate: float,
        seconds: float,
        images: int,
        more: Mapping[str, float],
    ) -> None:
        """A ``step`` row over the last ``len(losses)`` steps, which took ``seconds`` for ``images`` of all ranks.

        Args:
            more: further figures of the row, of its step alone.
        """
        seconds = max(seconds, 1e-9)
        self._recent.append((images, seconds))
        # a window of few images says little of those to come: together they are at least a whole one
        enough = min(self._experiment.training.log_every_steps * self._plan.batch_size, self._plan.train_images)
        while sum(count for count, _ in self._recent[1:]) >= enough:
            del self._recent[0]
        self.rate = sum(count for count, _ in self._recent) / sum(taken for _, taken in self._recent)
        loss = sum(losses) / len(losses)
        own = round(images / seconds, 1)
        values = {"train_loss": loss, "train_accuracy": accuracy, "lr": rate, "images_per_second": own}
        self._emit("step", epoch, step, {**values, **more})
        self.progress.step(step, self._last_step, epoch, self._experiment.epochs, loss, self.rate)
        if time.monotonic() - self._state_written > 0.5:
            self._progress(train_loss=loss)

    def epoch(self, row: dict[str, Any]) -> None:
        """An ``epoch`` row; ``row`` has ``epoch`` (from 1) and ``step``. Call on every rank, where the ranks have just met."""
        if self._nodes is not None and (usage := self._nodes.taken()):
            self._emit("system", row["epoch"], row["step"], usage)
        values = {key: value for key, value in row.items() if key not in ("epoch", "step")}
        self._emit("epoch", row["epoch"], row["step"], values)
        self.progress.epoch(row, self._experiment.epochs)
        self._progress(train_loss=row["train_loss"])
        if self.on_epoch is not None and self._world.main:
            self.on_epoch(row)

    def event(self, event: str, **values: Any) -> None:
        if self._metrics is not None:
            position = self._session.position
            known = {key: value for key, value in values.items() if value is not None}
            self._metrics.write("event", epoch=position.epoch, step=position.step, event=event, **known)

    def _emit(self, kind: str, epoch: int, step: int, values: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.write(kind, epoch=epoch, step=step, **values)

    def state(self, state: str, **values: Any) -> None:
        """Write ``state.json`` on rank 0."""
        self._write_state(self._state(state, **values))

    def _progress(self, **values: Any) -> None:
        """Write how far the run is; left for the next time where another process changes the state, since the steps wait."""
        self._write_state(self._state("running", **values), wait_s=0)

    def _write_state(self, record: dict[str, Any], wait_s: float = UPDATE_WAIT_S) -> None:
        self._state_written = time.monotonic()
        if self._world.main:
            self._run.update_state(**record, wait_s=wait_s)

    def _state(self, state: str, **values: Any) -> dict[str, Any]:
        """What ``state.json`` holds: also the time and GPU-hours of all segments so far."""
        position, before, world = self._session.position, self._before, self._world
        seconds = time.monotonic() - self._clock
        gpus = world.size if world.on_gpu else 0
        validated = (row["val_accuracy"] for row in reversed(self._session.history) if "val_accuracy" in row)
        return {
            "state": state,
            "reason": None,
            "epoch": position.epoch,
            "epochs": self._experiment.epochs,
            "step": position.step,
            "total_steps": self._plan.total_steps,
            "val_accuracy": next(validated, None),
            "images_per_second": round(self.rate, 1),
            "lost_steps": self._lost_steps,
            "restarts": _times(before) + 1,
            "gpu_hours": round(max(0.0, before.gpu_hours or 0.0) + gpus * seconds / 3600, 6),
            "seconds": round(max(0.0, before.seconds or 0.0) + seconds, 3),
            "started": self._began,
            "world_size": world.size,
            "device": world.device.type,
            "precision": self._precision,
            "data": self._label,
            "host": os.uname().nodename,
            "pid": os.getpid(),
            **values,
        }

    def result(self, result: dict[str, Any]) -> None:
        """Complete the result of this segment with its times, and write ``result.json`` and ``state.json`` on rank 0.

        In this order: whoever reads that a run has finished finds its result.
        """
        state = self._state(result["state"], reason=result.get("reason"))
        result |= {key: state[key] for key in ("restarts", "lost_steps", "gpu_hours", "seconds", "precision")}
        if self._world.main and result["state"] != "requeued":
            files.write_sealed(self._run.result_file, result)
        self._write_state(state)

    def finish(self, result: dict[str, Any]) -> None:
        """Close metrics and trackers with the result of this segment, which has been written."""
        self.event(result["state"], **{name: result.get(name) for name in ("reason", "heard_after_ms", "saved_after_ms")})
        self.close()

    def left(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Close, after saying of a failure that it is one; a rank that was lost may come back."""
        lost = isinstance(error, LostRank) or (isinstance(error, RuntimeError) and is_lost_peer(error))
        if isinstance(error, NonFiniteLoss) and recovery.goes_back(self._run, error.step):
            self.event("went back", reason=first_line(error))
            self.state("running", restarts=_times(self._before))  # it is no restart
            self.progress.say(f"note: {error}; going back to the last checkpoint, to leave this batch out")
        elif self._metrics is not None and isinstance(error, Exception) and not lost:
            self.event("failed", reason=first_line(error))
            self.state("failed", reason=str(error))
        self.close()

    def close(self) -> None:
        """Let go of files and terminal; trackers take a run that is still running for a failed one."""
        if self._metrics is not None:
            self._metrics.close()
        if self._trackers is not None:
            self._trackers.finish()
        if self._nodes is not None:
            self._nodes.close()
        self.progress.close()


def _times(before: RunState) -> int:
    """Restarts so far; -1 of a run that has not begun."""
    return -1 if before.restarts is None else before.restarts


def _sheet(images: torch.Tensor) -> Any:
    """A picture of rows of eight."""
    from PIL import Image

    values = images.detach().float().cpu()
    low, high = values.amin(), values.amax()
    pixels = ((values - low) / (high - low).clamp_min(1e-9) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    height, width = pixels.shape[1:3]
    sheet = Image.new("RGB", (min(8, len(pixels)) * (width + 2) + 2, -(-len(pixels) // 8) * (height + 2) + 2), "white")
    for number, one in enumerate(pixels):
        picture = Image.fromarray(one.squeeze(-1) if one.shape[-1] == 1 else one[..., :3])
        sheet.paste(picture, (number % 8 * (width + 2) + 2, number // 8 * (height + 2) + 2))
    return sheet


def peak_memory(world: World) -> dict[str, int]:
    """The most MiB that a rank has held so far, of its host (shared pages included) and of its GPU. Call on every rank."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = {"host_memory_mib": max((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), default=0) // 1024}
    if world.on_gpu:
        found["device_memory_mib"] = torch.cuda.max_memory_reserved(world.device) // 2**20
    every = world.gather(found) or [found]
    return {name: max(one[name] for one in every) for name in found}
