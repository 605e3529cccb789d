"""Time limits and hung ranks on a real Slurm cluster: the run goes on by itself."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from slurm_site import EPOCHS, Site, SlurmCluster, assert_same

from hpc_cifar import files

LONG = 160  # epochs: 40 s of training on two idle cores, so that the signal, at most 30 s after the start, comes first
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def logged_steps(site: Site, run: str) -> list[int]:
    return [row["step"] for row in files.read_json_lines(site.runs / run / "metrics.jsonl") if row["kind"] == "step"]


def test_a_run_longer_than_its_time_limit_goes_on(slurm_cluster: SlurmCluster, tmp_path: Path, digits_data: Path) -> None:
    """Slurm sends the signal up to a minute early, so with a limit of one minute it may come at any time."""
    site = Site(slurm_cluster, tmp_path, digits_data)
    run, job = site.submit("--time", "00:01:00", "--nodes", "1", "--set", f"epochs={LONG}")
    site.call("wait", run)
    assert slurm_cluster.wait(job) == "COMPLETED"  # Slurm says so a moment after the run does
    restarts = site.result(run)["restarts"]
    assert restarts >= 1 and slurm_cluster.job(job)["Restarts"] == str(restarts)
    assert site.epochs(run) == list(range(1, LONG + 1))
    steps = logged_steps(site, run)
    assert steps == sorted(set(steps)) and site.result(run)["lost_steps"] == 0


def test_a_hung_rank_is_recorded_and_the_run_restarts(slurm_cluster: SlurmCluster, tmp_path: Path, digits_data: Path) -> None:
    site = Site(slurm_cluster, tmp_path, digits_data)
    undisturbed = site.submit("--partition", "high")[0]
    site.call("wait", undisturbed)
    run, job = site.submit("--set", "resources.hang_timeout_s=3")
    site.until_epoch(run, 3)
    beat = json.loads((site.runs / run / "heartbeat" / "rank-1.json").read_text())
    os.kill(beat["pid"], signal.SIGSTOP)
    slurm_cluster.until(lambda: slurm_cluster.job(job)["Restarts"] == "1", 40, "the hung job is requeued")
    site.call("wait", run)
    assert site.epochs(run) == list(range(1, EPOCHS + 1))
    assert_same(site.result(run), site.result(undisturbed))
    (folder,) = (site.runs / run / "hangs").iterdir()
    assert folder.name == f"{job}.0"
    assert f"rank 1 on {beat['host']}" in json.loads((folder / "report.json").read_text())["reason"]
    assert "distributed_c10d.py" in (folder / "rank-0.txt").read_text()


CHAIN = """\
executor: slurm
partition: low
gpu_request: none
cpus_per_process: 1
requeue: false
chain_links: 10
"""


@pytest.fixture
def chained(slurm_cluster: SlurmCluster, tmp_path: Path, digits_data: Path) -> Site:
    """A user of a site that forbids requeueing."""
    site = Site(slurm_cluster, tmp_path, digits_data)
    (tmp_path / "testbed.yaml").write_text(CHAIN)
    return site


def jobs_of(site: Site, run: str) -> list[str]:
    return [str(row["job_id"]) for row in files.read_json_lines(site.runs / run / "jobs.jsonl")]


def test_links_submitted_beforehand_continue_a_run(chained: Site) -> None:
    run, first = chained.submit("--time", "00:01:00", "--nodes", "1", "--set", f"epochs={LONG}")
    ids = jobs_of(chained, run)
    assert ids[0] == first and len(ids) == 11
    chained.until_epoch(run, 1)
    assert chained.status(run)["job_id"] in ids
    chained.call("wait", run)
    result = chained.result(run)
    used = 1 + result["restarts"]
    assert result["state"] == "finished" and 2 <= used <= 11 and result["lost_steps"] == 0
    assert chained.epochs(run) == list(range(1, LONG + 1))
    for job in ids:  # the ones that were not needed too, at once
        assert chained.cluster.wait(job) == "COMPLETED"
        assert chained.cluster.job(job)["Restarts"] == "0"


@pytest.mark.parametrize("raw", [True, False])
def test_a_cancelled_chain_stays_cancelled(chained: Site, raw: bool) -> None:
    run, first = chained.submit("--nodes", "1", "--set", "epochs=3000")
    chained.until_epoch(run, 1)
    if raw:  # of the first job alone: the links come up, and must not take the run up
        chained.cluster.call("scancel", first)
    else:
        chained.call("cancel", run)
    chained.cluster.until(lambda: not chained.cluster.call("squeue", "--noheader"), 60, "an empty queue")
    assert chained.status(run)["state"] == "cancelled"
    starts = [row for row in files.read_json_lines(chained.runs / run / "metrics.jsonl") if row.get("event") == "started"]
    assert len(starts) == 1


def test_a_time_limit_below_one_checkpoint_is_refused(slurm_cluster: SlurmCluster, tmp_path: Path, digits_data: Path) -> None:
    """Once a run of the same work has shown how fast it is."""
    site = Site(slurm_cluster, tmp_path, digits_data)
    run, _ = site.submit("--nodes", "1", "--partition", "high")
    site.call("wait", run)
    job = (tmp_path / "job.yaml").read_text()
    (tmp_path / "job.yaml").write_text(job + "checkpoint: {every_epochs: 100000}\n")
    limit = ("submit", "job.yaml", "--cluster", "./testbed.yaml", "--nodes", "1", "--time", "00:01:00")
    site.call(*limit, "--set", "epochs=100000", code=2)
    assert len(list(site.runs.iterdir())) == 1, "nothing was created"
    site.call(*limit, "--set", "epochs=100000", "--set", "checkpoint.every_steps=10", "--dry-run")
