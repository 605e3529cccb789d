"""Jobs under continuous random preemption, cancels and node losses on a real Slurm cluster; nothing may be lost.

    python slurm/testbed/soak.py --minutes 5 --jobs 20      # or: make soak

Brings up a cluster of its own, trains one undisturbed twin of every kind of job, then keeps jobs of all kinds under fire. At
the end every job must be finished or cancelled as asked, every finished one must have the test loss of its twin, to the last
digit, and a table says what was lost. Exit code 1 if anything was lost that need not be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CLUSTER = Path(__file__).with_name("cluster.py")
NODES = ("n1", "n2", "n3")
BOOT_S = 20.0  # a lost node comes back after this long
JOB = """\
name: soak-{name}
seed: {seed}
epochs: {epochs}
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
resources: {{nodes: {nodes}, processes_per_node: 1, time: "00:20:00", hang_timeout_s: 30}}
"""
PROFILE = """\
executor: slurm
partition: low6
gpu_request: none
cpus_per_process: 1
preemptible: true
signal_delay_s: 30
"""
KINDS = {"one": (11, 1), "two": (12, 2)}  # name -> (seed, nodes)
PARTITIONS = ("low", "low0", "low6", "mid")  # jobs in mid preempt those in the others, and make way for high as those do
COMPARED = ("test_loss", "test_accuracy", "epochs", "steps")  # to the last digit


@dataclass
class Job:
    """One job under fire."""

    run: str
    job_id: str
    kind: str
    partition: str
    asked_to_cancel: bool = False
    node_lost: bool = False  # without a warning, so that it has to train again what it had not saved
    last: dict[str, Any] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)  # what `status` said, whenever it changed


class Soak:
    """A user on the cluster, and the chaos around."""

    def __init__(self, folder: Path, dice: random.Random, epochs: int) -> None:
        self.folder, self.dice = folder, dice
        self.cluster = folder / "c"
        self.environment = os.environ | {
            "HPC_CIFAR_DATA": str(folder / "data"),
            "HPC_CIFAR_RUNS": str(folder / "runs"),
            "SLURM_CONF": str(self.cluster / "slurm.conf"),
        }
        (folder / "soak.yaml").write_text(PROFILE)
        for name, (seed, nodes) in KINDS.items():
            (folder / f"{name}.yaml").write_text(JOB.format(name=name, seed=seed, nodes=nodes, epochs=epochs))
        self.counts = {"preemptions": 0, "preemptions of training jobs": 0, "cancels": 0, "nodes lost": 0}
        self.dead: dict[str, float] = {}  # node -> when it boots again

    def testbed(self, *arguments: str) -> None:
        subprocess.run(
            [sys.executable, str(CLUSTER), *arguments, "--dir", str(self.cluster)], check=True, stdout=subprocess.DEVNULL
        )

    def slurm(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, cwd=self.folder, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    def cli(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "hpc_cifar", *arguments]
        done = subprocess.run(command, env=self.environment, cwd=self.folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"soak: {' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, kind: str, partition: str) -> Job:
        printed = self.cli("submit", f"{kind}.yaml", "--cluster", "./soak.yaml", "--partition", partition, "--parsable")
        run, job_id = printed.strip().splitlines()[-1].split("\t")
        return Job(run, job_id, kind, partition)

    def look(self, jobs: list[Job]) -> None:
        rows = {row["run"]: row for row in json.loads(self.cli("status", "--json"))}
        for job in jobs:
            job.last = rows[job.run]
            words = (
                f"{job.last['state']} ({job.last['reason']}), step {job.last['step']}"
                if job.last["reason"]
                else job.last["state"]
            )
            if not job.seen or not job.seen[-1].endswith(f" {words}"):
                job.seen.append(f"{time.strftime('%H:%M:%S')} {words}")

    def record(self, job: Job, name: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.folder / "runs" / job.run / name).read_text())
        except (OSError, ValueError):
            return {}
        return found

    def last_words(self, job: Job) -> str:
        """The ends of a run's logs, and what Slurm knows and knew of its job."""
        parts = ["-- seen", *job.seen, "-- slurm", self.slurm("scontrol", "--oneliner", "show", "job", job.job_id)]
        for log in sorted((self.cluster / "log").glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()
            parts += [f"{log.stem}: {line}" for line in lines if re.search(rf"(JobId=|job |JOB ){job.job_id}\b", line)]
        for path in sorted((self.folder / "runs" / job.run / "submitit").glob("*_log.*")):
            parts.append(f"-- {path.name}\n{path.read_text(errors='replace')[-2000:]}")
        return "\n".join(parts)

    def strike(self, jobs: list[Job], seconds_left: float) -> None:
        """One random blow."""
        blow = self.dice.random()
        alive = [job for job in jobs if job.last.get("state") in ("running", "pending", "requeued") and not job.asked_to_cancel]
        training = any(job.last.get("state") == "running" and job.last.get("step") for job in jobs)
        if blow < 0.70 or not alive:
            if not training and self.dice.random() < 0.7:
                return  # most blows are for jobs that have something to lose; the others meet jobs that begin
            self.counts["preemptions of training jobs"] += training
            nodes = self.dice.randint(1, len(NODES))
            seconds = self.dice.randint(1, 3)
            script = self.folder / "high.sh"
            script.write_text(f"#!/bin/sh\nsleep {seconds}\n")
            self.slurm("sbatch", "--partition=high", f"--nodes={nodes}", "--exclusive", "--output=/dev/null", str(script))
            self.counts["preemptions"] += 1
        elif blow < 0.85:
            job = self.dice.choice(alive)
            job.asked_to_cancel = True
            if self.dice.random() < 0.5:
                self.slurm("scancel", job.job_id)
            else:
                self.cli("cancel", job.run)
            self.counts["cancels"] += 1
        elif not self.dead and seconds_left > 2 * BOOT_S:
            node = self.dice.choice(NODES)
            there = self.slurm("squeue", "--noheader", "--format=%i", f"--nodelist={node}").split()
            for job in jobs:
                job.node_lost = job.node_lost or job.job_id in there
            self.testbed("crash", node)
            self.dead[node] = time.monotonic() + BOOT_S
            self.counts["nodes lost"] += 1

    def heal(self, everything: bool = False) -> None:
        for node, when in list(self.dead.items()):
            if everything or time.monotonic() > when:
                self.testbed("boot", node)
                del self.dead[node]

    def under_fire(self, number: int, minutes: float) -> list[Job]:
        """Submit the jobs over the first third of the time, strike until it is over."""
        kinds = list(KINDS)
        jobs: list[Job] = []
        began, seconds = time.monotonic(), minutes * 60
        while (elapsed := time.monotonic() - began) < seconds:
            if len(jobs) < number and elapsed > seconds / 3 * len(jobs) / number:
                jobs.append(self.submit(kinds[len(jobs) % len(kinds)], self.dice.choice(PARTITIONS)))
                continue
            self.heal()
            self.look(jobs)
            self.strike(jobs, seconds - elapsed)
            time.sleep(self.dice.uniform(1, 6))
        self.heal(everything=True)
        return jobs


def report(soak: Soak, jobs: list[Job], twins: dict[str, dict[str, Any]]) -> int:
    """The table; how many jobs did not end as they should."""
    bad = trained = lost = unwarned = 0
    print(f"{'run':34} {'partition':9} {'state':10} {'restarts':>8} {'steps':>6} {'lost':>5} {'goodput':>8}  as its twin")
    for job in jobs:
        state, result = soak.record(job, "state.json"), soak.record(job, "result.json")
        steps, gone = int(state.get("step") or 0), int(state.get("lost_steps") or 0)
        trained, lost, unwarned = trained + steps, lost + gone, unwarned + (gone if job.node_lost else 0)
        word = str(job.last["state"])
        if word == "finished":
            twin = twins[job.kind]
            different = [name for name in COMPARED if result.get(name) != twin[name]]
            same = not different
            verdict = "yes" if same else f"NO: {', '.join(f'{name} {result.get(name)} not {twin[name]}' for name in different)}"
            if gone and not job.node_lost:
                same, verdict = False, "NO: steps were lost, and none of its nodes"
        else:
            same = word == "cancelled" and job.asked_to_cancel
            verdict = "cancelled as asked" if same else f"NO: {job.last.get('reason')}"
        bad += not same
        goodput = f"{steps / (steps + gone):.1%}" if steps else "-"
        restarts = int(state.get("restarts") or 0)
        print(f"{job.run:34} {job.partition:9} {word:10} {restarts:8} {steps:6} {gone:5} {goodput:>8}  {verdict}")
        if not same:
            print(soak.last_words(job))
    blows = ", ".join(f"{number} {name}" for name, number in soak.counts.items())
    goodput = trained / max(1, trained + lost)
    print(f"\n{len(jobs)} jobs under {blows}: {bad} did not end as they should")
    print(f"{lost} of {trained + lost} steps were trained twice, goodput {goodput:.1%}")
    print(f"of them {unwarned} by jobs whose node was lost, which nothing announces; {lost - unwarned} by all others")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="of chaos (%(default)s); waiting for the jobs comes after")
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=80, help="of each job, of 27 steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of the chaos; a random one is printed")
    parser.add_argument("--limit-minutes", type=float, default=15.0, help="for the jobs to end after the chaos (%(default)s)")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.randrange(1 << 30)
    print(f"soak: chaos seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        soak = Soak(Path(name), random.Random(seed), options.epochs)
        soak.cli("prepare", "digits")
        try:
            soak.testbed("up", "--cpus", "2", "--grace-time", "3", "--preempt-send-user-signal")
            twin_jobs = {kind: soak.submit(kind, "high") for kind in KINDS}
            for job in twin_jobs.values():
                soak.cli("wait", job.run)
            twins = {kind: soak.record(job, "result.json") for kind, job in twin_jobs.items()}
            jobs = soak.under_fire(options.jobs, options.minutes)
            print(f"soak: {soak.counts}; waiting for the jobs to end", flush=True)
            deadline = time.monotonic() + options.limit_minutes * 60
            while True:
                soak.look(jobs)
                if all(job.last["state"] in ("finished", "failed", "cancelled", "stopped") for job in jobs):
                    break
                if time.monotonic() > deadline:
                    print("soak: not all jobs have ended in time", flush=True)
                    break
                time.sleep(2)
            bad = report(soak, jobs, twins)
            if bad and (kept := os.environ.get("SOAK_KEEP")):
                subprocess.run(["cp", "-r", str(soak.folder / "runs"), kept], check=False)
        finally:
            soak.testbed("down")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
