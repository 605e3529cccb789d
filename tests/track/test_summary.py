"""What W&B shows of a run in its tables: what people sort, group and filter by, as the real client uploads it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mirrored import EXPERIMENT, GIT, at, job, sync
from wandb_server import Kept, Server, until

from hpc_cifar import files, runs
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.runs import Run
from hpc_cifar.track import companion, summary, wandb_run
from hpc_cifar.track.metrics import MetricsLog
from hpc_cifar.train import rehearsal

pytestmark = [pytest.mark.component("wandb"), pytest.mark.slow]
COMMAND = ["/opt/hpc-cifar", "submit", "curves.yaml"]
ACCURACY = {1: 0.2, 2: 0.6, 3: 0.4, 4: 0.5}
STARTED = {"parameters": 551_722, "gpus": 2, "gpu": "A GPU", "world_size": 2, "precision": "bf16"}


def a_run(folder: Path, **tracking: Any) -> Run:
    values = EXPERIMENT | {
        "name": "curves",
        "tracking": {"wandb": "online", **tracking},
        "checkpoint": {"every_steps": 20, "select": "best"},
    }
    origin = {"git": GIT, "command": COMMAND, "host": "login1", "packages": {"torch": "2.15"}, "python": "3.11.7"}
    return runs.create(folder, "curves", Experiment.model_validate(values), {"batch_size": 64}, origin)


def segment(run: Run, first: int, last: int, state: str, reason: str | None = None) -> None:
    """Epochs of one segment of ten steps each, and how it ended."""
    log = MetricsLog(run.metrics_file, 10 * (first - 1))
    log.write("event", epoch=first - 1, step=10 * (first - 1), event="started", **STARTED)
    log.write("event", epoch=first - 1, step=10 * (first - 1), event="pipeline", pipeline="resident", why="")
    for epoch in range(first, last + 1):
        log.write("epoch", epoch=epoch, step=10 * epoch, val_accuracy=ACCURACY[epoch], val_loss=1 - ACCURACY[epoch])
    log.write("event", epoch=last, step=10 * last, event=state, reason=reason)
    log.close()
    run.update_state(state=state, reason=reason, precision="bf16", world_size=2, device="cuda", data="digits")
    if state == "finished":
        files.write_json(run.result_file, {"state": state, "test_accuracy": 0.75})


def the_one(server: Server) -> Kept:
    [kept] = server.runs.values()
    assert not server.unknown
    return kept


def test_the_best_and_the_last_are_those_of_all_segments(server: Server, tmp_path: Path) -> None:
    run = a_run(tmp_path, alerts=True)
    segment(run, 1, 3, "requeued", "preempted")
    sync(run, server)
    kept = the_one(server)
    assert kept.summary["val_accuracy"] == {"max": 0.6, "last": 0.4} and kept.summary["reason"] == "preempted"
    segment(run, 4, 4, "finished")
    sync(run, server)
    kept = the_one(server)
    assert kept.summary["val_accuracy"] == {"max": 0.6, "last": 0.5}
    assert kept.summary["val_loss"] == {"min": pytest.approx(0.4), "last": 0.5}
    assert kept.summary["selected"] == {"epoch": 2, "val_accuracy": 0.6, "val_loss": pytest.approx(0.4)}
    assert "reason" not in kept.summary and kept.summary["preemptions"] == 1
    used = {name: kept.summary.get(name) for name in (*STARTED, "pipeline", "device")}
    assert used == STARTED | {"pipeline": "resident", "device": "cuda"}
    assert (kept.alerts, kept.levels) == (["curves: finished"], ["INFO"])


def test_hyper_parameters_have_their_usual_names_and_the_rest_lies_apart(server: Server, tmp_path: Path) -> None:
    run = a_run(tmp_path)
    segment(run, 1, 1, "finished")
    sync(run, server)
    kept = the_one(server)
    config, fields = kept.values(), run.experiment()
    assert config["optimizer"]["lr"] == fields.optimizer.lr and config["data"]["batch_size"] == fields.data.batch_size
    assert config["model"]["family"] == fields.model.family and config["seed"] == fields.seed and config["run"] == run.id
    assert not {"packages", "host", "plan", "tracking", "resources", "command", "experiment"} & set(config)
    about = config["about"]
    assert about["host"] == "login1" and about["packages"] == {"torch": "2.15"} and about["command"] == COMMAND
    assert kept.origin["commit"] == GIT["commit"] and kept.origin["program"] == COMMAND[0], "not those of sync"


@pytest.mark.parametrize("reason", summary.INTERRUPTED)
def test_a_segment_that_was_sent_away_under_torchrun_is_no_success(server: Server, tmp_path: Path, reason: str) -> None:
    run = a_run(tmp_path)
    segment(run, 1, 2, "stopped", reason)
    sync(run, server)
    kept = the_one(server)
    assert (kept.preempting, kept.ended, kept.summary["preemptions"]) == (1, [1], 1)


def test_a_failure_is_an_error_and_a_wish_to_stop_is_none(server: Server, tmp_path: Path) -> None:
    run = a_run(tmp_path, alerts=True)
    segment(run, 1, 2, "stopped", "--max-steps 20")
    sync(run, server)
    segment(run, 3, 3, "failed", "the loss became nan")
    sync(run, server)
    kept = the_one(server)
    assert (kept.preempting, kept.ended, kept.summary["preemptions"]) == (0, [0, 1], 0)
    assert (kept.alerts, kept.levels) == (["curves: failed"], ["ERROR"])


def test_settings_that_a_client_does_not_know_are_left_out() -> None:
    assert wandb_run._settings({"silent": True, "of_another_version": 1}) == {"silent": True}


def test_a_training_under_torchrun_that_is_told_to_end_and_goes_on(server: Server, tmp_path: Path, digits_data: Path) -> None:
    environment = at(server, tmp_path, digits_data) | {companion.VARIABLE: "100"}
    train = ["-m", "hpc_cifar", "train", str(job(tmp_path)), "--name", "mirrored"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "--master-port=0", *train]
    slow = environment | {rehearsal.VARIABLE: "0.1"}
    with subprocess.Popen(command, env=slow, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as agent:
        until(lambda: server.runs and next(iter(server.runs.values())).history)
        agent.terminate()
        agent.wait(120)
    kept = the_one(server)
    assert (kept.preempting, kept.ended, kept.summary["preemptions"]) == (1, [1], 1)
    assert kept.summary["state"] == "stopped" and kept.summary["reason"] == "terminated"
    about = files.parse_json(kept.files["wandb-metadata.json"])
    assert about["args"][0] == "train" and "--beside" not in about["args"], "the command of the training"
    done = subprocess.run(
        [sys.executable, *train], env=environment, cwd=tmp_path, capture_output=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    kept = the_one(server)
    assert kept.ended[-1] == 0 and kept.summary["state"] == "finished" and "reason" not in kept.summary
    used = {name: kept.summary[name] for name in ("precision", "pipeline", "world_size", "gpus")}
    assert (
        used == {"precision": "float32", "pipeline": "resident", "world_size": 1, "gpus": 0} and kept.summary["parameters"] > 0
    )
    rows = [row for row in files.read_json_lines(tmp_path / "mirrored" / "metrics.jsonl") if row["kind"] == "epoch"]
    assert kept.summary["val_accuracy"]["max"] == max(row["val_accuracy"] for row in rows)
