"""What rank 0 logs, in W&B: when it is asked for, every line once, without keys and escape sequences, and not without end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from command_line import typed
from mirrored import EXPERIMENT, at, is_oldest_client, job, sync, train
from wandb_server import KEY, Server

from hpc_cifar import runs
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.runs import Run
from hpc_cifar.track import wandb_console
from hpc_cifar.track.wandb_console import Console, plain
from hpc_cifar.track.wandb_run import NO_CONSOLE


def a_run(folder: Path, **tracking: Any) -> Run:
    values = EXPERIMENT | {"tracking": {"wandb": "online", "console": True, **tracking}}
    run = runs.create(folder, "logged", Experiment.model_validate(values), {"batch_size": 64}, {})
    run.submitit.mkdir()
    return run


def test_a_log_may_be_shown_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET_TOKEN", "a-value-of-ours")
    coloured = "\x1b[1mWANDB_API_KEY=\x1b[31m" + KEY + "\x1b[0m"
    assert KEY not in plain(coloured) and plain(coloured).startswith("WANDB_API_KEY=")
    assert "a-value-of-ours" not in plain("it is a-value-of-ours")
    text = "\x1b]0;title\x07one\x1b[2J\x1b[1;1H two\x1bM\x1b(B\x1bPq...\x1b\\ three\n10 %\r20 %\r\nend\x1b"
    assert plain(text) == "one two three\n10 %\n20 %\nend"
    assert plain("x" * 5000) == "x" * 2000 + " ..."


def test_lines_come_once_whatever_the_files_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path)
    log = run.submitit / "12_0_log.out"
    log.write_text("one\ntwo\nthr")
    (run.submitit / "12_1_log.out").write_text("of rank 1\n")
    (run.submitit / "12_0_log.err").write_text("errors\n")
    os.mkfifo(run.submitit / "13_0_log.out")
    (run.submitit / "14_0_log.out").symlink_to(__file__)
    assert list(Console(run).new(False)) == ["one\ntwo"]
    log.open("a").write("ee\nfour")
    upload = Console(run)
    assert list(upload.new(False)) == ["three"] and list(upload.new(True)) == ["four"] and list(upload.new(True)) == []
    upload.back()
    assert "\n".join(Console(run).new(True)) == "three\nfour", "it has not arrived"
    os.utime(log, (1, 1))
    (run.submitit / "15_0_log.out").write_text("of the next job\n")
    assert list(Console(run).new(True)) == ["of the next job"]
    log.write_text("anew\n")
    assert list(Console(run).new(True)) == ["anew"]
    os.utime(log, (1, 1))
    for damaged in ("[]", "{", '{"12_0_log.out": -1, "15_0_log.out": "x"}'):
        (run.path / wandb_console.LEDGER).write_text(damaged)
        assert list(Console(run).new(True)) == ["anew", "of the next job"]
    monkeypatch.setattr(wandb_console, "MOST", 100)
    monkeypatch.setattr(wandb_console, "AT_ONCE", 30)
    (run.path / wandb_console.LEDGER).unlink()
    (run.submitit / "15_0_log.out").unlink()
    log.write_text("0123456789\n" * 1000)
    shown = "\n".join(Console(run).new(True)).splitlines()
    assert shown[:9] == ["0123456789"] * 9 and shown[-1].endswith("the rest is in 12_0_log.out)") and len(shown) == 11
    assert list(Console(run).new(True)) == []


@pytest.mark.component("wandb")
@pytest.mark.slow
def test_segments_are_one_log_of_the_run(server: Server, tmp_path: Path) -> None:
    run = a_run(tmp_path)
    log = run.submitit / "12_0_log.out"
    expected = []
    for segment in range(3):
        with log.open("a") as stream:
            lines = [f"segment {segment}, line {number}" for number in range(3)]
            stream.writelines(f"{line}\n" for line in lines)
            expected += lines
        train(run, 10 * segment, 10 * segment + 10, ended="finished" if segment == 2 else "requeued")
        if segment == 1:
            server.trouble = lambda what, number: 401 if what.endswith("file_stream") else None
            sync(run, server, code=1)
            server.trouble = lambda what, number: None
        sync(run, server)
    sync(run, server)
    [kept] = server.runs.values()
    if is_oldest_client():
        assert "output.log" not in kept.lines
        return
    shown = [kept.lines["output.log"][place].split(" ", 1)[1] for place in sorted(kept.lines["output.log"])]
    assert shown == expected
    other = a_run(tmp_path / "other", console=False)
    (other.submitit / "12_0_log.out").write_text("not asked for\n")
    train(other, 0, 10, ended="finished")
    sync(other, server)
    assert "output.log" not in next(kept for kept in server.runs.values() if len(kept.history) == 11).lines


@pytest.mark.component("wandb")
@pytest.mark.slow
def test_the_log_of_a_job(server: Server, tmp_path: Path, digits_data: Path) -> None:
    sets = ["epochs=3", "tracking.console=true", "resources.processes_per_node=1"]
    command = ["submit", str(job(tmp_path)), "--cluster", "local", "--wait", *(word for one in sets for word in ("--set", one))]
    done = typed(command, at(server, tmp_path, digits_data), tmp_path, timeout_s=400)
    assert done.returncode == 0, done.stdout + done.stderr
    [kept] = server.runs.values()
    [log] = tmp_path.glob("mirrored-*/submitit/*_0_log.out")
    if is_oldest_client():
        assert "output.log" not in kept.lines and NO_CONSOLE in log.with_suffix(".err").read_text()
        return
    shown = [line.split(" ", 1)[1] for _, line in sorted(kept.lines["output.log"].items())]
    assert len(shown) > 3 and shown == plain(log.read_text()).splitlines()[: len(shown)]
    assert sum("epoch 3/3" in line for line in shown) == sum("epoch 3/3" in line for line in log.read_text().splitlines()) > 0
