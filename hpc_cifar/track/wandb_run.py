"""Weights & Biases on rank 0: a mirror of ``metrics.jsonl`` that may be missing, slow or broken without harm.

Every segment of a run uses the same id with ``resume="allow"``, and metrics are plotted against our own ``global_step`` and
``epoch``, since W&B renumbers its ``_step`` on sync.
"""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from ..config.experiment import Tracking
from ..errors import first_line

INIT_TIMEOUT_S = 20
FINISH_TIMEOUT_S = 20


def new_id() -> str:
    """A fresh W&B run id."""
    return secrets.token_hex(6)


class WandbMirror:
    """One segment's W&B run; every call returns quickly and never raises.

    Args:
        config: the job file's ``tracking`` block.
        folder: the run directory; W&B's files go below it.
        run_id: stable over restarts.
        name, settings: shown in W&B.
        say: prints one line for the user.
    """

    def __init__(
        self,
        config: Tracking,
        folder: Path,
        run_id: str,
        name: str,
        settings: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self._run: Any = None
        self._say = say
        self.mode = self._choose_mode(config.wandb)
        if self.mode == "disabled":
            return
        arguments = {
            "project": config.project,
            "entity": config.entity,
            "group": config.group,
            "tags": list(config.tags) or None,
            "id": run_id,
            "resume": "allow",
            "name": name,
            "dir": str(folder),
            "config": settings,
        }
        if not self._start(arguments) and self.mode == "online":
            self.mode = "offline"
            self._say("W&B: could not be reached; recording offline, upload later from the run's wandb folder")
            self._start(arguments)

    def _choose_mode(self, wanted: str) -> str:
        wanted = os.environ.get("WANDB_MODE", wanted) if wanted != "disabled" else wanted
        if wanted == "online" and not _has_login():
            self._say("W&B: no login here (wandb login, or WANDB_API_KEY); recording offline")
            return "offline"
        return wanted if wanted in ("online", "offline") else "disabled"

    def _start(self, arguments: dict[str, Any]) -> bool:
        try:
            import wandb

            self._run = wandb.init(
                **arguments,
                mode="online" if self.mode == "online" else "offline",
                settings=wandb.Settings(
                    init_timeout=INIT_TIMEOUT_S,
                    finish_timeout=FINISH_TIMEOUT_S,
                    x_transaction_log_flush_interval=2,  # the default of 15 s loses the last rows on a kill
                    console="off",
                    silent=True,
                    disable_git=True,  # provenance.json has it, and a snapshot is no checkout
                ),
            )
            self._run.define_metric("*", step_metric="epoch")
            self._run.define_metric("step/*", step_metric="global_step")
        except Exception as error:  # whatever the client or its service does, training goes on
            self._give_up(f"W&B ({self.mode}): {first_line(error)}", teardown=True)
            return False
        return True

    def log(self, row: dict[str, Any]) -> None:
        """Mirror one row of ``metrics.jsonl``."""
        if self._run is None:
            return
        prefix = "step/" if row["kind"] == "step" else ""  # curves over steps and over epochs are different panels
        skipped = ("kind", "step", "epoch", "time")
        values = {prefix + key: value for key, value in row.items() if key not in skipped and value is not None}
        try:
            self._run.log({"global_step": row["step"], "epoch": row["epoch"], **values})
        except Exception as error:
            self._give_up(f"W&B stopped taking metrics: {first_line(error)}; metrics.jsonl has them all")

    def pictures(self, files: dict[str, Path]) -> None:
        """Log image files under these names."""
        if self._run is None:
            return
        try:
            import wandb

            self._run.log({name: wandb.Image(str(path)) for name, path in files.items()})
        except Exception as error:
            self._give_up(f"W&B stopped taking pictures: {first_line(error)}; they lie in the run directory")

    def finish(self, summary: dict[str, Any], *, preempted: bool = False, failed: bool = False) -> None:
        """Write the summary and close, in bounded time."""
        if self._run is None:
            return
        try:
            if preempted:
                self._run.mark_preempting()
            self._run.summary.update({key: value for key, value in summary.items() if value is not None})
            self._run.finish(exit_code=1 if preempted or failed else 0)
        except Exception as error:
            self._give_up(f"W&B could not be finished: {first_line(error)}; metrics.jsonl has everything")
        self._run = None

    def _give_up(self, line: str, *, teardown: bool = False) -> None:
        self._say(line)
        self._run = None
        if teardown:
            try:
                import wandb

                wandb.teardown()
            except Exception:  # the service may be half started; there is nothing left to close
                pass


def _has_login() -> bool:
    """Whether W&B would find a key, without asking its server: the variable, or a netrc entry for its host."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError, RuntimeError):
        return False
