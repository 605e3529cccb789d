"""The frame of the command line: it starts at once, and an error is one line and an exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from launch_site import Site

from hpc_cifar.cli import main as frame
from hpc_cifar.errors import DataError, RunError

HELP = [sys.executable, "-m", "hpc_cifar", "--help"]


def test_help_takes_less_than_0_3_seconds() -> None:
    def cpu_seconds() -> float:
        began = os.times()
        subprocess.run(HELP, check=True, capture_output=True)
        ended = os.times()
        # processor time, since other work on the machine must not fail this test; the process never waits for anything
        return ended.children_user + ended.children_system - began.children_user - began.children_system

    assert min(cpu_seconds() for _ in range(5)) < 0.3


@pytest.mark.parametrize(
    "arguments", [["--help"], ["submit", "--help"], ["status", "--help"], ["train", "--help"], ["--version"]]
)
def test_nothing_heavy_is_imported_for_help(arguments: list[str]) -> None:
    heavy = ("torch", "numpy", "yaml", "submitit", "wandb", "rich.console", "hpc_cifar.config.experiment")
    code = (
        "import sys, json\nfrom hpc_cifar.cli.main import main\n"
        f"code = main({arguments!r})\nprint(json.dumps([code, [m for m in {heavy!r} if m in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [0, []]


def test_help_shows_examples() -> None:
    text = subprocess.run(HELP, check=True, capture_output=True, text=True).stdout
    assert "torchrun --nproc-per-node 2 -m hpc_cifar train" in text
    for verb in (
        "prepare",
        "validate",
        "schema",
        "jobs",
        "init",
        "submit",
        "train",
        "status",
        "list",
        "logs",
        "wait",
        "cancel",
        "resume",
    ):
        assert f"\n  {verb} " in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stauts"], "No such command 'stauts'. Did you mean 'status'? (see: hpc-cifar --help)"),
        (["submit"], "Missing argument 'job'. (see: hpc-cifar submit --help)"),
        (["logs", "--rank", "-1"], "Invalid value for '--rank': "),
        (["status", "--nope"], "No such option: --nope"),
    ],
)
def test_wrong_usage_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert frame.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.lower().startswith(f"hpc-cifar: error: {said}".lower())
    assert err.count("\n") == 1
    assert "--help)\n" in err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RunError("no"), 1, "hpc-cifar: error: no\n"),
        (DataError("no data\nhere"), 2, "hpc-cifar: error: no data\nhere\n"),
        (KeyboardInterrupt(), 130, ""),
        (ValueError("odd\nmore"), 1, "hpc-cifar: error: unexpected ValueError: odd (HPC_CIFAR_DEBUG=1 shows the traceback)\n"),
    ],
)
def test_errors_become_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("hpc_cifar.runs.all_runs", fail)
    assert frame.main(["list"]) == code
    err = capsys.readouterr().err
    assert err == said or (code == 130 and "Traceback" not in err)
    if isinstance(error, ValueError):
        monkeypatch.setenv("HPC_CIFAR_DEBUG", "1")
        frame.main(["list"])
        assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m hpc_cifar schema | head -c 10"], capture_output=True, text=True, check=False
    )
    assert len(done.stdout) == 10
    assert done.stderr == ""


def test_all_problems_of_all_files_at_once(site: Site) -> None:
    for name in ("a.yaml", "b.yaml"):
        (site.work / name).write_text("name: x\nepochs: 0\n")
    done = site.cli("submit", "a.yaml", "b.yaml", "--cluster", "local", code=2)
    assert "a.yaml:2: epochs" in done.stderr
    assert "b.yaml:2: epochs" in done.stderr
    assert not site.runs.exists()


def test_no_runs_is_said(site: Site) -> None:
    assert site.cli("status").stdout == f"no runs in {site.runs}\n"
    assert site.cli("status", "--json").stdout == "[]\n"
    assert "there are no runs here" in site.cli("logs", "last", code=2).stderr


def test_status_watch_ends_with_the_runs(site: Site) -> None:
    run = site.submit("step_s=0.02")
    began = time.monotonic()
    out = site.cli("status", run.id, "--watch", "--every", "0.5", "--json").stdout
    rows = [json.loads(line)[0] for line in out.splitlines()]
    assert rows[-1]["state"] == "finished"
    assert time.monotonic() - began < 50
