"""Tables in the docs are those that their JSON gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("page", "script", "figures"), [("systems.md", "systems.py", "systems-2-cores.json")])
def test_a_table_is_what_its_figures_give(repository: Path, page: str, script: str, figures: str) -> None:
    command = [sys.executable, str(repository / "benchmarks" / script), "--show", "--json", f"docs/results/{figures}"]
    table = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True).stdout
    assert table.count("\n") > 2 and table in (repository / "docs" / page).read_text()
