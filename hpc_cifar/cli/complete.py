"""What Tab offers for names: job files, cluster profiles, runs, campaigns. Nothing that goes wrong here reaches the shell."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..runs import Run

RECENT = 50  # runs that are offered, the newest first


def jobs(incomplete: str) -> list[str]:
    """Packaged jobs by name, and files."""
    from ..config.packaged import job_files

    return _beginning(incomplete, (path.stem for path in job_files())) + list(_paths(incomplete))


def clusters(incomplete: str) -> list[str]:
    """Profiles by name, and files."""
    from ..config.cluster import known_clusters

    return _beginning(incomplete, known_clusters()) + list(_paths(incomplete))


def runs(incomplete: str) -> list[str]:
    """``last``, and the newest runs."""
    return _beginning(incomplete, ["last"]) + _beginning(incomplete, (run.id for run in _runs()))[:RECENT]


def campaigns(incomplete: str) -> list[str]:
    """Those of the runs that there are, the latest first."""
    return _beginning(incomplete, dict.fromkeys(group for run in _runs() if (group := run.campaign)))


def _runs() -> list[Run]:
    """The newest first."""
    from .. import files
    from ..errors import HpcCifarError
    from ..runs import all_runs

    with contextlib.suppress(OSError, HpcCifarError):  # a folder that cannot be read; ~ of somebody who is not there
        return all_runs(files.runs_root())[::-1]
    return []


def _beginning(text: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(text)]


def _paths(incomplete: str) -> Iterator[str]:
    """YAML files and the folders that may hold some, where a path has been begun."""
    begun = Path(incomplete or ".")
    folder = begun if incomplete.endswith("/") or not incomplete else begun.parent
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            shown = str(path) if not incomplete.startswith("./") else f"./{path}"
            if path.name.startswith(".") or not shown.startswith(incomplete):
                continue
            if path.is_dir():
                yield f"{shown}/"
            elif path.suffix in (".yaml", ".yml"):
                yield shown
