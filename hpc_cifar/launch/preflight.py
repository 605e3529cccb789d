"""What a job does on its nodes before it trains: stage the data, check every node, go elsewhere if one is bad.

A node that fails is named and excluded, and the job goes back to the queue once; a second failure without a checkpoint in
between ends the run. On Slurm only: a single machine has no other node to go to, and says itself what is wrong.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .. import files
from ..config.cluster import DEFAULT_PREFLIGHT_S
from ..data.staging import COPY_WAIT_S, Staged, staged
from ..errors import PreflightError, RunBusy
from ..runs import Run
from . import job
from .policy import Event

if TYPE_CHECKING:
    from ..train.meeting import Verdict
    from .own_job import OwnJob


@dataclass(frozen=True)
class Node:
    """This node, ready to train: where the data is, and what to record once the run is this job's alone."""

    run: Run
    staged: Staged

    @property
    def data_root(self) -> Path:
        return self.staged.data_root

    def record(self) -> None:
        """An event row on how the data was staged; rank 0, before the training loop opens the file."""
        if not self.staged.note:
            return
        state = self.run.state()
        row = {"kind": "event", "epoch": state.epoch or 0, "step": state.step or 0, "time": round(time.time(), 3)}
        facts = {"local": self.staged.local, "mib": round(self.staged.mib, 1), "seconds": round(self.staged.seconds, 3)}
        files.append_json_line(self.run.metrics_file, {**row, "event": "staged", **facts})


@contextlib.contextmanager
def ready(own: OwnJob, data_root: Path) -> Iterator[Node]:
    """Stage the run's dataset on this node and check the job's nodes; the copy lasts as long as the context.

    Args:
        own: this job; the variables of torchrun are set already.

    Raises:
        PreflightError: on one rank, if the nodes cannot train and the job must not be requeued for it.
        SystemExit: 0, if the job goes elsewhere, or another rank raises the error.
    """
    run, env = own.run, own.env
    data = run.experiment().data
    dataset, scratch = data.dataset, os.environ.get("HPC_CIFAR_SCRATCH", "")
    with staged(data_root, dataset, scratch, with_beton=data.pipeline == "ffcv") as found:
        if found.note:
            print(found.note, flush=True)
        timeout_s = _timeout_s()
        if env.cluster == "slurm" and timeout_s:
            # this node may have been quick while another one still copies
            _check(own, found, dataset, timeout_s + (COPY_WAIT_S if found.note else 0))
        yield Node(run, found)


def _timeout_s() -> float:
    """Seconds to wait for the other nodes; 0 leaves the checks out."""
    text = os.environ.get("HPC_CIFAR_PREFLIGHT_S", "")
    told = files.whole(text)
    return DEFAULT_PREFLIGHT_S if told is None else float(told)


def _check(own: OwnJob, found: Staged, dataset: str, timeout_s: float) -> None:
    from ..train import meeting, node_check

    run, env = own.run, own.env
    began = time.monotonic()
    plan = run.plan()
    gpu = plan is not None and plan.placement.gpus_per_node > 0
    place = {"gpu": gpu, "local_rank": env.local_rank, "local_size": int(os.environ["LOCAL_WORLD_SIZE"])}
    met = meeting.Meeting(job.node_name(), env.hostnames, timeout_s)
    # staging has verified its copy
    problems = node_check.problems_here(run.path, found.data_root, dataset, verify=not found.local, **place)
    verdict = met.agree("node", problems)
    if verdict.good:
        verdict = met.agree("sum", node_check.problems_of_sum(met, **place), joint=True)
    _kept.append(met)
    if not verdict.good:
        _act(own, verdict)
    if env.global_rank == 0:
        print(f"preflight: {', '.join(met.nodes)} good in {time.monotonic() - began:.2f} s", flush=True)


_kept: list[Any] = []
"""Rank 0's store must outlive the checks: the other ranks may still read the verdict, and training meets there too."""


def _act(own: OwnJob, verdict: Verdict) -> NoReturn:
    """One rank has the job go elsewhere or fails; the others leave quietly and are ended with it."""
    reason = f"preflight failed: {verdict}"
    print(reason, flush=True)
    if verdict.leader not in (None, own.env.global_rank):
        raise SystemExit(0)
    from ..train import lock

    if lock.is_held_by_another(own.run, job.segment()):  # then the run's records are another job's
        raise RunBusy(f"{reason}; besides, another job trains this run")
    job.ignore_signals()
    # where rank 0 is lost, every other rank gets here, and the first one acts
    action = own.settle(Event.NODE_BAD, reason, sorted(verdict.bad))
    if action is not None and action.state == "failed":
        raise PreflightError(action.reason)
    raise SystemExit(0)
