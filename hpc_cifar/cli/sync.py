"""``hpc-cifar sync``: parse, call, print."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from . import options

if TYPE_CHECKING:
    from ..runs import Run


def sync(
    run: options.RunNames,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")] = False,
    to: Annotated[
        list[str] | None,
        typer.Option("--to", help="A tracker: wandb or tensorboard; repeatable.  [default: wandb and tracking.mirrors]"),
    ] = None,
    beside: Annotated[bool, typer.Option("--beside", hidden=True, help="Started by rank 0; ends with standard input.")] = False,
    code_of: options.CodeOf = None,
) -> None:
    """Bring W&B and other trackers up to date with a run directory; safe to repeat, also while the job runs.

    \b
    hpc-cifar sync last
    hpc-cifar sync last --follow
    hpc-cifar sync last --to tensorboard
    """
    from .. import files, owner
    from ..errors import TrackingError, UsageError
    from ..track import bounds, tracker
    from . import chosen

    root = files.runs_root()
    if unknown := [name for name in to or () if name not in tracker.MODULES]:
        raise UsageError(f"--to {unknown[0]}: there is no such tracker; there are {', '.join(tracker.MODULES)}")
    found = chosen.to_act_on(run, root, code_of)
    bounds.bound_command()
    if beside:
        _beside(found[0], (to or [tracker.WANDB])[0])
        return
    for one in found:
        owner.check_tree(one.path, parts=("evaluation", "checkpoints", "tensorboard"))
    if follow and len(found) > 1:
        raise UsageError("--follow: name one run")
    able: list[tuple[Run, str]] = []
    lacking: list[str] = []
    for one in found:
        for name in dict.fromkeys(to or tracker.chosen(one.experiment().tracking)):
            words = tracker.load(name).problem(one)
            if not words:
                able.append((one, name))
            elif words not in lacking:
                lacking.append(words)
    if follow and len(able) > 1:
        code = _each_by_itself([name for _, name in able], able[0][0], code_of)
        if code and not lacking:
            raise typer.Exit(code)
        problems = []
    else:
        problems = _one_by_one(able, follow, several=len(able) > len(found))
    if problems:
        raise TrackingError("\n".join([*problems, *lacking]))
    if lacking:
        raise UsageError("\n".join(lacking))


def _one_by_one(able: Sequence[tuple[Run, str]], follow: bool, several: bool) -> list[str]:
    """Upload runs to trackers, and say how much; what went wrong, a line each.

    Args:
        several: a run goes to more than one of them, so that each line says to which.
    """
    from ..errors import RunBusy, TrackingError
    from ..track import tracker
    from ..track.sync import sync as upload

    problems: list[str] = []
    for run, name in able:
        where = f" to {tracker.load(name).TITLE}" if several else ""
        try:
            count = upload(run, partial(_ended, run) if follow else lambda _: True, partial(typer.echo, err=True), to=name)
            typer.echo(f"{run.id}: {count:,} rows uploaded{where}")
        except (TrackingError, RunBusy) as error:
            problems.append(f"{run.id}: {error}" if isinstance(error, TrackingError) else str(error))
    return problems


def _each_by_itself(trackers: Sequence[str], run: Run, code_of: str | None) -> int:
    """Follow in a process for each tracker, so that none waits for another; the largest exit code."""
    command = [sys.executable, "-m", "hpc_cifar", "sync", str(run.path), "--follow"]
    command += ["--code-of", code_of] if code_of else []
    children = [subprocess.Popen([*command, "--to", name]) for name in trackers]
    try:
        return max(child.wait() for child in children)
    finally:  # a Ctrl-C is for all of them
        for child in children:
            child.wait()


def _ended(run: Run, seconds: float) -> bool:
    """Whether the run has ended, after that many seconds."""
    from ..launch.status import statuses

    time.sleep(seconds)
    return statuses([run])[0].ended


def _beside(run: Run, to: str) -> None:
    from ..errors import RunBusy, TrackingError
    from ..track.bounds import expendable
    from ..track.companion import OPENED
    from ..track.sync import sync as upload

    expendable()  # a rank must not be ended in its place
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the ranks; this process ends after them

    def ended(seconds: float) -> bool:
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        return bool(ready) and not os.read(sys.stdin.fileno(), 1)

    try:
        upload(run, ended, partial(typer.echo, err=True), partial(print, OPENED, flush=True), beside=True, to=to)
    except (TrackingError, RunBusy) as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from None
