"""Options and variables that contradict each other: one line that names them, before anything is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_cifar.cli.main import main


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        (["submit", "quickstart", "--json", "--follow"], {}, "--json, --parsable and --follow: use one of them"),
        (["submit", "quickstart", "--dry-run", "--wait"], {}, "--dry-run submits nothing: leave out "),
        (
            ["drill", "quickstart-digits", "--cluster", "local", "--short", "--faults", "kill-one"],
            {},
            "--short and --faults: use one",
        ),
        (["train", "quickstart-digits"], {"RANK": "two"}, "RANK: should be a whole number as torchrun sets it, not 'two'"),
        (["train", "quickstart-digits"], {"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2, WORLD_SIZE=2: ranks count from 0 to"),
    ],
)
def test_one_line_says_what_contradicts(
    tmp_path: Path,
    digits_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    variables: dict[str, str],
    said: str,
) -> None:
    for name, value in {**variables, "HPC_CIFAR_DATA": str(digits_data), "HPC_CIFAR_RUNS": str(tmp_path / "runs")}.items():
        monkeypatch.setenv(name, value)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not (tmp_path / "runs").exists()
