"""Runs on this machine, on submitit's machinery: our executor, and how a job file is fitted to what is here."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.local.local import LocalJob, LocalJobEnvironment

from .. import files
from ..config.experiment import Resources
from ..errors import LaunchError
from ..plan import Placement
from . import process
from .job import MAX_TIMEOUTS

LEAKING_PREFIXES = ("SUBMITIT_LOCAL_", "SLURM_", "TORCHELASTIC_", "HPC_CIFAR_MASTER", "HPC_CIFAR_RESTART")
LEAKING = frozenset(
    (
        *("SUBMITIT_EXECUTOR", "SUBMITIT_FOLDER", "_TEST_CLUSTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    )
)
"""What a surrounding job or torchrun says about itself, which must not reach a job of its own."""


def visible_gpus() -> list[str]:
    """GPUs of this machine, as ``CUDA_VISIBLE_DEVICES`` names them; found without torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",")]
        end = next((index for index, name in enumerate(names) if name in ("", "-1", "NoDevFiles")), len(names))
        return names[:end]
    with contextlib.suppress(OSError):
        count = len(list(Path("/proc/driver/nvidia/gpus").iterdir()))
        if count:
            return [str(index) for index in range(count)]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
        return [str(index) for index, line in enumerate(line for line in listing.splitlines() if line.startswith("GPU "))]
    return []


def local_placement(resources: Resources, gpus: int, cpus: int) -> tuple[Placement, tuple[str, ...]]:
    """Fit what the file asks for to one machine with ``gpus`` GPUs and ``cpus`` CPUs; say what was adapted."""
    asked = f"{resources.nodes} node{'s' if resources.nodes > 1 else ''}"
    notes = []
    if resources.gpus_per_node:
        asked += f" x {resources.gpus_per_node} GPU{'s' if resources.gpus_per_node > 1 else ''}"
        on_gpus = min(resources.gpus_per_node, gpus)
        processes = on_gpus or min(resources.processes_per_node or 2, 2 if resources.processes_per_node is None else cpus, cpus)
        if on_gpus < resources.gpus_per_node or resources.nodes > 1:
            here = f"{on_gpus} GPU{'s' if on_gpus > 1 else ''}" if on_gpus else f"no GPU, so {_processes(processes)} on the CPU"
            notes.append(f"the file asks for {asked}; this machine has {here}")
    else:
        on_gpus = 0
        processes = resources.processes_per_node or min(2, cpus)
        if resources.nodes > 1:
            each = _processes(processes)
            notes.append(f"the file asks for {asked} x {each}; this is one machine, so {each} in all")
        elif resources.processes_per_node is None:
            notes.append(f"the file does not say how many processes: {_processes(processes)} on the CPU")
    threads = resources.cpus_per_process or max(1, cpus // processes)
    if threads * processes > max(cpus, processes):
        notes.append(f"the file asks for {threads} CPUs a process; this machine has {cpus}")
        threads = max(1, cpus // processes)
    return Placement(nodes=1, processes_per_node=processes, gpus_per_node=on_gpus, cpus_per_process=threads), tuple(notes)


def _processes(count: int) -> str:
    return f"{count} process{'es' if count > 1 else ''}"


def code_environment(code: Path) -> dict[str, str]:
    """Variables that make a job import the snapshot, whatever the working folder holds."""
    others = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{code}{os.pathsep}{others}" if others else str(code), "PYTHONSAFEPATH": "1"}


def new_job_id() -> str:
    """Unlike submitit's pids, never used twice; no underscore, which submitit reads as an array."""
    return f"local-{time.strftime('%y%m%d%H%M%S')}-{secrets.token_hex(3)}"


def process_file(folder: Path, job_id: str) -> Path:
    """Where the identity of a job's controller is recorded."""
    return folder / f"{job_id}_process.json"


class LocalExecutor(submitit.LocalExecutor):  # type: ignore[misc, unused-ignore]
    """submitit's local executor with a controller of our own (see :mod:`hpc_cifar.launch.controller`).

    The stock one dies with the terminal, stops after six requeues, waits for ranks that cannot end any more, and hides or
    renumbers the GPUs.

    Args:
        folder: for pickles and logs.
        job_id: name of the job; recorded before anything starts, so that no process is ever without a record.
        code: the snapshot that jobs import.
        gpus: values for ``CUDA_VISIBLE_DEVICES``.
        environment: variables of the cluster profile.
        predecessor: process file of a job that must have ended before this one's ranks start.
        after: run directories of runs that must have finished before this one's ranks start.
    """

    def __init__(
        self,
        folder: Path,
        *,
        job_id: str,
        code: Path,
        gpus: list[str],
        environment: dict[str, str],
        predecessor: Path | None = None,
        after: Sequence[Path] = (),
    ) -> None:
        super().__init__(folder, max_num_timeout=MAX_TIMEOUTS)
        self.job_id, self.code, self.gpus, self.environment = job_id, code, gpus, environment
        self.waits = {"predecessor": str(predecessor or ""), "after": [str(path) for path in after]}

    def _submit_command(self, command: str) -> LocalJob[Any]:
        parameters = self.parameters
        timeout_s = float(parameters["timeout_min"]) * 60
        tasks = int(parameters["tasks_per_node"])
        who = process_file(self.folder, self.job_id)
        spec = {
            "folder": str(self.folder),
            "job_id": self.job_id,
            "command": command,
            "tasks": tasks,
            "timeout_s": timeout_s,
            "signal_delay_s": min(float(parameters["signal_delay_s"]), timeout_s / 2),
            "signal": LocalJobEnvironment._usr_sig().name,
            "process_file": str(who),
            **self.waits,
        }
        spec_file = self.folder / f"{self.job_id}_job.json"
        files.write_json(spec_file, spec)
        log = (self.folder / f"{self.job_id}_controller.log").open("ab")
        try:
            with log:
                child = subprocess.Popen(
                    [sys.executable, "-u", "-m", "hpc_cifar.launch.controller", str(spec_file)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environment(),
                    start_new_session=True,
                )
        except OSError as error:
            raise LaunchError(f"cannot start {sys.executable}: {error}") from None
        files.write_json(who, process.identity(child.pid))
        child.returncode = 0  # it outlives us on purpose: Popen must neither warn about it nor wait for it
        job: LocalJob[Any] = LocalJob(folder=self.folder, job_id=self.job_id, tasks=list(range(tasks)))
        return job

    def _environment(self) -> dict[str, str]:
        kept = {
            name: value for name, value in os.environ.items() if name not in LEAKING and not name.startswith(LEAKING_PREFIXES)
        }
        threads = {"OMP_NUM_THREADS": str(self.parameters["cpus_per_task"])} if "OMP_NUM_THREADS" not in kept else {}
        return {
            **kept,
            **threads,
            **self.environment,
            **code_environment(self.code),
            "CUDA_VISIBLE_DEVICES": ",".join(self.gpus),
        }
