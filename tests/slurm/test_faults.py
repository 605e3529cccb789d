"""Ranks that are killed: by signals, and by the kernel for memory. The job goes back to the queue, so often, and says why."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_site import Site, SlurmCluster, assert_same

from hpc_cifar import files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.component("slurm")]

TWO = ("--nodes", "2")
ALLOWED = 2  # restarts without a checkpoint in between
MEMORY = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def site(slurm_cluster: SlurmCluster, tmp_path: Path, digits_data: Path) -> Site:
    return Site(slurm_cluster, tmp_path, digits_data)


def rank(site: Site, run: str, number: int, restart: int) -> int:
    """The process of a rank of this start, once it trains."""
    path = site.runs / run / "heartbeat" / f"rank-{number}.json"

    def beat() -> dict[str, Any]:
        found = files.read_json(path)
        here = isinstance(found, dict) and str(found.get("segment", "")).endswith(f".{restart}") and found.get("step", -1) > 0
        return found if here else {}

    site.cluster.until(beat, 90, f"rank {number} of {run} trains in its start {restart}\n{site.logs()}")
    return int(beat()["pid"])


def interruptions(site: Site, run: str) -> list[dict[str, Any]]:
    return files.read_json_lines(site.runs / run / "interruptions.jsonl")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_rank_is_counted_named_and_bounded(site: Site, number: signal.Signals) -> None:
    """srun ends the other ranks with a TERM, which is no preemption. With no checkpoint in between, the run ends in the end."""
    options = ("--set", f"resources.fault_restarts={ALLOWED}", "--set", "checkpoint.every_epochs=3000", "--set", "epochs=3000")
    run, job = site.submit(*TWO, *options)
    for restart in range(ALLOWED + 1):
        os.kill(rank(site, run, 1, restart), number)
        site.cluster.until(lambda count=restart: len(interruptions(site, run)) > count, 60, f"{restart}\n{site.logs()}")  # type: ignore[misc]
    site.call("wait", run, code=1)
    rows = interruptions(site, run)
    assert [row["event"] for row in rows] == ["killed rank"] * (ALLOWED + 1), rows
    assert all(f"killed by signal {number.value} ({number.name})" in row["reason"] for row in rows), rows
    status = site.status(run)
    assert status["state"] == "failed"
    assert f"rank 1 on n2 was killed by signal {number.value}" in status["reason"], status
    assert f"{ALLOWED + 1} times without a checkpoint in between" in status["reason"]
    assert ("resources.memory_gib_per_node" in status["reason"]) and ("memory" in status["reason"])
    assert site.cluster.job(job)["Restarts"] == str(ALLOWED)


def test_a_job_whose_only_rank_is_killed_goes_on(site: Site, undisturbed: dict[int, dict[str, Any]]) -> None:
    """Nobody is left to say so but the script."""
    site.step_takes(0.05)
    run, job = site.submit("--nodes", "1")
    site.until_epoch(1, run)
    os.kill(rank(site, run, 0, 0), signal.SIGKILL)
    site.cluster.until(lambda: interruptions(site, run), 60, site.logs())
    site.hasten()
    site.call("wait", run)
    [row] = interruptions(site, run)
    assert row["event"] == "killed rank" and "srun ended with exit code 137 (n1: task 0: Killed" in row["reason"]
    assert_same(site.result(run), undisturbed[1])
    assert site.cluster.job(job)["Restarts"] == "1"


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A cgroup of little memory, of the kernel that runs here."""
    folder = MEMORY / f"hpc-cifar-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup of memory can be made here: {error}")
    yield folder
    for pid in (folder / "cgroup.procs").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    for _ in range(100):
        try:
            folder.rmdir()
        except OSError:
            signal.sigtimedwait([], 0.1)
        else:
            return
    raise AssertionError(f"{folder} cannot be removed")


def test_a_rank_that_the_kernel_kills_for_memory_is_named(site: Site, small_memory: Path) -> None:
    """One rank of two, by a real cgroup, again and again."""
    options = ("--set", f"resources.fault_restarts={ALLOWED}", "--set", "checkpoint.every_epochs=3000", "--set", "epochs=3000")
    run, _ = site.submit(*TWO, *options)
    for restart in range(ALLOWED + 1):
        pid = rank(site, run, 1, restart)
        before = oom_kills(small_memory)
        (small_memory / "memory.limit_in_bytes").write_text(str(1 << 30))
        (small_memory / "memory.move_charge_at_immigrate").write_text("1")
        (small_memory / "cgroup.procs").write_text(str(pid))
        (small_memory / "memory.oom_control").write_text("0")
        shrink(small_memory)
        site.cluster.until(lambda count=before: oom_kills(small_memory) > count, 60, "the kernel kills it")  # type: ignore[misc]
        site.cluster.until(lambda count=restart: len(interruptions(site, run)) > count, 60, site.logs())  # type: ignore[misc]
    site.call("wait", run, code=1)
    reason = site.status(run)["reason"]
    assert "rank 1 on n2 was killed" in reason and "memory" in reason and "resources.memory_gib_per_node" in reason, reason
    assert len(interruptions(site, run)) <= ALLOWED + 1


def oom_kills(folder: Path) -> int:
    return int(dict(line.split() for line in (folder / "memory.oom_control").read_text().splitlines())["oom_kill"])


def shrink(folder: Path) -> None:
    """Less than the process touches all the time; the kernel refuses a limit that it cannot reach at once."""
    for mebibytes in (512, 256, 128, 64, 32, 16, 8, 4):
        try:
            (folder / "memory.limit_in_bytes").write_text(str(mebibytes << 20))
        except OSError:
            return
