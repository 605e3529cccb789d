"""The W&B report by the real client, as it arrives at the server on loopback."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import typed
from reported import EVALUATED, left_behind
from wandb_server import ENTITY, GONE, HANG, Server

from hpc_cifar import files
from hpc_cifar.runs import Run
from hpc_cifar.track import identity

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
    [grid] = [block for block in blocks if block["type"] == "panel-grid"]
    panels = panels_of(grid)
    lines = {panel["config"]["chartTitle"]: panel["config"] for panel in panels if panel["viewType"] == "Run History Line Plot"}
    assert lines["Accuracy by epoch"]["metrics"] == ["val_accuracy", "train_accuracy"]
    assert {config["xAxis"] for config in lines.values()} == {"epoch"}
    bars = {panel["config"]["chartTitle"] for panel in panels if panel["viewType"] == "Bar Chart"}
    assert bars == {"Test accuracy", "Restarts", "GPU-hours"}
    assert "Run Comparer" in {panel["viewType"] for panel in panels}
    assert all(run.id in json.dumps(grid["metadata"]["runSets"]) for run in made)
    assert server.unknown == []


def panels_of(grid: dict[str, Any]) -> list[dict[str, Any]]:
    bank: list[dict[str, Any]] = grid["metadata"]["panelBankSectionConfig"]["panels"]
    return bank


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
