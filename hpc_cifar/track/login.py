"""Who we are to W&B: the client, its mode, its server and the login there."""

from __future__ import annotations

import os

from ..errors import first_line
from ..findings import Finding, ok, warning
from .wandb_run import has_login, server

NAME = "W&B"
ANSWER_S = 8
LATER = "metrics stay in the run directory until hpc-cifar sync RUN"


def finding() -> Finding:
    """What ``doctor`` says; it asks the server within seconds, unless W&B is switched off."""
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
