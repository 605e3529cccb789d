"""Every error that hpc-cifar raises on purpose.

    HpcCifarError               base: one clear line for the user
    ├── UsageError       (2)    the input is wrong: job file, option, archive, name
    │   └── ConfigError  (2)    one or more fields of a file, each with file:line
    ├── DataError        (2)    a dataset is missing, damaged or not what it says
    ├── RunError         (1)    a run cannot be started, found or continued
    │   ├── RunBusy             another process trains it
    │   ├── LockHeld            an earlier segment of the same job still has its lock
    │   ├── LostRank            another process of the job has ended; a restart fixes that
    │   ├── PreflightError      the nodes of its job cannot train, twice in a row
    │   ├── CheckpointError     no usable checkpoint, or one that does not fit
    │   │   └── DamagedCheckpoint   its files are not what was written
    │   ├── NonFiniteLoss       the loss became NaN or infinite
    │   ├── OutOfMemory         a rank's memory is full
    │   └── TrackingError       a tracker has not got everything of a run
    └── LaunchError      (1)    the scheduler or the local executor refused
        ├── NoCluster           Slurm's programs are there, but no cluster answers
        └── NoAnswer            Slurm did not answer; it may have the job all the same

The number is the process exit code. A message names the file, the field, the value, and what would be right.
"""

from __future__ import annotations

from collections.abc import Sequence


class HpcCifarError(Exception):
    """Base of all expected errors; ``str(error)`` is what the user sees, without a traceback."""

    exit_code = 1


class UsageError(HpcCifarError):
    """The user's input is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """All problems of one or more files at once.

    Args:
        problems: lines of the form ``file:line: field: what is wrong, what would be right``.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class DataError(HpcCifarError):
    """A dataset or archive is missing, damaged or not what it claims to be."""

    exit_code = 2


class RunError(HpcCifarError):
    """A run cannot be started, found or continued."""


class RunBusy(RunError):
    """Another process trains the run; its records must not be touched."""


class LockHeld(RunError):
    """The lock of the run is still that of an earlier segment of this job, which has died; a restart may find it free."""


class PreflightError(RunError):
    """The checks before training failed, and the job may not or cannot go elsewhere."""


class LostRank(RunError):
    """A collective failed since another rank is gone."""


class CheckpointError(RunError):
    """No checkpoint can be used, or one does not fit this run."""


class DamagedCheckpoint(CheckpointError):
    """The files of a checkpoint are not what was written; an older one may be good."""


class NonFiniteLoss(RunError):
    """The training loss became NaN or infinite, at update number ``step`` (from 1)."""

    step: int = 0


class OutOfMemory(RunError):
    """A rank's memory is full; the message has its batch and its memory."""


class TrackingError(RunError):
    """W&B does not answer, or has not got everything of a run; the run directory has."""


class LaunchError(HpcCifarError):
    """The scheduler or the local executor refused a request."""


class NoCluster(LaunchError):
    """Slurm's programs are on this machine, but no cluster answers them."""


class NoAnswer(LaunchError):
    """Slurm did not answer a submission, again and again; it may have the job all the same."""


class Interrupted(BaseException):
    """A stop signal came while something was submitted; ``str(error)`` says what became of the job, if there was one."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an exception's text that says something, shortened; its type if it has none.

    A line that only announces the next ones, and ends in a colon, has the one after it added.
    """
    first, *others = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    while first.endswith(":") and others:
        first += f" {others.pop(0)}"
    return first[:limit]
