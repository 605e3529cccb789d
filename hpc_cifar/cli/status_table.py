"""The table of ``status`` and ``list``: whatever fits a terminal of 80 columns, and every column in a pipe."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .console import clock, duration, facts, number, percent, printable

if TYPE_CHECKING:
    from ..launch.status import Status

COLUMNS = (
    *("run", "state", "job", "epoch", "step", "validation", "test", "images/s", "restarts"),
    *("GPU-hours", "GPU-h left", "left", "start", "nodes", "reason", "W&B"),
)
LEFT_ALIGNED = frozenset(("run", "state", "job", "start", "nodes", "reason", "W&B"))
DISPENSABLE = ("W&B", "step", "GPU-h left", "images/s", "nodes", "restarts", "job", "GPU-hours", "start")
"""What a narrow terminal does without, first to go first; ``status RUN`` shows all of it."""
NOTHING = ("-", "")
HOME, ALL, REST_OF_LINE, REST_OF_SCREEN = "\x1b[H", "\x1b[2J", "\x1b[K", "\x1b[J"


def cells(row: Status) -> dict[str, str]:
    """The row's columns as text; ``-`` is nothing."""
    return {
        "run": row.run,
        "state": row.state,
        "job": row.job_id or "-",
        "epoch": f"{number(row.epoch)}/{number(row.epochs)}",
        "step": number(row.step),
        "validation": percent(row.val_accuracy),
        "test": percent(row.test_accuracy),
        "images/s": number(row.images_per_second),
        "restarts": str(row.restarts) if row.restarts else "-",
        "GPU-hours": number(row.gpu_hours, ".3f") if row.gpu_hours else "-",
        "GPU-h left": number(row.gpu_hours_left, ".2f"),
        "left": duration(row.eta_s),
        "start": clock(row.estimated_start),
        "nodes": row.nodes or "-",
        "reason": row.reason or "",
        "W&B": row.wandb or "-",
    }


def lines_of(rows: Sequence[Status]) -> list[str]:
    """A fitted table on a terminal; every column, separated by tabs, elsewhere, so that ``cut`` works."""
    texts = [{name: printable(text) for name, text in cells(row).items()} for row in rows]
    if not sys.stdout.isatty():
        return ["\t".join(COLUMNS), *("\t".join(text[name] for name in COLUMNS) for text in texts)]
    return fitted(texts, shutil.get_terminal_size().columns)


def fitted(texts: Sequence[dict[str, str]], width: int) -> list[str]:
    """Lines of at most ``width`` columns: without columns that are empty in every row, then without what matters least.

    Reasons are long and rare, so each has lines of its own below its row.
    """
    sizes = {name: max(len(name), *(len(text[name]) for text in texts)) for name in COLUMNS}
    shown = [name for name in COLUMNS if name != "reason" and any(text[name] not in NOTHING for text in texts)]
    for name in DISPENSABLE:
        if sum(sizes[name] + 2 for name in shown) - 2 <= width:
            break
        if name in shown:
            shown.remove(name)

    def line(values: dict[str, str]) -> str:
        aligned = (f"{values[name]:{'<' if name in LEFT_ALIGNED else '>'}{sizes[name]}}" for name in shown)
        return "  ".join(aligned).rstrip()

    lines = [line({name: name for name in COLUMNS})]
    for text in texts:
        lines.append(line(text))
        lines += textwrap.wrap(text["reason"], max(width, 20), initial_indent="    ", subsequent_indent="    ")
    return lines


def details(row: Status) -> None:
    """Everything that is known about one run, one fact a line."""
    text = cells(row)
    hours = [f"{number(row.gpu_hours, '.3f')} used"]
    if row.gpu_hours_planned is not None:
        hours.append(f"at most {row.gpu_hours_planned:.2f} a job")
    if row.gpu_hours_left is not None:
        hours.append(f"{row.gpu_hours_left:.2f} left")
    text |= {"GPU-hours": ", ".join(hours) if row.gpu_hours or row.gpu_hours_planned else "-", "GPU-h left": "-"}
    names = {"left": "time to finish", "start": "estimated start", "validation": "validation accuracy", "test": "test accuracy"}
    known = [(names.get(name, name), text[name]) for name in COLUMNS[1:] if text[name] not in NOTHING]
    facts(row.run, known)


def in_place(lines: Sequence[str], *, first: bool) -> str:
    """The lines over what is on the terminal, without the flicker of an empty screen; what is too much for it is left out."""
    height = shutil.get_terminal_size().lines
    kept = list(lines) if len(lines) < height else [*lines[: height - 2], f"... {len(lines) - height + 2} more lines"]
    return (ALL if first else "") + HOME + "".join(f"{line}{REST_OF_LINE}\n" for line in kept) + REST_OF_SCREEN
