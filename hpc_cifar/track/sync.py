"""Keeps W&B up to date with a run directory: once, while a job runs, or beside the process that trains."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator

from .. import files
from ..errors import RunBusy, TrackingError
from ..runs import Run
from . import bounds, identity, wandb_run

EVERY_S = 2.0
RETRY_S, RETRY_AT_MOST_S = 5.0, 600.0
CHECKS, CHECK_S = 5, 1.0
BUSY_S = 15.0  # beside a training that has ended, for another upload of the run to end
PATIENT_S = 600.0  # for an artifact, where nobody waits for this process


def sync(
    run: Run,
    ended: Callable[[float], bool],
    say: Callable[[str], None],
    opened: Callable[[], None] = lambda: None,
    beside: bool = False,
) -> int:
    """Upload what W&B has not got; the number of rows.

    Args:
        ended: waits that many seconds at most for the end of the run, and says whether it has come. Until then an upload that
            fails, or that another process still makes, is begun again, with growing pauses.
        say: prints one line for people.
        opened: called once W&B has answered.
        beside: the end is that of the process that trains.

    Raises:
        TrackingError: W&B has not got everything; what it has is right, and the next call goes on from there.
        RunBusy: another process uploads this run.
    """
    pause, left = RETRY_S, BUSY_S
    while True:
        try:
            with _alone(run), bounds.watched(run.id):
                return _upload(run, ended, say, opened, beside)
        except bounds.TooLarge:
            raise
        except (TrackingError, RunBusy) as error:
            if beside and isinstance(error, RunBusy) and left > 0:  # that of a segment that was killed ends soon
                time.sleep(CHECK_S)
                left -= CHECK_S if ended(0) else 0
                continue
            if ended(0):
                raise
            say(f"{error}; trying again in {pause:.0f} s")
            if ended(pause):
                raise
            pause = min(2 * pause, RETRY_AT_MOST_S)


def _upload(
    run: Run, ended: Callable[[float], bool], say: Callable[[str], None], opened: Callable[[], None], beside: bool
) -> int:
    state = run.state()
    trains_here = state.state == "running" and state.host == os.uname().nodename
    artifact_s = wandb_run.FINISH_TIMEOUT_S if beside else PATIENT_S
    upload = wandb_run.Upload(run, state.pid if trains_here else None, artifact_s)
    opened()
    say(f"W&B: {upload.address}")
    if upload.left_aside:
        say(upload.left_aside)
    while not ended(EVERY_S):
        upload.push()
    upload.close(left=beside)
    for _ in range(CHECKS):
        if upload.rows_there() >= upload.taken:
            break
        time.sleep(CHECK_S)  # a server may take a moment to count
    else:
        raise TrackingError("W&B does not have all rows")
    if upload.damaged:
        say(f"W&B: {upload.damaged} damaged lines of metrics.jsonl were left out")
    return upload.pushed


@contextlib.contextmanager
def _alone(run: Run) -> Iterator[None]:
    """Two uploads of one run would number rows beside each other."""
    try:
        stream = files.hold(run.path / identity.LOCK)
    except BlockingIOError as error:
        raise RunBusy(f"{run.id}: is being uploaded to W&B by {error.strerror}") from None
    with stream:
        yield
