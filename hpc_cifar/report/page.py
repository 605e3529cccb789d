"""One HTML file that needs nothing else: no server, no network, no other file."""

from __future__ import annotations

import base64
import gzip
import json
import shlex
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ..config import claim as claims
from ..redaction import redact_words
from ..runs import experiment_text, now
from . import charts as drawn
from . import groups as grouped
from .facts import FIGURES, Facts, ranking, shown
from .groups import Group

HEADINGS = {
    "accuracy": "Accuracy by epoch", "loss": "Loss by epoch", "images_per_second": "Throughput by epoch",
    "claims": "Claimed beside measured", "segments": "Segments: when each run trained, and how that ended",
}  # fmt: skip
MOST_MISTAKES, MOST_COLUMNS, MOST_ROWS = 24, 14, 400


def html(groups: Sequence[Group], title: str) -> str:
    """The page; ``groups`` from :func:`hpc_cifar.report.groups.groups_of`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    options: dict[str, Any] = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=PackageLoader("hpc_cifar.report", "."), **options)
    environment.filters |= {"accuracy": accuracy, "figure": figure_text, "number": number, "duration": duration}
    runs = [one for group in groups for one in group.runs]
    charts = drawn.charts(groups)
    evaluated = shown(runs)
    return environment.get_template("page.html").render(
        title=title,
        made=now(),
        headline=grouped.headline(groups),
        remarks=grouped.remarks(groups),
        of=grouped.of,
        groups=groups,
        runs=runs,
        figures=[name for name in FIGURES if any(name in group.spreads or group.claimed(name) is not None for group in groups)],
        headings={name: HEADINGS[name] for name in charts},
        totals={name: _total(runs, name) for name in ("gpu_hours", "seconds")},
        evaluated=evaluated,
        confusion=_confusion(evaluated) if evaluated else None,
        mistakes=_mistakes(evaluated) if evaluated else [],
        columns=_columns(groups),
        differing=len(grouped.differing([group.config for group in groups])),
        changed=grouped.changed(runs[0]),
        text_of=grouped.text_of,
        most_rows=MOST_ROWS,
        typed=typed,
        again=again,
        by_validation=len(runs) > 1 and evaluated is not None and ranking(evaluated) is not None,
        most_bars=drawn.MOST_BARS,
        css=Markup(_file("page.css")),
        js=Markup(_file("page.js")),
        plotly=_packed(_plotly()) if charts else "",
        charts=_packed(json.dumps(charts, allow_nan=False)),
    )


def _file(name: str) -> str:
    return resources.files("hpc_cifar.report").joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    return resources.files("plotly").joinpath("package_data/plotly.min.js").read_text(encoding="utf-8")


def _packed(text: str) -> str:
    """gzip in base64, which is safe in a script element: a third of the size, and the browser need not parse it at once."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _total(runs: Sequence[Facts], name: str) -> float | None:
    known = [one.cost[name] for one in runs if name in one.cost]
    return sum(known) if known else None


def _columns(groups: Sequence[Group]) -> list[str]:
    """Fields in which the groups differ, short ones first; as many as can be read beside each other."""
    configs = [group.config for group in groups]
    names = grouped.differing(configs)
    return sorted(names, key=lambda name: any(isinstance(config.get(name), list) for config in configs))[:MOST_COLUMNS]


def _confusion(one: Facts) -> list[tuple[str, list[tuple[int, float, bool]]]]:
    """Rows of the matrix: the class, and for each prediction the images, their share of the row and whether that is right."""
    classes, matrix = list(one.evaluation["per_class"]), one.evaluation["confusion"]
    return [
        (name, [(count, count / max(sum(row), 1), column == index) for column, count in enumerate(row)])
        for index, (name, row) in enumerate(zip(classes, matrix, strict=True))
    ]


def _mistakes(one: Facts) -> list[dict[str, Any]]:
    """The most confident ones, each with its image as a data URI."""
    folder = one.evaluation_folder
    found = []
    for number, row in enumerate(one.evaluation.get("misclassified", [])[:MOST_MISTAKES]):
        path = folder / "mistakes" / f"{number:02}.png" if folder else Path()
        if path.is_file():
            found.append({**row, "uri": "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()})
    return found


def typed(one: Facts) -> str:
    """The command by which it was submitted, as far as the run knows it."""
    words = redact_words([str(word) for word in one.provenance.get("command") or []])  # an earlier version knew fewer keys
    name = Path(words[0]).name if words else ""
    return shlex.join(["hpc-cifar" if name == "__main__.py" else name, *words[1:]]) if words else ""


def again(group: Group) -> tuple[list[str], str]:
    """Commands that make the runs of a group again from one job file, and that file."""
    first = group.runs[0].experiment
    seeds = sorted({one.experiment.seed for one in group.runs})
    folds = first.data.folds
    command = "hpc-cifar submit experiment.yaml" + (f" --kfold {folds}" if folds else "")
    if seeds == list(range(first.seed, first.seed + len(seeds))):
        commands = [command + (f" --seeds {len(seeds)}" if len(seeds) > 1 else "")]
    else:
        commands = [f"{command} --set seed={seed}" for seed in seeds]
    data = first.data.model_copy(update={"folds": None, "fold": None})
    tracking = first.tracking.model_copy(update={"group": None})
    return commands, experiment_text(first.model_copy(update={"data": data, "tracking": tracking}))


# ---- numbers as text -----------------------------------------------------------------------------------------------------


def accuracy(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def figure_text(value: claims.Figure | None, name: str) -> str:
    """An accuracy in percent, a loss with four digits; a claimed range as its bounds."""
    return claims.cell(value, name)


def number(value: float | None, form: str = ",.0f") -> str:
    return "-" if value is None else format(value, form)


def duration(seconds: float | None) -> str:
    """``1 h 02 min``, ``2 min 03 s`` or ``4.5 s``."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
