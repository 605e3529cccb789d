"""What versions of Slurm say in their own words; tests/slurm/test_versions.py asks real ones."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
from launch_site import EXPERIMENT, command

from hpc_cifar.config.cluster import Cluster
from hpc_cifar.errors import LaunchError
from hpc_cifar.launch import estimate, script, slurm, submit

# As 22.05, 24.11 and 26.05 print it, shortened. 26.05 has a SubmitLine, which may hold anything.
SHOWN = (
    "JobId=9 ArrayJobId=9 ArrayTaskId=4 JobName=deep UserId=me(7) QOS=normal JobState={state} Reason={reason} "
    "Dependency=(null) Requeue=1 Restarts={restarts} BatchFlag=1 Reboot=0 ExitCode=0:15 StartTime=2026-11-28T14:00:00 "
    "EndTime={ended} Deadline=N/A PreemptEligibleTime=2026-11-28T14:00:00 {preempted}SuspendTime=None "
    "Partition=gpu SubmitLine=sbatch --comment JobState=FAILED PreemptTime=2020-01-01T00:00:00 Restarts=7"
)


@pytest.mark.parametrize(
    ("state", "preempted", "ended", "by_preemption"),
    [
        ("RUNNING", "None", "2027-11-28T14:00:00", False),
        ("RUNNING", "2026-11-28T15:00:00", "2026-11-28T15:00:06", True),  # in its grace time
        ("RUNNING", "2026-11-28T15:00:00", "Unknown", True),
        ("COMPLETING", "None", "2026-11-28T15:00:00", False),  # cancelled
        ("COMPLETING", "2026-11-28T15:00:00", "2026-11-28T15:00:00", True),  # without a grace time
        ("COMPLETING", "2026-11-28T15:00:00", "2026-11-28T15:00:01", True),
        ("COMPLETING", "2026-11-28T15:00:00", "2026-11-28T15:00:04", False),  # cancelled in its grace time
        ("CANCELLED", "2026-11-28T15:00:00", "2026-11-28T15:00:00", False),
        ("PREEMPTED", "2026-11-28T15:00:00", "2026-11-28T15:00:00", True),
    ],
)
def test_evidence_of_a_preemption(slurm_says: Any, state: str, preempted: str, ended: str, by_preemption: bool) -> None:
    shown = SHOWN.format(state=state, reason="None", restarts=2, ended=ended, preempted=f"PreemptTime={preempted} ")
    slurm_says("9_4|nonsense", None, shown)
    told = slurm.evidence("9_4")
    assert (told.state, told.reason, told.restarts, told.by_preemption) == (state, "", 2, by_preemption)
    assert (told.preempted is None) == (preempted == "None")


def test_evidence_where_scontrol_does_not_answer(tmp_path: Path, slurm_says: Any) -> None:
    """A job that Slurm has put back into the queue has no time of a preemption, and one that has ended is in squeue at most."""
    slurm_says("nonsense", None, SHOWN.format(state="COMPLETING", reason="None", restarts=1, ended="Unknown", preempted=""))
    assert slurm.evidence("9_4") == slurm.Evidence("COMPLETING", restarts=1)
    slurm_says("COMPLETING TimeLimit", None, None)
    assert slurm.evidence("9_4") == slurm.Evidence("COMPLETING", "TimeLimit", whole=False)
    slurm_says(None, None, None)
    assert slurm.evidence("9_4") == slurm.Evidence()
    for name in ("squeue", "scontrol"):
        (tmp_path / "bin" / name).unlink()
    assert slurm.evidence("9_4") == slurm.Evidence()


@pytest.mark.parametrize(
    ("words", "nodes", "partition"),
    [
        ("using 2 processors on nodes n[1-2] in partition x", "n[1-2]", "x"),
        ("a using 2 processors on nodes n1 in partition x", "n1", "x"),  # since 25.05
        ("on cluster here a using 2 processors on nodes n1 in partition x", "n1", "x"),
        ("on cluster here using 2 processors on nodes n1 in partition x", "n1", "x"),
        ("using 1 processors", None, None),
        ("", None, None),
    ],
)
def test_every_wording_of_an_estimate(
    tmp_path: Path, slurm_says: Any, words: str, nodes: str | None, partition: str | None
) -> None:
    slurm_says("", None, f"PartitionName={partition} QoS=N/A MaxTime=00:05:00")
    told = f"sbatch: Job 1 to start at 2030-01-01T00:00:00 {words}"
    command(tmp_path / "bin", "sbatch", f"echo {shlex.quote(told)} >&2")
    cluster = Cluster.model_validate({"name": "x"})
    plan = submit.plan_for(EXPERIMENT, cluster, 1000)
    short = dataclasses.replace(plan, time_s=300)
    text = script.executor(EXPERIMENT, cluster, short, Path("/runs/deep-1")).script()
    assert estimate.start_of(text, cluster, short) == estimate.Start(slurm.utc_of("2030-01-01T00:00:00"), nodes, partition)
    if partition:  # whose limit is known, then
        with pytest.raises(LaunchError, match="partition x has MaxTime=00:05:00"):
            estimate.start_of(text, cluster, dataclasses.replace(plan, time_s=600))
