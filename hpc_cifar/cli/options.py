"""Arguments and options that several commands have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from . import complete

MOST_HOURS = 1e9
MANY = "Run ids, unique prefixes, job or array ids, paths, or last."
RunName = Annotated[str, typer.Argument(help="Run id, unique prefix, job id, path, or last.", autocompletion=complete.runs)]
RunNames = Annotated[list[str], typer.Argument(help=MANY, autocompletion=complete.runs)]
RunNamesOrLast = Annotated[list[str] | None, typer.Argument(help=MANY, show_default="last", autocompletion=complete.runs)]
Owner = Annotated[
    str | None, typer.Option(metavar="USER", help="Runs of that user, as far as you may read them.", show_default=False)
]
CodeOf = Annotated[
    str | None,
    typer.Option(metavar="USER", help="Also runs of that user, whose code runs as yours.", show_default=False),
]
Job = Annotated[str, typer.Argument(help="A job file, or the name of a packaged one.", autocompletion=complete.jobs)]
DataRoot = Annotated[Path | None, typer.Option(help="Folder of all datasets; HPC_CIFAR_DATA, else ./data.", show_default=False)]
FiguresFile = Annotated[Path | None, typer.Option("--json", help="Also write the figures there.", show_default=False)]


def number(value: float | None) -> float | None:
    """Refuse NaN, which lies within all bounds; a callback of options."""
    if value is not None and math.isnan(value):
        raise typer.BadParameter("should be a number, not nan")
    return value


MaxGpuHours = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=MOST_HOURS,
        callback=number,
        show_default=False,
        help="Refuse jobs that together may use more GPU-hours.",
    ),
]
