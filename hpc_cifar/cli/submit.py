"""``hpc-cifar submit``: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..config.cluster import Cluster
    from ..config.experiment import Experiment
    from ..launch.submit import Submitted

Text = Annotated[str | None, typer.Option(show_default=False)]


def submit(
    job: Annotated[list[str], typer.Argument(help="Job files, or names of packaged jobs such as quickstart.")],
    cluster: Annotated[
        str | None,
        typer.Option(help="Profile: a name, a file, or local. HPC_CIFAR_CLUSTER, else what is here.", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print plan, budget and the exact sbatch script; submit nothing.")
    ] = False,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a field, such as optimizer.lr=0.1.")
    ] = None,
    max_gpu_hours: Annotated[
        float | None, typer.Option(min=0, help="Refuse a job that may use more GPU-hours.", show_default=False)
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the runs have ended; exit code 1 if one failed.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Watch the run to its end and print the result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects with run, job_id and path.")] = False,
    parsable: Annotated[bool, typer.Option("--parsable", help="Print run and job id, tab-separated.")] = False,
    partition: Text = None,
    account: Text = None,
    qos: Text = None,
    constraint: Text = None,
    exclude: Text = None,
    nodes: Annotated[int | None, typer.Option(min=1, show_default=False)] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, show_default=False)] = None,
    time: Annotated[str | None, typer.Option(metavar="HH:MM:SS", help="Time limit of one job.", show_default=False)] = None,
) -> None:
    """Submit job files to Slurm, or run them on this machine with --cluster local.

    \b
    hpc-cifar submit quickstart --cluster local --follow
    hpc-cifar submit jobs/deep300.yaml --dry-run
    hpc-cifar submit deep300 --partition gpu --time 02:00:00 --set optimizer.lr=0.01
    """
    from .. import files
    from ..config.cluster import with_overrides
    from ..config.packaged import find_job
    from ..errors import UsageError
    from ..launch import submit as launch

    if sum((as_json, parsable, follow)) > 1:
        raise UsageError("--json, --parsable and --follow: use one of them")
    if dry_run and (as_json or parsable or follow or wait):
        raise UsageError("--dry-run submits nothing: leave out --json, --parsable, --follow and --wait")
    experiments = [
        with_resources(experiment, nodes=nodes, gpus_per_node=gpus_per_node, time=time)
        for experiment in _load([find_job(name) for name in job], sets or [])
    ]
    chosen = with_overrides(
        _cluster(cluster, dry_run),
        partition=partition, account=account, qos=qos, constraint=constraint, exclude=exclude,
    )  # fmt: skip
    root, data_root = files.runs_root(), files.data_root()
    if dry_run:
        for experiment in experiments:
            _print_preview(experiment, chosen, root, data_root, max_gpu_hours)
        return
    done = []
    for experiment in experiments:
        made = launch.submit(experiment, chosen, root=root, data_root=data_root, max_gpu_hours=max_gpu_hours)
        done.append(made)
        _print_submitted(made, chosen, quiet=as_json, parsable=parsable)
    if as_json:
        import json

        rows = [_row(made) for made in done]
        typer.echo(json.dumps(rows, indent=2))
    if follow or wait:
        _watch(done, follow=follow)


def _load(paths: list[Path], sets: list[str]) -> list[Experiment]:
    """All files, or every problem of all of them."""
    from ..config.load import check
    from ..errors import ConfigError

    loaded, problems = check(paths, sets)
    if problems:
        raise ConfigError(problems)
    return [experiment for _, experiment in loaded]


def with_resources(experiment: Experiment, **changes: Any) -> Experiment:
    """``experiment`` with the resources of the command line; None leaves a field as it is.

    Raises:
        UsageError: a value that the file could not hold either.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    if not given:
        return experiment
    from pydantic import ValidationError

    from ..config.explain import first_problem
    from ..errors import UsageError

    fields = experiment.resources.model_dump()
    if "gpus_per_node" in given and given["gpus_per_node"] != fields["gpus_per_node"]:
        fields["processes_per_node"] = None  # it described the file's own number of GPUs
    try:
        resources = type(experiment.resources).model_validate(fields | given)
        return experiment.model_copy(update={"resources": resources})
    except ValidationError as error:
        field, message = first_problem(error)
        raise UsageError(f"--{field.rpartition('.')[2].replace('_', '-')}: {message}") from None


def _cluster(name: str | None, dry_run: bool) -> Cluster:
    from ..config.cluster import find_cluster
    from ..launch.submit import have_sbatch

    # a dry run shows what Slurm would get, on a machine without Slurm too
    return find_cluster(name, have_sbatch=dry_run or have_sbatch())


def _print_preview(experiment: Experiment, cluster: Cluster, root: Path, data_root: Path, max_gpu_hours: float | None) -> None:
    from ..errors import LaunchError
    from ..launch import submit as launch
    from . import console

    shown = launch.preview(experiment, cluster, root=root, data_root=data_root)
    expected = console.expectations(shown.start, shown.length, shown.plan)
    console.plan_facts(experiment.name, cluster.name, shown.plan, expected)
    if shown.script is None:
        typer.echo("\nthe local executor has no script: the processes start on this machine")
    else:
        typer.echo(f"\n{shown.script}")
    launch.check_budget(shown.plan, max_gpu_hours)
    if shown.refusal is not None:
        raise LaunchError(shown.refusal)


def _print_submitted(made: Submitted, cluster: Cluster, *, quiet: bool, parsable: bool) -> None:
    from . import console

    if parsable:
        typer.echo(f"{made.run.id}\t{made.job_id}")
    elif not quiet:
        place = made.plan.placement
        gpus = f", {place.nodes * place.gpus_per_node} GPUs" if place.gpus_per_node else ""
        budget = f", at most {made.plan.gpu_hours:.2f} GPU-hours a job" if place.gpus_per_node else ""
        typer.echo(f"{made.run.id}: job {made.job_id} on {cluster.name}, {place.world_size} processes{gpus}{budget}")
        for note in made.plan.notes:
            typer.echo(f"  note: {note}")
        for name, text in console.expectations(made.start, made.length, made.plan):
            typer.echo(f"  {name}: {console.printable(text)}")


def _row(made: Submitted) -> dict[str, Any]:
    """One object of ``--json``; what is not known is null."""
    return {
        "run": made.run.id,
        "job_id": made.job_id,
        "path": str(made.run.path),
        "gpu_hours_planned": made.plan.gpu_hours or None,
        "estimated_start": made.start.start if made.start else None,
        "estimated_seconds": round(made.length.seconds, 1) if made.length else None,
        "estimated_jobs": made.length.jobs if made.length else None,
        "estimated_gpu_hours": (made.length.gpu_hours or None) if made.length else None,
    }


def _watch(done: list[Submitted], *, follow: bool) -> None:
    from ..launch import control
    from . import console

    failed = False
    for made in done:
        try:
            seen = console.follow(made.run) if follow else control.wait(made.run)
        except KeyboardInterrupt:
            if not follow:
                typer.echo(f"\n{made.run.id} goes on; wait again with: hpc-cifar wait {made.run.id}", err=True)
            raise typer.Exit(130) from None
        failed |= seen.state not in ("finished", "stopped")
    if failed:
        raise typer.Exit(1)
