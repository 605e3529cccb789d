"""Many experiments at once: one Slurm job array for each distinct request, or one local job after another."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import files, owner, runs
from ..config.cluster import Cluster
from ..config.expand import Element
from ..errors import LaunchError, NoCluster, UsageError
from ..runs import Run
from . import array, dependency, estimate, local, provenance, script, submit, sweep
from .array import Planned
from .estimate import Length, Start
from .submit import Submitted

EACH_ITS_OWN = ("job_name", "comment", "setup")  # parameters that differ between runs with the same request


def plan_all(elements: Sequence[Element], cluster: Cluster, data_root: Path, *, prepared: bool = True) -> list[Planned]:
    """The plan of every element; each dataset is opened once.

    Args:
        prepared: whether the datasets must be there.

    Raises:
        UsageError: a request cannot be right; the message of the first.
        DataError: a dataset is not prepared.
    """
    stored: dict[tuple[str, int], int] = {}
    made = []
    for element in elements:
        experiment = element.experiment
        if not prepared:
            made.append(Planned(element, submit.preview_plan(experiment, cluster, data_root)))
            continue
        key = (experiment.data.dataset, id(experiment.model))  # elements of one file share their model
        if key not in stored:
            stored[key] = submit.checked_train_images(experiment, data_root)
        made.append(Planned(element, submit.plan_for(experiment, cluster, stored[key])))
    return made


def groups_of(planned: Sequence[Planned], cluster: Cluster) -> list[list[Planned]]:
    """Elements with the same request together, in the order they came in; no group is larger than an array may be."""
    if cluster.chain_links:  # each element has follow-up jobs of its own
        return [[one] for one in planned]
    groups: dict[str, list[Planned]] = {}
    for one in planned:
        asked = script.parameters(one.experiment, cluster, one.plan, Path("/run"), folders=[])
        request = json.dumps({name: value for name, value in asked.items() if name not in EACH_ITS_OWN}, sort_keys=True)
        request += f" {one.experiment.resources.fault_restarts}"  # stands in the script
        groups.setdefault(request, []).append(one)
    return [
        group[first : first + array.largest()] for group in groups.values() for first in range(0, len(group), array.largest())
    ]


def check_budget(planned: Sequence[Planned], cluster: Cluster, max_gpu_hours: float | None) -> None:
    """Refuse elements that may together use more than the user allows.

    Raises:
        UsageError: the GPU-hours of one job of each element add up to more than ``max_gpu_hours``.
    """
    jobs = 1 + cluster.chain_links
    total = jobs * sum(one.plan.gpu_hours for one in planned)
    if len(planned) == 1:
        submit.check_budget(planned[0].plan, cluster, max_gpu_hours)
    elif max_gpu_hours is not None and total > max_gpu_hours:
        each = f"{jobs} jobs" if jobs > 1 else "one job"
        raise UsageError(
            f"--max-gpu-hours {max_gpu_hours:g}: {each} of each of these {len(planned)} runs may use {total:.2f} GPU-hours "
            "in all; ask for fewer runs, fewer GPUs or less --time, or allow more"
        )


# ---- what would be submitted ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArrayPreview:
    """What a submission would do with elements of the same request; ``script`` is None on this machine.

    ``start`` and ``length`` are those of the first element, ``refusal`` is what Slurm would say.
    """

    group: list[Planned]
    script: str | None
    start: Start | None = None
    length: Length | None = None
    refusal: str | None = None


def preview(
    elements: Sequence[Element], cluster: Cluster, *, root: Path, data_root: Path, limit: int | None, after: Sequence[str]
) -> list[ArrayPreview]:
    """Plans and scripts without touching anything."""
    planned = plan_all(elements, cluster, data_root, prepared=False)
    waits = dependency.resolve(after, root, cluster.executor) if after else []
    if cluster.executor == "local":
        return [ArrayPreview(planned, None)]
    shown = []
    for group in groups_of(planned, cluster):
        text = _script(group, cluster, root, data_root, limit, waits)
        length = _length(group, cluster, root)
        if not submit.have_sbatch():
            shown.append(ArrayPreview(group, text, length=length))
            continue
        try:
            shown.append(ArrayPreview(group, text, estimate.start_of(text, cluster, group[0].plan), length))
        except NoCluster:
            shown.append(ArrayPreview(group, text, Start(note="no Slurm cluster answers here"), length))
        except LaunchError as error:
            shown.append(ArrayPreview(group, text, length=length, refusal=str(error)))
    return shown


def _script(
    group: Sequence[Planned], cluster: Cluster, root: Path, data_root: Path, limit: int | None, waits: Sequence[Run]
) -> str:
    """What sbatch would get."""
    if len(group) > 1:
        return array.executor(group, cluster, array.new_links(root), data_root, limit, waits).script()
    run = root / runs.new_run_id(group[0].element.title, root)
    one = group[0]
    return script.executor(one.experiment, cluster, one.plan, run, data_root=data_root, after=submit.job_ids(waits)).script()


def _length(group: Sequence[Planned], cluster: Cluster, root: Path) -> Length | None:
    """Of the first element; every kind of element is checked.

    Raises:
        UsageError: one of them would not reach its first checkpoint in the time limit.
    """
    kinds = {id(one.experiment.model): one for one in reversed(group)}  # elements of one file share their model
    lengths = {key: estimate.length_of(one.experiment, cluster, one.plan, root) for key, one in kinds.items()}
    for key, one in kinds.items():
        submit.check_time(one.experiment, cluster, one.plan, lengths[key])
    return lengths[id(group[0].experiment.model)]


# ---- submit --------------------------------------------------------------------------------------------------------------


def submit_all(
    elements: Sequence[Element],
    cluster: Cluster,
    *,
    root: Path,
    data_root: Path,
    max_gpu_hours: float | None = None,
    limit: int | None = None,
    after: Sequence[str] = (),
    command: list[str] | None = None,
) -> Iterator[list[Submitted]]:
    """Queue every element, or start them here; yields those of one array as soon as it is handed over.

    Everything is checked, and every run directory is complete, before the first one is queued.

    Args:
        limit: how many elements of an array may run at once. None means all of them on Slurm, one on this machine.
        after: runs that must have finished before any of these starts, as the user names them.

    Raises:
        UsageError: a request cannot be right, or all together may use more than ``max_gpu_hours``.
        DataError: a dataset is not prepared.
        LaunchError: Slurm is not there or refused; the run directories that are not queued say so too.
    """
    if cluster.executor == "slurm" and not submit.have_sbatch():
        raise LaunchError(submit.NO_SBATCH)
    owner.check_root(root)
    planned = plan_all(elements, cluster, data_root)
    check_budget(planned, cluster, max_gpu_hours)
    waits = dependency.resolve(after, root, cluster.executor) if after else []
    expected: dict[int, tuple[Start, Length | None]] = {}
    if cluster.executor == "slurm":
        script.check_path(root, "folder of runs")
        for group in groups_of(planned, cluster):  # what Slurm would refuse is refused before anything is created
            length = _length(group, cluster, root)
            start = estimate.start_of(_script(group, cluster, root, data_root, limit, waits), cluster, group[0].plan)
            expected |= {id(one): (start, length) for one in group}
    made = _create(planned, root, command)
    waiting = list(made.values())
    with submit.recorded(waiting):
        for run in made.values():
            submit.make_ready(run, cluster, None if run is waiting[0] else waiting[0].code)
        if swept := [(made[id(one)], one.element) for one in planned if one.element.point]:
            sweep.begin(root, swept[0][1].experiment.tracking.group or "sweep", swept)
        files.make_durable(path for run in waiting for path in (*run.path.glob("*.json"), run.experiment_file, run.path))
        files.fsync_folder(root)
        if cluster.executor == "local":
            handed_over = _start_local(planned, list(made.values()), cluster, data_root, limit or 1, waits)
        else:
            handed_over = _start_slurm(planned, made, cluster, root, data_root, limit, waits, expected, waiting)
        for done in handed_over:
            for one in done:
                if one.run in waiting:
                    waiting.remove(one.run)
            yield done


def _create(planned: Sequence[Planned], root: Path, command: list[str] | None) -> dict[int, Run]:
    """A run directory for each, by the identity of what was planned: equal experiments may be there twice."""
    where = provenance.collect(command)
    made: dict[int, Run] = {}
    for one in planned:
        run_id = runs.new_run_id(one.element.title, root)
        made[id(one)] = runs.create(root, run_id, one.experiment, one.plan.as_dict(), where, durable=False)
    return made


def _start_slurm(
    planned: Sequence[Planned],
    made: dict[int, Run],
    cluster: Cluster,
    root: Path,
    data_root: Path,
    limit: int | None,
    waits: Sequence[Run],
    expected: dict[int, tuple[Start, Length | None]],
    waiting: list[Run],
) -> Iterator[list[Submitted]]:
    """An array for each distinct request; a request of one element is a plain job."""
    for group in groups_of(planned, cluster):
        members = [made[id(one)] for one in group]
        if len(group) == 1:
            ids = [submit.start(members[0], cluster, group[0].plan, data_root=data_root, after=waits, waiting=waiting)]
        else:
            ids = array.start(group, members, cluster, root, data_root, limit, waits, waiting)
        yield [
            Submitted(run, job_id, one.plan, *expected[id(one)]) for run, job_id, one in zip(members, ids, group, strict=True)
        ]


def _start_local(
    planned: Sequence[Planned],
    members: Sequence[Run],
    cluster: Cluster,
    data_root: Path,
    limit: int,
    waits: Sequence[Run],
) -> Iterator[list[Submitted]]:
    """Each with a controller of its own, which waits for that of the element ``limit`` places before it."""
    files_of: list[Path] = []
    for index, (run, one) in enumerate(zip(members, planned, strict=True)):
        before = files_of[index - limit] if index >= limit else None
        job_id = submit.start_local(
            run, cluster, one.plan, data_root=data_root, after=waits, predecessor=before, lane=index % limit
        )
        files_of.append(local.process_file(run.submitit, job_id))
        yield [Submitted(run, job_id, one.plan)]
