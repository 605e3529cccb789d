"""The charts of a report as plotly figures: data and axes; colours of paper and text are the page's."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Sequence
from typing import Any

from ..config import claim as claims
from .facts import Facts
from .groups import Group, of

# after Okabe and Ito 2008, told apart with every kind of colour vision; each has a contrast of 3 on white and on black
COLOURS = ("#0072b2", "#d55e00", "#00875f", "#c05f96", "#b57a00", "#2b8cbe", "#8c6d31")
DASHES = ("solid", "dash", "dot", "dashdot")
ENDINGS = {"finished": "#00875f", "requeued": "#b57a00", "lost": "#d55e00", "failed": "#d55e00", "open": "#2b8cbe"}
MOST_BARS = 40


def charts(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """Figures by name, in the order of the page: what is there to draw. Each is JSON for Plotly.js."""
    runs = [one for group in groups for one in group.runs]
    made: dict[str, Any] = {}
    lines: dict[str, list[dict[str, Any]]] = {}  # as Plotly.js takes them; its Python objects cost a second for each 300
    if any(one.epochs for one in runs):
        made["accuracy"], lines["accuracy"] = _curves(groups, "accuracy")
        made["loss"], lines["loss"] = _curves(groups, "loss")
        made["images_per_second"], lines["images_per_second"] = _rates(groups)
    if len(groups) > 1 and any(_compared(group) for group in groups):
        made["claims"] = _claims(groups)
    if any(one.restarted for one in runs):
        made["segments"] = _timeline(runs)
    return {name: figure.to_plotly_json() | ({"data": lines[name]} if name in lines else {}) for name, figure in made.items()}


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "dash": DASHES[index // len(COLOURS) % len(DASHES)]}


def _figure(x: str, y: str, **layout: Any) -> Any:
    from plotly import graph_objects

    figure = graph_objects.Figure()  # type: ignore[attr-defined,no-untyped-call]
    axis = {"automargin": True}
    axes = {"xaxis": {"title": {"text": x}, **axis}, "yaxis": {"title": {"text": y}, **axis}}
    figure.update_layout(template="none", hovermode="closest", **axes, **layout)
    return figure


def _curves(groups: Sequence[Group], kind: str) -> tuple[Any, list[dict[str, Any]]]:
    """Over epochs: training and validation of one run; of several the validation, one colour a group."""
    lines = []
    figure = _figure("epoch", kind)
    if kind == "accuracy":
        figure.update_yaxes(tickformat=".0%")
    if max(len(one.epochs) for group in groups for one in group.runs) <= 12:
        figure.update_xaxes(dtick=1)
    form = ":.2%" if kind == "accuracy" else ":.4f"
    alone = len(groups) == 1 and len(groups[0].runs) == 1
    for index, group in enumerate(groups):
        for number, one in enumerate(group.runs):
            for part, name in enumerate(("validation", "training") if alone else ("validation",)):
                field = f"{'val' if name == 'validation' else 'train'}_{kind}"
                rows = [row for row in one.epochs if row.get(field) is not None]
                title = name if alone else f"{group.title}, {one.label}"
                lines.append(
                    {
                        "type": "scatter", "mode": "lines", "x": [row["epoch"] for row in rows],
                        "y": [row[field] for row in rows], "name": title if alone else group.title,
                        "legendgroup": group.title if not alone else name, "showlegend": number == 0,
                        "line": {"width": 1.6, **_style(part if alone else index)},
                        "hovertemplate": f"{title}<br>epoch %{{x}}: %{{y{form}}}<extra></extra>",
                    }
                )  # fmt: skip
    if len(groups) == 1:
        _claimed_lines(figure, groups[0], kind)
    return figure, lines


def _claimed_lines(figure: Any, group: Group, kind: str) -> None:
    """A line at the claimed figure, or at each bound of it."""
    for name in (f"val_{kind}", f"test_{kind}"):
        claimed = group.claimed(name)
        if claimed is None:
            continue
        text = claims.words(claimed, name) if isinstance(claimed, claims.Range) else f"{claimed:g}"
        for bound in dict.fromkeys(bound for bound in claims.bounds(claimed) if bound is not None):
            figure.add_hline(
                y=bound,
                line={"dash": "dot", "width": 1},
                annotation={"text": f"claimed {text}"},
                annotation_position="bottom right",
            )
        return


def _rates(groups: Sequence[Group]) -> tuple[Any, list[dict[str, Any]]]:
    lines = []
    figure = _figure("epoch", "images/s")
    figure.update_yaxes(rangemode="tozero")
    for index, group in enumerate(groups):
        for number, one in enumerate(group.runs):
            rows = [row for row in one.epochs if row.get("images_per_second")]
            title = f"{group.title}, {one.label}"
            lines.append(
                {
                    "type": "scatter", "mode": "lines", "x": [row["epoch"] for row in rows],
                    "y": [row["images_per_second"] for row in rows], "name": group.title, "legendgroup": group.title,
                    "showlegend": number == 0 and len(groups) > 1, "line": {"width": 1.4, **_style(index)},
                    "hovertemplate": f"{title}<br>epoch %{{x}}: %{{y:,.0f}} images/s<extra></extra>",
                }
            )  # fmt: skip
    return figure, lines


def _compared(group: Group) -> str | None:
    names = ("test_accuracy", "val_accuracy", "train_accuracy")
    return next((name for name in names if group.claimed(name) is not None and name in group.spreads), None)


def _marks(claimed: claims.Figure) -> list[tuple[float, str]]:
    """Where a claim is marked, and how: a bound points to the values that agree with it."""
    low, high = claims.bounds(claimed)
    if low is not None and low == high:
        return [(low, "diamond-open")]
    kinds = ((low, "triangle-right-open"), (high, "triangle-left-open"))
    return [(bound, symbol) for bound, symbol in kinds if bound is not None]


def _claims(groups: Sequence[Group]) -> Any:
    """A row a system: what its source claims, and mean and spread of what was measured."""
    kept = [(group, figure) for group in groups if (figure := _compared(group))]
    titles = [f"{group.title} ({figure.partition('_')[0]})" for group, figure in kept]
    chart = _figure("accuracy", "", height=120 + 28 * len(kept))
    chart.update_xaxes(tickformat=".1%")
    chart.update_yaxes(autorange="reversed", type="category")
    spreads = [group.spreads[figure] for group, figure in kept]
    marks = [
        (title, bound, symbol, claims.words(claimed, figure))
        for title, (group, figure) in zip(titles, kept, strict=True)
        if (claimed := group.claimed(figure)) is not None
        for bound, symbol in _marks(claimed)
    ]
    # both marks of a range are joined; a gap lies between systems
    joined = [(title, bound) for title, bound, symbol, _ in marks if symbol != "diamond-open"]
    ends: list[tuple[str | None, float | None]] = []
    for (title, bound), (after, other) in itertools.pairwise(joined):
        if title == after:
            ends += [(title, bound), (after, other), (None, None)]
    if ends:
        chart.add_scatter(
            x=[bound for _, bound in ends], y=[title for title, _ in ends], mode="lines", showlegend=False, hoverinfo="skip",
            line={"width": 3, "color": COLOURS[1]},
        )  # fmt: skip
    chart.add_scatter(
        x=[bound for _, bound, _, _ in marks], y=[title for title, *_ in marks], mode="markers", name="claimed",
        marker={"symbol": [symbol for _, _, symbol, _ in marks], "size": 11, "color": COLOURS[1], "line": {"width": 2}},
        customdata=[words for *_, words in marks], hovertemplate="%{y}<br>claimed %{customdata}<extra></extra>",
    )  # fmt: skip
    chart.add_scatter(
        x=[found.mean for found in spreads], y=titles, mode="markers", name="measured",
        error_x={"type": "data", "array": [found.std or 0.0 for found in spreads]},
        marker={"size": 9, "color": COLOURS[0]}, customdata=[of(found) for found in spreads],
        hovertemplate="%{y}<br>measured %{x:.2%} (%{customdata})<extra></extra>",
    )  # fmt: skip
    return chart


def _timeline(runs: Sequence[Facts]) -> Any:
    """When each run trained, and how each stretch ended."""
    kept = [one for one in runs if one.restarted][:MOST_BARS]
    chart = _figure("time (UTC)", "", barmode="overlay", height=120 + 30 * len(kept))
    chart.update_xaxes(type="date")
    chart.update_yaxes(autorange="reversed", type="category")
    for ending in dict.fromkeys(segment.ending for one in kept for segment in one.segments):
        rows = [(one.id, segment) for one in kept for segment in one.segments if segment.ending == ending]
        chart.add_bar(
            orientation="h", name=ending, y=[run for run, _ in rows],
            base=[_clock(segment.begun) for _, segment in rows],
            x=[1000 * max(segment.ended - segment.begun, 0.2) for _, segment in rows],  # milliseconds on an axis of dates
            marker={"color": ENDINGS.get(ending, COLOURS[3]), "line": {"width": 1}},
            customdata=[[s.first_step, s.last_step, round(s.ended - s.begun, 1)] for _, s in rows],
            hovertemplate="%{y}<br>steps %{customdata[0]} to %{customdata[1]}, %{customdata[2]} s<extra></extra>",
        )  # fmt: skip
    return chart


def _clock(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
