"""Sweeps of W&B: the real ``wandb sweep`` and ``wandb agent`` against the server on loopback, as the docs show them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import documented
import pytest
import yaml
from mirrored import EXPERIMENT, sync
from mirrored import train as trained
from wandb_server import ENTITY, Server

from hpc_cifar import files, runs
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.runs import Run
from hpc_cifar.track import identity

[SHOWN] = [block.text for block in documented.blocks("yaml") if block.words == ("yaml", "wandb")]
JOB = EXPERIMENT | {"name": "swept", "epochs": 2, "tracking": {"project": "of-the-file", "entity": "of-the-file"}}


def agent(server: Server, folder: Path, data: Path, sweep: str) -> str:
    """Make the sweep of a file and run an agent until all of it is trained; its id."""
    (folder / "quickstart").write_text(yaml.safe_dump(JOB))  # found before the packaged job of that name
    (folder / "rates.yaml").write_text(sweep)
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("WANDB_SILENT", "WANDB_MODE")},
        **server.environment,
        "HPC_CIFAR_RUNS": str(folder / "runs"),
        "HPC_CIFAR_DATA": str(data),
        "WANDB_DIR": str(folder),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }

    def typed(*words: str) -> str:
        done = subprocess.run(
            ["wandb", *words], env=environment, cwd=folder, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    path = re.search(r"wandb agent (\S+)", typed("sweep", "--entity", ENTITY, "--project", "cifar", "rates.yaml"))
    assert path is not None
    said = typed("agent", re.sub(r"\x1b\[[0-9;]*m", "", path[1]))
    [made] = server.sweeps.values()
    assert not made.left and server.unknown == [] and server.elsewhere == [], said
    assert (made.entity, made.project) == (ENTITY, "cifar")
    return made.id


@pytest.mark.slow
@pytest.mark.component("wandb")
def test_the_sweep_of_the_docs_is_trained_by_an_agent(server: Server, tmp_path: Path, digits_data: Path) -> None:
    sweep = agent(server, tmp_path, digits_data, SHOWN)
    given = server.sweeps[sweep].given
    assert [one["optimizer.lr"] for one in given.values()] == [0.05, 0.1]
    assert server.runs.keys() == given.keys(), "the runs that the agent asked for, and no others"
    for name, values in given.items():
        run, kept = Run(tmp_path / "runs" / f"swept-{name}"), server.runs[name]
        assert run.finished() and run.experiment().optimizer.lr == values["optimizer.lr"] and run.experiment().seed == 1
        assert (kept.sweep, kept.entity, kept.project) == (sweep, ENTITY, "cifar")
        config = kept.values()
        assert config["optimizer.lr"] == values["optimizer.lr"] == config["optimizer"]["lr"] and config["seed"] == 1
        assert kept.ended == [0] and kept.summary["val_accuracy"]["max"] > 0
        place = identity.kept(run)
        assert (place.sweep, set(place.swept), place.id) == (sweep, {"optimizer.lr", "seed"}, name)


@pytest.mark.slow
@pytest.mark.component("wandb")
def test_an_agent_starts_torchrun(server: Server, tmp_path: Path, digits_data: Path) -> None:
    file = yaml.safe_load(SHOWN)
    assert file["command"][:2] == ["${program}", "train"]
    torchrun = ["torchrun", "--nproc-per-node=2", "--standalone", "-m", "hpc_cifar"]
    file["command"] = [*torchrun, *file["command"][1:-1], "--name=two", "${args_no_boolean_flags}"]
    file["parameters"] = {"optimizer": {"value": {"lr": 0.2, "momentum": 0.9}}, "optimizer.nesterov": {"value": True}}
    sweep = agent(server, tmp_path, digits_data, yaml.safe_dump(file))
    [name] = server.sweeps[sweep].given
    [run], [kept] = runs.all_runs(tmp_path / "runs"), server.runs.values()
    assert (run.id, kept.id, kept.sweep) == (f"two-{name}", name, sweep)
    fields: Any = run.experiment().optimizer
    assert (fields.lr, fields.momentum, fields.nesterov, fields.name) == (0.2, 0.9, True, "sgd") and run.state().world_size == 2


@pytest.mark.slow
@pytest.mark.component("wandb")
def test_a_run_of_a_sweep_that_is_uploaded_later_belongs_to_it(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = tmp_path / "config.yaml"
    values.write_text("wandb_version: 1\noptimizer.lr:\n  value: 0.01\n")
    told = {"SWEEP_ID": "sweep0", "RUN_ID": "run0", "ENTITY": "team", "PROJECT": "theirs", "SWEEP_PARAM_PATH": str(values)}
    for name, value in told.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    run = runs.create(tmp_path, "later", Experiment.model_validate(JOB), {"batch_size": 64}, {})
    identity.note(run, "", print)
    for name in told:
        monkeypatch.delenv(f"WANDB_{name}")
    trained(run, 0, 10)
    sync(run, server)
    kept = server.runs["run0"]
    assert (kept.sweep, kept.entity, kept.project, kept.values()["optimizer.lr"]) == ("sweep0", "team", "theirs", 0.01)
    for name, value in {"SWEEP_ID": "another", "RUN_ID": "other", "PROJECT": "elsewhere"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)  # the shell of another agent
    trained(run, 10, 20, ended="finished")
    sync(run, server)
    assert list(server.runs) == ["run0"] and (kept.sweep, len(kept.ended), server.elsewhere) == ("sweep0", 2, [])


def test_an_id_that_another_run_has_makes_no_run_of_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep0")
    monkeypatch.setenv("WANDB_RUN_ID", "run0")
    places = []
    for name in ("one", "two"):
        run = runs.create(tmp_path, name, Experiment.model_validate(JOB), {"batch_size": 64}, {})
        identity.note(run, "", lambda _: None)
        places.append(identity.kept(run))
    assert [(place.id == "run0", place.sweep) for place in places] == [(True, "sweep0"), (False, "")]
    assert files.read_json(tmp_path / "one" / identity.FILE)["project"] == "of-the-file"  # nobody has named the sweep's
    for bad in ("", "../x", "a b"):
        monkeypatch.setenv("WANDB_SWEEP_ID", bad)
        assert identity.by_agent() is None
