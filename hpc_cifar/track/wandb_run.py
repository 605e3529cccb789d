"""A run directory's mirror in Weights & Biases: one W&B run, whose steps are the numbers of the rows of ``metrics.jsonl``.

W&B says where it stands when the run is opened, so an upload goes on there: it can be repeated at any time, by any process that
sees the run directory, and no row comes twice. Source: the client of wandb 0.31, whose ``starting_step`` follows the last row
that the server has.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import files, processes
from ..config.experiment import Tracking
from ..errors import TrackingError, first_line
from ..records import RunState
from ..runs import Run
from . import bounds, identity, summary, wandb_tables
from .login import has_login, mode, quiet_client, server
from .rows import A_STEP
from .tracker import FINISH_S, PREFIX, Rows, figures
from .wandb_console import Console

TITLE = "W&B"
INIT_TIMEOUT_S = 20
LATE_S = 10  # after the client's own time limit, which what comes before the last rows, such as an alert, may keep it from
EPOCH_CURVES = ("train_loss", "train_accuracy", "lr", "images_per_second")
OVER_STEPS = (*(f"{prefix}*" for prefix in PREFIX.values() if prefix), "evaluation/*")
NO_CONSOLE = "W&B: this client cannot show a log, so tracking.console is left out: pip install --upgrade wandb"
CHECKS, CHECK_S = 5, 1.0  # whether the server has every row; it may take a moment to count
PATIENT_S = 600.0  # for an artifact, where nobody waits for this process


def problem(run: Run | None) -> str:
    """See :class:`tracker.Tracker`."""
    there = has_login(identity.kept(run).base_url if run is not None else "")
    return "" if there else "W&B: no login here: type 'wandb login', or set WANDB_API_KEY"


def begins(run: Run, tracking: Tracking, say: Callable[[str], None]) -> bool:
    """See :class:`tracker.Tracker`; which run of W&B it is, is noted, for whoever uploads it later."""
    found = mode(tracking.wandb, say)
    if found != "disabled":
        identity.note(run, server(), say)
    return found == "online"


@contextlib.contextmanager
def opened(run: Run, say: Callable[[str], None], beside: bool) -> Iterator[Upload]:
    """See :class:`tracker.Tracker`; it keeps within its memory meanwhile."""
    with bounds.watched(run.id) as last_words:
        state = run.state()
        trains_here = state.state == "running" and state.host == os.uname().nodename
        upload = Upload(run, last_words, state.pid if trains_here else None, FINISH_S if beside else PATIENT_S)
        say(f"W&B: {upload.address}")
        for note in upload.notes:
            say(note)
        try:
            yield upload
        except Exception:
            upload.take_back()
            atexit.unregister(_hush)
            atexit.register(_hush)  # runs before the client's own, which were registered before
            raise


class Upload:
    """A run that is open in W&B.

    Args:
        run: its directory; W&B's own files go below it.
        last_words: see :func:`bounds.confined`.
        pid: process whose memory and processors W&B's system metrics are of, if it runs here.
        artifact_s: how long :meth:`finish` waits for what is on its way, of a run whose checkpoint or code is kept in W&B.

    Raises:
        TrackingError: W&B does not answer, or does not want it.
    """

    def __init__(self, run: Run, last_words: int, pid: int | None = None, artifact_s: float = FINISH_S) -> None:
        quiet_client()
        import wandb

        self.run = run
        self._ledger = run.path / "wandb-pictures.json"
        self._told = 0  # of how many epochs the summary knows
        tracking = run.experiment().tracking
        self._alerts, self._artifact, self._code = tracking.alerts, tracking.artifact, tracking.code
        self._finish_s = artifact_s if tracking.artifact or tracking.code else FINISH_S
        self._shown: set[str] = set()  # digests of the pictures that this upload has handed over
        place = identity.decide(run, server())
        identity.follow_no_agent()
        self._server = identity.address(place, server())
        command = summary.command(run)
        settings: dict[str, Any] = {
            "init_timeout": INIT_TIMEOUT_S,
            "finish_timeout": self._finish_s,
            "x_transaction_log_flush_interval": 2,
            "console": "off",
            "silent": True,
            "disable_git": True,  # provenance.json has it, and a snapshot is no checkout
            **({"x_stats_pid": pid} if pid is not None else {"x_disable_stats": True, "x_disable_meta": True}),
        }
        known = {"base_url": self._server, "git_commit": summary.commit(run), "program": command[0] if command else ""}
        known["sweep_id"] = place.sweep
        settings |= {name: value for name, value in known.items() if value}
        try:
            with _as(command), bounds.confined(last_words):
                self._wandb = wandb.init(
                    project=place.project,
                    entity=place.entity or None,
                    group=place.group,  # empty, too: else the client takes the variable of whoever uploads
                    job_type=place.job_type,
                    tags=list(place.tags),
                    notes=place.notes,
                    id=place.id,
                    resume="allow",
                    name=place.name,
                    dir=os.environ.get("WANDB_DIR") or str(run.path),
                    config=summary.config(run),
                    mode="online",
                    settings=wandb.Settings(**_settings(settings)),
                )
            self._define_axes()
            self.notes = [words for words in (identity.left_aside(run, place, server()),) if words and place.opened]
            self._console = Console(run) if tracking.console else None
            if self._console is not None and not hasattr(self._wandb, "write_logs"):
                self.notes.append(NO_CONSOLE)
                self._console = None
            identity.opened(run, place, *(str(getattr(self._wandb, name) or "") for name in ("entity", "project", "url")))
            if run.state().state == "running":
                self._tell({"state": "running"})
        except Exception as error:  # whatever the client or its service does
            _forget()
            raise TrackingError(f"W&B: {first_line(error)}") from None
        self.begun = int(self._wandb.starting_step)  # W&B has what has a smaller number
        self.taken = self.begun

    def _define_axes(self) -> None:
        """No panel is over W&B's own ``_step``, which counts thousandths here; what is only an axis has no panel."""
        self._wandb.define_metric("global_step", hidden=True)
        self._wandb.define_metric("epoch", step_metric="global_step", hidden=True)
        for name in OVER_STEPS:
            self._wandb.define_metric(name, step_metric="global_step")
        for name in EPOCH_CURVES:
            self._wandb.define_metric(name, step_metric="epoch")
        for name in summary.VALIDATION:  # their best and last are told, see there
            self._wandb.define_metric(name, step_metric="epoch", summary="none")
        self._known = {*EPOCH_CURVES, *summary.VALIDATION}  # figures that have their axis

    def _define(self, kinds: Mapping[str, str]) -> None:
        """Name the axis of each figure: clients of 0.21 do not tell a server of names with a ``*``."""
        for name in kinds.keys() - self._known:
            self._wandb.define_metric(name, step_metric="epoch" if kinds[name] == "epoch" else "global_step")
            self._known.add(name)

    @property
    def address(self) -> str:
        """Where people see it."""
        return str(self._wandb.url or "")

    def rows_there(self) -> int:
        """Numbers of rows that the server says it has: its client does not tell when it has given up on it.

        Raises:
            TrackingError: it does not say.
        """
        import wandb

        try:
            asked = wandb.Api(overrides={"base_url": self._server} if self._server else None, timeout=10)
            return int(asked.run(f"{self._wandb.entity}/{self._wandb.project}/{self._wandb.id}").lastHistoryStep) + 1
        except Exception as error:
            raise TrackingError(f"W&B does not say what it has: {first_line(error)}") from None

    def push(self, rows: Rows) -> None:
        """Hand over rows and pictures."""
        try:
            self._define(rows.kinds)
            for at, row in rows.new:
                self._wandb.log({"global_step": row["step"], "epoch": row["epoch"], **figures(row)}, step=at, commit=True)
                self.taken = at + 1
            if len(rows.epochs) != self._told:
                self._wandb.summary.update(summary.best_and_last(rows.epochs))
                self._told = len(rows.epochs)
            self._push_pictures(_ledger(self._ledger))
            self._push_console()
        except Exception as error:
            raise TrackingError(f"W&B took no more rows: {first_line(error)}") from None

    def _push_console(self, ended: bool = False) -> None:
        for text in self._console.new(ended) if self._console is not None else ():
            self._wandb.write_logs(text)

    def take_back(self) -> None:
        """Note that W&B may not have what it was handed; what has a number of its own is asked of the server."""
        if self._console is not None:
            with contextlib.suppress(OSError):
                self._console.back()

    def _push_pictures(self, taken: list[dict[str, Any]]) -> None:
        """Pictures and tables of evaluations, once each: with a number of their own, behind the rows that there are.

        It is noted first; if the pictures do not arrive, they get another one next time.
        """
        import wandb

        arrived = (place["digest"] for place in taken if place["at"] < self.begun)
        known = {*arrived, *self._shown}
        for folder in sorted(path for path in (self.run.path / "evaluation").glob("*") if path.is_dir()):
            pictures = [*sorted(folder.glob("*.png")), *wandb_tables.files_of(folder)]
            panels = (*(path.stem for path in folder.glob("*.png")), *wandb_tables.PANELS)
            self._define({f"evaluation/{folder.name}-{panel}": "evaluation" for panel in panels})
            digest = hashlib.sha256("".join(files.sha256_of(path) for path in pictures).encode()).hexdigest()
            if not pictures or digest in known:
                continue
            at = self.taken
            self._shown.add(digest)
            taken.append({"at": at, "digest": digest, "folder": folder.name})
            files.write_json(self._ledger, taken)
            shown = {f"evaluation/{folder.name}-{path.stem}": wandb.Image(str(path)) for path in folder.glob("*.png")}
            shown |= wandb_tables.tables(folder)
            self._wandb.log({"global_step": at // A_STEP, **shown}, step=at, commit=True)
            self.taken = at + 1

    def finish(self, rows: Rows, state: RunState, left: bool) -> None:
        """Hand over the rest and the summary, and ask the server whether it has every row; in bounded time.

        Raises:
            TrackingError: W&B may not have everything.
        """
        sent_away = summary.interrupted(state)
        try:
            if sent_away:  # first, since the machine may be gone before the rest has arrived
                self._wandb.mark_preempting()
            self.push(rows)
            self._push_console(ended=True)
            told = self._wandb.summary.get("state")  # type: ignore[no-untyped-call]  # by an upload before
            self._tell(summary.outcome(self.run, rows.epochs))
            if self._alerts and told != state.state and state.state in ("finished", "failed"):
                level = "ERROR" if state.state == "failed" else "INFO"
                self._wandb.alert(f"{self.run.id}: {state.state}"[:63], state.reason or "see its report", level=level)
            if self._code and not sent_away:
                self._push_code()
            if self._artifact and state.state == "finished":
                self._push_checkpoint()
            good = not sent_away and state.state in ("finished", "stopped", "cancelled", "" if left else "running")
            with _bounded(self._finish_s + LATE_S):
                self._wandb.finish(exit_code=0 if good else 1)
        except Exception as error:
            _forget()
            raise TrackingError(f"W&B could not be finished: {first_line(error)}") from None
        for _ in range(CHECKS):
            if self.rows_there() >= self.taken:
                return
            time.sleep(CHECK_S)
        raise TrackingError("W&B does not have all rows")

    def _push_checkpoint(self) -> None:
        """The selected one, as a version of the experiment's model, and that it has arrived; W&B knows the same files again."""
        import wandb

        experiment = self.run.experiment()
        selected = "best" if experiment.checkpoint.select == "best" else "latest"
        folder = (self.run.checkpoints / selected).resolve()
        about = {"run": self.run.id, **files.read_object(folder / "manifest.json")}
        artifact = wandb.Artifact(f"{experiment.name}-model", type="model", metadata=about)
        artifact.add_dir(str(folder))
        self._wandb.log_artifact(artifact, aliases=[selected, self.run.id]).wait(timeout=math.ceil(self._finish_s))

    def _push_code(self) -> None:
        """The package that trains, for W&B's page of a run's code; a run that ``train`` made has no copy of it."""
        name = f"source-{self.run.experiment().name}"
        logged = self._wandb.log_code(str(self.run.code), name, include_fn=_is_source, exclude_fn=lambda _: False)
        if logged is not None:
            logged.wait(timeout=math.ceil(self._finish_s))

    def _tell(self, values: dict[str, Any]) -> None:
        """Update the summary; why an earlier segment ended is no word on this one."""
        known: Any = self._wandb.summary
        if "reason" not in values and known.get("reason") is not None:
            del known["reason"]
        self._wandb.summary.update(values)


def _is_source(path: str) -> bool:
    """A file of a snapshot that is one: no compiled one, and no link, which may lead out of it."""
    return not path.endswith(".pyc") and not Path(path).is_symlink()


def _settings(wanted: dict[str, Any]) -> dict[str, Any]:
    """Those that the client has: 0.21 refuses limits of time that later ones know."""
    import wandb

    return {name: value for name, value in wanted.items() if name in wandb.Settings.model_fields}


@contextlib.contextmanager
def _as(command: list[str]) -> Iterator[None]:
    """W&B shows the command line of this process as the run's; here that of the training, if it is known."""
    own, sys.argv = sys.argv, command or sys.argv
    try:
        yield
    finally:
        sys.argv = own


def _ledger(path: Path) -> list[dict[str, Any]]:
    """Which pictures were handed over at which numbers; without what is damaged, which is handed over again."""
    found = files.read_json(path)
    rows = found if isinstance(found, list) else []
    return [row for row in rows if isinstance(row, dict) and type(row.get("at")) is int and isinstance(row.get("digest"), str)]


@contextlib.contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """End the client's service if it takes longer. Source: wandb 0.31, whose client waits for its service without a limit.

    Raises:
        TimeoutError: it took longer.
    """
    late = threading.Event()

    def end() -> None:
        late.set()
        _end_service()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception:
        if not late.is_set():
            raise
    finally:
        timer.cancel()
    if late.is_set():  # whether or not the client noticed
        raise TimeoutError(f"it has not taken the rest within {seconds:.0f} s")


def _end_service() -> None:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            processes.send(int(path.parent.name), signal.SIGKILL, _is_service)


def _is_service(pid: int) -> bool:
    """Whether a process is the client's service, and was started by this one."""
    fields = processes.stat(pid)
    if fields is None or int(fields[1]) != os.getpid():
        return False
    return Path(f"/proc/{pid}/comm").read_text(errors="replace").startswith("wandb-core")


def _hush() -> None:
    """Say nothing more: a client of 0.21 calls its service as this process ends, and prints a traceback if that has gone."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _forget() -> None:
    """Let go of the client's service, which may be half started, or wait for a server that has gone."""
    _end_service()
    try:
        import wandb

        wandb.teardown(exit_code=1)
    except (Exception, SystemExit):  # it ends this process with what its own ended with
        pass
