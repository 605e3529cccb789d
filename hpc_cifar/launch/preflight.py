"""What a job does on its nodes before it trains: stage the data, check every node, go elsewhere if one is bad.

A node that fails is named, excluded, and the job goes back to the queue once; a second failure in a row ends the run. On Slurm
only: a single machine has no other node to go to, and says itself what is wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .. import files, runs
from ..config.cluster import DEFAULT_PREFLIGHT_S
from ..data.staging import COPY_WAIT_S, Staged, staged
from ..errors import PreflightError, RunBusy
from ..runs import Run
from . import job, slurm
from .script import clean_environment

if TYPE_CHECKING:
    from ..train.meeting import Verdict

SCONTROL_S = 30.0


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
        row = {"kind": "event", "epoch": state.get("epoch") or 0, "step": state.get("step") or 0, "time": round(time.time(), 3)}
        facts = {"local": self.staged.local, "mib": round(self.staged.mib, 1), "seconds": round(self.staged.seconds, 3)}
        files.append_json_line(self.run.metrics_file, {**row, "event": "staged", **facts})


@contextlib.contextmanager
def ready(run: Run, env: Any, data_root: Path) -> Iterator[Node]:
    """Stage the run's dataset on this node and check the job's nodes; the copy lasts as long as the context.

    Args:
        env: submitit's job environment; the variables of torchrun are set already.

    Raises:
        PreflightError: on one rank, if the nodes cannot train and the job must not be requeued for it.
        SystemExit: 0, if the job goes elsewhere, or another rank raises the error.
    """
    data = run.experiment().data
    dataset, scratch = data.dataset, os.environ.get("HPC_CIFAR_SCRATCH", "")
    with staged(data_root, dataset, scratch, with_beton=data.pipeline == "ffcv") as found:
        if found.note:
            print(found.note, flush=True)
        timeout_s = _timeout_s()
        if env.cluster == "slurm" and timeout_s:
            # this node may have been quick while another one still copies
            _check(run, env, found, dataset, timeout_s + (COPY_WAIT_S if found.note else 0))
        yield Node(run, found)


def _timeout_s() -> float:
    """Seconds to wait for the other nodes; 0 leaves the checks out."""
    text = os.environ.get("HPC_CIFAR_PREFLIGHT_S", "")
    return float(text) if text.isdigit() else DEFAULT_PREFLIGHT_S


def _check(run: Run, env: Any, found: Staged, dataset: str, timeout_s: float) -> None:
    from ..train import meeting, node_check

    began = time.monotonic()
    gpu = bool(run.plan().get("placement", {}).get("gpus_per_node"))
    place = {"gpu": gpu, "local_rank": env.local_rank, "local_size": int(os.environ["LOCAL_WORLD_SIZE"])}
    met = meeting.Meeting(os.environ.get("SLURMD_NODENAME") or os.uname().nodename, env.hostnames, timeout_s)
    # staging has verified its copy
    problems = node_check.problems_here(run.path, found.data_root, dataset, verify=not found.local, **place)
    verdict = met.agree("node", problems)
    if verdict.good:
        verdict = met.agree("sum", node_check.problems_of_sum(met, **place), joint=True)
    _kept.append(met)
    if not verdict.good:
        _act(run, env, verdict)
    if env.global_rank == 0:
        for old in _records(run, env):
            old.unlink(missing_ok=True)  # only failures in a row count
        print(f"preflight: {', '.join(met.nodes)} good in {time.monotonic() - began:.2f} s", flush=True)


_kept: list[Any] = []
"""Rank 0's store must outlive the checks: the other ranks may still read the verdict, and training meets there too."""


def _records(run: Run, env: Any) -> list[Path]:
    return sorted(run.submitit.glob(f"{env.job_id}.*_preflight.json"))


def _act(run: Run, env: Any, verdict: Verdict) -> NoReturn:
    """One rank requeues the job or fails; the others leave quietly and are ended with it."""
    reason = f"preflight failed: {verdict}"
    print(reason, flush=True)
    if verdict.leader not in (None, env.global_rank):
        raise SystemExit(0)
    from ..train import lock

    if lock.is_held_by_another(run, job.segment()):  # then the run's records are another job's
        raise RunBusy(f"{reason}; besides, another job trains this run")
    segment, before = job.segment(), _records(run, env)
    record = {"time": runs.now(), "segment": segment, "rank": env.global_rank, "reason": reason, "nodes": sorted(verdict.bad)}
    try:
        # where rank 0 is lost, every other rank gets here, and the first one acts
        with (run.submitit / f"{env.job_id}.{job.restart_count()}_preflight.json").open("x") as stream:
            stream.write(json.dumps(record) + "\n")
    except FileExistsError:
        raise SystemExit(0) from None
    if before:
        raise PreflightError(f"{reason}; the job had been requeued for that once already")
    job.ignore_signals()  # also in scontrol, which inherits it
    known = slurm.query([env.job_id]).jobs.get(env.job_id)
    if run.cancel_marker.exists() or (known and known.state in ("CANCELLED", "COMPLETING")):
        run.write_state(**{**run.state(), "state": "cancelled"})
        raise SystemExit(0)
    run.write_state(**{**run.state(), "state": "requeued", "reason": reason})
    requeue_without(run, env.job_id, sorted(verdict.bad), reason)
    files.append_json_line(run.path / "failures.jsonl", {**record, "busy": False})
    raise SystemExit(0)


def requeue_without(run: Run, job_id: str, nodes: list[str], reason: str) -> None:
    """Requeue a running job and exclude ``nodes``, beside those it excludes already, unless too few would be left.

    Raises:
        PreflightError: it could not be requeued.
    """
    exclude = _exclusion(run, job_id, nodes) if nodes else ""
    code, said = _scontrol("requeue", job_id)
    if code != 0:
        raise PreflightError(f"{reason}; the job could not be requeued: {said}")
    # Slurm 22.05 changes this of pending jobs only, and knows no "+=". The job's processes have KillWait seconds left.
    if exclude:
        code, said = _scontrol("update", f"JobId={job_id}", f"ExcNodeList={exclude}")
        done = f"excluding {exclude}" if code == 0 else f"but {', '.join(nodes)} could not be excluded: {said}"
    else:
        done = "excluding nothing: there are too few other nodes" if nodes else "on any nodes"
    print(f"preflight: job {job_id} requeued, {done}", flush=True)


def _exclusion(run: Run, job_id: str, nodes: list[str]) -> str:
    """The job's ExcNodeList with ``nodes``, or "" if it could not start then, as Slurm itself finds, or nobody can be asked."""
    code, text = _scontrol("--oneliner", "show", "job", job_id)
    fields = dict(word.split("=", 1) for word in text.split() if "=" in word)
    if code != 0 or "JobId" not in fields:
        return ""
    exclude = list(dict.fromkeys([*_hostnames(fields.get("ExcNodeList")), *nodes]))
    if set(nodes) & set(_hostnames(fields.get("ReqNodeList"))):  # the profile's nodelist: it may run nowhere else
        return ""
    submitted = run.submitit / f"{job_id}_submission.sh"  # with the constraint, the GPUs and all else that a node must have
    try:
        text = submitted.read_text(encoding="utf-8")
    except OSError:
        return ""
    with clean_environment(text):
        code, _ = _command("sbatch", "--test-only", f"--exclude={','.join(exclude)}", str(submitted))
    return ",".join(exclude) if code == 0 else ""


def _hostnames(listed: str | None) -> list[str]:
    if listed in (None, "(null)"):
        return []
    code, text = _scontrol("show", "hostnames", str(listed))
    return text.split() if code == 0 else []


def _scontrol(*arguments: str) -> tuple[int, str]:
    return _command("scontrol", *arguments)


def _command(*command: str) -> tuple[int, str]:
    """Exit code, and what was printed or, after a failure, said on one line."""
    reply = slurm.ask(list(command), timeout_s=SCONTROL_S)
    return (0, reply.out) if reply.code == 0 else (reply.code or 1, " ".join((reply.err or reply.out).split())[:300])
