"""The job that this process is a part of: Slurm's word on it, its way back to the queue, what killed one of its ranks."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import files, runs
from . import chain, deaths, ending, slurm
from .interruptions import RunRecords
from .job import LOCAL_REQUEUE, first_failure, node_name, restart_count, segment
from .policy import Act, Action, Event, Word

if TYPE_CHECKING:
    from ..runs import Run

SCONTROL_S = 30.0
LAST_WORD_S = 3.0  # for a rank that failed to say why, after its peers have lost it, and for srun to say what killed it
OUTCOME_S = 60.0  # for the rank that ends the segment
REQUEUE_S, PAUSE_S = 25.0, 2.0  # for all tries of a requeue, which the other ranks wait for; between two of them
QUIET = ("requeued", "cancelled", "finished")  # states of a run with which a rank has nothing to complain about
# a TERM that follows the first signal must not kill the program that sends the job back to the queue
UNDISTURBED = ("sh", "-c", 'trap "" TERM INT HUP USR1 USR2; exec "$@"', "sh")


class OwnJob:
    """See :class:`hpc_cifar.launch.ending.Scheduler`. Made at the start of a segment, since it looks at what is new since then.

    Args:
        env: submitit's job environment.
    """

    def __init__(self, run: Run, env: Any) -> None:
        self.run, self.env = run, env
        self.job_id = str(env.job_id)
        self._profile = chain.profile(run)
        self._log = run.submitit / f"{self.job_id}_0_log.err"
        self._log_begin = deaths.size(self._log)
        self._killed = deaths.killed_for_memory()

    # ---- what is known ---------------------------------------------------------------------------------------------------

    @property
    def slurm(self) -> bool:
        return bool(self.env.cluster == "slurm")

    @property
    def requeue_allowed(self) -> bool:
        return bool(self._profile.get("requeue", True))

    @property
    def has_scontrol(self) -> bool:
        return shutil.which("scontrol") is not None

    @property
    def preemptible(self) -> bool:
        return bool(self._profile.get("preemptible"))

    def word(self) -> Word:
        return slurm.word_of(slurm.evidence(self.job_id), restart_count())

    def death(self) -> tuple[Event, str] | None:
        deadline = time.monotonic() + LAST_WORD_S
        while True:
            if found := deaths.in_log(deaths.since(self._log, self._log_begin)):
                return found.event, str(found)
            if reason := first_failure(self.run, segment(), hangs=False):
                return Event.FAILED, reason
            if time.monotonic() >= deadline:
                break
            time.sleep(0.2)
        now = deaths.killed_for_memory()
        if any(count > self._killed.get(folder, 0) for folder, count in now.items()):
            return Event.OUT_OF_MEMORY, f"a process was killed for memory on {node_name()}"
        return None

    # ---- what is done ----------------------------------------------------------------------------------------------------

    def requeue(self, exclude: Sequence[str], at_limit: bool) -> str:
        excluded = self._exclusion(self.job_id, list(exclude)) if exclude else ""
        # by the id of the element: the plain number of an array's elements may mean the whole array; Incomplete: if it runs
        only = () if at_limit else ("Incomplete",)
        command = [*UNDISTURBED, "scontrol", "requeue", *only, self.job_id]
        deadline = time.monotonic() + REQUEUE_S
        while True:
            reply = slurm.ask(command, timeout_s=max(1.0, deadline - time.monotonic()))
            if not reply.unanswered or not self.has_scontrol or time.monotonic() + PAUSE_S > deadline:
                break
            time.sleep(PAUSE_S)
        if reply.code != 0:
            return _line(reply)
        # Slurm 22.05 changes this of pending jobs only, and knows no "+=". The job's processes have KillWait seconds left.
        done = _exclude(self.job_id, excluded, exclude) if exclude else "on any nodes"
        print(f"job {self.job_id} requeued, {done}", flush=True)
        return ""

    def exclude_behind(self, nodes: Sequence[str]) -> None:
        link = chain.next_link(self.run, self.job_id)
        while link is not None:
            done = _exclude(link, self._exclusion(link, list(nodes)), nodes)
            print(f"job {link} goes on, {done}", flush=True)
            link = chain.next_link(self.run, link)

    def cancel(self) -> None:
        _command("scancel", self.job_id)

    def _exclusion(self, job_id: str, nodes: list[str]) -> str:
        """A job's ExcNodeList with ``nodes``; "" if the job could not start then, or Slurm cannot be asked."""
        code, text = _command("scontrol", "--oneliner", "show", "job", job_id)
        fields = dict(word.split("=", 1) for word in text.split() if "=" in word)
        if code != 0 or "JobId" not in fields:
            return ""
        exclude = list(dict.fromkeys([*_hostnames(fields.get("ExcNodeList")), *nodes]))
        if set(nodes) & set(_hostnames(fields.get("ReqNodeList"))):  # the profile's nodelist: it may run nowhere else
            return ""
        submitted = self.run.submitit / f"{job_id}_submission.sh"  # with all that a node must have
        try:
            text = submitted.read_text(encoding="utf-8")
        except OSError:
            return ""
        from .script import clean_environment  # submitit's executor takes a while to import

        with clean_environment(text):
            code, _ = _command("sbatch", "--test-only", f"--exclude={','.join(exclude)}", str(submitted))
        return ",".join(exclude) if code == 0 else ""

    def wake(self) -> None:
        """Let ranks that were stopped go on, on whatever node: each writes what it was doing, and leaves with the others."""
        slurm.ask(["scancel", "--signal=CONT", self.job_id])
        deadline = time.monotonic() + LAST_WORD_S
        stacks = self.run.path / "hangs" / segment()
        while time.monotonic() < deadline and len(list(stacks.glob("rank-*[0-9].txt"))) < self.env.num_tasks:
            time.sleep(0.2)

    # ---- the end of a segment --------------------------------------------------------------------------------------------

    def settle(self, event: Event, detail: str = "", exclude: Sequence[str] = ()) -> Action | None:
        """Decide about this segment and carry it out; None if another rank does."""
        action = ending.settle(
            event, RunRecords(self.run, self.job_id), self, segment=segment(), detail=detail, rank=self.env.global_rank,
            restarts_allowed=self.run.experiment().resources.fault_restarts, exclude=exclude,
            run=self.run.id,
        )  # fmt: skip
        if action is not None and action.event is not None:
            print(f"hpc-cifar: {action.reason or action.event.value}: {action.act.value}", flush=True)
        return action

    def follow(self) -> bool:
        """Wait for the rank that ends this segment; whether the run goes on by itself."""
        deadline = time.monotonic() + OUTCOME_S
        records = RunRecords(self.run, self.job_id)
        while (found := records.outcome(segment())) is None and time.monotonic() < deadline:
            time.sleep(0.2)
        return found is None or found.state in QUIET or found.action == Act.LEAVE_TO_SLURM.value

    def stopped(self, event: Event, result: dict[str, Any]) -> dict[str, Any]:
        """After the ranks have stopped and saved: leave the process, or give the result of a run that goes no further."""
        if self.env.global_rank != 0:
            raise SystemExit(0)  # without a result: this rank is not done, and rank 0 speaks for all
        action = self.settle(event)
        if action is None:
            raise SystemExit(0)
        if action.goes_on:
            raise SystemExit(0 if self.slurm else LOCAL_REQUEUE)
        if action.state == "failed":
            raise SystemExit(1)
        return {**result, "state": action.state or result.get("state")}

    def lost(self, event: Event, detail: str) -> bool:
        """After a fault: whether this rank leaves quietly, since the run goes on, or has ended otherwise; else it fails."""
        action = self.settle(event, detail)
        if action is None:
            return self.follow()
        if action.event is Event.FAILED:
            return False
        if action.state == "failed":
            self._note_failure(action.reason)
        return action.state in QUIET or action.act is Act.LEAVE_TO_SLURM

    def hung(self, reason: str) -> int:
        """A rank noticed that the ranks hang: the exit code of all. Called from a thread, while main threads are stuck."""
        files.append_json_line(self.run.path / "failures.jsonl", self._row(reason) | {"hang": True})
        if self.slurm:
            self.wake()
        action = self.settle(Event.HUNG, reason)
        if action is not None and action.state == "failed":
            self._note_failure(action.reason)
        goes_on = self.follow() if action is None else action.goes_on
        return LOCAL_REQUEUE if goes_on and not self.slurm else 1

    def _note_failure(self, reason: str) -> None:
        files.append_json_line(self.run.path / "failures.jsonl", self._row(reason) | {"final": True})

    def _row(self, reason: str) -> dict[str, Any]:
        return {"time": runs.now(), "segment": segment(), "rank": self.env.global_rank, "reason": reason}


def _exclude(job_id: str, excluded: str, wanted: Sequence[str]) -> str:
    """Change a job's ExcNodeList; in words what became of it.

    Args:
        excluded: the list; "" where the job could not start with it.
        wanted: nodes that it should not get.
    """
    if not excluded:
        return "excluding nothing: there are too few other nodes"
    code, said = _command(*UNDISTURBED, "scontrol", "update", f"JobId={job_id}", f"ExcNodeList={excluded}")
    return f"excluding {excluded}" if code == 0 else f"but {', '.join(wanted)} could not be excluded: {said}"


def _hostnames(listed: str | None) -> list[str]:
    if listed in (None, "(null)"):
        return []
    code, text = _command("scontrol", "show", "hostnames", str(listed))
    return text.split() if code == 0 else []


def _command(*command: str) -> tuple[int, str]:
    """Exit code, and what was printed or, after a failure, said on one line."""
    reply = slurm.ask(list(command), timeout_s=SCONTROL_S)
    return (0, reply.out) if reply.code == 0 else (reply.code or 1, _line(reply))


def _line(reply: slurm.Reply) -> str:
    """The words of a command that failed, on one line."""
    return " ".join((reply.err or reply.out).split())[:300]
