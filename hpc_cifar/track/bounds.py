"""The memory that an upload may take from the machine that it is on, whatever a server sends.

The client's service reads an answer to its end. A server that answers without end took 6 GB of a job's memory that way, and the
kernel then ends a process of the job: a rank as well as the service. Source: the client of wandb 0.31, whose service sets no
limit to an answer's body.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from .. import processes
from .tracker import Hopeless

LIMIT = 512 << 20  # resident bytes of the service, and of what this process gets in addition, above which the upload is ended
GO_LIMIT = "256MiB"  # from which on the service, a Go program, collects its garbage at once
LOOK_S = 0.1  # between looks: an answer over a fast network brings some 100 MiB in that time
GRACE_S = 5.0  # for the client to notice that its service has gone
PAGE = os.sysconf("SC_PAGE_SIZE")


class TooLarge(Hopeless):
    """The upload took more memory than it may."""


def expendable(pid: int | str = "self") -> None:
    """Have the kernel end this process before any other of its job, should memory run out; its children inherit that."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


def resident(pid: int | str) -> int:
    """Bytes of its own that a process has in memory; 0 if it has gone.

    Without pages of files, which the kernel takes back when it needs them: the client maps a checkpoint to hash it.
    """
    try:
        _, every, of_files, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
        return (every - of_files) * PAGE
    except (OSError, ValueError):
        return 0


def _others() -> set[int]:
    """What this process has started for something else, and whatever that has started; a service may be there already."""
    found: set[int] = set()
    for child in processes.children(os.getpid()):
        with contextlib.suppress(OSError):
            if not Path(f"/proc/{child}/comm").read_text(errors="replace").startswith("wandb-core"):
                found |= {child, *processes.descendants(child)}
    return found


@contextlib.contextmanager
def watched(run_id: str) -> Iterator[None]:
    """Bound the memory of an upload that is made meanwhile; the client starts its service in it.

    Raises:
        TooLarge: it took too much, so that its service was ended.
    """
    os.environ.setdefault("GOMEMLIMIT", GO_LIMIT)
    done, over, begun, others = threading.Event(), threading.Event(), resident("self"), _others()
    words = (
        f"W&B: the upload took more than {LIMIT >> 20} MiB of memory, as when a server answers without end, and was ended; "
        f"hpc-cifar sync {run_id} uploads later"
    )

    def watch() -> None:
        known: set[int] = set()
        while not done.wait(LOOK_S):
            family = [pid for pid in processes.descendants(os.getpid()) if pid not in others]
            for pid in set(family) - known:
                expendable(pid)
            known = set(family)
            if sum(map(resident, family)) + max(0, resident("self") - begun) > LIMIT:
                over.set()
                for pid in family:
                    processes.send(pid, signal.SIGKILL, lambda pid: pid in processes.descendants(os.getpid()))
                if not done.wait(GRACE_S):
                    print(words, file=sys.stderr, flush=True)
                    os._exit(1)
                return

    thread = threading.Thread(target=watch, name="memory of the upload", daemon=True)
    thread.start()
    try:
        yield
    except Exception:
        if not over.is_set():
            raise
        raise TooLarge(words) from None
    finally:
        done.set()
        thread.join()
