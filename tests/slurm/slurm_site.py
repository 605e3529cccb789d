"""A real Slurm cluster as tests see it, and a user on it with a job file, a profile and a folder for runs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from command_line import typed

from hpc_cifar import files

TESTBED = Path(__file__).resolve().parents[2] / "slurm" / "testbed" / "cluster.py"
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


class SlurmCluster:
    """What tests ask of a running cluster."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.folder = folder
        self.work = work  # for scripts and logs
        self.mounted: list[tuple[str, str]] = []  # node, path
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

    def hosts(self, job_id: str) -> list[str]:
        """The nodes of a job."""
        return self.call("scontrol", "show", "hostnames", self.job(job_id)["NodeList"]).split()

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

    def slurmd(self, node: str) -> int:
        """The process whose namespaces are the node's."""
        pid: int = json.loads((self.folder / "daemons.json").read_text())[node][0]
        return pid

    def mount(self, node: str, *arguments: str) -> None:
        """`mount` as the node sees it, and no other."""
        subprocess.run(["nsenter", f"--mount=/proc/{self.slurmd(node)}/ns/mnt", "mount", *arguments], check=True)
        self.mounted.append((node, arguments[-1]))

    def hide(self, node: str, *programs: str) -> None:
        """Make programs missing on a node: what lies over them cannot be executed."""
        for program in programs:
            self.mount(node, "--bind", "/dev/null", str(shutil.which(program)))

    def show_again(self) -> None:
        """Undo every mount."""
        while self.mounted:
            node, path = self.mounted.pop()
            subprocess.run(["nsenter", f"--mount=/proc/{self.slurmd(node)}/ns/mnt", "umount", "--lazy", path], check=True)

    def elsewhere(self, job_id: str, node: str) -> None:
        """Have a waiting job start on other nodes. Slurm repeats for a while, to a node that died, that its job is to end:
        if the node is back by then, with the same job, that one ends.
        """
        self.call("scontrol", "update", f"JobId={job_id}", "ReqNodeList=", f"ExcNodeList={node}")

    def testbed(self, *arguments: str) -> str:
        return call_testbed(*arguments, "--dir", str(self.folder))

    def as_testbed(self) -> Any:
        """slurm/testbed's own view of it."""
        sys.path.insert(0, str(TESTBED.parent))
        try:
            from cluster import Cluster
        finally:
            sys.path.pop(0)
        return Cluster(self.folder)

    def batch(self, *options: str, script: str) -> str:
        """Submit a shell script; its job id."""
        path = self.work / f"job-{time.monotonic_ns()}.sh"
        path.write_text("#!/bin/bash\nset -eu\n" + script)
        return self.call("sbatch", "--parsable", f"--output={self.work}/%j.out", "--open-mode=append", *options, str(path))

    def output(self, job_id: str) -> str:
        path = self.work / f"{job_id}.out"
        return path.read_text() if path.exists() else ""


def call_testbed(*arguments: str) -> str:
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


@contextlib.contextmanager
def running_cluster(folder: Path, *options: str) -> Iterator[SlurmCluster]:
    """A cluster of its own in ``folder``; the test is skipped where none can be."""
    if reason := why_not():
        pytest.skip(reason)
    try:
        call_testbed("up", "--dir", str(folder / "c"), *options)
        yield SlurmCluster(folder / "c", folder)
    finally:
        call_testbed("down", "--dir", str(folder / "c"))


EPOCHS = 6
JOB = f"""\
name: small
seed: 5
epochs: {EPOCHS}
model:
  family: sequential
  layers: [flatten, {{dense: {{units: 32}}}}, batch_norm, relu, {{dense: {{units: 10}}}}]
data: {{dataset: digits, batch_size: 144, augment: {{crop_padding: 1}}}}
optimizer: {{name: sgd, lr: 0.03, momentum: 0.9}}
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
CHAIN = """\
executor: slurm
partition: low
gpu_request: none
cpus_per_process: 1
requeue: false
chain_links: 10
"""
STEP_S = 0.15
EPOCH_STEPS = 9  # of the job above
# Training that waits after every step takes the same time on every machine, and leaves the processor to others. Ranks wait as
# long as the file beside this module says: after a step of their first epoch, after another one.
PACE = f"""\
import pathlib, sys, threading, time

STEP_S, steps = pathlib.Path(__file__).with_name("step_s"), 0


def rest(*_):
    global steps
    steps += 1
    time.sleep(float(STEP_S.read_text().split()[steps > {EPOCH_STEPS}]))


def hook():
    while not hasattr(optimizer := sys.modules.get("torch.optim.optimizer"), "register_optimizer_step_post_hook"):
        time.sleep(0.05)
    optimizer.register_optimizer_step_post_hook(rest)


threading.Thread(target=hook, daemon=True).start()
"""


class Site:
    """One user on the cluster: job files, profiles, a folder for runs."""

    def __init__(self, cluster: SlurmCluster, folder: Path, data: Path, runs: str = "runs") -> None:
        self.cluster = cluster
        self.folder = folder
        self.runs = folder / runs
        self.environment = {
            **os.environ,
            "SLURM_CONF": cluster.environment["SLURM_CONF"],
            "HPC_CIFAR_DATA": str(data),
            "HPC_CIFAR_RUNS": str(self.runs),
        }
        (folder / "job.yaml").write_text(JOB)
        (folder / "pace").mkdir()
        (folder / "pace" / "sitecustomize.py").write_text(PACE)  # Python imports this before anything else
        self.step_takes(STEP_S)
        self.profile("testbed", PROFILE)

    def profile(self, name: str, text: str) -> None:
        """Write a profile, for ``submit_many``; its jobs train at the pace of this site."""
        pace = json.dumps(str(self.folder / "pace"))
        (self.folder / f"{name}.yaml").write_text(f"{text}environment: {{PYTHONPATH: {pace}}}\n")

    def step_takes(self, seconds: float, after_an_epoch: float | None = None) -> None:
        """The least time of a training step, from now on."""
        later = seconds if after_an_epoch is None else after_an_epoch
        files.write_text(self.folder / "pace" / "step_s", f"{seconds} {later}", durable=False)

    def hasten(self) -> None:
        """What was to be disturbed was: train as quickly as can be."""
        self.step_takes(0)

    def run(self, *arguments: str, code: int = 0, timeout_s: float = 200) -> subprocess.CompletedProcess[str]:
        done = typed(arguments, self.environment, self.folder, timeout_s)
        assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.logs()}"
        return done

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """The same in the background; its output is a pipe."""
        command = [sys.executable, "-m", "hpc_cifar", *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=self.environment, cwd=self.folder)

    def call(self, *arguments: str, code: int = 0) -> str:
        return self.run(*arguments, code=code).stdout

    def submit(self, *options: str) -> tuple[str, str]:
        """Run and job id."""
        return self.submit_many(*options)[-1]

    def submit_many(
        self, *options: str, jobs: Sequence[str] = ("job.yaml",), profile: str = "testbed"
    ) -> list[tuple[str, str]]:
        """Run and job id of every element."""
        printed = self.call("submit", *jobs, "--cluster", f"./{profile}.yaml", "--parsable", *options)
        pairs = [line.split("\t") for line in printed.strip().splitlines()]
        return [(run, job) for run, job in pairs]

    def statuses(self, *names: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.call("status", *names, "--json"))
        return rows

    def status(self, run: str) -> dict[str, Any]:
        [row] = self.statuses(run)
        return row

    def finished(self, *runs: str) -> list[dict[str, Any]]:
        """Wait until they have; their results."""
        self.call("wait", *runs)
        return [self.result(run) for run in runs]

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
        return [row["epoch"] for row in self.rows(run, "epoch")]

    def rows(self, run: str, kind: str) -> list[dict[str, Any]]:
        rows = map(json.loads, (self.runs / run / "metrics.jsonl").read_text().splitlines())
        return [row for row in rows if row["kind"] == kind]

    def until_epoch(self, epoch: int, *runs: str) -> None:
        """Until the runs train and have some epochs behind them."""

        def there(state: dict[str, Any]) -> bool:
            return state.get("state") == "running" and (state.get("epoch") or 0) >= epoch

        deadline = time.monotonic() + 300
        while not all(map(there, states := [self.state(run) for run in runs])):
            assert time.monotonic() < deadline, f"not at epoch {epoch}: {states}\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        texts = [f"-- {path.name}\n{path.read_text()[-1500:]}" for path in sorted(self.runs.glob("*/submitit/*_log.*"))]
        return "\n".join(texts)


@dataclasses.dataclass(frozen=True)
class Begun:
    """Runs on a cluster of their own, by name: under a time limit of a minute, and one of which a rank hangs."""

    site: Site
    runs: dict[str, str]
    hung_job: str
    hung: dict[str, Any]  # the heartbeat of the rank


def assert_same(disturbed: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    same = ("state", "epochs", "steps", "test_loss", "test_accuracy")  # to the last digit
    assert {name: disturbed[name] for name in same} == {name: undisturbed[name] for name in same}
