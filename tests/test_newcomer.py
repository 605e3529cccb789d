"""What a person types first, with the real programs: torchrun on deep300, the quickstart chain, the wheel, the benchmarks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hpc_cifar import files
from hpc_cifar.runs import all_runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]


def call(*command: str, cwd: Path, code: int = 0, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=400, check=False
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
    assert "W&B: no login here" in out and "recording offline" in out
    (run,) = all_runs(tmp_path)
    assert (run.result() or {})["state"] == "stopped"
    ids = {path.name.rpartition("-")[2] for path in (run.path / "wandb").glob("offline-run-*")}
    call(*command, "3", cwd=tmp_path, **site)  # the same command continues
    again = {path.name.rpartition("-")[2] for path in (run.path / "wandb").glob("offline-run-*")}
    assert len(ids) == 1 and again == ids, "one W&B id over all segments"
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
    result = run.result() or {}
    assert result["state"] == "finished" and result["data"] == "digits" and result["test_accuracy"] > 0.9
    assert run.state()["world_size"] == 2


def test_quickstart_passes_eighty_percent(tmp_path: Path, cifar_data: Path) -> None:
    site = {"HPC_CIFAR_DATA": str(cifar_data), "HPC_CIFAR_RUNS": str(tmp_path)}
    call(sys.executable, "-m", "hpc_cifar", "submit", "quickstart", "--cluster", "local", "--follow", cwd=tmp_path, **site)
    (run,) = all_runs(tmp_path)
    assert (run.result() or {})["test_accuracy"] >= 0.80


def test_the_wheel_holds_the_job_files_and_runs(repository: Path, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(repository)]
    call(*build, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for job in (repository / "jobs").glob("*.yaml"):
        assert f"hpc_cifar/_files/jobs/{job.name}" in names
    assert "hpc_cifar/_files/clusters/gpu8.yaml" in names
    site = {"PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"}
    assert "deep300" in call(sys.executable, "-m", "hpc_cifar", "jobs", cwd=tmp_path, **site)
    dry = call(sys.executable, "-m", "hpc_cifar", "submit", "deep300", "--cluster", "gpu8", "--dry-run", cwd=tmp_path, **site)
    assert "#SBATCH --gpus-per-node=8" in dry and "GPU-hours" in dry


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("step.py", ["--job=quickstart-digits", "--steps=2", "--rounds=1", "--rungs=channels_last,eager fused"]),
        ("restart.py", ["--dataset=digits", "--processes=2", "--rounds=1"]),
        ("data.py", ["--images", "600", "--rounds", "1"]),
        ("systems.py", ["quickstart-digits", "--seeds", "2", "--set", "epochs=1", "--suffix", "short"]),
        (
            "transfer.py",
            ["ann-1", "--set=data.dataset=digits", "--set=data.train_images=200", "--set=data.batch_size=50", "--set=epochs=2"],
        ),
    ],
)
def test_benchmarks_run(repository: Path, tmp_path: Path, digits_data: Path, script: str, options: list[str]) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, str(repository / "benchmarks" / script), *options, "--json", str(out)]
    call(*command, cwd=tmp_path, HPC_CIFAR_DATA=str(digits_data), HPC_CIFAR_RUNS=str(tmp_path / "runs"))
    figures = json.loads(out.read_text())
    assert figures
    if script == "restart.py":
        [start] = figures["starts"]
        assert set(start["plain"][0]) < set(start["ours"][0]), "the same stages, but for the time to the first import"
    if script == "step.py":  # counts do not drift with the machine
        counts = {name: row["per_step"] for name, row in figures["rungs"].items()}
        assert {found["waits"] for found in counts.values()} == {0}, "no step reads a number from the device"
        assert counts["eager fused"]["operations"] < 1.4 * counts["plain"]["operations"], counts
