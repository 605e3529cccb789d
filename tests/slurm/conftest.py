"""Real Slurm clusters for the session, in temporary folders; see slurm/testbed/cluster.py."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc_cifar import files

sys.path.insert(0, str(Path(__file__).parent))

from slurm_site import CHAIN, EPOCH_STEPS, PROFILE, Begun, Site, SlurmCluster, running_cluster

OnceMade = Callable[[str, Callable[[Path], object]], Path]
# modules that take longest, in that order, so that workers which take a module each (--dist loadfile) end at the same time
LONGEST = (
    "test_stories",
    "test_preemption",
    "test_limits",
    "test_cluster",
    "test_truth",
    "test_training",
    "test_tracking",
    "test_preflight",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        known = item.path.parent == here and item.path.stem in LONGEST
        return LONGEST.index(item.path.stem) if known else len(LONGEST)

    items.sort(key=place)


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
    slurm_cluster_session: SlurmCluster, digits_data: Path, tmp_path_factory: pytest.TempPathFactory, made_once: OnceMade
) -> dict[int, dict[str, Any]]:
    """Results of runs that nothing happened to, by number of ranks; each rank on a node of its own."""

    def trained(folder: Path) -> None:
        site = Site(slurm_cluster_session, tmp_path_factory.mktemp("undisturbed"), digits_data)
        site.hasten()
        runs = [site.submit("--partition", "high", "--nodes", str(ranks))[0] for ranks in (1, 2)]
        files.write_json(folder / "results.json", site.finished(*runs))

    one, two = json.loads((made_once("undisturbed", trained) / "results.json").read_text())
    return {1: one, 2: two}


@pytest.fixture(scope="session")
def begun(accounting_session: SlurmCluster, digits_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Begun:
    """What the last tests of test_limits.py look at; all of it is waiting, so other tests run meanwhile.

    ``requeued`` and ``chained`` are told at most 30 s after their start, and need longer. ``unheard`` misses the signal, as one
    that comes before Python can hear it; Slurm ends it after 90 s at the latest.
    """
    site = Site(accounting_session, tmp_path_factory.mktemp("limited"), digits_data)
    site.step_takes(0.6)  # and an epoch 5.4 s
    site.profile("chain", CHAIN)
    site.profile("deaf", PROFILE + 'setup: ["export SUBMITIT_PREEMPT_SIGNAL=USR1"]\n')
    runs = {}
    runs["hung"], hung_job = site.submit("--set", "resources.hang_timeout_s=10")
    for name, profile, epochs in (("requeued", "testbed", 8), ("chained", "chain", 8), ("unheard", "deaf", 18)):
        limited = ("--time", "00:01:00", "--nodes", "1", "--set", f"epochs={epochs}")
        [(runs[name], _)] = site.submit_many(*limited, profile=profile)
    site.until_epoch(1, runs["hung"])
    beat = site.runs / runs["hung"] / "heartbeat" / "rank-1.json"
    hung: dict[str, Any] = {}

    def trains() -> bool:  # and does not save, for which the watchdog gives five times as long
        hung.update(files.read_json(beat) or {})
        return hung.get("phase") == "train" and hung["step"] > EPOCH_STEPS and 1 <= hung["step"] % EPOCH_STEPS <= 5

    site.cluster.until(trains, 30, "a step of the next epoch")
    os.kill(hung["pid"], signal.SIGSTOP)
    return Begun(site, runs, hung_job, hung)
