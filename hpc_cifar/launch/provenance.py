"""Where a run comes from: code version, environment, command. Never a secret."""

from __future__ import annotations

import getpass
import os
import platform
import socket
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

from ..redaction import redact_beginning, redact_words
from ..runs import now
from .snapshot import PACKAGE

MAX_DIFF = 256 * 1024  # characters
MOST_READ = 4 * MAX_DIFF  # bytes of what a command prints
TIMEOUT_S = 15
PACKAGES = (
    *("hpc-cifar", "torch", "torchvision", "numpy", "numba", "pydantic", "submitit", "typer", "pillow", "scikit-learn"),
    *("wandb", "ffcv", "nvidia-dali-cuda130", "triton"),
)
_SECRET_FILES = [
    f":(exclude,icase,glob)**/{name}"
    for name in (
        "*.env",
        ".env*",
        "*.pem",
        "*.key",
        "*.p12",
        "*.pfx",
        "id_rsa*",
        "id_ed25519*",
        "*netrc*",
        "*.pgpass",
        "*.kdbx",
        "*secret*",
        "*credential*",
        "*password*",
        "*token*.txt",
        "*.token",
    )
]


def _run(command: list[str], cwd: Path | None = None, most: int = MOST_READ) -> str | None:
    """What a command printed, its first ``most`` bytes; None if it failed, or took too long for that."""
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        with subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, **quiet) as child:
            timer = threading.Timer(TIMEOUT_S, child.kill)
            timer.start()
            try:
                assert child.stdout is not None
                said: bytes = child.stdout.read(most)
                if len(said) == most:  # the rest is of no use
                    child.kill()
                    return said.decode(errors="replace")
            finally:
                child.wait()
                timer.cancel()
    except OSError:
        return None
    return said.decode(errors="replace") if child.returncode == 0 else None


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
        found["diff"], found["diff_truncated"] = redact_beginning(diff, MAX_DIFF)
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
        "command": redact_words(sys.argv if command is None else command),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "user": _user(),
        "git": git(),
        "packages": versions(),
        "gpus": gpu_names(),
    }
