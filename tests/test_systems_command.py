"""``make systems``: trainings in the background of other work, on digits and killed at random moments.

``HPC_CIFAR_KILLS_SEED`` says which.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpc_cifar import files
from hpc_cifar.launch.process import session_members
from hpc_cifar.runs import Run
from hpc_cifar.train import checkpoint

KILLS = 5
NICE = 1  # not 19: beside other tests it would get no processor at all
EVERY = 10  # steps between checkpoints
JOB: dict[str, Any] = {
    "seed": 3,
    "epochs": 3,
    "model": {
        "family": "sequential",
        "layers": [{"conv": {"filters": 8}}, "relu", "global_max_pool", {"dense": {"units": 10}}],
    },
    "data": {"dataset": "digits", "batch_size": 32},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "training": {"log_every_steps": 1},
    "checkpoint": {"every_steps": EVERY},
    "claim": {"source": "nobody", "test_accuracy": 0.99},
}
SHORT = {"epochs": 1}
WAIT_S = 240.0  # at most, for what takes seconds on an idle machine


@dataclass(frozen=True)
class Place:
    """Folders of one ``make systems``; the lock is not that of the machine, which holds it while these tests run."""

    repository: Path
    root: Path
    data: Path

    @property
    def json(self) -> Path:
        return self.root / "results" / "systems-2-cores.json"

    @property
    def busy(self) -> Path:
        return self.root / "busy.lock"

    def run(self, name: str) -> Run:
        return Run(self.root / "runs" / name)

    def job(self, name: str, **changes: Any) -> Path:
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"name": name, **JOB, **changes}))
        return path

    def environment(self) -> dict[str, str]:
        mine = {"HPC_CIFAR_RUNS": self.root / "runs", "HPC_CIFAR_DATA": self.data, "HPC_CIFAR_BUSY_FILE": self.busy}
        return {**os.environ, **{name: str(path) for name, path in mine.items()}, "PYTHONUNBUFFERED": "1"}

    def start(self, *jobs: Path) -> subprocess.Popen[bytes]:
        script = self.repository / "benchmarks" / "systems.py"
        command = [sys.executable, str(script), "--background", f"--nice={NICE}", "--json", str(self.json), *map(str, jobs)]
        with (self.root / "log").open("ab") as log:
            return subprocess.Popen(
                command, env=self.environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def complete(self, *jobs: Path) -> int:
        process = self.start(*jobs)
        with ended(process):
            return process.wait(WAIT_S)

    def log(self) -> str:
        return (self.root / "log").read_text()

    def systems(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.json.read_text())["systems"]
        return found

    def figures(self, name: str) -> dict[str, Any]:
        [row] = self.systems()[name]["measured"]
        names = ("train_accuracy", "train_loss", "val_accuracy", "val_loss", "test_accuracy", "test_loss", "epochs", "digest")
        return {key: row[key] for key in names}


@pytest.fixture
def place(repository: Path, tmp_path: Path, digits_data: Path) -> Place:
    return Place(repository, tmp_path, digits_data)


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Leave nothing of it behind."""
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until(holds: Callable[[], bool], process: subprocess.Popen[bytes]) -> bool:
    """Wait for something; False if the process has ended before."""
    deadline = time.monotonic() + WAIT_S
    while not holds():
        if process.poll() is not None:
            return holds()
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.01)
    return True


def rows(run: Run, kind: str) -> list[dict[str, Any]]:
    return [row for row in files.read_json_lines(run.metrics_file) if row["kind"] == kind]


def events(run: Run, event: str) -> list[dict[str, Any]]:
    return [row for row in rows(run, "event") if row["event"] == event]


def reached(run: Run) -> int:
    return max((row["step"] for row in rows(run, "step")), default=0)


def saved(run: Run) -> int:
    found, _ = checkpoint.newest_good(run.checkpoints)
    return found.step if found else 0


def being_saved(run: Run) -> int | None:
    """The step of a checkpoint that was not written to its end."""
    steps = [int(path.name.split("-")[1].split(".")[0]) for path in run.checkpoints.glob(".step-*")]
    return max(steps, default=None)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_at_random_it_repeats_nothing_that_was_done(place: Place) -> None:
    seed = int(os.environ.get("HPC_CIFAR_KILLS_SEED", random.SystemRandom().randrange(10**6)))
    dice = random.Random(seed)
    print(f"HPC_CIFAR_KILLS_SEED={seed}")
    jobs = [place.job("one"), place.job("two", optimizer={"name": "sgd", "lr": 0.05})]
    calm = Place(place.repository, place.root / "calm", place.data)
    calm.root.mkdir()
    assert calm.complete(*jobs) == 0, calm.log()
    runs = [place.run("one-s3"), place.run("two-s3")]
    total = rows(calm.run("one-s3"), "step")[-1]["step"]
    met: Counter[str] = Counter()
    for _ in range(KILLS):
        process = place.start(*jobs)
        with ended(process):
            done = {run.id: run.metrics_file.stat() for run in runs if run.finished()}
            aim = sum(map(reached, runs)) + dice.randint(1, total // 2)
            if dice.random() < 0.3:
                time.sleep(dice.uniform(0, 10))  # while it starts, or soon after
            elif not until(lambda aim=aim: sum(map(reached, runs)) >= aim, process):
                break
            before = {run.id: len(events(run, "started")) for run in runs}
            if alone := dice.random() < 0.4:  # its training is left to itself, and stops at a step boundary
                process.kill()
                process.wait()
                until_alone(process)
            else:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                until_alone(process)
        for run in runs:
            lost, held = reached(run) - saved(run), being_saved(run)
            most = EVERY if held is None else EVERY + reached(run) - held
            assert lost <= most, f"seed {seed}: {run.id} has lost {lost} steps"
            if alone and run.state().state == "stopped" and before[run.id]:
                assert lost == 0, f"seed {seed}: {run.id}"
            if run.id in done:
                assert run.metrics_file.stat() == done[run.id], f"seed {seed}: {run.id} was begun again"
            met[str(run.state().state)] += 1
    assert place.complete(*jobs) == 0, place.log()
    for run in runs:
        assert [row["step"] for row in rows(run, "step")] == list(range(1, total + 1)), f"seed {seed}"
        assert len(events(run, "finished")) == 1
        name = run.id.removesuffix("-s3")
        assert place.figures(name) == calm.figures(name), f"seed {seed}: {run.path}"
        [row] = place.systems()[name]["measured"]
        assert row["restarts"] == len(events(run, "started")) - 1
        curve = (place.json.parent / row["curve"]).read_text().splitlines()
        assert len(curve) == 1 + row["epochs"] == 1 + JOB["epochs"]
    assert sum(len(events(run, "started")) for run in runs) > len(runs), f"seed {seed}: nothing was interrupted: {met}"
    before_again = [place.json.read_bytes(), *(run.metrics_file.stat() for run in runs)]
    assert place.complete(*jobs) == 0
    assert [place.json.read_bytes(), *(run.metrics_file.stat() for run in runs)] == before_again


def until_alone(process: subprocess.Popen[bytes]) -> None:
    """Until no process of its session is left."""
    deadline = time.monotonic() + WAIT_S
    while session_members(process.pid):
        assert time.monotonic() < deadline, "its training did not stop"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_step_is_made_while_somebody_holds_the_lock(place: Place) -> None:
    job = place.job("waits", epochs=40)
    run = place.run("waits-s3")
    process = place.start(job)
    with ended(process):
        assert until(lambda: reached(run) > 0, process), place.log()
        assert os.getpriority(os.PRIO_PROCESS, run.state().pid) == os.getpriority(os.PRIO_PROCESS, 0) + NICE
        code = "import sys; print('begun', flush=True); sys.stdin.read()"
        script = str(place.repository / "benchmarks" / "quiet.py")
        with subprocess.Popen(
            [sys.executable, script, sys.executable, "-c", code],
            env=place.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        ) as other:  # fmt: skip
            assert other.stdout is not None and other.stdin is not None
            assert other.stdout.readline() == b"begun\n"
            at = reached(run)  # from the first moment of the other command on
            assert (run.state().state, saved(run)) == ("stopped", at)
            second = subprocess.run(
                [*process.args, str(job)],
                env=place.environment(),
                capture_output=True,
                text=True,
                check=False,  # type: ignore[misc]
            )
            assert second.returncode == 1 and "trained already by process" in second.stderr
            time.sleep(8)  # longer than it waits after the lock is free
            assert (reached(run), len(events(run, "started"))) == (at, 1)
            other.kill()  # the kernel frees the lock, even while the command of the other one lives
        assert until(lambda: reached(run) > at, process), place.log()
        assert "the machine is wanted" in place.log()
        process.terminate()
        assert process.wait(WAIT_S) == 128 + signal.SIGTERM
        assert (run.state().state, saved(run)) == ("stopped", reached(run))
        assert "the same command goes on" in place.log()
        assert not place.json.exists(), "a run that was only stopped is no result"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_fails_is_noted_and_what_has_changed_is_trained_again(place: Place) -> None:
    bad = place.job("bad", **SHORT, optimizer={"name": "sgd", "lr": 1e30})
    good = place.job("good", **SHORT)
    assert place.complete(bad, good) == 1, "one could not be trained"
    assert place.systems()["bad"]["measured"] == [] and not place.systems()["good"].get("unfinished")
    [failed] = place.systems()["bad"]["unfinished"]
    assert (failed["seed"], failed["state"]) == (3, "failed") and "loss became" in failed["reason"]
    [first] = place.systems()["good"]["measured"]
    assert (first["run"], first["state"], first["data"], first["device"]) == ("good-s3", "finished", "digits", "cpu")
    assert first["hardware"]["cores"] and first["precision"] and first["commit"]
    # a claim is of another kind: nothing is trained again for it
    bad, good = place.job("bad", **SHORT), place.job("good", **SHORT, claim={"source": "nobody", "test_accuracy": 0.05})
    assert place.complete(bad, good) == 0
    assert place.systems()["bad"]["measured"] and "unfinished" not in place.systems()["bad"]
    assert (place.root / "runs" / "bad-s3-old-1").is_dir()
    assert place.systems()["good"]["measured"] == [first] and place.systems()["good"]["claim"]["test_accuracy"] == 0.05
    good = place.job("good", **SHORT, loss={"label_smoothing": 0.1})
    assert place.complete(good) == 0
    [second] = place.systems()["good"]["measured"]
    assert second["digest"] != first["digest"] and (place.root / "runs" / "good-s3-old-1" / "result.json").exists()


# -- the parts --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def benchmarks(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))


@pytest.mark.usefixtures("benchmarks")
def test_the_plan_has_every_system_that_needs_no_weights() -> None:
    import systems

    plan = systems.everything()
    assert set(systems.HOURS) == set(systems.from_scratch())
    assert len(set(plan)) == len(plan)
    assert {job for job, _ in plan} == set(systems.HOURS) | set(systems.RECIPES)
    for job, hours in systems.HOURS.items():
        assert sum(one == job for one, _ in plan) == (3 if hours < 1 else 1), job
    order = [job for job, number in plan if number == 0]
    quick = [job for job in order if systems.HOURS.get(job, 9) < 1]
    assert order[: len(quick)] == quick and order[len(quick) :][:2] == ["deep300", "mfm-10"] and order[-1] == "deep300-tuned"
    assert plan.index((quick[0], 1)) > plan.index(("mfm-11", 0)), "one figure of each before the spread of any"


@pytest.mark.usefixtures("benchmarks")
def test_a_lock_that_another_user_could_have_laid_is_not_taken(tmp_path: Path) -> None:
    import quiet

    (tmp_path / "somebody's").touch()
    (tmp_path / "link").symlink_to(tmp_path / "somebody's")
    (tmp_path / "folder").mkdir()
    for name in ("link", "folder"):
        with pytest.raises(OSError):
            quiet.opened(tmp_path / name)
    with quiet.shared(tmp_path / "lock"), quiet.shared(tmp_path / "lock"):
        assert quiet.is_held(tmp_path / "lock")
    assert not quiet.is_held(tmp_path / "lock")


@pytest.mark.usefixtures("benchmarks")
def test_a_quiet_command_hands_on_its_exit_code_and_signals(repository: Path, tmp_path: Path) -> None:
    script, environment = (
        str(repository / "benchmarks" / "quiet.py"),
        {**os.environ, "HPC_CIFAR_BUSY_FILE": str(tmp_path / "lock")},
    )
    assert subprocess.run([sys.executable, script, "sh", "-c", "exit 7"], env=environment, check=False).returncode == 7
    with subprocess.Popen([sys.executable, script, "sh", "-c", "echo; exec sleep 60"], env=environment, stdout=-1) as process:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM


ROW = {"seed": 1, "test_accuracy": 0.80, "seconds": 60, "epochs": 5, "digest": "a" * 64, "run": "x-s1", "commit": "b" * 40}


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.parametrize(
    ("claim", "word", "text"),
    [
        (0.80, "as claimed", "80.00%"),
        (0.75, "above", "75.00%"),
        (0.85, "below", "85.00%"),
        ({"at_least": 0.7}, "as claimed", "> 70%"),
        ({"at_least": 0.7, "at_most": 0.75}, "above", "70-75%"),
        ({"at_most": 0.85}, "as claimed", "< 85%"),
        ({"at_least": 0.9}, "below", "> 90%"),
        (None, "", "-"),
    ],
)
def test_a_claim_is_a_number_or_a_range(claim: Any, word: str, text: str) -> None:
    import systems_table

    entry = {"claim": {"source": "a paper", "test_accuracy": claim} if claim else None, "measured": [ROW]}
    assert systems_table.verdict(entry) == word
    [_, _, row] = systems_table.lines({"x": entry})
    assert f"| {text} / 80.00% |" in row
    good = "1 match or beat" if word in ("above", "as claimed") else "0 match or beat"
    assert good in systems_table.summary({"x": entry})


@pytest.mark.usefixtures("benchmarks")
def test_rows_of_the_present_job_file_count() -> None:
    import systems_table

    earlier = {"seed": 1, "test_accuracy": 0.5, "seconds": 1, "epochs": 1}
    outdated = ROW | {"seed": 2, "outdated": True}
    assert systems_table.counted({"measured": [earlier, outdated, ROW]}) == [ROW]
    assert systems_table.counted({"measured": [earlier, outdated]}) == [earlier]
    assert systems_table.counted({"measured": [outdated]}) == [outdated]
    [_, _, row] = systems_table.lines(
        {"x": {"claim": None, "measured": [ROW | {"curve": "curves/x.csv"}, ROW | {"seed": 2}]}}, "results"
    )
    assert "| 2 |" in row and "[x-s1](results/curves/x.csv), bbbbbbb, `aaaaaaaa`" in row and "- / 5, 5" in row
