"""No signal reaches a process that only has the number of the one that is meant."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_cifar import processes, records
from hpc_cifar.launch import process
from hpc_cifar.records import Process


@pytest.fixture(params=["held by a descriptor", "by number, as before Linux 5.3"])
def bystander(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    if "number" in request.param:

        def missing(pid: int, flags: int = 0) -> int:
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr(os, "pidfd_open", missing)
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    yield child
    child.kill()
    child.wait()


def test_only_the_recorded_process_is_signalled(bystander: subprocess.Popen[bytes]) -> None:
    who = processes.identity(bystander.pid)
    for wrong in ({"pid_started": 1}, {"boot": "another"}, {"pid": True}, {"pid": str(bystander.pid)}, {"pid": 0}, {"pid": -1}):
        assert not processes.signal_exactly({**who, **wrong}, signal.SIGKILL)
        assert bystander.poll() is None
    assert processes.signal_exactly(who, signal.SIGKILL)
    assert bystander.wait(30) == -signal.SIGKILL
    assert not processes.signal_exactly(who, signal.SIGKILL)


def test_a_number_that_passes_on_after_the_look_is_left_alone(bystander: subprocess.Popen[bytes]) -> None:
    assert not processes.send(bystander.pid, signal.SIGKILL, lambda _: False)
    assert bystander.poll() is None


def test_only_survivors_of_the_recorded_session_are_ended(bystander: subprocess.Popen[bytes]) -> None:
    who = processes.identity(bystander.pid)
    process.kill_survivors(records.of(Process, {**who, "pid_started": 1}))
    assert bystander.poll() is None
    process.kill_survivors(records.of(Process, who))
    assert bystander.wait(30) == -signal.SIGKILL


def test_the_last_processes_of_a_session_end_when_their_leader_has_gone() -> None:
    script = "import os, subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True); sys.stdin.read()"
    leader = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, text=True
    )
    assert leader.stdout is not None
    child = int(leader.stdout.readline())
    who = processes.identity(leader.pid)
    leader.kill()
    leader.wait()
    assert process.survivors(records.of(Process, who)) == [child]
    process.kill_survivors(records.of(Process, who))
    deadline = time.monotonic() + 10  # it ends when it is given a processor again
    while (left := process.survivors(records.of(Process, who))) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert left == []


def test_every_signal_goes_through_the_module_that_knows_identities() -> None:
    """Else a number from a file, or of a process that has been waited for, is signalled somewhere. ``handover`` ends the group
    of a child of its own, which it has not waited for.
    """
    package = Path(processes.__file__).parent
    texts = {path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("*.py")}
    lines = [(name, line) for name, text in texts.items() for line in text.splitlines() if "getpid" not in line]
    found = {name for name, line in lines if re.search(r"\bos\.kill(pg)?\(|\bpidfd_send_signal\(", line)}
    assert found == {"processes.py", "launch/handover.py"}
