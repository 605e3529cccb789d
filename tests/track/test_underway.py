"""Whoever waits for a run waits for its upload to W&B too, in bounded time; and is told where the run is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb_server
from command_line import typed
from mirrored import a_run, at, job, sync, train
from wandb_server import Server

from hpc_cifar import files, processes
from hpc_cifar.launch.control import until_uploaded
from hpc_cifar.launch.status import status
from hpc_cifar.records import TrackedAs
from hpc_cifar.report import facts, groups, page
from hpc_cifar.track import identity, underway


def test_an_upload_is_waited_for_while_its_process_is_there(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    run.update_state(state="finished")
    assert underway.left_s(run) == 0
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        underway.begin(run, "wandb", child.pid, 25.0)
        assert underway.left_s(run) == 25.0
        assert child.stdin is not None
        child.stdin.close()
    assert underway.left_s(run) == 0, "it was killed"
    note = underway.note(run, "wandb")
    files.write_json(note, {**processes.identity(1), "host": "another", "most_s": 0.6})
    began = time.monotonic()
    until_uploaded([run])
    assert 0.5 < time.monotonic() - began < 5, "of a node that cannot be asked: so long, and no longer"
    os.utime(run.state_file, (time.time() - 1000,) * 2)
    assert underway.left_s(run) == 0, "its node died long ago"
    os.utime(run.state_file)
    for text in ('{"most_s": 1e9}', '{"most_s": "x", "host": 7}', '{"most_s": -1}', "[]", "{", ""):
        note.write_text(text)
        assert underway.left_s(run) == 0
    underway.end(run, "wandb")
    os.mkfifo(note)
    assert underway.left_s(run) == 0


def test_an_address_is_what_a_terminal_only_shows(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    assert identity.url_of(run) is None and status(run).wandb is None
    bad = (
        "",
        "javascript:alert(1)",
        "https://a/\x1b[2J",
        "https://a/b c",
        "https://a/ö",
        "https://" + "a" * 2000,
        "http://a\n",
    )
    for text in bad:
        identity.opened(run, TrackedAs(id="1"), "", "", text)
        assert identity.kept(run).opened and identity.url_of(run) is None
        files.write_json(run.path / identity.FILE, {"id": "1", "url": text})
        assert identity.url_of(run) is None
    (run.path / identity.FILE).write_bytes(b'{"url": "https://a/\xff"}')
    assert identity.url_of(run) is None
    identity.opened(run, TrackedAs(id="1"), "", "", 'https://a/b/runs/1"><script>')
    assert status(run).wandb == 'https://a/b/runs/1"><script>'
    shown = page.html(groups.groups_of([facts.gather(run)]), "title")
    assert '<a href="https://a/b/runs/1&#34;&gt;&lt;script&gt;"' in shown and "1&#34;&gt;&lt;script&gt;" in shown


@pytest.mark.component("wandb")
@pytest.mark.slow
@pytest.mark.parametrize("how", ["--wait", "--follow"])
def test_a_server_that_stops_as_the_wait_ends_has_every_row(
    server: Server, tmp_path: Path, digits_data: Path, how: str
) -> None:
    def slow(what: str, number: int) -> None:
        if what.endswith("file_stream"):
            time.sleep(1.5)

    server.trouble = slow
    sets = ["--set", "training.log_every_steps=1", "--set", "resources.processes_per_node=1"]
    command = ["submit", str(job(tmp_path)), "--cluster", "local", how, *sets]
    done = typed(command, at(server, tmp_path, digits_data), tmp_path, timeout_s=400)
    server.close()
    assert done.returncode == 0, done.stdout + done.stderr
    [kept] = server.runs.values()
    steps = [row["global_step"] for row in kept.history if "step/train_loss" in row]
    assert (len(steps), kept.ended) == (360, [0])
    where = f"{server.url}/{wandb_server.ENTITY}/hpc-cifar/runs/{kept.id}"
    [shown] = json.loads(typed(["status", "--json"], at(server, tmp_path, digits_data), tmp_path, timeout_s=60).stdout)
    assert shown["wandb"] == where
    if how == "--follow":
        assert f"\nW&B: {where}\n" in done.stdout
        assert done.stdout.splitlines()[-1].split() == ["W&B", where], "the result has it"


@pytest.mark.component("wandb")
@pytest.mark.slow
def test_no_text_of_a_server_is_obeyed(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path)
    train(run, 0, 10, ended="finished")
    monkeypatch.setattr(wandb_server, "ENTITY", "some\x1b]0;owned\x07\x1b[2Jbody\u202e")
    said = sync(run, server)
    assert "W&B: http" in said and not set(said) & {"\x1b", "\x07", "\u202e"}, said
    where = status(run).wandb
    assert where is None or where.isascii()
