"""``hpc-cifar train``: what torchrun starts on every rank, or what runs alone.

The same command starts a run and continues it: its directory is named after the experiment's content.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import lifetime
from . import complete

if TYPE_CHECKING:
    from ..config.experiment import Experiment
    from ..plan import Placement
    from ..runs import Run
    from ..train.distributed import World

VISIBLE_S = 60.0  # for a new run directory to appear on the other nodes of a slow network file system


def train(
    job: Annotated[
        str, typer.Argument(help="A job file, or the name of a packaged job such as quickstart.", autocompletion=complete.jobs)
    ],
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a field, such as optimizer.lr=0.1.")
    ] = None,
    # not --run: torchrun would read it as an abbreviation of its own --run-path
    name: Annotated[
        str | None, typer.Option(help="Name of the run; else the experiment's name and a digest of it.", show_default=False)
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, max=10**15, help="Stop at this step of the whole run.", show_default=False)
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over; a run of this name is set aside.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Go on with another experiment than the run began with.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="Folder of prepared datasets; HPC_CIFAR_DATA, else ./data.", show_default=False)
    ] = None,
) -> None:
    """Train on the processes that are here: one, or those of torchrun, srun or mpirun. The same command continues a run.

    Fields may be options, as `wandb agent` passes them: --optimizer.lr=0.1 is --set optimizer.lr=0.1.

    \b
    hpc-cifar train quickstart
    torchrun --nproc-per-node 2 -m hpc_cifar train jobs/deep300.yaml --max-steps 20
    """
    from .. import files, stages

    stages.done("process")
    from ..config.load import load_experiment
    from ..config.packaged import find_job
    from ..errors import RunError
    from ..launch import job as launch_job
    from ..launch import ranks
    from ..launch.control import here
    from ..runs import Run
    from ..track import identity

    experiment = load_experiment(find_job(job), sets or [])
    ranks.settle()
    data_root = files.expanded(data, f"--data {data}") if data else files.data_root()
    root = files.runs_root()
    if (asked := identity.by_agent()) is not None:
        name = f"{name or experiment.name}-{asked[1]}"  # the agent's next run is another one, and this one again is this one
        if experiment.tracking.wandb == "disabled" and os.environ.get("RANK", "0") == "0":
            typer.echo("note: wandb agent waits for this run, but tracking.wandb is disabled", err=True)
    name = name or run_name(experiment, root)

    if os.environ.get("LOCAL_RANK", "0") == "0":
        launch_job.read_ahead(Run(root / name), data_root, experiment)
    lifetime.collect_later()
    from ..train.distributed import connected
    from ..train.loop import train as train_run
    from ..train.loop import wants_gpu

    stages.done("imports")
    with _collecting_afterwards(), connected(wants_gpu(experiment)) as world:
        found, segment = _agree(world, root, name, experiment, data_root, fresh=fresh, force=force)
        if world.share(found.finished()):
            if world.main:
                _print_result(found, "finished already; --fresh starts over")
            return

        def begin() -> None:
            found.cancel_marker.unlink(missing_ok=True)  # whoever starts it again wants it to run
            found.add_job(executor="train", job_id=segment, tasks=world.size, **here())

        def on_hang(reason: str) -> int:
            launch_job.record_failure(found, RunError(reason), rank=world.rank, segment=segment)
            return 1

        try:
            options: dict[str, Any] = {"max_steps": max_steps, "data_root": data_root, "console": world.main}
            result = train_run(
                found, **options, world=world, begin=begin, segment=segment, job=launch_job.segment(), on_hang=on_hang
            )
        except Exception as error:
            launch_job.record_failure(found, error, rank=world.rank, segment=segment)
            raise
        if world.main:
            _print_result(found, None)
        if result.get("state") in ("cancelled", "failed"):
            raise typer.Exit(1)


def run_name(experiment: Experiment, root: Path) -> str:
    """``<name>-<first 8 hex digits of the experiment's digest>``, or the run of this experiment that an earlier version began.

    Fields that have their default do not count, so that a field which a later version adds changes no name.
    """
    from .. import owner
    from ..errors import RunError
    from ..runs import Run

    values = json.dumps(experiment.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    name = f"{experiment.name}-{hashlib.sha256(values.encode()).hexdigest()[:8]}"
    if not os.path.lexists(root / name):
        for path in sorted(root.glob(f"{experiment.name}-{'[0-9a-f]' * 8}")):
            with contextlib.suppress(RunError, OSError):
                if owner.is_own(path) and Run(path).experiment() == experiment:
                    return path.name
    return name


@contextlib.contextmanager
def _collecting_afterwards() -> Iterator[None]:
    try:
        yield
    finally:
        lifetime.collect_again()


def _agree(
    world: World, root: Path, name: str, experiment: Experiment, data_root: Path, *, fresh: bool, force: bool
) -> tuple[Run, str]:
    """The run directory, which rank 0 finds or makes, and a name for this stretch of the run.

    If rank 0 cannot, it says why, and the others leave without a word.
    """
    from .. import runs
    from ..errors import RunError

    told: tuple[str, str] | None = None
    try:
        if world.main:
            local_world = world.local_size
            options: dict[str, Any] = {"fresh": fresh, "force": force, "world": world.size, "local_world": local_world}
            found = _find_or_create(root, name, experiment, data_root, **options)
            told = found.id, f"train-{secrets.token_hex(4)}"
    finally:
        told = world.share(told)  # also when it failed: the others wait for it
        if told is None and not world.main:
            raise SystemExit(1)
    assert told is not None
    found = runs.named(root, told[0])
    deadline = time.monotonic() + VISIBLE_S
    while not found.experiment_file.is_file():
        if time.monotonic() > deadline:
            raise RunError(
                f"rank {world.rank} on {os.uname().nodename} does not see {found.path}, which rank 0 made: "
                f"is {root} on a disk that all nodes share?"
            )
        time.sleep(0.1)
    return found, told[1]


def _find_or_create(
    root: Path, name: str, experiment: Experiment, data_root: Path, *, fresh: bool, force: bool, world: int, local_world: int
) -> Run:
    from .. import owner, runs
    from ..errors import RunError
    from ..launch import provenance
    from ..launch import submit as launch
    from ..launch.status import is_live, status
    from ..launch.weights import with_weights
    from ..plan import make_plan

    found = runs.named(root, name)
    owner.check_root(root)
    if os.path.lexists(found.path):
        owner.check_name(found.path)
    exists, aside = found.experiment_file.is_file(), None
    if exists and is_live(found):
        raise RunError(f"{found.id} is being trained right now; wait for it, cancel it, or give this one a name with --name")
    if exists and fresh:
        seen = status(found)
        if not seen.ended:  # on another host, perhaps: its files must not move away under it
            raise RunError(f"{found.id} is {seen.state} ({seen.reason}); cancel it there, or give this one a name with --name")
        aside = root / f"{name}-old-{time.strftime('%Y%m%d-%H%M%S')}"
        found.path.rename(aside)
        typer.echo(f"{found.id}: starting over; the run so far is now {aside.name}")
        exists = False
    placement, notes = _placement(experiment, world, local_world)

    def planned() -> tuple[Experiment, dict[str, Any]]:
        stored = launch.checked_train_images(experiment, data_root)
        [weighted] = with_weights([experiment], data_root)
        return weighted, make_plan(weighted, placement, stored, notes).as_dict()

    if exists:
        _go_on_as(found, experiment, planned, force=force)
        return found
    made = runs.create(root, name, *planned(), provenance.collect())
    if aside is not None:
        runs.note_begun_again(made, aside.name)
    return made


def _go_on_as(
    found: Run, experiment: Experiment, planned: Callable[[], tuple[Experiment, dict[str, Any]]], *, force: bool
) -> None:
    """Have a run go on with what its job file says now, if that makes the same updates, or by force.

    Raises:
        RunError: it would make others; the message names the fields.
    """
    from .. import files, runs
    from ..config.difference import differences, matters, without_weights
    from ..errors import RunError
    from ..launch.status import status
    from ..train import begun

    written, wanted = without_weights(found.experiment()), without_weights(experiment)
    changed = differences(written, wanted)
    manifest = begun.manifest(found)  # that file may have been edited: what counts is what the checkpoint was made with
    trained = begun.changes(manifest, experiment) if begun.experiment_of(manifest) is not None else changed
    important = {name: values for name, values in trained.items() if matters(name, *values)}
    if begun.is_forced(found, experiment):
        important = {}
    if not changed and not important:
        return
    if important and not force:
        raise RunError(
            f"{found.id} was begun with another experiment ({begun.words(important)}); --fresh starts over, --name NAME begins "
            "another run, --force goes on from its checkpoint all the same"
        )
    seen = status(found)
    if not seen.ended:  # on another host, perhaps, where it would read this the next time it begins
        raise RunError(
            f"{found.id} is {seen.state}{f' ({seen.reason})' if seen.reason else ''}: its job file cannot change now"
        )
    experiment, plan = planned()
    files.write_sealed(found.path / "plan.json", plan)
    files.write_text(found.experiment_file, runs.experiment_text(experiment))
    if important:
        begun.force(found, experiment)
    typer.echo(f"{found.id}: goes on with {begun.words(important | changed)}")


def _placement(experiment: Experiment, world: int, local_world: int) -> tuple[Placement, tuple[str, ...]]:
    """The processes that are here, and how they differ from what the file asks for."""
    from ..launch.local import visible_gpus
    from ..plan import Placement, requested_placement

    gpus = min(len(visible_gpus()), local_world)
    here = Placement(nodes=max(1, world // local_world), processes_per_node=local_world, gpus_per_node=gpus)
    asked = requested_placement(experiment.resources)
    if (asked.nodes, asked.processes_per_node, asked.gpus_per_node) == (here.nodes, here.processes_per_node, gpus):
        return here, ()
    return here, (f"the file asks for {_describe(asked)}; here: {_describe(here)}",)


def _describe(place: Placement) -> str:
    nodes = f"{place.nodes} node{'s' if place.nodes > 1 else ''}"
    if place.gpus_per_node:
        return f"{nodes} x {place.gpus_per_node} GPU{'s' if place.gpus_per_node > 1 else ''}"
    return f"{nodes} x {place.processes_per_node} CPU process{'es' if place.processes_per_node > 1 else ''}"


def _print_result(found: Run, remark: str | None) -> None:
    from ..launch.status import status
    from . import console

    if remark:
        typer.echo(f"{found.id}: {remark}")
    seen = status(found)
    result = found.result()
    # this very process still lives: the result is the last word
    if seen.state == "failed" and result is not None and result.state:
        import dataclasses

        seen = dataclasses.replace(seen, state=result.state, reason=result.reason)
    console.result_table(found, seen)
