"""A run from its first step to its result: the ranks, the lock and the watchdog around :class:`Trainer`."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import stages
from ..config.experiment import Experiment
from ..errors import HpcCifarError, LostRank, NonFiniteLoss, RunError, first_line
from ..runs import Run
from . import recovery, rehearsal, saved
from .distributed import World, connected, is_lost_peer
from .lock import RunLock
from .stop import StopFlag, word_for
from .trainer import Trainer
from .watchdog import OnHang, Watchdog, lost_ranks


def train(
    run: Run,
    *,
    max_steps: int | None = None,
    data_root: Path,
    console: bool = True,
    world: World | None = None,
    begin: Callable[[], None] | None = None,
    segment: str = "",
    job: str = "",
    on_hang: OnHang | None = None,
    gives_up: Callable[[dict[str, Any]], bool] | None = None,
    trainer: Callable[..., Trainer] = Trainer,
) -> dict[str, Any]:
    """Start or continue ``run`` on this rank, until it is finished, stopped or failed.

    Args:
        run: an existing run directory; its experiment, not the caller's file, is what is trained.
        max_steps: stop once this many updates were made in total (a dry run); state ``stopped``.
        data_root: folder of prepared datasets.
        console: whether rank 0 prints.
        world: the ranks, if they are connected already.
        begin: called on rank 0 as soon as the run belongs to this job alone.
        segment: names this stretch of the run, such as ``<job id>.<restart>``.
        job: the scheduler's job and how often it was restarted, as ``<job id>.<restart>``, where ``segment`` does not say so.
        on_hang: what the watchdog calls when the ranks hang; the process ends then.
        gives_up: asked on rank 0 with the row of each finished epoch, whether to stop there; state ``stopped``, as ``pruned``.
        trainer: makes the trainer; a benchmark has one that looks at the clock.

    Returns:
        The result, as in ``result.json``; ``state`` is ``finished``, ``stopped``, ``cancelled``, or ``requeued`` when the
        scheduler asked for the machine back and the caller should requeue.

    Raises:
        RunBusy: another job trains it; nothing was touched.
        LockHeld: an earlier segment of this job has died and its lock is still there.
        HpcCifarError: with the reason, also written to ``state.json`` where that is possible.
    """
    if world is None:  # connected before signals only set a flag: a rank that waits for the others must still be stoppable
        with connected(wants_gpu(run.experiment())) as world:
            options: dict[str, Any] = {"max_steps": max_steps, "data_root": data_root, "console": console, "trainer": trainer}
            options |= {"begin": begin, "segment": segment, "job": job, "on_hang": on_hang, "gives_up": gives_up}
            return train(run, **options, world=world)
    try:
        stages.done("process group")
        segment = world.share(segment or secrets.token_hex(4))
        with StopFlag() as flag, RunLock(run, world, flag, job or segment, segment, console) as lock:
            stages.done("lock")
            if lock.asked:
                return _stopped(run, world, lock.asked, ours=not lock.held_by_another)
            if begin is not None and world.main:
                begin()
            world.barrier()

            def attempt() -> dict[str, Any]:
                if (problem := world.share(saved.missing(run) if world.main else None)) is not None:
                    raise problem
                made = trainer(run, world, flag, max_steps, data_root, console)
                if gives_up is not None:
                    made.records.on_epoch = lambda row: flag.prune() if gives_up(row) else None
                return _trained(made, segment, on_hang)

            return _train(run, world, attempt)
    except OSError as error:
        raise RunError(f"{error.filename or run.path}: {error.strerror or error}") from error
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        lost = lost_ranks(run.path, segment, world) or "another rank"
        raise LostRank(
            f"rank {world.rank} on {os.uname().nodename} lost contact with {lost}, which has probably ended; its log says "
            f"why, and the same command continues from the last checkpoint ({first_line(error)})"
        ) from None


def wants_gpu(experiment: Experiment) -> bool:
    """A job file that asks for no GPUs is trained on the CPU, whatever the machine has."""
    return experiment.resources.gpus_per_node > 0


def _stopped(run: Run, world: World, reason: str, *, ours: bool) -> dict[str, Any]:
    """The result of a segment that was stopped while it waited for the lock.

    Args:
        ours: whether no other job trains the run; its state is that one's then.
    """
    result = {"run": run.id, "state": word_for(reason, world.share(run.cancel_marker.exists())), "reason": reason}
    if world.main and ours:
        run.update_state(state=result["state"], reason=reason)
    return result


def _train(run: Run, world: World, attempt: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """With the run locked: nothing to do, or a segment of training; a failure is written to ``state.json``."""
    if world.share(run.cancel_marker.exists()):
        return {"state": "cancelled", "run": run.id}
    result = run.result()
    if world.share(result is not None and result.state == "finished"):
        return {} if result is None else result.as_dict()
    try:
        while True:
            try:
                with recovery.memory_told(run.experiment(), world):
                    return attempt()
            except NonFiniteLoss as error:  # on every rank alike
                if not recovery.leave_out(run, world, error.step):
                    raise
    except HpcCifarError as error:
        if world.main:
            run.update_state(state="failed", reason=str(error))
        raise


def _trained(trainer: Trainer, segment: str, on_hang: OnHang | None) -> dict[str, Any]:
    """From the newest checkpoint as far as it goes."""
    run, world = trainer.run, trainer.world
    rehearsal.begin(run.path, world.rank, trainer.session.stepper, lambda: trainer.session.position.step)
    patience = trainer.experiment.resources.hang_timeout_s
    with Watchdog(run.path, segment, world, patience, on_hang, trainer.records.progress.say) as trainer.watchdog:
        trainer.validation.progress = trainer.watchdog.moved
        try:
            return trainer.train()
        except NonFiniteLoss:
            trainer.agreement.settle()  # what is in flight between the ranks
            raise
