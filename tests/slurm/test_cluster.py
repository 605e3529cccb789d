"""The test cluster is a real one: what other tests rely on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import submitit
from slurm_site import TESTBED, SlurmCluster

pytestmark = pytest.mark.slow


def test_batch_job_runs(slurm_cluster: SlurmCluster) -> None:
    job = slurm_cluster.batch(script="echo hello from $(hostname)")
    assert slurm_cluster.wait(job) == "COMPLETED"
    assert slurm_cluster.output(job).strip() in {f"hello from n{number}" for number in (1, 2, 3)}


def test_a_failed_job_is_seen_as_failed(slurm_cluster: SlurmCluster) -> None:
    assert slurm_cluster.wait(slurm_cluster.batch(script="exit 3")) == "FAILED"


def test_a_step_spans_nodes_that_find_each_other(slurm_cluster: SlurmCluster) -> None:
    job = slurm_cluster.batch(
        "--nodes=2",
        script="srun hostname\nfor node in $(scontrol show hostnames $SLURM_JOB_NODELIST); do getent hosts $node; done",
    )
    assert slurm_cluster.wait(job) == "COMPLETED"
    lines = slurm_cluster.output(job).split("\n")
    first, second = sorted(lines[:2])
    assert first != second
    assert {line.split()[1] for line in lines[2:4]} == {first, second}
    assert all(line.startswith("127.0.0.1") for line in lines[2:4])


def test_fake_gpus_are_handed_out_once(slurm_cluster: SlurmCluster) -> None:
    script = "echo devices=$CUDA_VISIBLE_DEVICES; sleep 2"
    jobs = [slurm_cluster.batch("--nodelist=n1", "--gres=gpu:2", script=script) for _ in range(2)]
    assert [slurm_cluster.wait(job) for job in jobs] == ["COMPLETED"] * 2
    assert sorted(slurm_cluster.output(job).strip() for job in jobs) == ["devices=0,1", "devices=2,3"]


def test_submitit_returns_a_value(slurm_cluster: SlurmCluster) -> None:
    executor = submitit.SlurmExecutor(folder=slurm_cluster.work / "logs", python=sys.executable)
    executor.update_parameters(time=5, ntasks_per_node=1, cpus_per_task=1)
    job = executor.submit(os.path.join, "a", "b")
    slurm_cluster.wait(job.job_id)
    assert job.results() == ["a/b"]


def test_requeue_runs_again(slurm_cluster: SlurmCluster) -> None:
    job = slurm_cluster.batch(
        "--requeue", script="echo run ${SLURM_RESTART_COUNT:-0}; [ ${SLURM_RESTART_COUNT:-0} = 1 ] || sleep 100"
    )
    slurm_cluster.until(lambda: "run 0" in slurm_cluster.output(job), 20, "the first run")
    slurm_cluster.call("scontrol", "requeue", job)
    assert slurm_cluster.wait(job) == "COMPLETED"
    assert "run 1" in slurm_cluster.output(job)
    assert slurm_cluster.job(job)["Restarts"] == "1"


def test_a_high_job_preempts_and_the_low_one_hears_of_it(slurm_cluster: SlurmCluster) -> None:
    script = "trap 'echo signalled; exit 0' USR1\necho run ${SLURM_RESTART_COUNT:-0}\n"
    script += "[ ${SLURM_RESTART_COUNT:-0} = 0 ] || exit 0\nwhile true; do sleep 0.1; done"
    low = slurm_cluster.batch(
        "--requeue", "--nodelist=n1", "--exclusive", "--signal=B:USR1@60", "--partition=low", script=script
    )
    slurm_cluster.until(lambda: "run 0" in slurm_cluster.output(low), 20, "the low job runs")
    high = slurm_cluster.batch("--nodelist=n1", "--exclusive", "--partition=high", script="true")
    assert slurm_cluster.wait(high) == "COMPLETED"
    assert "signalled" in slurm_cluster.output(low)


def test_crash_and_boot_of_a_node(slurm_cluster: SlurmCluster) -> None:
    job = slurm_cluster.batch("--nodelist=n3", "--no-requeue", script="sleep 100")
    slurm_cluster.wait(job, {"RUNNING"})
    assert "processes of n3 killed" in slurm_cluster.testbed("crash", "n3")
    slurm_cluster.call("scancel", job)
    slurm_cluster.testbed("boot", "n3")
    slurm_cluster.until(lambda: "n3 idle" in slurm_cluster.testbed("status"), 60, "n3 is back")


def own_cluster(verb: str, folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TESTBED), verb, "--dir", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


@pytest.mark.usefixtures("begun")  # they wait while these tests do, and all that follow
@pytest.mark.parametrize("options", [(), ("--accounting",)])
def test_a_dirty_stop_is_cleaned_up_by_the_next_start(
    slurm_cluster: SlurmCluster, accounting_session: SlurmCluster, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Of a second cluster on the same machine, whose daemons but the first one die."""
    own = tmp_path / "c"
    try:
        assert own_cluster("up", own, *options).returncode == 0
        pids = [pid for pid, _ in json.loads((own / "daemons.json").read_text()).values()]
        assert len(pids) == (7 if options else 5)
        for pid in pids[1:]:
            os.kill(pid, signal.SIGKILL)
        assert own_cluster("up", own, *options).returncode == 0
        assert own_cluster("status", own).stdout.count("idle") == 3
    finally:
        assert own_cluster("down", own).returncode == 0
    assert list(own.iterdir()) == []
    for other in (slurm_cluster, accounting_session):
        assert "n1" in other.testbed("status"), "the session's clusters are untouched"


def test_what_is_missing_is_named(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    """By the names of Debian's packages, before anything is made."""
    done = own_cluster("up", tmp_path / "c", PATH="/nowhere")  # /usr/sbin is searched anyway
    assert done.returncode == 1 and not (tmp_path / "c").exists()
    install = "apt-get install --no-install-recommends slurm-wlm util-linux"
    assert done.stderr == f"cluster: missing slurm-wlm, util-linux: {install}\n"


def test_a_path_that_is_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    """Slurm itself starts there, and holds every job."""
    folder = tmp_path / ("long" * 20)
    done = subprocess.run(
        [sys.executable, str(TESTBED), "up", "--dir", str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1 and "too long a path for Slurm's sockets" in done.stderr and "at most 7" in done.stderr
    assert not folder.exists()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="run-") as made:
        yield Path(made)


def test_the_lines_of_the_docs(slurm_cluster: SlurmCluster, repository: Path, tmp_path: Path, short_folder: Path) -> None:
    """A cluster of one's own, a run on two of its nodes, and nothing left."""
    page = (repository / "docs" / "clusters.md").read_text()
    block = page.partition("## The test cluster")[2].partition("```sh\n")[2].partition("```")[0]
    lines = [line.partition(" # ")[0].strip() for line in block.splitlines() if not line.startswith("scontrol")]
    verbs = {"make slurm-up": "python slurm/testbed/cluster.py up", "make slurm-down": "python slurm/testbed/cluster.py down"}
    script = "\n".join(["set -eu", f"trap '{verbs['make slurm-down']}' EXIT", *(verbs.get(line, line) for line in lines)])
    assert all(verb in script for verb in verbs.values()) and "hpc-cifar submit" in script
    before = {path: path.stat().st_mtime_ns for path in Path("/etc").rglob("*") if path.is_file()}
    site = {
        "XDG_RUNTIME_DIR": str(short_folder),
        "HPC_CIFAR_DATA": str(tmp_path / "data"),
        "HPC_CIFAR_RUNS": str(tmp_path / "runs"),
    }
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, **site, "PATH": path, "PYTHONPATH": str(repository)}
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=200, env=environment, cwd=repository, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "test accuracy" in done.stdout and "finished" in done.stdout
    assert list((short_folder / "hpc-cifar-slurm").iterdir()) == []
    assert before == {path: path.stat().st_mtime_ns for path in Path("/etc").rglob("*") if path.is_file()}
