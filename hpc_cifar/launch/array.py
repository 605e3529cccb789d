"""One Slurm job array, each of whose elements is a run of its own.

runs/.arrays/<array>/           0700; what the queue holds on to; a resume does without it
  0  1  2 ...                   links to the elements' run directories
  <job id>_submission.sh        the script that all elements share

submitit keeps the pickles and logs of an array in one folder. Here each element's lie in its own run directory: the folder
that submitit and Slurm are given has ``%a`` in it, the number of the element, and so leads through the link of that number.
"""

from __future__ import annotations

import secrets
import shlex
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from submitit.core.utils import CommandFunction, DelayedSubmission

from .. import files
from ..config.cluster import Cluster
from ..config.expand import Element
from ..config.experiment import Experiment
from ..plan import Plan
from ..runs import Run
from . import script, slurm, submit
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
    size = slurm.configuration().get("MaxArraySize", "")
    return min(LARGEST_ARRAY, max(1, int(size))) if size.isdigit() else LARGEST_ARRAY


class ArrayExecutor(script.SlurmExecutor):
    """submitit's executor for an array whose elements have a folder each, which its own one refuses after it has submitted."""

    def submit_elements(self, jobs: Sequence[TrainJob]) -> str:
        """One sbatch call; the number of the array. The pickles of its elements are in place when it returns.

        An element that starts before that waits for its pickle.
        """
        links = self.folder.parent.parent
        pickles = []
        for index, job in enumerate(jobs):
            delayed = DelayedSubmission(job)
            delayed.set_timeout(self.parameters["time"], self.max_num_timeout)
            pickles.append(links / str(index) / "submitit" / f".{secrets.token_hex(8)}.pkl")
            delayed.dump(pickles[-1])
        text = self.script()
        submission = links / "submission.sh"
        files.write_text(submission, text, durable=False)
        printed = CommandFunction(self._make_submission_command(submission), verbose=False)()
        array: str = self._get_job_id_from_submission_command(printed)
        try:
            for index, pickle in enumerate(pickles):
                pickle.rename(pickle.with_name(f"{array}_{index}_submitted.pkl"))
                files.write_text(pickle.with_name(f"{array}_{index}_submission.sh"), text, durable=False)
            submission.rename(submission.with_name(f"{array}_submission.sh"))
        except BaseException:
            slurm.cancel([array])
            raise
        return array


def executor(
    group: Sequence[Planned], cluster: Cluster, links: Path, data_root: Path, limit: int | None, after: Sequence[Run]
) -> ArrayExecutor:
    """The executor that submits this group; ``links`` is the folder with a link to each element's run directory."""
    script.check_path(links, "run directory")
    element = links / "%a"
    first = group[0]
    job_ids, folders = submit.job_ids(after), [links.parent.parent, data_root]  # links lead out of their own folder
    plain = script.executor(first.experiment, cluster, first.plan, links / "0", after=job_ids, folders=folders)
    made = ArrayExecutor(element / "submitit", max_num_timeout=plain.max_num_timeout, python=plain.python)
    parameters = script.parameters(first.experiment, cluster, first.plan, element, folders=folders, after=job_ids)
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
    return root / LINKS / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def start(
    group: Sequence[Planned],
    members: Sequence[Run],
    cluster: Cluster,
    root: Path,
    data_root: Path,
    limit: int | None,
    waits: Sequence[Run],
) -> list[str]:
    """Submit complete run directories as one array; the job ids of its elements.

    Args:
        limit: how many may run at once, None for all.
        waits: runs that must have finished before.

    Raises:
        LaunchError: Slurm refused.
    """
    links = new_links(root)
    links.mkdir(parents=True, mode=0o700)
    for index, run in enumerate(members):
        (links / str(index)).symlink_to(Path("..") / ".." / run.id)
    jobs = [TrainJob(run.path, data_root, [other.path for other in waits]) for run in members]
    made = executor(group, cluster, links, data_root, limit, waits)
    with script.refusals(made.script()):
        array = made.submit_elements(jobs)
    ids = [f"{array}_{index}" for index in range(len(members))]

    def record(run: Run, job_id: str, one: Planned) -> None:
        submit.record_job(run, "slurm", job_id, one.plan, waits, cluster=cluster.name)

    try:
        with ThreadPoolExecutor(16) as pool:  # each is one fsync
            list(pool.map(record, members, ids, group))
    except BaseException:
        slurm.cancel([array])  # nobody would find its elements again
        raise
    return ids
