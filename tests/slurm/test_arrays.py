"""Many runs as one job array on a real Slurm cluster, and runs that start after others."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from slurm_site import Site, SlurmCluster, assert_same

from hpc_cifar.launch.status import NEVER_STARTED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ELEMENT = """\
name: {name}
seed: 5
epochs: {epochs}
model:
  family: sequential
  layers: [{{conv: {{filters: 8}}}}, batch_norm, relu, {{avg_pool: {{size: 4}}}}, flatten, {{dense: {{units: 10}}}}]
data: {{dataset: digits, batch_size: 48}}
optimizer: {{name: sgd, lr: {lr}}}
resources: {{processes_per_node: 1, time: "00:10:00"}}
"""
PROFILE = "executor: slurm\npartition: low\ngpu_request: none\ncpus_per_process: 1\nsignal_delay_s: 30\n"


class ArraySite(Site):
    """A user with some job files, and a second profile whose jobs are held."""

    def __init__(self, cluster: SlurmCluster, folder: Path, data: Path) -> None:
        super().__init__(cluster, folder, data, runs="my runs")
        self.profile("testbed", PROFILE)
        self.profile("held", PROFILE + "sbatch_extra: {hold: true}\n")
        for name, epochs, lr in (("short", 2, 0.01), ("bad", 2, 1e30), ("long", 12, 0.01)):
            (folder / f"{name}.yaml").write_text(ELEMENT.format(name=name, epochs=epochs, lr=lr))

    def queued(self) -> list[str]:
        """Every job that waits or runs."""
        return self.cluster.call("squeue", "--noheader", "--array", "--format=%i").split()

    def until_reason(self, name: str, reason: str) -> None:
        """Until every run of this name waits for ``reason``; Slurm finds a reason when it next schedules."""

        def waits() -> bool:
            return {(row["state"], row["reason"]) for row in self.statuses(name)} == {("pending", reason)}

        self.cluster.until(waits, 20, f"{name} waits for {reason}: {self.statuses(name)}")


@pytest.fixture
def site(slurm_cluster: SlurmCluster, tmp_path: Path, digits_data: Path) -> ArraySite:
    return ArraySite(slurm_cluster, tmp_path, digits_data)


def test_a_hundred_elements_are_one_sbatch_call(site: ArraySite) -> None:
    site.call("submit", "short.yaml", "--seeds", "100", "--array-limit", "7", "--cluster", "./held.yaml")
    [array] = site.cluster.call("squeue", "--noheader", "--format=%F").split()
    assert site.cluster.call("squeue", "--noheader", "--format=%i", f"--jobs={array}") == f"{array}_[0-99%7]"
    rows = site.statuses(array)
    assert [row["job_id"] for row in rows] == [f"{array}_{index}" for index in range(100)]
    assert {row["state"] for row in rows} == {"pending"}
    assert [row["run"].rsplit("-", 3)[0] for row in rows] == [f"short-s{seed}" for seed in range(5, 105)]

    run = rows[41]["run"]
    assert "cancelled while it was waiting" in site.call("cancel", run)
    assert sorted(site.queued()) == sorted({f"{array}_{index}" for index in range(100)} - {f"{array}_41"})
    assert [row["run"] for row in site.statuses(array) if row["state"] == "cancelled"] == [run]
    assert "name one of them, such as" in site.run("logs", array, code=2).stderr
    site.cluster.call("scancel", f"{array}_42")  # by hand: Slurm forgets it at once
    assert [row["reason"] for row in site.statuses(array) if row["state"] == "failed"] == [NEVER_STARTED]
    site.call("cancel", array)
    assert site.queued() == []
    assert Counter(row["state"] for row in site.statuses(array)) == {"cancelled": 99, "failed": 1}


def test_run_directories_of_an_array_are_whole_and_share_one_copy_of_the_code(site: ArraySite) -> None:
    [(run, job), (other, _), (third, _)] = site.submit_many("--kfold", "3", jobs=("short.yaml",), profile="held")
    array = job.partition("_")[0]
    for name, index in ((run, 0), (other, 1)):
        folder = site.runs / name
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder / "submitit" / f"{array}_{index}_submitted.pkl").is_file()
        assert {path.name for path in folder.iterdir()} >= {
            "experiment.yaml",
            "plan.json",
            "provenance.json",
            "jobs.jsonl",
            "code",
        }
        assert not [path for path in folder.rglob("*") if path.is_symlink()], "the run directory stands alone"
    main = "code/hpc_cifar/launch/job.py"
    assert (site.runs / run / main).samefile(site.runs / other / main)
    script = (site.runs / third / "submitit" / f"{array}_2_submission.sh").read_text()
    assert "#SBATCH --array=0-2%3\n" in script
    assert "#SBATCH --job-name=short\n" in script
    held_out = [
        f"fold: {number}" in (site.runs / name / "experiment.yaml").read_text() for number, name in enumerate((run, other))
    ]
    assert held_out == [True, True]
    site.call("cancel", array)


def test_dry_run_shows_a_script_for_each_request_and_submits_nothing(site: ArraySite) -> None:
    wide = (site.folder / "short.yaml").read_text().replace("processes_per_node: 1", "processes_per_node: 1, gpus_per_node: 1")
    (site.folder / "wide.yaml").write_text(wide.replace("name: short", "name: wide"))
    (site.folder / "gpus.yaml").write_text(PROFILE.replace("gpu_request: none\n", ""))
    shown = site.call("submit", "short.yaml", "wide.yaml", "long.yaml", "--seeds", "2", "--cluster", "./gpus.yaml", "--dry-run")
    assert shown.count("#!/bin/bash") == 2
    assert "#SBATCH --array=0-3%4\n" in shown and "#SBATCH --array=0-1%2\n" in shown
    assert "#SBATCH --job-name=hpc-cifar\n" in shown and "#SBATCH --job-name=wide\n" in shown
    assert "elements    4: short-s5, short-s6, long-s5, ..." in shown
    assert "in all: 6 runs, at most 0.33 GPU-hours and 1.00 core-hours for a job of each" in shown
    many = ("submit", "wide.yaml", "--seeds", "12", "--cluster", "./gpus.yaml", "--max-gpu-hours", "1")
    for extra in ([], ["--dry-run"]):
        refused = site.run(*many, *extra, code=2).stderr
        assert "one job of each of these 12 runs may use 2.00 GPU-hours in all" in refused
    assert not site.runs.exists()
    assert site.queued() == []


def test_one_element_fails_one_is_requeued_one_is_cancelled_and_the_others_go_on(site: ArraySite) -> None:
    made = site.submit_many(jobs=("bad.yaml", "short.yaml", "long.yaml", "long.yaml"))
    runs, jobs = [run for run, _ in made], [job for _, job in made]
    array = jobs[0].partition("_")[0]
    assert jobs == [f"{array}_{index}" for index in range(4)]
    bad, short, requeued, cancelled = runs
    [(later, later_job)] = site.submit_many("--after", short, jobs=("short.yaml",))
    assert site.cluster.job(later_job)["Dependency"].startswith(f"afterok:{array}_1")
    site.until_reason(later, "Dependency")

    site.until_epoch(1, requeued, cancelled)
    site.cluster.call("scontrol", "requeue", jobs[2])
    site.cluster.wait(jobs[2], {"PENDING"})
    # asked for the state of this number alone, Slurm tells of all elements, and first of the one that waits
    assert site.cluster.job(jobs[3])["JobId"] == array
    site.cluster.call("scancel", jobs[3])
    assert {row["run"]: row["job_id"] for row in site.statuses(array)} == dict(made)
    site.call("wait", cancelled, code=1)
    assert site.statuses(cancelled)[0]["reason"] == "cancelled with scancel"
    assert site.cluster.job(jobs[3])["Restarts"] == "0"
    site.hasten()
    site.call("resume", cancelled)
    [row] = site.statuses(cancelled)
    assert "_" not in row["job_id"], "a plain job of its own"

    site.call("wait", array, later, code=1)
    states = {row["run"]: row for row in site.statuses(array)}
    assert [states[run]["state"] for run in runs] == ["failed", "finished", "finished", "finished"]
    assert "loss became" in states[bad]["reason"]
    assert states[requeued]["job_id"] == jobs[2]
    assert site.cluster.job(jobs[2])["Restarts"] == "1"
    for run, job in made:
        assert (site.runs / run / "submitit" / f"{job}_0_log.out").stat().st_size, "a log of its own"
    assert all("resuming at step" in site.call("logs", run) for run in (requeued, cancelled))
    assert "resuming at step" not in site.call("logs", short)

    assert_same(site.result(cancelled), site.result(requeued))  # the same experiment, interrupted in two ways
    assert site.result(later)["ended"] > site.result(short)["ended"]

    # nothing to wait for, and nothing good to come
    script = site.call("submit", "short.yaml", "--cluster", "./testbed.yaml", "--after", later, "--dry-run")
    assert "dependency" not in script
    refused = site.run("submit", "short.yaml", "--cluster", "./testbed.yaml", "--after", bad, code=2).stderr
    assert f"--after {bad}: it is failed (the training loss became" in refused
    assert f"hpc-cifar resume {bad}" in refused


def test_a_run_never_starts_when_the_one_before_it_ended_badly(site: ArraySite) -> None:
    [(first, first_job)] = site.submit_many(jobs=("short.yaml",), profile="held")
    made = site.submit_many("--seeds", "2", "--after", first, jobs=("short.yaml",))
    array = made[0][1].partition("_")[0]
    site.until_reason(array, "Dependency")
    assert site.cluster.call("squeue", "--noheader", f"--jobs={array}", "--format=%E").startswith(f"afterok:{first_job}")
    site.call("cancel", first)
    site.cluster.until(lambda: site.queued() == [], 30, "Slurm gives up what cannot start any more")
    for row in site.statuses(array):
        assert row["state"] == "cancelled"
        assert row["reason"] == f"{first}, after which it was to start, did not finish"
    assert not list(site.runs.glob("*/metrics.jsonl"))


def test_a_run_that_only_ended_is_not_one_that_finished(site: ArraySite) -> None:
    """afterok is satisfied by exit code 0, and by any job that Slurm has forgotten."""
    [(first, first_job)] = site.submit_many(jobs=("short.yaml",), profile="held")
    [(second, _)] = site.submit_many("--after", first, jobs=("short.yaml",))
    pickle = site.runs / first / "submitit" / f"{first_job}_submitted.pkl"
    job = f"from submitit.core.utils import DelayedSubmission as D; D(print, 'nothing').dump({str(pickle)!r})"
    subprocess.run([sys.executable, "-c", job], check=True)  # the first job ends well without having trained
    site.cluster.call("scontrol", "release", first_job)
    assert site.cluster.wait(first_job) == "COMPLETED"
    site.call("wait", second, code=1)
    [row] = site.statuses(second)
    assert row["state"] == "failed"
    assert f"{first}, after which this run was to start, has not finished" in row["reason"]
