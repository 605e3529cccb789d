"""Every figure of the docs comes from the JSON in docs/results."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

PAGES = ("README.md", "docs/performance.md", "docs/systems.md")
REGION = re.compile(r"<!-- figures: [a-z-]+ -->\n.*?<!-- end of figures -->\n", re.DOTALL)
CODE = re.compile(r"```.*?```|`[^`\n]*(?:\n[^`\n]*)?`", re.DOTALL)
# a number and what makes a measurement of it
FIGURE = re.compile(r"\d[\d.,]*\s?(?:%|images/s|(?:ms|s|min|minutes|seconds|hours|MiB|TB/s|times|x)\b)")


def make(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "figures.py"
    return subprocess.run(
        [sys.executable, str(script), "--root", str(root), *options], capture_output=True, text=True, check=False
    )


@pytest.fixture
def copy(repository: Path, tmp_path: Path) -> Path:
    """The pages and the figures, without the plots."""
    shutil.copytree(repository / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*.svg"))
    shutil.copy(repository / "README.md", tmp_path)
    return tmp_path


def test_make_figures_gives_the_committed_pages_and_plots(repository: Path, copy: Path) -> None:
    """Byte for byte, whatever stood between the marks before."""
    for page in (*PAGES, "docs/resume.md"):
        text = (copy / page).read_text()
        (copy / page).write_text(re.sub(r"(<!-- figures: [a-z-]+ -->\n).*?(<!-- end)", r"\1old\n\2", text, flags=re.DOTALL))
    done = make(copy)
    assert done.returncode == 0, done.stderr
    for made in [path for path in copy.rglob("*") if path.is_file()]:
        assert made.read_bytes() == (repository / made.relative_to(copy)).read_bytes(), made
    assert {path.name for path in repository.glob("docs/results/*.svg")} == {path.name for path in copy.rglob("*.svg")}


def test_another_figure_is_another_page(repository: Path, copy: Path) -> None:
    for path in repository.glob("docs/results/*.svg"):
        shutil.copy(path, copy / "docs" / "results")
    assert make(copy, "--check").returncode == 0
    path = copy / "docs" / "results" / "data-2-cores.json"
    figures: dict[str, Any] = json.loads(path.read_text())
    figures["images_per_second"]["ffcv"] = [2 * rate for rate in figures["images_per_second"]["ffcv"]]
    path.write_text(json.dumps(figures))
    page = (copy / "docs" / "systems.md").read_text()  # somebody has edited a table
    (copy / "docs" / "systems.md").write_text(page.replace("<!-- figures: systems -->", "<!-- figures: systems -->\n9 %"))
    done = make(copy, "--check")
    assert done.returncode == 1
    wrong = {line.partition(": is not what its JSON gives: make figures")[0] for line in done.stdout.splitlines()}
    assert wrong == {"docs/performance.md", "docs/systems.md", "docs/results/data.svg"}


@pytest.mark.parametrize("page", PAGES)
def test_no_figure_without_json(repository: Path, page: str) -> None:
    prose = CODE.sub("", REGION.sub("", (repository / page).read_text()))
    assert FIGURE.findall(prose) == []
    assert FIGURE.findall("It makes 5,000 images/s, 80.99 % in 91 s.") == ["5,000 images/s", "80.99 %", "91 s"]


def test_a_job_file_states_no_accuracy_that_was_not_measured(repository: Path) -> None:
    """What the head of a job says of our own trainings stands in docs/results, for that job."""
    measured: dict[str, list[float]] = {}
    for path in repository.glob("docs/results/*.json"):
        figures = json.loads(path.read_text())
        for name, entry in figures.get("systems", {}).items():
            for figure in ("test_accuracy", "tta_accuracy"):
                found = [100 * run[figure] for run in entry["measured"] if run.get(figure) is not None]
                measured.setdefault(name, []).extend([*found, *([sum(found) / len(found)] if found else [])])
        for kind in ("pretrained", "random weights"):  # of the transfer
            if run := figures.get(kind):
                measured.setdefault(run["job"], []).append(100 * run["test_accuracy"])
    seen = 0
    for path in sorted(repository.glob("jobs/*.yaml")):
        head = path.read_text().partition("\nname:")[0]
        name = yaml.safe_load(path.read_text())["name"]
        for line in re.findall(r"^# Measured:(.*(?:\n#   .*)*)", head, re.MULTILINE):
            for number in re.findall(r"(\d+\.\d+) %", line):
                seen += 1
                digits = len(number.partition(".")[2])
                assert any(f"{value:.{digits}f}" == number for value in measured.get(name, [])), f"{path.name}: {number} %"
        assert "Measured:" in head or name not in measured or "docs/systems.md" in head, f"{path.name} hides what was measured"
    assert seen >= 1
