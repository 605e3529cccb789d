"""``hpc-cifar report``: parse, call, print."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import complete, options
from .evaluate import mirror

if TYPE_CHECKING:
    from ..launch.status import Status
    from ..report.groups import Group
    from ..runs import Run

PROGRESS_S = 2.0  # between two lines about many runs
FORMATS = ("html", "md", "json", "csv")


def report(
    run: options.RunNamesOrLast = None,
    campaign: Annotated[
        str | None,
        typer.Option(help="All runs submitted with that --campaign.", show_default=False, autocompletion=complete.campaigns),
    ] = None,
    output_format: Annotated[str, typer.Option("--format", help="html, md, json or csv.")] = "html",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file, or - for standard output, where all but html go.", show_default=False),
    ] = None,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="First evaluate the best finished run by validation.")] = False,
    wandb: Annotated[bool, typer.Option("--wandb", help="Instead: a report in W&B, of runs that are there.")] = False,
    winner: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Instead: the best by validation as a job file.", show_default=False),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Its heading.", show_default=False)] = None,
    owner: options.Owner = None,
) -> None:
    """Report on runs: one HTML file with claims beside measurements, curves, classes, restarts and how to do it again.

    \b
    hpc-cifar report last
    hpc-cifar report --campaign table2 -o table2.html
    hpc-cifar report 4711 --format csv > runs.csv
    """
    from .. import files
    from ..errors import UsageError
    from ..launch.status import statuses
    from .chosen import everything, to_read

    if output_format not in FORMATS:
        raise UsageError(f"--format {output_format}: should be one of {', '.join(FORMATS)}")
    if campaign is not None and run:
        raise UsageError("--campaign names the runs: leave the others out")
    root = files.runs_root()
    chosen = everything(root, owner, campaign) if campaign is not None else to_read(run or ["last"], root, owner)
    chosen = _checked(chosen, changes=evaluate or wandb)
    if evaluate:
        _evaluate(chosen)
    groups = grouped(chosen, statuses(chosen))
    if winner is not None:
        from ..report import text as plain

        _write(winner, plain.winner(groups, _job_name(winner)), "--winner")
        typer.echo(f"{winner}: hpc-cifar submit {winner}")
        return
    heading = title or campaign or (chosen[0].id if len(chosen) == 1 else f"{len(chosen)} runs")
    if wandb:
        from ..report import wandb_report
        from ..track import bounds

        bounds.bound_command()
        typer.echo(wandb_report.publish(groups, heading))
        return
    text = _text(groups, heading, output_format)
    if output_format == "html" and out is None:
        name = campaign or (chosen[0].id if len(chosen) == 1 else "runs")
        out = Path(f"report-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.html")
    if out is None or str(out) == "-":
        typer.echo(text, nl=False)
        return
    _write(out, text, "--out")
    from ..report.groups import headline

    typer.echo(f"{out}: {headline(groups)}")


def _checked(chosen: list[Run], *, changes: bool) -> list[Run]:
    """The runs whose pictures are files of theirs; those that are changed or uploaded have to be one's own.

    One of several that cannot be shown is left out, and named.
    """
    from .. import owner
    from ..errors import RunError

    kept = []
    for run in chosen:
        if changes and not owner.is_own(run.path):
            raise RunError(f"{run.path}: is a run of {owner.name_of(owner.of(run.path))}: leave out --evaluate and --wandb")
        if changes:
            owner.check_own(run.path)
        try:
            if owner.is_own(run.path):  # those of others have been looked at
                owner.check_tree(run.path, parts=("evaluation",))
        except RunError as error:
            if len(chosen) == 1 or changes:
                raise
            typer.echo(f"warning: left out: {error}", err=True)
            continue
        kept.append(run)
    if chosen and not kept:
        raise RunError("none of these runs can be read")
    return kept


def _write(path: Path, text: str, option: str) -> None:
    from .. import files
    from ..errors import UsageError

    try:
        files.write_text(files.expanded(path, f"{option} {path}"), text)
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror or error}") from None


def _job_name(path: Path) -> str:
    from .. import files
    from ..config.experiment import NAME_PATTERN
    from ..errors import UsageError

    if path.suffix != ".yaml" or not NAME_PATTERN.fullmatch(path.stem):
        raise UsageError(f"--winner {path}: should be a job file such as best.yaml; its experiment is called like it")
    if files.expanded(path, f"--winner {path}").exists():
        raise UsageError(f"--winner {path}: exists already")
    return path.stem


def grouped(chosen: list[Run], statuses: list[Status]) -> list[Group]:
    """What the directories say; where a run is now, its status knows better."""
    from ..errors import RunError
    from ..report.facts import gather
    from ..report.groups import groups_of, remarks

    facts = []
    told = time.monotonic()
    for number, (run, seen) in enumerate(zip(chosen, statuses, strict=True)):
        if time.monotonic() - told > PROGRESS_S:
            told = time.monotonic()
            typer.echo(f"{number:,} of {len(chosen):,} runs read", err=True)
        try:
            facts.append(gather(run, seen.state, seen.reason or ""))
        except RunError as error:  # of another version, or damaged: the others are still worth a report
            typer.echo(f"warning: left out: {error}", err=True)
    if not facts:
        raise RunError("none of these runs can be read")
    groups = groups_of(facts)
    for remark in remarks(groups):
        typer.echo(f"warning: {remark}", err=True)
    return groups


def _text(groups: list[Group], title: str, form: str) -> str:
    from ..report import page, text

    if form == "html":
        return page.html(groups, title)
    if form == "csv":
        return text.as_csv(groups)
    return text.as_json(groups, title) if form == "json" else text.markdown(groups, title)


def _evaluate(chosen: list[Run]) -> None:
    """The run whose mistakes the report shows."""
    from .. import files
    from ..errors import UsageError
    from ..report.facts import foremost, gather

    best = foremost([one for run in chosen if (one := gather(run)).state == "finished"])
    if best is None:
        raise UsageError("--evaluate: none of these runs has finished")
    from ..train import evaluation, trained

    evaluation.evaluate(trained.load(best.run, files.data_root(), ""), "test", tta=False, pictures=True, maps_of=None)
    mirror(best.run)
