"""``hpc-cifar submit``: parse, call, print."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import complete, options

if TYPE_CHECKING:
    from ..config.cluster import Cluster
    from ..config.expand import Element, Point
    from ..config.experiment import Experiment
    from ..launch.submit import Submitted


def submit(
    job: Annotated[
        list[str], typer.Argument(help="Job files, or names of packaged jobs such as quickstart.", autocompletion=complete.jobs)
    ],
    cluster: Annotated[
        str | None,
        typer.Option(
            help="Profile: a name, a file, or local. HPC_CIFAR_CLUSTER, else what is here.",
            show_default=False,
            autocompletion=complete.clusters,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print plan, budget and the exact sbatch script; submit nothing.")
    ] = False,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a field, such as optimizer.lr=0.1.")
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help="Run each file with N seeds: its own and those after it.", show_default=False),
    ] = None,
    kfold: Annotated[
        int | None,
        typer.Option(min=2, max=10_000, help="Run each file K times, another fold held out each time.", show_default=False),
    ] = None,
    sweep: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Try the values of a sweep file, a run for each.", show_default=False)
    ] = None,
    campaign: Annotated[
        str | None, typer.Option(help="Name of what these runs are part of, for list, report and W&B.", show_default=False)
    ] = None,
    array_limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1_000_000,
            help="Runs of one job array at once; all on Slurm, 1 with --cluster local.",
            show_default=False,
        ),
    ] = None,
    after: Annotated[
        list[str] | None, typer.Option(metavar="RUN", help="Start when RUN has finished well; may be repeated.")
    ] = None,
    max_gpu_hours: options.MaxGpuHours = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the runs have ended; exit code 1 if one failed.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Watch the run to its end and print the result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects with run, job_id and path.")] = False,
    parsable: Annotated[bool, typer.Option("--parsable", help="Print run and job id, tab-separated.")] = False,
    partition: Annotated[
        str | None, typer.Option(help="Partition to use instead of the profile's.", show_default=False)
    ] = None,
    account: Annotated[
        str | None, typer.Option(help="Account that pays, instead of the profile's.", show_default=False)
    ] = None,
    qos: Annotated[str | None, typer.Option(help="Quality of service, instead of the profile's.", show_default=False)] = None,
    constraint: Annotated[
        str | None, typer.Option(help="Features that nodes must have, such as a100|h100.", show_default=False)
    ] = None,
    exclude: Annotated[str | None, typer.Option(help="Nodes not to use, such as n1,n[3-5].", show_default=False)] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="Number of nodes, instead of the job file's.", show_default=False)
    ] = None,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(
            min=0, max=1024, help="GPUs of each node, instead of the job file's; 0 trains on CPUs.", show_default=False
        ),
    ] = None,
    time: Annotated[str | None, typer.Option(metavar="HH:MM:SS", help="Time limit of one job.", show_default=False)] = None,
) -> None:
    """Submit job files to Slurm, or run them on this machine with --cluster local.

    \b
    hpc-cifar submit quickstart --cluster local --follow
    hpc-cifar submit jobs/deep300.yaml --dry-run
    hpc-cifar submit deep300 --partition gpu --time 02:00:00 --set optimizer.lr=0.01
    hpc-cifar submit deep300 --sweep sweep.yaml --array-limit 4
    hpc-cifar submit jobs/*.yaml --seeds 10 --array-limit 8 --campaign table2
    """
    from .. import files
    from ..config.cluster import with_overrides
    from ..config.expand import expand
    from ..config.packaged import find_job
    from ..errors import UsageError

    if sum((as_json, parsable, follow)) > 1:
        raise UsageError("--json, --parsable and --follow: use one of them")
    if dry_run and (as_json or parsable or follow or wait):
        raise UsageError("--dry-run submits nothing: leave out --json, --parsable, --follow and --wait")
    root, data_root = files.runs_root(), files.data_root()
    if sweep is not None and campaign is None:
        campaign = f"{sweep.stem}-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}"
    changes = [*(sets or []), *([f"tracking.group={json.dumps(campaign, ensure_ascii=False)}"] if campaign is not None else [])]
    paths = [find_job(name) for name in job]
    elements: list[Element] = []
    for label, point, more in _points(sweep, paths, changes, bool(seeds or kfold)):
        experiments = [
            with_resources(experiment, nodes=nodes, gpus_per_node=gpus_per_node, time=time)
            for experiment in _load(paths, [*changes, *more])
        ]
        experiments = _with_weights(experiments, data_root, dry_run)
        elements += expand(experiments, seeds=seeds, folds=kfold, label=label, point=point, before=len(elements))
    chosen = with_overrides(
        chosen_cluster(cluster, dry_run),
        partition=partition, account=account, qos=qos, constraint=constraint, exclude=exclude,
    )  # fmt: skip
    if dry_run:
        if len(elements) == 1 and sweep is None:
            _print_preview(elements[0], chosen, root, data_root, max_gpu_hours, after or [])
        else:
            _print_previews(elements, chosen, root, data_root, max_gpu_hours, array_limit, after or [])
        return
    done: list[Submitted] = []
    for made in _submitted(elements, chosen, root, data_root, max_gpu_hours, array_limit, after or []):
        done += made
        _print_submitted(made, chosen, quiet=as_json, parsable=parsable)
    if as_json:
        rows = [_row(made) for made in done]
        typer.echo(json.dumps(rows, indent=2))
    if follow or wait:
        _watch(done, follow=follow)


def _points(
    file: Path | None, paths: list[Path], changes: list[str], several: bool
) -> list[tuple[str, Point | None, list[str]]]:
    """Label, place in the sweep and ``--set`` changes of each of its points; one that changes nothing without a sweep."""
    if file is None:
        return [("", None, [])]
    from ..config.load import load_sweep
    from ..config.sweep import as_sets
    from ..errors import UsageError
    from ..launch.sweep import points

    loaded = load_sweep(file)
    if several and (loaded.method == "bayes" or loaded.prune):
        why = "its runs choose their own values" if loaded.method == "bayes" else "those given up would be missing in the means"
        raise UsageError(f"--seeds and --kfold do not go with this sweep: {why}; use them with the winner")
    for corner in loaded.corners():
        for experiment in _load(paths, [*changes, *as_sets(corner)]):
            if experiment.data.validation == "test":
                said = "a sweep would choose by the test set, since data.validation is test"
                raise UsageError(f"{experiment.name}: {said}; add --set data.validation=0.1")
    found = points(loaded)
    width = len(str(len(found) - 1))
    return [(f"t{one.number:0{width}}", one, as_sets(one.values or {})) for one in found]


def _load(paths: list[Path], sets: list[str]) -> list[Experiment]:
    """All files, or every problem of all of them."""
    from ..config.load import check
    from ..errors import ConfigError

    loaded, problems = check(paths, sets)
    if problems:
        raise ConfigError(problems)
    return [experiment for _, experiment in loaded]


def _with_weights(experiments: list[Experiment], data_root: Path, dry_run: bool) -> list[Experiment]:
    from ..errors import UsageError
    from ..launch.weights import with_weights

    try:
        return with_weights(experiments, data_root, copy=not dry_run)
    except UsageError as error:
        if not dry_run:  # which works before anything is prepared
            raise
        for line in str(error).splitlines():
            typer.echo(f"warning: submit would refuse this: {line}", err=True)
        return experiments


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


def chosen_cluster(name: str | None, dry_run: bool) -> Cluster:
    from ..config.cluster import find_cluster, overshadowed
    from ..launch.submit import have_sbatch

    # a dry run shows what Slurm would get, on a machine without Slurm too
    found = find_cluster(name, have_sbatch=dry_run or have_sbatch())
    if (name is None or "/" not in name) and (path := overshadowed(found.name)):
        typer.echo(f"hpc-cifar: {path} is not used: {found.name} is built in; name it by its path, or rename it", err=True)
    return found


def _submitted(
    elements: list[Element],
    cluster: Cluster,
    root: Path,
    data_root: Path,
    max_gpu_hours: float | None,
    limit: int | None,
    after: list[str],
) -> Iterator[list[Submitted]]:
    """One plain job, or arrays of many; those of an array together."""
    from ..launch import submit as launch
    from ..launch import submit_many

    if len(elements) == 1 and elements[0].point is None:
        [one] = elements
        yield [
            launch.submit(
                one.experiment,
                cluster,
                root=root,
                data_root=data_root,
                max_gpu_hours=max_gpu_hours,
                after=after,
                title=one.title,
            )
        ]
        return
    yield from submit_many.submit_all(
        elements, cluster, root=root, data_root=data_root, max_gpu_hours=max_gpu_hours, limit=limit, after=after
    )


def _print_preview(
    one: Element, cluster: Cluster, root: Path, data_root: Path, max_gpu_hours: float | None, after: list[str]
) -> None:
    from ..errors import LaunchError
    from ..launch import dependency
    from ..launch import submit as launch
    from . import console

    waits = dependency.resolve(after, root, cluster.executor)
    shown = launch.preview(one.experiment, cluster, root=root, data_root=data_root, after=waits, title=one.title)
    expected = console.expectations(shown.start, shown.length, shown.plan)
    console.plan_facts(one.experiment.name, cluster, shown.plan, expected)
    if shown.script is None:
        typer.echo("\nthe local executor has no script: the processes start on this machine")
    else:
        typer.echo(f"\n{shown.script}")
    launch.check_budget(shown.plan, cluster, max_gpu_hours)
    if shown.refusal is not None:
        raise LaunchError(shown.refusal)


def _print_previews(
    elements: list[Element],
    cluster: Cluster,
    root: Path,
    data_root: Path,
    max_gpu_hours: float | None,
    limit: int | None,
    after: list[str],
) -> None:
    from ..errors import LaunchError
    from ..launch import submit_many
    from . import several

    shown = submit_many.preview(elements, cluster, root=root, data_root=data_root, limit=limit, after=after)
    several.preview(shown, cluster)
    submit_many.check_budget([planned for one in shown for planned in one.group], cluster, max_gpu_hours)
    if refusals := [one.refusal for one in shown if one.refusal is not None]:
        raise LaunchError("; ".join(dict.fromkeys(refusals)))


def _print_submitted(together: list[Submitted], cluster: Cluster, *, quiet: bool, parsable: bool) -> None:
    from . import console, several

    if parsable:
        for made in together:
            typer.echo(f"{made.run.id}\t{made.job_id}")
    elif len(together) > 1 and not quiet:
        several.submitted(together, cluster.name)
    elif not quiet:
        [made] = together
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
    from ..launch.several import wait_all
    from . import several

    runs = [made.run for made in done]
    try:
        ended = several.follow(runs) if follow else wait_all(runs)
    except KeyboardInterrupt:
        if not follow:
            names = " ".join(run.id for run in runs[:3]) + " ..." * (len(runs) > 3)
            typer.echo(f"\n{names} goes on; wait again with: hpc-cifar wait {names}", err=True)
        raise typer.Exit(130) from None
    if any(seen.state not in ("finished", "stopped") for seen in ended):
        raise typer.Exit(1)
