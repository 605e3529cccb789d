"""Many runs at once: the scheduler is asked once for all of them, and told once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from .. import files, owner
from ..runs import Run, now
from . import handover, slurm
from .control import RARELY_S, cancel, damaged_jobs, until_news, until_uploaded
from .status import Status, chain_of, elsewhere, statuses

FIRST_S = 0.5


def wait_all(runs: Sequence[Run], tick: Callable[[list[Status]], None] | None = None) -> list[Status]:
    """Block until every run has ended, its upload to W&B included; ``tick`` is called at every look with the state of all."""
    seen = dict(zip(runs, statuses(runs), strict=True))
    pause = FIRST_S
    while True:
        if tick is not None:
            tick(list(seen.values()))
        open_runs = [run for run in runs if not seen[run].ended]
        if not open_runs:
            until_uploaded(runs)
            return [seen[run] for run in runs]
        # a run that says it ended may be in Slurm's hands for a moment more
        pause = FIRST_S if until_news(open_runs, pause) else min(pause * 1.5, RARELY_S)
        seen |= dict(zip(open_runs, statuses(open_runs), strict=True))


def cancel_all(runs: Sequence[Run], code_of: str | None = None) -> Iterator[str]:
    """Stop runs for good, as :func:`control.cancel` does; those on Slurm with one ``scancel``.

    Args:
        code_of: the user whose runs may be cancelled too.

    Raises:
        RunError: one is somebody else's; then none is cancelled.
        LaunchError: the scheduler refused, or a run is on a machine that cannot be reached from here.
    """
    for run in runs:
        owner.check_own(run.path, code_of)
    left = handover.adopt(runs, anew=True)
    states = zip(runs, statuses(runs), strict=True) if len(runs) > 1 else ()
    left_alone = {run for run in runs if run in left or damaged_jobs(run)}
    together = {run: seen for run, seen in states if not seen.ended and _on_slurm(run) and run not in left_alone}
    for run in together:
        files.write_text(run.cancel_marker, now() + "\n", durable=False)  # first: whatever stops now must not requeue
    if together:
        slurm.cancel([job.job_id for run in together for job in chain_of(run)])
    for run in runs:
        if run not in together:
            yield cancel(run, code_of=code_of)
        elif together[run].state in ("pending", "requeued"):  # no process is there to say so
            run.update_state(state="cancelled")
            yield f"{run.id}: cancelled while it was waiting (job {together[run].job_id})"
        else:
            yield f"{run.id}: cancelling job {together[run].job_id}; it saves a checkpoint first"


def _on_slurm(run: Run) -> bool:
    return run.last_job().executor == "slurm" and not elsewhere(chain_of(run))
