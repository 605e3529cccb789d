"""What people read: tables, the plan, and a run that is being followed."""

from __future__ import annotations

import datetime
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import terminal

if TYPE_CHECKING:
    from ..config.cluster import Cluster
    from ..launch.estimate import Length, Start
    from ..launch.status import Status
    from ..plan import Plan
    from ..records import Result, RunState
    from ..runs import Run


printable = terminal.one_line


def facts(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Names and values, one a line, aligned."""
    width = max((len(name) for name, _ in rows), default=0)
    print(printable(title))
    for name, value in rows:
        print(f"  {name:<{width}}  {printable(value)}")


def percent(share: Any) -> str:
    return f"{100 * share:.2f} %" if isinstance(share, int | float) else "-"


def number(value: Any, form: str = ",.0f") -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def duration(seconds: Any) -> str:
    """``1:02:03`` or ``2:03``."""
    if not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:  # of a clock that was set back, once
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def plan_facts(name: str, cluster: Cluster, plan: Plan, expected: Sequence[tuple[str, str]] = ()) -> None:
    """The plan of a job, its budget, what is expected of it and what was adapted."""
    place = plan.placement
    what = f"{place.gpus_per_node} GPUs" if place.gpus_per_node else "CPU only"
    nodes = f"{place.nodes} node{'s' if place.nodes > 1 else ''}"
    share = f"at most {plan.largest_shard} on a rank" + (f", in {plan.accumulation} parts" if plan.accumulation > 1 else "")
    facts(
        f"plan of {name} on {cluster.name}",
        [
            ("processes", f"{place.world_size} ({nodes} x {place.processes_per_node}, {what})"),
            ("batch", f"{plan.batch_size} images, {share}"),
            ("steps", f"{plan.total_steps:,} ({plan.steps_per_epoch:,} an epoch, {plan.train_images:,} training images)"),
            ("time limit", f"{duration(plan.time_s)} a job; a run that needs more {_goes_on(cluster)}"),
            ("budget", f"at most {plan.gpu_hours:.2f} GPU-hours and {plan.core_hours:.2f} core-hours a job"),
            *expected,
        ],
    )
    for note in plan.notes:
        print(f"  note: {printable(note)}")


def _goes_on(cluster: Cluster) -> str:
    if cluster.executor == "local" or cluster.requeue:
        return "goes on in a requeued one"
    links = cluster.chain_links
    if links:
        return f"goes on in {'one more' if links == 1 else f'up to {links} more'}, which wait behind it from the start"
    return "stops there with a checkpoint, to be continued with: hpc-cifar resume"


def clock(stamp: str | None) -> str:
    """Local time of day of an ISO time, with the date where that is not today."""
    try:
        then = datetime.datetime.fromisoformat(stamp or "").astimezone()
    except ValueError:
        return "-"
    today = datetime.datetime.now(datetime.UTC).astimezone().date()
    return then.strftime("%H:%M" if then.date() == today else "%b %d %H:%M")


def expectations(start: Start | None, length: Length | None, plan: Plan) -> list[tuple[str, str]]:
    """When the job would start and how long the run will probably be, where somebody knows."""
    rows = []
    if start is not None:
        where = f" in partition {start.partition}" if start.partition else ""
        known = f"about {clock(start.start)} on {start.nodes or 'some nodes'}{where}, as Slurm estimates"
        rows.append(("start", known if start.start else f"not known: {start.note or 'Slurm does not say'}"))
    if length is not None:
        jobs = f"{length.jobs} job{'s' if length.jobs > 1 else ''} of at most {duration(plan.time_s)}"
        hours = f", {length.gpu_hours:.2f} GPU-hours" if length.gpu_hours else ""
        rate = f"{number(length.images_per_second)} images/s as {length.measured_by} had"
        rows.append(("length", f"about {duration(length.seconds)} in {jobs}{hours} ({rate})"))
    return rows


def result_table(run: Run, seen: Status) -> None:
    """How a run ended."""
    from ..records import Result
    from ..track import identity

    result, state, where = run.result() or Result(), run.state(), identity.url_of(run)
    if result.state != seen.state:
        result = Result()  # it is of an earlier segment
    rows = [("state", seen.state)]
    if seen.reason:
        rows.append(("reason", seen.reason))
    if result.test_accuracy is not None:
        rows += [("test accuracy", percent(result.test_accuracy)), ("test loss", number(result.test_loss, ".4f"))]
        if result.tta_accuracy is not None:
            rows.append(("with test-time augmentation", percent(result.tta_accuracy)))
    elif result.val_accuracy is not None or seen.val_accuracy is not None:
        rows.append(("validation", percent(seen.val_accuracy if result.val_accuracy is None else result.val_accuracy)))
    rows += [
        ("epochs", f"{number(seen.epoch if result.epochs is None else result.epochs)} of {number(seen.epochs)}"),
        ("time", duration(state.seconds if result.seconds is None else result.seconds)),
        ("data", result.data or state.data or "-"),
        ("restarts", str(seen.restarts)),
        ("GPU-hours", number(seen.gpu_hours, ".3f")),
        *_memory(result),
        ("run", str(run.path)),
        *([("W&B", where)] if where else []),
    ]
    facts(f"result of {run.id}", rows)


def _memory(result: Result) -> list[tuple[str, str]]:
    """The most that a process has used."""
    parts = ((" of the host", result.host_memory_mib), (" of the GPU", result.device_memory_mib))
    found = ", ".join(f"{value / 1024:.1f} GiB{where}" for where, value in parts if value)
    return [("memory", f"{found} (a process, at most)")] if found else []


def epoch_line(row: dict[str, Any], epochs: Any) -> str:
    """One plain line for a row of ``metrics.jsonl`` of kind ``epoch``."""
    parts = [f"epoch {row.get('epoch')}/{number(epochs)}"]
    for key, label in (("train_loss", "loss"), ("train_accuracy", "accuracy"), ("val_accuracy", "validation accuracy")):
        if row.get(key) is not None:
            parts.append(f"{label} {row[key]:.4f}" if key.endswith("loss") else f"{label} {percent(row[key])}")
    if row.get("images_per_second"):
        parts.append(f"{number(row['images_per_second'])} images/s")
    return "  ".join(parts)


class _Bar:
    """A live progress bar on a terminal; nothing elsewhere."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            TextColumn("{task.fields[what]}", markup=False), BarColumn(), TextColumn("{task.fields[how]}"), TimeElapsedColumn(),
            console=terminal.console(),
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None, what="waiting to start", how="")
        self._bar.start()

    def update(self, seen: Status, state: RunState) -> None:
        if seen.step is None or not state.total_steps:
            self._bar.update(self._task, what=printable(seen.state + (f" ({seen.reason})" if seen.reason else "")))
            return
        epoch = min((seen.epoch or 0) + 1, seen.epochs or 1)
        how = [f"step {seen.step:,}/{state.total_steps:,}"]
        if state.train_loss is not None:
            how.append(f"loss {state.train_loss:.4f}")
        if seen.val_accuracy is not None:
            how.append(f"validation {percent(seen.val_accuracy)}")
        how += [f"{number(state.images_per_second)} images/s", f"left {duration(seen.eta_s)}"]
        what = f"epoch {epoch}/{number(seen.epochs)}" + (f" [{seen.state}]" if seen.state != "running" else "")
        self._bar.update(self._task, total=state.total_steps, completed=seen.step, what=what, how="  ".join(how))

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()


def follow(run: Run) -> Status:
    """Watch a run to its end: a bar on a terminal, one line an epoch in any case; then the result.

    Ctrl-C leaves the run alone and raises ``KeyboardInterrupt`` again, after saying so.
    """
    from .. import files
    from ..launch.control import ASK_S, until_news, until_uploaded
    from ..launch.status import status
    from ..track.rows import epochs_of

    bar = _Bar() if sys.stdout.isatty() else None
    told: set[Any] = set()
    last, size, shown = "", -1, False
    try:
        while True:
            terminal.end_if_nobody_reads()
            seen, state = status(run), run.state()
            try:
                now_size = run.metrics_file.stat().st_size
            except OSError:
                now_size = 0
            if not bar and seen.state != last and not seen.ended:
                _say(_state_line(seen))
            if seen.wandb and not shown:
                shown = True
                (bar.say if bar else _say)(f"W&B: {seen.wandb}")
            if now_size != size:
                size = now_size
                for row in epochs_of(files.read_json_lines(run.metrics_file)):
                    if row["epoch"] not in told:
                        told.add(row["epoch"])
                        (bar.say if bar else _say)(epoch_line(row, seen.epochs))
            if bar:
                bar.update(seen, state)
            elif seen.state != last and seen.ended:
                _say(_state_line(seen))
            last = seen.state
            if seen.ended:
                until_uploaded([run])
                break
            until_news([run], ASK_S if run.last_job().executor == "slurm" else 0.5)
    except KeyboardInterrupt:
        if bar:
            bar.close()
            bar = None
        print(f"\n{run.id} goes on; look again with: hpc-cifar logs {run.id} -f   stop it with: hpc-cifar cancel {run.id}")
        raise
    finally:
        if bar:
            bar.close()
    result_table(run, seen)
    return seen


def _state_line(seen: Status) -> str:
    return printable(f"{seen.run}: {seen.state}" + (f" ({seen.reason})" if seen.reason else ""))


def _say(text: str) -> None:
    print(text, flush=True)
