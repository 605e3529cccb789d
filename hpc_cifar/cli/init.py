"""``hpc-cifar init``: a cluster profile from what Slurm says about itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def init(
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file; slurm/<name of the cluster>.yaml without it.", show_default=False),
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Not the default partition.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Write a cluster profile by asking Slurm; each value says where it comes from.

    \b
    hpc-cifar init
    hpc-cifar init --partition gpu --out slurm/gpu.yaml
    """
    from .. import files
    from ..config.experiment import NAME_PATTERN
    from ..config.messages import shown_path
    from ..errors import UsageError
    from ..launch import discover, profile

    found = discover.site()
    one = profile.chosen(found, partition)
    path = out or Path("slurm") / f"{profile.default_name(found)}.yaml"
    if path.suffix not in (".yaml", ".yml") or not NAME_PATTERN.fullmatch(path.stem):
        raise UsageError(f"--out {shown_path(path)}: name a file such as slurm/mine.yaml; the profile is called like its file")
    text = profile.text_of(found, path.stem, one)
    if path.exists() and not force:
        raise UsageError(f"{shown_path(path)}: exists already; use --force to overwrite it, or --out for another file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, text)
    except OSError as error:
        raise UsageError(f"{shown_path(path)}: cannot be written: {error.strerror or error}") from None
    typer.echo(f"wrote {shown_path(path)} for partition {one.name}; look through it, then:")
    typer.echo(f"  hpc-cifar submit JOB --cluster {path.stem if out is None else shown_path(path)} --dry-run")
    with_gpus = [other.name for other in found.partitions if other.biggest and other.biggest.gpu_count]
    if with_gpus and one.name not in with_gpus:
        typer.echo(f"{one.name} has no GPUs; partitions that have some: {', '.join(with_gpus)} (--partition)")
