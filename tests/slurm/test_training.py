"""Training on a real Slurm cluster: two nodes, interrupted in every way Slurm has, with the result of the undisturbed run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_site import EPOCHS, PROFILE, STEP_S, Site, SlurmCluster, assert_same

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def site(slurm_cluster: SlurmCluster, tmp_path: Path, digits_data: Path) -> Site:
    return Site(slurm_cluster, tmp_path, digits_data)


def test_two_nodes_finish(undisturbed: dict[int, dict[str, Any]]) -> None:
    for result in undisturbed.values():
        assert (result["state"], result["epochs"], result["restarts"]) == ("finished", EPOCHS, 0)
        assert result["test_accuracy"] > 0.8


@pytest.fixture(scope="module")
def disturbed(
    slurm_cluster_session: SlurmCluster, tmp_path_factory: pytest.TempPathFactory, digits_data: Path
) -> Iterator[tuple[Site, dict[str, tuple[str, str]]]]:
    """Runs that all met something else at the same time, and finished; run and job of each by what it met."""
    site = Site(slurm_cluster_session, tmp_path_factory.mktemp("disturbed"), digits_data)
    site.step_takes(STEP_S, after_an_epoch=2.5)
    made = {"lost a node": site.submit("--nodes", "2")}
    both_job = made["lost a node"][1]
    site.cluster.wait(both_job, {"RUNNING"})
    node = site.cluster.job(both_job)["BatchHost"]  # where rank 0 is, and so the meeting point
    site.profile("there", PROFILE + f"nodelist: {node}\n")
    site.profile("elsewhere", PROFILE + f"exclude: {node}\n")
    [made["lost all"]] = site.submit_many("--nodes", "1", profile="there")
    for name in ("requeued", "cancelled"):  # through torch's own DDP, whose sums of two ranks are those of the undisturbed run
        [made[name]] = site.submit_many("--set", "training.gradient_sync=ddp", profile="elsewhere")
    site.until_epoch(1, *(run for run, _ in made.values()))
    site.cluster.testbed("crash", node)
    try:
        site.cluster.call("scontrol", "requeue", made["requeued"][1])
        site.call("cancel", made["cancelled"][0])
        site.hasten()
        cancelled, cancelled_job = made["cancelled"]
        site.call("wait", cancelled, code=1)
        assert site.cluster.wait(cancelled_job) == "CANCELLED"
        assert site.status(cancelled)["state"] == "cancelled"
        assert not (site.runs / cancelled / "result.json").exists() or site.result(cancelled)["state"] != "finished"
        assert site.cluster.job(cancelled_job)["Restarts"] == "0"
        site.call("resume", cancelled)
        for name in ("lost a node", "lost all"):
            job = made[name][1]
            site.cluster.until(lambda job=job: site.cluster.job(job)["Restarts"] == "1", 90, "the job is requeued")  # type: ignore[misc]
        site.cluster.elsewhere(made["lost all"][1], node)
        assert {row["state"] for row in site.statuses()} <= {"pending", "requeued", "running", "finished"}
        site.cluster.wait(both_job, {"RUNNING", "COMPLETED"}, 60)
        assert node not in site.cluster.hosts(both_job)
    finally:
        site.cluster.testbed("boot", node)
    site.call("wait", *(run for run, _ in made.values()))
    yield site, made


@pytest.mark.parametrize(
    ("met", "ranks", "restarts"), [("lost a node", 2, 1), ("lost all", 1, 1), ("requeued", 2, 1), ("cancelled", 2, 0)]
)
def test_what_it_met_costs_no_result(
    disturbed: tuple[Site, dict[str, tuple[str, str]]],
    undisturbed: dict[int, dict[str, Any]],
    met: str,
    ranks: int,
    restarts: int,
) -> None:
    """A rank on another node can ask for the requeue; the job that was on a lost node alone comes back when Slurm notices. The
    job of a cancelled run never does: resumed, it has another one.
    """
    site, made = disturbed
    run, job = made[met]
    assert_same(site.result(run), undisturbed[ranks])
    assert site.cluster.job(job)["Restarts"] == str(restarts)


def test_a_job_that_is_sent_to_a_node_that_died_begins_again(site: Site, undisturbed: dict[int, dict[str, Any]]) -> None:
    """Slurm has not missed the node yet: srun cannot reach it, and no task begins."""
    site.profile("there", PROFILE + "nodelist: n[1,3]\n")
    site.cluster.testbed("crash", "n3")
    try:
        [(run, job)] = site.submit_many("--nodes", "2", profile="there")
        site.cluster.until(lambda: site.cluster.job(job)["Restarts"] != "0", 90, "the job is requeued")
        assert "early exit: srun ended with exit code 233; the job begins again" in site.logs()
        site.cluster.elsewhere(job, "n3")
    finally:
        site.cluster.testbed("boot", "n3")
    site.hasten()
    site.call("wait", run)
    assert_same(site.result(run), undisturbed[2])


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


def test_a_script_of_ones_own_trains_with_srun(site: Site, undisturbed: dict[int, dict[str, Any]]) -> None:
    """Two ranks on two nodes, which learn their places from srun alone; the script itself is one process."""
    site.hasten()
    variables = {name: site.environment[name] for name in ("HPC_CIFAR_RUNS", "HPC_CIFAR_DATA")}
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    train = f"{shlex.quote(sys.executable)} -m hpc_cifar train {shlex.quote(str(site.folder / 'job.yaml'))}"
    nodes = ("--partition=high", "--nodes=2", "--ntasks-per-node=1")
    own = site.cluster.batch(*nodes, script=f"{exports}srun {train} --name own\n")
    bare = site.cluster.batch(*nodes, script=f"{exports}{train} --name bare\n")
    for name, job, ranks in (("own", own, 2), ("bare", bare, 1)):
        assert site.cluster.wait(job, seconds=120) == "COMPLETED", site.cluster.output(job)
        assert site.state(name)["world_size"] == ranks
        assert_same(site.result(name), undisturbed[ranks])
