"""The W&B report by the real client, as it arrives at the server on loopback."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import typed
from reported import EVALUATED, FIELDS, left_behind
from wandb_server import ENTITY, GONE, HANG, Server

from hpc_cifar import files
from hpc_cifar.runs import Run
from hpc_cifar.track import identity, summary

pytestmark = [pytest.mark.component("wandb"), pytest.mark.slow]
TOLD: dict[str, Any] = {"claim": {"source": "a paper", "test_accuracy": 0.9}, "tracking": {"group": "t2"}}


def uploaded(run: Run) -> None:
    identity.opened(run, identity.decide(run, ""), ENTITY, "", "")


def report(root: Path, server: Server, *arguments: str, code: int = 0) -> str:
    environment = {**os.environ, **server.environment, "HPC_CIFAR_RUNS": str(root)}
    done = typed(["report", *arguments], environment, root, timeout_s=400)
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}\n{server.requests}"
    return done.stdout + done.stderr


def test_its_panels_and_tables_are_those_of_the_runs(tmp_path: Path, server: Server) -> None:
    made = [
        left_behind(tmp_path, seed=seed, restarts=seed, optimizer={"name": "sgd", "lr": lr}, **TOLD)
        for lr in (0.1, 0.2)
        for seed in (0, 1)
    ]
    for run in made:
        uploaded(run)
    (made[0].path / "evaluation" / "test").mkdir(parents=True)
    files.write_json(made[0].path / "evaluation" / "test" / "evaluation.json", EVALUATED)
    said = report(tmp_path, server, "--campaign", "t2", "--wandb")
    [kept] = server.reports
    assert said.strip().endswith("--report-1") and kept["displayName"] == "t2" and kept["projectName"] == "hpc-cifar"
    blocks = kept["spec"]["blocks"]
    texts = [json.dumps(block) for block in blocks if block["type"] == "markdown-block"]
    assert "claimed" in texts[0].lower() and "90.00% / 90.00%" in texts[0] and all(run.id in texts[0] for run in made)
    assert "50.00% | 25.00% | 33.00% | 10" in texts[1] and "cat" in texts[1]
    assert "Segments" in texts[2] and f"{made[1].id} | 0 to 1" in texts[2] and made[0].id not in texts[2]
    assert "net optimizer.lr=0.1" in texts[3] and "optimizer.lr" in texts[3]
    code = [block for block in blocks if block["type"] == "code-block"]
    assert "hpc-cifar submit experiment.yaml --seeds 2" in json.dumps(code[0]) and "lr: 0.1" in json.dumps(code[1])
    grid, single = (block for block in blocks if block["type"] == "panel-grid")
    lines = {title: panel for kind, title, panel in panels_of(grid) if kind == "Run History Line Plot"}
    assert lines["Accuracy by epoch"]["metrics"] == ["val_accuracy", "train_accuracy"]
    assert lines["Learning rate by epoch"]["metrics"] == ["lr"]
    assert {config["xAxis"] for config in lines.values()} == {"epoch"}
    bars = {title: panel for kind, title, panel in panels_of(grid) if kind == "Bar Chart"}
    assert bars.keys() == {"Test accuracy", "Restarts", "GPU-hours"}
    for panel in (*lines.values(), *bars.values()):  # of the runs with one rate, which differ in the seed
        assert (panel["groupAgg"], panel["groupArea"]) == ("mean", "stddev")
    assert {(panel["groupBy"], panel["aggregate"]) for panel in bars.values()} == {("optimizer.value.lr", True)}
    assert grouping(grid) == [{"section": "config", "name": "optimizer.value.lr"}] and grouping(single) == []
    assert "Run Comparer" in {kind for kind, _, _ in panels_of(single)}
    assert all(run.id in json.dumps(block["metadata"]["runSets"]) for run in made for block in (grid, single))
    [swept] = [panel for kind, _, panel in panels_of(single) if kind == "Parallel Coordinates Plot"]
    columns = [(column["accessor"], column.get("log")) for column in swept["columns"]]
    ends = [("summary:val_accuracy.max", None), ("summary:test_accuracy", None)]
    assert columns == [("config:optimizer.value.lr", False), *ends]
    assert server.unknown == []


@pytest.mark.parametrize(
    ("fields", "key", "columns"),
    [
        ([{}, {}], "system.value", []),
        ([{}, {"data": {**FIELDS["data"], "augment": {"flip": "random"}}}], "data.value.augment.flip", []),
        (
            [{}, {"optimizer": {"name": "sgd", "lr": 5.0, "momentum": 0.5}}, {"optimizer": {"name": "sgd", "lr": 5.0}}],
            "system.value",
            [("config:optimizer.value.lr", True), ("config:optimizer.value.momentum", False)],
        ),
        (
            [{}, {"model": {"family": "sequential", "layers": ["flatten", "relu", {"dense": {"units": 10}}]}}],
            "system.value",
            [],
        ),
    ],
    ids=["seeds alone", "one word", "two numbers", "lists"],
)
def test_runs_that_differ_in_the_seed_are_one_bar(
    tmp_path: Path, server: Server, fields: list[dict[str, Any]], key: str, columns: list[tuple[str, bool]]
) -> None:
    made = [left_behind(tmp_path, seed=seed, **{**TOLD, **one}) for seed, one in enumerate([*fields, fields[-1]])]
    for run in made:
        uploaded(run)
    report(tmp_path, server, "--campaign", "t2", "--wandb")
    [kept] = server.reports
    grid, single = (block for block in kept["spec"]["blocks"] if block["type"] == "panel-grid")
    assert grouping(grid) == [{"section": "config", "name": key}]
    assert {panel["groupBy"] for kind, _, panel in panels_of(grid) if kind == "Bar Chart"} == {key}
    swept = [panel for kind, _, panel in panels_of(single) if kind == "Parallel Coordinates Plot"]
    assert [(one["accessor"], one["log"]) for panel in swept for one in panel["columns"][:-2]] == columns
    systems = [summary.config(run)["system"] for run in made]
    assert len(set(systems)) == len({json.dumps(one) for one in fields}), "one name for runs that differ in the seed only"
    if columns:
        assert all(name in json.dumps(kept["spec"]["blocks"]) for name in systems), "the tables say which bar is which"


def panels_of(grid: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Kind, title and settings of each."""
    bank = grid["metadata"]["panelBankSectionConfig"]["panels"]
    return [(panel["viewType"], panel["config"].get("chartTitle", ""), panel["config"]) for panel in bank]


def grouping(grid: dict[str, Any]) -> list[dict[str, str]]:
    [runset] = grid["metadata"]["runSets"]
    keys: list[dict[str, str]] = runset["grouping"]
    return keys


@pytest.mark.parametrize(
    ("status", "at"),
    [(401, "upsertView"), (GONE, "upsertView"), (HANG, "")],
    ids=["refuses it", "is gone as it is made", "hangs from the beginning"],
)
def test_a_server_that_does_not_want_it_is_one_line_in_bounded_time(
    tmp_path: Path, server: Server, status: int, at: str
) -> None:
    uploaded(left_behind(tmp_path))
    server.trouble = lambda what, number: status if what.endswith(at) else None
    began = time.monotonic()
    said = report(tmp_path, server, "last", "--wandb", code=1)
    assert "W&B" in said and "Traceback" not in said and not server.reports
    assert time.monotonic() - began < 120  # the client's own limit is 20 s


def test_a_run_that_is_not_there_is_uploaded_first(tmp_path: Path, server: Server) -> None:
    run = left_behind(tmp_path)
    assert f"hpc-cifar sync {run.id}" in report(tmp_path, server, "last", "--wandb", code=2)
