"""Where people see a run in W&B: the address that its server gave, kept with the run."""

from __future__ import annotations

import re

from .. import files, reading
from ..runs import Run

NAME = "wandb-url"
MOST = 1000  # characters
_ADDRESS = re.compile(rf"https?://[!-~]{{1,{MOST}}}")


def keep(run: Run, address: str) -> None:
    """Note it, if it is an address: a server may say anything."""
    if _ADDRESS.fullmatch(address) and of(run) != address:
        files.write_text(run.path / NAME, address)


def of(run: Run) -> str | None:
    """The address, of ASCII characters that a terminal only shows; None of a run that was never uploaded."""
    try:
        text = reading.read_bytes(run.path / NAME, 2 * MOST).decode()
    except (OSError, ValueError):  # Damaged and what is not UTF-8 are ValueErrors
        return None
    return text if _ADDRESS.fullmatch(text) else None
