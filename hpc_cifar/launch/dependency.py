"""``--after RUN``: start only when other runs have finished well."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import owner, runs
from ..errors import RunError, UsageError
from ..runs import Run


def resolve(tokens: Sequence[str], root: Path, executor: str) -> list[Run]:
    """The runs meant by ``--after`` that have not finished yet.

    Args:
        tokens: each a run id, prefix, path, job id or the number of a whole array.
        executor: ``slurm`` or ``local``, what the new run is submitted to.

    Raises:
        UsageError: there is no such run, one of them has ended without finishing, or it is not where the new run goes.
    """
    from .status import statuses

    wanted = runs.find_all(tokens, root, option="")
    waiting = []
    for run in wanted:
        if not owner.is_own(run.path):
            whose = owner.name_of(owner.of(run.path))
            raise UsageError(f"--after {run.id}: it is a run of {whose}; wait for it first: hpc-cifar wait {run.path}")
    for run, seen in zip(wanted, statuses(wanted), strict=True):
        if seen.state == "finished":
            continue
        if seen.ended:
            reason = f" ({seen.reason})" if seen.reason else ""
            raise UsageError(f"--after {run.id}: it is {seen.state}{reason}; resume it first: hpc-cifar resume {run.id}")
        if not run.jobs():
            raise UsageError(
                f"--after {run.id}: it has no job yet ({seen.reason or seen.state}); see hpc-cifar status {run.id}"
            )
        where = run.last_job().executor
        if (where == "slurm") != (executor == "slurm"):
            place = "on Slurm" if where == "slurm" else "on this machine without Slurm"
            raise UsageError(
                f"--after {run.id}: it runs {place} and the new run would not; wait for it first: hpc-cifar wait {run.id}"
            )
        waiting.append(run)
    return waiting


def check_finished(after: Sequence[str]) -> None:
    """What a job asks before it trains: Slurm's afterok is satisfied by exit code 0, and by a job that it has forgotten.

    Args:
        after: run directories.

    Raises:
        RunError: one of them has not finished.
    """
    for run in map(Run, map(Path, after)):
        if not run.finished():
            state = run.state().state or "gone"
            raise RunError(
                f"{run.id}, after which this run was to start, has not finished: it is {state}; resume that one, then this one"
            )
