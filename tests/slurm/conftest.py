"""Real Slurm clusters for the session, in temporary folders; see slurm/testbed/cluster.py."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from slurm_site import EPOCHS, Site, SlurmCluster, running_cluster


@contextlib.contextmanager
def emptied(session: SlurmCluster, monkeypatch: pytest.MonkeyPatch, work: Path) -> Iterator[SlurmCluster]:
    """The cluster as what sbatch and submitit use in one test; empty again after it."""
    cluster = SlurmCluster(session.folder, work)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    yield cluster
    cluster.call("scancel", "--user=root")
    cluster.until(lambda: not cluster.call("squeue", "--noheader"), 30, "no jobs left")


@pytest.fixture(scope="session")
def slurm_cluster_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with running_cluster(tmp_path_factory.mktemp("slurm"), "--grace-time", "10", "--preempt-send-user-signal") as made:
        yield made


@pytest.fixture
def slurm_cluster(
    slurm_cluster_session: SlurmCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[SlurmCluster]:
    with emptied(slurm_cluster_session, monkeypatch, tmp_path) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def accounting_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A second cluster, with slurmdbd and mariadb; started by the first test that asks for it."""
    programs = ("slurmdbd", "mariadbd", "mariadb-install-db")
    if missing := [name for name in programs if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin")]:
        pytest.skip(f"missing {', '.join(missing)} (Debian: slurmdbd mariadb-server)")
    with running_cluster(tmp_path_factory.mktemp("acct"), "--accounting") as made:
        yield made


@pytest.fixture
def accounting_cluster(
    accounting_session: SlurmCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[SlurmCluster]:
    with emptied(accounting_session, monkeypatch, tmp_path) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def undisturbed(
    slurm_cluster_session: SlurmCluster, digits_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, Any]]:
    """Results of runs that nothing happened to, by number of ranks; each rank on a node of its own. ``epoch_s`` is added."""
    site = Site(slurm_cluster_session, tmp_path_factory.mktemp("undisturbed"), digits_data)
    submitted = {
        ranks: site.submit("--partition", "high", "--nodes", str(ranks), "--set", f"epochs={epochs}")[0]
        for ranks, epochs in EPOCHS.items()
    }
    site.call("wait", *submitted.values())
    times = {ranks: [row["time"] for row in site.rows(run, "epoch")] for ranks, run in submitted.items()}
    return {
        ranks: site.result(run) | {"epoch_s": (times[ranks][-1] - times[ranks][0]) / (EPOCHS[ranks] - 1)}
        for ranks, run in submitted.items()
    }
