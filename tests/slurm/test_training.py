"""Training on a real Slurm cluster: two nodes, interrupted in every way Slurm has, with the result of the undisturbed run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_site import EPOCHS, Site, SlurmCluster, assert_same

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def site(slurm_cluster: SlurmCluster, tmp_path: Path, digits_data: Path) -> Iterator[Site]:
    yield Site(slurm_cluster, tmp_path, digits_data)


@pytest.fixture(scope="module")
def undisturbed(
    slurm_cluster_session: SlurmCluster, digits_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The result of a run that nothing happened to."""
    site = Site(slurm_cluster_session, tmp_path_factory.mktemp("undisturbed"), digits_data)
    run, job = site.submit()
    site.call("wait", run)
    assert slurm_cluster_session.job(job)["NumNodes"] == "2"
    assert site.status(run)["state"] == "finished"
    assert site.epochs(run) == list(range(1, EPOCHS + 1))
    return site.result(run)


def test_two_nodes_finish(slurm_cluster: SlurmCluster, undisturbed: dict[str, Any]) -> None:
    assert undisturbed["state"] == "finished"
    assert undisturbed["test_accuracy"] > 0.8
    assert undisturbed["restarts"] == 0


def test_a_preempted_run_resumes_to_the_same_result(site: Site, undisturbed: dict[str, Any]) -> None:
    run, job = site.submit()
    site.until_epoch(run, 3)
    high = site.cluster.batch("--partition=high", "--nodes=3", "--exclusive", script="sleep 3")
    assert site.cluster.wait(high) == "COMPLETED"
    site.call("wait", run)
    assert site.status(run)["restarts"] == 1
    assert site.status(run)["job_id"] == job
    assert site.epochs(run) == list(range(1, EPOCHS + 1)), "no epoch twice, none left out"
    assert_same(site.result(run), undisturbed)


def test_a_requeued_run_resumes_to_the_same_result(site: Site, undisturbed: dict[str, Any]) -> None:
    run, job = site.submit()
    site.until_epoch(run, 3)
    site.cluster.call("scontrol", "requeue", job)
    site.call("wait", run)
    assert site.cluster.job(job)["Restarts"] == "1"
    assert_same(site.result(run), undisturbed)


def test_a_lost_node_costs_no_result(site: Site, undisturbed: dict[str, Any]) -> None:
    run, job = site.submit("--set", f"resources.nodes={2}")
    site.until_epoch(run, 3)
    node = site.cluster.call("scontrol", "show", "hostnames", site.cluster.job(job)["NodeList"]).split()[-1]
    site.cluster.testbed("crash", node)
    try:
        site.cluster.until(lambda: site.cluster.job(job)["Restarts"] == "1", 90, "Slurm requeues the job of a lost node")
    finally:
        site.cluster.testbed("boot", node)
    site.call("wait", run)
    assert_same(site.result(run), undisturbed)


def test_a_cancelled_run_stays_cancelled_until_it_is_resumed(site: Site, undisturbed: dict[str, Any]) -> None:
    run, job = site.submit()
    site.until_epoch(run, 3)
    site.call("cancel", run)
    site.call("wait", run, code=1)
    site.cluster.until(lambda: not site.cluster.call("squeue", "--noheader"), 60, "the job leaves the queue")
    time.sleep(7)  # longer than a requeued job is held
    assert site.cluster.call("squeue", "--noheader") == ""
    assert site.status(run)["state"] == "cancelled"
    assert not (site.runs / run / "result.json").exists() or site.result(run)["state"] != "finished"
    assert site.cluster.job(job)["Restarts"] == "0"

    site.call("resume", run)
    site.call("wait", run)
    assert_same(site.result(run), undisturbed)


def test_a_run_cancelled_in_the_queue_never_starts(site: Site) -> None:
    high = site.cluster.batch("--partition=high", "--nodes=3", "--exclusive", script="sleep 100")
    site.cluster.wait(high, {"RUNNING"})
    run, _ = site.submit()
    assert site.status(run)["state"] == "pending"
    site.call("cancel", run)
    site.cluster.call("scancel", high)
    site.cluster.until(lambda: not site.cluster.call("squeue", "--noheader"), 30, "an empty queue")
    assert site.status(run)["state"] == "cancelled"
    assert not (site.runs / run / "metrics.jsonl").exists()
