"""``doctor --cluster``: a job of one task looks at a compute node and tells, as every job runs: script, snapshot, folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from slurm_site import Site

from hpc_cifar.config.load import load_cluster
from hpc_cifar.errors import LaunchError
from hpc_cifar.launch import doctor

if TYPE_CHECKING:
    from slurm_site import SlurmCluster

pytestmark = pytest.mark.slow


@pytest.fixture
def site(slurm_cluster: SlurmCluster, tmp_path: Path, digits_data: Path) -> Site:
    return Site(slurm_cluster, tmp_path, digits_data)


def typed(site: Site, *options: str, code: int, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpc_cifar", "doctor", *options]
    own = {**site.environment, "PYTHONSAFEPATH": "1", "WANDB_MODE": "offline", **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=own, cwd=site.folder, check=False)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def found(text: str) -> list[dict[str, dict[str, Any]]]:
    return [{row["name"]: row for row in one["findings"]} for one in json.loads(text)["machines"]]


def test_a_compute_node_tells(site: Site) -> None:
    done = typed(site, "--cluster", "testbed.yaml", "--json", code=0)
    here, node = found(done.stdout)
    assert [one["host"] for one in json.loads(done.stdout)["machines"]][1] in ("n1", "n2", "n3")
    assert "cluster testbed, partitions low" in here["Slurm"]["said"]
    assert here["accounting"]["said"].startswith("this cluster keeps no accounts")
    assert node["torch"]["state"] == node["data"]["state"] == node["runs"]["state"] == "ok"
    assert node["requeue"]["said"].startswith("by scontrol; preemption here: ")
    assert "looks at a node of testbed" in done.stderr
    assert not list((site.runs / ".doctor").iterdir()), "nothing is left of a job that told"


def look(site: Site, name: str, text: str) -> tuple[doctor.Machine, list[str]]:
    """A node of a profile, and what was said meanwhile; without the libraries of this machine."""
    path = site.folder / f"{name}.yaml"
    path.write_text(f"executor: slurm\n{text}")
    said: list[str] = []
    data = Path(site.environment["HPC_CIFAR_DATA"])
    return doctor.on_node(load_cluster(path), data, site.runs, said.append), said


def test_gpus_that_are_there_for_slurm_only(site: Site) -> None:
    """The test cluster's GPUs are pretended: torch sees none of them, what doctor is for, unless there is a real one."""
    seen, said = look(site, "gpus", "partition: low\ncpus_per_process: 1\n")
    [gpu] = [one for one in seen.findings if one.name.startswith("GPU")]
    if torch.cuda.is_available():
        assert gpu.state == "ok" and gpu.name == "GPU 0"
    else:
        assert gpu.state == "problem" and gpu.said.startswith("torch sees 0 of the 1 GPUs that the job was given")
    assert any(line.endswith(" is running") for line in said), said


def test_a_job_that_cannot_answer_says_where_its_words_are(site: Site) -> None:
    with pytest.raises(
        LaunchError,
        match=r"answer: setup line 1 of profile bad ended the job with exit code 3: `exit 3`; its files are in .*/\.doctor/",
    ):
        look(site, "bad", "partition: low\ngpu_request: none\nsetup: ['exit 3']\n")
    with pytest.raises(LaunchError, match="invalid partition"):
        look(site, "none", "partition: nowhere\ngpu_request: none\n")
    wrong = [one for one in doctor.slurm_findings(load_cluster(site.folder / "none.yaml")) if one.state != "ok"]
    assert [(one.name, one.fix) for one in wrong] == [("profile", "hpc-cifar init")] and "'nowhere'" in wrong[0].said
