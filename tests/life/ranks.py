"""The ranks of one segment of a run, in virtual time: they train, hear signals, lose each other, and end the segment.

They do what ``launch/job.py``, ``launch/own_job.py`` and ``train/`` do; the decision and its execution are the real ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from life.edges import AGAIN_LOCALLY
from life.own import Killed
from life.slurm import KILL_WAIT_S, Job

from hpc_cifar.launch.policy import Action, Event, Word

if TYPE_CHECKING:
    from life.world import World

SRUN_S = 1.0  # until it tells the tasks of a job that one has died
PEER_GRACE_S = 5.0  # of the controller on this machine
MEETING_S = 60.0
CLOSING_S = 2.0  # from the result to the end of the processes


@dataclass(frozen=True)
class Work:
    """What is trained; times in seconds."""

    ranks: int = 2
    nodes: int = 1
    python_s: float = 2  # until signals are heard
    start_s: float = 10
    step_s: float = 1
    steps: int = 300
    save_every: int = 50
    save_s: float = 1
    hang_timeout_s: float = 45


@dataclass
class Rank:
    number: int
    node: int
    alive: bool = True
    listens: bool = False
    leaving: bool = False  # nothing interrupts it any more
    hangs: bool = False
    heard: set[str] = field(default_factory=set)
    code: int | None = None


class Segment:
    """From the start of a job to the end of its processes."""

    def __init__(self, world: World, job: Job) -> None:
        self.world, self.job, self.work, self.clock = world, job, world.work, world.clock
        self.run = job.run
        self.restart = job.restarts
        self.name = f"{job.id}.{job.restarts}"
        self.ranks = [Rank(number, number % self.work.nodes) for number in range(self.work.ranks)]
        self.phase = "python"
        self.words: list[Word] = []
        self.settled: list[Action] = []
        self.sent_back = 0
        self.lost_how = ""  # kill, oom: what the log tells
        self.lost_rank = 0
        self.fault = ""  # what happened to it
        self.truth: str | None = None  # what ended its job when it first asked Slurm; "" if nothing did
        self.first_step = self.step = 0
        self.trains_since = 0.0
        self.dead_nodes: dict[int, float] = {}
        self.is_over = False
        self.claimed = False
        self._stopping = self._srun_told = False
        for rank in self.ranks:
            self.clock.after(self.work.python_s * (1 + 0.2 * rank.number), self._listen, rank)

    # ---- time and processes ------------------------------------------------------------------------------------------------

    def spend(self, rank: Rank, seconds: float) -> None:
        """Let a rank work for a while."""
        if seconds:
            self.clock.advance(seconds, lambda: rank.alive)
        if not rank.alive:
            raise Killed

    def leave(self, rank: Rank, code: int) -> None:
        if not rank.alive:
            return
        rank.alive, rank.code = False, code
        if code and self.world.site.slurm:
            self._srun_tells()
        elif code not in (0, AGAIN_LOCALLY):
            self.clock.after(PEER_GRACE_S, self.kill_all)
        self.check_over()

    def _srun_tells(self) -> None:
        """A task has ended badly: srun ends the others."""
        if not self._srun_told:
            self._srun_told = True
            self.clock.after(SRUN_S, self.told, "TERM")
            self.clock.after(SRUN_S + KILL_WAIT_S, self.kill_all)

    def kill_all(self) -> None:
        for rank in self.ranks:
            if rank.alive:
                rank.alive, rank.code = False, 137
        self.check_over()

    def check_over(self) -> None:
        waits = any(rank.alive or rank.node in self.dead_nodes for rank in self.ranks)
        if not waits and not self.is_over:
            self.is_over = True
            self.clock.after(0.1, self.world.segment_over, self)

    def buried(self, node: int) -> None:
        """Slurm no longer waits for the processes of a node."""
        self.dead_nodes.pop(node, None)
        self.check_over()

    # ---- the way to training -----------------------------------------------------------------------------------------------

    def _listen(self, rank: Rank) -> None:
        if not rank.alive:
            return
        rank.listens = True
        if rank.number == 0:
            if word := self.world.leaves_at_once(self):
                self.world.say(f"{self.name}: nothing to do, {word}")
                for one in self.ranks:
                    self.leave(one, 0)
                return
            self.clock.after(self.work.start_s, self._started)
        self.phase = "start"

    def _started(self) -> None:
        if self.phase != "start" or not self.ranks[0].alive or self.ranks[0].leaving:
            return
        if not all(rank.alive and rank.listens and not rank.hangs for rank in self.ranks):
            self.phase = "meeting"
            self.clock.after(MEETING_S, self._not_met)
        elif self.world.site.slurm and self.world.strikes("bad node", self):
            self.fault = "bad node"
            self.phase = "over"
            self._settle(self.ranks[0], Event.NODE_BAD, "preflight failed: n1: no GPU", exclude=["n1"])
            for rank in self.ranks[1:]:
                self.leave(rank, 0)
        else:
            self._lock(self.world.lock_wait_s)

    def _not_met(self) -> None:
        left = [rank for rank in self.ranks if rank.alive and not rank.leaving]
        if self.phase == "meeting" and left:
            self.fault = self.fault or "bad node"
            self.phase = "over"
            for rank in left:
                self._settle(rank, Event.NODE_BAD, "preflight failed: a node does not answer")

    def _lock(self, patience_s: float) -> None:
        if not self.ranks[0].alive or self.phase == "over":
            return
        self.phase = "lock"
        free_in = self.run.lock_free_at - self.clock.now
        if free_in > 0 and patience_s > 0:
            wait = min(free_in, patience_s)
            self.clock.after(wait, self._lock, patience_s - wait if wait < patience_s else 0)
        elif free_in > 0:
            self.fault = "lock"
            self.phase = "over"
            for rank in self.ranks:
                if rank.alive:
                    self._settle(rank, Event.LOCK_HELD, "the lock is held by job .. on n1, which has died")
        else:
            self._train()

    def _train(self) -> None:
        self.world.trains(self)
        self.phase = "train"
        self.step = self.first_step = self.run.step
        self.trains_since = self.clock.now
        self.clock.after((self.work.steps - self.step) * self.work.step_s, self._finish)
        for delay, what, rank in self.world.due(self):
            self.clock.after(delay, self.strike, what, rank)
        if any(rank.heard for rank in self.ranks):
            self._stop_soon()

    def progress(self) -> None:
        """Steps and checkpoints up to now."""
        if self.phase == "train":
            elapsed = self.clock.now - self.trains_since
            self.step = min(self.work.steps, self.first_step + int(elapsed / self.work.step_s))
            saved = int(max(0.0, elapsed - self.work.save_s) / self.work.step_s) + self.first_step
            self.world.saved(self, saved // self.work.save_every * self.work.save_every)

    # ---- how it ends -------------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        if self.phase == "train" and all(rank.alive for rank in self.ranks) and not self._stopping:
            self.progress()
            self.phase = "closing"
            self.world.finishes(self)
            self.clock.after(CLOSING_S, self._closed)

    def _closed(self) -> None:
        for rank in self.ranks:
            if not rank.leaving:
                self.leave(rank, 0)

    def told(self, signal: str) -> None:
        """A signal reaches the tasks."""
        if self.world.signal_is_lost():
            return
        for rank in self.ranks:
            if not rank.alive or not rank.listens or rank.leaving:
                continue
            rank.heard.add(signal)
            if self.phase in ("start", "meeting"):
                self.clock.after(0.05, self._early, rank)
        if self.phase == "train":
            self._stop_soon()

    def _stop_soon(self) -> None:
        """All ranks stop one step after the first of them was told."""
        if not self._stopping:
            self._stopping = True
            done = (self.clock.now - self.trains_since) / self.work.step_s
            self.clock.after((math.floor(done) + 2 - done) * self.work.step_s, self._boundary)

    def _early(self, rank: Rank) -> None:
        """A signal before training listens ends the process."""
        if not rank.alive or rank.leaving or self.phase not in ("start", "meeting"):
            return
        rank.leaving = True
        preempted = "USR" in rank.heard
        if not preempted and self.world.failure(self):
            self.leave(rank, 1)
        elif self.run.finished or self.world.store(self).records(self.job.id).cancelled():
            self.world.cancelled_early(self, rank)
            self.leave(rank, 0)
        elif rank.number == 0 and (preempted or self.world.site.slurm):
            self._settle(rank, Event.PREEMPTED if preempted else Event.TERMINATED)
        else:
            if not preempted and not self.world.site.slurm:
                self.world.stopped_by_term(self)
            self.leave(rank, 0)

    def _boundary(self) -> None:
        if self.phase == "train" and all(rank.alive and not rank.hangs for rank in self.ranks):
            self.progress()
            self.phase = "saving"
            preempted = any("USR" in rank.heard for rank in self.ranks)
            self.clock.after(self.work.save_s, self._stopped, Event.PREEMPTED if preempted else Event.TERMINATED)

    def _stopped(self, event: Event) -> None:
        if self.phase != "saving" or not all(rank.alive for rank in self.ranks):
            return
        self.world.saved(self, self.step)
        self.phase = "over"
        for rank in self.ranks[1:]:
            self.leave(rank, 0)
        if event is Event.TERMINATED and not self.world.site.slurm:
            self.world.stopped_by_term(self)
            self.leave(self.ranks[0], 0)
        else:
            self._settle(self.ranks[0], event)

    def strike(self, what: str, number: int) -> None:
        """Something happens to a rank."""
        rank = self.ranks[number % len(self.ranks)]
        if self.is_over or not rank.alive:
            return
        self.world.met.add(what)
        self.progress()
        if what == "usr":
            self.told("USR")
        elif what == "term":
            self.fault = self.fault or what
            self.told("TERM")
        elif what in ("kill", "oom"):
            self.world.say(f"{self.name}: rank {rank.number} is killed{' for memory' if what == 'oom' else ''}")
            self.fault, self.lost_how, self.lost_rank = what, what, rank.number
            self._dies(rank)
            if self.world.site.slurm:
                self._srun_tells()
            else:
                self.clock.after(PEER_GRACE_S, self.kill_all)
            self.check_over()
        elif what == "node fails" and self.world.site.slurm:
            self._node_fails(rank.node)
        elif what == "hang" and self.phase == "train":
            self.world.say(f"{self.name}: rank {rank.number} hangs")
            rank.hangs = True
            self.clock.after(self.work.hang_timeout_s, self._hung)
        elif what in ("fail", "prune") and self.phase == "train" and not rank.leaving:
            self.world.say(f"{self.name}: {'rank fails for good' if what == 'fail' else 'pruned'}")
            self.phase = "over"
            if what == "prune":
                self.world.pruned(self)
                for one in self.ranks:
                    self.leave(one, 0)
            else:
                rank.leaving = True
                self.clock.after(self.world.site.store_s, self._fails, rank)
                self._lose_contact()

    def _fails(self, rank: Rank) -> None:
        if rank.alive:
            self.world.fails(self, rank.number)
            self.leave(rank, 1)

    def _dies(self, rank: Rank) -> None:
        rank.alive, rank.code = False, 137
        if self.phase in ("train", "saving", "closing"):
            self._lose_contact()

    def _lose_contact(self) -> None:
        for rank in self.ranks:
            if rank.alive and not rank.leaving:
                self.clock.after(0.2 + 0.01 * rank.number, self._lost, rank)

    def _node_fails(self, node: int) -> None:
        self.world.say(f"{self.name}: node {node} dies")
        self.fault = self.fault or "node fails"
        silent = self.world.site.silent_loss
        self.dead_nodes[node] = self.clock.now
        if node == self.ranks[0].node:
            self.run.lock_free_at = self.clock.now + self.world.site.lease_s
        phase = self.phase
        for rank in self.ranks:
            if rank.node == node and rank.alive:
                rank.alive, rank.code = False, 137
        if phase in ("train", "saving"):
            if silent:
                self.clock.after(self.work.hang_timeout_s, self._hung)
            else:
                self._lose_contact()
        self.clock.after(self.world.site.notice_s, self.world.slurm.node_missed, self.job, self, node)

    def _hung(self) -> None:
        left = [rank for rank in self.ranks if rank.alive and not rank.leaving]
        if self.phase in ("train", "saving") and left:
            self.fault = self.fault or "hang"
            self.phase = "over"
            for rank in left:
                rank.leaving = True
            for rank in left:
                self._settle(rank, Event.HUNG, "no step for 45 s")

    def _lost(self, rank: Rank) -> None:
        if rank.alive and not rank.leaving:
            self.phase = "over"
            if self.world.site.slurm:
                self._settle(rank, Event.RANK_LOST, "lost contact with another rank")
            else:
                self.leave(rank, 1)

    def _settle(self, rank: Rank, event: Event, detail: str = "", exclude: Sequence[str] = ()) -> None:
        """The real decision, by this rank; its process ends with it."""
        rank.leaving = True
        if not rank.alive:
            return
        if self.world.at_work not in (None, self):  # of an array; one after the other, as calls within calls have no end
            self.clock.after(0.05, self._settle, rank, event, detail, exclude)
            return
        before, self.world.at_work = self.world.at_work, self
        try:
            action = self.world.settle(self, rank, event, detail, exclude)
        except Killed:
            self.world.say(f"{self.name}: rank {rank.number} is killed as it ends the segment")
            return
        finally:
            self.world.at_work = before
        again = action is not None and action.goes_on and not self.world.site.slurm
        if not self.world.site.slurm and action is None:
            again = self.world.store(self).state()[0] == "requeued"
        failed = action.state == "failed" if action is not None else self.world.store(self).state()[0] == "failed"
        self.leave(rank, AGAIN_LOCALLY if again else int(failed or event is Event.HUNG))
