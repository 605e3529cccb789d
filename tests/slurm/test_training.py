"""Training on a real Slurm cluster: two nodes, interrupted in every way Slurm has, with the result of the undisturbed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from slurm_site import EPOCHS, PROFILE, Site, SlurmCluster, assert_same

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def site(slurm_cluster: SlurmCluster, tmp_path: Path, digits_data: Path) -> Site:
    return Site(slurm_cluster, tmp_path, digits_data)


def test_two_nodes_finish(undisturbed: dict[int, dict[str, Any]]) -> None:
    for ranks, result in undisturbed.items():
        assert (result["state"], result["epochs"], result["restarts"]) == ("finished", EPOCHS[ranks], 0)
        assert result["test_accuracy"] > 0.8


def test_a_lost_node_costs_no_result(site: Site, undisturbed: dict[int, dict[str, Any]]) -> None:
    """A rank on another node can ask for the requeue; the job that was on that node alone comes back when Slurm notices."""
    both, both_job = site.submit("--nodes", "2")
    site.until_epoch(1, both)
    node = site.cluster.job(both_job)["BatchHost"]  # where rank 0 is, and so the meeting point
    (site.folder / "there.yaml").write_text(PROFILE + f"nodelist: {node}\n")
    [(alone, alone_job)] = site.submit_many("--nodes", "1", "--set", f"epochs={EPOCHS[1]}", profile="there")
    site.until_epoch(3, both, alone)
    site.cluster.testbed("crash", node)
    try:
        for job in (both_job, alone_job):
            site.cluster.until(lambda job=job: site.cluster.job(job)["Restarts"] == "1", 90, "the job is requeued")  # type: ignore[misc]
        assert {row["state"] for row in site.statuses()} <= {"pending", "requeued", "running"}
        site.cluster.wait(both_job, {"RUNNING", "COMPLETED"}, 60)
        assert node not in site.cluster.hosts(both_job)
    finally:
        site.cluster.testbed("boot", node)
    for result, ranks in zip(site.finished(both, alone), (2, 1), strict=True):
        assert_same(result, undisturbed[ranks])


def test_a_requeued_run_and_one_that_was_cancelled_and_resumed(site: Site, undisturbed: dict[int, dict[str, Any]]) -> None:
    """Through torch's own DDP, whose sums of two ranks are those of the undisturbed run."""
    requeued, requeued_job = site.submit("--set", "training.gradient_sync=ddp")
    cancelled, cancelled_job = site.submit("--set", "training.gradient_sync=ddp")
    site.until_epoch(3, requeued, cancelled)
    site.cluster.call("scontrol", "requeue", requeued_job)
    site.call("cancel", cancelled)
    site.call("wait", cancelled, code=1)
    assert site.cluster.wait(cancelled_job) == "CANCELLED"
    assert site.status(cancelled)["state"] == "cancelled"
    assert not (site.runs / cancelled / "result.json").exists() or site.result(cancelled)["state"] != "finished"
    assert site.cluster.job(cancelled_job)["Restarts"] == "0"

    site.call("resume", cancelled)
    for result in site.finished(requeued, cancelled):
        assert_same(result, undisturbed[2])
    assert site.cluster.job(requeued_job)["Restarts"] == "1"
    assert site.cluster.job(cancelled_job)["Restarts"] == "0"


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
