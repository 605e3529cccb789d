"""Commands as a user types them, each in a process of its own, which is forked from one that has imported the package.

A start of Python with all that the commands import takes a second of a processor, of which the tests have two, and some seconds
with torch; they type some hundreds of commands. Standard input is empty, and exit handlers do not run; else it is
``python -m hpc_cifar``, which other tests start as it is.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
COMMANDS = ("cli.main", "launch.submit", "launch.submit_many", "launch.status", "data.store")
TRAINING = ("train.loop", "data.kernels", "data.reference")


def preload(*modules: str) -> None:
    """What the process that all are forked from imports; it starts with the first of them."""
    CONTEXT.set_forkserver_preload([f"hpc_cifar.{name}" for name in modules])


preload(*COMMANDS)


def _main(arguments: Sequence[str], environment: Mapping[str, str], folder: Path, out: Path, err: Path) -> None:
    # the server may have been begun by a thread that hears no signals
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in ((1, out), (2, err)):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.argv = ["hpc_cifar", *arguments]
    runpy.run_module("hpc_cifar", run_name="__main__", alter_sys=True)


def typed(
    arguments: Sequence[str], environment: Mapping[str, str], folder: Path, timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """What ``python -m hpc_cifar ARGUMENTS`` printed, and its exit code.

    Raises:
        subprocess.TimeoutExpired: it took longer; it has been killed.
    """
    with tempfile.TemporaryDirectory() as kept:
        out, err = Path(kept, "out"), Path(kept, "err")
        out.touch()
        err.touch()
        child = CONTEXT.Process(target=_main, args=(list(arguments), dict(environment), folder, out, err))
        child.start()
        child.join(timeout_s)
        if child.exitcode is None:
            child.kill()
            child.join()
            raise subprocess.TimeoutExpired(list(arguments), timeout_s, out.read_text(), err.read_text())
        return subprocess.CompletedProcess(list(arguments), child.exitcode, out.read_text(), err.read_text())
