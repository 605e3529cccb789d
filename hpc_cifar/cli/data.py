"""``hpc-cifar prepare``: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def prepare(
    dataset: Annotated[str, typer.Argument(help="cifar10, digits, or a name for your own class folders.")] = "cifar10",
    archive: Annotated[
        Path | None,
        typer.Option(help="Official tar.gz, tar of images, or a folder of either layout.", envvar=None, show_default=False),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder of all datasets; HPC_CIFAR_DATA, else ./data.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build anew, even from another source than before.")] = False,
    download: Annotated[bool, typer.Option(help="Whether the official archive may be fetched from the internet.")] = True,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for another prepare of the same dataset.")] = False,
    fallback: Annotated[
        bool, typer.Option("--or-digits", help="Prepare digits where there is neither an archive nor a network.")
    ] = False,
    print_dataset: Annotated[
        bool, typer.Option("--print-dataset", help="Print only the name of what was prepared; all else goes to stderr.")
    ] = False,
) -> None:
    """Find or download a dataset, verify it and build its store.

    The source is --archive, else HPC_CIFAR_ARCHIVE, else the store that is there, else the download.
    """
    from rich.console import Console

    from .. import files
    from ..data import download as downloads
    from ..data import prepare as preparing

    console = Console(stderr=print_dataset)
    folder = root.expanduser().absolute() if root else files.data_root()
    try:
        made = preparing.prepare(
            dataset, archive=archive, root=folder, force=force, download=download, wait=wait, console=console
        )
    except downloads.Unreachable as error:
        if not fallback:
            raise
        reason = str(error).partition("; ")[0]
        console.print(
            f"no archive and no download ({reason}): using scikit-learn's digits instead of {dataset}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        made = preparing.prepare("digits", archive=None, root=folder, force=force, wait=wait, console=console)
    if print_dataset:
        typer.echo(made.dataset)
