"""The plots of the docs, drawn from the JSON in docs/results; the same JSON gives the same bytes."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable
from typing import Any

import matplotlib
import systems_table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from systems_table import claim_of

from hpc_cifar.config.claim import bounds

Json = dict[str, Any]
Measured = Callable[[str], list[tuple[str, Json]]]

# no date, no random names of elements, text as text: bytes depend on the figures alone
STYLE = {
    "svg.hashsalt": "hpc-cifar", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def hardware(result: Json, *, whole: bool = False) -> str:
    """What computed it: a GPU that was only there does not count."""
    facts, runs = result["hardware"], result.get("measured") or [{}]
    device = result.get("device") or runs[0].get("device")
    if "gpu" in facts and device != "cpu":
        return str(facts["gpu"])
    return f"{facts['cores']} cores of {facts['cpu']}" if whole else f"{facts['cores']} CPU cores"


def bars(axes: Axes, rows: dict[str, list[float]], unit: str) -> None:
    """Medians as bars, least to most as a line, the first row on top."""
    names = list(rows)[::-1]
    middles = [statistics.median(rows[name]) for name in names]
    low = [middle - min(rows[name]) for name, middle in zip(names, middles, strict=True)]
    high = [max(rows[name]) - middle for name, middle in zip(names, middles, strict=True)]
    axes.barh(names, middles, xerr=[low, high], color="#4878a8", ecolor="#222222", capsize=2)
    for number, middle in enumerate(middles):
        end = (max(rows[names[number]]), number)
        axes.annotate(f"{middle:,.0f}", end, va="center", xytext=(5, 0), textcoords="offset points")
    axes.set_xlabel(unit)
    axes.margins(x=0.15)


def data(results: list[tuple[str, Json]]) -> Figure:
    figure = Figure(figsize=(8, 0.5 + 3.2 * len(results)), layout="constrained")
    for axes, (_, result) in zip(figure.subplots(len(results), squeeze=False)[:, 0], results, strict=True):
        bars(axes, result["images_per_second"], "images/s (log)")
        axes.set_xscale("log")
        axes.set_title(f"{result['data']}, {hardware(result)}, n = {result['n']}", loc="left")
    return figure


def step(results: list[tuple[str, Json]]) -> Figure:
    figure = Figure(figsize=(8, 0.5 + 2.4 * len(results)), layout="constrained")
    for axes, (_, result) in zip(figure.subplots(len(results), squeeze=False)[:, 0], results, strict=True):
        bars(axes, {name: rung["images_per_second"] for name, rung in result["rungs"].items()}, "images/s")
        axes.set_title(f"{result['job']}, {result['data']}, {hardware(result)}, n = {result['n']}", loc="left")
    return figure


def restart(results: list[tuple[str, Json]]) -> Figure:
    starts = [(result, start) for _, result in results for start in result["starts"]]
    figure = Figure(figsize=(8, 0.6 + 1.5 * len(starts)), layout="constrained")
    for axes, (result, start) in zip(figure.subplots(len(starts), squeeze=False)[:, 0], starts, strict=True):
        stages = list(dict.fromkeys(stage for name in ("ours", "plain") for row in start[name] for stage in row))
        left = [0.0, 0.0]
        for number, stage in enumerate(stages):
            widths = [statistics.median(row.get(stage, 0.0) for row in start[name]) for name in ("plain", "ours")]
            color = matplotlib.colormaps["tab10"](number % 10)
            axes.barh(["plain script", "hpc-cifar"], widths, left=left, label=stage, color=color)
            left = [before + width for before, width in zip(left, widths, strict=True)]
        axes.set_title(f"{start['processes']} process(es), {hardware(result)}, n = {result['n']}", loc="left")
        axes.set_xlabel("seconds to the first step, medians of the stages")
        axes.legend(ncols=len(stages), fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.35), frameon=False)
    return figure


def scaling(results: list[tuple[str, Json]]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    ticks: set[int] = set()
    for _, result in results:
        points = result["points"]
        counts, rates = [p["processes"] for p in points], [p["images_per_second_median"] for p in points]
        (line,) = axes.plot(counts, rates, label=f"{result['job']}, {hardware(result)}")
        for kind, face in ((False, line.get_color()), (True, "white")):
            chosen = [(x, y) for x, y, p in zip(counts, rates, points, strict=True) if p["modelled"] is kind]
            if not chosen:
                continue
            axes.plot(
                [x for x, _ in chosen], [y for _, y in chosen], "o", color=line.get_color(), markerfacecolor=face,
                label="modelled" if kind else "measured",
            )  # fmt: skip
            for x, y in chosen:
                axes.annotate(f"{y:,.0f}", (x, y), xytext=(6, -12), textcoords="offset points")
        ticks |= set(counts)
        axes.plot(counts, [rates[0] / counts[0] * count for count in counts], ":", color="grey", label="ideal")
    axes.set(xlabel="processes", ylabel="images/s", xscale="log", yscale="log")
    axes.set_xticks(sorted(ticks), [str(count) for count in sorted(ticks)])
    axes.minorticks_off()
    axes.margins(0.15)
    axes.legend()
    return figure


def accuracy(entry: Json) -> float:
    return statistics.mean(run["test_accuracy"] for run in entry["measured"])


def seconds(entry: Json) -> float:
    return statistics.mean(run["seconds"] for run in entry["measured"])


def ladder(results: list[tuple[str, Json]]) -> Figure:
    """Of all trainings that were measured, recipes and published systems."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    groups: dict[str, list[tuple[str, Json]]] = {}
    for name, result in results:
        kind = "recipes" if name.startswith("recipes") else "published systems"
        for job, entry in result["systems"].items():
            groups.setdefault(f"{kind}, {hardware(entry)}", []).append((job, entry))
    for label, entries in groups.items():
        times, found = [seconds(entry) for _, entry in entries], [100 * accuracy(entry) for _, entry in entries]
        axes.plot(times, found, "o", label=label)
        for (job, _), x, y in zip(entries, times, found, strict=True):
            axes.annotate(job, (x, y), xytext=(5, 3), textcoords="offset points")
    axes.set(xscale="log", xlabel="training, validation, checkpoints and test, seconds (log)", ylabel="test accuracy, %")
    axes.margins(x=0.15)
    axes.legend(loc="lower right")
    return figure


def limits(figure: Any) -> list[float]:
    """The ends of a claimed figure, or its one value."""
    return [limit for limit in dict.fromkeys(systems_table.claimed(figure) or ()) if limit is not None]


def claims(results: list[tuple[str, Json]]) -> Figure:
    """Accuracy and cost, claimed and measured, of each system."""
    rows = [(job, entry) for _, result in results for job, entry in result["systems"].items()][::-1]
    figure = Figure(figsize=(9, 1.2 + 0.32 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (_, entry) in enumerate(rows):
        claim = claim_of(entry)
        claimed = (claim.test_accuracy if claim.test_accuracy is not None else claim.val_accuracy) if claim else None
        found = accuracy(entry)
        if claimed is not None:
            low, high = (None if bound is None else 100 * bound for bound in bounds(claimed))
            nearest = min((bound for bound in (low, high) if bound is not None), key=lambda bound: abs(bound - 100 * found))
            left.plot([nearest, 100 * found], [number, number], color="lightgrey", zorder=1)
            if low == high:
                left.plot(low, number, "D", color="#c06030", label="claimed")
            elif low is not None and high is not None:
                left.plot([low, high], [number, number], "-|", color="#c06030", linewidth=3, label="claimed range")
            else:  # points to the values that agree
                left.plot(nearest, number, ">" if high is None else "<", color="#c06030", label="claimed bound")
        left.plot(100 * found, number, "o", color="#4878a8", label="measured")
        if claim and claim.hours:
            right.plot(3600 * claim.hours, number, "D", color="#c06030")
        right.plot(seconds(entry), number, "o", color="#4878a8")
    left.set_yticks(range(len(rows)), [f"{job} ({hardware(entry)})" for job, entry in rows])
    left.set_xlabel("test accuracy, % (claims: test, else validation)")
    right.set(xscale="log", xlabel="seconds (log)")
    handles = dict(zip(*left.get_legend_handles_labels()[::-1], strict=True))
    left.legend(handles.values(), handles.keys())
    return figure


def svg(figure: Figure) -> bytes:
    written = io.BytesIO()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return written.getvalue()


def drawn(measured: Measured) -> dict[str, bytes]:
    """Each plot that has figures behind it, by name."""
    made = {}
    kinds = {"data": data, "step": step, "restart": restart, "scaling": scaling, "systems": claims}
    with matplotlib.rc_context(STYLE):
        for kind, draw in kinds.items():
            if results := measured(kind):
                made[kind] = svg(draw(results))
        if results := [*measured("recipes"), *measured("systems")]:
            made["ladder"] = svg(ladder(results))
    return made
