"""What people read about many runs at once."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import terminal
from . import console, status_table

if TYPE_CHECKING:
    from ..config.cluster import Cluster
    from ..launch.status import Status
    from ..launch.submit import Submitted
    from ..launch.submit_many import ArrayPreview
    from ..runs import Run


def submitted(done: Sequence[Submitted], cluster: str) -> None:
    """What was handed over together, in a few lines however many they are."""
    first, last, plan = done[0], done[-1], done[0].plan
    place = plan.placement
    gpus = f", {place.nodes * place.gpus_per_node} GPUs" if place.gpus_per_node else ""
    budget = f", at most {sum(one.plan.gpu_hours for one in done):.2f} GPU-hours for a job of each" if gpus else ""
    each = f"{place.world_size} process{'es' if place.world_size > 1 else ''}{gpus} each"
    array = first.job_id.partition("_")[0]
    print(f"job array {array} on {cluster}: {len(done)} runs, {each}{budget}")
    print(f"  {first.run.id} ({first.job_id}) to {last.run.id} ({last.job_id}); all: hpc-cifar status {array}")
    for note in dict.fromkeys(note for one in done for note in one.plan.notes):
        print(f"  note: {note}")
    for name, text in console.expectations(done[0].start, done[0].length, plan):
        print(f"  {name} of {'the first' if name == 'start' else 'each'}: {console.printable(text)}")


def preview(shown: Sequence[ArrayPreview], cluster: Cluster) -> None:
    """Plan, budget and script of every array, and the budget of them all."""
    for number, one in enumerate(shown):
        group = one.group
        print("\n" * bool(number), end="")
        names = list(dict.fromkeys(planned.experiment.name for planned in group))
        expected = console.expectations(one.start, one.length, group[0].plan)
        console.plan_facts(f"each of {', '.join(names)}" if len(group) > 1 else names[0], cluster, group[0].plan, expected)
        print(
            f"  elements    {len(group)}: {', '.join(planned.element.title for planned in group[:3])}"
            + ", ..." * (len(group) > 3)
        )
        print(
            f"\n{one.script or 'the local executor has no script: the processes start on this machine, one run after another'}"
        )
    planned = [element for one in shown for element in one.group]
    hours = sum(element.plan.gpu_hours for element in planned)
    cores = sum(element.plan.core_hours for element in planned)
    print(f"in all: {len(planned)} runs, at most {hours:.2f} GPU-hours and {cores:.2f} core-hours for a job of each")


def follow(runs: Sequence[Run]) -> list[Status]:
    """Watch runs to their end: one line of counts, which a terminal keeps in place; then a table. One run is shown in full.

    Ctrl-C leaves the runs alone and raises ``KeyboardInterrupt`` again, after saying so.
    """
    from ..launch.several import wait_all

    if len(runs) == 1:
        return [console.follow(runs[0])]
    live, last = sys.stdout.isatty(), ""

    def tick(seen: list[Status]) -> None:
        nonlocal last
        terminal.end_if_nobody_reads()
        line = counts(seen)
        if line != last:
            terminal.draw(f"\r\x1b[K{line}" if live else f"{line}\n")
            last = line

    try:
        ended = wait_all(runs, tick)
    except KeyboardInterrupt:
        print(f"\nthe {len(runs)} runs go on; look again with: hpc-cifar status   stop one with: hpc-cifar cancel {runs[0].id}")
        raise
    if live:
        print()
    print("\n".join(status_table.lines_of(ended)))
    return ended


def counts(seen: Sequence[Status]) -> str:
    """``100 runs: 12 finished, 3 running (epoch 4 to 9), 85 pending``."""
    number = Counter(row.state for row in seen)
    epochs = sorted(row.epoch for row in seen if row.state == "running" and row.epoch is not None)
    words = []
    for state in ("finished", "running", "requeued", "pending", "stopped", "failed", "cancelled"):
        if number[state]:
            at = f" (epoch {epochs[0]} to {epochs[-1]})" if state == "running" and epochs else ""
            words.append(f"{number[state]} {state}{at}")
    return f"{len(seen)} runs: {', '.join(words)}"
