"""Start the ranks of a run as real processes, on loopback."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rank_main
from command_line import COMMANDS, CONTEXT, TRAINING, preload

from hpc_cifar import files, runs
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.runs import Run

preload(*COMMANDS, *TRAINING)


def experiment(**changes: Any) -> Experiment:
    """A small network with everything that has state: BatchNorm, dropout, momentum, schedule, EMA, augmentation."""
    base: dict[str, Any] = {
        "name": "tiny",
        "seed": 7,
        "epochs": 2,
        "model": {
            "family": "sequential",
            "layers": [
                {"conv": {"filters": 8, "kernel": 3, "stride": 2, "padding": 1}},
                "batch_norm",
                "relu",
                {"max_pool": {"size": 2}},
                {"dropout": {"rate": 0.2}},
                "flatten",
                {"dense": {"units": 10}},
            ],
        },
        "data": {
            "dataset": "digits",
            "batch_size": 100,
            "validation": 0.1,
            "augment": {"crop_padding": 2, "padding_mode": "reflect", "flip": "random", "cutout": 4},
        },
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
        "schedule": {"name": "cosine", "warmup_epochs": 0.5},
        "training": {"log_every_steps": 1, "ema_decay": 0.99},
    }
    return Experiment.model_validate(merge(base, changes))


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in changes.items():
        out[key] = merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return out


def new_run(folder: Path, config: Experiment) -> Run:
    return runs.create(folder, runs.new_run_id(config.name, folder), config, {}, {})


def free_port() -> int:
    """Below those that the system gives to whoever asks for any, so that nobody takes it before the ranks do."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Rank:
    """One process; forked from a server that has imported torch once, which a fresh interpreter needs seconds for."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self._process = CONTEXT.Process(target=rank_main.as_rank, args=(arguments, environment, str(log)))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        assert code is not None, f"process {self._process.pid} still runs after {timeout:.0f} s"
        return code

    def send_signal(self, number: int) -> None:
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)


def start(
    run: Run,
    data: Path,
    world: int,
    max_steps: int | None = None,
    seen: Path | None = None,
    environment: dict[str, str] | None = None,
) -> list[Rank]:
    """Start all ranks; output of rank r goes to ``<run>/rank-r.log``."""
    port = free_port()
    processes = []
    for rank in range(world):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "HPC_CIFAR_THREADS": "1",
            **(environment or {}),
        }
        arguments = [str(run.path), str(data), str(max_steps or "")] + ([str(seen)] if seen is not None else [])
        processes.append(Rank(arguments, variables, run.path / f"rank-{rank}.log"))
    return processes


def finish(processes: list[Rank], timeout: float = 600) -> list[int]:
    deadline = time.monotonic() + timeout
    try:
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        kill_all(processes)


def complete(run: Run, data: Path, world: int, **options: Any) -> dict[str, Any]:
    """Run all ranks to their end and return the result; fails with the logs if a rank failed."""
    codes = finish(start(run, data, world, **options))
    assert codes == [0] * world, logs(run)
    return files.read_object(run.result_file)


def logs(run: Run) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(run.path.glob("rank-*.log")))


def wait_for_step(run: Run, step: int, processes: list[Rank]) -> None:
    """Return as soon as metrics.jsonl shows that ``step`` updates were made, while these processes train."""

    def made() -> bool:
        # rank 0 says who it is once the rows that it will make again are gone
        ours = run.state().pid == processes[0].pid
        return ours and any(int(row.get("step", 0)) >= step for row in files.read_json_lines(run.metrics_file))

    eventually(made, processes, run)


def eventually(condition: Callable[[], bool], processes: list[Rank], run: Run, timeout: float = 300) -> None:
    """Return as soon as ``condition`` holds, of processes that all live."""
    deadline = time.monotonic() + timeout
    while True:
        living = all(process.poll() is None for process in processes)  # before: they may end in between
        if condition():
            return
        assert time.monotonic() < deadline, f"not within {timeout:g} s\n{logs(run)}"
        assert living, logs(run)
        time.sleep(0.002)


def kill_all(processes: list[Rank]) -> None:
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.wait()


def losses(run: Run) -> dict[int, float]:
    """Training loss of every step, from metrics.jsonl; a step that appears twice is an error."""
    found: dict[int, float] = {}
    for row in files.read_json_lines(run.metrics_file):
        if row["kind"] == "step":
            assert row["step"] not in found, f"step {row['step']} is there twice"
            found[row["step"]] = row["train_loss"]
    return found
