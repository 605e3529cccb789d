"""Processes killed at random moments, again and again: every run ends, and with the weights of one that nobody killed.

``make faults`` has 200 kills; the tests have some. ``HPC_CIFAR_KILLS`` says how many, ``HPC_CIFAR_KILLS_SEED`` which.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from ranks import Rank, complete, experiment, finish, kill_all, logs, losses, new_run, start

from hpc_cifar.runs import Run
from hpc_cifar.train import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
CONFIG = {"epochs": 3, "checkpoint": {"every_steps": 3}}
WORLD = 2
LEAVES_S = 1.0
MOST = 15  # kills of one run; a machine that has more to do by now would never finish it


def latest(run: Run) -> checkpoint.Saved:
    found = checkpoint.named(run.checkpoints, "latest")
    assert found is not None
    return found


def strike(run: Run, processes: list[Rank], moment: float, victims: list[int]) -> str:
    """Kill ranks after some seconds; what the run was doing, or "" if it had finished before."""
    deadline = time.monotonic() + moment
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.001)
    if all(process.poll() is not None for process in processes):
        return ""
    before = run.state().step
    saving = any(path.name.startswith(".step-") for path in run.checkpoints.glob(".step-*"))
    for rank in victims:
        processes[rank].send_signal(9)
    until = time.monotonic() + LEAVES_S  # whoever is left notices, or still waits to be joined by its peer
    while time.monotonic() < until and any(process.poll() is None for process in processes):
        time.sleep(0.01)
    kill_all(processes)
    return "a save" if saving else "the start" if before is None else "training"


def test_runs_that_are_killed_at_random_moments_end_like_one_that_was_not(tmp_path: Path, digits_data: Path) -> None:
    kills = int(os.environ.get("HPC_CIFAR_KILLS", "12"))
    seed = int(os.environ.get("HPC_CIFAR_KILLS_SEED", random.SystemRandom().randrange(10**6)))
    dice = random.Random(seed)
    print(f"faults: {kills} kills, HPC_CIFAR_KILLS_SEED={seed}")
    calm = new_run(tmp_path, experiment(**CONFIG))
    began = time.monotonic()
    complete(calm, digits_data, WORLD)
    whole_s = time.monotonic() - began
    met: Counter[str] = Counter()
    runs = 0
    while met.total() < kills:
        run = new_run(tmp_path, experiment(**CONFIG))
        runs += 1
        for attempt in range(MOST + 1):
            began = time.monotonic()
            processes = start(run, digits_data, WORLD)
            if met.total() >= kills or attempt == MOST:
                assert finish(processes) == [0] * WORLD, logs(run)
                break
            victims = dice.choice(([0], [1], [0, 1]))
            if not (what := strike(run, processes, dice.uniform(0, 1.2 * whole_s), victims)):
                if attempt == 0:  # a machine that has less to do than when the calm one ran
                    whole_s = min(whole_s, time.monotonic() - began)
                break
            met[what] += 1
        assert run.finished(), f"seed {seed}: {run.state()}\n{logs(run)}"
        assert losses(run) == losses(calm), f"seed {seed}: {run.path}"
        assert checkpoint.same(latest(run), latest(calm)), f"seed {seed}: {run.path}"
    print(
        f"faults: {met.total()} kills in {runs} runs ({dict(met)}): none lost, every one ended with the weights of the calm one"
    )
