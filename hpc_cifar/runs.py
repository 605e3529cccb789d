"""The run directory: the whole truth about a run.

runs/<run>/                     0700, since it holds pickles
  experiment.yaml               the resolved experiment; what every segment of the run trains
  plan.json  provenance.json    how it was placed; where it came from (git, versions, host)
  code/hpc_cifar/               the package as it was at submit
  submitit/                     pickles, the sbatch script, one log file a rank
  jobs.jsonl                    one row a submission: executor, job id, time; submitting.json: see launch/submission.py
  state.json                    written by rank 0: state, epoch, step, ...
  cancelled                     present once a user cancelled the run
  .lock  .holder.json           which process trains it; see train/lock.py
  checkpoints/  metrics.jsonl  result.json  wandb/
  saved.json                    the newest checkpoint on disk; see train/saved.py
  before-<time>/                what the run had before it was begun again
"""

from __future__ import annotations

import datetime
import os
import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from . import files
from .config.experiment import Experiment
from .config.messages import closest, did_you_mean
from .errors import RunError, UsageError

OUTCOME = (
    *("checkpoints", "metrics.jsonl", "state.json", "result.json", "saved.json", "left-out.json", "failures.jsonl"),
    *("interruptions.jsonl", "endings", "losses", "hangs", "heartbeat", "evaluation", "wandb-id", "wandb-pictures.json"),
)
"""What training leaves in a run directory."""


@dataclass(frozen=True)
class Run:
    """Paths and records of one run; creating the object touches nothing."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def experiment_file(self) -> Path:
        return self.path / "experiment.yaml"

    @property
    def code(self) -> Path:
        return self.path / "code"

    @property
    def submitit(self) -> Path:
        return self.path / "submitit"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def result_file(self) -> Path:
        return self.path / "result.json"

    @property
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
        """The resolved experiment this run trains."""
        try:
            return Experiment.model_validate(yaml.safe_load(self.experiment_file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise RunError(f"{self.path}: not a run directory (no experiment.yaml)") from None
        except (ValueError, yaml.YAMLError) as error:
            raise RunError(f"{self.experiment_file}: cannot be read back: {error}") from None

    def jobs(self) -> list[dict[str, Any]]:
        """Submissions so far, oldest first: ``executor``, ``job_id``, ``submitted`` (ISO time), ...."""
        rows = files.read_json_lines(self.path / "jobs.jsonl")
        # a job may have entered itself just when whoever submitted it did
        known = {
            (row.get("submission") or number, str(row.get("job_id"))): row for number, row in reversed(list(enumerate(rows)))
        }
        return list(reversed(known.values()))

    def add_job(self, **row: Any) -> None:
        files.append_json_line(self.path / "jobs.jsonl", {"submitted": now(), **row})

    def state(self) -> dict[str, Any]:
        """What rank 0 last wrote, or ``{}``."""
        return files.read_json(self.state_file) or {}

    def write_state(self, **values: Any) -> None:
        files.write_json(self.state_file, {**values, "updated": now()}, durable=False)

    def plan(self) -> dict[str, Any]:
        return files.read_json(self.path / "plan.json") or {}

    def result(self) -> dict[str, Any] | None:
        return files.read_json(self.result_file)

    @property
    def campaign(self) -> str | None:
        """The group of runs it belongs to, by its job file or ``submit --campaign``; in W&B as well."""
        try:
            fields = yaml.load(self.experiment_file.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            return fields["tracking"]["group"]  # type: ignore[no-any-return]
        except (OSError, yaml.YAMLError, KeyError, TypeError):
            return None

    def finished(self) -> bool:
        return (self.result() or {}).get("state") == "finished"


def now() -> str:
    """UTC time, ISO 8601, whole seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def new_run_id(name: str, root: Path) -> str:
    """``<name>-<UTC time>-<four hex digits>``: sorts by time; no run in ``root`` has it."""
    while True:
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
        run_id = f"{name}-{stamp}-{secrets.token_hex(2)}"
        if not (root / run_id).exists():  # four hex digits are few for hundreds of runs of one second
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
        RunError: the directory exists already or cannot be written.
    """
    run = named(root, run_id)
    building = root / f".{run_id}.{secrets.token_hex(4)}.new"
    try:
        building.mkdir(parents=True, mode=0o700)
        files.write_text(building / "experiment.yaml", experiment_text(experiment), durable=durable)
        files.write_json(building / "plan.json", plan, durable=durable)
        files.write_json(building / "provenance.json", provenance, durable=durable)
        (building / "checkpoints").mkdir()
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


def all_runs(root: Path) -> list[Run]:
    """Every run below ``root``, oldest first."""
    if not root.is_dir():
        return []
    found = [Run(path) for path in root.iterdir() if not path.name.startswith(".") and (path / "experiment.yaml").is_file()]
    return sorted(found, key=lambda run: (run.experiment_file.stat().st_mtime_ns, run.id))


def find(token: str, root: Path) -> Run:
    """The run meant by an id, a path, a unique prefix, a job id or ``last``.

    Raises:
        UsageError: nothing or more than one run fits; the message lists what there is.
    """
    as_path = Path(token)
    if os.sep in token and (as_path / "experiment.yaml").is_file():
        return Run(as_path.absolute())
    runs = all_runs(root)
    if not runs:
        raise UsageError(f"{root}: there are no runs here; submit one first, or set HPC_CIFAR_RUNS")
    if token == "last":
        return runs[-1]
    exact = [run for run in runs if run.id == token]
    by_prefix = [run for run in runs if token and run.id.startswith(token)]
    by_job = [run for run in runs if any(str(row.get("job_id")) == token for row in run.jobs())]
    matches = exact or by_job or by_prefix
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = ", ".join(run.id for run in matches[-5:])
        raise UsageError(f"run {token!r} is not unique: {len(matches)} runs begin with it, such as {names}")
    if elements := _of_array(token, runs):
        raise UsageError(f"run {token!r} is a job array of {len(elements)} runs; name one of them, such as {elements[0].id}")
    hint = _meant(token, runs) or f"the latest are {', '.join(run.id for run in runs[-3:])}"
    raise UsageError(f"run {token!r}: no such run or job id in {root}; {hint}")


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


def of_campaign(name: str, root: Path) -> list[Run]:
    """The runs submitted under that name, oldest first.

    Raises:
        UsageError: there are none; the message lists the campaigns that there are.
    """
    names = {run: run.campaign for run in all_runs(root)}
    if chosen := [run for run, found in names.items() if found == name]:
        return chosen
    known = sorted({found for found in names.values() if found})
    raise UsageError(f"--campaign {name}: no run in {root} belongs to it; {did_you_mean(name, known, 'campaigns')}")


def find_all(tokens: Iterable[str], root: Path) -> list[Run]:
    """The runs meant by tokens, each once: every element of a job array by its number, else the one run of :func:`find`."""
    return list(dict.fromkeys(run for token in tokens for run in _of_array(token, all_runs(root)) or [find(token, root)]))


def _of_array(token: str, runs: list[Run]) -> list[Run]:
    if files.whole(token) is None:
        return []
    return [run for run in runs if any(str(row.get("job_id")).startswith(f"{token}_") for row in run.jobs())]
