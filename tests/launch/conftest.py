from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "launch"))

from launch_site import Site, command
from queue_site import Queue


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.close()


@pytest.fixture
def queue(site: Site) -> Queue:
    return Queue(site)


@pytest.fixture
def slurm_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make squeue, sacct and scontrol answer; None means that the command fails."""

    def say(squeue: str | None = "", sacct: str | None = None, scontrol: str | None = None) -> None:
        for name, text in (("squeue", squeue), ("sacct", sacct), ("scontrol", scontrol)):
            calls = f"echo {name} >> {tmp_path}/calls; "
            command(tmp_path / "bin", name, calls + ("exit 1" if text is None else f"printf '%s\\n' {shlex.quote(text)}"))
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")

    return say
