"""Time limits and hung ranks on a real Slurm cluster: the run goes on by itself."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from slurm_site import CHAIN, EPOCHS, Begun, Site, SlurmCluster, assert_same

from hpc_cifar import files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


# A signal that comes before srun has begun is heard by nobody; the job ends at its limit then. Slurm looks every 30 s for jobs
# over their limit; one that is and has ended by itself is a TIMEOUT for it too.
TRAINED = {"COMPLETED", "TIMEOUT"}


def jobs_of(site: Site, run: str) -> list[str]:
    return [str(row["job_id"]) for row in files.read_json_lines(site.runs / run / "jobs.jsonl")]


@pytest.fixture(scope="module")
def limited(begun: Begun) -> Begun:
    """All have finished."""
    assert begun.site.status(begun.runs["chained"])["job_id"] in jobs_of(begun.site, begun.runs["chained"])
    begun.site.run("wait", *begun.runs.values(), timeout_s=600)  # of three minutes; a guard, for a machine that has much to do
    return begun


@pytest.fixture
def chained(slurm_cluster: SlurmCluster, tmp_path: Path, digits_data: Path) -> Site:
    """A user of a site that forbids requeueing."""
    site = Site(slurm_cluster, tmp_path, digits_data)
    site.profile("testbed", CHAIN)
    return site


def test_a_chain_goes_on_where_nodes_have_no_slurm_programs(chained: Site) -> None:
    """As often as needed; each link is told to stop as a time limit or a preemption would tell it."""
    chained.profile("testbed", CHAIN.replace("requeue: false", "requeue: true").replace("links: 10", "links: 2"))
    for node in ("n1", "n2", "n3"):
        chained.cluster.hide(node, "scontrol", "squeue", "sbatch", "scancel")
    try:
        run, _ = chained.submit("--nodes", "1", "--set", "epochs=3000")
        used = jobs_of(chained, run)
        for number, job in enumerate(used):
            chained.cluster.until(lambda: chained.status(run)["job_id"] == job, 30, f"the run goes on as {job}")  # noqa: B023
            chained.until_epoch(chained.epochs(run)[-1] + 1 if number else 1, run)
            chained.cluster.call("scancel", "--signal=USR2", job)
            chained.cluster.wait(job)
        chained.call("wait", run, code=1)
    finally:
        chained.cluster.show_again()
    assert (
        "could not be requeued" in chained.status(run)["reason"] and f"hpc-cifar resume {run}" in chained.status(run)["reason"]
    )
    steps = [row["step"] for row in chained.rows(run, "step")]
    assert steps == sorted(set(steps)) and chained.state(run)["lost_steps"] == 0
    started = [row for row in chained.rows(run, "event") if row["event"] == "started"]
    assert len(started) == len(used) == 3


@pytest.mark.parametrize("raw", [True, False])
def test_a_cancelled_chain_stays_cancelled(chained: Site, raw: bool) -> None:
    chained.profile("testbed", CHAIN.replace("links: 10", "links: 3"))  # each of them comes up, one after the other
    run, first = chained.submit("--nodes", "1", "--set", "epochs=3000")
    chained.until_epoch(1, run)
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
    site.hasten()
    run, _ = site.submit("--nodes", "1", "--partition", "high")
    site.call("wait", run)
    job = (tmp_path / "job.yaml").read_text()
    (tmp_path / "job.yaml").write_text(job + "checkpoint: {every_epochs: 100000}\n")
    limit = ("submit", "job.yaml", "--cluster", "./testbed.yaml", "--nodes", "1", "--time", "00:01:00")
    site.call(*limit, "--set", "epochs=100000", code=2)
    assert len(list(site.runs.iterdir())) == 1, "nothing was created"
    site.call(*limit, "--set", "epochs=100000", "--set", "checkpoint.every_steps=10", "--dry-run")


@pytest.mark.parametrize("how", ["requeued", "chained", "unheard"])
def test_a_run_longer_than_its_time_limit_goes_on(limited: Begun, how: str) -> None:
    """Slurm sends the signal up to a minute early, so with a limit of one minute it may come at any time. Where it was not
    heard, the TERM at the limit itself is that of a cancel, but Slurm gives the reason.
    """
    result = limited.site.result(limited.runs[how])
    assert result["state"] == "finished" and result["restarts"] >= 1 and result["lost_steps"] == 0
    assert limited.site.epochs(limited.runs[how]) == list(range(1, result["epochs"] + 1))
    steps = [row["step"] for row in limited.site.rows(limited.runs[how], "step")]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("how", ["requeued", "unheard"])
def test_a_requeued_run_has_one_job(limited: Begun, how: str) -> None:
    [job] = jobs_of(limited.site, limited.runs[how])
    assert limited.site.cluster.wait(job) in TRAINED
    # the signal may come before training began, which is then no restart of the training
    assert int(limited.site.cluster.job(job)["Restarts"]) >= limited.site.result(limited.runs[how])["restarts"] >= 1


def test_links_submitted_beforehand_end_at_once_when_they_are_not_needed(limited: Begun) -> None:
    ids = jobs_of(limited.site, limited.runs["chained"])
    used = 1 + limited.site.result(limited.runs["chained"])["restarts"]
    assert len(ids) == 11 and 2 <= used <= 11
    for number, job in enumerate(ids):
        assert limited.site.cluster.wait(job) in (TRAINED if number < used else {"COMPLETED"})
        assert limited.site.cluster.job(job)["Restarts"] == "0"


def test_a_hung_rank_is_recorded_and_the_run_restarts(limited: Begun, undisturbed: dict[int, dict[str, Any]]) -> None:
    site, run, beat = limited.site, limited.runs["hung"], limited.hung
    assert site.cluster.job(limited.hung_job)["Restarts"] == "1"
    assert site.epochs(run) == list(range(1, EPOCHS + 1))
    assert_same(site.result(run), undisturbed[2])
    (folder,) = (site.runs / run / "hangs").iterdir()
    assert folder.name == f"{limited.hung_job}.0"
    report = json.loads((folder / "report.json").read_text())
    assert f"rank 1 on {beat['host']}" in report["reason"]
    assert "distributed_c10d.py" in (folder / "rank-0.txt").read_text()
    assert "watchdog" in (folder / "rank-1.txt").read_text()  # on another node: it was let go, and told too
    silent_s = datetime.fromisoformat(report["time"]) - datetime.fromisoformat(beat["time"])
    assert silent_s.total_seconds() < 60
