"""A run directory's mirror in Weights & Biases: one W&B run, whose steps are the numbers of the rows of ``metrics.jsonl``.

W&B says where it stands when the run is opened, so an upload goes on there: it can be repeated at any time, by any process that
sees the run directory, and no row comes twice. Source: the client of wandb 0.31, whose ``starting_step`` follows the last row
that the server has.
"""

from __future__ import annotations

import configparser
import contextlib
import hashlib
import math
import netrc
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from .. import files, processes
from ..errors import TrackingError, first_line
from ..records import Provenance, Result, is_sound
from ..redaction import redact_words
from ..runs import Run
from .rows import Tail

INIT_TIMEOUT_S = 20
FINISH_TIMEOUT_S = 20
LATE_S = 10  # after the client's own time limit, which what comes before the last rows, such as an alert, may keep it from
SUMMARY = (
    *("state", "reason"),
    *("test_accuracy", "test_loss", "tta_accuracy", "tta_loss", "gpu_hours", "seconds", "restarts", "lost_steps"),
    *("host_memory_mib", "device_memory_mib", "checkpoints", "checkpoint_seconds", "data", "device", "world_size"),
)
HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")  # where the client looks unless it is told: since 0.31, and before
EPOCH_CURVES = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "images_per_second")
NO_CURVES = ("kind", "step", "epoch", "time")  # of a row: not curves


def id_of(run: Run) -> str:
    """The run's id in W&B: one for all its segments, made by whoever asks first."""
    path = run.path / "wandb-id"
    if not path.exists():
        files.write_text(path, secrets.token_hex(6))
    return path.read_text(encoding="utf-8")


def mode(wanted: str, say: Callable[[str], None]) -> str:
    """``online``, ``offline`` or ``disabled``: what the job file wants, or WANDB_MODE, as far as there is a login."""
    found = os.environ.get("WANDB_MODE", wanted) if wanted != "disabled" else wanted
    if found == "online" and not has_login():
        say("W&B: no login here (wandb login, or WANDB_API_KEY); hpc-cifar sync uploads later")
        return "offline"
    return found if found in ("online", "offline") else "disabled"


def has_login() -> bool:
    """Whether W&B would find a key, without asking its server: a variable, or a netrc entry for its host."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    named = urlparse(server()).netloc
    try:
        path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
        known = netrc.netrc(str(path))
        return any(known.authenticators(host) for host in ((named,) if named else HOSTS))
    except (OSError, netrc.NetrcParseError, RuntimeError):
        return False


def server() -> str:
    """The address that was chosen for W&B; empty where nobody has chosen one."""
    return os.environ.get("WANDB_BASE_URL") or _host_in_settings()


def _host_in_settings() -> str:
    """What ``wandb login --host`` wrote down: the client's settings, of this folder or of the user."""
    paths = [Path(os.environ.get("WANDB_DIR") or ".") / "wandb" / "settings"]
    with contextlib.suppress(RuntimeError):  # no home folder at all, as in some containers
        paths.insert(0, Path(os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb") / "settings")
    found = ""
    for path in paths:
        settings = configparser.ConfigParser()
        try:
            settings.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            continue
        found = settings.get("default", "base_url", fallback=found)
    return found


class Upload:
    """A run that is open in W&B.

    Args:
        run: its directory; W&B's own files go below it.
        pid: process whose memory and processors W&B's system metrics are of, if it runs here.
        artifact_s: how long :meth:`close` waits for what is on its way, of a run whose checkpoint is kept in W&B.

    Raises:
        TrackingError: W&B does not answer, or does not want it.
    """

    def __init__(self, run: Run, pid: int | None = None, artifact_s: float = FINISH_TIMEOUT_S) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # it tells where it found its key before it reads its settings
        import wandb

        self.run = run
        self._tail = Tail(run.metrics_file)
        self._ledger = run.path / "wandb-pictures.json"
        tracking = run.experiment().tracking
        self._alerts, self._artifact = tracking.alerts, tracking.artifact
        self._finish_s = artifact_s if tracking.artifact else FINISH_TIMEOUT_S
        self._shown: set[str] = set()  # digests of the pictures that this upload has handed over
        settings: dict[str, Any] = {
            "init_timeout": INIT_TIMEOUT_S,
            "finish_timeout": self._finish_s,
            "x_transaction_log_flush_interval": 2,
            "console": "off",
            "silent": True,
            "disable_git": True,  # provenance.json has it, and a snapshot is no checkout
            **({"x_stats_pid": pid} if pid is not None else {"x_disable_stats": True, "x_disable_meta": True}),
        }
        try:
            self._wandb = wandb.init(
                project=tracking.project,
                entity=tracking.entity,
                group=tracking.group,
                job_type="train",
                tags=list(tracking.tags) or None,
                id=id_of(run),
                resume="allow",
                name=run.id,
                dir=str(run.path),
                config=self._config(),
                mode="online",
                settings=wandb.Settings(**settings),
            )
            for name in EPOCH_CURVES:
                self._wandb.define_metric(name, step_metric="epoch")
            self._wandb.define_metric("step/*", step_metric="global_step")
        except Exception as error:  # whatever the client or its service does
            _forget()
            raise TrackingError(f"W&B: {first_line(error)}") from None
        self.begun = int(self._wandb.starting_step)  # W&B has what has a smaller number
        self.taken = self.begun
        self.pushed = 0  # rows

    @property
    def address(self) -> str:
        """Where people see it."""
        return str(self._wandb.url or "")

    @property
    def path(self) -> str:
        """Entity, project and id."""
        return f"{self._wandb.entity}/{self._wandb.project}/{self._wandb.id}"

    @property
    def damaged(self) -> int:
        """Lines of ``metrics.jsonl`` that were left out."""
        return self._tail.damaged

    def _config(self) -> dict[str, Any]:
        provenance = files.read_object(self.run.path / "provenance.json")
        provenance = provenance if is_sound(Provenance, provenance) else {}
        git = {key: value for key, value in (provenance.get("git") or {}).items() if key in ("commit", "dirty")}
        known: dict[str, Any] = {key: provenance[key] for key in ("packages", "python", "host", "command") if key in provenance}
        if isinstance(words := known.get("command"), list):  # an earlier version knew fewer keys
            known["command"] = redact_words([str(word) for word in words])
        return {
            "experiment": self.run.experiment().model_dump(mode="json"),
            "plan": files.read_object(self.run.path / "plan.json"),
            "run": self.run.id,
            "data": self.run.state().data,
            "git": git,
            **known,
        }

    def push(self) -> int:
        """Hand over rows and pictures that W&B has not got; the number of rows."""
        count = 0
        try:
            for at, row in self._tail.new():
                if at < self.taken:
                    continue
                prefix = "step/" if row["kind"] == "step" else ""  # curves over steps and epochs are different panels
                values = {prefix + k: v for k, v in row.items() if k not in NO_CURVES and v is not None}
                self._wandb.log({"global_step": row["step"], "epoch": row["epoch"], **values}, step=at, commit=True)
                self.taken = at + 1
                count += 1
            self._push_pictures(_ledger(self._ledger))
        except Exception as error:
            raise TrackingError(f"W&B took no more rows: {first_line(error)}") from None
        self.pushed += count
        return count

    def _push_pictures(self, taken: list[dict[str, Any]]) -> None:
        """Pictures of evaluations, once each: with a number of their own, behind the rows that there are.

        It is noted first; if the pictures do not arrive, they get another one next time.
        """
        import wandb

        arrived = (place["digest"] for place in taken if place["at"] < self.begun)
        known = {*arrived, *self._shown}
        for folder in sorted(path for path in (self.run.path / "evaluation").glob("*") if path.is_dir()):
            pictures = sorted(folder.glob("*.png"))
            digest = hashlib.sha256("".join(files.sha256_of(path) for path in pictures).encode()).hexdigest()
            if not pictures or digest in known:
                continue
            at = max(self.taken, self._tail.last + 1)
            self._shown.add(digest)
            taken.append({"at": at, "digest": digest, "folder": folder.name})
            files.write_json(self._ledger, taken)
            shown = {f"evaluation/{folder.name}-{path.stem}": wandb.Image(str(path)) for path in pictures}
            self._wandb.log(shown, step=at, commit=True)
            self.taken = at + 1

    def close(self, left: bool = False) -> None:
        """Hand over the rest and the summary; in bounded time.

        Args:
            left: whoever trained has gone, so that a run that seems to run has failed.

        Raises:
            TrackingError: W&B may not have everything.
        """
        state = self.run.state()
        ended = (self.run.result() if state.state != "requeued" else None) or Result()
        values = {
            key: value for one in (state, ended) for key in SUMMARY if (value := getattr(one, key, None)) not in (None, "")
        }
        events = [row for row in files.read_json_lines(self.run.metrics_file) if row.get("kind") == "event"]
        values["preemptions"] = sum(row.get("event") == "requeued" and row.get("reason") == "preempted" for row in events)
        try:
            if state.state == "requeued":  # first, since the machine may be gone before the rest has arrived
                self._wandb.mark_preempting()
            self.push()
            told = self._wandb.summary.get("state")  # type: ignore[no-untyped-call]  # by an upload before
            self._wandb.summary.update(values | self._evaluations())
            if self._alerts and told != state.state and state.state in ("finished", "failed"):
                self._wandb.alert(f"{self.run.id}: {state.state}"[:63], state.reason or "see its report")
            if self._artifact and state.state == "finished":
                self._push_checkpoint()
            good = state.state in ("finished", "stopped", "cancelled", "" if left else "running")
            with _bounded(self._finish_s + LATE_S):
                self._wandb.finish(exit_code=0 if good else 1)
        except Exception as error:
            _forget()
            raise TrackingError(f"W&B could not be finished: {first_line(error)}") from None

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

    def _evaluations(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path in (self.run.path / "evaluation").glob("*/evaluation.json"):
            result = files.read_object(path)
            numbers = {name: result.get(name) for name in ("accuracy", "loss", "top5_accuracy", "ece")}
            macro, tta = result.get("macro"), result.get("tta")
            numbers |= macro if isinstance(macro, dict) else {}
            numbers |= {"tta_accuracy": tta.get("accuracy")} if isinstance(tta, dict) else {}
            numbers = {name: value for name, value in numbers.items() if isinstance(value, int | float)}
            found |= {f"evaluation/{path.parent.name}_{name}": value for name, value in numbers.items()}
        return found


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


def _forget() -> None:
    """Let go of the client's service, which may be half started, or wait for a server that has gone."""
    _end_service()
    try:
        import wandb

        wandb.teardown(exit_code=1)
    except (Exception, SystemExit):  # it ends this process with what its own ended with
        pass
