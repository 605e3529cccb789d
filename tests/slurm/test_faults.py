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
# nor is there one of a best epoch
WITHOUT_CHECKPOINTS = (
    *("--set", f"resources.fault_restarts={ALLOWED}", "--set", "epochs=3000", "--set", "checkpoint.every_epochs=3000"),
    *("--set", "data.validation=test"),
)
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
    run, job = site.submit(*TWO, *WITHOUT_CHECKPOINTS)
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
    os.kill(int(site.state(run)["pid"]), signal.SIGKILL)
    site.cluster.until(lambda: interruptions(site, run), 60, site.logs())
    site.hasten()
    site.call("wait", run)
    [row] = interruptions(site, run)
    assert row["event"] == "killed rank" and "srun ended with exit code 137 (n1: task 0: Killed" in row["reason"]
    assert_same(site.result(run), undisturbed[1])
    assert site.cluster.job(job)["Restarts"] == "1"


@pytest.fixture
def small_node(slurm_cluster: SlurmCluster) -> Iterator[Path]:
    """The cgroup of a node's jobs, with too little memory for one that trains; made by the kernel that runs here."""
    slurmd = slurm_cluster.slurmd("n2")
    folder, before = MEMORY / f"hpc-cifar-test-{os.getpid()}", own_cgroup(slurmd)
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup of memory can be made here: {error}")
    (folder / "memory.limit_in_bytes").write_text(str(200 << 20))  # torch alone takes more
    (folder / "cgroup.procs").write_text(str(slurmd))
    yield folder
    (before / "cgroup.procs").write_text(str(slurmd))
    slurm_cluster.until(lambda: not (folder / "cgroup.procs").read_text(), 60, "the jobs of the node end")
    folder.rmdir()


def own_cgroup(pid: int) -> Path:
    lines = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    return MEMORY / next((path.lstrip("/") for _, names, path in lines if "memory" in names.split(",")), "")


def oom_kills(folder: Path) -> int:
    return int(dict(line.split() for line in (folder / "memory.oom_control").read_text().splitlines())["oom_kill"])


def test_a_rank_that_the_kernel_kills_for_memory_is_named(site: Site, small_node: Path) -> None:
    """One rank of two, by a real cgroup, again and again, at the start of the job."""
    run, job = site.submit(*TWO, *WITHOUT_CHECKPOINTS)
    site.call("wait", run, code=1)
    rows, reason = interruptions(site, run), site.status(run)["reason"]
    assert oom_kills(small_node) == len(rows) == ALLOWED + 1, rows
    assert all("rank 1 on n2 was killed" in row["reason"] and "memory" in row["reason"] for row in rows), rows
    assert "rank 1 on n2 was killed" in reason and "resources.memory_gib_per_node" in reason, reason
    assert site.cluster.job(job)["Restarts"] == str(ALLOWED)
