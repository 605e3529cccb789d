"""The memory that an upload may take from the machine that it is on, whatever a server sends.

The client's service reads an answer to its end. A server that answers without end took 6 GB of a job's memory that way, and the
kernel then ends a process of the job: a rank as well as the service. Source: the client of wandb 0.31, whose service sets no
limit to an answer's body.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from .. import processes
from .tracker import Hopeless

LIMIT = 512 << 20  # resident bytes of the service, and of what this process gets in addition, above which the upload is ended
ALLOCATED = 768 << 20  # bytes that the kernel lets the service allocate, where looking comes too late, as on a busy machine
GO_LIMIT = "256MiB"  # from which on the service, a Go program, collects its garbage at once
LOOK_S = 0.1  # between looks: an answer over a fast network brings some 100 MiB in that time
SERVICE = "wandb-core"  # what the kernel calls it
WORDS = 64 << 10  # bytes of what the service writes that are kept
DYING_S = 0.5  # for a service that has closed its connections to say why
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


def _allocated() -> int:
    """Bytes that this process has allocated, as the kernel counts them for RLIMIT_DATA."""
    pages = Path("/proc/self/statm").read_text().split()[5]
    return int(pages) * PAGE


def bound_command() -> None:
    """Have the kernel refuse this process more memory than an upload may take; for a command that does nothing else.

    The client reads answers of a server in this process, too, and at its end, when nobody watches it any more.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy starts one a processor, whose stacks would take all of it
    _allow_no_more()


def _allow_no_more() -> tuple[int, int]:
    """Limit what this process, and whatever it starts, may allocate from now on; what the limit was before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    least = [limit for limit in (soft, _allocated() + LIMIT) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(least), hard))
    return soft, hard


def _last_words() -> int:
    """An open file, in memory and of a fixed size, for what the service writes before it ends; else one that keeps nothing.

    Some builds of Python, and old kernels, have no such files: the end of a service is then told as the client tells it.
    """
    try:
        words = os.memfd_create("last words of the service", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.truncate(words, WORDS)
        fcntl.fcntl(words, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    except (AttributeError, OSError):
        return os.open(os.devnull, os.O_RDWR)
    return words


@contextlib.contextmanager
def confined(words: int) -> Iterator[None]:
    """Start the client's service in this: it inherits a limit to what it may allocate, and is silent.

    Its last words would be those of a Go program, which may hold whatever a server has sent.

    Args:
        words: file that takes them; :func:`watched` gives it.
    """
    before = _allow_no_more()
    sys.stderr.flush()
    kept = os.dup(2)
    os.dup2(words, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _limit(pid: int) -> None:
    with contextlib.suppress(OSError, ValueError):  # it has gone, or has less already
        _, hard = resource.prlimit(pid, resource.RLIMIT_DATA)
        most = ALLOCATED if hard == resource.RLIM_INFINITY else min(ALLOCATED, hard)
        resource.prlimit(pid, resource.RLIMIT_DATA, (most, hard))


def _had_no_memory(words: int) -> bool:
    """Whether a service ended since the kernel gave it no more memory; the client may notice its end before it has said why."""
    for _ in range(10):
        said = os.pread(words, WORDS, 0)
        if any(line.startswith(b"fatal error: ") and b"memory" in line for line in said.splitlines()):
            return True
        time.sleep(DYING_S / 10)
    return False


def _others() -> set[int]:
    """What this process has started for something else, and whatever that has started; a service may be there already."""
    found: set[int] = set()
    for child in processes.children(os.getpid()):
        with contextlib.suppress(OSError):
            if not Path(f"/proc/{child}/comm").read_text(errors="replace").startswith(SERVICE):
                found |= {child, *processes.descendants(child)}
    return found


@contextlib.contextmanager
def watched(run_id: str) -> Iterator[int]:
    """Bound the memory of an upload that is made meanwhile; the client starts its service in it.

    Yields:
        The file that :func:`confined` wants.

    Raises:
        TooLarge: it took too much, so that its service was ended.
    """
    os.environ.setdefault("GOMEMLIMIT", GO_LIMIT)
    words_to, last_words = os.dup(2), _last_words()  # this process is heard while the service is started, too
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
                _limit(pid)
            known = set(family)
            if sum(map(resident, family)) + max(0, resident("self") - begun) > LIMIT:
                over.set()
                for pid in family:
                    processes.send(pid, signal.SIGKILL, lambda pid: pid in processes.descendants(os.getpid()))
                if not done.wait(GRACE_S):
                    os.write(words_to, f"{words}\n".encode())
                    os._exit(1)
                return

    thread = threading.Thread(target=watch, name="memory of the upload", daemon=True)
    thread.start()
    try:
        yield last_words
    except Exception:
        if not over.is_set() and not _had_no_memory(last_words):
            raise
        raise TooLarge(words) from None
    finally:
        done.set()
        thread.join()
        os.close(words_to)
        os.close(last_words)
