"""``hpc-cifar bench``: benchmarks that a user can rerun."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options

app = typer.Typer(help="Measure this machine; each benchmark prints a table and can write JSON.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    pass


@app.command()
def data(
    dataset: Annotated[str, typer.Option(help="A prepared dataset.")] = "cifar10",
    root: options.DataRoot = None,
    images: Annotated[
        int, typer.Option(min=1, max=100_000_000, help="Images of a round; a fifth of it for reference.")
    ] = 50_000,
    batch_size: Annotated[int, typer.Option(min=1, max=1_000_000, help="Images of a batch.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, max=10_000, help="Interleaved; the median counts.")] = 5,
    json: options.FiguresFile = None,
) -> None:
    """All installed data pipelines side by side: images per second of one process.

    \b
    hpc-cifar bench data
    hpc-cifar bench data --dataset digits --batch-size 256 --json data.json
    """
    from .. import files
    from ..data import bench
    from ..data.store import Store

    target = _target(json)
    store = Store.open(files.expanded(root, f"--root {root}") if root else files.data_root(), dataset)
    store.verify_once()
    result = bench.run(store, images, batch_size, rounds, typer.echo)
    if target:
        files.write_json(target, result)
        typer.echo(f"wrote {json}")


@app.command()
def step(
    job: options.Job = "deep300",
    world_size: Annotated[str, typer.Option(help="Numbers of processes; those that are not here are modelled.")] = "1,2,4,8",
    steps: Annotated[int, typer.Option(min=10, max=1_000_000, help="Steps of each; the first few are not counted.")] = 25,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a field, such as training.graph=true.")
    ] = None,
    link_gbytes: Annotated[
        float, typer.Option(min=0.001, max=1e6, callback=options.number, help="GB/s between modelled processes.")
    ] = 100.0,
    link_latency_us: Annotated[
        float, typer.Option(min=0.0, max=1e6, callback=options.number, help="Microseconds of each message between them.")
    ] = 10.0,
    root: options.DataRoot = None,
    json: options.FiguresFile = None,
) -> None:
    """Training steps on several numbers of processes: images per second, and what each process more is worth.

    \b
    hpc-cifar bench step quickstart --world-size 1,2
    hpc-cifar bench step deep300 --world-size 1,2,4,8,16 --set training.compile=true --json scaling.json
    """
    from .. import files
    from ..config.packaged import find_job
    from ..data import bench
    from ..errors import UsageError
    from ..launch.scaling import Link, measure

    target = _target(json)
    parts = [part.strip() for part in world_size.split(",")]
    if not all(1 <= (files.whole(part) or 0) <= 1024 for part in parts):
        raise UsageError(f"--world-size {world_size}: should be whole numbers from 1 to 1024, such as 1,2,4")
    link = Link(link_gbytes * 1e9, link_latency_us / 1e6)
    data_root = files.expanded(root, f"--root {root}") if root else files.data_root()
    result = measure(find_job(job), sets or [], [int(part) for part in parts], steps, data_root, link, typer.echo)
    if target:
        files.write_json(target, result | {"steps": steps, "hardware": bench.hardware(), "versions": bench.versions()})
        typer.echo(f"wrote {json}")


@app.command()
def checkpoint(
    job: options.Job = "deep300",
    batch_size: Annotated[int, typer.Option(min=1, max=1_000_000, help="Images of a step.")] = 256,
    steps: Annotated[int, typer.Option(min=1, max=1_000_000, help="Steps from one checkpoint to the next.")] = 6,
    rounds: Annotated[int, typer.Option(min=1, max=10_000, help="Checkpoints of each kind; the median counts.")] = 5,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a field.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="On the file system to measure; HPC_CIFAR_RUNS, else ./runs.", show_default=False)
    ] = None,
    root: options.DataRoot = None,
    json: options.FiguresFile = None,
) -> None:
    """How long a checkpoint keeps the training waiting, beside a plain torch.save of the same state, by turns in one process.

    \b
    hpc-cifar bench checkpoint
    hpc-cifar bench checkpoint quickstart-digits --batch-size 64 --rounds 3 --folder /tmp
    """
    from .. import files
    from ..config.packaged import find_job
    from ..data import bench
    from ..train import stall

    target = _target(json)
    where = files.expanded(folder, f"--folder {folder}") if folder else files.runs_root()
    experiment = stall.shortened(find_job(job), sets or [], batch_size, steps, rounds)
    result = stall.measure(experiment, files.expanded(root, f"--root {root}") if root else files.data_root(), where)
    typer.echo("\n".join(stall.table(result)))
    if target:
        files.write_json(target, result | {"hardware": bench.hardware(), "versions": bench.versions()})
        typer.echo(f"wrote {json}")


def _target(json: Path | None) -> Path | None:
    from .. import files
    from ..errors import UsageError

    target = files.expanded(json, f"--json {json}") if json else None
    if target and not target.parent.is_dir():
        raise UsageError(f"--json {json}: there is no folder {target.parent}")
    return target
