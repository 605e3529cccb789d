"""``hpc-cifar drill``: disturbs a short training in every way that clusters have, and compares it with an undisturbed twin.

It has a user's rights: signals, requeues and cancels by Slurm's own commands, a limit on the size of files instead of a full
disk, and ranks that do to themselves what nobody else may do to them (``train/rehearsal.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import files
from ..config.cluster import Cluster
from ..config.experiment import Experiment
from ..errors import HpcCifarError, LaunchError, RunError
from ..runs import Run
from . import control, process, script, slurm, submit
from .several import wait_all
from .status import Status, chain_of, controller_of, is_live, status

EPOCH_STEPS, INTERVAL = 20, 5  # steps of an epoch at most, and from one checkpoint to the next
BY_ITSELF, RESUMED = "by itself", "after hpc-cifar resume"
AGAIN = 3  # times that a fault is tried which comes a moment too late
PACE_S, SLOW_S = 0.25, 2.0  # the least time of a step until all has been done; while the time limit is waited for
STEPS, SLOW_STEPS = 18, 60  # of a fault, at most; of the time limit
HANG_S = 12.0
LIMIT = "00:02:00"  # of a job, where the time limit is one of the faults
BACK_S = 600.0  # for a run to train again, once its job has started
ACK_S = 120.0  # for a rank to do what it was told to
END_S = 30.0  # for the processes of a run that has finished to end
POLL_S, LOOK_S = 0.1, 1.0  # at its files; at the queue


@dataclass(frozen=True)
class Fault:
    """``warned``: the run hears of it in time, so no step may be lost. ``by_itself``: nobody has to resume the run.

    ``how``: what was emulated, and by what.
    """

    what: str
    how: str
    warned: bool = False
    by_itself: bool = False
    executors: tuple[str, ...] = ("local", "slurm")


FAULTS = {
    "preempt": Fault("preempted, with a grace time", "the signal that announces it", warned=True, by_itself=True),
    "requeue": Fault("requeued by Slurm", "scontrol requeue", warned=True, by_itself=True, executors=("slurm",)),
    "kill-one": Fault("one rank killed", "SIGKILL"),
    "kill-all": Fault("every rank killed at once", "SIGKILL"),
    "kill-in-save": Fault("killed while it saved a checkpoint", "SIGKILL of rank 0 between write and rename"),
    "truncated": Fault("newest checkpoint cut short, then killed", "half of its file"),
    "flipped": Fault("a bit of the newest checkpoint flipped, then killed", "one bit of its file"),
    "disk-full": Fault("disk full", "a limit on the size of rank 0's files, which fails writes with EFBIG"),
    "hang": Fault("a rank hangs", "SIGSTOP", by_itself=True),
    "time-limit": Fault("time limit", f"a limit of {LIMIT[3:5].lstrip('0')} minutes", warned=True, by_itself=True),
}
DAMAGES = ("truncated", "flipped")
WHOLE = {"truncated": 2, "flipped": 2, "disk-full": 1}  # checkpoints that are needed, the newest ones: one to fall back on
SHORT = ("preempt", "kill-one", "kill-in-save", "flipped", "disk-full")


def possible(cluster: Cluster, processes: int) -> list[str]:
    """Faults that can be had there; who would notice that a single process hangs, hangs itself."""
    here = [name for name, fault in FAULTS.items() if cluster.executor in fault.executors]
    return [name for name in here if name != "hang" or processes > 1]


@dataclass
class Outcome:
    """One fault: ``lost`` updates were made twice, the next new one came ``back_s`` seconds later; ``same`` as the twin."""

    fault: str
    at_step: int
    from_step: int | None = None
    lost: int | None = None
    back_s: float | None = None
    same: bool | None = None
    note: str = ""
    missed: bool = False  # it happened a moment too late to be this fault

    @property
    def good(self) -> bool:
        fault = FAULTS[self.fault]
        if self.lost is None or not self.same or self.missed:
            return False
        if fault.by_itself and self.note != BY_ITSELF:
            return False
        # a checkpoint may still be written when the next one is due, and a damaged one hides the one before
        intervals = 3 if self.fault in DAMAGES else 2
        return self.lost <= (0 if fault.warned else intervals * INTERVAL)

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "what": FAULTS[self.fault].what, "how": FAULTS[self.fault].how, "good": self.good}


def rehearsed(experiment: Experiment, faults: Sequence[str], train_images: int) -> Experiment:
    """The experiment, shortened: its network, optimizer and data, with few steps that are checkpointed often.

    Args:
        train_images: those that it would train on.
    """
    batch = experiment.data.batch_size
    kept = min(EPOCH_STEPS * batch, train_images)
    steps = -(-kept // batch)
    needed = STEPS * len(faults) + SLOW_STEPS * ("time-limit" in faults)
    warm_up = math.ceil(getattr(experiment.schedule, "warmup_epochs", 0.0))
    epochs = max(2 + -(-needed // steps), warm_up + 1)
    values = experiment.model_dump(mode="json", exclude_unset=True)
    values |= {"name": f"drill-{experiment.name}"[:64], "epochs": epochs, "claim": None}
    if kept < train_images:
        values["data"]["train_images"] = kept
    # a graph that is replayed would not wait after its steps
    shorter = {"log_every_steps": 1, "evaluate_every_epochs": epochs // 2, "early_stopping": None, "graph": False}
    values["training"] = values.get("training", {}) | shorter
    values["checkpoint"] = values.get("checkpoint", {}) | {"every_steps": INTERVAL, "keep_last": 3}
    values["tracking"] = {"wandb": "online", "project": "hpc-cifar-drill"}
    values["resources"] = values.get("resources", {}) | {"hang_timeout_s": HANG_S}
    if "time-limit" in faults:
        values["resources"]["time"] = LIMIT
    return Experiment.model_validate(values)


class Drill:
    """One rehearsal: two runs below ``root``, of which one is disturbed.

    Args:
        say: prints one line.
    """

    def __init__(
        self, experiment: Experiment, cluster: Cluster, root: Path, data_root: Path, seed: int, say: Callable[[str], None]
    ) -> None:
        self.experiment, self.root, self.data_root, self.say = experiment, root, data_root, say
        self.dice = random.Random(seed)
        silent = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}  # W&B is gone throughout
        self.cluster = cluster.model_copy(
            update={
                "environment": {**cluster.environment, **silent, "HPC_CIFAR_DRILL": str(PACE_S)},
                "signal_delay_s": min(cluster.signal_delay_s, 30),
            }
        )
        self.twin_cluster = cluster
        self.number = 0
        self.damaged: dict[Path, float] = {}  # when each was, the last one last
        self.from_step = 0

    # ---- the whole -----------------------------------------------------------------------------------------------------

    def run(self, faults: list[str]) -> list[Outcome]:
        """Train both; disturb one. The outcomes, in order."""
        quiet = self.experiment.model_copy(
            update={"tracking": self.experiment.tracking.model_copy(update={"wandb": "disabled"})}
        )
        self.victim = submit.submit(self.experiment, self.cluster, root=self.root, data_root=self.data_root).run
        try:
            self.twin = submit.submit(quiet, self.twin_cluster, root=self.root, data_root=self.data_root).run
            outcomes = []
            for name in faults:
                for _ in range(AGAIN):
                    outcomes.append(self._strike(name))
                    if not outcomes[-1].missed:
                        break
            self._pace(0.0)
            for run, seen in zip((self.victim, self.twin), wait_all([self.victim, self.twin]), strict=True):
                if not run.finished():
                    raise RunError(f"{run.path}: {seen.state} ({seen.reason or 'no reason'}); it should have finished")
        finally:
            self.stop()
        self._compare(outcomes)
        pairs = zip(outcomes, [*outcomes[1:], None], strict=True)
        return [one for one, after in pairs if not (one.missed and after is not None and after.fault == one.fault)]

    def stop(self) -> None:
        """End what still runs, and jobs that still wait to continue what has ended."""
        for run in (self.victim, getattr(self, "twin", None)):
            if run is None:
                continue
            with contextlib.suppress(HpcCifarError):
                if not status(run).ended:
                    control.cancel(run)
            with contextlib.suppress(HpcCifarError):
                if self.cluster.executor == "slurm":
                    slurm.cancel([job.job_id for job in chain_of(run) if job.job_id])

    def remove(self) -> bool:
        """Remove the runs; whether all of it is gone. Processes of a run that has just finished still write, for moments."""
        deadline = time.monotonic() + END_S
        while time.monotonic() < deadline:
            jobs = [(run, job) for run in (self.victim, self.twin) for job in run.jobs()]
            if not any(process.survivors(controller_of(run, job)) for run, job in jobs):
                shutil.rmtree(self.root, ignore_errors=True)
            if not self.root.exists():
                return True
            time.sleep(0.2)
        return False

    def _compare(self, outcomes: list[Outcome]) -> None:
        """Whether the losses from each fault to the next are those of the twin, to the last digit."""
        ours, twins = self._losses(self.victim), self._losses(self.twin)
        for outcome, after in zip(outcomes, [*outcomes[1:], None], strict=True):
            if outcome.from_step is not None:
                last = after.at_step if after else max(twins)
                steps = range(outcome.from_step + 1, last + 1)
                outcome.same = all(step in ours and ours[step] == twins.get(step) for step in steps)

    def _losses(self, run: Run) -> dict[int, float]:
        return {row["step"]: row["train_loss"] for row in files.read_json_lines(run.metrics_file) if row.get("kind") == "step"}

    # ---- one fault -----------------------------------------------------------------------------------------------------

    def _strike(self, name: str) -> Outcome:
        fault = FAULTS[name]
        wanted = self.from_step + self.dice.randint(2, 2 + 2 * INTERVAL)
        self._until(lambda: self._step() >= wanted, f"step {wanted}")
        self._until(lambda: self._whole() >= WHOLE.get(name, 0), "its checkpoints")
        starts, before = len(self._starts()), self._lost()
        began, clock = time.time(), time.monotonic()
        self._do(name)
        outcome = Outcome(name, self._step())
        resumed = self._back(starts)
        outcome.note = RESUMED if resumed else BY_ITSELF
        if name == "time-limit":
            self._pace(PACE_S)
        start = self._starts()[-1]
        outcome.from_step = self.from_step = int(start["step"])
        if name == "kill-in-save":  # what it was writing is still there, until the next one is written
            outcome.missed = not list(self.victim.checkpoints.glob(".step-*.new"))
        elif name in DAMAGES:
            outcome.missed = outcome.from_step >= _step_of(list(self.damaged)[-1])
        self._until(lambda: self._step() > self.from_step, "the next step")
        [first, *_] = [row for row in self._rows() if row["kind"] == "step" and row["step"] > self.from_step]
        # by the time of its row; a clock that is set meanwhile, or differs there, changes nothing past what was waited here
        outcome.back_s = round(min(max(0.0, float(first["time"]) - began), time.monotonic() - clock), 1)
        outcome.lost = self._lost() - before
        outcome.at_step = outcome.from_step + outcome.lost
        self.say(
            f"{fault.what}: at step {outcome.at_step}, on from step {outcome.from_step} {outcome.note}, "
            f"{outcome.lost} lost, {outcome.back_s:.1f} s" + ("; a moment too late, so again" if outcome.missed else "")
        )
        return outcome

    def _do(self, name: str) -> None:
        """The fault itself, and that it has happened."""
        ranks = list(range(self.victim.state().world_size or 1))
        match name:
            case "preempt":
                self._signal()
            case "requeue":
                self._slurm("scontrol", "requeue", self._job_id())
            case "time-limit":
                self._pace(SLOW_S)  # and wait
            case "kill-one":
                self._order("kill", [self.dice.choice(ranks)])
            case "kill-all":
                self._order("kill", ranks)
            case "kill-in-save":
                self._order("kill in a save", [0])
            case "hang":
                self._order("stop", [self.dice.choice(ranks)])
            case "disk-full":
                newest = self._checkpoints()[-1]
                self._order("write no more", [0], bytes=newest.stat().st_size // 2)
            case "truncated" | "flipped":
                self._damage(name)
                self._order("kill", ranks)

    def _pace(self, seconds: float) -> None:
        files.write_json(self.victim.path / "drill" / "pace", seconds, durable=False)

    def _damage(self, name: str) -> None:
        path = self._checkpoints()[-1]
        data = bytearray(path.read_bytes())
        if name == "truncated":
            data = data[: len(data) // 2]
        else:
            data[self.dice.randrange(len(data))] ^= 1 << self.dice.randrange(8)
        path.write_bytes(data)
        self.damaged.pop(path, None)
        self.damaged[path] = _written(path)

    def _checkpoints(self) -> list[Path]:
        """Those that there are, oldest first; a damaged one is among them until somebody has tried to read it."""
        return sorted(self.victim.checkpoints.glob("step-*/state.pt"))

    def _whole(self) -> int:
        """How many checkpoints are whole, from the newest back to the first damaged one."""
        found = self._checkpoints()[::-1]
        return next((n for n, path in enumerate(found) if _written(path) == self.damaged.get(path, -1)), len(found))

    def _order(self, act: str, ranks: list[int], **more: int) -> None:
        folder = self.victim.path / "drill"
        self.number += 1
        files.write_json(folder / "order.json", {"number": self.number, "act": act, "ranks": ranks, **more})
        said = [folder / f"{self.number}-rank-{rank}.json" for rank in ranks]
        # one that is killed may take the others with it before they have spoken
        heard = any if act == "kill" else all
        self._until(lambda: heard(path.exists() for path in said), f"the ranks to do it: {act}", ACK_S)

    def _signal(self) -> None:
        """What announces a preemption."""
        name = script.preemption_signal_name()
        if self.cluster.executor == "slurm":
            self._slurm("scancel", f"--signal={name}", self._job_id())
            return
        process.signal_exactly(controller_of(self.victim, self.victim.last_job()), signal.Signals[f"SIG{name}"])

    def _slurm(self, *command: str) -> None:
        reply = slurm.ask(list(command), timeout_s=slurm.TIMEOUT_S)
        if reply.code != 0:
            words = f"Slurm did not answer ({script.slurm_words(reply.err)})" if reply.unanswered else reply.err.strip()
            raise LaunchError(f"{' '.join(command)}: {words}")

    def _job_id(self) -> str:
        return slurm.checked_ids([str(status(self.victim).job_id)])[0]

    # ---- what the run says -----------------------------------------------------------------------------------------------

    def _rows(self) -> list[dict[str, Any]]:
        return files.read_json_lines(self.victim.metrics_file)

    def _step(self) -> int:
        """The last one that was logged by a segment that trains."""
        return max((row["step"] for row in self._rows() if row["kind"] == "step"), default=0)

    def _starts(self) -> list[dict[str, Any]]:
        return [row for row in self._rows() if row.get("event") == "started"]

    def _lost(self) -> int:
        """Updates that were made twice, as the run counts them; all so far."""
        return int((self._starts() or [{}])[-1].get("lost_steps") or 0)

    def _back(self, starts: int) -> bool:
        """Wait until it trains again; whether that took a ``resume``."""
        resumed = False

        def ended(seen: Status) -> bool:
            nonlocal resumed
            if seen.state == "finished":
                raise RunError(f"{self.victim.path}: it finished before it was disturbed; give the job more --set epochs=N")
            if resumed:
                return False
            if not is_live(self.victim):  # else its other ranks still have some seconds
                control.resume(self.victim, data_root=self.data_root, cluster=self.cluster)
                resumed = True
            return True

        self._until(lambda: len(self._starts()) > starts, "it to train again", ended=ended)
        return resumed

    def _until(
        self,
        condition: Callable[[], bool],
        what: str,
        seconds: float = BACK_S,
        ended: Callable[[Status], bool] = lambda seen: False,
    ) -> None:
        """Wait; the time in the queue does not count. ``ended`` is asked whether a run that has ended is worth waiting for."""
        looked, waited = time.monotonic(), 0.0
        while not condition():
            time.sleep(POLL_S)
            if time.monotonic() - looked < LOOK_S:
                continue
            seen = status(self.victim)
            waited += 0 if seen.state in ("pending", "requeued") else time.monotonic() - looked
            looked = time.monotonic()
            if seen.ended and condition():
                return
            if waited > seconds or (seen.ended and not ended(seen)):
                raise RunError(f"{self.victim.path}: waited for {what}, and it is {seen.state} ({seen.reason or 'no reason'})")


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.parent.name.removeprefix("step-"))


def _written(path: Path) -> float:
    """When; 0 if it has gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
