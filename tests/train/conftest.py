"""Libraries in C that tests put in the place of real ones."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a library of a C file of this folder, by its name without an ending."""
    compiler = shutil.which("cc") or shutil.which("gcc")

    def make(name: str) -> Path:
        if compiler is None:
            pytest.skip("there is no C compiler")
        made, source = tmp_path_factory.mktemp("library") / f"{name}.so", Path(__file__).with_name(f"{name}.c")
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(made), str(source), "-ldl"], check=True)
        return made

    return make
