"""``hpc-cifar bench``: benchmarks that a user can rerun."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure this machine; each benchmark prints a table and can write JSON.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    pass


@app.command()
def data(
    dataset: Annotated[str, typer.Option(help="A prepared dataset.")] = "cifar10",
    root: Annotated[
        Path | None, typer.Option(help="Folder of all datasets; HPC_CIFAR_DATA, else ./data.", show_default=False)
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Images of a round; a fifth of it for reference.")] = 50_000,
    batch_size: Annotated[int, typer.Option(min=1, max=1_000_000)] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved; the median counts.")] = 5,
    json: Annotated[Path | None, typer.Option(help="Also write the figures there.", show_default=False)] = None,
) -> None:
    """All installed data pipelines side by side: images per second of one process."""
    from .. import files
    from ..data import bench
    from ..data.store import Store
    from ..errors import UsageError

    target = json.expanduser().absolute() if json else None
    if target and not target.parent.is_dir():
        raise UsageError(f"--json {json}: there is no folder {target.parent}")
    store = Store.open(root.expanduser().absolute() if root else files.data_root(), dataset)
    result = bench.run(store, images, batch_size, rounds, typer.echo)
    if target:
        files.write_json(target, result)
        typer.echo(f"wrote {json}")
