"""``hpc-cifar drill`` through a real Slurm cluster, with a user's commands only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from slurm_site import Site, SlurmCluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_a_drill_proves_that_nothing_is_lost(slurm_cluster: SlurmCluster, tmp_path: Path, digits_data: Path) -> None:
    site = Site(slurm_cluster, tmp_path, digits_data)
    site.hasten()
    faults = ["preempt", "requeue", "kill-all"]
    job = ("job.yaml", "--set", "resources.nodes=1", "--cluster", "./testbed.yaml")
    said = json.loads(site.call("drill", *job, "--faults", ",".join(faults), "--json"))
    assert said["good"] and said["same_weights"] and [row["fault"] for row in said["faults"]] == faults
    assert [row["note"] for row in said["faults"]] == ["by itself"] * 3
    assert [row["lost"] for row in said["faults"]][:2] == [0, 0]
    slurm_cluster.until(lambda: not slurm_cluster.call("squeue", "--noheader"), 30, "an empty queue")
