"""What a person types first, with the real programs: torchrun on deep300, the quickstart chain, the benchmarks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_cifar import files
from hpc_cifar.runs import all_runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2700)]  # a guard: the quickstart job trains by itself for minutes


def call(*command: str, cwd: Path, code: int = 0, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=2400, check=False
    )
    assert done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_torchrun_on_a_file_that_asks_for_eight_gpus(repository: Path, tmp_path: Path, digits_data: Path) -> None:
    """deep300 asks for 8 GPUs and W&B online; here are two CPU processes and no login."""
    site = {"HPC_CIFAR_DATA": str(digits_data), "HPC_CIFAR_RUNS": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    job = str(repository / "jobs" / "deep300.yaml")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hpc_cifar"]
    command = [*torchrun, "train", job, "--set", "data.dataset=digits", "--name", "try", "--max-steps"]
    out = call(*command, "2", cwd=tmp_path, **site)
    assert "8 GPUs" in out and "2 process(es) on the CPU" in out
    assert "W&B: no login here" in out and "hpc-cifar sync uploads later" in out
    (run,) = all_runs(tmp_path)
    assert files.read_object(run.result_file)["state"] == "stopped"
    assert not (run.path / "wandb").exists(), "nothing of W&B's client was needed"
    call(*command, "3", cwd=tmp_path, **site)  # the same command continues
    steps = [row["step"] for row in files.read_json_lines(run.metrics_file) if row.get("event") == "stopped"]
    assert steps == [2, 3]


def test_quickstart_chain_without_archive_and_network(tmp_path: Path) -> None:
    """What `make run` does on a machine without internet: the name of the dataset, then a run on it."""
    site = {
        "HPC_CIFAR_DATA": str(tmp_path / "data"),
        "HPC_CIFAR_RUNS": str(tmp_path / "runs"),
        "HPC_CIFAR_ARCHIVE": "",
        "https_proxy": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
    }
    program = [sys.executable, "-m", "hpc_cifar"]
    done = subprocess.run(
        [*program, "prepare", "--or-digits", "--print-dataset"],
        cwd=tmp_path, env=os.environ | site, capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "digits"
    assert "digits" in done.stderr
    out = call(*program, "submit", "quickstart-digits", "--cluster", "local", "--follow", cwd=tmp_path, **site)
    assert "finished" in out and "test accuracy" in out
    (run,) = all_runs(tmp_path / "runs")
    result = files.read_object(run.result_file)
    assert result["state"] == "finished" and result["data"] == "digits" and result["test_accuracy"] > 0.9
    assert run.state().world_size == 2


def test_quickstart_passes_eighty_percent(tmp_path: Path, cifar_data: Path) -> None:
    site = {"HPC_CIFAR_DATA": str(cifar_data), "HPC_CIFAR_RUNS": str(tmp_path)}
    call(sys.executable, "-m", "hpc_cifar", "submit", "quickstart", "--cluster", "local", "--follow", cwd=tmp_path, **site)
    (run,) = all_runs(tmp_path)
    assert files.read_object(run.result_file)["test_accuracy"] >= 0.80


def test_the_transfer_benchmark_runs(repository: Path, tmp_path: Path, digits_data: Path) -> None:
    few = ("dataset=digits", "train_images=200", "batch_size=50")
    options = ["ann-1", "--set=epochs=2", *(f"--set=data.{change}" for change in few), "--json", str(tmp_path / "figures.json")]
    command = [sys.executable, str(repository / "benchmarks" / "transfer.py"), *options]
    call(*command, cwd=tmp_path, HPC_CIFAR_DATA=str(digits_data), HPC_CIFAR_RUNS=str(tmp_path / "runs"))
    assert len(json.loads((tmp_path / "figures.json").read_text())["from scratch"]) == 1
