"""No panel of W&B is over its own count ``_step``, as the real client tells the server of every key that it sends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import typed
from mirrored import a_run, at, job, sync, train
from wandb_server import Kept, Server

from hpc_cifar.track.metrics import MetricsLog

pytestmark = [pytest.mark.component("wandb"), pytest.mark.slow]
PRIVATE = ("_step", "_timestamp", "_runtime", "_wandb")  # the client's own


def definitions(kept: Kept) -> tuple[dict[str, str | None], set[str], list[tuple[str, str | None]]]:
    """Axis of each key, the hidden ones, and axes of patterns, of ``_wandb.m``.

    Its fields are those of ``MetricRecord``, in wandb_telemetry's short form: 1 name, 2 pattern, 4 axis, 5 place of the axis in
    the list, 6 options (1 synchronised, 2 hidden, 3 defined).
    """
    entries = kept.config["_wandb"]["value"]["m"]

    def axis(entry: dict[str, Any]) -> str | None:
        place = entry.get("5")
        return entry.get("4") or (entries[place - 1].get("1") if place else None)

    named = {entry["1"]: axis(entry) for entry in entries if "1" in entry}
    hidden = {entry["1"] for entry in entries if "1" in entry and 2 in entry.get("6", [])}
    return named, hidden, [(entry["2"], axis(entry)) for entry in entries if "2" in entry]


def assert_every_key_has_an_axis(kept: Kept) -> set[str]:
    named, hidden, patterns = definitions(kept)
    keys = {key for row in kept.history for key in row if key not in PRIVATE}
    for key in keys - hidden:
        axis = named.get(key) or next((of for name, of in patterns if key.startswith(name.removesuffix("*"))), None)
        assert axis in ("global_step", "epoch"), f"{key}: {axis}; {kept.config['_wandb']}"
        assert all(axis in row for row in kept.history if key in row), f"{key}: a point without its {axis}"
    assert hidden == {"global_step", "epoch"}
    return keys


def test_every_key_has_an_axis_of_ours(server: Server, tmp_path: Path, digits_data: Path) -> None:
    environment = at(server, tmp_path, digits_data)
    for command in (["train", str(job(tmp_path)), "--name", "mirrored", "--set", "epochs=5"], ["evaluate", "mirrored"]):
        done = typed(command, environment, tmp_path, timeout_s=400)
        assert done.returncode == 0, done.stdout + done.stderr
    [kept] = server.runs.values()
    keys = assert_every_key_has_an_axis(kept)
    assert {"step/train_loss", "val_loss", "train_loss", "evaluation/test-confusion", "evaluation/training-batch"} <= keys


def test_a_figure_that_nobody_foresaw_has_one_too(server: Server, tmp_path: Path) -> None:
    """In every segment: what the server keeps is what the last one has told."""
    run = a_run(tmp_path)
    train(run, 0, 10)
    log = MetricsLog(run.metrics_file, 10)
    log.write("step", epoch=1, step=11, another=1.0)
    log.write("epoch", epoch=2, step=12, ours=0.5)
    log.close()
    sync(run, server)
    [kept] = server.runs.values()
    assert {"step/another", "ours"} <= assert_every_key_has_an_axis(kept)
    sync(run, server)
    assert {"step/another", "ours"} <= assert_every_key_has_an_axis(kept)
