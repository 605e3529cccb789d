"""What versions of Slurm say and do differently, and what is the same in all that are tested."""

from __future__ import annotations

import datetime
import subprocess
import time
from pathlib import Path

import pytest
from slurm_site import SlurmCluster, running_cluster

from hpc_cifar.config.cluster import SLURM
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.errors import LaunchError
from hpc_cifar.launch import discover, estimate, profile, script, slurm, submit

pytestmark = [pytest.mark.slow, pytest.mark.component("slurm")]

EXPERIMENT = {
    "name": "tiny",
    "epochs": 1,
    "data": {"dataset": "digits", "batch_size": 64},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "model": {"family": "sequential", "layers": ["flatten", {"dense": {"units": 10}}]},
    "resources": {"nodes": 2, "processes_per_node": 1, "time": "00:10:00"},
}
# ended; squeue --states knows some more words than it prints. REVOKED: of a federation, asked for nowhere
ENDED = set("COMPLETED CANCELLED FAILED TIMEOUT NODE_FAIL PREEMPTED BOOT_FAIL DEADLINE OUT_OF_MEMORY REVOKED".split())  # noqa: SIM905


def test_every_state_of_this_slurm_is_known(slurm_cluster: SlurmCluster) -> None:
    """One that is not would be taken for the end of a job."""
    asked = ["squeue", "--states=nonsense"]
    told = subprocess.run(asked, capture_output=True, text=True, env=slurm_cluster.environment, check=False).stderr
    words = {word.strip().upper() for word in told.partition("states include:")[2].split(",")}
    assert {"PENDING", "RUNNING", "COMPLETING", "CANCELLED"} <= words
    assert words - slurm.WAITING - slurm.ACTIVE == ENDED


def answer() -> estimate.Start:
    experiment, cluster = Experiment.model_validate(EXPERIMENT), SLURM
    plan = submit.plan_for(experiment, cluster, 1000)
    return estimate.start_of(script.executor(experiment, cluster, plan, Path("/nowhere/tiny-1")).script(), cluster, plan)


def test_what_slurm_says_to_a_job_beforehand_is_understood(slurm_cluster: SlurmCluster) -> None:
    told = answer()
    assert told.start is not None and told.note is None
    assert told.nodes is not None and told.nodes.startswith("n[") and told.partition == "low"
    slurm_cluster.call("scontrol", "update", "PartitionName=low", "MaxTime=5")
    try:  # such a job would wait for ever
        with pytest.raises(
            LaunchError, match=r"PartitionTimeLimit.* asks for 10 minutes, and partition low has MaxTime=00:05:00"
        ):
            answer()
    finally:
        slurm_cluster.call("scontrol", "update", "PartitionName=low", "MaxTime=UNLIMITED")


STUBBORN = "srun bash -c 'trap \"\" TERM USR2; echo there; sleep 600 & while true; do wait; done'\n"  # until KILL


def test_why_a_job_ends(slurm_cluster: SlurmCluster) -> None:
    """All four look the same to squeue while their processes are told to end; so does an element of an array."""
    options = {
        "cancelled": ("--partition=low0", "--requeue"),
        "preempted": ("--partition=low0", "--no-requeue"),
        "requeued": ("--partition=low0", "--requeue"),
        "element": ("--partition=low0", "--no-requeue", "--array=4"),
        "in grace": ("--partition=low6", "--no-requeue"),
        "cancelled in grace": ("--partition=low6", "--requeue"),
    }
    jobs = {}
    for name, chosen in options.items():
        job = slurm_cluster.batch("--nodes=1", *chosen, script=STUBBORN)
        jobs[name] = f"{job}_4" if name == "element" else job
    for job in jobs.values():
        slurm_cluster.wait(job, {"RUNNING"})
        steps = ("squeue", "--noheader", "--steps", f"--jobs={job}")
        slurm_cluster.until(lambda steps=steps: ".0 " in slurm_cluster.call(*steps), 20, "a step")  # type: ignore[misc]
    assert {slurm.evidence(job).by_preemption for job in jobs.values()} == {False}
    slurm_cluster.call("scancel", jobs["cancelled"])
    told = slurm.evidence(jobs["cancelled"])
    assert (told.state, told.preempted, told.restarts, told.by_preemption) == ("COMPLETING", None, 0, False)

    high = slurm_cluster.batch("--partition=high", "--nodes=3", "--exclusive", script="true")
    slurm_cluster.until(lambda: slurm.evidence(jobs["in grace"]).preempted, 20, "the preemption")
    told = slurm.evidence(jobs["in grace"])
    assert (told.state, told.restarts, told.by_preemption) == ("RUNNING", 0, True)
    slurm_cluster.until(
        lambda: slurm_cluster.state(jobs["requeued"]) == "COMPLETING", 20, "the end of those without a grace time"
    )
    for name in ("preempted", "element"):
        told = slurm.evidence(jobs[name])
        assert (told.state, told.restarts, told.by_preemption) == ("COMPLETING", 0, True), name
    told = slurm.evidence(jobs["requeued"])
    assert (told.state, told.restarts, told.by_preemption) == ("COMPLETING", 1, False)

    grace = slurm.evidence(jobs["cancelled in grace"])
    assert grace.by_preemption and grace.preempted is not None
    while time.time() < datetime.datetime.fromisoformat(grace.preempted).timestamp() + 2:
        time.sleep(0.1)
    slurm_cluster.call("scancel", jobs["cancelled in grace"])
    told = slurm.evidence(jobs["cancelled in grace"])
    assert (told.state, told.restarts, told.by_preemption) == ("COMPLETING", 0, False) and told.preempted
    assert slurm_cluster.wait(high) == "COMPLETED"
    # of the next start, nothing is left of it
    slurm_cluster.wait(jobs["requeued"], {"RUNNING"})
    told = slurm.evidence(jobs["requeued"])
    assert (told.state, told.preempted, told.restarts, told.by_preemption) == ("RUNNING", None, 1, False)
    assert slurm.evidence("99999999") == slurm.Evidence()


def test_both_names_of_the_users_signal(
    slurm_cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """SlurmctldParameters has it in every version, PreemptParameters in newer ones; older ones refuse the latter."""

    def note() -> str:
        found = discover.site()
        [low] = [one for one in found.partitions if one.name == "low"]
        return profile.text_of(found, "x", low)

    assert "told by SIGUSR2 and SIGTERM" in note()
    with running_cluster(tmp_path_factory.mktemp("slurm")) as other:
        monkeypatch.setenv("SLURM_CONF", other.environment["SLURM_CONF"])
        assert "told by SIGTERM" in note()
        testbed = other.as_testbed()
        testbed.daemons.stop(["slurmctld"])
        testbed.conf.write_text(testbed.conf.read_text() + "PreemptParameters=send_user_signal\n")
        started = other.folder / "log" / "slurmctld.log"
        before = started.stat().st_size
        testbed.daemons.start("slurmctld", ["slurmctld", "-D", "-f", str(testbed.conf)], environment=testbed.environment())

        def said() -> str:
            output = (other.folder / "log" / "slurmctld.out").read_text()
            return output + started.read_bytes()[before:].decode()

        other_is_up = lambda: testbed.daemons.running("slurmctld") and testbed.ready()  # noqa: E731
        other.until(lambda: "unrecognized key: PreemptParameters" in said() or other_is_up(), 30, "a word of slurmctld")
        if "unrecognized key" not in said():
            assert "told by SIGUSR2 and SIGTERM" in note()
