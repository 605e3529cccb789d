"""The selected checkpoint as an artifact of W&B, by the real client to a server on loopback."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from command_line import typed
from reported import left_behind
from wandb_server import Server

from hpc_cifar.runs import Run

pytestmark = [pytest.mark.component("wandb"), pytest.mark.slow]


def trained(tmp_path: Path) -> tuple[Run, Path]:
    """A finished run and its selected checkpoint."""
    tracking = {"wandb": "online", "artifact": True}
    run = left_behind(tmp_path, tracking=tracking, checkpoint={"select": "best"})
    folder = run.checkpoints / "step-00000045"
    folder.mkdir()
    (folder / "state.pt").write_bytes(os.urandom(50_000))
    (folder / "manifest.json").write_text(json.dumps({"step": 45, "epoch": 5}))
    (run.checkpoints / "best").symlink_to(folder.name)
    return run, folder


def test_the_selected_checkpoint_is_kept_as_the_experiments_model(tmp_path: Path, server: Server) -> None:
    run, folder = trained(tmp_path)
    for _ in range(2):  # a second upload has nothing to add
        done = typed(["sync", str(run.path)], {**os.environ, **server.environment}, tmp_path, timeout_s=400)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{server.requests}\n{server.unknown}"
    [artifact] = server.artifacts.values()
    assert artifact.name == "net-model" and artifact.type == "model" and artifact.committed
    assert artifact.metadata == {"run": run.id, "step": 45, "epoch": 5} and set(artifact.aliases) >= {"best", run.id}
    assert artifact.files == {name: (folder / name).read_bytes() for name in ("state.pt", "manifest.json")}


def test_a_model_that_did_not_arrive_is_said_and_arrives_the_next_time(tmp_path: Path, server: Server) -> None:
    run, _ = trained(tmp_path)
    server.trouble = lambda what, number: 403 if what == "CommitArtifact" else None
    refused = typed(["sync", str(run.path)], {**os.environ, **server.environment}, tmp_path, timeout_s=400)
    assert refused.returncode == 1 and "W&B could not be finished: " in refused.stderr, refused.stdout + refused.stderr
    assert not any(artifact.committed for artifact in server.artifacts.values())
    server.trouble = lambda what, number: None
    done = typed(["sync", str(run.path)], {**os.environ, **server.environment}, tmp_path, timeout_s=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [artifact.committed for artifact in server.artifacts.values()] == [True]
    [kept] = server.runs.values()
    assert len(kept.history) == len({row["_step"] for row in kept.history}), "no row twice"


def test_the_code_is_kept_when_asked(tmp_path: Path, server: Server) -> None:
    run = left_behind(tmp_path, tracking={"wandb": "online", "code": True})
    package = run.code / "hpc_cifar"
    (package / "__pycache__").mkdir(parents=True)
    (package / "one.py").write_text("print('one')\n")
    (package / "__pycache__" / "one.cpython-311.pyc").write_bytes(b"compiled")
    secret = tmp_path / "elsewhere.py"
    secret.write_text("not the run's")
    (package / "link.py").symlink_to(secret)
    for _ in range(2):
        done = typed(["sync", str(run.path)], {**os.environ, **server.environment}, tmp_path, timeout_s=400)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{server.unknown}"
    [artifact] = server.artifacts.values()
    assert artifact.name == "source-net" and artifact.type == "code" and artifact.committed
    assert artifact.files == {"hpc_cifar/one.py": b"print('one')\n"}
