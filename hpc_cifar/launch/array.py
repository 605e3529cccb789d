"""One Slurm job array, each of whose elements is a run of its own.

runs/.arrays/<array>/           0700; what the queue holds on to; a resume does without it
  0  1  2 ...                   links to the elements' run directories
  <job id>_submission.sh        the script that all elements share; .submission_file_<array>.sh before the job id is known

submitit keeps the pickles and logs of an array in one folder. Here each element's lie in its own run directory: the folder
that submitit and Slurm are given has ``%a`` in it, the number of the element, and so leads through the link of that number.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import files, owner
from ..config.cluster import Cluster
from ..config.expand import Element
from ..config.experiment import Experiment
from ..plan import Plan
from ..runs import Run
from . import handover, script, slurm, submission, submit
from .job import TrainJob

LARGEST_ARRAY = 1000  # submitit's pickles and links of more would be slow to write
LINKS = ".arrays"


@dataclass(frozen=True)
class Planned:
    """One element with what it asks for."""

    element: Element
    plan: Plan

    @property
    def experiment(self) -> Experiment:
        return self.element.experiment


def largest() -> int:
    """Elements of the largest array that this cluster takes: below its MaxArraySize, which is 1001 where nobody set it."""
    size = files.whole(slurm.configuration().get("MaxArraySize", ""))
    return LARGEST_ARRAY if size is None else min(LARGEST_ARRAY, max(1, size))


def executor(
    group: Sequence[Planned], cluster: Cluster, links: Path, data_root: Path, limit: int | None, after: Sequence[Run]
) -> script.SlurmExecutor:
    """The executor that submits this group; ``links`` is the folder with a link to each element's run directory."""
    script.check_path(links, "run directory")
    element = links / "%a"
    first = group[0]
    job_ids, folders = submit.job_ids(after), [links.parent.parent, data_root]  # links lead out of their own folder
    plain = script.executor(first.experiment, cluster, first.plan, links / "0", after=job_ids, folders=folders)
    made = script.SlurmExecutor(element / "submitit", max_num_timeout=plain.max_num_timeout, python=plain.python)
    made.mark = links.name
    made.restarts_allowed = plain.restarts_allowed
    parameters = script.parameters(
        first.experiment, cluster, first.plan, element, folders=folders, after=job_ids, mark=made.mark
    )
    # Slurm and submitit put the number in for %a; the script itself has to ask the shell
    code, of_element = shlex.quote(f"{element}/code"), f'{shlex.quote(str(links))}/"$SLURM_ARRAY_TASK_ID"/code'
    parameters["setup"] = [line.replace(code, of_element) for line in parameters["setup"]]
    names = {one.experiment.name for one in group}
    parameters["job_name"] = names.pop() if len(names) == 1 else "hpc-cifar"
    parameters["comment"] = f"hpc-cifar array {links.name}"
    parameters["array_parallelism"] = limit or len(group)
    made.update_parameters(**parameters)
    made.parameters["map_count"] = len(group)
    return made


def new_links(root: Path) -> Path:
    """A name for the folder of an array's links."""
    return owner.part(root, LINKS) / submission.new_mark()


def start(
    group: Sequence[Planned],
    members: Sequence[Run],
    cluster: Cluster,
    root: Path,
    data_root: Path,
    limit: int | None,
    waits: Sequence[Run],
    waiting: list[Run],
) -> list[str]:
    """Submit complete run directories as one array; the job ids of its elements.

    Args:
        limit: how many may run at once, None for all.
        waits: runs that must have finished before.
        waiting: the members are taken off this list once their jobs are known.

    Raises:
        LaunchError: Slurm refused, or did not answer.
    """
    links = new_links(root)
    owner.make_part(links.parent)
    links.mkdir(mode=owner.PRIVATE)
    for index, run in enumerate(members):
        (links / str(index)).symlink_to(Path("..") / ".." / run.id)
    made = executor(group, cluster, links, data_root, limit, waits)
    jobs = [TrainJob(run.path, data_root, [other.path for other in waits], made.mark) for run in members]
    rows = [submit.job_row("slurm", one.plan, waits, cluster=cluster.name) for one in group]
    array = handover.submit(made, jobs, list(zip(members, rows, strict=True)), waiting)
    return [f"{array}_{index}" for index in range(len(members))]
