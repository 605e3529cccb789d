"""``hpc-cifar train``: what torchrun starts on every rank, or what runs alone.

The same command starts a run and continues it: its directory is named after the experiment's content.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..config.experiment import Experiment
    from ..plan import Placement
    from ..runs import Run

ACKNOWLEDGE_S = 30.0  # for the other ranks to read where the run is, if rank 0 has nothing more to do
WAIT_S = 120.0  # for rank 0 to make the run directory, also over a slow network file system


def train(
    job: Annotated[str, typer.Argument(help="A job file, or the name of a packaged job such as quickstart.")],
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a field, such as optimizer.lr=0.1.")
    ] = None,
    # not --run: torchrun would read it as an abbreviation of its own --run-path
    name: Annotated[
        str | None, typer.Option(help="Name of the run; else the experiment's name and a digest of it.", show_default=False)
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Stop at this step of the whole run.", show_default=False)
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over; a run of this name is set aside.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="Folder of prepared datasets; HPC_CIFAR_DATA, else ./data.", show_default=False)
    ] = None,
) -> None:
    """Train on the processes that are here: one, or those of torchrun. The same command continues an interrupted run.

    \b
    hpc-cifar train quickstart
    torchrun --nproc-per-node 2 -m hpc_cifar train jobs/deep300.yaml --max-steps 20
    """
    from .. import files
    from ..config.load import load_experiment
    from ..config.packaged import find_job
    from ..errors import UsageError
    from ..launch import job as launch_job

    experiment = load_experiment(find_job(job), sets or [])
    rank, world = _whole("RANK", 0), _whole("WORLD_SIZE", 1)
    if not rank < world:
        raise UsageError(f"RANK={rank}, WORLD_SIZE={world}: ranks count from 0 to WORLD_SIZE - 1, as torchrun sets them")
    local_world = _whole("LOCAL_WORLD_SIZE", world)
    data_root = data.expanduser().absolute() if data else files.data_root()
    name = name or run_name(experiment)
    token = launch_token(name, world, local_world)
    root = files.runs_root()
    if rank == 0:
        found = _prepare(root, name, experiment, data_root, fresh=fresh, world=world, local_world=local_world, token=token)
    else:
        found = _join(root, name, token, rank)
    if found.finished():
        if rank == 0:
            _print_result(found, "finished already; --fresh starts over")
        return
    try:
        from ..train.loop import train as train_run

        result = train_run(found, max_steps=max_steps, data_root=data_root, console=rank == 0)
    except Exception as error:
        launch_job.record_failure(found, error, rank=rank, segment=token)
        raise
    if rank == 0:
        _print_result(found, None)
    if result.get("state") in ("cancelled", "failed"):
        raise typer.Exit(1)


def run_name(experiment: Experiment) -> str:
    """``<name>-<first 8 hex digits of the experiment's digest>``."""
    from .. import runs

    digest = hashlib.sha256(runs.experiment_text(experiment).encode()).hexdigest()
    return f"{experiment.name}-{digest[:8]}"


def _whole(name: str, default: int) -> int:
    from ..errors import UsageError

    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdigit():
        raise UsageError(f"{name}: should be a whole number as torchrun sets it, not {text!r}")
    return int(text)


def launch_token(name: str, world: int, local_world: int) -> str:
    """The same on every rank of one launch, and different from every other launch."""
    from ..launch import process

    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_STEP_ID")
    parts = [name, *(os.environ.get(key, "") for key in names)]
    if world == local_world:  # all on this machine: one parent started them
        parent = os.getppid()
        parts += [str(parent), str(process.start_time(parent))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _meeting_file(root: Path, token: str) -> Path:
    return root / f".launch-{token}.json"


def _prepare(
    root: Path, name: str, experiment: Experiment, data_root: Path, *, fresh: bool, world: int, local_world: int, token: str
) -> Run:
    """Rank 0: make or find the run directory, then tell the others, also what went wrong."""
    import atexit

    from .. import files
    from ..errors import HpcCifarError
    from ..launch.control import here

    meeting = _meeting_file(root, token)

    def tell(**what: Any) -> None:
        if world > 1:
            root.mkdir(parents=True, exist_ok=True)
            files.write_json(meeting, what)
            atexit.register(_leave, meeting, world)

    try:
        found = _find_or_create(root, name, experiment, data_root, fresh=fresh, world=world, local_world=local_world)
    except HpcCifarError as error:
        tell(error=str(error))
        raise
    found.cancel_marker.unlink(missing_ok=True)  # whoever starts it again wants it to run
    found.add_job(executor="train", job_id=f"train-{token[:8]}", tasks=world, **here())
    tell(run=found.id)
    return found


def _leave(meeting: Path, world: int) -> None:
    """Rank 0, at its end: take the meeting file away, but not before a slower rank has read it."""
    deadline = time.monotonic() + ACKNOWLEDGE_S
    while len(read := list(meeting.parent.glob(f"{meeting.stem}.rank*"))) < world - 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    for path in (meeting, *read):
        path.unlink(missing_ok=True)


def _find_or_create(
    root: Path, name: str, experiment: Experiment, data_root: Path, *, fresh: bool, world: int, local_world: int
) -> Run:
    from .. import runs
    from ..errors import RunError
    from ..launch import provenance
    from ..launch import submit as launch
    from ..launch.status import is_live
    from ..plan import make_plan

    found = runs.named(root, name)
    exists = found.experiment_file.is_file()
    if exists and is_live(found):
        raise RunError(f"{found.id} is being trained right now; wait for it, cancel it, or give this one a name with --name")
    if exists and fresh:
        aside = root / f"{name}-old-{time.strftime('%Y%m%d-%H%M%S')}"
        found.path.rename(aside)
        typer.echo(f"{found.id}: starting over; the run so far is now {aside.name}")
        exists = False
    placement, notes = _placement(experiment, world, local_world)
    if exists:
        if runs.experiment_text(found.experiment()) != runs.experiment_text(experiment):
            raise RunError(f"{found.id} trains another experiment; use --fresh to start over or --name with another name")
        return found
    stored = launch.stored_train_images(data_root, experiment.data.dataset)
    plan = make_plan(experiment, placement, stored, notes)
    return runs.create(root, name, experiment, plan.as_dict(), provenance.collect())


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


def _join(root: Path, name: str, token: str, rank: int) -> Run:
    """Other ranks: wait until rank 0 says where the run is."""
    from .. import files, runs
    from ..errors import RunError

    meeting = _meeting_file(root, token)
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        told = files.read_json(meeting)
        if isinstance(told, dict):
            meeting.with_suffix(f".rank{rank}").touch()
        if isinstance(told, dict) and "error" in told:
            raise SystemExit(1)  # rank 0 prints it
        if isinstance(told, dict):
            return runs.Run(root / str(told["run"]))
        time.sleep(0.05)
    raise RunError(
        f"rank 0 made no run directory {root / name} within {WAIT_S:.0f} s: is {root} on a disk that all nodes share?"
    )


def _print_result(found: Run, remark: str | None) -> None:
    from ..launch.status import status
    from . import console

    if remark:
        typer.echo(f"{found.id}: {remark}")
    seen = status(found)
    result = found.result() or {}
    if seen.state == "failed" and result.get("state"):  # this very process still lives: the result is the last word
        import dataclasses

        seen = dataclasses.replace(seen, state=str(result["state"]), reason=result.get("reason"))
    console.result_table(found, seen)
