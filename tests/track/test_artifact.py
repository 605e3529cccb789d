"""The selected checkpoint as an artifact of W&B, by the real client to a server on loopback."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from command_line import typed
from reported import left_behind
from wandb_server import Server

pytestmark = [pytest.mark.component("wandb"), pytest.mark.slow]


def test_the_selected_checkpoint_is_kept_as_the_experiments_model(tmp_path: Path, server: Server) -> None:
    tracking = {"wandb": "online", "artifact": True}
    run = left_behind(tmp_path, tracking=tracking, checkpoint={"select": "best"})
    folder = run.checkpoints / "step-00000045"
    folder.mkdir()
    (folder / "state.pt").write_bytes(os.urandom(50_000))
    (folder / "manifest.json").write_text(json.dumps({"step": 45, "epoch": 5}))
    (run.checkpoints / "best").symlink_to(folder.name)
    for _ in range(2):  # a second upload has nothing to add
        done = typed(["sync", str(run.path)], {**os.environ, **server.environment}, tmp_path, timeout_s=120)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{server.requests}\n{server.unknown}"
    print(server.requests, server.unknown)
    [artifact] = server.artifacts.values()
    assert artifact.name == "net-model" and artifact.type == "model" and artifact.committed
    assert artifact.metadata == {"run": run.id, "step": 45, "epoch": 5} and set(artifact.aliases) >= {"best", run.id}
    assert artifact.files == {name: (folder / name).read_bytes() for name in ("state.pt", "manifest.json")}
