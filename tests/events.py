"""TensorBoard's own readers, over what a run's mirror has written."""

from __future__ import annotations

from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from hpc_cifar import files
from hpc_cifar.runs import Run


def accumulated(run: Run) -> Any:
    """What TensorBoard shows, without leaving anything out."""
    everything = dict.fromkeys(("scalars", "images", "tensors"), 0)
    found = EventAccumulator(str(run.path / "tensorboard"), size_guidance=everything)
    found.Reload()
    return found


def curve(shown: Any, tag: str) -> list[tuple[int, float]]:
    return [(one.step, one.value) for one in shown.Scalars(tag)]


def records(run: Run) -> int:
    """How many records of rows there are, one by one as they lie in the files."""
    found = [event for path in sorted((run.path / "tensorboard").iterdir()) for event in EventFileLoader(str(path)).Load()]
    tags = [{value.tag.partition("/")[0] for value in event.summary.value} for event in found]
    return sum(bool(tag & {"epoch", "step", "nodes"}) for tag in tags)


def assert_whole(run: Run) -> None:
    """Every figure of every row of ``metrics.jsonl``, once, in order, and nothing else."""
    shown, wanted = accumulated(run), dict[str, list[tuple[int, float]]]()
    rows = [row for row in files.read_json_lines(run.metrics_file) if row["kind"] != "event"]
    for row in rows:
        prefix = {"step": "step/", "system": "nodes/", "epoch": ""}[row["kind"]]
        for name, value in row.items():
            if name not in ("kind", "step", "time") and not (prefix and name == "epoch") and value is not None:
                wanted.setdefault(prefix + name, []).append((row["step"], float(np.float32(value))))
    assert rows and {tag for tag in shown.Tags()["scalars"] if not tag.startswith("result/")} == set(wanted)
    for tag, values in wanted.items():
        assert curve(shown, tag) == values, tag
    assert records(run) == len(rows)
