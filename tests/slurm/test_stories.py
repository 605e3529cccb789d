"""Twenty-six stories of runs, each played by the model (tests/life) and on a real Slurm: both end alike, after as many starts.

A lane of stories has a node for itself, so that a preemption there meets no other story.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from slurm_site import CHAIN, EPOCH_STEPS, PROFILE, Site, SlurmCluster, assert_same, running_cluster

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from life import slurm as virtual
from life import stories
from life.ranks import Work
from life.world import Happening, Story

from hpc_cifar import files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.component("slurm")]

NODES = ("n1", "n2", "n3")
LINKS = CHAIN.replace("chain_links: 10", "chain_links: 2") + "preemptible: true\nsignal_delay_s: 30\n"
STEP_S = 0.3  # in virtual time
QUICK_S, SLOW_S = 0.05, 3.0  # a step of the first epoch of a start, and a later one: no run ends before all is done to it
HANG_S, APART_S = 10, 30.0  # APART_S: between two acts, in virtual time
NO_CHECKPOINT = ("--set", "checkpoint.every_epochs=3000", "--set", "data.validation=test")


@dataclass(frozen=True)
class Told:
    """A story: what is done to the run, each time once it trains, and what comes of it.

    Attributes:
        state: in which it ends.
        starts: of its training.
        words: in the reason.
        ranks: on one node.
        partition: low6 has a grace time of 6 s, low0 none.
        allowed: faults without a checkpoint in between, after which the run still goes on.
        acts_at_once: those that follow an act before the run has trained again.
    """

    acts: tuple[str, ...]
    state: str = "finished"
    starts: int = 1
    words: str = ""
    ranks: int = 1
    chain: bool = False
    partition: str = "low6"
    allowed: int = 5
    checkpoints: bool = True
    acts_at_once: tuple[str, ...] = ()


STORIES = {
    "nothing happens": Told(()),
    "preempted with a grace time": Told(("preempt",), starts=2),
    "preempted without a grace time": Told(("preempt",), starts=2, partition="low0"),
    "preempted three times, two ranks": Told(("preempt",) * 3, starts=4, ranks=2),
    "requeued by an administrator": Told(("requeue",), starts=2),
    "requeued twice": Told(("requeue", "requeue"), starts=3, ranks=2),
    "warned of the time limit": Told(("usr",), starts=2),
    "warned three times": Told(("usr", "usr", "usr"), starts=4),
    "the only rank is killed": Told(("kill",), starts=2),
    "one rank of two is killed": Told(("kill",), starts=2, ranks=2),
    "one rank of two is killed wherever it gets": Told(
        ("kill", "kill"), "failed", 2, "was killed by signal 9", ranks=2, allowed=1, checkpoints=False
    ),
    "killed with a checkpoint in between": Told(("kill", "kill", "kill"), starts=4, ranks=2, allowed=1),
    "killed, preempted, killed": Told(("kill", "preempt", "kill"), starts=4, ranks=2),
    "a rank hangs": Told(("hang",), starts=2, ranks=2),
    "all ranks are told to end, by nobody": Told(("term",), starts=2, ranks=2),
    "the loss is not finite": Told(("fail",), "failed", 1, "loss"),
    "scancel": Told(("scancel",), "cancelled"),
    "scancel of two ranks": Told(("scancel",), "cancelled", ranks=2),
    "cancel": Told(("cancel",), "cancelled"),
    "cancel in the second start": Told(("preempt", "cancel"), "cancelled", 2),
    "cancel in the grace time": Told(("preempt",), "cancelled", 1, acts_at_once=("cancel",)),
    "a link takes over after a preemption": Told(("preempt",), starts=2, chain=True),
    "a link takes over after the warning": Told(("usr",), starts=2, chain=True),
    "a link takes over after a kill": Told(("kill",), starts=2, ranks=2, chain=True),
    "the links of a cancelled run do nothing": Told(("cancel",), "cancelled", chain=True),
    "the links of a job ended by scancel do nothing": Told(("scancel",), "cancelled", chain=True),
}


# ---- in virtual time -------------------------------------------------------------------------------------------------------


def in_virtual_time(told: Told) -> tuple[str, int]:
    """The state that the model ends with, and how often it trained."""
    site = virtual.Site(
        requeue=not told.chain, links=2 if told.chain else 0, preemptible=True, restarts_allowed=told.allowed,
        grace_s=0 if told.partition == "low0" else 6, warning_s=30, limit_s=600, hold_s=1,
    )  # fmt: skip
    work = Work(
        ranks=told.ranks, python_s=1, start_s=3, step_s=STEP_S, steps=int((len(told.acts) + 1) * APART_S / STEP_S),
        save_every=EPOCH_STEPS if told.checkpoints else 10**6, save_s=0.2, hang_timeout_s=HANG_S,
    )  # fmt: skip
    last = told.ranks - 1
    acts = [Happening(what, at=APART_S * (number + 0.5), rank=last) for number, what in enumerate(told.acts)]
    acts += [Happening(what, at=acts[-1].at + 1 + number) for number, what in enumerate(told.acts_at_once)]
    world = stories.play(Story(site, work, tuple(acts)))
    assert not world.wrong, stories.told(world.story, next(iter(world.wrong)))
    [run] = world.runs
    return "cancelled" if run.marked else run.store.state()[0], run.trained  # as `status` says it


# ---- on a real cluster -----------------------------------------------------------------------------------------------------


@dataclass
class Played:
    """What came of it."""

    status: Mapping[str, Any]
    starts: int
    result: Mapping[str, Any]
    steps: list[int]
    logs: str


class Player:
    """One story on the node of its lane."""

    def __init__(self, cluster: SlurmCluster, folder: Path, digits: Path, node: str, told: Told) -> None:
        folder.mkdir()
        self.told, self.node = told, node
        self.site = Site(cluster, folder, digits)
        self.site.step_takes(QUICK_S, after_an_epoch=SLOW_S)
        pinned = f"partition: {told.partition}\nsbatch_extra: {{nodelist: {node}}}\n"
        self.site.profile("testbed", (LINKS if told.chain else PROFILE).replace("partition: low\n", pinned))
        endless = () if told.state == "finished" else ("--set", "epochs=3000")
        options = (
            *("--nodes", "1", "--set", f"resources.processes_per_node={told.ranks}"), *endless,
            *("--set", f"resources.fault_restarts={told.allowed}"), *(() if told.checkpoints else NO_CHECKPOINT),
            *(("--set", f"resources.hang_timeout_s={HANG_S}") if "hang" in told.acts else ()),
            *(("--set", "optimizer.lr=1e30") if "fail" in told.acts else ()),
        )  # fmt: skip
        self.run, _ = self.site.submit(*options)
        self.jobs = [str(row["job_id"]) for row in files.read_json_lines(self.site.runs / self.run / "jobs.jsonl")]
        self.segments: list[str] = []

    def play(self) -> Played:
        for what in self.told.acts:
            if what != "fail":
                self._trains()
            getattr(self, f"_{what}")()
        for what in self.told.acts_at_once:
            getattr(self, f"_{what}")()
        if self.told.state == "finished":
            if self.told.acts:
                self._trains(steps=1)
            self.site.hasten()
        self.site.call("wait", self.run, code=0 if self.told.state == "finished" else 1)
        self.site.cluster.until(lambda: not self._queued(), 90, f"the jobs of {self.run} have ended")
        events = [row["event"] for row in self.site.rows(self.run, "event")]
        result = self.site.result(self.run) if self.told.state == "finished" else {}
        steps = [row["step"] for row in self.site.rows(self.run, "step")]
        return Played(self.site.status(self.run), events.count("started"), result, steps, self.site.logs())

    def _queued(self) -> list[str]:
        queue = self.site.cluster.call("squeue", "--noheader", "--format=%i").split()
        return [job for job in self.jobs if job in queue]

    def _beat(self, rank: int) -> dict[str, Any]:
        found = files.read_json(self.site.runs / self.run / "heartbeat" / f"rank-{rank}.json")
        return found if isinstance(found, dict) else {}

    def _trains(self, steps: int | None = None) -> None:
        """Until all ranks have made so many steps (enough for a checkpoint) of a start in which nothing was done yet."""
        wanted = steps or (EPOCH_STEPS if self.told.checkpoints else 2)  # the end of an epoch is among so many

        def do() -> bool:
            beats = [self._beat(rank) for rank in range(self.told.ranks)]
            names = {str(beat.get("segment", "")) for beat in beats}
            if len(names) > 1 or names & {"", *self.segments}:
                return False
            begun = [row["step"] for row in self.site.rows(self.run, "event") if row["event"] == "started"]
            if len(begun) <= len(self.segments):
                return False
            return all(beat["phase"] == "train" and beat["step"] >= begun[-1] + wanted for beat in beats)

        self.site.cluster.until(do, 300, f"{self.run} trains after {self.segments}\n{self.site.logs()}")
        self.segments.append(str(self._beat(0)["segment"]))

    @property
    def _job(self) -> str:
        return self.segments[-1].rpartition(".")[0]

    def _signal(self, number: signal.Signals) -> None:
        os.kill(int(self._beat(self.told.ranks - 1)["pid"]), number)

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _hang(self) -> None:
        self._signal(signal.SIGSTOP)

    def _fail(self) -> None:
        """By its learning rate."""

    def _usr(self) -> None:
        self.site.cluster.call("scancel", "--signal=USR2", self._job)

    def _term(self) -> None:
        self.site.cluster.call("scancel", "--signal=TERM", self._job)

    def _scancel(self) -> None:
        self.site.cluster.call("scancel", self._job)

    def _cancel(self) -> None:
        self.site.call("cancel", self.run)

    def _requeue(self) -> None:
        self.site.cluster.call("scontrol", "requeue", self._job)

    def _preempt(self) -> None:
        high = self.site.cluster.batch("--partition=high", f"--nodelist={self.node}", "--exclusive", script="sleep 1")
        job = self._job
        self.site.cluster.until(
            lambda: self.site.state(self.run).get("state") == "requeued" or self.site.cluster.state(job) != "RUNNING",
            60, "the preemption",
        )  # fmt: skip
        if not self.told.acts_at_once:
            self.site.cluster.wait(high)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with running_cluster(tmp_path_factory.mktemp("stories"), "--preempt-send-user-signal", "--cpus", "2") as made:
        yield made


@pytest.fixture(scope="module")
def played(
    cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory, digits_data: Path
) -> Iterator[Callable[[str], Played]]:
    """All stories, three at a time; the result of one, by name."""
    folder = tmp_path_factory.mktemp("players")

    def lane(node: str) -> dict[str, Future[Played]]:
        found: dict[str, Future[Played]] = {}
        for number, (name, told) in list(enumerate(STORIES.items()))[NODES.index(node) :: len(NODES)]:
            found[name] = Future()
            try:
                found[name].set_result(Player(cluster, folder / str(number), digits_data, node, told).play())
            except BaseException as error:  # which the story's test raises
                found[name].set_exception(error)
                queued = cluster.call("squeue", "--noheader", "--format=%i", f"--nodelist={node}").split()
                cluster.call("scancel", *queued) if queued else None
        return found

    with ThreadPoolExecutor(len(NODES)) as pool:
        done = {name: future for lane_ in pool.map(lane, NODES) for name, future in lane_.items()}
    yield lambda name: done[name].result()


@pytest.mark.parametrize("name", STORIES)
def test_a_story_ends_as_in_the_model(
    name: str, played: Callable[[str], Played], undisturbed: dict[int, dict[str, Any]]
) -> None:
    told = STORIES[name]
    seen = played(name)
    found = f"{seen.status}\n{seen.logs}"
    assert (seen.status["state"], seen.starts) == (told.state, told.starts), found
    assert in_virtual_time(told) == (told.state, told.starts)
    assert told.words in (seen.status["reason"] or ""), found
    if told.state == "finished":
        assert_same(seen.result, {**undisturbed[told.ranks]})
    if told.partition == "low6" and not {"kill", "hang", "term", "requeue"} & set(told.acts):
        assert seen.steps == sorted(set(seen.steps)), "a step was trained twice"
