"""What a person sees while a run trains: a progress bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import time
from typing import Any

from .. import terminal


class Progress:
    """Rank 0's console; silent on the others.

    Args:
        show: whether this rank prints at all.
        total_steps: steps of the whole run.
        done: steps already made by earlier segments.
    """

    def __init__(self, show: bool, total_steps: int, done: int = 0) -> None:
        self._show = show
        self._bar: Any = None
        if show and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}  {task.fields[rate]} images/s"),
                TimeRemainingColumn(),
                console=terminal.console(),
            )
            self._task = self._bar.add_task("", total=total_steps, completed=done, epoch="1", loss="-", rate="-")
            self._bar.start()
        self._last = time.monotonic()

    def say(self, text: str) -> None:
        """One plain line."""
        if not self._show:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def step(self, step: int, total: int, epoch: int, epochs: int, loss: float | None, rate: float) -> None:
        """Tell the progress; without a terminal one line at most every 15 seconds."""
        if not self._show:
            return
        text = "-" if loss is None else f"{loss:.4f}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, epoch=f"{epoch}/{epochs}", loss=text, rate=f"{rate:,.0f}")
        elif time.monotonic() - self._last > 15:
            self._last = time.monotonic()
            print(f"epoch {epoch}/{epochs}  step {step}/{total}  loss {text}  {rate:,.0f} images/s", flush=True)

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """One line for a finished epoch, from its row in ``metrics.jsonl``."""
        parts = [f"epoch {row['epoch']}/{epochs}"]
        for key, label in (
            ("train_loss", "loss"),
            ("train_accuracy", "accuracy"),
            ("val_loss", "validation loss"),
            ("val_accuracy", "validation accuracy"),
        ):
            if row.get(key) is not None:
                parts.append(f"{label} {row[key]:.4f}" if key.endswith("loss") else f"{label} {100 * row[key]:.2f} %")
        if row.get("images_per_second"):
            parts.append(f"{row['images_per_second']:,.0f} images/s")
        self._last = time.monotonic()
        self.say("  ".join(parts))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
