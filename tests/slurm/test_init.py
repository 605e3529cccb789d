"""``init`` asks a real Slurm, with accounting and without, and what it writes is a profile that this Slurm takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hpc_cifar.config.load import load_cluster

if TYPE_CHECKING:
    from slurm_site import SlurmCluster

pytestmark = pytest.mark.slow


def cli(folder: Path, *arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpc_cifar", *arguments]
    own = {**os.environ, "PYTHONSAFEPATH": "1", "HPC_CIFAR_RUNS": str(folder / "runs"), **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=own, cwd=folder, check=False)
    assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def test_the_default_partition_without_accounting(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    said = cli(tmp_path, "init").stdout
    assert "wrote slurm/testbed.yaml for partition low" in said
    path = tmp_path / "slurm" / "testbed.yaml"
    made = load_cluster(path)
    assert (made.name, made.partition, made.account, made.max_time) == ("testbed", "low", None, None)
    assert (made.gpu_request, made.gpus_per_node_available, made.cpus_per_process) == ("gpus_per_node", 4, 2)
    assert made.requeue and made.preemptible
    text = path.read_text()
    assert "# account: my-project                       # this cluster keeps no accounts" in text
    assert "# A preempted job is told by SIGUSR2 and SIGTERM and has GraceTime=10 s to end." in text
    assert "#   low: default, time limit UNLIMITED, nodes: 3 x 8 CPUs, 8 GiB, 4 GPUs" in text
    without_a_word = [line for line in text.splitlines() if ": " in line and "#" not in line]
    assert [line.partition(":")[0] for line in without_a_word] == ["name", "description", "executor"]

    dry = cli(tmp_path, "submit", "deep300", "--cluster", "testbed", "--gpus-per-node", "4", "--dry-run").stdout
    assert "#SBATCH --gpus-per-node=4\n" in dry
    assert "in partition low, as Slurm estimates" in dry


def test_nothing_is_overwritten_unasked(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: precious\n")
    refused = cli(tmp_path, "init", "--out", "mine.yaml", code=2).stderr
    assert refused == "hpc-cifar: error: mine.yaml: exists already; use --force to overwrite it, or --out for another file\n"
    assert (tmp_path / "mine.yaml").read_text() == "name: precious\n"
    cli(tmp_path, "init", "--out", "mine.yaml", "--force")
    assert load_cluster(tmp_path / "mine.yaml").name == "mine"
    assert "--out a b.txt: name a file such as" in cli(tmp_path, "init", "--out", "a b.txt", code=2).stderr


def test_another_partition_and_its_limit(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    slurm_cluster.call("scontrol", "update", "PartitionName=high", "MaxTime=2-00:30:00")
    try:
        cli(tmp_path, "init", "--partition", "high", "--out", "slurm/high.yaml")
    finally:
        slurm_cluster.call("scontrol", "update", "PartitionName=high", "MaxTime=UNLIMITED")
    made = load_cluster(tmp_path / "slurm" / "high.yaml")
    assert (made.partition, made.max_time, made.preemptible) == ("high", "2-00:30:00", False)
    wrong = cli(tmp_path, "init", "--partition", "hihg", code=2).stderr
    assert wrong == "hpc-cifar: error: --partition: no partition named 'hihg'; did you mean 'high'?\n"


def test_accounts_where_the_site_keeps_them(
    accounting_session: SlurmCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_CONF", accounting_session.environment["SLURM_CONF"])
    cli(tmp_path, "init")
    path = tmp_path / "slurm" / "testbed.yaml"
    made = load_cluster(path)
    assert made.account == "root"
    assert "# sacctmgr: your default; also testbed" in path.read_text()
    assert "# qos: normal                               # sacctmgr: yours are normal" in path.read_text()
    assert "GraceTime=0 s to end." in path.read_text()
    dry = ("submit", "deep300", "--cluster", "testbed", "--gpus-per-node", "1", "--dry-run")
    assert "as Slurm estimates" in cli(tmp_path, *dry).stdout
    refused = cli(tmp_path, *dry, "--account", "nobody", code=1).stderr
    assert refused.startswith("hpc-cifar: error: Slurm would refuse the job: ")
    assert "Invalid account or account/partition combination specified" in refused


def test_a_machine_without_slurm_says_so_in_one_line(tmp_path: Path) -> None:
    said = cli(tmp_path, "init", code=1, PATH=str(tmp_path)).stderr
    assert said == "hpc-cifar: error: no Slurm on this machine (sinfo is missing): run this on the cluster's login node\n"
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_that_is_down_is_one_line_too(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    conf = (slurm_cluster.folder / "slurm.conf").read_text()
    port = next(line for line in conf.splitlines() if line.startswith("SlurmctldPort="))
    # discard: nobody listens; Slurm's commands try for as long as a message may take
    (tmp_path / "slurm.conf").write_text(conf.replace(port, "SlurmctldPort=9") + "MessageTimeout=2\n")
    said = cli(tmp_path, "init", code=1, SLURM_CONF=str(tmp_path / "slurm.conf")).stderr
    assert said.startswith("hpc-cifar: error: no Slurm cluster answers here: run this on its login node (")
    assert said.count("\n") == 1
    assert not (tmp_path / "slurm").exists()
