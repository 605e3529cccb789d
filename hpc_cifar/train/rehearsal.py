"""The part of ``hpc-cifar drill`` that is in the ranks: does to its own process what it is told to, which needs no rights.

Only where the job's environment has ``HPC_CIFAR_DRILL``. The files are in ``<run>/drill``:

order.json                  number, act, ranks, bytes: what ``launch/drill.py`` wants done, one order at a time
<number>-rank-<r>.json      written by a rank right before it obeys, so that it does so once: step, time

Orders that are there when a rank begins are not for it.
pace                        the least seconds of a step, so that a quick training lasts; first, those of the variable
"""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import files
from .step import Stepper

VARIABLE, NAME = "HPC_CIFAR_DRILL", "drill"
LOOK_S = 0.05


def begin(run: Path, rank: int, stepper: Stepper, step: Callable[[], int]) -> None:
    """Listen from now on, if this is a drill, and rest after every step; ``step`` says how many updates were made."""
    if VARIABLE not in os.environ:
        return
    folder = run / "drill"
    folder.mkdir(exist_ok=True)
    known = files.read_json(folder / "order.json")
    last = int(known["number"]) if isinstance(known, dict) else 0

    def rest() -> None:
        pace_s = files.read_json(folder / "pace")
        time.sleep(float(os.environ[VARIABLE] if pace_s is None else pace_s))

    stepper.rest = rest
    if not any(thread.name == NAME for thread in threading.enumerate()):
        threading.Thread(target=_listen, args=(folder, rank, step, last), name=NAME, daemon=True).start()


def _listen(folder: Path, rank: int, step: Callable[[], int], last: int) -> None:
    while True:
        time.sleep(LOOK_S)
        order = files.read_json(folder / "order.json")
        if not isinstance(order, dict) or order["number"] <= last:
            continue
        last = order["number"]
        if rank in order["ranks"]:
            said = {"step": step(), "time": time.time()}
            files.write_json(folder / f"{last}-rank-{rank}.json", said, durable=False)
            _obey(order, folder.parent / "checkpoints")


def _obey(order: dict[str, Any], checkpoints: Path) -> None:
    match order["act"]:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "kill in a save":
            while not any(path.name.startswith(".step-") for path in checkpoints.iterdir()):
                time.sleep(0.0005)
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "write no more":  # than so many bytes into a file: EFBIG
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(order["bytes"]), hard))
