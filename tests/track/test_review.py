"""The steps of docs/review.md, as queries of the real client over what it has uploaded: the page shows what came back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import documented
import pytest
from command_line import typed
from documented import Block
from mirrored import sync
from reported import leave_evaluation, left_behind
from wandb_server import ENTITY, Server

from hpc_cifar.track.evaluated import Prediction

PAGE = documented.ROOT / "docs/review.md"
SHOWN_AS = "http://localhost:8080"  # on the page, for the address of the server
END = "-- end of a step"
CLASSES = ["cat", "dog", "ship"]
MIXED_UP = {("cat", "dog"): 7, ("dog", "cat"): 4, ("ship", "cat"): 1}
RIGHT = 20  # of each class


def steps(language: str) -> Iterator[tuple[str, str]]:
    """The blocks of a language that have their outcome behind them, with it."""
    blocks: list[Block] = documented.split(PAGE)[0]
    for block, after in pairwise(blocks):
        if block.words == (language,) and after.words == ("text",):
            yield block.text, after.text


def upload(folder: Path, server: Server) -> None:
    """Two rates with three seeds each, with their evaluations."""
    pairs = [(name, name) for name in CLASSES for _ in range(RIGHT)]
    pairs += [pair for pair, count in MIXED_UP.items() for _ in range(count)]
    rows = [
        Prediction(at, CLASSES.index(actual), CLASSES.index(predicted), 0.5 + at / 1000, 0.25)
        for at, (actual, predicted) in enumerate(pairs)
    ]
    tracking = {"wandb": "online", "entity": ENTITY, "project": "cifar", "group": "rates"}
    for rate, share in ((0.1, 0.96), (0.2, 0.99)):
        for seed in range(3):
            name, optimizer = f"net-{rate}-s{seed}", {"name": "sgd", "lr": rate}
            run = left_behind(
                folder, called=name, validated=share, test=share - 0.1, seed=seed, optimizer=optimizer, tracking=tracking
            )
            leave_evaluation(run, CLASSES, rows)
            sync(run, server)


@pytest.mark.slow
@pytest.mark.component("wandb")
def test_each_step_of_the_page_gives_what_it_shows(server: Server, tmp_path: Path) -> None:
    upload(tmp_path, server)
    environment = {**os.environ, **server.environment, "HPC_CIFAR_RUNS": str(tmp_path), "WANDB_SILENT": "true"}
    asked = list(steps("python"))
    script = f"\nprint({END!r})\n".join(block for block, _ in asked)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    came_back = done.stdout.split(f"{END}\n")
    assert len(asked) == 5 and came_back == [outcome for _, outcome in asked], done.stdout
    [(command, outcome)] = steps("sh")
    [words] = [documented.typed(one.words) for one in documented.commands(Block("page", 1, ("sh",), command))]
    said = typed(words, environment, tmp_path, timeout_s=200)
    assert said.returncode == 0 and said.stdout.replace(server.url, SHOWN_AS) == outcome, said.stdout + said.stderr
    assert_report(server)
    assert server.unknown == []


def assert_report(server: Server) -> None:
    """What the page says of the report is in its specification."""
    [kept] = server.reports
    blocks = kept["spec"]["blocks"]
    together, single = (block["metadata"] for block in blocks if block["type"] == "panel-grid")
    assert together["runSets"][0]["grouping"] == [{"section": "config", "name": "optimizer.value.lr"}]
    panels = [panel["config"] for panel in together["panelBankSectionConfig"]["panels"]]
    assert panels and {(panel["groupAgg"], panel["groupArea"]) for panel in panels} == {("mean", "stddev")}
    [swept] = [
        panel for panel in single["panelBankSectionConfig"]["panels"] if panel["viewType"] == "Parallel Coordinates Plot"
    ]
    accessors = [column["accessor"] for column in swept["config"]["columns"]]
    assert accessors == ["config:optimizer.value.lr", "summary:val_accuracy.max", "summary:test_accuracy"]
    text = json.dumps(blocks)
    assert all(run.name in text for run in server.runs.values()) and "--seeds 3" in text


def test_the_page_has_an_outcome_for_each_query() -> None:
    blocks = documented.split(PAGE)[0]
    assert sum(block.words == ("python",) for block in blocks) == len(list(steps("python"))) and list(steps("sh"))
    assert not any("![" in line for _, line in documented.split(PAGE)[1]), "no pictures of W&B"
