"""From an experiment to a queued or running job, with everything checked before it is queued."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import files, owner, runs
from ..config.cluster import Cluster
from ..config.experiment import Experiment
from ..config.shapes import check_fits
from ..errors import DataError, Interrupted, LaunchError, NoCluster, UsageError
from ..plan import Placement, Plan, make_plan, requested_placement, seconds_of
from ..runs import Run
from ..track import tracker
from . import dependency, estimate, handover, interruptions, local, provenance, script, slurm, snapshot, submission
from .job import TrainJob

NO_SBATCH = "no sbatch on this machine: use --cluster local to run here, or --dry-run to see the script"
USUAL_TRAIN_IMAGES = 50_000


@dataclass(frozen=True)
class Submitted:
    """A job that was handed over."""

    run: Run
    job_id: str
    plan: Plan
    start: estimate.Start | None = None  # None for the local executor, which starts at once
    length: estimate.Length | None = None  # None where no rate is known


@dataclass(frozen=True)
class Preview:
    """What a submission would do."""

    plan: Plan
    script: str | None  # None for the local executor, which has none
    start: estimate.Start | None = None
    length: estimate.Length | None = None
    refusal: str | None = None  # what Slurm would say to it


def have_sbatch() -> bool:
    return shutil.which("sbatch") is not None


def checked_train_images(experiment: Experiment, data_root: Path) -> int:
    """Training images of the experiment's dataset, whose images the network was found to fit.

    Raises:
        DataError: it is not prepared, or damaged; the message names the ``prepare`` command.
        UsageError: the network does not fit its images or classes.
    """
    from ..data.store import Store

    store = Store.open(data_root, experiment.data.dataset)
    store.verify_once()
    check_fits(experiment.model, store.image_shape, len(store.classes), experiment.data.dataset)
    return len(store.train.labels)


def place(experiment: Experiment, cluster: Cluster) -> tuple[Placement, int, tuple[str, ...]]:
    """Where the processes go, the time of one job in seconds, and what was adapted.

    Raises:
        UsageError: more GPUs a node than the profile's nodes have.
    """
    resources = experiment.resources
    time_s, notes = seconds_of(resources.time), []
    if cluster.max_time is not None and time_s > seconds_of(cluster.max_time):
        time_s = seconds_of(cluster.max_time)
        notes.append(f"{cluster.name} allows jobs of {cluster.max_time}: the time limit was cut to that")
    if cluster.executor == "local":
        cpus = len(os.sched_getaffinity(0))
        placement, adapted = local.local_placement(resources, len(local.visible_gpus()), cpus)
        return placement, time_s, (*adapted, *notes)
    available = cluster.gpus_per_node_available
    placement = requested_placement(resources)
    if available == 0 and resources.gpus_per_node:
        placement = dataclasses.replace(placement, gpus_per_node=0)
        notes.append(f"{cluster.name} has no GPUs: {placement.processes_per_node} processes a node on the CPU instead")
    elif available is not None and resources.gpus_per_node > available:
        raise UsageError(
            f"resources.gpus_per_node: {resources.gpus_per_node}, but nodes of {cluster.name} have {available}; "
            f"use --gpus-per-node {available} and more --nodes"
        )
    if placement.cpus_per_process is None:
        placement = dataclasses.replace(placement, cpus_per_process=cluster.cpus_per_process)
    return placement, time_s, tuple(notes)


def plan_for(experiment: Experiment, cluster: Cluster, stored: int, notes: tuple[str, ...] = ()) -> Plan:
    """The plan of one job on this cluster."""
    placement, time_s, adapted = place(experiment, cluster)
    of_here = cluster.python is None and cluster.container is None  # what is installed here is what the job has
    lacking = [f"{words}; the run trains without" for words in tracker.lacking(experiment.tracking)] if of_here else ()
    plan = make_plan(experiment, placement, stored, (*adapted, *notes, *lacking))
    if time_s == plan.time_s:
        return plan
    share = time_s / plan.time_s
    return dataclasses.replace(plan, time_s=time_s, gpu_hours=plan.gpu_hours * share, core_hours=plan.core_hours * share)


def preview(
    experiment: Experiment,
    cluster: Cluster,
    *,
    root: Path,
    data_root: Path,
    after: Sequence[Run] = (),
    title: str | None = None,
) -> Preview:
    """Plan, script and Slurm's estimate without touching anything.

    A dataset that is not there yet is taken to have the usual size.
    """
    plan = preview_plan(experiment, cluster, data_root)
    length = estimate.length_of(experiment, cluster, plan, root)
    if cluster.executor == "local":
        return Preview(plan, None, length=length)
    check_time(experiment, cluster, plan, length)
    run = root / runs.new_run_id(title or experiment.name, root)
    text = script.executor(experiment, cluster, plan, run, data_root=data_root, after=job_ids(after)).script()
    if not have_sbatch():
        return Preview(plan, text, length=length)
    try:
        return Preview(plan, text, estimate.start_of(text, cluster, plan), length)
    except NoCluster:
        return Preview(plan, text, estimate.Start(note="no Slurm cluster answers here"), length)
    except LaunchError as error:
        return Preview(plan, text, length=length, refusal=str(error))


def preview_plan(experiment: Experiment, cluster: Cluster, data_root: Path) -> Plan:
    """The plan of one job, also where its dataset is not prepared yet.

    Raises:
        DataError: it is there, and damaged.
    """
    notes: tuple[str, ...] = ()
    try:
        stored = checked_train_images(experiment, data_root)
    except DataError:
        if (data_root / experiment.data.dataset).exists():
            raise
        stored = USUAL_TRAIN_IMAGES
        notes = (f"{experiment.data.dataset} is not prepared in {data_root}: counted as {stored:,} training images",)
    return plan_for(experiment, cluster, stored, notes)


def check_time(experiment: Experiment, cluster: Cluster, plan: Plan, length: estimate.Length | None) -> None:
    """Refuse a time limit in which a job would not reach its first checkpoint, where a rate was measured.

    Raises:
        UsageError: the limit, and what a checkpoint takes.
    """
    if length is None:
        return
    useful_s = estimate.useful_seconds(cluster, plan)
    every = min(
        experiment.checkpoint.every_steps or plan.total_steps, experiment.checkpoint.every_epochs * plan.steps_per_epoch
    )
    interval_s = every * plan.batch_size / length.images_per_second
    if interval_s > useful_s:
        raise UsageError(
            f"resources.time (--time): a job trains for {useful_s} of its {plan.time_s} s before it must stop, and a "
            f"checkpoint is due after {every} steps, about {interval_s:.0f} s at the {length.images_per_second:,.0f} "
            f"images/s of {length.measured_by}; give it more time, or checkpoint more often (checkpoint.every_steps)"
        )


def check_budget(plan: Plan, cluster: Cluster, max_gpu_hours: float | None) -> None:
    """Refuse jobs that may use more than the user allows: one, and those that wait behind it to continue the run.

    Raises:
        UsageError: GPUs times time limit is more than ``max_gpu_hours``.
    """
    jobs = 1 + cluster.chain_links
    if max_gpu_hours is not None and jobs * plan.gpu_hours > max_gpu_hours:
        who = f"the {jobs} jobs of this run" if jobs > 1 else "one job of this run"
        raise UsageError(
            f"--max-gpu-hours {max_gpu_hours:g}: {who} may use {jobs * plan.gpu_hours:.2f} GPU-hours "
            f"({f'{jobs} jobs x ' * (jobs > 1)}{plan.placement.nodes * plan.placement.gpus_per_node} GPUs x "
            f"{plan.time_s / 3600:.2f} h); ask for fewer GPUs or less --time, or allow more"
        )


def submit(
    experiment: Experiment,
    cluster: Cluster,
    *,
    root: Path,
    data_root: Path,
    max_gpu_hours: float | None = None,
    command: list[str] | None = None,
    after: Sequence[str] = (),
    title: str | None = None,
) -> Submitted:
    """Queue ``experiment`` on ``cluster``, or start it here.

    Args:
        root: folder of runs.
        data_root: folder of prepared datasets; jobs read it from there.
        max_gpu_hours: refuse a job that may use more.
        command: for the provenance; None means this process's own.
        after: runs that must have finished before this one starts, as the user names them.
        title: what the run is called before the time; None means by the experiment's name.

    Raises:
        UsageError: the request cannot be right (batch, budget, path, a run to start after that has failed).
        DataError: the dataset is not prepared.
        LaunchError: there is no Slurm, or it refused or would refuse; the run directory, if there is one already, says so too.
    """
    if cluster.executor == "slurm" and not have_sbatch():
        raise LaunchError(NO_SBATCH)
    owner.check_root(root)
    plan = plan_for(experiment, cluster, checked_train_images(experiment, data_root))
    check_budget(plan, cluster, max_gpu_hours)
    waits = dependency.resolve(after, root, cluster.executor)
    run_id = runs.new_run_id(title or experiment.name, root)
    expected = tested(experiment, cluster, plan, root / run_id, data_root, waits)
    length = estimate.length_of(experiment, cluster, plan, root)
    if cluster.executor == "slurm":
        check_time(experiment, cluster, plan, length)
    run = runs.create(root, run_id, experiment, plan.as_dict(), provenance.collect(command))
    return Submitted(run, start(run, cluster, plan, data_root=data_root, after=waits), plan, expected, length)


def tested(
    experiment: Experiment, cluster: Cluster, plan: Plan, run: Path, data_root: Path, after: Sequence[Run] = ()
) -> estimate.Start | None:
    """Slurm's estimate for the job of a run directory, which need not exist; None for the local executor.

    Raises:
        LaunchError: Slurm would refuse it.
    """
    if cluster.executor == "local":
        return None
    made = script.executor(experiment, cluster, plan, run, data_root=data_root, after=job_ids(after))
    return estimate.start_of(made.script(), cluster, plan)


def start(
    run: Run, cluster: Cluster, plan: Plan, *, data_root: Path, after: Sequence[Run] = (), waiting: list[Run] | None = None
) -> str:
    """Hand a job for an existing run directory over; the job id. What fails is written into the run directory.

    Args:
        waiting: runs that are in the same hands and have no job yet; this one is taken off the list once it has.
    """
    waiting = [run] if waiting is None else waiting
    with recorded(waiting):
        make_ready(run, cluster)
        if cluster.executor == "local":
            job_id = start_local(run, cluster, plan, data_root=data_root, after=after)
            waiting.remove(run)
            return job_id
        made = script.executor(run.experiment(), cluster, plan, run.path, data_root=data_root, after=job_ids(after))
        job = TrainJob(run.path, data_root, [other.path for other in after], made.mark)
        row = job_row("slurm", plan, after, cluster=cluster.name)
        job_id = handover.submit(made, [job], [(run, row)], waiting)
        _add_links(run, cluster, plan, job, job_id)
        return job_id


def _add_links(run: Run, cluster: Cluster, plan: Plan, job: TrainJob, first: str) -> None:
    """Jobs that wait behind ``first`` and continue the run; a refusal costs only the links that are missing then."""
    previous = first
    for number in range(cluster.chain_links):
        made = script.executor(run.experiment(), cluster, plan, run.path, data_root=Path(job.data_root), follows=previous)
        row = job_row("slurm", plan, cluster=cluster.name, follows=previous)
        try:
            link = handover.submit(made, [job.of(made.mark)], [(run, row)])
        except Interrupted:
            print(f"hpc-cifar: {run.id} is queued as job {first}", file=sys.stderr)
            raise
        except LaunchError as error:  # the run itself is queued
            words = f"{run.id}: job {first} is queued, but only {number} of the {cluster.chain_links} jobs that continue it"
            print(f"hpc-cifar: warning: {words}: {error}", file=sys.stderr)
            return
        previous = link


@contextlib.contextmanager
def recorded(waiting: Sequence[Run]) -> Iterator[None]:
    """What goes wrong within the block is written into the run directories that are in ``waiting`` by then.

    So do stop signals, for which the block ends with an error.
    """
    try:
        with handover.handled(handover.raise_interrupted):
            yield
    except BaseException as error:
        reason = handover.told(error)
        words = reason.splitlines()[0] if reason else "not submitted"
        for run in waiting:
            with contextlib.suppress(OSError):
                run.update_state(state="failed", reason=words)
        if isinstance(error, OSError):
            raise LaunchError(f"{waiting[0].path if waiting else ''}: cannot be written: {error}") from None
        raise


def make_ready(run: Run, cluster: Cluster, code: Path | None = None) -> None:
    """All a run directory needs before its job is queued; ``code`` is a snapshot that it may share."""
    files.write_json(run.path / "cluster.json", cluster.model_dump(mode="json"), durable=code is None)
    snapshot.take(run.code) if code is None else snapshot.share(run.code, code)
    owner.make(run.submitit, owner.PRIVATE)
    shutil.copyfile(script.GUARD, run.submitit / script.GUARD.name)
    interruptions.begin_anew(run)
    run.update_state(state="pending", reason=None)


def job_ids(after: Sequence[Run]) -> list[str]:
    """The last job of each run, as Slurm numbers them.

    Raises:
        LaunchError: a run's record holds something else.
    """
    return slurm.checked_ids(run.last_job().job_id for run in after)


def start_local(
    run: Run,
    cluster: Cluster,
    plan: Plan,
    *,
    data_root: Path,
    after: Sequence[Run] = (),
    predecessor: Path | None = None,
    lane: int = 0,
) -> str:
    """Start a job's controller on this machine; the job id.

    Args:
        after: runs that must have finished before its ranks start.
        predecessor: the process file of a job that must have ended before its ranks start, however it ended.
        lane: which of the jobs that run at once this is; each takes GPUs of its own as long as there are some.
    """
    job_id = local.new_job_id()
    gpus, each = local.visible_gpus(), plan.placement.gpus_per_node
    first = lane % (len(gpus) // each) * each if each else 0
    executor = local.LocalExecutor(
        run.submitit,
        job_id=job_id,
        code=run.code,
        gpus=gpus[first : first + each],
        environment=cluster.variables(),
        predecessor=predecessor,
        after=[other.path for other in after],
    )
    executor.update_parameters(
        timeout_min=plan.time_s / 60,
        tasks_per_node=plan.placement.processes_per_node,
        cpus_per_task=plan.placement.cpus_per_process or 1,
        signal_delay_s=cluster.signal_delay_s,
    )
    row = job_row("local", plan, after, host=os.uname().nodename)
    submission.settle(run, None, job_id, row, submission.replaced(run))
    executor.submit(TrainJob(run.path, data_root, [other.path for other in after]))
    return job_id


def job_row(executor: str, plan: Plan, after: Sequence[Run] = (), **more: Any) -> dict[str, Any]:
    """A submission in a run's list, without the job id."""
    gpus = plan.placement.nodes * plan.placement.gpus_per_node
    if executor == "slurm" and (name := slurm.configuration().get("ClusterName")):
        more["slurm_cluster"] = name  # several clusters may share one folder of runs, and number their jobs alike
    waits = {"after": [other.id for other in after]} if after else {}
    return {"executor": executor, "tasks": plan.placement.world_size, "gpus": gpus, **waits, **more}
