"""The suites of benchmarks, in miniature, and what ``make figures`` makes of their figures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

UNDERSTOOD = """
import argparse, runpy, sys
from pathlib import Path
import click, typer
import gpu_suite
from hpc_cifar.cli.main import app
from hpc_cifar.config.load import load_experiment

class Understood(Exception):
    pass

def parsed(parser, arguments=None, parse=argparse.ArgumentParser.parse_args):
    raise Understood(parse(parser, arguments))

argparse.ArgumentParser.parse_args = parsed
for part, (_, *words) in gpu_suite.parts(Path("out"), small=False).items():
    if words[:2] == ["-m", "pytest"]:
        continue
    if words[:2] == ["-m", "hpc_cifar"]:
        command, words = typer.main.get_command(app), words[2:]
        while isinstance(command, click.Group):
            command, words = command.commands[words[0]], words[1:]
        found = command.make_context(command.name, words).params
    else:
        sys.argv = words
        try:
            runpy.run_path(words[0], run_name="__main__")
        except Understood as options:
            found = vars(options.args[0])
        else:
            sys.exit(f"{part}: {words[0]} takes no options")
    for job in found.get("jobs") or [found.get("job") or "deep300"]:
        load_experiment(gpu_suite.suite.ROOT / "jobs" / f"{Path(job).stem}.yaml", list(found.get("sets") or ()))
    print(part)
"""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def suite(repository: Path, name: str, out: Path, data: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repository / "benchmarks" / f"{name}.py"), "--out", str(out), "--miniature", *options]
    environment = {**os.environ, "HPC_CIFAR_DATA": str(data)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    logs = "\n".join(f"-- {path.name}\n{path.read_text()[-2000:]}" for path in out.rglob("*.log"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
    return done


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def figures(repository: Path, results: Path, folder: Path) -> dict[str, str]:
    """The pages made of the JSON in ``results`` alone; it leaves its plots in ``folder``."""
    for page in ("README.md", "docs/performance.md", "docs/systems.md", "docs/resume.md"):
        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repository / page, folder / page)
    (folder / "docs" / "results").mkdir()
    for path in results.glob("*.json"):
        shutil.copy(path, folder / "docs" / "results")
    script = repository / "benchmarks" / "figures.py"
    done = subprocess.run([sys.executable, str(script), "--root", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {path.name: path.read_text() for path in (folder / "docs").glob("*.md")}


def test_the_suite_of_a_cpu(repository: Path, tmp_path: Path, digits_data: Path) -> None:
    suite(repository, "cpu_suite", tmp_path, digits_data)
    out = tmp_path / "miniature"
    kinds = ("step", "checkpoint", "data", "restart", "scaling", "recipes")
    assert {path.name for path in out.glob("*.json")} == {f"{kind}-2-cores.json" for kind in kinds}
    # no machine changes them: both are float32
    counts = {name: row["per_step"] for name, row in read(out / "step-2-cores.json")["rungs"].items()}
    assert {found["waits"] for found in counts.values()} == {0}, "no step reads a number from the device"
    assert counts["eager fused"]["operations"] < 1.4 * counts["plain"]["operations"], counts
    [start] = read(out / "restart-2-cores.json")["starts"]
    assert set(start["plain"][0]) < set(start["ours"][0]), "the same stages, but for the time to the first import"
    points = read(out / "scaling-2-cores.json")["points"]
    assert [point["processes"] for point in points] == [1, 4] and not points[0]["modelled"]
    [(job, entry)] = read(out / "recipes-2-cores.json")["systems"].items()
    assert job == "quickstart" and [run["seed"] for run in entry["measured"]] == [1, 2]
    assert all(run["checkpoints"] >= 1 and run["device"] == "cpu" for run in entry["measured"])
    again = suite(repository, "cpu_suite", tmp_path, digits_data)
    assert again.stdout.count("done before") == len(kinds), "what is done is not done again"
    pages = figures(repository, out, tmp_path / "site")
    assert "Not measured yet: `python benchmarks/kernel.py" in pages["performance.md"]
    assert all(f"docs/results/{kind}-2-cores.json" in pages["performance.md"] for kind in kinds[:-1])
    for kind in ("step", "data", "restart", "scaling"):
        assert (tmp_path / "site" / "docs" / "results" / f"{kind}.svg").read_text().startswith("<?xml")
    assert "Nothing of this has been measured on a GPU yet." in pages["performance.md"]


def test_the_suite_of_a_gpu(repository: Path, tmp_path: Path, digits_data: Path) -> None:
    """Where there is none, all but what measures a GPU's own code; its figures become pages, too."""
    parts = "speed94,tuned,systems-1"  # the others are the scripts of the CPU's suite
    done = suite(repository, "gpu_suite", tmp_path, digits_data, "--parts", parts)
    out = tmp_path / "miniature"
    assert done.stdout.count("exit code 0") == 3
    assert set(read(out / "recipes-gpu.json")["systems"]) == {"speed94", "deep300-tuned"}
    pages = figures(repository, out, tmp_path / "site")
    assert "`docs/results/recipes-gpu.json`" in pages["performance.md"]
    assert "`docs/results/systems-gpu.json`" in pages["systems.md"]
    listed = suite(repository, "gpu_suite", tmp_path, digits_data, "--list").stdout
    assert "speed96" in listed


def test_the_suite_of_a_gpu_types_what_the_scripts_understand(repository: Path, tmp_path: Path) -> None:
    """Its real options, with no step of theirs taken: what only shows on a lent machine costs the loan."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(repository / "benchmarks"), str(repository)])}
    listing = [str(repository / "benchmarks" / "gpu_suite.py"), "--out", str(tmp_path), "--list"]
    understood, listed = (
        subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        for words in (["-c", UNDERSTOOD], listing)
    )
    assert (understood.returncode, listed.returncode) == (0, 0), understood.stderr + listed.stderr
    parts = [line.split()[0] for line in listed.stdout.splitlines()]
    assert [part for part in parts if part != "tests"] == understood.stdout.split() != []


def test_a_suite_without_a_gpu_says_so(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(repository / "benchmarks" / "gpu_suite.py"), "--out", str(tmp_path)]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=hidden, check=False)
    assert (done.returncode, done.stderr) == (2, "torch sees no GPU here; --miniature shows that the suite runs\n")
