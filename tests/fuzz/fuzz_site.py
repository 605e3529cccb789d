"""Runs of every kind in a folder: real small trainings by the package under test, and copies of them in other states."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data import makers

JOB = """\
name: tiny
seed: 1
epochs: 2
model: {family: sequential, layers: [flatten, {dense: {units: 10}}]}
data: {dataset: digits, batch_size: 256, validation: 0.1}
optimizer: {name: sgd, lr: 0.1}
tracking: {wandb: disabled}
resources: {processes_per_node: 1, time: "00:10:00"}
"""
RATES = [0.05, 0.1]
SWEEP = f"method: grid\nparameters: {{optimizer.lr: {RATES}}}\n"
OPEN = ("running", "cancelled", "failed", "requeued", "element", "stopped")
TRANSFER = JOB.replace("tiny", "transfer").replace(
    "{family: sequential, layers: [flatten, {dense: {units: 10}}]}",
    "{family: timm, name: resnet10t, weights: w.safetensors, train: frozen}",
)
PROFILE = 'executor: slurm\npartition: part\ngpu_request: gres\nmax_time: "1-00:00:00"\nenvironment: {A: b}\n'
SECOND = JOB.replace("tiny", "other").replace(
    "[flatten, {dense: {units: 10}}]", "[{conv: {filters: 4}}, batch_norm, relu, global_avg_pool, {dense: {units: 10}}]"
)
SQUEUE = "4711|PENDING|Priority|2030-01-01T00:00:00|\n4712_0|RUNNING|None|2026-01-01T00:00:00|n1\n"
TESTED = "sbatch: Job 1 to start at 2030-01-01T00:00:00 using 2 processors on nodes n1 in partition x"
CAMPAIGN = "camp"


def resealed(text: str) -> str:
    """A record as the package would write it: with the checksum of its text, if it has one."""
    if '"crc32": "' not in text:
        return text
    values = json.loads(text)
    del values["crc32"]
    body = json.dumps(values, indent=2).removesuffix("\n}")
    return f'{body},\n  "crc32": "{zlib.crc32(body.encode()):08x}"\n}}\n'


class Fuzzed:
    """A folder with runs, data and files for commands, and a pristine copy of it.

    Args:
        folder: an empty one.
        package: the folder that holds the package under test.
    """

    def __init__(self, folder: Path, package: Path) -> None:
        self.here, self.pristine, self.package = folder / "here", folder / "pristine", package
        self.runs, self.data, self.work = self.here / "runs", self.here / "data", self.here / "work"
        self.bin, self.told = folder / "bin", folder / "told"
        for path in (self.runs, self.data, self.work, self.bin, folder / "home", folder / "tmp"):
            path.mkdir(parents=True, exist_ok=True)
        self.told.touch()
        self._programs()
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HPC_CIFAR_", "PYTEST_", "SLURM_", "WANDB_"))
        }
        self.environment = {
            **kept,
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "PYTHONPATH": str(package),
            "PYTHONSAFEPATH": "1",
            "HPC_CIFAR_RUNS": str(self.runs),
            "HPC_CIFAR_DATA": str(self.data),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder / "tmp"),
            "WANDB_BASE_URL": "http://127.0.0.1:9",
            "WANDB_MODE": "disabled",
        }
        self.sleeper = subprocess.Popen(["sleep", "86400"], start_new_session=True)

    def _programs(self) -> None:
        """Stand-ins for Slurm's; those that act write down what they were told."""
        bodies = {
            "squeue": f"cat <<'E'\n{SQUEUE}E",
            "sacct": "exit 1",
            "scontrol": 'case "$*" in *config*) echo "ClusterName = fuzzed";; *) exit 1;; esac',
            "scancel": f'for one; do printf "%s\\n" "$one" >> {self.told}; done',
            "sbatch": f'case "$*" in *--test-only*) echo "{TESTED}" >&2;; *) echo "Submitted batch job 4799";; esac',
            "nvidia-smi": "exit 9",
        }
        for name, body in bodies.items():
            path = self.bin / name
            path.write_text(f"#!/bin/sh\n{body}\n")
            path.chmod(0o755)

    def command(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "hpc_cifar", *arguments],
            cwd=self.work,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        if done.returncode:
            raise RuntimeError(f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def make(self, quickly: Callable[[list[str]], None], data: Path | None = None, *, weights: bool = False) -> None:
        """Train, copy, and keep a pristine copy of all; or take the one that is there.

        Args:
            quickly: runs a command of the package, and raises if it fails.
            data: a folder with prepared digits; else they are prepared.
            weights: also a file of pretrained weights, which takes some seconds more.
        """
        if self.pristine.exists():
            shutil.rmtree(self.here)
            shutil.copytree(self.pristine, self.here, symlinks=True)
            self._controller()
            who = next((self.runs / "running" / "submitit").glob("*_process.json"))
            shutil.copy2(who, self.pristine / who.relative_to(self.here))
            return
        files = {"tiny.yaml": JOB, "other.yaml": SECOND, "sweep.yaml": SWEEP, "mine.yaml": PROFILE}
        for name, text in files.items():
            (self.work / name).write_text(text)
        makers.write_tar(self.work / "images.tar.gz", makers.image_files(each=2, classes=("cat", "dog"), kind="PNG"))
        makers.write_tar(self.work / "batches.tar.gz", makers.batch_files(count=20))
        if weights:
            (self.work / "transfer.yaml").write_text(TRANSFER)
            program = (
                "import timm, safetensors.torch as s; s.save_file(timm.create_model('resnet10t').state_dict(), 'w.safetensors')"
            )
            subprocess.run([sys.executable, "-c", program], cwd=self.work, env=self.environment, check=True)
        if data is not None:
            shutil.copytree(data, self.data, dirs_exist_ok=True)
        else:
            self.command("prepare", "digits", "--no-beton")
        self.command("submit", "tiny.yaml", "--cluster", "local", "--campaign", CAMPAIGN, "--follow")
        [first] = self.runs.glob("tiny-*")
        self._moved(first, "fin-a")
        for name, *sets in (
            ("fin-b", "seed=2", f"tracking.group={CAMPAIGN}"),
            *((f"swept-{n}", f"optimizer.lr={lr}", "tracking.group=swept") for n, lr in enumerate(RATES)),
        ):
            quickly(["train", "tiny.yaml", "--name", name, *(word for one in sets for word in ("--set", one))])
        for number, lr in enumerate(RATES):
            sweep = {
                "method": "grid",
                "parameters": {"optimizer.lr": RATES},
                "runs": None,
                "seed": 0,
                "metric": "val_accuracy",
                "prune": None,
            }
            place = {"journal": "../.sweeps/swept-d49cb2/tiny.log", "study": "tiny", "number": number, "trial": number}
            text = json.dumps({**place, "values": {"optimizer.lr": lr}, "sweep": sweep}, indent=2)
            (self.runs / f"swept-{number}" / "sweep.json").write_text(text + "\n")
        quickly(["evaluate", "fin-a"])
        for name in OPEN:
            self._copied("fin-a", name)
            if name not in ("failed", "requeued"):
                shutil.rmtree(self.runs / name / "code")
        self._states()
        base = 1_700_000_000
        for number, name in enumerate(("fin-a", "fin-b", "swept-0", "swept-1", *OPEN)):
            os.utime(self.runs / name / "experiment.yaml", (base + number, base + number))
        shutil.copytree(self.here, self.pristine, symlinks=True)

    def _moved(self, path: Path, name: str) -> None:
        path.rename(self.runs / name)
        self._renamed(path.name, name)

    def _copied(self, source: str, name: str) -> None:
        shutil.copytree(self.runs / source, self.runs / name, symlinks=True)
        self._renamed(source, name)

    def _renamed(self, old: str, name: str) -> None:
        for one in (self.runs / name).rglob("*.json*"):
            if "code" not in one.parts:
                one.write_text(resealed(one.read_text().replace(old, name)))

    def _edit(self, name: str, file: str, **values: Any) -> None:
        path = self.runs / name / file
        path.write_text(resealed(json.dumps({**json.loads(path.read_text()), **values}, indent=2) + "\n"))

    def _jobs(self, name: str, **values: Any) -> None:
        row = {
            "submitted": "2026-01-01T00:00:00+00:00",
            "executor": "slurm",
            "tasks": 1,
            "gpus": 0,
            "cluster": "mine",
            "slurm_cluster": "fuzzed",
        }
        (self.runs / name / "jobs.jsonl").write_text(json.dumps({**row, **values}) + "\n")

    def _states(self) -> None:
        runs = self.runs
        for name in (
            "stopped",
            "cancelled",
            "requeued",
            "element",
            "failed",
        ):  # of before a restart of the machine: nobody is looked for
            for who in (runs / name / "submitit").glob("*_process.json"):
                who.write_text(json.dumps({**json.loads(who.read_text()), "boot": "another"}))
        for name in OPEN:
            (runs / name / "result.json").unlink()
            rows = (runs / name / "metrics.jsonl").read_text().splitlines()
            half = next(number for number, row in enumerate(rows) if '"epoch"' in row.split(",")[0]) + 1
            (runs / name / "metrics.jsonl").write_text("\n".join(rows[:half]) + "\n")
            epoch = json.loads(rows[half - 1])
            checkpoints = runs / name / "checkpoints"
            for link in ("latest", "best"):
                (checkpoints / link).unlink(missing_ok=True)
                (checkpoints / link).symlink_to("step-00000006")
            shutil.rmtree(checkpoints / "step-00000012")
            state = {"running": "running", "element": "running", "requeued": "requeued"}.get(name, name)
            self._edit(name, "state.json", state=state, epoch=1, step=6, val_accuracy=epoch["val_accuracy"], reason=None)
            self._edit(name, "saved.json", step=6)
        plan = {"gpu_hours": 2.0}
        for name in ("requeued", "element"):
            self._edit(name, "plan.json", **plan)
        self._edit("failed", "state.json", reason="the loss became NaN")
        (runs / "cancelled" / "cancelled").write_text("2026-01-01T00:00:00+00:00\n")
        self._jobs("requeued", job_id="4711")
        self._jobs("element", job_id="4712_0", submission="20260101-000000-0badcafe")
        self._jobs("failed", job_id="4001")
        for name in ("requeued", "failed"):
            where = runs / name / "cluster.json"
            where.write_text(
                json.dumps(
                    {**json.loads(where.read_text()), "name": "slurm", "executor": "slurm", "gpu_request": "gres"}, indent=2
                )
            )
        rows = [
            {"time": "2026-01-01T00:00:00+00:00", "event": event, "step": 6} for event in ("preempted", "preempted", "timeout")
        ]
        (runs / "requeued" / "interruptions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        endings = runs / "requeued" / "endings"
        endings.mkdir(exist_ok=True)
        (endings / "4711.0.json").write_text(
            json.dumps({"time": rows[0]["time"], "event": "preempted", "action": "requeue", "done": True})
        )
        (runs / "requeued" / "waits.json").write_text(json.dumps({"job": "4711", "reason": "another job of this run"}))
        (runs / "failed" / "failures.jsonl").write_text(
            json.dumps({"time": rows[0]["time"], "step": 6, "rank": 0, "reason": "NaN"}) + "\n"
        )
        links = runs / ".arrays" / "20260101-000000-0badcafe"
        links.mkdir(parents=True, mode=0o700)
        (links / "0").symlink_to("../../element")
        self._controller()

    def _controller(self) -> None:
        """The identity of a process that lives as the controller of one run."""
        who = next((self.runs / "running" / "submitit").glob("*_process.json"))
        stat = Path(f"/proc/{self.sleeper.pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        who.write_text(
            json.dumps({"pid": self.sleeper.pid, "pid_started": int(stat[19]), "boot": boot, "host": socket.gethostname()})
        )

    def close(self) -> None:
        self.sleeper.kill()
        self.sleeper.wait()
