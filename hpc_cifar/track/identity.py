"""Which run of W&B a run directory is: decided once, kept in ``wandb.json``, the same for whoever uploads.

Each field is the job file's, else W&B's own variable's, else a default. Until W&B has answered once, the variables of whoever
uploads go before those of the training, so that a wrong server or entity can be put right; from then on nothing changes. A run
that ``wandb agent`` asked for is in the project of its sweep, whatever the job file says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from .. import files, records
from ..config.experiment import Tracking
from ..config.source import parse
from ..errors import RunError, TrackingError
from ..records import TrackedAs
from ..runs import Run
from . import tracker

FILE, OLD_ID = "wandb.json", "wandb-id"  # an earlier version kept the id alone
IDS = ".wandb-ids"  # of the runs folder, by user: which ids of WANDB_RUN_ID are some run's
PROJECT, JOB_TYPE = "hpc-cifar", "train"
VARIABLES = {
    "entity": "WANDB_ENTITY",
    "project": "WANDB_PROJECT",
    "group": "WANDB_RUN_GROUP",
    "name": "WANDB_NAME",
    "job_type": "WANDB_JOB_TYPE",
    "notes": "WANDB_NOTES",
}
AGENT = ("WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH")  # of `wandb agent`, with which the client ignores what it is told
PLACE = ("entity", "project")  # of the sweep, for its runs
URL = re.compile(r"https?://[!-~]{1,1000}")
ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}")


def kept(run: Run) -> TrackedAs:
    """What is known so far; nothing is decided. A run of an earlier version has an id, and was uploaded with it."""
    found = records.read(TrackedAs, run.path / FILE)
    if found is not None:
        return found
    old = _old_id(run)
    tracking = run.experiment().tracking if old else Tracking()
    return TrackedAs(id=old, project=tracking.project or PROJECT, entity=tracking.entity or "") if old else TrackedAs()


def is_there(run: Run) -> bool:
    """Whether W&B has ever had something of the run."""
    return kept(run).opened or bool(_old_id(run))


def decide(run: Run, server: str, say: Callable[[str], None] = lambda _: None) -> TrackedAs:
    """The run's identity, from now on: called by whoever uploads, or is about to train.

    Args:
        server: the address that this process would take; empty where nobody has chosen one.

    Raises:
        TrackingError: its record is damaged: nobody knows which run of W&B it is.
    """
    known = kept(run)
    if known.problem:
        raise TrackingError(f"W&B: {known.problem}; remove {run.path / FILE}, and the run is uploaded as a new one")
    if known.opened:
        return known
    tracking = run.experiment().tracking
    values: dict[str, Any] = {
        name: getattr(tracking, name, None) or os.environ.get(variable) or getattr(known, name)
        for name, variable in VARIABLES.items()
    }
    values["tags"] = tracking.tags or _listed(os.environ.get("WANDB_TAGS", "")) or known.tags
    values["base_url"] = _public(server) or known.base_url
    values["id"] = known.id or _own_id(run, say)
    if known.sweep:
        values |= {name: getattr(known, name) for name in PLACE}
    elif (asked := by_agent()) and asked[1] == values["id"]:
        values |= {"sweep": asked[0], "swept": _swept(os.environ.get("WANDB_SWEEP_PARAM_PATH", ""))}
        values |= {name: value for name in PLACE if (value := os.environ.get(VARIABLES[name]))}
    for name in ("sweep", "swept"):
        values.setdefault(name, getattr(known, name))
    defaults = {"project": PROJECT, "name": run.id, "job_type": JOB_TYPE}
    decided = TrackedAs(**{name: value or defaults.get(name, value) for name, value in values.items()})
    if decided != known:
        _write(run, decided)
    return decided


def by_agent() -> tuple[str, str] | None:
    """Sweep and run for which ``wandb agent`` has started this process: their ids. Source: its client, wandb 0.31."""
    found = os.environ.get("WANDB_SWEEP_ID", ""), os.environ.get("WANDB_RUN_ID", "")
    return found if all(ID.fullmatch(one) for one in found) else None


def follow_no_agent() -> None:
    """Have W&B's client take the run's project, entity and id from what it is told, also in the shell of an agent."""
    for name in AGENT:
        os.environ.pop(name, None)


def note(run: Run, server: str, say: Callable[[str], None]) -> None:
    """Keep what the variables of a training say, for whoever uploads later; a training goes on whatever comes of it."""
    try:
        with files.hold(tracker.lock(run, tracker.WANDB)):
            decide(run, server, say)
    except BlockingIOError:  # an upload, which decides
        pass
    except (TrackingError, RunError, OSError) as error:
        say(f"note: {error}")


def opened(run: Run, decided: TrackedAs, entity: str, project: str, url: str) -> None:
    """Keep that W&B has answered, and where it says the run is; an address only if it is one: a server may say anything."""
    said: dict[str, Any] = {"entity": entity, "project": project, "url": url if URL.fullmatch(url) else ""}
    now = dataclasses.replace(decided, opened=True, **{name: value for name, value in said.items() if value})
    if now != decided:
        _write(run, now)


def url_of(run: Run) -> str | None:
    """Where people see the run, of ASCII characters that a terminal only shows; None of one that was never uploaded."""
    if not os.path.lexists(f"{run.path}/{FILE}"):  # as of most of the runs of which `status` asks
        return None
    found = records.read(TrackedAs, run.path / FILE)
    return found.url if found is not None and URL.fullmatch(found.url) else None


def address(decided: TrackedAs, server: str) -> str:
    """The server to ask; empty for the client's own choice. What this process calls it may have a login in it."""
    return server if not decided.base_url or _public(server) == decided.base_url else decided.base_url


def left_aside(run: Run, decided: TrackedAs, server: str) -> str:
    """Variables of this process that would lead elsewhere, and are not followed, in words; "" without any."""
    tracking = run.experiment().tracking
    others = [
        f"{VARIABLES[name]}={value}"
        for name in ("entity", "project")
        if not getattr(tracking, name) and (value := os.environ.get(VARIABLES[name])) and value != getattr(decided, name)
    ]
    if server and decided.base_url and _public(server) != decided.base_url:
        others.append(f"server {_public(server)}")
    where = f"{decided.entity}/{decided.project}" + (f" at {decided.base_url}" if decided.base_url else "")
    return f"W&B: the run is in {where} since its first upload; not followed: {', '.join(others)}" if others else ""


def _write(run: Run, decided: TrackedAs) -> None:
    files.write_json(run.path / FILE, decided.as_dict())


def _old_id(run: Run) -> str:
    try:
        found = (run.path / OLD_ID).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return found if ID.fullmatch(found) else ""


def _own_id(run: Run, say: Callable[[str], None]) -> str:
    """That of WANDB_RUN_ID, for the first run that asks: two runs with one id would be mixed up in W&B."""
    wanted = os.environ.get("WANDB_RUN_ID", "")
    if wanted and not ID.fullmatch(wanted):
        say("note: WANDB_RUN_ID is no id of a run: letters, digits, '-', '_' and '.', at most 128; the run has one of its own")
    elif wanted and _claimed(run.path.parent / f"{IDS}-{os.getuid()}", wanted):
        return wanted
    elif wanted:
        say(f"note: WANDB_RUN_ID={wanted} is another run's already; {run.id} has an id of its own")
    return secrets.token_hex(6)


def _claimed(folder: Path, wanted: str) -> bool:
    folder.mkdir(mode=0o700, exist_ok=True)
    try:
        os.close(os.open(folder / wanted, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True


def _swept(path: str) -> tuple[str, ...]:
    """Parameters of a sweep, from the file of this run's values that its agent has written; none without it."""
    try:
        text = Path(path).read_text(encoding="utf-8") if path and Path(path).is_file() else ""
    except (OSError, UnicodeDecodeError, ValueError):
        return ()
    root = parse(text, "")[0]
    return tuple(name for name in root.entries if name != "wandb_version") if root is not None else ()


def _listed(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _public(server: str) -> str:
    """An address without the login that may be in it, which no file is to have."""
    if not server:
        return ""
    with contextlib.suppress(ValueError):
        parts = urlsplit(server)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
    return ""
