"""What ``histories.py`` found, for the page on resuming."""

from __future__ import annotations

from typing import Any

RULES = {
    "cancelled never returns": "a cancelled run never returns",
    "a run that can go on does": "a run that can go on does",
    "one action a segment": "one action for a segment",
    "one job at a time": "never two jobs of a run at once",
    "bounded": "bounded without a checkpoint in between",
    "an end says why": "an end says why, and what helps",
    "an end is an end": "what has finished or was pruned stays so",
}


def lines(result: dict[str, Any]) -> list[str]:
    """A table of the rules, and how many histories broke each."""
    if not result:
        return ["Not measured yet: `python benchmarks/histories.py --json docs/results/histories.json`."]
    now, disk, before = (result[name] for name in ("now", "on_disk", "before"))
    rows = [
        f"| {words} | {now['broken'].get(rule, 0):,} | {disk['broken'].get(rule, 0):,} | {before['broken'].get(rule, 0):,} |"
        for rule, words in RULES.items()
    ]
    return [
        f"{now['histories']:,} histories in {now['seconds']:,.0f} s on {result['cores']} cores beside other work "
        f"({now['processor_seconds']:,.0f} s of processor), {disk['histories']:,} over real run directories in "
        f"{disk['seconds']:,.0f} s, and {before['histories']:,} under what decided before this policy "
        "(`docs/results/histories.json`):",
        "",
        "| rule: histories that broke it | now | now, on disk | before |",
        "|---|---|---|---|",
        *rows,
    ]
