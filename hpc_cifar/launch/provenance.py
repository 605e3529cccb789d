"""Where a run comes from: code version, environment, command. Never a secret."""

from __future__ import annotations

import getpass
import os
import platform
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from ..runs import now
from .snapshot import PACKAGE

MAX_DIFF = 256 * 1024
PACKAGES = (
    *("hpc-cifar", "torch", "torchvision", "numpy", "numba", "pydantic", "submitit", "typer", "pillow", "scikit-learn"),
    *("wandb", "ffcv", "nvidia-dali-cuda130", "triton"),
)
_SECRET_FILES = [
    f":(exclude,icase,glob)**/{name}" for name in ("*.env", ".env*", "*.pem", "*.key", "*netrc*", "*secret*", "*credential*")
]
_SECRETS = [
    (
        re.compile(r"(?i)([\w-]*(?:api[_-]?key|token|secret|passw(?:or)?d|credential)[\w-]*[\"']?\s*[=:]\s*[\"']?)[^\s\"',;]+"),
        r"\1***",
    ),
    (re.compile(r"\b(?:gh[pousr]_|github_pat_|hf_|sk-|wandb_v1_|AKIA)[A-Za-z0-9_-]{12,}"), "***"),
    (re.compile(r"(://)[^/\s:@]+:[^/\s@]+@"), r"\1***@"),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S), "*** private key ***"),
]


def redact(text: str) -> str:
    """``text`` with anything that looks like a key, token or password blanked."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def _run(command: list[str], cwd: Path | None = None) -> str | None:
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, timeout=15, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def git(folder: Path = PACKAGE) -> dict[str, Any] | None:
    """Commit, whether the tree differs from it, and the difference; None outside a repository or without git.

    An installed package may lie inside somebody else's repository: only one that tracks this package counts.
    """
    if _run(["git", "ls-files", "--error-unmatch", "__init__.py"], folder) is None:
        return None
    commit = _run(["git", "rev-parse", "HEAD"], folder)
    if commit is None:
        return None
    status = _run(["git", "-c", "core.fsmonitor=false", "status", "--porcelain"], folder) or ""
    # external diff programs and text converters are commands from a configuration: do not run them
    diff = _run(
        ["git", "diff", "HEAD", "--no-ext-diff", "--no-textconv", "--no-color", "--", ":/", *_SECRET_FILES], folder
    )  # fmt: skip
    found: dict[str, Any] = {"commit": commit.strip(), "dirty": bool(status.strip())}
    if diff:
        text = redact(diff)
        found["diff"] = text[:MAX_DIFF]
        found["diff_truncated"] = len(text) > MAX_DIFF
    return found


def versions() -> dict[str, str]:
    """Versions of the packages that matter, as installed; nothing is imported."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def gpu_names() -> list[str]:
    """Models of this machine's GPUs (at submit this is the login node)."""
    listing = _run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
    return [line.strip() for line in (listing or "").splitlines() if line.strip()]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may have no passwd entry for this uid
        return str(os.getuid())


def collect(command: list[str] | None = None) -> dict[str, Any]:
    """Everything known at submit, for ``provenance.json``."""
    return {
        "time": now(),
        "command": [redact(word) for word in (sys.argv if command is None else command)],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "user": _user(),
        "git": git(),
        "packages": versions(),
        "gpus": gpu_names(),
    }
