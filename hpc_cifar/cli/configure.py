"""``validate``, ``schema`` and ``jobs``: everything about job files that needs no data, no torch and no cluster."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import complete

if TYPE_CHECKING:
    from ..config.experiment import Experiment

STORED_TRAIN_IMAGES = {"cifar10": 50_000, "cifar10-jpeg": 50_000, "cifar100": 50_000}
"""What ``validate`` can count steps from before anything is prepared."""


def validate(
    jobs: Annotated[
        list[str], typer.Argument(metavar="JOB...", help="Job files, or names of packaged ones.", autocompletion=complete.jobs)
    ],
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a field, such as epochs=2.")
    ] = None,
) -> None:
    """Check job files; every problem is one line, file:line: field: what is wrong, what would be right.

    \b
    hpc-cifar validate jobs/mine.yaml slurm/mine.yaml
    hpc-cifar validate quickstart --set epochs=2
    """
    from ..config.load import is_profile, load_cluster
    from ..config.messages import shown_path
    from ..config.packaged import find_job
    from ..errors import ConfigError, UsageError

    problems: list[str] = []
    for job in jobs:
        try:
            path = find_job(job)
            if is_profile(path):
                cluster = load_cluster(path)
                typer.echo(f"ok  {shown_path(path)}  cluster profile {cluster.name}: {cluster.description or cluster.executor}")
            else:
                typer.echo(f"ok  {shown_path(path)}  {_checked(path, sets or ())}")
        except ConfigError as error:
            problems += error.problems
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(problems)


def _checked(path: Path, sets: Sequence[str]) -> str:
    """The summary of a job file that is right."""
    from ..config.load import load_experiment, place_of
    from ..errors import ConfigError, UsageError

    experiment = load_experiment(path, sets)
    try:
        return summary(experiment)
    except UsageError as error:  # a batch smaller than the number of processes: the plan's rule, at the file's line
        raise ConfigError([f"{place_of(path, 'data.batch_size')}: {error}"]) from None


def summary(experiment: Experiment) -> str:
    """``deep300: 551,722 parameters, 76 steps an epoch, 22,800 steps in 300 epochs, ...``."""
    from ..config.model import SequentialModel
    from ..config.shapes import layer_shapes, parameter_count
    from ..plan import make_plan, requested_placement

    resources = experiment.resources
    placement = requested_placement(resources)
    stored = STORED_TRAIN_IMAGES.get(experiment.data.dataset)
    plan = make_plan(experiment, placement, stored or experiment.data.batch_size)
    model = experiment.model
    if isinstance(model, SequentialModel):
        words = [f"{parameter_count(layer_shapes(model)):,} parameters"]
    else:  # counting a backbone's takes torch
        trained = {"frozen": "frozen", "all": "all of it trained"}.get(model.train, f"{model.train} trained")
        words = [f"{model.name} of {model.family} {'' if model.weights else 'without weights '}({trained})"]
    if stored:
        words += [
            f"{plan.steps_per_epoch:,} steps an epoch",
            f"{plan.total_steps:,} steps in {experiment.epochs:,} epoch{'s' if experiment.epochs > 1 else ''}",
        ]
    else:
        words.append(f"{experiment.epochs:,} epochs (steps depend on the prepared dataset {experiment.data.dataset})")
    processes = f"{placement.world_size:,} process{'es' if placement.world_size > 1 else ''}"
    if plan.gpu_hours:
        words.append(f"{processes} on GPUs, at most {plan.gpu_hours:,.3g} GPU-hours")
    else:
        words.append(f"{processes} on CPUs, at most {resources.time}")
    return f"{experiment.name}: {', '.join(words)}"


def schema(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write to this file instead of the terminal.")] = None,
    as_page: Annotated[
        bool, typer.Option("--markdown", help="Every field of job files, sweep files and profiles, for people.")
    ] = False,
) -> None:
    """Print the JSON Schema of job files; name it in a file's first line as # yaml-language-server: $schema=FILE.

    \b
    hpc-cifar schema --out experiment.schema.json
    hpc-cifar schema --markdown
    """
    from .. import files
    from ..config.messages import shown_path
    from ..errors import UsageError

    if as_page:
        from ..config.reference import markdown as made
    else:
        from ..config.schema import schema_text as made
    if out is None:
        typer.echo(made(), nl=False)
        return
    try:
        files.write_text(out, made())
    except OSError as error:
        raise UsageError(f"{shown_path(out)}: cannot be written: {error.strerror or error}") from None
    typer.echo(f"wrote {shown_path(out)}")


def jobs(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Job files or profiles to copy; all without a name.")
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the named ones (all without a name).")] = False,
    into: Annotated[
        Path | None,
        typer.Option("--into", help="Folder that gets the copies; jobs/ and slurm/ without it.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
) -> None:
    """List the job files and cluster profiles that come with hpc-cifar, or copy them out to change them.

    \b
    hpc-cifar jobs
    hpc-cifar jobs quickstart --into my-jobs
    """
    from ..config.fields import shown
    from ..config.messages import did_you_mean
    from ..config.packaged import cluster_files, headline, job_files
    from ..errors import UsageError

    kinds = {"jobs": {path.stem: path for path in job_files()}, "slurm": {path.stem: path for path in cluster_files()}}
    packaged = kinds["slurm"] | kinds["jobs"]
    wanted = [name.removesuffix(".yaml") for name in names or packaged]
    for name in wanted:
        if name not in packaged:
            raise UsageError(f"{shown(name)}: no such packaged file; {did_you_mean(name, list(packaged), 'packaged files')}")
    if copy or names:
        _copy(
            {kinds[folder][name]: into or Path(folder) for folder in kinds for name in wanted if name in kinds[folder]}, force
        )
        return
    width = max(map(len, packaged), default=0)
    for title, folder in (("job files", "jobs"), ("cluster profiles", "slurm")):
        typer.echo(f"{title}:")
        for name, path in kinds[folder].items():
            typer.echo(f"  {name:{width}}  {_first_sentence(headline(path).removeprefix(f'{name}: '))}")
    typer.echo(
        "\nhpc-cifar jobs NAME copies one into jobs/ or slurm/; hpc-cifar submit NAME --cluster NAME runs them as they are"
    )


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=\.) (?=[A-Z])", text)[0].removesuffix(".")  # "et al. 2016" goes on


def _copy(folder_of: dict[Path, Path], force: bool) -> None:
    """Copy files, and the schema that the first line of a job file names; all or, where one is in the way, none."""
    from .. import files
    from ..config.messages import shown_path
    from ..config.schema import schema_text
    from ..errors import UsageError

    in_the_way = [shown_path(into / source.name) for source, into in folder_of.items() if (into / source.name).exists()]
    if in_the_way and not force:
        raise UsageError(f"{', '.join(in_the_way)}: exists already; use --force to overwrite, or --into another folder")
    for source, into in folder_of.items():
        if source.resolve() == (into / source.name).resolve():
            raise UsageError(f"{shown_path(source)}: is the packaged file itself; use --into another folder")
        text = source.read_text(encoding="utf-8")
        try:
            into.mkdir(parents=True, exist_ok=True)
            files.write_text(into / source.name, text)
            if "$schema=experiment.schema.json" in text:
                files.write_text(into / "experiment.schema.json", schema_text())
        except OSError as error:
            raise UsageError(f"{shown_path(into)}: cannot be written: {error.strerror or error}") from None
        typer.echo(f"wrote {shown_path(into / source.name)}")
