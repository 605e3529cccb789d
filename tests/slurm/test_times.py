"""How long people wait for an answer of the test cluster."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_site import PROFILE, Site, SlurmCluster

from hpc_cifar.config.cluster import SLURM
from hpc_cifar.config.load import load_experiment
from hpc_cifar.launch import estimate, script, submit

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.component("slurm")]


def best_of(times: int, work: Callable[[], object]) -> float:
    """Seconds; other processes share the machine."""

    def seconds() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return min(seconds() for _ in range(times))


def test_a_hundred_elements_are_submitted_in_3_s_and_shown_in_1(
    slurm_cluster: SlurmCluster, tmp_path: Path, digits_data: Path
) -> None:
    site = Site(slurm_cluster, tmp_path, digits_data)
    site.profile("held", PROFILE + "sbatch_extra: {hold: true}\n")
    took = best_of(
        3, lambda: site.call("submit", "job.yaml", "--seeds", "100", "--array-limit", "7", "--cluster", "./held.yaml")
    )
    assert took < 3, f"submit of 100 elements took {took:.2f} s"
    arrays = sorted(slurm_cluster.call("squeue", "--noheader", "--format=%F").split(), key=int)
    assert len(arrays) == 3, "one job array for each submit"
    took = best_of(5, lambda: site.call("status", arrays[-1], "--json"))
    assert took < 1, f"status of 100 runs took {took:.2f} s"
    assert len(site.statuses(arrays[-1])) == 100

    # Slurm's word on a job before it is submitted
    experiment = load_experiment(site.folder / "job.yaml")
    plan = submit.plan_for(experiment, SLURM, 1000)
    text = script.executor(experiment, SLURM, plan, site.runs / "tiny-1").script()

    def expected() -> None:
        assert estimate.start_of(text, SLURM, plan).start is not None
        estimate.length_of(experiment, SLURM, plan, site.runs)

    assert best_of(5, expected) < 0.3
