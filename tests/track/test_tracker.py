"""A tracker is one module, here one of a few lines, and its name; several are fed at once, and none has to do with another."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import wandb_server
from command_line import typed
from mirrored import EXPERIMENT, a_run, train
from wandb_server import HANG

from hpc_cifar import owner, runs
from hpc_cifar.config.difference import matters
from hpc_cifar.config.experiment import Experiment, MirrorName, Tracking
from hpc_cifar.errors import RunBusy, TrackingError
from hpc_cifar.launch.drill import rehearsed
from hpc_cifar.records import RunState
from hpc_cifar.runs import OUTCOME, Run
from hpc_cifar.track import companion, tracker, underway
from hpc_cifar.track.sync import sync
from hpc_cifar.track.tracker import Rows
from hpc_cifar.train.stall import shortened

# ---- the module: lines of CSV ---------------------------------------------------------------------------------------------

TITLE = "CSV lines"


class Lines:
    def __init__(self, path: Path) -> None:
        self.path = path
        there = path.read_text().splitlines() if path.exists() else []
        self.taken = int(there[-1].partition(",")[0]) + 1 if there else 0

    def push(self, rows: Rows) -> None:
        with self.path.open("a") as stream:
            for number, row in rows.new:
                stream.write(f"{number},{row['step']},{json.dumps(tracker.figures(row))}\n")
                self.taken = number + 1

    def finish(self, rows: Rows, state: RunState, left: bool) -> None:
        self.push(rows)
        self.path.with_name("outcome").write_text(f"{state.state} {len(rows.epochs)}")


def problem(run: Run | None) -> str:
    return ""


def begins(run: Run, tracking: Tracking, say: Callable[[str], None]) -> bool:
    return True


@contextlib.contextmanager
def opened(run: Run, say: Callable[[str], None], beside: bool) -> Iterator[Lines]:
    yield Lines(run.path / "lines.csv")


# ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("csv_lines")
    for name in ("TITLE", "problem", "begins", "opened"):
        setattr(module, name, globals()[name])
    monkeypatch.setitem(sys.modules, "csv_lines", module)
    monkeypatch.setitem(tracker.MODULES, "lines", "csv_lines")
    return "lines"


def test_a_new_tracker_is_one_module_and_its_name(tmp_path: Path, lines: str) -> None:
    run = a_run(tmp_path)
    train(run, 0, 14)
    assert sync(run, lambda _: True, lambda _: None, to=lines) == 15
    train(run, 11, 30, ended="finished")
    assert sync(run, lambda _: True, lambda _: None, to=lines) == 18
    assert sync(run, lambda _: True, lambda _: None, to=lines) == 0
    rows = [line.split(",", 2) for line in (run.path / "lines.csv").read_text().splitlines()]
    steps = [int(step) for _, step, figures in rows if "step/train_loss" in figures]
    epochs = [int(step) for _, step, figures in rows if '"val_loss"' in figures]
    assert (steps, epochs) == (list(range(1, 31)), [10, 20, 30]) and (run.path / "outcome").read_text() == "finished 3"


def test_a_lock_is_of_one_tracker(tmp_path: Path, lines: str) -> None:
    run = a_run(tmp_path)
    train(run, 0, 10, ended="finished")

    def meanwhile(seconds: float) -> bool:
        if not tried:
            tried.append(True)
            with pytest.raises(RunBusy, match=f"{run.id}: is being uploaded to CSV lines by process {os.getpid()}"):
                sync(run, lambda _: True, lambda _: None, to=lines)
            assert (run.path / ".lines.lock").exists() and not (run.path / ".wandb.lock").exists()
        return True

    tried: list[bool] = []
    assert sync(run, meanwhile, lambda _: None, to=lines) == 11 and tried


def test_rows_of_any_kind_have_a_prefix() -> None:
    row = {"step": 3, "epoch": 1, "time": 1.0, "cpu": 2.0, "nothing": None}
    assert {kind: tracker.figures({"kind": kind, **row}) for kind in tracker.PREFIX} == {
        "step": {"step/cpu": 2.0},
        "system": {"nodes/cpu": 2.0},
        "epoch": {"cpu": 2.0},
    }


def test_names_of_job_files_are_modules() -> None:
    assert set(tracker.MODULES) == {"wandb", *get_args(MirrorName)}
    for name in tracker.MODULES:
        module: Any = importlib.import_module(tracker.MODULES[name])
        assert all(hasattr(module, one) for one in ("TITLE", "problem", "begins", "opened")), name


def test_the_field_is_none_of_the_experiment(tmp_path: Path) -> None:
    several = Experiment.model_validate(EXPERIMENT | {"tracking": {"mirrors": ["tensorboard", "tensorboard"]}})
    assert tracker.chosen(several.tracking) == ("wandb", "tensorboard")
    assert not matters("tracking.mirrors", [], ["tensorboard"]) and not matters("tracking.console", False, True)
    assert rehearsed(several, [], 100).tracking.mirrors == (), "a rehearsal leaves nothing of its own there"
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(EXPERIMENT | {"tracking": {"wandb": "online", "mirrors": ["tensorboard"], "console": True}}))
    assert shortened(path, [], 16, 2, 1).tracking == Tracking(), "a measurement is mirrored nowhere"
    assert "tensorboard" in OUTCOME, "a run that is begun anew has its curves anew"
    assert "tensorboard" not in owner.NOT_READ


class Slow:
    """A process that goes on for a while after its standard input has ended; see :class:`companion.Companion`."""

    def __init__(self, seconds: float) -> None:
        code = f"import sys, time; print('opened', flush=True); sys.stdin.read(); time.sleep({seconds})"
        self.command = [sys.executable, "-c", code]


def test_they_are_waited_for_at_once(tmp_path: Path, lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, said = a_run(tmp_path), list[str]()
    run.update_state(state="finished")
    begin, slow = companion.subprocess.Popen, Slow(2.0)
    monkeypatch.setattr(companion.subprocess, "Popen", lambda command, **options: begin(slow.command, **options))
    monkeypatch.setattr(companion, "chosen", lambda tracking: ("tensorboard", "lines", "lines"))
    beside = companion.Companions(run, run.experiment().tracking, said.append)
    assert underway.left_s(run) > 0 and underway.note(run, "lines").exists() and underway.note(run, "tensorboard").exists()
    began = time.monotonic()
    beside.finish()
    assert 1.9 < time.monotonic() - began < 4 and said == [] and underway.left_s(run) == 0
    monkeypatch.setattr(companion, "FINISH_S", 0.5)
    slow.command = Slow(60).command
    beside = companion.Companions(run, run.experiment().tracking, said.append)
    began = time.monotonic()
    beside.finish()
    # one that has not answered has 15 s since its start
    assert time.monotonic() - began < companion.START_S + 3
    assert said[0] == f"TensorBoard has not got everything: hpc-cifar sync {run.id} --to tensorboard uploads the rest"


@pytest.mark.component("wandb")
@pytest.mark.slow
def test_which_trackers_sync_is_about(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    values = EXPERIMENT | {"tracking": {"mirrors": ["tensorboard"]}}
    run = runs.create(tmp_path, "several", Experiment.model_validate(values), {"batch_size": 64}, {})
    train(run, 0, 10, ended="finished")
    environment = {**os.environ}

    def said(*options: str) -> tuple[int, str, str]:
        done = typed(["sync", str(run.path), *options], environment, tmp_path, timeout_s=60)
        return done.returncode, done.stdout, done.stderr

    no_login = "hpc-cifar: error: W&B: no login here: type 'wandb login', or set WANDB_API_KEY\n"
    assert said("--to", "wandb") == (2, "", no_login)
    assert said() == (2, "several: 11 rows uploaded\n", no_login), "the mirror is up to date all the same"
    assert said("--to", "tensorboard") == (0, "several: 0 rows uploaded\n", "")
    code, out, err = said("--to", "mlflow")
    assert (code, out) == (2, "") and "--to mlflow: there is no such tracker; there are wandb, tensorboard" in err
    with wandb_server.serving() as server:
        environment |= server.environment
        for options, new in (([], 11), (["--to", "tensorboard", "--to", "wandb"], 0)):
            code, out, _ = said(*options)
            assert code == 0 and len(server.runs) == 1
            to_wandb = f"several: {new} rows uploaded to W&B"
            assert sorted(out.splitlines()) == ["several: 0 rows uploaded to TensorBoard", to_wandb]


@pytest.mark.component("wandb")
@pytest.mark.slow
def test_follow_feeds_each_by_itself(tmp_path: Path) -> None:
    """W&B hangs throughout; TensorBoard is complete and the command says which is not."""
    pytest.importorskip("tensorboard")
    from events import assert_whole

    run = a_run(tmp_path)
    train(run, 0, 10, ended="finished")
    with wandb_server.serving() as server:
        server.trouble = lambda what, number: HANG
        both = ["--follow", "--to", "wandb", "--to", "tensorboard"]
        done = typed(["sync", str(run.path), *both], {**os.environ, **server.environment}, tmp_path, timeout_s=200)
    assert done.returncode == 1 and f"{run.id}: W&B" in done.stderr and "Traceback" not in done.stderr
    assert_whole(run)


def test_an_error_of_a_tracker_is_one_line(tmp_path: Path, lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path)
    train(run, 0, 10, ended="finished")
    tries: list[str] = []

    def fails(self: Lines, rows: Rows) -> None:
        tries.append("once")
        raise (tracker.Hopeless if len(tries) > 2 else TrackingError)("it does not want it")

    monkeypatch.setattr(Lines, "push", fails)
    monkeypatch.setattr("hpc_cifar.track.sync.RETRY_S", 0.0)
    said: list[str] = []
    with pytest.raises(tracker.Hopeless):
        sync(run, lambda seconds: seconds > 1 and len(tries) > 5, said.append, to=lines)
    assert len(tries) == 3 and said == ["it does not want it; trying again in 0 s"] * 2
