"""What ``doctor`` says about one part of a machine: a line, and the command that fixes it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """``problem``: jobs will fail or be wrong; ``warning``: something works less well, or not at all, that not every job needs.

    ``fix`` is a command, or what to write where; empty where nothing has to be done.
    """

    name: str
    state: State
    said: str
    fix: str = ""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def ok(name: str, said: str) -> Finding:
    return Finding(name, "ok", said)


def warning(name: str, said: str, fix: str) -> Finding:
    return Finding(name, "warning", said, fix)


def problem(name: str, said: str, fix: str) -> Finding:
    return Finding(name, "problem", said, fix)
