"""The table of the systems: claimed beside measured, from the rows of the JSON alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from hpc_cifar.config.claim import Claim, bounds, cell
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.config.model import PretrainedModel
from hpc_cifar.report.groups import MEASURES, margin_of, spread

Json = dict[str, Any]

FIGURES = ("train_accuracy", "train_loss", "val_accuracy", "val_loss", "test_accuracy", "test_loss")
TEST_IMAGES = 10_000
HEADS = ("verdict", "stopped at epoch", "time", "runs")


def claim_of(entry: Json) -> Claim | None:
    """What the source of a system claims, as it is kept with the figures."""
    return Claim.model_validate(entry["claim"]) if entry["claim"] else None


def claimed(claim: Claim | None, figure: str) -> tuple[float | None, float | None] | None:
    """The least and the most of a claimed figure, None where it is open; None without a claim. A number is both."""
    found = getattr(claim, figure, None)
    return None if found is None else bounds(found)


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
    rows, claim = counted(entry), claim_of(entry)
    for figure in MEASURES:
        limits = claimed(claim, figure)
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
    rows, claim = counted(entry), claim_of(entry)
    found = []
    for figure in FIGURES:
        values = [row[figure] for row in rows if row.get(figure) is not None]
        mean = statistics.mean(values) if values else None
        deviation = f" ± {cell(statistics.stdev(values), figure)}" if len(values) > 1 else ""
        found.append(f"{cell(getattr(claim, figure, None), figure)} / {cell(mean, figure)}{deviation}")
    when = duration(3600 * claim.hours) if claim and claim.hours else "-"
    taken = duration(statistics.mean(row["seconds"] for row in rows))
    if restarts := sum(row.get("restarts") or 0 for row in rows):
        taken += f" ({restarts} restart{'s' * (restarts > 1)})"
    stops = ", ".join(str(row["epochs"]) for row in rows)
    return [
        name, str(len(rows)), *found, verdict(entry) or "-",
        f"{(claim and claim.epochs) or '-'} / {stops}", f"{when} / {taken}",
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
    claim = experiment.claim
    claims = [f"{cell(getattr(claim, figure, None), figure)} / -" for figure in FIGURES]
    when = duration(3600 * claim.hours) if claim and claim.hours else "-"
    row = [
        name, "-", *claims, "-", f"{(claim and claim.epochs) or '-'} / -", f"{when} / -",
        f"waits for ImageNet weights: `{weights}`, then `{command}`",
    ]  # fmt: skip
    return f"| {' | '.join(row)} |"


def summary(systems: Mapping[str, Json]) -> str:
    """How many match or beat what their sources claim."""
    found = [word for entry in systems.values() if entry["measured"] and (word := verdict(entry))]
    good = sum(word != "below" for word in found)
    above = sum(word == "above" for word in found)
    return f"Of {len(found)} measured systems with a claimed accuracy, {good} match or beat it ({above} beat it)."
