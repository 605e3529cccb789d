"""What is written down of a training: its figures and where they come from, in a JSON file, and its curve in one beside it."""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from systems_table import FIGURES

from hpc_cifar import files
from hpc_cifar.config.difference import digest
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.data import bench
from hpc_cifar.launch import provenance
from hpc_cifar.launch.status import status
from hpc_cifar.runs import Run, now
from hpc_cifar.track.rows import selected

Json = dict[str, Any]

# without the start of the process, its imports and its data; checkpoints are those of the last stretch alone
COST = ("epochs", "seconds", "restarts", "checkpoints", "checkpoint_seconds")
CURVE = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr")


def measured(run: Run) -> Json:
    """The figures of a finished run's selected epoch, and its test."""
    result = files.read_object(run.result_file)
    rows = [row for row in files.read_json_lines(run.metrics_file) if row["kind"] == "epoch"]
    chosen = selected(run.experiment(), rows)
    figures = {**chosen, **result}
    # of the epochs alone, without validation and checkpoints; one that was interrupted counts at the rate of its last stretch
    training = [planned_images(run) / row["images_per_second"] for row in rows]
    return {
        "train_seconds": round(sum(training), 3),
        "warm_train_seconds": round(len(training) * statistics.median(training), 3),  # nor compilation, which the first have
        **{name: figures.get(name) for name in FIGURES},
        **{name: result.get(name) for name in (*COST, "tta_accuracy", "tta_loss", "data", "selected", "precision")},
        "selected_epoch": chosen.get("epoch"),
        "device": run.state().device,
        "processes": run.state().world_size,
    }


def origin(run: Run, starts: list[Json]) -> Json:
    """Where a run comes from: its own record, and what was seen at each of its starts here."""
    git = (files.read_json(run.path / "provenance.json") or {}).get("git") or {}
    last = starts[-1] if starts else {"hardware": bench.hardware(), "versions": bench.versions()}
    found = {"commit": git.get("commit"), "hardware": last["hardware"], "versions": last["versions"]}
    # figures that were not committed yet are no other code
    touched = re.findall(r"^diff --git a/(\S+) ", git.get("diff") or "", re.MULTILINE)
    if other := sorted(path for path in touched if not path.startswith("docs/results/")):
        found["uncommitted"] = other
    commits = list(dict.fromkeys(start["commit"] for start in starts))
    if len(commits) > 1:
        found["commits"] = commits
    if len({str(start["hardware"]) for start in starts}) > 1:
        found["machines"] = list({str(start["hardware"]): start["hardware"] for start in starts}.values())
    return found


def planned_images(run: Run) -> int:
    """Training images, 0 where that is not known."""
    plan = run.plan()
    return plan.train_images if plan is not None else 0


def validation_images(run: Run) -> int | None:
    """Images of the validation, where they are a share of the training images; None where they are the test's."""
    share, trained = run.experiment().data.validation, planned_images(run)
    return round(trained * share / (1 - share)) if isinstance(share, float) and trained else None


def curve(run: Run) -> str:
    """Every epoch as a line of CSV, to five digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CURVE)
    for row in files.read_json_lines(run.metrics_file):
        if row["kind"] == "epoch":
            writer.writerow([f"{row[name]:.5g}" if row.get(name) is not None else "" for name in CURVE])
    return text.getvalue()


class Results:
    """The figures in a JSON file, written after every change; in memory alone without a file.

    An entry has its ``claim``, ``set``, ``hardware``, ``versions`` (of its newest row), ``measured``: a row for each seed that
    is trained, and ``unfinished``: how others ended. A row without ``digest`` was measured before there was one; one of another
    job file than the present is ``outdated``. Both stay until the seed is trained again.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path.absolute() if path else None
        self.systems: dict[str, Json] = ((files.read_json(path) or {}) if path else {}).get("systems", {})

    def has(self, entry: str, seed: int, wanted: str) -> bool:
        rows = self.systems.get(entry, {}).get("measured", [])
        return any(row["seed"] == seed and row.get("digest") == wanted for row in rows)

    def compare(self, experiments: Mapping[str, Experiment]) -> None:
        """Have claims as the job files say them, and mark the rows of other job files."""
        before = repr(self.systems)
        for name, experiment in experiments.items():
            if name in self.systems:
                self.systems[name]["claim"] = claim_of(experiment)
                for row in self.systems[name]["measured"]:
                    row.pop("outdated", None)
                    if row.get("digest", digest(experiment)) != digest(experiment):
                        row["outdated"] = True
        if repr(self.systems) != before:
            self._write()

    def begin(self, run: Run) -> None:
        """Note where a stretch of a run begins, beside the runs."""
        git = provenance.git() or {}
        row = {"run": run.id, "time": now(), "commit": git.get("commit")}
        run.path.parent.mkdir(parents=True, exist_ok=True)
        files.append_json_line(_starts(run), row | {"hardware": bench.hardware(), "versions": bench.versions()})

    def note(self, name: str, experiment: Experiment, run: Run, sets: list[str]) -> bool:
        """Write down a run's figures, or how else it ended; whether it has finished."""
        entry = self.systems.setdefault(name, {"claim": None, "set": sets, "measured": []})
        seed = experiment.seed
        kept = [row for row in entry.pop("unfinished", []) if row["seed"] != seed]
        if finished := run.finished():
            for row in entry["measured"]:  # those before had one machine for all
                for key in ("hardware", "versions"):
                    row.setdefault(key, entry.get(key))
            row = self._row(experiment, run)
            found = {one["seed"]: one for one in entry["measured"]} | {seed: row}
            entry |= {"claim": claim_of(experiment), "set": sets, "hardware": row["hardware"], "versions": row["versions"]}
            entry["measured"] = [found[one] for one in sorted(found)]
        else:
            kept.append({"seed": seed, "run": run.id, "digest": digest(experiment), **ended(run)})
        if kept:
            entry["unfinished"] = kept
        self._write()
        return finished

    def _row(self, experiment: Experiment, run: Run) -> Json:
        starts = [row for row in files.read_json_lines(_starts(run)) if row["run"] == run.id]
        result = files.read_object(run.result_file)
        row = {"seed": experiment.seed, "run": run.id, "digest": digest(experiment), **origin(run, starts), **measured(run)}
        row |= {"validation_images": validation_images(run), "state": "finished", "ended": result.get("ended")}
        row["reason"] = result.get("reason")
        if self._path:
            machine = "" if row["device"] == "cpu" else "-gpu"
            row["curve"] = f"curves/{run.id}{machine}.csv"
            (self._path.parent / "curves").mkdir(parents=True, exist_ok=True)
            files.write_text(self._path.parent / row["curve"], curve(run))
        return row

    def _write(self) -> None:
        if self._path:  # after each: a session may end at any time
            self._path.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(self._path, {"systems": self.systems})


def ended(run: Run) -> Json:
    """State and reason of a run that has not finished."""
    if not run.experiment_file.exists():
        return {"state": "failed", "reason": "it did not begin: its command says why", "time": now()}
    seen = status(run)
    state = run.state()
    return {
        "state": seen.state, "reason": seen.reason, "epochs": seen.epoch, "step": seen.step, "restarts": seen.restarts,
        "seconds": state.seconds, "precision": state.precision, "data": state.data, "time": now(),
        "hardware": bench.hardware(),
    }  # fmt: skip


def claim_of(experiment: Experiment) -> Json | None:
    return experiment.claim.model_dump(mode="json", exclude_none=True, exclude={"inferred"}) if experiment.claim else None


def _starts(run: Run) -> Path:
    return run.path.parent / "systems.jsonl"
