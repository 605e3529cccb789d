"""``hpc-cifar evaluate`` and ``export``: parse, call, print."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options

if TYPE_CHECKING:
    from ..runs import Run

Which = Annotated[
    str,
    typer.Option("--checkpoint", help="best, latest or such as step-00000391; else what the run reports.", show_default=False),
]


def evaluate(
    run: options.RunName = "last",
    tta: Annotated[bool, typer.Option("--tta", help="Also average over mirrored and shifted views.")] = False,
    feature_maps: Annotated[
        bool, typer.Option("--feature-maps", help="Draw the first kernels and every layer's maps of an image.")
    ] = False,
    image: Annotated[int, typer.Option(min=0, max=1_000_000_000, help="Number of that image.")] = 0,
    split: Annotated[str, typer.Option(help="test or validation.")] = "test",
    checkpoint: Which = "",
    pictures: Annotated[bool, typer.Option(help="Draw confusion matrix, calibration, curves, mistakes.")] = True,
    root: options.DataRoot = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print evaluation.json.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for PNG and JSON, instead of the run's own.", show_default=False),
    ] = None,
    owner: options.Owner = None,
) -> None:
    """Test a trained run: figures by class, calibration, mistakes; PNG and JSON in the run's evaluation folder.

    \b
    hpc-cifar evaluate last --tta
    hpc-cifar evaluate last --split validation --checkpoint best
    hpc-cifar evaluate last --feature-maps --image 3
    hpc-cifar evaluate /shared/runs/net-20260101-120000-ab12 --out net
    """
    from ..errors import UsageError

    if split not in ("test", "validation"):
        raise UsageError(f"--split {split}: should be test or validation")
    from .. import files
    from .. import owner as owners
    from ..terminal import one_line
    from . import chosen

    [found] = chosen.to_read(run, files.runs_root(), owner)
    own = owners.is_own(found.path)
    if not own and out is None:
        name = owners.name_of(owners.of(found.path))
        raise UsageError(f"{found.path}: is a run of {name}, where you do not write; add --out FOLDER for PNG and JSON")
    from ..train import evaluation, trained

    loaded = trained.load(found, files.expanded(root, f"--root {root}") if root else files.data_root(), checkpoint)
    target = None if out is None else files.expanded(out, f"--out {out}")
    options_: dict[str, Any] = {"tta": tta, "pictures": pictures, "maps_of": image if feature_maps else None, "out": target}
    result, folder = evaluation.evaluate(loaded, split, **options_)
    if as_json:
        import json

        typer.echo(json.dumps(result, indent=2))
    else:
        for line in lines_of(result):
            typer.echo(one_line(line))
        typer.echo(f"\n{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    if own and out is None:
        mirror(found)


def lines_of(result: dict[str, Any]) -> list[str]:
    """The figures for people; with test-time augmentation beside those without."""
    from ..terminal import escaped

    columns = [result, *([result["tta"]] if "tta" in result else [])]
    lines = [
        f"{result['run']}, {result['data']}, {result['images']:,} {result['split']} images, {result['checkpoint']} checkpoint"
    ]
    if len(columns) == 2:
        lines.append(f"{'':22}{'plain':>10}{'augmented':>12} ({columns[1]['views']} views)")
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("accuracy", lambda one: f"{one['accuracy']:.2%}"),
        ("top-5 accuracy", lambda one: f"{one['top5_accuracy']:.2%}"),
        ("loss", lambda one: f"{one['loss']:.4f}"),
        ("macro precision", lambda one: f"{one['macro']['precision']:.4f}"),
        ("macro recall", lambda one: f"{one['macro']['recall']:.4f}"),
        ("macro F1", lambda one: f"{one['macro']['f1']:.4f}"),
        ("calibration error", lambda one: f"{one['ece']:.2%}"),
    ]
    for name, text in rows:
        lines.append(f"{name:22}{text(columns[0]):>10}" + "".join(f"{text(one):>12}" for one in columns[1:]))
    lines += ["", f"{'class':22}{'precision':>10}{'recall':>12}{'F1':>10}{'images':>10}"]
    for name, scores in result["per_class"].items():
        lines.append(
            f"{escaped(name)[:21]:22}{scores['precision']:10.4f}{scores['recall']:12.4f}{scores['f1']:10.4f}{scores['images']:10,}"
        )
    confused = [f"{'/'.join(row['pair'])} {row['images']}" for row in result["most_confused"][:5]]
    return [*lines, "", "most confused: " + (", ".join(confused) or "nothing")]


def mirror(run: Run) -> None:
    """Also to the trackers that the run's metrics go to."""
    from ..errors import RunError
    from ..track import tracker
    from ..track.sync import sync

    say, tracking = partial(typer.echo, err=True), run.experiment().tracking
    for name in tracker.chosen(tracking):
        if tracker.load(name).begins(run, tracking, say):
            try:
                sync(run, lambda _: True, say, to=name)
            except RunError as error:  # the evaluation is there
                say(f"{error}; hpc-cifar sync {run.id} uploads later")


def export(
    run: options.RunName = "last",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The file; RUN.safetensors here.", show_default=False)] = None,
    checkpoint: Which = "",
    root: options.DataRoot = None,
    code_of: options.CodeOf = None,
) -> None:
    """Write a run's weights with classes and preprocessing as one safetensors file, and check it by loading it back.

    \b
    hpc-cifar export last -o mine.safetensors
    """
    from .. import files
    from ..errors import UsageError
    from . import chosen

    [found] = chosen.to_act_on(run, files.runs_root(), code_of)
    path = files.expanded(out or Path(f"{found.id}.safetensors"), f"--out {out}")
    if path.suffix != ".safetensors" or not path.parent.is_dir():
        raise UsageError(f"--out {path}: should end in .safetensors, in a folder that exists")
    from ..train import trained
    from ..train.export import export as write

    loaded = trained.load(found, files.expanded(root, f"--root {root}") if root else files.data_root(), checkpoint)
    try:
        about = write(loaded, path)
    except OSError as error:
        raise UsageError(f"--out {path}: {error.strerror or error}") from None
    size = path.stat().st_size / 2**20
    typer.echo(f"{path}: {size:.1f} MiB, {len(about.classes)} classes, {loaded.which} checkpoint of epoch {loaded.epoch}")
