"""The table of the systems: claimed beside measured, from the rows of the JSON alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from hpc_cifar.config.experiment import Experiment
from hpc_cifar.config.model import PretrainedModel
from hpc_cifar.report.groups import MEASURES, margin_of, spread

Json = dict[str, Any]

FIGURES = ("train_accuracy", "train_loss", "val_accuracy", "val_loss", "test_accuracy", "test_loss")
TEST_IMAGES = 10_000
HEADS = ("verdict", "stopped at epoch", "time", "runs")


def claimed(figure: float | Mapping[str, float | None] | None) -> tuple[float | None, float | None] | None:
    """The least and the most of a claimed figure, None where it is open; None without a claim. A number is both."""
    if figure is None:
        return None
    if isinstance(figure, Mapping):
        return figure.get("at_least"), figure.get("at_most")
    return figure, figure


def counted(entry: Json) -> list[Json]:
    """The rows that count: of the present job file; as long as there is none, those from before."""
    rows: list[Json] = entry["measured"]
    return (
        [row for row in rows if "digest" in row and not row.get("outdated")]
        or [row for row in rows if not row.get("outdated")]
        or rows
    )


def verdict(entry: Json) -> str:
    """``above``, ``as claimed`` or ``below``, by the first of test, validation and training accuracy that is claimed and
    measured, and the margin of its mean; "" without a claim.
    """
    rows = counted(entry)
    for figure in MEASURES:
        limits = claimed((entry["claim"] or {}).get(figure))
        values = [row[figure] for row in rows if row.get(figure) is not None]
        if limits is None or not values:
            continue
        images = TEST_IMAGES if figure != "val_accuracy" else rows[0].get("validation_images") or TEST_IMAGES
        found = spread(values)
        margin = margin_of(found, images) or 0.0
        low, high = limits
        if low is not None and found.mean < low - margin:
            return "below"
        return "above" if high is not None and found.mean > high + margin else "as claimed"
    return ""


def text(value: float | None, name: str) -> str:
    if value is None:
        return "-"
    return f"{value:.2%}" if name.endswith("accuracy") else f"{value:.4f}"


def claim_text(figure: Any, name: str) -> str:
    limits = claimed(figure)
    if limits is None:
        return "-"
    low, high = limits
    if low == high:
        return text(low, name)
    if low is None:
        return f"at most {text(high, name)}"
    return f"at least {text(low, name)}" if high is None else f"{text(low, name)} to {text(high, name)}"


def duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def time_text(hours: tuple[float | None, float | None] | None) -> str:
    known = [duration(3600 * limit) for limit in dict.fromkeys(hours or ()) if limit is not None]
    return " to ".join(known) or "-"


def heads() -> list[str]:
    return ["job", "n", *(name.replace("_", " ") for name in FIGURES), *HEADS]


def cells(name: str, entry: Json, link: str) -> list[str]:
    """A row of the table; ``link`` is the way to the folder of the JSON, "" for no links."""
    rows, claim = counted(entry), entry["claim"] or {}
    found = []
    for figure in FIGURES:
        values = [row[figure] for row in rows if row.get(figure) is not None]
        mean = statistics.mean(values) if values else None
        deviation = f" ± {text(statistics.stdev(values), figure)}" if len(values) > 1 else ""
        found.append(f"{claim_text(claim.get(figure), figure)} / {text(mean, figure)}{deviation}")
    hours = claimed(claim.get("hours"))
    taken = duration(statistics.mean(row["seconds"] for row in rows))
    if restarts := sum(row.get("restarts") or 0 for row in rows):
        taken += f" ({restarts} restart{'s' * (restarts > 1)})"
    stops = ", ".join(str(row["epochs"]) for row in rows)
    return [
        name, str(len(rows)), *found, verdict(entry) or "-",
        f"{claim.get('epochs') or '-'} / {stops}", f"{time_text(hours)} / {taken}",
        "; ".join(origin(row, link) for row in rows),
    ]  # fmt: skip


def origin(row: Json, link: str) -> str:
    """Run, commit, digest and curve of a row."""
    if "digest" not in row:
        return f"seed {row['seed']}, of an earlier commit"
    parts = [row["run"], str(row["commit"] or "no commit")[:7] + (" with changes" if row.get("uncommitted") else "")]
    parts += [f"`{row['digest'][:8]}`", *(["of an earlier job file"] if row.get("outdated") else [])]
    if link and row.get("curve"):
        parts[0] = f"[{row['run']}]({link}/{row['curve']})"
    return ", ".join(parts)


def lines(systems: Mapping[str, Json], link: str = "") -> list[str]:
    """A Markdown table: claimed / measured, mean and spread over the seeds."""
    table = [f"| {' | '.join(heads())} |", "|---" * len(heads()) + "|"]
    return [*table, *(f"| {' | '.join(cells(name, entry, link))} |" for name, entry in systems.items() if entry["measured"])]


def failures(systems: Mapping[str, Json]) -> list[str]:
    """How those ended that have no figures."""
    found = []
    for name, entry in systems.items():
        for row in entry.get("unfinished", []):
            reason = f" ({row['reason']})" if row.get("reason") else ""
            found += ["", f"Without figures: {name}, seed {row['seed']}: {row['state']}{reason}."]
    return found


def waits(name: str, experiment: Experiment, file: str) -> str:
    """The row of a system that cannot be trained without its pretrained weights."""
    assert isinstance(experiment.model, PretrainedModel)
    weights = f"hpc-cifar prepare --weights {experiment.model.family}/{experiment.model.name}"
    command = f"python benchmarks/systems.py {name} --json docs/results/{file}"
    claims = [f"{claim_text(getattr(experiment.claim, figure), figure)} / -" for figure in FIGURES]
    epochs, hours = getattr(experiment.claim, "epochs", None), claimed(getattr(experiment.claim, "hours", None))
    row = [
        name, "-", *claims, "-", f"{epochs or '-'} / -", f"{time_text(hours)} / -",
        f"waits for ImageNet weights: `{weights}`, then `{command}`",
    ]  # fmt: skip
    return f"| {' | '.join(row)} |"


def summary(systems: Mapping[str, Json]) -> str:
    """How many match or beat what their sources claim."""
    found = [word for entry in systems.values() if entry["measured"] and (word := verdict(entry))]
    good = sum(word != "below" for word in found)
    above = sum(word == "above" for word in found)
    return f"Of {len(found)} measured systems with a claimed accuracy, {good} match or beat it ({above} beat it)."
