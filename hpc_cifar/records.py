"""The records of a run, as they are read back: frozen, each field of the type that it was written with.

A field that an older version did not write has its default, and null is the same as none; one that this version does not know
is left out. A value of another type means that the record is damaged: ``problem`` says so, and all the rest has its default.
So reading ends with no exception: whoever judges a run looks at ``problem``; whoever trains it goes on without the record.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from .reading import Damaged
from .typed import MOST as MOST
from .typed import Amount, JobId, Json, Loss, Share
from .typed import is_sound as is_sound
from .typed import load as load
from .typed import of as of
from .typed import read as read
from .typed import row_of as row_of
from .typed import rows as rows
from .typed import sound as sound

JOB_ID = re.compile(r"[0-9]{1,18}(_[0-9]{1,18})?")  # of Slurm: what scancel gets
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")  # of other jobs and of segments: part of the names of files

# ---- what rank 0 and the commands write --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunState:
    """``state.json``: how far a run is. Seconds, GPU-hours, restarts and lost steps are those of all its segments."""

    state: str = ""
    reason: str | None = None
    epoch: int | None = None
    epochs: int | None = None
    step: int | None = None
    total_steps: int | None = None
    train_loss: Loss | None = None
    val_accuracy: Share | None = None
    images_per_second: Amount | None = None
    lost_steps: int = 0
    restarts: int | None = None
    gpu_hours: Amount | None = None
    seconds: Amount | None = None
    started: str | None = None
    updated: str | None = None
    world_size: int | None = None
    device: str | None = None
    precision: str | None = None
    data: str | None = None
    host: str | None = None
    pid: int | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """``result.json``: the outcome of a run's last segment; its final one where ``state`` is ``finished``."""

    state: str = ""
    reason: str | None = None
    run: str | None = None
    data: str | None = None
    test_accuracy: Share | None = None
    test_loss: Loss | None = None
    tta_accuracy: Share | None = None
    tta_loss: Loss | None = None
    train_accuracy: Share | None = None
    train_loss: Loss | None = None
    val_accuracy: Share | None = None
    val_loss: Loss | None = None
    epochs: int | None = None
    steps: int | None = None
    restarts: int | None = None
    lost_steps: int | None = None
    gpu_hours: Amount | None = None
    seconds: Amount | None = None
    precision: str | None = None
    checkpoints: int | None = None
    checkpoint_seconds: Amount | None = None
    host_memory_mib: Amount | None = None
    device_memory_mib: Amount | None = None
    heard_after_ms: Amount | None = None
    saved_after_ms: Amount | None = None
    selected: str | None = None
    ended: str | None = None
    problem: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As it was written, without what is missing."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None and name != "problem"}


@dataclass(frozen=True, slots=True)
class Process:
    """Identity of a process: ``pid_started`` in clock ticks after the boot ``boot`` of ``host``."""

    pid: int | None = None
    pid_started: int | None = None
    boot: str | None = None
    host: str | None = None

    def __bool__(self) -> bool:
        return self.pid is not None


@dataclass(frozen=True, slots=True)
class Job:
    """A row of ``jobs.jsonl``: a submission. ``executor`` is ``slurm``, ``local`` or ``train``; "" is no job at all.

    ``follows`` is the job behind which it continues the run; ``after`` are runs that had to finish first; ``replaces`` are
    marks of submissions whose jobs must not train. A bare ``train`` has its own process in the row.
    """

    executor: str = ""
    job_id: JobId = ""
    submitted: str | None = None
    submission: str | None = None
    follows: str | None = None
    after: tuple[str, ...] = ()
    replaces: tuple[str, ...] = ()
    slurm_cluster: str | None = None
    cluster: str | None = None
    host: str | None = None
    tasks: int | None = None
    gpus: int | None = None
    pid: int | None = None
    pid_started: int | None = None
    boot: str | None = None
    problem: str = ""

    @property
    def process(self) -> Process:
        """That of a bare ``train``."""
        return Process(self.pid, self.pid_started, self.boot, self.host)

    def __post_init__(self) -> None:
        if self.job_id and not (JOB_ID if self.executor == "slurm" else NAME).fullmatch(self.job_id):
            raise Damaged(f"job_id should be the number of a job, not {self.job_id[:40]!r}")


@dataclass(frozen=True, slots=True)
class Failure:
    """A row of ``failures.jsonl``: why a rank ended. ``final`` means that a restart would fail alike; ``hang``, that the run
    goes on; ``busy``, that another process trains the run."""

    segment: str = ""
    rank: int = 0
    reason: str = ""
    time: str | None = None
    busy: bool = False
    final: bool = False
    hang: bool = False
    problem: str = ""

    @property
    def words(self) -> str:
        """The reason, and whose it is unless rank 0's."""
        return f"rank {self.rank}: {self.reason}" if self.rank else self.reason


@dataclass(frozen=True, slots=True)
class Interruption:
    """A row of ``interruptions.jsonl``; ``step`` is that of the newest checkpoint then."""

    event: str = ""
    step: int | None = None
    segment: str = ""
    rank: int | None = None
    reason: str | None = None
    nodes: tuple[str, ...] = ()
    time: str | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Ending:
    """``endings/<segment>.json``: who ended a segment, as what, and what was done; ``done`` once it was."""

    event: str = ""
    segment: str = ""
    rank: int | None = None
    action: str | None = None
    state: str | None = None
    done: bool = False
    time: str | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Submission:
    """``submitting.json``: see ``launch/submission.py``. ``row`` is the coming row of ``jobs.jsonl`` without the job id."""

    mark: str = ""
    element: int | None = None
    row: dict[str, Json] = dataclasses.field(default_factory=dict)
    replaces: tuple[str, ...] = ()
    process: Process | None = None
    began: Amount = 0.0
    problem: str = ""

    INNER: ClassVar = {"process": Process}


@dataclass(frozen=True, slots=True)
class Holder:
    """``.holder.json``: which job, ``<job id>.<restart>``, segment and process trains a run."""

    job: str = ""
    segment: str = ""
    host: str | None = None
    pid: int | None = None
    pid_started: int | None = None
    problem: str = ""

    def __bool__(self) -> bool:
        return bool(self.job or self.segment or self.pid)


@dataclass(frozen=True, slots=True)
class Waiting:
    """``waits.json``: what a job waits for before it trains, in its own words."""

    job: str = ""
    reason: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Saved:
    """``saved.json``: the step of the newest checkpoint on disk, None where nobody has said."""

    step: int | None = None
    time: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """``left-out.json``: updates that are not made, and how often a run went back for them."""

    steps: tuple[int, ...] = ()
    times: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class TrackedAs:
    """``wandb.json``: which run of W&B a run is, see ``track/identity.py``; ``opened`` once W&B has answered.

    ``base_url`` is empty where nobody has named a server, ``entity`` where the login decides and W&B has not said; ``url`` is
    where people see the run. ``sweep`` is the id of the sweep of W&B whose agent asked for it, ``swept`` its parameters.
    """

    base_url: str = ""
    entity: str = ""
    project: str = ""
    id: str = ""
    group: str = ""
    name: str = ""
    job_type: str = ""
    tags: tuple[str, ...] = ()
    notes: str = ""
    opened: bool = False
    url: str = ""
    sweep: str = ""
    swept: tuple[str, ...] = ()
    problem: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As it is written."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "problem"}


@dataclass(frozen=True, slots=True)
class SweepPlace:
    """``sweep.json``: see ``launch/sweep.py``. ``sweep`` and ``values`` are as in the sweep's file."""

    journal: str = ""
    study: str = ""
    number: int = 0
    trial: int | None = None
    values: dict[str, Json] | None = None
    sweep: dict[str, Json] = dataclasses.field(default_factory=dict)
    problem: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As it is written."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "problem"}

    @property
    def metric(self) -> str:
        """The figure by which its runs are ranked."""
        found = self.sweep.get("metric")
        return found if isinstance(found, str) else "val_accuracy"


@dataclass(frozen=True, slots=True)
class MetricRow:
    """A row of ``metrics.jsonl``, of ``kind`` ``step``, ``system``, ``epoch`` or ``event``; ``event`` is the word of an event.

    ``step`` counts updates, ``time`` is in Unix seconds. What events say beside that, and figures of nodes, are in the row
    itself, of ``reading.json_lines``.
    """

    kind: str = ""
    epoch: int = 0
    step: int = 0
    time: Amount | None = None
    train_loss: Loss | None = None
    train_accuracy: Share | None = None
    val_loss: Loss | None = None
    val_accuracy: Share | None = None
    val_loss_with_l2: Loss | None = None
    lr: Loss | None = None
    images_per_second: Amount | None = None
    grad_norm: Amount | None = None
    weight_norm: Amount | None = None
    event: str | None = None
    reason: str | None = None
    lost_steps: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Provenance:
    """``provenance.json``: see ``launch/provenance.py``; what it says beside that is for people."""

    git: dict[str, Json] | None = None
    packages: dict[str, Json] | None = None
    command: tuple[str, ...] = ()
    python: str | None = None
    platform: str | None = None
    host: str | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """``evaluation/<split>/evaluation.json``: see ``evaluate/metrics.py``, as far as something is made of it."""

    split: str = ""
    checkpoint: str = ""
    images: int = 0
    step: int = 0
    accuracy: Share = 0.0
    loss: Loss | None = None
    top5_accuracy: Share | None = None
    ece: Share = 0.0
    problem: str = ""
