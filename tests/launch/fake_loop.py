"""A training loop without torch, which keeps to the interface of ``hpc_cifar.train.loop``; tags of the experiment steer it.

Tests copy it over ``train/loop.py`` in a copy of the package, so that everything around it is the real thing.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import files
from ..errors import NonFiniteLoss
from ..runs import Run

VERSION = "first"


class Heavy:
    """Stands for torch: to take it apart at the end costs time."""

    def __del__(self) -> None:
        print("torn down", flush=True)


heavy = Heavy() if "SUBMITIT_EXECUTOR" in os.environ else None


def wants_gpu(experiment: Any) -> bool:
    return False


def train(
    run: Run,
    *,
    max_steps: int | None = None,
    data_root: Path,
    console: bool = True,
    world: Any = None,
    begin: Callable[[], None] | None = None,
    segment: str = "",
    job: str = "",
    on_hang: Any = None,
    gives_up: Any = None,
) -> dict[str, Any]:
    if world is not None and world.main and begin is not None:
        begin()
    rank, asked = int(os.environ.get("RANK", 0)), []
    restore = {
        number: signal.signal(number, lambda number, _: asked.append(number)) for number in (signal.SIGUSR2, signal.SIGTERM)
    }
    try:
        return _train(run, max_steps, console, rank, asked, gives_up)
    finally:
        for number, handler in restore.items():
            signal.signal(number, handler)


def _train(run: Run, max_steps: int | None, console: bool, rank: int, asked: list[int], gives_up: Any) -> dict[str, Any]:
    experiment = run.experiment()
    tags = dict(tag.partition("=")[::2] for tag in experiment.tracking.tags)
    saved = run.checkpoints / f"step-{rank}"
    step = int(saved.read_text()) if saved.exists() else 0
    steps_per_epoch, before = 10, run.state()
    total = experiment.epochs * steps_per_epoch
    restarts = (-1 if before.restarts is None else before.restarts) + 1
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    facts = {name: os.environ.get(name) for name in (*names, "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "PYTHONSAFEPATH")}
    facts |= {"version": VERSION, "file": __file__, "sid": os.getsid(0), "pid": os.getpid(), "step": step}
    facts |= {"stdin": str(Path("/proc/self/fd/0").resolve()), "fds": sorted(p.name for p in Path("/proc/self/fd").iterdir())}
    files.append_json_line(run.path / f"seen-{rank}.jsonl", facts)
    if console and rank == 0:
        print(f"training {run.id} from step {step} with {VERSION} code", flush=True)

    def state(word: str, **more: Any) -> None:
        if rank == 0:
            run.update_state(
                state=word, epoch=step // steps_per_epoch, epochs=experiment.epochs, step=step, total_steps=total,
                train_loss=1.0, val_accuracy=0.5, images_per_second=1000.0, restarts=restarts, gpu_hours=0.0, seconds=1.0,
                world_size=int(os.environ.get("WORLD_SIZE", 1)), device="cpu", data="fake data", **more,
            )  # fmt: skip

    state("running")
    while step < min(total, max_steps or total):
        time.sleep(float(tags.get("step_s", "0.02")))
        if tags.get("die") == str(rank) and step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        if tags.get("raise") == str(rank) and step == 5:
            raise NonFiniteLoss("the training loss became nan at step 5\nmore words")
        while "held" in tags and not asked and not (run.path.parent / "go").exists():  # until the test says so
            time.sleep(0.02)
        if tags.get("deaf"):
            asked.clear()
        if "reason" in tags and rank == 0 and step == 5:
            print("to stderr", file=__import__("sys").stderr, flush=True)
        step += 1
        files.write_text(saved, str(step), durable=False)
        state("running")
        if rank == 0 and step % steps_per_epoch == 0:
            good = 1 - abs(experiment.optimizer.lr - 0.3) if tags.get("hill") else 0.5
            row = {"kind": "epoch", "epoch": step // steps_per_epoch, "step": step, "train_loss": 1.0, "val_accuracy": good}
            files.append_json_line(run.metrics_file, row)
            if gives_up is not None and gives_up(row):
                result = _result(run, rank, "stopped", step, restarts, reason="pruned")
                state("stopped", reason="pruned")
                return result
        if asked:
            cancelled = run.cancel_marker.exists()
            preempted = signal.SIGUSR2 in asked and "SUBMITIT_EXECUTOR" in os.environ
            word = "cancelled" if cancelled else "requeued" if preempted else "stopped"
            reason = "preempted" if signal.SIGUSR2 in asked else "terminated"
            result = _result(run, rank, word, step, restarts, reason=reason)
            state(word, reason=reason)
            return result
    word = "finished" if step >= total else "stopped"
    result = _result(run, rank, word, step, restarts, test_accuracy=0.75, test_loss=0.5)
    state(word)
    return result


def _result(run: Run, rank: int, word: str, step: int, restarts: int, **more: Any) -> dict[str, Any]:
    result = {"run": run.id, "state": word, "epochs": step // 10, "steps": step, "restarts": restarts, **more}
    result |= {"gpu_hours": 0.0, "seconds": 1.0, "data": "fake data"}
    if rank == 0:
        files.write_json(run.result_file, json.loads(json.dumps(result)))
    return result
