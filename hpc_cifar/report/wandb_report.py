"""The same report in Weights & Biases: its tables as text, and panels over the runs that are there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..config.difference import system
from ..errors import TrackingError, UsageError, first_line
from ..track import identity
from ..track.login import quiet_client, server
from . import groups as grouped
from .facts import Facts, shown
from .groups import Group
from .page import accuracy, again, duration, number
from .text import markdown, table

MOST_FIELDS, MOST_SEGMENTS = 12, 200
SEVERAL_DECADES = 100.0  # between the least and the greatest value of a field whose axis is logarithmic
PICTURES = ["evaluation/test-confusion", "evaluation/test-misclassified", "evaluation/training-batch"]


def publish(groups: Sequence[Group], title: str) -> str:
    """Make the report; its address.

    Raises:
        UsageError: the runs are in several projects, or one has not been uploaded.
        TrackingError: W&B does not answer, or does not want it.
    """
    runs = [one for group in groups for one in group.runs]
    if absent := [one.id for one in runs if not identity.is_there(one.run)]:
        raise UsageError(f"--wandb: {absent[0]} is not in W&B yet: hpc-cifar sync {absent[0]}")
    places = [identity.kept(one.run) for one in runs]
    projects = {(place.base_url, place.entity, place.project) for place in places}
    if len(projects) > 1:
        raise UsageError(f"--wandb: these runs are in {len(projects)} projects of W&B; a report is of one")
    [(_, entity, project)] = projects
    if where := identity.address(places[0], server()):
        os.environ["WANDB_BASE_URL"] = where  # the report is saved by a client of its own
    quiet_client()
    import wandb
    import wandb_workspaces.reports.v2 as wr

    try:
        owner = entity or wandb.Api().default_entity
        made = wr.Report(entity=owner, project=project, title=title[:128], width="fluid", blocks=_blocks(groups, title))
        made.save()
        return str(made.url)
    except Exception as error:  # whatever the client does
        raise TrackingError(f"W&B: {first_line(error)}") from None


def _blocks(groups: Sequence[Group], title: str) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    runs = [one for group in groups for one in group.runs]
    ids = ", ".join(f'"{one.id}"' for one in runs)
    only = f"Config('run') in [{ids}]"
    key = _key(groups)
    systems = wr.Runset(name=title[:64], filters=only, groupby=[f"config.{key}"])
    spread: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
    curves = {
        "Accuracy by epoch": ["val_accuracy", "train_accuracy"],
        "Loss by epoch": ["val_loss", "train_loss"],
        "Learning rate by epoch": ["lr"],
        "Throughput by epoch": ["images_per_second"],
    }
    bars = {"Test accuracy": "test_accuracy", "Restarts": "restarts", "GPU-hours": "gpu_hours"}
    together = [
        *(wr.LinePlot(title=words, x="epoch", y=y, **spread) for words, y in curves.items()),
        *(wr.BarPlot(title=words, metrics=[name], groupby=wr.Config(key), **spread) for words, name in bars.items()),
    ]
    alone = [
        *_swept(groups),
        wr.MediaBrowser(title="Pictures", media_keys=PICTURES, num_columns=2),
        wr.RunComparer(diff_only="split"),
    ]
    blocks = [wr.MarkdownBlock(text=markdown(groups, title)), wr.PanelGrid(runsets=[systems], panels=together)]
    blocks.append(wr.PanelGrid(runsets=[wr.Runset(name=f"{title[:57]}: runs", filters=only)], panels=alone))
    texts = [_classes(groups), _segments(runs), _differences(groups)]
    blocks += [wr.MarkdownBlock(text=text) for text in texts if text]
    for group in groups:
        commands, file = again(group)
        commit = (group.runs[0].provenance.get("git") or {}).get("commit")
        lines = [f"git checkout {commit}", *commands] if commit else commands
        blocks += [wr.H3(text=f"Again: {group.title}"), wr.CodeBlock(code="\n".join(lines), language=None)]
        blocks.append(wr.CodeBlock(code=file, language="yaml"))
    return blocks


def _key(groups: Sequence[Group]) -> str:
    """The field of the config by which repetitions are together: the one that tells the systems apart, if it says it all."""
    names = {group.runs[0].experiment.name for group in groups}
    fields = grouped.telling([group.config for group in groups])
    if len(names) > 1 or len(fields) != 1 or not all(_is_plain(group.config.get(fields[0])) for group in groups):
        return "system"
    return fields[0]


def _swept(groups: Sequence[Group]) -> list[Any]:
    """Parallel coordinates from the fields that differ to the figures, where one of them is a number."""
    import wandb_workspaces.reports.v2 as wr

    values = {
        name: [group.config.get(name) for group in groups] for name in grouped.differing([group.config for group in groups])
    }
    plain = {name: known for name, known in values.items() if all(_is_plain(value) for value in known)}
    numbers = {name for name, known in plain.items() if all(_is_number(value) for value in known)}
    if not numbers:
        return []
    chosen = sorted(plain, key=lambda name: name not in numbers)[:MOST_FIELDS]
    columns = [
        wr.ParallelCoordinatesPlotColumn(
            wr.Config(name), display_name=name, log=name in numbers and _spans_decades(plain[name])
        )
        for name in chosen
    ]
    figures = {"val_accuracy.max": "best validation accuracy"}
    if any("test_accuracy" in group.spreads for group in groups):
        figures["test_accuracy"] = "test accuracy"
    columns += [wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(name), display_name=words) for name, words in figures.items()]
    return [wr.ParallelCoordinatesPlot(title="From fields to accuracy", columns=columns)]


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _spans_decades(values: Sequence[Any]) -> bool:
    return bool(min(values) > 0 and max(values) >= SEVERAL_DECADES * min(values))


def _classes(groups: Sequence[Group]) -> str:
    one = shown([one for group in groups for one in group.runs])
    if one is None:
        return ""
    rows = [
        [name, accuracy(scores["precision"]), accuracy(scores["recall"]), accuracy(scores["f1"]), number(scores["images"])]
        for name, scores in one.evaluation["per_class"].items()
    ]
    heads = ["class", "precision", "recall", "F1", "images"]
    return "\n".join([f"## Figures by class of {one.id}", "", *table(heads, rows)])


def _segments(runs: Sequence[Facts]) -> str:
    rows = [
        [one.id, f"{segment.first_step} to {segment.last_step}", duration(segment.ended - segment.begun), segment.ending]
        for one in runs
        if one.restarted
        for segment in one.segments
    ]
    heads = ["run", "steps", "time", "ended"]
    return "\n".join(["## Segments", "", *table(heads, rows[:MOST_SEGMENTS])]) if rows else ""


def _differences(groups: Sequence[Group]) -> str:
    if len(groups) == 1:
        told = [
            [name, grouped.text_of(value), grouped.text_of(default)]
            for name, value, default in grouped.changed(groups[0].runs[0])
        ]
        return "\n".join(["## What differs from the defaults", "", *table(["field", "here", "default"], told)])
    fields = grouped.differing([group.config for group in groups])[:MOST_FIELDS]
    rows = [
        [group.title, system(group.runs[0].experiment), *(grouped.text_of(group.config.get(name)) for name in fields)]
        for group in groups
    ]
    return "\n".join(["## What differs", "", *table(["system", "as `system` in W&B", *fields], rows)])
