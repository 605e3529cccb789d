"""The picture of ``launch/policy.py``: states, events and actions, asked of the policy itself; always the same bytes."""

from __future__ import annotations

import html
import itertools
from dataclasses import dataclass, replace

from hpc_cifar.launch import policy
from hpc_cifar.launch.policy import Act, Action, Event, Knowledge, Word

LEFT, TOP, WIDE, HIGH = 120, 236, 104, 34
WORDS = (
    Word.RUNNING, Word.PREEMPTED, Word.PREEMPTED_ENDING, Word.TIME_LIMIT, Word.QUEUED, Word.NODE_LOST, Word.ENDING,
    Word.CANCELLED, Word.NONE,
)  # fmt: skip
HERE = "this machine"
COLOURS = {
    "requeued": "#cfe3f7", "finished": "#d3efd2", "failed": "#f6cfcb", "cancelled": "#dcdcdc", "stopped": "#fbe7b8",
    "": "#ffffff",
}  # fmt: skip
WHAT = {
    Act.REQUEUE: "requeue", Act.HAND_OVER: "hand over to the link", Act.LEAVE_TO_SLURM: "leave it to Slurm", Act.STOP: "stop",
    Act.END: "end",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """What is done where jobs may go back to the queue, and in a chain where they may not."""

    requeue: Action
    chain: Action


def cell(event: Event, word: Word | None) -> Cell:
    known = Knowledge(slurm=word is not None, word=word or Word.NONE)
    return Cell(policy.decide(event, known), policy.decide(event, replace(known, requeue_allowed=False, link_waits=True)))


def restarts(event: Event) -> int | None:
    """So often a run is restarted after these faults without a checkpoint in between; None if they are not counted."""
    for count in range(policy.DEFAULT_RESTARTS + 2):
        if policy.too_many(event, Knowledge(faults={event: count})):
            return count
    return None


def ways_into() -> dict[str, list[str]]:
    """The events that can lead to each state, whatever is known."""
    found: dict[str, list[str]] = {}
    for event in Event:
        for word, spent in itertools.product(Word, (0, policy.DEFAULT_RESTARTS)):
            for slurm, link, requeue, preemptible in itertools.product((False, True), repeat=4):
                known = Knowledge(slurm, word, False, link, requeue, True, preemptible, {event: spent})
                state = None if word is Word.CANCELLED else policy.decide(event, known).state
                if state is not None and event.value not in found.setdefault(state, []):
                    found[state].append(event.value)
    return found


def text(
    x: float, y: float, words: str, *, size: int = 10, weight: str = "normal", anchor: str = "middle", fill: str = "#222"
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{fill}">'
        f"{html.escape(words)}</text>"
    )


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="#888" stroke-width="0.7"/>'


def wrapped(words: str, most: int) -> list[str]:
    lines = [""]
    for word in words.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > most:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def states(width: float) -> list[str]:
    """The states of a run on top: a segment that runs, and what can follow it."""
    ways = ways_into()
    made = [box(LEFT, 26, 110, 30, "#ffffff"), text(LEFT + 55, 45, "running", size=12, weight="bold")]
    order = ("requeued", "finished", "failed", "cancelled", "stopped")
    each = (width - LEFT - 10) / len(order)
    for number, state in enumerate(order):
        x = LEFT + number * each
        made += [
            f'<path d="M{LEFT + 55} 56 V72 H{x + 60:g} V86" fill="none" stroke="#555" marker-end="url(#to)"/>',
            box(x, 88, 120, 26, COLOURS[state]), text(x + 60, 105, state, size=12, weight="bold"),
        ]  # fmt: skip
        for line, words in enumerate(wrapped(", ".join(ways.get(state, [])), 36)[:5]):
            made.append(text(x, 130 + 13 * line, words, anchor="start"))
    made += [
        f'<path d="M{LEFT} 101 H{LEFT - 24} V41 H{LEFT - 3}" fill="none" stroke="#555" marker-end="url(#to)"/>',
        text(LEFT + 122, 45, "a segment of a run; what can follow it, and after which events", anchor="start", size=11),
    ]
    return made


def picture() -> str:
    """The SVG."""
    columns: list[Word | None] = [*WORDS, None]
    width = LEFT + WIDE * len(columns) + 74
    height = TOP + HIGH * len(Event) + 76
    made = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" role="img" aria-label="What the policy decides for each event and each word of Slurm">',
        '<defs><marker id="to" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#555"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *states(width),
        text(8, TOP - 12, "event", anchor="start", weight="bold"),
        text(LEFT, TOP - 34, "what Slurm says of the job:", anchor="start", size=11),
        text(width - 37, TOP - 21, "restarts", weight="bold"), text(width - 37, TOP - 8, "allowed", weight="bold"),
    ]  # fmt: skip
    for number, word in enumerate(columns):
        for line, words in enumerate(wrapped(word.value if word else HERE, 16)):
            made.append(text(LEFT + WIDE * (number + 0.5), TOP - 21 + 13 * line, words, weight="bold"))
    for row, event in enumerate(Event):
        y = TOP + HIGH * row
        made.append(text(8, y + 21, event.value, anchor="start", weight="bold"))
        for number, word in enumerate(columns):
            found = cell(event, word)
            x = LEFT + WIDE * number
            made.append(box(x, y, WIDE, HIGH, COLOURS[found.requeue.state or ""]))
            same = (found.requeue.act, found.requeue.state) == (found.chain.act, found.chain.state) or word is None
            made.append(text(x + WIDE / 2, y + (21 if same else 14), WHAT[found.requeue.act]))
            if not same:
                if found.requeue.state != found.chain.state:
                    made.append(
                        f'<path d="M{x} {y + HIGH} h{WIDE} v-15 h-{WIDE} z" fill="{COLOURS[found.chain.state or ""]}"/>'
                    )
                made.append(text(x + WIDE / 2, y + 29, WHAT[found.chain.act], size=9, fill="#555"))
        count = restarts(event)
        made.append(text(width - 37, y + 21, "-" if count is None else str(count)))
    y = TOP + HIGH * len(Event) + 22
    for number, (state, colour) in enumerate(COLOURS.items()):
        x = LEFT + 118 * number
        made += [box(x, y - 11, 14, 14, colour), text(x + 20, y, state or "as it was", anchor="start")]
    made.append(text(8, y, "state after it", anchor="start", weight="bold"))
    notes = (
        "Second line: in a chain, where jobs may not go back to the queue, if that is different. A cancel of the run with",
        "hpc-cifar ends it in every case. Restarts: without a checkpoint in between; then the run has failed.",
    )
    for line, words in enumerate(notes):
        made.append(text(8, y + 24 + 14 * line, words, anchor="start"))
    return "\n".join([*made, "</svg>"]) + "\n"
