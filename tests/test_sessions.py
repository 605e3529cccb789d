"""``make test`` as a whole: which sessions it has, on which versions of Slurm, and when it fails."""

from __future__ import annotations

import importlib
import json
import os
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run_tests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "slurm" / "testbed"))
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("run_tests")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "build")
    monkeypatch.setattr(module.roots, "host_version", lambda: "22.05")
    for name in ("HPC_CIFAR_REQUIRE", "HPC_CIFAR_NOT_EXERCISED"):
        monkeypatch.setenv(name, "")
    (tmp_path / "docs" / "results").mkdir(parents=True)
    return module


def test_every_test_is_in_a_session(run_tests: Any) -> None:
    names = [each.name for each in run_tests.sessions(False, ["24.11", "26.05"])]
    assert names == ["slurm 22.05", "slurm 24.11", "slurm 26.05", "others", "alone"]
    here, there = run_tests.sessions(False, ["24.11"])[:2]
    assert here.arguments[0] == "tests/slurm" and here.version is None
    assert all((ROOT / name).is_file() for name in there.arguments if name.startswith("tests/"))
    assert there.components == {"slurm", "slurm-24.11"} and there.version == "24.11"
    full = run_tests.sessions(True, ["24.11"])
    assert [each.name for each in full] == ["slurm 22.05", "slurm 24.11", "slurm 24.11 alone", "others", "alone"]
    assert full[1].arguments == here.arguments
    covered = set().union(*(each.components for each in full))
    components = runpy.run_path(str(ROOT / "tests" / "conftest.py"))["COMPONENTS"]
    assert set(components) - covered == {"slurm-26.05"}, "of which there is no root"


@pytest.mark.parametrize(
    ("required", "without", "code"),
    [
        ("", (), 0),
        ("slurm-26.05", (), 0),
        ("", ("26.05",), 0),
        ("slurm-26.05", ("26.05",), 1),
        ("", ("24.11",), 1),
    ],
)
def test_a_version_that_cannot_be_had_is_named(
    run_tests: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    required: str,
    without: tuple[str, ...],
    code: int,
) -> None:
    told: dict[str, tuple[str, str]] = {}

    def run(session: Any, required: set[str], missing: str) -> dict[str, object]:
        told[session.name] = (",".join(sorted(required & session.components)), missing)
        return {"exit code": 0, "minutes": 1.5, "passed": 7, "failures": 0, "errors": 0, "skipped": 1}

    def make(root: Any) -> None:
        if root.version in without:
            raise run_tests.roots.CannotBeHad("it has Slurm 27.05 now")

    monkeypatch.setattr(run_tests.Session, "run", run)
    monkeypatch.setattr(run_tests.roots.Root, "make", make)
    monkeypatch.setattr(run_tests.roots.Root, "stamp", lambda root: {"slurmctld": f"{root.version}.5"})
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(run_tests.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setenv("HPC_CIFAR_REQUIRE", required)
    monkeypatch.setattr("sys.argv", ["run_tests.py", "--full"])
    assert run_tests.main() == code
    out = capsys.readouterr().out
    results = json.loads((run_tests.ROOT / "docs" / "results" / "test-full.json").read_text())
    assert results["missing"] == [f"slurm {version}" for version in without]
    for version in ("24.11", "26.05"):
        assert (f"slurm {version}" in told) == (version not in without)
        if version in without:
            assert f"slurm {version}" in out and "it has Slurm 27.05 now" in out
            assert told["others"][1] == f"slurm-{version}=it has Slurm 27.05 now"
    if required and not without:
        assert told["slurm 26.05"][0] == "slurm-26.05"
        assert results["slurm"] == {"24.11": "24.11.5", "26.05": "26.05.5"}


def test_one_session_can_be_run_again(run_tests: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row alone changes; each row names the commit that was tested."""
    ran: list[str] = []

    def run(session: Any, required: set[str], missing: str) -> dict[str, object]:
        ran.append(session.name)
        return {"exit code": 0, "minutes": len(ran)}

    monkeypatch.setattr(run_tests.Session, "run", run)
    monkeypatch.setattr(run_tests.roots, "SUITES", {})
    for number, more in enumerate(([], ["--only", "others"])):
        monkeypatch.setattr(run_tests, "commit", lambda number=number: f"c{number}")
        monkeypatch.setattr("sys.argv", ["run_tests.py", "--full", *more])
        assert run_tests.main() == 0
    assert ran == ["slurm 22.05", "others", "alone", "others"]
    rows = json.loads((run_tests.ROOT / "docs" / "results" / "test-full.json").read_text())["sessions"]
    assert list(rows) == ["slurm 22.05", "others", "alone"]
    assert [(row["minutes"], row["commit"]) for row in rows.values()] == [(1, "c0"), (4, "c1"), (3, "c0")]
    monkeypatch.setattr("sys.argv", ["run_tests.py", "--full", "--only", "slurm 17.11"])
    with pytest.raises(SystemExit):
        run_tests.main()


def test_a_session_that_failed_has_no_row_and_is_missing(run_tests: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {"others"}
    monkeypatch.setattr(run_tests.Session, "run", lambda session, *_: {"exit code": int(session.name in bad), "minutes": 1})
    monkeypatch.setattr(run_tests.roots, "SUITES", {})
    written = run_tests.ROOT / "docs" / "results" / "test-full.json"

    def found(*more: str) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr("sys.argv", ["run_tests.py", "--full", *more])
        code, results = run_tests.main(), json.loads(written.read_text())
        return code, list(results["sessions"]), results["missing"]

    assert found() == (1, ["slurm 22.05", "alone"], ["others"])
    bad.clear()
    assert found("--only", "others") == (0, ["slurm 22.05", "others", "alone"], [])
    bad.add("alone")
    assert found("--only", "alone") == (1, ["slurm 22.05", "others"], ["alone"]), "the row before was of another commit"


def test_a_failed_session_fails_all(run_tests: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By pytest's own exit code; the numbers are those of its report."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    report = '<testsuites><testsuite tests="5" failures="1" errors="1" skipped="1"/></testsuites>'
    python.write_text(f"#!/bin/bash\nfor last; do :; done\necho '{report}' > \"${{last#--junitxml=}}\"\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(run_tests.roots, "SUITES", {})
    monkeypatch.setattr("sys.argv", ["run_tests.py"])
    assert run_tests.main() == 1
    assert run_tests.counts(tmp_path / "build" / "others.xml") == {
        "tests": 5,
        "passed": 2,
        "failures": 1,
        "errors": 1,
        "skipped": 1,
    }
