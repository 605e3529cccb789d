"""The same report without pictures: Markdown for people, JSON and CSV for programs."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any

from ..errors import UsageError
from ..runs import experiment_text
from . import groups as grouped
from .facts import FIGURES, Facts
from .groups import Group
from .page import accuracy, duration, figure_text, number, typed

RUN_COLUMNS = (
    *("run", "system", "seed", "fold", "state", "epochs", "steps", *FIGURES),
    *("images_per_second", "seconds", "gpu_hours", "restarts", "lost_steps", "goodput", "reason"),
)


def markdown(groups: Sequence[Group], title: str) -> str:
    """Headline, claimed beside measured, and the runs."""
    figures = [name for name in FIGURES if any(name in group.spreads or group.claimed(name) is not None for group in groups)]
    heads = ["system", "verdict", "n", "seeds", *(name.replace("_", " ") for name in figures), "epochs", "time of each"]
    rows = []
    for group in groups:
        cells = [group.title, group.verdict.word, f"{len(group.counted)}/{len(group.runs)}", group.seeds or "-"]
        for name in figures:
            found = group.spreads.get(name)
            spread = f" ± {figure_text(found.std, name)}" if found and found.std is not None else ""
            if found and found.seeds != group.seeds:
                spread += f" ({grouped.of(found)})"
            mean = figure_text(found.mean if found else None, name)
            cells.append(f"{figure_text(group.claimed(name), name)} / {mean}{spread}")
        epochs, seconds, claim = group.spreads.get("epochs"), group.spreads.get("seconds"), group.claim
        hours = claim.hours if claim else None
        cells.append(f"{number(claim.epochs if claim else None)} / {number(epochs.mean if epochs else None, 'g')}")
        cells.append(f"{duration(hours and hours * 3600)} / {duration(seconds.mean if seconds else None)}")
        rows.append(cells)
    lines = [f"# {title}", "", grouped.headline(groups), "", "Claimed / measured, mean ± standard deviation:", ""]
    lines += table(heads, rows)
    if remarks := grouped.remarks(groups):
        lines += ["", *(f"- {remark}" for remark in remarks)]
    heads = ["run", "state", "validation", "test", "images/s", "time", "GPU-hours", "restarts", "lost steps", "goodput"]
    lines += ["", *table(heads, [_cells(one) for group in groups for one in group.runs]), ""]
    return "\n".join(lines)


def _cells(one: Facts) -> list[str]:
    return [
        one.id, one.state, accuracy(one.figures.get("val_accuracy")), accuracy(one.figures.get("test_accuracy")),
        number(one.images_per_second), duration(one.cost.get("seconds")), number(one.cost.get("gpu_hours"), ".3f"),
        number(one.cost.get("restarts")), number(one.cost.get("lost_steps")), number(one.goodput, ".1%"),
    ]  # fmt: skip


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(heads), "|" + "---|" * len(heads), *(line(row) for row in rows)]


def record(one: Facts, group: Group) -> dict[str, Any]:
    """One run as plain values, by the names of :data:`RUN_COLUMNS`."""
    return {
        "run": one.id, "system": group.title, "seed": one.experiment.seed, "fold": one.experiment.data.fold, "state": one.state,
        "epochs": one.epochs[-1]["epoch"] if one.epochs else 0, "steps": one.steps,
        **{name: one.figures.get(name) for name in FIGURES},
        "images_per_second": one.images_per_second,
        **{name: one.cost.get(name) for name in ("seconds", "gpu_hours", "restarts", "lost_steps")},
        "goodput": one.goodput, "reason": one.reason or None,
    }  # fmt: skip


def as_json(groups: Sequence[Group], title: str) -> str:
    """Everything but the curves, which are in ``metrics.jsonl``."""
    systems = [
        {
            "system": group.title,
            "verdict": dataclasses.asdict(group.verdict),
            "seeds": sorted({one.experiment.seed for one in group.counted}),
            "counted": [one.id for one in group.counted],
            "remarks": group.remarks,
            "claim": group.claim.model_dump(exclude_none=True) if group.claim else None,
            "measured": {name: dataclasses.asdict(found) for name, found in group.spreads.items()},
            "config": group.config,
            "runs": [
                record(one, group)
                | {"segments": [dataclasses.asdict(segment) for segment in one.segments]}
                | {
                    "provenance": {
                        name: value for name, value in {**one.provenance, "command": typed(one)}.items() if name != "git"
                    }
                }
                | {"commit": (one.provenance.get("git") or {}).get("commit")}
                for one in group.runs
            ],
        }
        for group in groups
    ]
    return json.dumps({"title": title, "headline": grouped.headline(groups), "groups": systems}, indent=2) + "\n"


def winner(groups: Sequence[Group], name: str) -> str:
    """A job file of the group that is best by validation.

    Raises:
        UsageError: no run with a validation accuracy has finished.
    """
    found = grouped.best(groups)
    if found is None:
        raise UsageError(
            "--winner: none may be chosen: no run has finished, or they validate on the test images, or each on other ones"
        )
    first = found.runs[0]
    tracking = first.experiment.tracking.model_copy(update={"group": None})
    data = first.experiment.data.model_copy(update={"folds": None, "fold": None})
    experiment = first.experiment.model_copy(update={"name": name, "claim": None, "tracking": tracking, "data": data})
    header = [
        f"# {name}: {found.title}, the best of {len(groups)} by validation.",
        "#",
        f"# Measured: {_measured(found, first)} on {first.data}.",
        f"# From:     {', '.join(one.id for one in found.counted)}",
        "",
    ]
    return "\n".join(header) + "\n" + experiment_text(experiment)


def _measured(found: Group, first: Facts) -> str:
    if first.metric == "val_accuracy":
        return f"{grouped.percent(found.spreads['val_accuracy'])} validation accuracy"
    loss = found.spreads["val_loss"]
    return f"{loss.mean:.4f} validation loss ({grouped.of(loss)})"


def as_csv(groups: Sequence[Group]) -> str:
    """A line a run."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, RUN_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(record(one, group) for group in groups for one in group.runs)
    return stream.getvalue()
