"""Training on a real Slurm cluster: two nodes, interrupted in every way Slurm has, with the result of the undisturbed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import SlurmCluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

EPOCHS = 30
JOB = f"""\
name: small
seed: 5
epochs: {EPOCHS}
model:
  family: sequential
  layers:
    - conv: {{filters: 8, kernel: 3, padding: same}}
    - batch_norm
    - relu
    - avg_pool: {{size: 4}}
    - flatten
    - dense: {{units: 10}}
data: {{dataset: digits, batch_size: 48, augment: {{crop_padding: 1}}}}
optimizer: {{name: sgd, lr: 0.01, momentum: 0.9}}
schedule: {{name: cosine}}
resources: {{nodes: 2, processes_per_node: 1, time: "00:10:00"}}
"""
PROFILE = """\
name: testbed
executor: slurm
partition: low
gpu_request: none
cpus_per_process: 1
preemptible: true
signal_delay_s: 30
"""


class Site:
    """One user on the cluster: a job file, a profile, a folder for runs."""

    def __init__(self, cluster: SlurmCluster, folder: Path, data: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.runs = folder / "runs"
        self.environment = {
            **os.environ,
            "SLURM_CONF": cluster.environment["SLURM_CONF"],
            "HPC_CIFAR_DATA": str(data),
            "HPC_CIFAR_RUNS": str(self.runs),
        }
        (folder / "job.yaml").write_text(JOB)
        (folder / "testbed.yaml").write_text(PROFILE)

    def call(self, *arguments: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "hpc_cifar", *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=200, env=self.environment, cwd=self.folder, check=False
        )
        assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.logs()}"
        return done.stdout

    def submit(self, *options: str) -> tuple[str, str]:
        """Run and job id."""
        printed = self.call("submit", "job.yaml", "--cluster", "./testbed.yaml", "--parsable", *options)
        run, job = printed.strip().splitlines()[-1].split("\t")
        return run, job

    def status(self, run: str) -> dict[str, Any]:
        [row] = json.loads(self.call("status", run, "--json"))
        assert isinstance(row, dict)
        return row

    def state(self, run: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.runs / run / "state.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def result(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.runs / run / "result.json").read_text())
        return found

    def epochs(self, run: str) -> list[int]:
        rows = map(json.loads, (self.runs / run / "metrics.jsonl").read_text().splitlines())
        return [row["epoch"] for row in rows if row["kind"] == "epoch"]

    def until_epoch(self, run: str, epoch: int) -> None:
        """Until the run trains and has some epochs behind it."""
        self.cluster.until(
            lambda: self.state(run).get("state") == "running" and (self.state(run).get("epoch") or 0) >= epoch,
            60,
            f"epoch {epoch} of {run}: {self.state(run)}\n{self.logs()}",
        )

    def logs(self) -> str:
        texts = [f"-- {path.name}\n{path.read_text()[-1500:]}" for path in sorted(self.runs.glob("*/submitit/*_log.*"))]
        return "\n".join(texts)


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


def assert_same(disturbed: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    same = ("state", "epochs", "steps", "test_loss", "test_accuracy")  # to the last digit
    assert {name: disturbed[name] for name in same} == {name: undisturbed[name] for name in same}


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
