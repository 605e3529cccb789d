"""Time limits and hung ranks on a real Slurm cluster: the run goes on by itself."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from slurm_site import EPOCHS, Site, SlurmCluster, assert_same

from hpc_cifar import files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def logged_steps(site: Site, run: str) -> list[int]:
    return [row["step"] for row in files.read_json_lines(site.runs / run / "metrics.jsonl") if row["kind"] == "step"]


def test_a_run_longer_than_its_time_limit_goes_on(slurm_cluster: SlurmCluster, tmp_path: Path, digits_data: Path) -> None:
    """Slurm sends the signal up to a minute early, so with a limit of one minute it may come at any time."""
    site = Site(slurm_cluster, tmp_path, digits_data)
    run, job = site.submit("--time", "00:01:00", "--nodes", "1", "--set", "epochs=90")
    site.call("wait", run)
    assert slurm_cluster.job(job)["JobState"] == "COMPLETED"
    restarts = site.result(run)["restarts"]
    assert restarts >= 1 and slurm_cluster.job(job)["Restarts"] == str(restarts)
    assert site.epochs(run) == list(range(1, 91))
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
