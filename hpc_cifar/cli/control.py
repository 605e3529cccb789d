"""``status``, ``list``, ``logs``, ``wait``, ``cancel``, ``resume``: parse, call, print."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import terminal
from . import complete, options

RECENT = 20


def status(
    run: Annotated[
        str | None,
        typer.Argument(
            help="Run id, unique prefix, job or array id, path, or last; all runs without it.",
            show_default=False,
            autocompletion=complete.runs,
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every few seconds until all have ended.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A list of objects, one a run.")] = False,
    every: Annotated[
        float, typer.Option(min=0.2, max=86_400, callback=options.number, help="Seconds between looks with --watch.")
    ] = 5.0,
    owner: options.Owner = None,
) -> None:
    """Show the state of a run, or of the latest runs.

    \b
    hpc-cifar status
    hpc-cifar status last --watch
    hpc-cifar status 4711 --json

    A run is pending, running, requeued, finished, failed, cancelled, or stopped (with a checkpoint to go on from).
    """
    from .. import files
    from ..launch.status import statuses, there
    from . import chosen, status_table

    root, first, screen = files.runs_root(), True, watch and sys.stdout.isatty()
    while True:
        again = not first  # what is left out was said at the first look
        if run is not None:
            wanted = chosen.to_read([run], root, owner, quiet=again)
        else:
            wanted = chosen.everything(root, owner, quiet=again)
        hidden = 0 if as_json or run is not None else max(0, len(wanted) - RECENT)
        seen = there(statuses(wanted[hidden:]))
        if as_json:
            typer.echo(json.dumps([row.as_dict() for row in seen], indent=None if watch else 2))
        elif run is not None and len(seen) == 1 and sys.stdout.isatty() and not watch:
            status_table.details(seen[0])
        else:
            lines = status_table.lines_of(seen) if seen else [f"no runs in {root}"]
            if hidden:
                lines.append(f"and {hidden} older: hpc-cifar list")
            if screen:
                terminal.draw(status_table.in_place(lines, first=first))
            else:
                typer.echo("\n".join(lines))
        if not watch or all(row.ended for row in seen):
            return
        first = False
        time.sleep(every)


def list_runs(
    campaign: Annotated[
        str | None,
        typer.Option(help="Only runs submitted with that --campaign.", show_default=False, autocompletion=complete.campaigns),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A list of objects, as of status.")] = False,
    owner: options.Owner = None,
) -> None:
    """List every run, or those of a campaign, oldest first; of a campaign also mean and spread over seeds and folds.

    \b
    hpc-cifar list
    hpc-cifar list --campaign table2
    """
    from .. import files
    from ..launch.status import statuses, there
    from . import status_table
    from .chosen import everything

    root = files.runs_root()
    chosen = everything(root, owner, campaign)
    seen = statuses(chosen)
    if as_json:
        typer.echo(json.dumps([row.as_dict() for row in there(seen)], indent=2))
    elif there(seen):
        typer.echo("\n".join(status_table.lines_of(there(seen))))
        if campaign is not None:
            from .report import grouped

            typer.echo("\n" + "\n".join(f"{group.title}: {group.verdict.text}" for group in grouped(chosen, seen)))
    else:
        typer.echo(f"no runs in {root}")


def logs(
    run: options.RunName = "last",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")] = False,
    rank: Annotated[int, typer.Option(min=0, max=1_000_000, help="Whose log.")] = 0,
    whole: Annotated[bool, typer.Option("--all", help="Also the beginning of a log of more than 16 MiB.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="As it was written, with colours and whatever a terminal obeys.")] = False,
    owner: options.Owner = None,
) -> None:
    """Print what a rank wrote: standard output and standard error of every job of the run, in order.

    \b
    hpc-cifar logs last -f
    hpc-cifar logs 4711 --rank 3

    Colours are left out, other control characters are shown as \\x1b and the like.
    """
    from .. import files
    from ..errors import RunError
    from ..launch import control
    from . import chosen

    def show(text: str) -> None:
        if raw:
            terminal.draw(text)
        else:
            typer.echo(terminal.of_log(text), nl=False)

    def begin(path: Path) -> int:
        start = 0 if whole else control.log_begin(path)
        if start:
            typer.echo(f"hpc-cifar: {path.name}: without its first {start / 2**20:,.0f} MiB (--all prints them)", err=True)
        return start

    [found] = chosen.to_read(run, files.runs_root(), owner)
    last = None
    if follow:
        for path, text in control.follow_logs(found, rank, begin):
            if path != last and (last is not None or path.suffix == ".err"):
                typer.echo(f"==> {path.name} <==")
            last = path
            show(text)
        return
    paths = control.log_files(found, rank)
    if not paths:
        if found.last_job().executor == "train":
            raise RunError(f"{found.id} was started by train or torchrun, which write to the terminal they were started in")
        raise RunError(f"{found.id}: rank {rank} has no log yet (they will lie in {found.submitit})")
    for path in paths:
        text = ""
        for text in control.log_pieces(path, begin(path)):  # the last one ends in a line or not
            if len(paths) > 1 and path != last:
                typer.echo(f"==> {path.name} <==")
            last = path
            show(text)
        if text and not text.endswith("\n"):
            typer.echo()


def wait(run: options.RunNamesOrLast = None, owner: options.Owner = None) -> None:
    """Wait until runs have ended; exit code 0 if all finished or were stopped on purpose, 1 if one failed or was cancelled.

    \b
    hpc-cifar wait
    hpc-cifar wait 4711 4712
    """
    from .. import files
    from ..launch.several import wait_all
    from . import chosen

    ended = wait_all(chosen.to_read(run or ["last"], files.runs_root(), owner))
    for seen in ended:
        typer.echo(terminal.one_line(f"{seen.run}: {seen.state}" + (f" ({seen.reason})" if seen.reason else "")))
    if any(seen.state not in ("finished", "stopped") for seen in ended):
        raise typer.Exit(1)


def cancel(run: options.RunNames, code_of: options.CodeOf = None) -> None:
    """Stop runs for good; each saves a checkpoint first and does not requeue.

    \b
    hpc-cifar cancel last
    hpc-cifar cancel 4711_3
    """
    from .. import files
    from ..launch.several import cancel_all
    from . import chosen

    for line in cancel_all(chosen.to_act_on(run, files.runs_root(), code_of), code_of):
        typer.echo(line)


def resume(
    run: options.RunNamesOrLast = None,
    cluster: Annotated[
        str | None, typer.Option(help="Another profile than last time.", show_default=False, autocompletion=complete.clusters)
    ] = None,
    max_gpu_hours: options.MaxGpuHours = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin at step 0; what a run has so far is set aside in it.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Watch the run to its end and print the result.")] = False,
    code_of: options.CodeOf = None,
) -> None:
    """Submit stopped, failed or cancelled runs again: same experiment, same code, from the last checkpoint.

    \b
    hpc-cifar resume last --follow
    hpc-cifar resume 4711 --cluster mine
    """
    from .. import files
    from ..config.cluster import find_cluster
    from ..errors import HpcCifarError
    from ..launch import control
    from ..launch.submit import have_sbatch
    from . import chosen, several

    wanted = chosen.to_act_on(run or ["last"], files.runs_root(), code_of)
    profile = None if cluster is None else find_cluster(cluster, have_sbatch=have_sbatch())
    going, refused = [], False
    for found in wanted:
        try:
            options: dict[str, Any] = {"cluster": profile, "max_gpu_hours": max_gpu_hours, "fresh": fresh, "code_of": code_of}
            done = control.resume(found, data_root=files.data_root(), **options)
        except HpcCifarError as error:
            if len(wanted) == 1:
                raise
            typer.echo(f"hpc-cifar: error: {error}", err=True)  # one that cannot go on must not keep the others
            refused = True
            continue
        if done.job_id is None:
            typer.echo(f"{found.id} has finished already; nothing to do")
            continue
        if done.found:
            typer.echo(f"{found.id}: Slurm had job {done.job_id} of it already; nothing was submitted")
        else:
            typer.echo(f"{found.id}: resumed as job {done.job_id}")
        going.append(found)
    if follow and going:
        try:
            refused |= any(seen.state not in ("finished", "stopped") for seen in several.follow(going))
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
    if refused:
        raise typer.Exit(1)
