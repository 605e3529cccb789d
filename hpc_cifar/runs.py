"""The run directory: the whole truth about a run.

runs/<run>/                     0700, since it holds pickles
  experiment.yaml               the resolved experiment; what every segment of the run trains
  plan.json  provenance.json    how it was placed; where it came from (git, versions, host)
  code/hpc_cifar/               the package as it was at submit
  submitit/                     pickles, the sbatch script, one log file a rank
  jobs.jsonl                    one row a submission: executor, job id, time; submitting.json: see launch/submission.py
  state.json                    written by rank 0, and by commands: state, epoch, step, ...; .state.lock: while it changes
  cancelled                     present once a user cancelled the run
  .lock  .holder.json           which process trains it; see train/lock.py
  checkpoints/  metrics.jsonl  result.json  wandb/  tensorboard/  wandb.json: which run of W&B it is, see track/identity.py
  saved.json                    the newest checkpoint on disk; see train/saved.py
  before-<time>/                what the run had before it was begun again
"""

from __future__ import annotations

import datetime
import functools
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from . import files, owner, records
from .config.experiment import Experiment
from .config.messages import closest, did_you_mean
from .config.source import parse
from .errors import RunError, UsageError, first_line
from .plan import Plan
from .records import Failure, Job, Result, RunState

OUTCOME = (
    *("checkpoints", "metrics.jsonl", "state.json", "result.json", "saved.json", "left-out.json", "failures.jsonl", "losses"),
    *("interruptions.jsonl", "endings", "hangs", "heartbeat", "evaluation", "wandb.json", "wandb-id"),
    *("wandb-pictures.json", "wandb-console.json", "tensorboard"),
)
"""What training leaves in a run directory."""
STATE_LOCK = ".state.lock"
UPDATE_WAIT_S = 10.0  # more than any process takes, unless it was stopped or its node has died


@dataclass(frozen=True)
class Run:
    """Paths and records of one run; creating the object touches nothing."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @cached_property
    def experiment_file(self) -> Path:
        return self.path / "experiment.yaml"

    @property
    def code(self) -> Path:
        return self.path / "code"

    @cached_property
    def submitit(self) -> Path:
        return self.path / "submitit"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @cached_property
    def result_file(self) -> Path:
        return self.path / "result.json"

    @cached_property
    def state_file(self) -> Path:
        return self.path / "state.json"

    @property
    def sweep_file(self) -> Path:
        """The run's place in a sweep, see ``launch/sweep.py``; absent of other runs."""
        return self.path / "sweep.json"

    @property
    def cancel_marker(self) -> Path:
        return self.path / "cancelled"

    def experiment(self) -> Experiment:
        """The resolved experiment this run trains.

        Raises:
            RunError: it is missing, damaged, or of another version; the message is one line.
        """
        try:
            return Experiment.model_validate(tree(self.experiment_file))
        except FileNotFoundError:
            raise RunError(f"{self.path}: not a run directory (no experiment.yaml)") from None
        except files.Damaged as error:
            raise RunError(f"{self.experiment_file}: {error}") from None
        except ValidationError as error:
            raise RunError(f"{self.experiment_file}: cannot be read back: {in_one_line(error)}") from None
        except (ValueError, RecursionError) as error:
            raise RunError(f"{self.experiment_file}: cannot be read back: {first_line(error)}") from None

    def jobs(self) -> list[Job]:
        """Submissions so far, oldest first; a damaged row says so in its ``problem``."""
        rows = records.rows(Job, self.path / "jobs.jsonl")
        # a job may have entered itself just when whoever submitted it did
        known = {(row.submission or number, row.job_id): row for number, row in reversed(list(enumerate(rows)))}
        return list(reversed(known.values()))

    def last_job(self) -> Job:
        """The latest submission; a job without an executor where there is none."""
        jobs = self.jobs()
        return jobs[-1] if jobs else Job()

    def failures(self) -> list[Failure]:
        """What ranks said as they failed, oldest first; without damaged rows."""
        return [row for row in records.rows(Failure, self.path / "failures.jsonl") if not row.problem]

    def add_job(self, **row: Any) -> None:
        files.append_json_line(self.path / "jobs.jsonl", {"submitted": now(), **row})

    def state(self) -> RunState:
        """What was last written; an empty record where nothing was."""
        return records.read(RunState, self.state_file) or RunState()

    def update_state(
        self, *, when: Callable[[RunState], bool] | None = None, wait_s: float = UPDATE_WAIT_S, **values: Any
    ) -> bool:
        """Change fields of ``state.json`` and leave the others as they are, whatever other processes change meanwhile.

        Args:
            when: asked with the present state, whether it is to be changed; no other process changes it in between.
            wait_s: how long to wait for another process that changes it. A process that was stopped within its change must not
                keep the run: after that time the state is changed all the same; with 0, left for the next time.
            values: fields of :class:`RunState`; None removes one.

        Returns:
            Whether it was changed.

        Raises:
            OSError: it cannot be written.
        """
        with files.alone(self.path / STATE_LOCK, wait_s) as held:
            if held is False and not wait_s:
                return False
            old = records.sound(RunState, files.read_object(self.state_file))
            if when is not None and not when(records.of(RunState, old)):
                return False
            kept = {name: value for name, value in {**old, **values, "updated": now()}.items() if value is not None}
            files.write_sealed(self.state_file, kept, durable=False)
        return True

    def plan(self) -> Plan | None:
        """How it was placed; None where that is missing or damaged. What an older version did not write is 0."""
        try:
            return records.load(Plan, self.path / "plan.json")
        except (FileNotFoundError, files.Damaged):
            return None

    def result(self) -> Result | None:
        """The outcome of the last segment that had one; a damaged one says so in its ``problem``."""
        return records.read(Result, self.result_file)

    @property
    def campaign(self) -> str | None:
        """The group of runs it belongs to, by its job file or ``submit --campaign``; in W&B as well."""
        try:
            found = tree(self.experiment_file)
        except (OSError, files.Damaged):
            return None
        tracking = found.get("tracking") if isinstance(found, dict) else None
        group = tracking.get("group") if isinstance(tracking, dict) else None
        return group if isinstance(group, str) else None

    def finished(self) -> bool:
        result = self.result()
        return result is not None and result.state == "finished"


def tree(path: Path) -> Any:
    """The plain value of a YAML file of bounded size, depth and number of values; no tag is resolved.

    Raises:
        FileNotFoundError: there is none.
        Damaged: it is not such YAML.
    """
    return _parsed(files.read_bytes(path))


@functools.lru_cache(maxsize=4096)
def _parsed(data: bytes) -> Any:
    """Whoever gets the value changes nothing in it: a command reads the same file for the campaign and for the experiment."""
    try:
        root, problems = parse(data.decode(), "")
    except UnicodeDecodeError:
        raise files.Damaged("is not UTF-8") from None
    if problems or root is None:
        raise files.Damaged(str(problems[0]).lstrip(": ") if problems else "is empty")
    return root.value()


def in_one_line(error: ValidationError) -> str:
    """One line of pydantic's many."""
    first, *others = error.errors(include_url=False, include_context=False)
    where = ".".join(map(str, first["loc"]))
    more = f" (and {len(others)} more)" if others else ""
    return f"{where}: {first_line(ValueError(first['msg']))}{more}"


def now() -> str:
    """UTC time, ISO 8601, whole seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def new_run_id(name: str, root: Path) -> str:
    """``<name>-<UTC time>-<four hex digits>``: sorts by time; no run in ``root`` has it."""
    while True:
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
        run_id = f"{name}-{stamp}-{secrets.token_hex(2)}"
        if not os.path.lexists(root / run_id):  # four hex digits are few for hundreds of runs of one second
            return run_id


def experiment_text(experiment: Experiment) -> str:
    """The resolved experiment as YAML that reads back to an equal object; a null may differ from what a field is without it."""
    values = experiment.model_dump(mode="json")
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # the same text ten times as fast, where libyaml is
    text: str = yaml.dump(values, Dumper=dumper, sort_keys=False, allow_unicode=True)
    return text


def named(root: Path, run_id: str) -> Run:
    """The run directory of that name, which need not exist.

    Raises:
        UsageError: the name is not one plain path component.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", run_id):
        raise UsageError(
            f"run name {run_id!r}: use up to 128 letters, digits, '.', '_' and '-', starting with a letter or digit"
        )
    return Run(root / run_id)


def create(
    root: Path,
    run_id: str,
    experiment: Experiment,
    plan: dict[str, Any],
    provenance: dict[str, Any],
    *,
    durable: bool = True,
) -> Run:
    """Make a new run directory; it appears whole or not at all. With ``durable=False`` the caller fsyncs its files.

    Raises:
        RunError: the directory exists already or cannot be written, or others can write to ``root``.
    """
    run = named(root, run_id)
    building = root / f".{run_id}.{secrets.token_hex(4)}.new"
    try:
        owner.make_root(root)
        building.mkdir(mode=owner.PRIVATE)
        files.write_text(building / "experiment.yaml", experiment_text(experiment), durable=durable)
        files.write_sealed(building / "plan.json", plan, durable=durable)
        files.write_json(building / "provenance.json", provenance, durable=durable)
        (building / "checkpoints").mkdir(mode=owner.PRIVATE)
        building.rename(run.path)  # fails if a run of this name already has files
    except OSError as error:
        if run.path.exists():
            raise RunError(f"{run.path}: a run of this name exists already") from None
        raise RunError(f"{root}: cannot create a run here: {error.strerror or error}") from None
    return run


def begin_again(run: Run) -> str:
    """Set aside all that a run has trained, so that it begins at step 0; the name of the folder in it where that lies now.

    The caller makes sure that nobody trains it.

    Raises:
        RunError: it cannot be moved.
    """
    aside = run.path / f"before-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    try:
        aside.mkdir()
        for name in OUTCOME:
            if os.path.lexists(run.path / name):
                (run.path / name).rename(aside / name)
        run.checkpoints.mkdir()
        note_begun_again(run, aside.name)
    except OSError as error:
        raise RunError(f"{run.path}: cannot begin again: {error.strerror or error}") from None
    return aside.name


def note_begun_again(run: Run, aside: str) -> None:
    """An event, the first row of the new metrics: the run was begun again, and what it had lies in ``aside``."""
    row = {"kind": "event", "epoch": 0, "step": 0, "time": round(time.time(), 3), "event": "begun again", "aside": aside}
    files.append_json_line(run.metrics_file, row)


def all_runs(root: Path, user: int | None = None) -> list[Run]:
    """Every run of one's own below ``root``, or of another user, oldest first."""
    return [Run(path) for _, path in sorted(owner.listing(root, user).runs, key=lambda one: (one[0], one[1].name))]


def find(token: str, root: Path, user: int | None = None, option: str = "--owner") -> Run:
    """The run at a path, whoever's it is; or one of one's own, or of ``user``, by an id, a unique prefix, a job id or ``last``.
    For messages, ``option`` is by which the command takes runs of others; "" if it does not.

    Raises:
        UsageError: nothing or more than one run fits; the message lists what there is.
    """
    if found := _at(token):
        return found
    runs = all_runs(root, user)
    if not runs:
        whose, others = ("" if user is None else f" of {owner.name_of(user)}"), owner.listing(root, user).words(option)
        others = f" ({others})" if others else ""
        raise UsageError(f"{root}: there are no runs{whose} here{others}; submit one first, or set HPC_CIFAR_RUNS")
    if token == "last":
        return runs[-1]
    exact = [run for run in runs if run.id == token]
    by_prefix = [run for run in runs if token and run.id.startswith(token)]
    by_job = [run for run in runs if any(job.job_id == token for job in run.jobs())]
    matches = exact or by_job or by_prefix
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = ", ".join(run.id for run in matches[-5:])
        raise UsageError(f"run {token!r} is not unique: {len(matches)} runs begin with it, such as {names}")
    if elements := _of_array(token, runs):
        raise UsageError(f"run {token!r} is a job array of {len(elements)} runs; name one of them, such as {elements[0].id}")
    if owner.is_run_of_another(root / token, user):
        advice = f"; to take it: {option} USER" if option else ", and no run of yours"
        raise UsageError(f"run {token!r} is of {owner.name_of(owner.of(root / token))}{advice}")
    hint = _meant(token, runs) or f"the latest are {', '.join(run.id for run in runs[-3:])}"
    raise UsageError(f"run {token!r}: no such run or job id in {root}; {hint}")


def _at(token: str) -> Run | None:
    """The run at a path."""
    if os.sep not in token:
        return None
    try:
        return Run(Path(token).absolute()) if (Path(token) / "experiment.yaml").is_file() else None
    except OSError as error:
        raise UsageError(f"{token}: {owner.cannot_be_read(Path(token), error)}") from None


def _meant(token: str, runs: list[Run]) -> str:
    """``did you mean 'x'?``: the run whose id, or the beginning of it, is nearly what was typed; the newest of several."""
    if files.whole(token) is not None:  # one number of a job is not nearer than another
        return ""
    ids = [run.id for run in reversed(runs)]
    guess = closest(token, ids)
    begins = {one[: len(token)]: one for one in reversed(ids)}  # the last of equal ones stays, which is the newest
    if guess is None and (begin := closest(token, begins)) is not None:
        guess = begins[begin]
    return f"did you mean '{guess}'?" if guess else ""


def of_campaign(name: str, root: Path, user: int | None = None) -> list[Run]:
    """The user's own runs submitted under that name, or those of ``user``, oldest first.

    Raises:
        UsageError: there are none; the message lists the campaigns that there are.
    """
    names = {run: run.campaign for run in all_runs(root, user)}
    if chosen := [run for run, found in names.items() if found == name]:
        return chosen
    known = sorted({found for found in names.values() if found})
    raise UsageError(f"--campaign {name}: no run in {root} belongs to it; {did_you_mean(name, known, 'campaigns')}")


def find_all(tokens: Iterable[str], root: Path, user: int | None = None, option: str = "--owner") -> list[Run]:
    """The runs meant by tokens, each once: every element of a job array by its number, else the one run of :func:`find`."""
    tokens = list(tokens)
    array = {token: _of_array(token, all_runs(root, user)) for token in tokens if token.isdecimal()}
    return list(dict.fromkeys(run for token in tokens for run in array.get(token) or [find(token, root, user, option)]))


def _of_array(token: str, runs: list[Run]) -> list[Run]:
    if files.whole(token) is None:
        return []
    return [run for run in runs if any(job.job_id.startswith(f"{token}_") for job in run.jobs())]
