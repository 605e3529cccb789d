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
with bounds.confined():
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


LARGE = """
import os, subprocess, sys
from hpc_cifar.track import bounds
held = b"x" * (400 << 20)
with bounds.watched("some-run"):
    if os.fork() == 0:  # as large as this process, says the kernel
        os._exit(0)
    os.wait()
    raise ValueError("other")
"""


def test_a_large_process_does_not_take_its_own_size_for_a_services() -> None:
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and done.stderr.endswith("ValueError: other\n") and "took more" not in done.stderr
