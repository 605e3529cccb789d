"""A file system that fails writes, takes less than it is given, or takes its time (broken_disk.c, by LD_PRELOAD)."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks

from hpc_cifar import files
from hpc_cifar.runs import Run
from hpc_cifar.train import checkpoint

pytestmark = pytest.mark.slow
CONFIG = ranks.experiment(checkpoint={"every_steps": 5})  # 13 steps an epoch, two epochs
FAILING = "step-00000015"


@pytest.fixture(scope="module")
def library(compiled: Callable[[str], Path]) -> Path:
    return compiled("broken_disk")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, digits_data: Path) -> Run:
    run = ranks.new_run(tmp_path_factory.mktemp("calm"), CONFIG)
    ranks.complete(run, digits_data, 1)
    return run


def trained_on(library: Path, run: Run, data: Path, **broken: object) -> subprocess.CompletedProcess[str]:
    """What ``train`` says where the disk is broken as told."""
    ranks.complete(run, data, 1, max_steps=1)
    environment = {**os.environ, "LD_PRELOAD": str(library), "HPC_CIFAR_RUNS": str(run.path.parent)}
    environment |= {"HPC_CIFAR_DATA": str(data), "HPC_CIFAR_THREADS": "1"}
    environment |= {f"BROKEN_{name.upper()}": str(value) for name, value in broken.items()}
    command = [sys.executable, "-m", "hpc_cifar", "train", str(run.experiment_file), "--name", run.id]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def assert_same(one: Run, other: Run) -> None:
    found = [checkpoint.named(run.checkpoints, "latest") for run in (one, other)]
    assert found[0] is not None and found[1] is not None and checkpoint.same(found[0], found[1])
    assert ranks.losses(one) == ranks.losses(other)


@pytest.mark.parametrize(
    ("call", "number"),
    [("write", errno.EIO), ("write", errno.ENOSPC), ("write", errno.EDQUOT), ("fsync", errno.EIO), ("rename", errno.ESTALE)],
)
def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_loses_nothing(
    library: Path, calm: Run, tmp_path: Path, digits_data: Path, call: str, number: int
) -> None:
    run = ranks.new_run(tmp_path, CONFIG)
    done = trained_on(library, run, digits_data, call=call, errno=number, path=FAILING)
    said = f"{FAILING}: cannot save the checkpoint: {os.strerror(number)}"
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert run.state().state == "failed" and said in run.state().reason
    assert max(one.step for one in checkpoint.stored(run.checkpoints)) < 15
    ranks.complete(run, digits_data, 1)  # the disk is well again
    assert_same(run, calm)


@pytest.mark.parametrize("broken", [{"call": "short"}, {"call": "slow", "ms": 100}], ids=["short", "slow"])
def test_a_disk_that_takes_little_or_long_changes_nothing(
    library: Path, calm: Run, tmp_path: Path, digits_data: Path, broken: dict[str, object]
) -> None:
    run = ranks.new_run(tmp_path, CONFIG)
    done = trained_on(library, run, digits_data, path=f"{run.path}/", **broken)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(run, calm)


@pytest.mark.parametrize("name", ["metrics.jsonl", "state.json"])
def test_what_is_told_of_a_run_cannot_be_written(
    library: Path, calm: Run, tmp_path: Path, digits_data: Path, name: str
) -> None:
    run = ranks.new_run(tmp_path, CONFIG)
    done = trained_on(library, run, digits_data, call="write", errno=errno.EIO, path=name)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert name in done.stderr and os.strerror(errno.EIO) in done.stderr, done.stderr
    ranks.complete(run, digits_data, 1)
    assert_same(run, calm)


def test_without_locks_two_jobs_exclude_each_other_by_the_heartbeat(library: Path, tmp_path: Path, digits_data: Path) -> None:
    run = ranks.new_run(tmp_path, ranks.experiment(epochs=200))
    first = ranks.start(run, digits_data, 1)
    ranks.wait_for_step(run, 1, first)
    program = "import sys, rank_main; rank_main.as_rank(sys.argv[1:4], {}, sys.argv[4])"
    broken = {"LD_PRELOAD": str(library), "BROKEN_CALL": "flock", "BROKEN_PATH": "/.lock", "BROKEN_ERRNO": str(errno.ENOLCK)}
    environment = {**os.environ, **broken, "PYTHONPATH": str(Path(__file__).parent), "HPC_CIFAR_THREADS": "1"}

    def second() -> tuple[int, str]:
        log = tmp_path / "second.log"
        command = [sys.executable, "-c", program, str(run.path), str(digits_data), "40", str(log)]
        return subprocess.run(command, env=environment, timeout=200, check=False).returncode, log.read_text()

    try:
        code, said = second()
        assert code == 1 and f"is being trained already, by process {first[0].pid} on " in said, said
        assert first[0].poll() is None and run.state().state == "running"
    finally:
        ranks.kill_all(first)
    code, said = second()
    assert code == 0 and files.read_object(run.result_file)["state"] == "stopped", said
