"""One real Slurm cluster for the session, in a temporary folder; see slurm/testbed/cluster.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TESTBED = Path(__file__).resolve().parents[2] / "slurm" / "testbed" / "cluster.py"
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


class SlurmCluster:
    """What tests ask of a running cluster."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.folder = folder
        self.work = work  # for scripts and logs
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def call(self, *command: str, timeout_s: float = 60) -> str:
        """Standard output of a Slurm command; a failed one fails the test with what it said."""
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, env=self.environment, cwd=self.work, check=False
        )
        assert done.returncode == 0, f"{command}: exit code {done.returncode}: {done.stderr}"
        return done.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """`scontrol show job` as a dictionary."""
        fields = self.call("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def state(self, job_id: str) -> str:
        return self.job(job_id)["JobState"]

    def wait(self, job_id: str, states: set[str] = FINAL, seconds: float = 60) -> str:
        """Until the job is in one of ``states``; its state."""
        self.until(lambda: self.state(job_id) in states, seconds, f"job {job_id} in {states}")
        return self.state(job_id)

    def until(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}\n{self.call('squeue', '--long')}"
            time.sleep(0.1)

    def testbed(self, *arguments: str) -> str:
        return testbed(*arguments, "--dir", str(self.folder))

    def batch(self, *options: str, script: str) -> str:
        """Submit a shell script; its job id."""
        path = self.work / f"job-{time.monotonic_ns()}.sh"
        path.write_text("#!/bin/bash\nset -eu\n" + script)
        return self.call("sbatch", "--parsable", f"--output={self.work}/%j.out", "--open-mode=append", *options, str(path))

    def output(self, job_id: str) -> str:
        path = self.work / f"{job_id}.out"
        return path.read_text() if path.exists() else ""


def testbed(*arguments: str) -> str:
    done = subprocess.run([sys.executable, str(TESTBED), *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def why_not() -> str | None:
    if os.geteuid() != 0:
        return "the test cluster needs root"
    missing = [
        name for name in ("slurmctld", "slurmd", "munged") if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin")
    ]
    return f"missing {', '.join(missing)} (Debian: slurm-wlm munge)" if missing else None


@pytest.fixture(scope="session")
def slurm_cluster_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    cluster = SlurmCluster(folder / "c", folder)
    try:
        testbed("up", "--dir", str(cluster.folder), "--grace-time", "10", "--preempt-send-user-signal")
        yield cluster
    finally:
        testbed("down", "--dir", str(cluster.folder))


@pytest.fixture
def slurm_cluster(
    slurm_cluster_session: SlurmCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[SlurmCluster]:
    """The cluster, empty, as what sbatch and submitit use in this test."""
    cluster = SlurmCluster(slurm_cluster_session.folder, tmp_path)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    yield cluster
    cluster.call("scancel", "--user=root")
    cluster.until(lambda: not cluster.call("squeue", "--noheader"), 30, "no jobs left")


@pytest.fixture(scope="session")
def accounting_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A second cluster, with slurmdbd and mariadb; started by the first test that asks for it."""
    if reason := why_not():
        pytest.skip(reason)
    programs = ("slurmdbd", "mariadbd", "mariadb-install-db")
    if missing := [name for name in programs if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin")]:
        pytest.skip(f"missing {', '.join(missing)} (Debian: slurmdbd mariadb-server)")
    folder = tmp_path_factory.mktemp("acct")
    try:
        testbed("up", "--dir", str(folder / "c"), "--accounting")
        yield SlurmCluster(folder / "c", folder)
    finally:
        testbed("down", "--dir", str(folder / "c"))


@pytest.fixture
def accounting_cluster(
    accounting_session: SlurmCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[SlurmCluster]:
    """The cluster with accounting, empty, as what sbatch and submitit use in this test."""
    cluster = SlurmCluster(accounting_session.folder, tmp_path)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    yield cluster
    cluster.call("scancel", "--user=root")
    cluster.until(lambda: not cluster.call("squeue", "--noheader"), 30, "no jobs left")
