"""Debian roots with other versions of Slurm: made once, or a clear word why not. mmdebstrap is a stand-in."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TESTBED = Path(__file__).resolve().parents[1] / "slurm" / "testbed"
Programs = Callable[..., None]


@pytest.fixture
def roots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(TESTBED))
    module = importlib.import_module("roots")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("HPC_CIFAR_SLURM_ROOTS", str(tmp_path / "roots"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.delenv("DEBIAN_MIRROR", raising=False)
    return module


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    def write(**bodies: str) -> None:
        (tmp_path / "bin").mkdir(exist_ok=True)
        for name, body in bodies.items():
            program = tmp_path / "bin" / name.replace("_", "-")
            program.write_text(f"#!/bin/bash\n{body}\n")
            program.chmod(0o755)

    calls = tmp_path / "calls"
    # the last three words are suite, folder and mirror
    making = f'echo "${{@: -3:1}} ${{@: -1}}" >> {calls}; sleep 0.2; mkdir -p "${{@: -2:1}}/etc"'
    targets = "echo Debian bookworm-updates http://one/; echo Other x http://two/; echo Debian bookworm http://here/debian/"
    write(mmdebstrap=making, dpkg_query="echo 24.11.5-4", apt_get=targets)
    return write


def test_two_at_once_make_one(roots: Any, programs: Programs, tmp_path: Path) -> None:
    root = roots.Root("24.11")
    both = [threading.Thread(target=roots.Root("24.11").make) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join(20)
    assert (tmp_path / "calls").read_text() == "trixie http://here/debian/\n"
    assert root.stamp()["slurmctld"] == "24.11.5-4"
    assert sorted(path.name for path in root.folder.parent.iterdir()) == ["24.11", "24.11.lock"]
    root.make()
    assert (tmp_path / "calls").read_text().count("\n") == 1, "it is there"


def test_one_that_is_made_differently_today_is_made_anew(
    roots: Any, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = roots.Root("24.11")
    root.make()
    (root.folder / "old").touch()
    monkeypatch.setattr(roots, "PACKAGES", (*roots.PACKAGES, "another"))
    assert root.stamp() == {}
    root.make()
    assert root.stamp() and not (root.folder / "old").exists()


def test_what_debian_has_not_any_more_is_named(roots: Any, programs: Programs, tmp_path: Path) -> None:
    programs(dpkg_query="echo 26.11.0-1")
    with pytest.raises(roots.CannotBeHad) as said:
        roots.Root("26.05").make()
    assert str(said.value) == "Slurm 26.05: forky: it has Slurm 26.11.0-1 now; sid: it has Slurm 26.11.0-1 now"
    assert [path.name for path in (tmp_path / "roots").iterdir()] == ["26.05.lock"]
    programs(mmdebstrap="echo 'E: mmdebstrap failed to run' >&2; exit 25")
    with pytest.raises(roots.CannotBeHad, match=r"24\.11: trixie: E: mmdebstrap failed to run"):
        roots.Root("24.11").make()


def test_no_mirror_no_program_no_root(
    roots: Any, programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs(apt_get="exit 1")
    with pytest.raises(roots.CannotBeHad, match="apt's sources name no Debian mirror; give one in DEBIAN_MIRROR"):
        roots.Root("24.11").make()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(roots.CannotBeHad, match="missing mmdebstrap: apt-get install"):
        roots.Root("24.11").make()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "argv", ["roots.py", "within", "24.11", "true"])
    assert roots.main() == roots.CANNOT_BE_HAD == 75
    assert capsys.readouterr().err == "roots: a root with Slurm 24.11 needs root to be made and used\n"
