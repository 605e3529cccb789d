"""``hpc-cifar doctor``: whether this machine, or a compute node of a profile, can do what jobs need, and what fixes it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import files, owner
from ..config.cluster import Cluster
from ..config.experiment import Experiment
from ..errors import HpcCifarError, LaunchError
from ..findings import Finding, ok, problem, warning
from . import discover, estimate, first_words, handover, local, machine, script, slurm, snapshot, submit

REINSTALL = {
    "torch": "pip install --force-reinstall torch torchvision",
    "FFCV": "pip install --force-reinstall dist/ffcv-*.whl, which `make ffcv-wheel` makes: docs/install.md",
    "DALI": "pip install --force-reinstall 'hpc-cifar[dali]'",
    "W&B": "pip install --force-reinstall wandb",
    "TensorBoard": "pip install --force-reinstall 'hpc-cifar[tensorboard]'",
}
"""What is looked at in processes of their own; no job can do without the first."""
LIBRARY_S = 120.0  # torch on a cold file system takes its time
NODE_S = 60.0  # after its job has ended, for its answer to be seen here
KILLED_S = 5.0
POLL_S, ASK_S = 0.5, 3.0
LEAVES_S = 30.0  # for a job that has answered to write its result
ANSWER = "findings.json"


@dataclass(frozen=True)
class Machine:
    """What was found on one host."""

    host: str
    findings: tuple[Finding, ...]


def here(data_root: Path, runs_root: Path, cluster: Cluster, gpus: int | None = None) -> Machine:
    """Look at this machine.

    Args:
        gpus: how many the job has that looks; None on a login node or a desk.
    """
    asked = [(name, _start(name, gpus)) for name in REINSTALL]
    try:
        found = list(machine.findings(data_root, runs_root, cluster, trains=gpus is not None or cluster.executor == "local"))
        deadline = time.monotonic() + LIBRARY_S
        for name, child in asked:
            found += _answer(name, child, deadline)
    finally:
        for _, child in asked:
            child.kill()
    if cluster.executor == "slurm":
        found += [requeue(cluster)] if gpus is not None else slurm_findings(cluster)
    return Machine(os.uname().nodename, tuple(found))


def _start(name: str, gpus: int | None) -> subprocess.Popen[str]:
    """Look at a library in a process of its own: it may crash, hang, or print."""
    command = [sys.executable, "-m", "hpc_cifar.train.libraries", name, "" if gpus is None else str(gpus)]
    environment = os.environ | local.code_environment(snapshot.PACKAGE.parent)
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def _answer(name: str, child: subprocess.Popen[str], deadline: float) -> list[Finding]:
    bad, fix = (problem if name == "torch" else warning), REINSTALL[name]
    try:
        out, err = child.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that waits for a driver cannot be killed
            child.communicate(timeout=KILLED_S)
        return [bad(name, f"did not answer within {LIBRARY_S:.0f} s", fix)]
    try:
        return [Finding(**row) for row in json.loads(out.strip().splitlines()[-1])]
    except (ValueError, IndexError, TypeError):
        said = (err.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        if child.returncode < 0:
            said = f"it ended by {signal.Signals(-child.returncode).name}"
        return [bad(name, f"cannot be used: {said[:300]}", fix)]


# ---- Slurm ---------------------------------------------------------------------------------------------------------------


def slurm_findings(cluster: Cluster) -> Iterator[Finding]:
    """Whether Slurm answers, whether it has what the profile names, and what it does to jobs that it preempts."""
    if shutil.which("sbatch") is None:
        fix = "submit on a login node; on this machine: --cluster local"
        yield warning("Slurm", "no sbatch on this machine", fix)
        return
    try:
        site = discover.site()
    except LaunchError as error:
        yield problem("Slurm", str(error), "sinfo; ask the site whether its Slurm is up")
        return
    names = [one.name for one in site.partitions]
    version = site.config.get("SLURM_VERSION", "of unknown version")
    yield ok("Slurm", f"{version}, cluster {site.name}, partitions {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}")
    wanted = [name for name in (cluster.partition or "").split(",") if name]
    if missing := [name for name in wanted if name not in names]:
        yield problem("profile", f"{cluster.name} names the partition {missing[0]!r}, which is not there", "hpc-cifar init")
    yield requeue(cluster)
    if site.accounting:
        yield ok("accounting", f"{site.accounting}: jobs are looked up with squeue and scontrol")
    else:
        yield ok("accounting", f"account {site.default_account or '(none)'} of {site.user}")


def requeue(cluster: Cluster) -> Finding:
    """Whether a job that is preempted, or out of time, goes on by itself; what matters is whether its node has scontrol."""
    name, links = "requeue", "chain_links: 5 in the profile: jobs that wait behind the first one and continue the run"
    if cluster.chain_links:
        return ok(name, f"{cluster.chain_links} jobs wait behind each run to continue it (chain_links)")
    if not cluster.requeue:
        return warning(name, "the profile has requeue: false: a job that is out of time stops there", links)
    if shutil.which("scontrol") is None:
        return warning(name, "no scontrol here: a job that is out of time stops there", links)
    return ok(name, f"by scontrol; preemption here: {slurm.configuration().get('PreemptMode', 'not known')}")


# ---- a compute node --------------------------------------------------------------------------------------------------------


class Look:
    """The picklable job: what :func:`here` finds on the node, as a file.

    Args:
        folder: of the job, on the shared file system.
        cluster: the profile as JSON, so that the pickle names few modules.
    """

    def __init__(self, folder: Path, data_root: Path, runs_root: Path, cluster: str, gpus: int) -> None:
        self.folder, self.data_root, self.runs_root = str(folder), str(data_root), str(runs_root)
        self.cluster, self.gpus = cluster, gpus

    def __call__(self) -> None:
        found = here(Path(self.data_root), Path(self.runs_root), Cluster.model_validate_json(self.cluster), self.gpus)
        rows = [one.as_dict() for one in found.findings]
        files.write_json(Path(self.folder) / ANSWER, {"host": found.host, "findings": rows})


def on_node(cluster: Cluster, data_root: Path, runs_root: Path, say: Callable[[str], None]) -> Machine:
    """Look at a compute node of ``cluster``, by a job that is submitted as every job is.

    Args:
        say: prints one line: where the job is.

    Raises:
        LaunchError: Slurm refused the job, or it ended without an answer; its folder is kept then.
    """
    gpus = _gpus_of(cluster)
    folder = owner.part(runs_root, ".doctor") / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    experiment = Experiment.model_validate(
        {
            "name": "hpc-cifar-doctor",
            "epochs": 1,
            "model": {"family": "sequential", "layers": ["flatten", {"dense": {"units": 10}}]},
            "data": {"dataset": "digits", "batch_size": 1},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "resources": {"nodes": 1, "gpus_per_node": gpus, "time": "00:10:00"} | ({} if gpus else {"processes_per_node": 1}),
        }
    )
    once = cluster.model_copy(update={"requeue": False, "chain_links": 0})
    plan = submit.plan_for(experiment, once, 1)
    # a container refuses folders that are not there
    made = script.executor(experiment, once, plan, folder, folders=[runs_root, *([data_root] if data_root.is_dir() else [])])
    estimate.start_of(made.script(), once, plan)  # what Slurm refuses is refused before anything is created
    try:
        owner.make_part(folder.parent)
        folder.mkdir(mode=owner.PRIVATE)
    except OSError as error:
        raise LaunchError(f"{folder}: cannot be written: {error.strerror or error}") from None
    try:
        return _asked(made, folder, Look(folder, data_root, runs_root, cluster.model_dump_json(), gpus), cluster.name, say)
    except LaunchError:
        raise  # the folder has the job's words
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _asked(made: script.SlurmExecutor, folder: Path, look: Look, name: str, say: Callable[[str], None]) -> Machine:
    """Submit the job, and wait for its answer."""
    snapshot.take(folder / "code")
    owner.make(folder / "submitit", owner.PRIVATE)
    shutil.copyfile(script.GUARD, folder / "submitit" / script.GUARD.name)
    job_id = handover.submit(made, [look])
    say(f"job {job_id} looks at a node of {name}; Ctrl-C gives it up")
    try:
        answer = _wait(folder, job_id, say)
    except BaseException:
        with contextlib.suppress(HpcCifarError):
            slurm.cancel([job_id])
        raise
    until = time.monotonic() + LEAVES_S
    while time.monotonic() < until and (job := slurm.query([job_id]).jobs.get(job_id)) is not None and job.alive:
        time.sleep(POLL_S)
    shutil.rmtree(folder, ignore_errors=True)
    return Machine(answer["host"], tuple(Finding(**row) for row in answer["findings"]))


def _gpus_of(cluster: Cluster) -> int:
    """One, where the profile's nodes have some."""
    if cluster.gpu_request == "none":
        return 0
    if cluster.gpus_per_node_available is not None:
        return min(1, cluster.gpus_per_node_available)
    partitions = [one for one in discover.site().partitions if one.name in (cluster.partition or one.name).split(",")]
    wanted = partitions[:1] if cluster.partition is None else partitions
    return min((min(1, one.biggest.gpu_count) for one in wanted if one.biggest), default=0)


def _wait(folder: Path, job_id: str, say: Callable[[str], None]) -> dict[str, Any]:
    """The job's answer, however long it waits in the queue."""
    told, asked, gone = "", 0.0, 0.0
    while not isinstance(answer := files.read_json(folder / ANSWER), dict):
        time.sleep(POLL_S)
        if time.monotonic() - asked < ASK_S:
            continue
        asked = time.monotonic()
        seen = slurm.query([job_id])
        job = seen.jobs.get(job_id)
        if job is not None and job.alive:
            gone = 0.0
            words = f"job {job_id} is {job.state.lower()}" + (f" ({job.reason})" if job.waiting and job.reason else "")
            if words != told:
                say(words)
            told = words
        elif seen.reachable:
            gone = gone or asked
            if asked - gone > (NODE_S if job is None or job.state == "COMPLETED" else ASK_S):
                raise LaunchError(f"job {job_id} ended without an answer{_words(folder, job_id)}; its files are in {folder}")
    return answer


def _words(folder: Path, job_id: str) -> str:
    words = first_words.of_job(folder / "submitit", job_id)
    return f": {words.text}" if words else ""
