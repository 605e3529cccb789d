"""One real Slurm cluster for the session, in a temporary folder; see slurm/testbed/cluster.py."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from slurm_site import SlurmCluster, call_testbed, why_not


@pytest.fixture(scope="session")
def slurm_cluster_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    cluster = SlurmCluster(folder / "c", folder)
    try:
        call_testbed("up", "--dir", str(cluster.folder), "--grace-time", "10", "--preempt-send-user-signal")
        yield cluster
    finally:
        call_testbed("down", "--dir", str(cluster.folder))


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
        call_testbed("up", "--dir", str(folder / "c"), "--accounting")
        yield SlurmCluster(folder / "c", folder)
    finally:
        call_testbed("down", "--dir", str(folder / "c"))


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
