"""Help has examples that are right, and what is mistyped is guessed: commands, options, names of runs, jobs and campaigns."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import documented
import pytest
from reported import left_behind

from hpc_cifar.cli import main as frame


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int) -> str:
    assert frame.main(list(words)) == code
    printed = capsys.readouterr()
    return printed.out + printed.err


@pytest.mark.parametrize("command", sorted(documented.names_of_commands()))
def test_help_has_examples_that_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, *command.split(), "--help", code=0)
    examples = re.findall(r"^  ((?:hpc-cifar|torchrun) .+)$", text, flags=re.MULTILINE)
    parsed = [documented.parsed(documented.typed(tuple(shlex.split(re.split(r" [>|]", example)[0])))) for example in examples]
    assert parsed and set(parsed) == {command}


@pytest.mark.parametrize("words", [(), ("bench",)])
def test_lists_of_commands_say_what_each_does(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = said(capsys, *words, "--help", code=0)
    listed = text.partition("Commands:")[2].partition("Examples:")[0]
    assert listed and "..." not in listed and max(map(len, listed.splitlines())) <= 80
    names = [name.split()[-1] for name in documented.names_of_commands() if name.split()[:-1] == list(words)]
    assert names and all(re.search(rf"^  {name}  +[A-Z]", text, flags=re.MULTILINE) for name in names)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("submitt",), "submit"),
        (("bench", "dat"), "data"),
        (("status", "--jsn"), "--json"),
        (("submit", "quikstart"), "quickstart"),
        (("jobs", "quikstart"), "quickstart"),
        (("submit", "quickstart", "--cluster", "locl"), "local"),
        (("validate", "quickstart", "--set", "optimizer.learning_rate=1"), "lr"),
    ],
)
def test_what_was_meant(words: tuple[str, ...], meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"did you mean '{meant}'?" in said(capsys, *words, code=2).lower()


def completed(typed: str) -> list[str]:
    """What the lines that ``--install-completion`` writes get at a Tab."""
    asked = {"_HPC_CIFAR_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split(" ")) - 1)}
    done = subprocess.run(
        [sys.executable, "-m", "hpc_cifar"], env=os.environ | asked, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("hpc-cifar su", ["submit"]),
        ("hpc-cifar submit --camp", ["--campaign"]),
        ("hpc-cifar submit whit", ["whitened-aptx"]),
        ("hpc-cifar submit speed94 --cluster pyx", ["pyxis"]),
    ],
)
def test_tab_completes(typed: str, names: list[str]) -> None:
    assert completed(typed) == names


def test_tab_completes_files_runs_and_campaigns(three: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, other = three
    assert completed("hpc-cifar logs ") == ["last", *reversed(three)]
    assert completed("hpc-cifar logs sp") == [other] and completed("hpc-cifar wait last res") == [second, first]
    assert completed("hpc-cifar list --campaign t") == ["table2"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a b.txt").touch()
    (tmp_path / "mine" / "one.yaml").touch()
    assert completed("hpc-cifar submit mi") == ["mine/"] and completed("hpc-cifar validate mine/") == ["mine/one.yaml"]
    assert completed("hpc-cifar validate ./mi") == ["./mine/"]
    monkeypatch.setenv("HPC_CIFAR_RUNS", str(tmp_path / "mine" / "one.yaml"))
    assert completed("hpc-cifar logs ") == ["last"]


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("HPC_CIFAR_RUNS", str(tmp_path))
    made = [left_behind(tmp_path, name=name, tracking={"group": "table2"}) for name in ("resnet18", "resnet18", "speed94")]
    return [run.id for run in made]


def test_a_run_that_was_meant(three: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    *_, other = three
    assert f"did you mean '{other}'?" in said(capsys, "status", "sped94", code=2)
    assert f"did you mean '{other}'?" in said(capsys, "status", other[:-1] + "x", code=2)
    assert re.search(r"did you mean 'resnet18-[^']+'\?", said(capsys, "logs", "renset18", code=2))
    assert f"the latest are {', '.join(three)}" in said(capsys, "status", "something-else-altogether", code=2)
    assert "the latest are" in said(capsys, "status", "4711", code=2), "no job number is nearer than another"
    assert "did you mean 'table2'?" in said(capsys, "list", "--campaign", "tabel2", code=2)
    assert "campaigns are table2" in said(capsys, "list", "--campaign", "xyz", code=2)
