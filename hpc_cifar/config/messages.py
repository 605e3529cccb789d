"""The words of configuration errors: ``file:line: field: what is wrong, what would be right``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .fields import shown

# What people write for it elsewhere; offered only where the name on the right is valid.
_ELSEWHERE = {
    "activation": "relu",
    "avgpool": "avg_pool",
    "batch": "batch_size",
    "batchnorm": "batch_norm",
    "bn": "batch_norm",
    "bs": "batch_size",
    "channels": "filters",
    "conv2d": "conv",
    "fc": "dense",
    "gpus": "gpus_per_node",
    "kernel_size": "kernel",
    "learning_rate": "lr",
    "linear": "dense",
    "max_epochs": "epochs",
    "maxpool": "max_pool",
    "maxpool2d": "max_pool",
    "onecycle": "one_cycle",
    "out_channels": "filters",
    "p": "rate",
    "wd": "weight_decay",
}


@dataclass(frozen=True, order=True)
class Place:
    """Where a value was written; line 0 means the file as a whole, or a command-line option."""

    file: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True, order=True)
class Problem:
    """One line of a ConfigError."""

    place: Place
    field: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.place), self.field, self.message) if part)


def shown_path(path: Path | str) -> str:
    """A file name as a message may print it: control characters escaped."""
    text = str(path)
    return text if text.isprintable() and len(text) <= 300 else shown(text, 300)


def shown_key(key: str) -> str:
    """A key inside a field path."""
    return key if key.isprintable() and 0 < len(key) <= 60 and ":" not in key else shown(key)


def closest(word: str, names: Iterable[str]) -> str | None:
    """The one of ``names`` that was probably meant."""
    names = list(names)
    lowered = word[:80].lower().replace("-", "_")
    by_spelling = {name.lower().replace("-", "_"): name for name in names}
    if lowered in by_spelling:
        return by_spelling[lowered]
    if _ELSEWHERE.get(lowered) in names:
        return _ELSEWHERE[lowered]
    close = difflib.get_close_matches(lowered, by_spelling, n=1, cutoff=0.6)
    return by_spelling[close[0]] if close else None


def did_you_mean(word: str, names: Sequence[str], what: str = "valid keys") -> str:
    """``did you mean 'x'?``, or the list of all names if none is close."""
    guess = closest(word, names)
    if guess is not None and guess != word:
        return f"did you mean '{guess}'?"
    return f"{what} are {', '.join(names)}" if names else f"there are no {what}"
