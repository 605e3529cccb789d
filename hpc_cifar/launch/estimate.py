"""What is known before a submission: whether Slurm would take the job, when it would start, and how long the run will be."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from .. import files, owner
from ..config.cluster import Cluster
from ..config.experiment import Experiment
from ..errors import LaunchError, NoCluster, RunError
from ..plan import Plan, seconds_of
from ..records import Result, RunState
from ..runs import Run
from . import slurm
from .script import NO_CLUSTER, clean_environment, slurm_words

TEST_TIMEOUT_S = 5  # sbatch --test-only answers in milliseconds, except where thousands of jobs wait
RUNS_LOOKED_AT = 8  # the newest of the same name


@dataclass(frozen=True)
class Start:
    """Slurm's answer to ``sbatch --test-only``.

    ``start`` is its estimate for a job submitted now (UTC, ISO 8601); ``note`` says why there is none.
    """

    start: str | None = None
    nodes: str | None = None
    partition: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Length:
    """How long the whole run will probably be: ``jobs`` is the number of jobs of the time limit (chain links)."""

    seconds: float
    jobs: int
    gpu_hours: float
    images_per_second: float
    measured_by: str  # the run the rate is from


def start_of(text: str, cluster: Cluster, plan: Plan) -> Start:
    """Show Slurm the very script without submitting it.

    Raises:
        LaunchError: Slurm would refuse the job, or take it and never start it; its own words in one line.
        NoCluster: there is nobody to refuse it.
    """
    with clean_environment(text):
        reply = slurm.ask(["sbatch", "--test-only"], text=text, timeout_s=TEST_TIMEOUT_S)
    said = f"{reply.err}\n{reply.out}"
    if reply.code != 0:
        words = slurm_words(said)
        if any(sign in said.lower() for sign in NO_CLUSTER):
            raise NoCluster(f"no Slurm cluster answers here: use --cluster local to run on this machine ({words})")
        if reply.unanswered:
            return Start(note=f"Slurm did not answer ({words})")
        if _nodes_are_away(words, cluster):  # the job may wait for them; sbatch itself refuses what is impossible
            return Start(note="some nodes are down or drained now")
        raise LaunchError(f"Slurm would refuse the job: {words}")
    answer = re.search(r"to start at (\S+)(.*)", said)
    if answer is None:
        return Start(note="Slurm gives no estimate")
    # each by itself: versions differ in what stands between ("on cluster x", and a stray "a" since 25.05)
    nodes, partition = (re.search(pattern, answer[2]) for pattern in (r" on nodes (\S+)", r" in partition (\S+)"))
    name = partition[1] if partition else None
    _check_time(name or cluster.partition, cluster, plan)
    return Start(slurm.utc_of(answer[1]), nodes[1] if nodes else None, name)


def _nodes_are_away(words: str, cluster: Cluster) -> bool:
    """``--test-only`` counts the nodes that are up, and says of the others that they do not exist."""
    if "node configuration is not available" not in words:
        return False
    where = [f"--partition={cluster.partition}"] if cluster.partition else []
    away = ["sinfo", "--noheader", "--states=down,drain,fail,maint", "--format=%D", *where]
    reply = slurm.ask(away, timeout_s=TEST_TIMEOUT_S)
    return reply.code == 0 and any(files.whole(count) for count in reply.out.split())


def _check_time(partition: str | None, cluster: Cluster, plan: Plan) -> None:
    """Many sites let every job into the queue (EnforcePartLimits=NO), where one that asks for too long waits for ever."""
    if not partition or "," in (cluster.partition or "") or cluster.qos is not None:  # a QOS may lift the limit
        return
    reply = slurm.ask(["scontrol", "--oneliner", "show", "partition", partition], timeout_s=TEST_TIMEOUT_S)
    limits = dict(re.findall(r"\b(MaxTime|QoS)=(\S+)", reply.out)) if reply.code == 0 else {}
    longest, minutes = limits.get("MaxTime", ""), math.ceil(plan.time_s / 60)
    if limits.get("QoS", "N/A") != "N/A" or not re.fullmatch(r"(\d+-)?\d+:\d\d:\d\d", longest):
        return
    if minutes * 60 > seconds_of(longest):
        raise LaunchError(
            f"Slurm would never start the job (PartitionTimeLimit): it asks for {minutes} minutes, and partition {partition} "
            f'has MaxTime={longest}; use --time {longest}, or max_time: "{longest}" in the profile'
        )


def length_of(experiment: Experiment, cluster: Cluster, plan: Plan, root: Path) -> Length | None:
    """From the rate of an earlier run of the same name, network and placement below ``root``; None without one."""
    found = _measured(experiment, plan, root)
    if found is None:
        return None
    run, rate = found
    seconds = experiment.epochs * plan.train_images / rate
    useful_s = useful_seconds(cluster, plan)
    gpus = plan.placement.nodes * plan.placement.gpus_per_node
    return Length(seconds, max(1, math.ceil(seconds / useful_s)), gpus * seconds / 3600, rate, run)


def useful_seconds(cluster: Cluster, plan: Plan) -> int:
    """Of one job: it stops to save when the signal comes, as script.parameters asks for it."""
    return plan.time_s - min(cluster.signal_delay_s, max(1, plan.time_s // 2))


def _measured(experiment: Experiment, plan: Plan, root: Path) -> tuple[str, float] | None:
    """Id and images/s of the newest run that did the same work on as many processes."""
    name = re.compile(re.escape(experiment.name) + r"(-s\d+)?(-f\d+)?-\d{8}-\d{6}-[0-9a-f]{4}")
    try:
        named = [path for path in root.iterdir() if name.fullmatch(path.name) and owner.is_own(path)]
    except OSError:
        return None
    for folder in sorted(named, key=lambda path: path.name[-20:], reverse=True)[:RUNS_LOOKED_AT]:
        run = Run(folder)
        state, before = run.state(), run.plan()
        if before is None:
            continue
        rate, now, then = _rate(state, run.result(), before), plan.placement, before.placement
        same_place = (now.nodes, now.processes_per_node, now.gpus_per_node) == (
            then.nodes, then.processes_per_node, then.gpus_per_node
        )  # fmt: skip
        if rate and same_place and before.batch_size == plan.batch_size and _same_work(run, experiment):
            return run.id, rate
    return None


def _rate(state: RunState, result: Result | None, plan: Plan) -> float | None:
    """Images/s over a whole finished run, validation and start included; else that of the last steps."""
    if result is not None and result.state == "finished" and result.epochs and result.seconds and plan.train_images:
        rate: float | None = result.epochs * plan.train_images / result.seconds
    else:
        rate = state.images_per_second
    return rate if rate and 0 < rate < float("inf") else None


def _same_work(run: Run, experiment: Experiment) -> bool:
    try:
        before = run.experiment()
    except RunError:  # of another version
        return False
    data = before.data.model_copy(update={"fold": experiment.data.fold})  # folds are of one size
    return (before.model, data) == (experiment.model, experiment.data)
