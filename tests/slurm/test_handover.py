"""Submissions that a real Slurm takes without saying so, or late, or while whoever submits is cut off."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "launch"))

from launch_site import Site, command, eventually
from test_truth import fill, forget

from hpc_cifar import files
from hpc_cifar.launch import submission
from hpc_cifar.runs import Run, all_runs

if TYPE_CHECKING:
    from slurm_site import SlurmCluster

pytestmark = pytest.mark.slow
TIMED_OUT = "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1"


class Desk(Site):
    """A user whose ``sbatch`` can be put under a wrapper; ``$real`` is Slurm's own."""

    def __init__(self, folder: Path, cluster: SlurmCluster) -> None:
        super().__init__(folder)
        self.cluster = cluster
        # the cluster's GPUs are fake and its dataset is a folder: what checks the nodes would refuse both
        self.environment["HPC_CIFAR_PREFLIGHT_S"] = "0"
        self.environment["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"

    def sbatch(self, body: str) -> None:
        """What happens at a submission that is not only a test."""
        real = shutil.which("sbatch")
        command(self.folder / "bin", "sbatch", f'real={real}\n[ "$1" = --test-only ] && exec $real "$@"\n{body}')

    def submit(self, *options: str, code: int | None = 0, **job: object) -> str:  # type: ignore[override]
        text = self.job(**({"epochs": 100_000, "processes": 1} | job))  # type: ignore[arg-type]
        done = self.cli("submit", text, "--cluster", "slurm", "--parsable", *options, code=code)
        return done.stdout if code == 0 else done.stderr

    def queued(self) -> list[str]:
        return self.cluster.call("squeue", "--noheader", "--format=%i").split()

    def script(self) -> Path:
        """Of the submission that sbatch was last told of."""
        return max(self.runs.rglob(".submission_file_*.sh"), key=lambda path: path.stat().st_mtime_ns)

    def arrives(self) -> str:
        """Slurm takes what it was sent long ago; the number of the job."""
        return self.sends(self.script())

    def sends(self, script: Path) -> str:
        command = [str(shutil.which("sbatch")), "--parsable", str(script)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()


@pytest.fixture
def desk(slurm_cluster: SlurmCluster, tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path / "site", slurm_cluster)
    yield made
    made.close()


def job_ids(run: Run) -> list[str]:
    return [job.job_id for job in run.jobs()]


def test_a_job_that_was_taken_without_a_word(slurm_cluster: SlurmCluster, desk: Desk) -> None:
    desk.sbatch(f'$real "$@" > /dev/null; {TIMED_OUT}')
    run_id, job_id = desk.submit().split()
    run = Run(desk.runs / run_id)
    assert job_ids(run) == [job_id] == desk.queued()
    desk.running(run)
    assert desk.status(run)["state"] == "running"
    assert "cancelling job" in desk.cli("cancel", run_id).stdout
    slurm_cluster.until(lambda: desk.queued() == [], 30, "its job has ended")
    assert desk.status(run)["state"] == "cancelled"

    lines = desk.submit("--seeds", "3", "--nodes", "3").splitlines()
    array = lines[0].split("\t")[1].partition("_")[0]
    assert [line.split("\t")[1] for line in lines] == [f"{array}_{index}" for index in range(3)]
    assert {job.partition("_")[0] for job in desk.queued()} == {array}


def test_the_controller_is_stopped_while_it_is_told(slurm_cluster: SlurmCluster, desk: Desk) -> None:
    """A real time-out of sbatch (MessageTimeout); the request lies in the controller's socket, and is read when it goes on."""
    controller = json.loads((slurm_cluster.folder / "daemons.json").read_text())["slurmctld"][0]
    stopped = f"kill -STOP {controller}; touch {desk.folder}/once"
    goes_on = f"(sleep 3; kill -CONT {controller}) > /dev/null 2>&1 &"
    desk.sbatch(f'[ -e {desk.folder}/once ] || {{ {stopped}; }}\n$real "$@"; code=$?\n{goes_on}\nexit $code')
    try:
        run_id, job_id = desk.submit().split()
    finally:
        os.kill(controller, signal.SIGCONT)
    run = Run(desk.runs / run_id)
    assert job_ids(run) == [job_id] == desk.queued()
    desk.running(run)


def test_a_job_that_comes_when_nobody_looks_any_more(slurm_cluster: SlurmCluster, desk: Desk) -> None:
    desk.sbatch(TIMED_OUT)
    said = desk.submit(code=1)
    assert "Slurm did not answer (Batch job submission failed: Socket timed out" in said and "refused" not in said
    [run] = all_runs(desk.runs)
    assert job_ids(run) == [] and (run.path / submission.FILE).exists()
    job_id = desk.arrives()  # it starts at once, enters itself, and nothing else is needed
    desk.running(run)
    assert job_ids(run) == [job_id] and not (run.path / submission.FILE).exists()
    assert (desk.status(run)["state"], desk.status(run)["job_id"]) == ("running", job_id)
    assert f"is running as job {job_id}" in desk.cli("resume", run.id, code=1).stderr
    desk.cli("cancel", run.id)
    slurm_cluster.until(lambda: desk.queued() == [], 30, "its job has ended")
    assert desk.status(run)["state"] == "cancelled"


def test_a_job_that_comes_after_its_run_was_resumed_or_cancelled(slurm_cluster: SlurmCluster, desk: Desk) -> None:
    desk.sbatch(TIMED_OUT)
    desk.submit(code=1)
    [run] = all_runs(desk.runs)
    first = desk.script()
    desk.sbatch('exec $real "$@"')
    assert "resumed as job" in desk.cli("resume", run.id).stdout
    desk.running(run)
    late = desk.sends(first)
    assert slurm_cluster.wait(late) == "FAILED"
    log = (run.submitit / f"{late}_0_log.out").read_text()
    assert "is one too many and ends: it was submitted again, when nobody knew of this job" in log
    assert desk.status(run)["state"] == "running" and job_ids(run) == desk.queued()
    assert len(desk.seen(run)) == 1

    desk.sbatch(TIMED_OUT)
    desk.submit(code=1)
    other = next(one for one in all_runs(desk.runs) if one != run)
    assert "cancelled; Slurm has no job of it" in desk.cli("cancel", other.id).stdout
    assert slurm_cluster.wait(desk.arrives()) == "COMPLETED"
    assert desk.status(other)["state"] == "cancelled" and not desk.seen(other)


def test_cut_off_while_sbatch_works(slurm_cluster: SlurmCluster, desk: Desk) -> None:
    desk.sbatch(f'$real "$@" > /dev/null; touch {desk.folder}/taken; sleep 60')
    child = desk.start("submit", desk.job(epochs=100_000, processes=1), "--seeds", "3", "--cluster", "slurm", "--parsable")
    eventually((desk.folder / "taken").exists, 30)
    child.kill()
    child.communicate()
    array = desk.queued()[0].partition("_")[0]
    made = all_runs(desk.runs)
    rows = json.loads(desk.cli("status", "--json").stdout)
    assert sorted(row["job_id"] for row in rows) == [f"{array}_{index}" for index in range(3)]
    for run in made:
        desk.running(run)
    assert desk.cli("cancel", array).stdout.count("cancelling job") == 3
    slurm_cluster.until(lambda: desk.queued() == [], 30, "all have ended")

    (desk.folder / "taken").unlink()
    blocker = fill(slurm_cluster)
    child = desk.start("submit", desk.job(epochs=100_000, processes=1), "--seeds", "3", "--cluster", "slurm", "--parsable")
    eventually((desk.folder / "taken").exists, 30)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 143 and "was withdrawn" in err
    slurm_cluster.until(lambda: desk.queued() == [blocker], 30, "the array is withdrawn")
    rows = json.loads(desk.cli("status", "--json").stdout)[3:]
    assert {row["state"] for row in rows} == {"failed"} and all("was withdrawn" in row["reason"] for row in rows)


def test_accounting_tells_of_a_job_that_the_queue_has_forgotten(accounting_cluster: SlurmCluster, tmp_path: Path) -> None:
    desk = Desk(tmp_path / "site", accounting_cluster)
    desk.sbatch(TIMED_OUT)
    desk.submit(code=1)
    [run] = all_runs(desk.runs)
    accounting_cluster.call("scontrol", "update", "PartitionName=low", "State=DOWN")
    try:
        job_id = desk.arrives()
        # the controller tells the accounts with a delay; of a job that has gone by then, they keep the number only
        asked = ("sacct", "--noheader", "--parsable2", f"--jobs={job_id}", "--format=State,SubmitLine")
        accounting_cluster.until(lambda: "PENDING|" in accounting_cluster.call(*asked), 20, "the accounts have it")
        accounting_cluster.call("scancel", job_id)
    finally:
        accounting_cluster.call("scontrol", "update", "PartitionName=low", "State=UP")
    accounting_cluster.until(lambda: "CANCELLED" in accounting_cluster.call(*asked), 20, "the accounts have its end")
    forget(accounting_cluster)
    assert accounting_cluster.call("squeue", "--noheader", "--states=all") == ""
    saved = files.read_json(run.path / submission.FILE) or {}
    files.write_json(run.path / submission.FILE, {**saved, "began": time.time() - 250})  # as if minutes had gone by
    # a controller that has just begun may not answer yet
    accounting_cluster.until(lambda: desk.status(run)["job_id"] == job_id, 30, "status finds it")
    assert job_ids(run) == [job_id] and desk.status(run)["state"] == "cancelled"
