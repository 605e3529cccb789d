"""``hpc-cifar drill``: real faults on real trainings, and a verdict that can be bad."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from command_line import COMMANDS, TRAINING, preload, typed

from hpc_cifar import files
from hpc_cifar.cli.drill import _print
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.config.load import load_experiment
from hpc_cifar.config.packaged import find_job
from hpc_cifar.launch import process
from hpc_cifar.launch.drill import BY_ITSELF, FAULTS, INTERVAL, RESUMED, Drill, Outcome, rehearsed
from hpc_cifar.launch.local import process_file
from hpc_cifar.runs import Run
from hpc_cifar.train import checkpoint

preload(*COMMANDS, *TRAINING)
JOB = """\
name: small
epochs: 300
model: {family: sequential, layers: [flatten, {dense: {units: 32}}, relu, {dropout: {rate: 0.2}}, {dense: {units: 10}}]}
data: {dataset: digits, batch_size: 144, augment: {crop_padding: 1}}
optimizer: {name: sgd, lr: 0.03, momentum: 0.9}
training: {ema_decay: 0.9, early_stopping: {patience: 3}}
resources: {processes_per_node: 2}
"""
WRITES = 'for n in 1 2 3 4 5 6 7 8 9; do mkdir -p "$1"; touch "$1/$n"; sleep 0.2; done'


def drill(folder: Path, data: Path, *options: str, code: int = 0) -> str:
    (folder / "job.yaml").write_text(JOB)
    environment = {**os.environ, "HPC_CIFAR_RUNS": str(folder / "runs"), "HPC_CIFAR_DATA": str(data)}
    done = typed(["drill", "job.yaml", "--cluster", "local", *options], environment, folder, timeout_s=800)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout or done.stderr


@pytest.mark.slow
def test_nothing_is_lost_on_this_machine(tmp_path: Path, digits_data: Path) -> None:
    faults = ("preempt", "kill-all", "kill-in-save", "truncated", "flipped", "disk-full", "hang")
    said = json.loads(drill(tmp_path, digits_data, "--faults", ",".join(faults), "--seed", "7", "--json"))
    assert said["good"] and said["same_weights"] and [row["fault"] for row in said["faults"]] == list(faults)
    found = {row["fault"]: row for row in said["faults"]}
    assert all(row["same"] and row["back_s"] > 0 for row in found.values())
    assert found["preempt"]["lost"] == 0 and found["preempt"]["note"] == "by itself"
    assert all(found[name]["note"] == "after hpc-cifar resume" for name in ("kill-all", "disk-full"))
    assert all(
        row["from_step"] % INTERVAL == 0 or row["fault"] == "preempt" or row["from_step"] % 9 == 0 for row in found.values()
    )
    assert not list((tmp_path / "runs" / ".drills").iterdir()), "runs that proved it are not kept"


def test_the_runs_are_removed_when_their_processes_have_ended(tmp_path: Path) -> None:
    runs = [Run(tmp_path / "drill" / name) for name in ("victim", "twin")]
    children = []
    for run in runs:
        run.submitit.mkdir(parents=True)
        child = subprocess.Popen(["sh", "-c", WRITES, "sh", run.path / "checkpoints"], start_new_session=True)
        children.append(child)
        files.append_json_line(run.path / "jobs.jsonl", {"executor": "local", "job_id": "local-1"})
        files.write_json(process_file(run.submitit, "local-1"), process.identity(child.pid))
    made = object.__new__(Drill)
    made.root, (made.victim, made.twin) = tmp_path / "drill", runs
    assert made.remove()
    assert all(child.wait(timeout=5) == 0 for child in children)
    assert not made.root.exists()


def test_the_table_says_what_was_lost(capsys: pytest.CaptureFixture[str]) -> None:
    good = {"from_step": 10, "back_s": 3.0, "note": "by itself"}
    _print([Outcome("preempt", 10, lost=0, same=True, **good), Outcome("kill-one", 12, lost=2, same=False, **good)], same=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[2:4]] == ["yes", "NO"]
    assert "2 steps were made twice; the final weights are NOT the same" in lines[-2]
    assert lines[-1] == "lost what need not be: kill-one"


def test_what_is_lost_is_bad() -> None:
    good = {"at_step": 12, "from_step": 10, "back_s": 3.0, "same": True}
    assert Outcome("kill-one", lost=2, **good).good and not Outcome("preempt", lost=2, note=BY_ITSELF, **good).good
    assert Outcome("flipped", lost=3 * INTERVAL, **good).good and not Outcome("kill-one", lost=3 * INTERVAL, **good).good
    assert not Outcome("kill-one", lost=2, **{**good, "same": False}).good
    assert not Outcome("kill-in-save", lost=2, missed=True, **good).good, "it was no such fault"
    assert Outcome("preempt", lost=0, note=BY_ITSELF, **good).good
    assert not Outcome("preempt", lost=0, note=RESUMED, **good).good, "it would be dead"
    assert not Outcome("kill-one", 12).good, "it never came back"


def test_weights_that_differ_in_one_bit_are_not_the_same(tmp_path: Path) -> None:
    for step, value in ((1, 1.0), (2, 1.0), (3, 1.0000001)):
        state = {"model": {"w": torch.tensor([value])}, "optimizer": {"state": {0: torch.ones(2)}, "lr": [0.1]}, "ema": None}
        checkpoint.save(tmp_path, state, step=step, epoch=0)
    one, two, three = (checkpoint.named(tmp_path, f"step-{step:08}") for step in (1, 2, 3))
    assert one is not None and two is not None and three is not None
    assert checkpoint.same(one, two) and not checkpoint.same(one, three)


@pytest.mark.parametrize("job", ["deep300", "quickstart-digits", "speed94", "vgg16-frozen", "deep300-large-batch"])
def test_any_job_can_be_rehearsed(job: str) -> None:
    experiment: Experiment = load_experiment(find_job(job), [])
    made = rehearsed(experiment, list(FAULTS), 45_000)
    assert made.data.train_images == min(20 * made.data.batch_size, 45_000) or made.data.train_images is None
    assert made.checkpoint.every_steps == INTERVAL and made.model == experiment.model and made.optimizer == experiment.optimizer


@pytest.mark.slow
def test_faults_that_cannot_be_here_are_refused(tmp_path: Path, digits_data: Path) -> None:
    assert "; faults are preempt, " in drill(tmp_path, digits_data, "--faults", "requeue", code=2)
    assert "did you mean 'preempt'?" in drill(tmp_path, digits_data, "--faults", "premept", code=2)
