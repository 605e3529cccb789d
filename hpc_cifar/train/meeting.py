"""Where the ranks of a job meet before they train: each leaves a report, rank 0 judges them, and all learn the verdict.

It is a TCP store of its own kind beside the process groups, because a node that cannot join those has to be named too.
"""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined, unused-ignore]  # not in __all__

POLL_S = 0.01
CONNECT_TRY_S = 5.0  # a stop signal is heard after this at the latest
READ_WAIT_S = 2.0  # for the others to read a bad verdict before rank 0 goes


@dataclass(frozen=True)
class Verdict:
    """What is wrong: node by node, or with all of them together. ``leader`` is the rank to act on it, None any rank."""

    bad: dict[str, str] = field(default_factory=dict)
    together: str = ""
    leader: int | None = 0

    @property
    def good(self) -> bool:
        return not self.bad and not self.together

    def __str__(self) -> str:
        return "; ".join([*(f"{node}: {why}" for node, why in self.bad.items()), *([self.together] if self.together else [])])


@dataclass(frozen=True)
class Report:
    """One rank's word: the node it is on, and what is wrong there."""

    node: str
    problems: tuple[str, ...] = ()


def judge(reports: Mapping[int, Report], nodes: Sequence[str], per_node: int, timeout_s: float, *, joint: bool) -> Verdict:
    """The verdict on what the ranks reported.

    Args:
        reports: of the ranks that answered in time.
        nodes: of the job, by Slurm's names.
        per_node: ranks of each.
        joint: whether the ranks did one thing together, so that one that is silent explains the problems of the others.
    """
    on = {node: [report for report in reports.values() if report.node == node] for node in nodes}
    silent = {node: f"no answer within {timeout_s:.0f} s" for node in nodes if len(on[node]) < per_node}
    told = {node: [problem for report in on[node] for problem in report.problems] for node in nodes}
    wrong = {node: "; ".join(dict.fromkeys(problems)) for node, problems in told.items() if problems}
    together = ""
    if joint and silent:
        wrong = {}
    elif joint and 2 * len(wrong) >= len(nodes):  # nobody can say whose fault it is
        together, wrong = next(iter(wrong.values())), {}
    bad = silent | wrong
    return Verdict(bad, together, min((rank for rank, report in reports.items() if report.node not in bad), default=0))


class Meeting:
    """The ranks that RANK, WORLD_SIZE and MASTER_ADDR/PORT describe; without a store in a single process.

    The server stays as long as the object of rank 0; the process group that is made later at the same address shares it.

    Args:
        node: this one; ``nodes`` are all of the job, that of rank 0 first.
        timeout_s: how long to wait for the others.
    """

    def __init__(self, node: str, nodes: Sequence[str], timeout_s: float) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.node, self.nodes, self.timeout_s = node, list(nodes), timeout_s
        self.store: Any = None
        self.absent: Verdict | None = None  # rank 0 could not be found
        if self.size > 1:
            self._connect()

    def _connect(self) -> None:
        deadline = time.monotonic() + self.timeout_s
        while self.store is None:
            try:
                tcp = TCPStore(
                    os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None, self.rank == 0,
                    timeout=datetime.timedelta(seconds=min(CONNECT_TRY_S, self.timeout_s)),
                    wait_for_workers=False, multi_tenant=True,
                )  # fmt: skip
                self.store = PrefixStore("preflight", tcp)
            except RuntimeError as error:  # as DistNetworkError is
                if self.rank == 0:
                    self.absent = Verdict(together=f"rank 0 cannot listen at port {os.environ['MASTER_PORT']}: {error}")
                    return
                if time.monotonic() > deadline:
                    self.absent = self._lost("cannot be reached")
                    return

    def _lost(self, why: str) -> Verdict:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        return Verdict({self.nodes[0]: f"rank 0 {why} at {address} within {self.timeout_s:.0f} s"}, leader=None)

    def agree(self, stage: str, problems: Sequence[str], *, joint: bool = False) -> Verdict:
        """Report this rank's problems; the verdict on all of them. Every rank calls it for every stage."""
        mine = Report(self.node, tuple(problems))
        if self.absent is not None:
            return self.absent
        if self.store is None:
            return judge({0: mine}, [self.node], 1, self.timeout_s, joint=False)
        try:
            self.store.set(f"{stage}/{self.rank}", json.dumps(asdict(mine)))
            return self._judge(stage, joint) if self.rank == 0 else self._hear(stage)
        except RuntimeError as error:
            if self.rank == 0:
                raise
            return self._lost(f"ended ({str(error).splitlines()[0][:100]})")

    def _judge(self, stage: str, joint: bool) -> Verdict:
        keys = {rank: f"{stage}/{rank}" for rank in range(self.size)}
        here = self._wait(list(keys.values()), self.timeout_s)
        reports: dict[int, Report] = {}
        for rank, key in keys.items():
            if here or self.store.check([key]):
                row: dict[str, Any] = json.loads(self.store.get(key))
                reports[rank] = Report(row["node"], tuple(row["problems"]))
        verdict = judge(reports, self.nodes, self.size // len(self.nodes), self.timeout_s, joint=joint)
        self.store.set(f"{stage}/verdict", json.dumps(asdict(verdict)))
        if not verdict.good:
            self._wait([f"{stage}/read/{rank}" for rank in reports if rank], READ_WAIT_S)
        return verdict

    def _hear(self, stage: str) -> Verdict:
        # rank 0 may have come later than this rank, and then waits for the others
        if not self._wait([f"{stage}/verdict"], 2 * self.timeout_s + READ_WAIT_S):
            return self._lost("said nothing")
        verdict = Verdict(**json.loads(self.store.get(f"{stage}/verdict")))
        self.store.set(f"{stage}/read/{self.rank}", "")
        return verdict

    def _wait(self, keys: list[str], seconds: float) -> bool:
        """Whether all keys are there in time; in short looks, since a blocking wait would keep signals out."""
        deadline = time.monotonic() + seconds
        while keys and not self.store.check(keys):
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True
