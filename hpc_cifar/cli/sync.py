"""``hpc-cifar sync``: parse, call, print."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from . import options

if TYPE_CHECKING:
    from ..runs import Run


def sync(
    run: options.RunNames,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")] = False,
    beside: Annotated[bool, typer.Option("--beside", hidden=True, help="Started by rank 0; ends with standard input.")] = False,
    code_of: options.CodeOf = None,
) -> None:
    """Bring W&B up to date with a run directory; safe to repeat, also while the job runs.

    \b
    hpc-cifar sync last
    hpc-cifar sync last --follow
    """
    from .. import files, owner
    from . import chosen

    root = files.runs_root()
    found = chosen.to_act_on(run, root, code_of)
    if beside:
        _beside(found[0])
        return
    for one in found:
        owner.check_tree(one.path, parts=("evaluation", "checkpoints"))
    from ..errors import RunBusy, TrackingError, UsageError
    from ..track import identity
    from ..track.sync import sync as upload
    from ..track.wandb_run import has_login

    if not all(has_login(identity.kept(one).base_url) for one in found):
        raise UsageError("W&B: no login here: type 'wandb login', or set WANDB_API_KEY")
    if follow and len(found) > 1:
        raise UsageError("--follow: name one run")
    problems: list[str] = []
    for one in found:
        try:
            count = upload(one, partial(_ended, one) if follow else lambda _: True, partial(typer.echo, err=True))
            typer.echo(f"{one.id}: {count:,} rows uploaded")
        except (TrackingError, RunBusy) as error:
            problems.append(f"{one.id}: {error}" if isinstance(error, TrackingError) else str(error))
    if problems:
        raise TrackingError("\n".join(problems))


def _ended(run: Run, seconds: float) -> bool:
    """Whether the run has ended, after that many seconds."""
    from ..launch.status import statuses

    time.sleep(seconds)
    return statuses([run])[0].ended


def _beside(run: Run) -> None:
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
        upload(run, ended, partial(typer.echo, err=True), partial(print, OPENED, flush=True), beside=True)
    except (TrackingError, RunBusy) as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from None
