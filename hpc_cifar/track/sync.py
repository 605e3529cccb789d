"""Keeps a tracker up to date with a run directory: once, while a job runs, or beside the process that trains."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from .. import files
from ..errors import RunBusy, TrackingError
from ..runs import Run
from .tracker import WANDB, Feed, Hopeless, load, lock

EVERY_S = 2.0
RETRY_S, RETRY_AT_MOST_S = 5.0, 600.0
LOOK_S = 1.0
BUSY_S = 15.0  # beside a training that has ended, for another upload of the run to end


def sync(
    run: Run,
    ended: Callable[[float], bool],
    say: Callable[[str], None],
    opened: Callable[[], None] = lambda: None,
    beside: bool = False,
    to: str = WANDB,
) -> int:
    """Upload what a tracker has not got; the number of rows.

    Args:
        ended: waits that many seconds at most for the end of the run, and says whether it has come. Until then an upload that
            fails, or that another process still makes, is begun again, with growing pauses.
        say: prints one line for people.
        opened: called once the tracker has answered.
        beside: the end is that of the process that trains.
        to: the tracker's name.

    Raises:
        TrackingError: it has not got everything; what it has is right, and the next call goes on from there.
        RunBusy: another process uploads this run to it.
    """
    pause, left = RETRY_S, BUSY_S
    while True:
        try:
            with _alone(run, to):
                return _upload(run, ended, say, opened, beside, to)
        except Hopeless:
            raise
        except (TrackingError, RunBusy) as error:
            if beside and isinstance(error, RunBusy) and left > 0:  # that of a segment that was killed ends soon
                time.sleep(LOOK_S)
                left -= LOOK_S if ended(0) else 0
                continue
            if ended(0):
                raise
            say(f"{error}; trying again in {pause:.0f} s")
            if ended(pause):
                raise
            pause = min(2 * pause, RETRY_AT_MOST_S)


def _upload(
    run: Run, ended: Callable[[float], bool], say: Callable[[str], None], opened: Callable[[], None], beside: bool, to: str
) -> int:
    tracker, feed, count = load(to), Feed(run), 0
    with tracker.opened(run, say, beside) as mirror:
        opened()
        while not ended(EVERY_S):
            rows = feed.new(mirror.taken)
            mirror.push(rows)
            count += len(rows.new)
        state = run.state()
        rows = feed.new(mirror.taken)
        mirror.finish(rows, state, beside)
        count += len(rows.new)
    if feed.damaged:
        say(f"{tracker.TITLE}: {feed.damaged} damaged lines of metrics.jsonl were left out")
    return count


@contextlib.contextmanager
def _alone(run: Run, to: str) -> Iterator[None]:
    """Two uploads of one run would number rows beside each other."""
    try:
        stream = files.hold(lock(run, to))
    except BlockingIOError as error:
        raise RunBusy(f"{run.id}: is being uploaded to {load(to).TITLE} by {error.strerror}") from None
    with stream:
        yield
