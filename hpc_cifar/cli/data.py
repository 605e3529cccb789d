"""``hpc-cifar prepare``: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options

if TYPE_CHECKING:
    from rich.console import Console

    from ..data.store import Store


def prepare(
    dataset: Annotated[
        str | None,
        typer.Argument(help="cifar10, cifar100, digits, or a name for your own class folders.", show_default="cifar10"),
    ] = None,
    archive: Annotated[
        Path | None,
        typer.Option(help="Official tar.gz, tar of images, or a folder of either layout.", envvar=None, show_default=False),
    ] = None,
    root: options.DataRoot = None,
    force: Annotated[bool, typer.Option("--force", help="Build anew, even from another source than before.")] = False,
    download: Annotated[bool, typer.Option(help="Whether the official archive may be fetched from the internet.")] = True,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for another prepare of the same dataset.")] = False,
    fallback: Annotated[
        bool, typer.Option("--or-digits", help="Prepare digits where there is neither an archive nor a network.")
    ] = False,
    beton: Annotated[
        bool | None,
        typer.Option("--beton/--no-beton", help="Write FFCV's train.beton; by default where FFCV is.", show_default=False),
    ] = None,
    preview: Annotated[
        Path | None,
        typer.Option(help="Also write a PNG with augmented images from each pipeline.", show_default=False),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="Fetch pretrained weights, such as torchvision/vgg16; without a dataset, these only.", show_default=False
        ),
    ] = None,
    print_dataset: Annotated[
        bool, typer.Option("--print-dataset", help="Print only the name of what was prepared; all else goes to stderr.")
    ] = False,
) -> None:
    """Find or download a dataset, verify it and build its store.

    \b
    hpc-cifar prepare cifar10
    hpc-cifar prepare flowers --archive flowers.tar
    hpc-cifar prepare --weights torchvision/vgg16 --weights torchvision/resnet50:imagenet-v1

    The source is --archive, else HPC_CIFAR_ARCHIVE, else the store that is there, else the download. Class folders are
    train/<class>/*.jpg and test/<class>/*.jpg, or PNG.
    """
    from .. import files, terminal
    from ..data import download as downloads
    from ..data import prepare as preparing

    console = terminal.console(stderr=print_dataset)
    folder = files.expanded(root, f"--root {root}") if root else files.data_root()
    if weights:
        _fetch(weights, folder, console)
        if dataset is None:
            return
    dataset = dataset or "cifar10"
    try:
        made = preparing.prepare(
            dataset, archive=archive, root=folder, force=force, download=download, wait=wait, write_beton=beton, console=console
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
        made = preparing.prepare(
            "digits", archive=None, root=folder, force=force, wait=wait, write_beton=beton, console=console
        )
    if preview:
        _preview(made, files.expanded(preview, f"--preview {preview}"), console)
    if print_dataset:
        typer.echo(made.dataset)


def _fetch(names: list[str], folder: Path, console: Console) -> None:
    from ..models import weights

    for model in [weights.named(name) for name in names]:  # a name that is wrong, before anything is downloaded
        path, source = weights.fetch(model, folder)
        words = f"{weights.name_of(model)}: {path.stat().st_size / 2**20:.1f} MiB in {path} (from {source})"
        console.print(words, markup=False, highlight=False, soft_wrap=True)


def _preview(made: Store, path: Path, console: Console) -> None:
    from ..data import preview
    from ..errors import UsageError

    try:
        names, missing = preview.write(made.train, path)
    except OSError as error:
        raise UsageError(f"--preview {path}: {error.strerror or error}") from None
    for name, why in missing.items():
        console.print(f"preview: without {name}: {why}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"preview: {path} ({', '.join(names)})", markup=False, highlight=False, soft_wrap=True)
