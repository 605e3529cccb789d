"""A site of its own: a copy of the package with a fake training loop, and folders for runs and data."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hpc_cifar
from hpc_cifar import files, runs
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.launch import process, script
from hpc_cifar.launch.local import process_file
from hpc_cifar.records import Process
from hpc_cifar.runs import Run

HERE = Path(__file__).parent
PACKAGE = Path(hpc_cifar.__file__).parent
JOB = """\
name: tiny
seed: 1
epochs: {epochs}
model: {{family: sequential, layers: [flatten, {{dense: {{units: 10}}}}]}}
data: {{dataset: digits, batch_size: 50}}
optimizer: {{name: sgd, lr: 0.1}}
tracking: {{tags: [{tags}]}}
resources: {{processes_per_node: {processes}, time: "{time}"}}
"""


def eventually(check: Callable[[], Any], timeout_s: float = 120.0, what: str = "") -> Any:
    """Wait until ``check`` is true and return it."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if found := check():
                return found
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout_s} s: {what or check}")


class Site:
    """Runs the command line of the copied package as a user would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.package = folder / "src" / "hpc_cifar"
        self.runs, self.data, self.work = folder / "runs", folder / "data", folder / "work"
        shutil.copytree(PACKAGE, self.package)  # with its bytecode, which is as new as the copy
        shutil.copy(HERE / "fake_loop.py", self.package / "train" / "loop.py")
        shutil.copy(HERE / "fake_store.py", self.package / "data" / "store.py")
        (self.data / "digits").mkdir(parents=True)
        self.work.mkdir()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HPC_CIFAR_", "PYTEST_"))},
            "PYTHONPATH": str(self.package.parent),
            "PYTHONSAFEPATH": "1",
            "HPC_CIFAR_RUNS": str(self.runs),
            "HPC_CIFAR_DATA": str(self.data),
            "CUDA_VISIBLE_DEVICES": "",
        }

    def job(self, *tags: str, epochs: int = 2, processes: int = 2, time: str = "00:10:00") -> str:
        path = self.work / "tiny.yaml"
        path.write_text(JOB.format(epochs=epochs, tags=", ".join(tags), processes=processes, time=time))
        return str(path)

    def start(self, *arguments: str, **more: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "hpc_cifar", *arguments]
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
        return subprocess.Popen(command, cwd=self.work, env=self.environment, text=True, **options)

    def cli(self, *arguments: str, code: int | None = 0, timeout: float = 200) -> subprocess.CompletedProcess[str]:
        with self.start(*arguments) as child:
            out, err = child.communicate(timeout=timeout)
        if code is not None:
            assert child.returncode == code, f"{arguments}: exit code {child.returncode}\n{out}\n{err}"
        assert "Traceback" not in err
        return subprocess.CompletedProcess(arguments, child.returncode, out, err)

    def submit(self, *tags: str, **job: Any) -> Run:
        done = self.cli("submit", self.job(*tags, **job), "--cluster", "local", "--parsable")
        run, job_id = done.stdout.strip().split("\t")
        assert job_id.startswith("local-")
        return Run(self.runs / run)

    def status(self, run: Run) -> dict[str, Any]:
        rows = json.loads(self.cli("status", run.id, "--json").stdout)
        assert len(rows) == 1
        found: dict[str, Any] = rows[0]
        return found

    def controller(self, run: Run) -> Process:
        found: Process = eventually(lambda: process.recorded(process_file(run.submitit, run.last_job().job_id)))
        return found

    def seen(self, run: Run, rank: int = 0) -> list[dict[str, Any]]:
        """What the fake loop saw, a row a segment."""
        return files.read_json_lines(run.path / f"seen-{rank}.jsonl")

    def running(self, run: Run) -> None:
        eventually(lambda: (run.state().step or 0) >= 1, what="first step")

    def close(self) -> None:
        for path in self.runs.glob("*/submitit/*_process.json"):
            for pid in process.survivors(process.recorded(path)):
                process.send(pid, signal.SIGKILL)


# ---- stand-ins for Slurm's programs

EXPERIMENT = Experiment.model_validate(
    {
        "name": "deep",
        "epochs": 3,
        "model": {"family": "sequential", "layers": ["flatten", {"dense": {"units": 10}}]},
        "data": {"batch_size": 64},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "resources": {"nodes": 2, "gpus_per_node": 4, "time": "00:20:30", "memory_gib_per_node": 1.5, "cpus_per_process": 3},
    }
)


def command(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def unmarked(text: str) -> str:
    """A script without what names its submission."""
    return re.sub(r"\d{8}-\d{6}-[0-9a-f]{8}", "MARK", text)


def guarded(code: Path) -> Path:
    """A code snapshot, and beside it what a job's script needs before ``srun``."""
    code.mkdir(parents=True, exist_ok=True)
    (code.parent / "submitit").mkdir(exist_ok=True)
    shutil.copy(script.GUARD, code.parent / "submitit")
    return code


def run_with(root: Path, job_id: str = "7", state: dict[str, Any] | None = None) -> runs.Run:
    run = runs.create(root, runs.new_run_id("deep", root), EXPERIMENT, {"batch_size": 64}, {})
    run.add_job(executor="slurm", job_id=job_id)
    if state is not None:
        run.update_state(**state)
    return run
