"""A process that has imported the package and runs one command line in a fork of itself for each line that it reads.

``python fuzz_worker.py light|heavy`` with the package under test on PYTHONPATH; ``heavy`` has imported torch as well. Only the
command line and the names of modules are used, so that an older package can be tried.

A line is a JSON object: ``argv``, ``environment``, ``folder``, ``limit_s``, ``memory_mib`` (more than this process has),
``out``, ``err`` (files) and ``later`` ([seconds, path]: removed while the command runs). The answer is one too: ``code``,
``signal``, ``hung``, ``seconds``, ``cpu_s``, ``grown_mib``. A signal that the command would send is written down, and it ends.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import resource
import runpy
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

HEAVY = ("train", "data", "models", "evaluate")
LEFT_OUT = ("dali", "ffcv", "triton", "__main__", "controller", "rank", "rehearsal")
SIGNALLED = "fuzz: signalled "


def preload(heavy: bool) -> None:
    import hpc_cifar

    if not heavy:
        sys.modules["torch"] = None  # type: ignore[assignment]  # what needs it is left out, so that a fork is small
    names = [one.name for one in pkgutil.walk_packages(hpc_cifar.__path__, "hpc_cifar.")]
    for name in names:
        part = name.split(".")[1]
        if any(word in name for word in LEFT_OUT) or (part in HEAVY and not heavy):
            continue
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    if not heavy:
        del sys.modules["torch"]
    # the commands of the application are made once, not in every fork
    made: Any = importlib.import_module("typer.main")
    made.get_command = functools.cache(made.get_command)
    made.get_command(importlib.import_module("hpc_cifar.cli.main").app)
    for name in (
        "json",
        "csv",
        "yaml",
        "rich.console",
        "typer.completion",
        "plotly.graph_objects",
        "plotly.offline",
        "jinja2",
        "torch",
        "torchvision",
        "PIL.Image",
        "safetensors",
    ):
        if heavy or name not in ("torch", "torchvision", "PIL.Image", "safetensors"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024


def child(order: dict[str, Any]) -> None:
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    out = os.open(order["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    err = os.open(order["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for number, opened in ((0, null), (1, out), (2, err)):
        os.dup2(opened, number)
    most = address_space() + order["memory_mib"] * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    cpu = 3 * int(order["limit_s"]) + 5
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 2))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    mine = {os.getpid()}

    def send(held: int, number: int, *_: Any) -> None:
        facts = Path(f"/proc/self/fdinfo/{held}").read_text()
        kill(int(facts.partition("Pid:")[2].split()[0]), number)

    def kill(pid: int, number: int, _real: Any = os.kill) -> None:
        if pid in mine or number == 0:
            return _real(pid, number)
        os.write(err, f"\n{SIGNALLED}{pid} {number}\n".encode())
        os._exit(0)  # what would follow waits for an end that does not come

    os.kill = kill
    os.killpg = kill
    signal.pidfd_send_signal = send
    sys.argv = ["hpc_cifar", *order["argv"]]
    code = 70
    try:
        runpy.run_module("hpc_cifar", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        import traceback

        os.write(err, f"\nTraceback of the fuzzer\n{traceback.format_exc()}".encode())
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code & 0xFF)


def waited(pid: int, watched: int, limit_s: float) -> bool:
    """Whether a process hangs: it has not ended within the limit, and then does nothing, or takes six times as long.

    A machine that others use as well may be slow.
    """
    for number in range(6):
        if select.select([watched], [], [], limit_s)[0]:
            return False
        if number == 0 and (used := _idle(pid)) is not None:
            time.sleep(1.0)
            if _idle(pid) == used and not select.select([watched], [], [], 0)[0]:
                return True
    return True


def _idle(pid: int) -> str | None:
    """The processor time of a process that sleeps and has no children; None of another one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().strip()
    except OSError:
        return None
    return f"{fields[11]} {fields[12]}" if fields[0] in "SD" and not children else None


def run(order: dict[str, Any]) -> dict[str, Any]:
    began = time.monotonic()
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(tell, str(resident_kib()).encode())  # fewer pages than its parent has: files are mapped when they are read
            os.close(tell)
            os.close(told)
            child(order)
        finally:
            os._exit(71)
    os.close(tell)
    with os.fdopen(told) as stream:
        before = int(stream.read() or 0)
    if order.get("later"):
        seconds, path = order["later"]
        time.sleep(seconds)
        with contextlib.suppress(OSError):
            Path(path).unlink()
    watched = os.pidfd_open(pid)
    try:
        hung = waited(pid, watched, order["limit_s"])
    finally:
        os.close(watched)
    if hung:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    _, status, used = os.wait4(pid, 0)
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)  # what it has begun
    ended = os.waitstatus_to_exitcode(status)
    return {
        "code": ended if ended >= 0 else None,
        "signal": None if ended >= 0 or hung else -ended,
        "hung": hung,
        "seconds": round(time.monotonic() - began, 3),
        "cpu_s": round(used.ru_utime + used.ru_stime, 3),
        "grown_mib": max(0, used.ru_maxrss - before) // 1024,
    }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else may be taken for an answer
    preload(sys.argv[1] == "heavy")
    gc.collect()
    gc.freeze()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)
    os._exit(0)  # libraries have much to say at their end


if __name__ == "__main__":
    main()
