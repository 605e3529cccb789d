"""Who we are to W&B: the client, its mode, its server and the login there."""

from __future__ import annotations

import configparser
import contextlib
import netrc
import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlparse

from ..errors import first_line
from ..findings import Finding, ok, warning

NAME = "W&B"
ANSWER_S = 8
LATER = "metrics stay in the run directory until hpc-cifar sync RUN"
HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")  # where the client looks unless it is told: since 0.31, and before


def mode(wanted: str, say: Callable[[str], None]) -> str:
    """``online``, ``offline`` or ``disabled``: what the job file wants, or WANDB_MODE, as far as there is a login."""
    found = os.environ.get("WANDB_MODE", wanted) if wanted != "disabled" else wanted
    if found == "online" and not has_login():
        say("W&B: no login here (wandb login, or WANDB_API_KEY); hpc-cifar sync uploads later")
        return "offline"
    return found if found in ("online", "offline") else "disabled"


def has_login(where: str = "") -> bool:
    """Whether W&B would find a key, without asking its server: a variable, or a netrc entry for its host.

    Args:
        where: address of the server; without it the one that was chosen here.
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    named = urlparse(where or server()).netloc.rpartition("@")[2]
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


def quiet_client() -> None:
    """Have the client that is imported next keep to what it is asked; a user's own variables stay."""
    os.environ.setdefault("WANDB_SILENT", "true")  # it tells where it found its key before it reads its settings
    # it reports to its makers by the same server, whose answer it reads to its end, without a limit, as this process ends
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


def finding() -> Finding:
    """What ``doctor`` says; it asks the server within seconds, unless W&B is switched off."""
    quiet_client()
    try:
        import wandb
    except Exception as error:
        return warning(NAME, f"its client cannot be imported: {first_line(error)}", "pip install --force-reinstall wandb")
    client = f"client {wandb.__version__}"
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        return ok(NAME, f"{client}; WANDB_MODE={mode}: {LATER}")
    where = server() or wandb.Settings().base_url
    if not has_login():
        return warning(
            NAME, f"{client}; no login for {where}: {LATER}", "wandb login, or export WANDB_API_KEY where you submit"
        )
    try:
        user = wandb.Api(timeout=ANSWER_S).viewer.username
    except Exception as error:
        words = first_line(error)
        if "401" in words or "permission" in words.lower() or "authenticat" in words.lower():
            return warning(NAME, f"{client}; {where} does not accept the login: {words}", "wandb login --relogin")
        away = f"{client}; {where} does not answer here: {words}: {LATER}"
        return warning(NAME, away, "hpc-cifar sync RUN --follow, on a machine that reaches it")
    return ok(NAME, f"{client}; {user} at {where}")
