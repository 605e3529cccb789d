"""What takes too much memory while something is uploaded is ended: a service, or this very process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb_server

from hpc_cifar import processes
from hpc_cifar.track import bounds

GROWS = "held = b'x' * (700 << 20); import time; time.sleep(60)"


def test_a_service_that_grows_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMEMLIMIT", "1GiB")  # as a user chose
    before = set(processes.descendants(os.getpid()))
    other = subprocess.Popen(["sleep", "60"])  # of this process too, and nothing of the upload
    began = time.monotonic()
    with pytest.raises(bounds.TooLarge, match=r"took more than 512 MiB .* hpc-cifar sync some-run uploads later"):  # noqa: SIM117
        with bounds.watched("some-run"):
            parent = subprocess.Popen(
                [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {GROWS!r}])"]
            )
            raise ConnectionResetError(parent.wait())
    assert time.monotonic() - began < 30 and os.environ["GOMEMLIMIT"] == "1GiB"
    wandb_server.until(lambda: set(processes.descendants(os.getpid())) <= before | {other.pid}, 10)
    assert other.poll() is None
    other.kill()
    other.wait()


def test_a_process_that_grows_ends_with_one_line() -> None:
    code = f"from hpc_cifar.track import bounds\nwith bounds.watched('some-run'):\n    {GROWS}\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "hpc-cifar sync some-run uploads later" in done.stderr


ALLOCATES = """
import os, subprocess, sys
from hpc_cifar.track import bounds
with bounds.watched("some-run") as last_words, bounds.confined(last_words):
    grown = subprocess.run([sys.executable, "-c", "b'x' * (2 << 30)"])
print(grown.returncode)
print("afterwards", file=sys.stderr)
held = b"x" * (1 << 30)
"""


def test_what_the_client_starts_has_a_limit_and_no_words() -> None:
    """Where nobody looks in time, the kernel does; for this process all is as before."""
    done = subprocess.run([sys.executable, "-c", ALLOCATES], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "afterwards\n")


MAPS = """
import hashlib, mmap, os, sys
from hpc_cifar.track.bounds import resident
before = resident("self")
with open(sys.argv[1], "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
    hashlib.sha256(mapped)
    print(resident("self") - before >> 20)
held = os.urandom(100 << 20)
print(resident("self") - before >> 20)
"""


def test_a_file_that_is_read_takes_no_memory(tmp_path: Path) -> None:
    """As the client maps a checkpoint to hash it; in a new process, since one that has freed memory reuses it."""
    path = tmp_path / "checkpoint"
    with path.open("wb") as stream:
        stream.truncate(200 << 20)
    done = subprocess.run([sys.executable, "-c", MAPS, str(path)], capture_output=True, text=True, timeout=60, check=True)
    mapped, held = map(int, done.stdout.split())
    assert mapped < 50 and 90 < held < 150


def test_an_error_of_something_small_is_told_as_it_is() -> None:
    with pytest.raises(ValueError, match="other"), bounds.watched("some-run"):
        raise ValueError("other")


WRITES = """
import os, sys
for part in (sys.argv[1] + 9_000 * "\\ngoroutine 1").splitlines(keepends=True):
    try:
        os.write(2, part.encode())
    except OSError:  # all is full
        pass
"""
SAYS = f"""
import subprocess, sys
from hpc_cifar.track import bounds
WRITES = {WRITES!r}
with bounds.watched("some-run") as last_words:
    with bounds.confined(last_words):
        subprocess.run([sys.executable, "-c", WRITES, sys.argv[1]])
    raise ValueError("other")
"""


@pytest.mark.parametrize(
    ("words", "no_memory"),
    [
        ("fatal error: runtime: out of memory", True),
        ("fatal error: runtime: cannot allocate memory", True),
        ("runtime: errno=12\nfatal error: out of memory allocating heap arena metadata", True),
        ("fatal error: all goroutines are asleep - deadlock!", False),
        ("panic: the server said: out of memory", False),
        ("", False),
    ],
)
def test_the_last_words_of_a_service_tell_that_it_had_no_memory(words: str, no_memory: bool) -> None:
    """It may have had little by then: what it wanted at once counts."""
    done = subprocess.run([sys.executable, "-c", SAYS, words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "goroutine" not in done.stderr
    assert ("took more than 512 MiB" in done.stderr) == no_memory and done.stderr.endswith("ValueError: other\n") != no_memory


def test_without_a_file_in_memory_the_service_is_silent_all_the_same() -> None:
    without = "import os; del os.memfd_create\n" + SAYS
    says = "fatal error: runtime: out of memory"
    done = subprocess.run([sys.executable, "-c", without, says], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "fatal error" not in done.stderr and done.stderr.endswith("ValueError: other\n")
