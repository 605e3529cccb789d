"""A home folder and a name for whoever runs the image: a cluster gives some neither, or a home that cannot be written.

Every Python of the image runs this first (hpc_cifar_home.pth). Triton, matplotlib, W&B and others keep what they make in the
home folder; torch.compile asks for the user's name.
"""

from __future__ import annotations

import os
import stat


def _mine(folder: str) -> bool:
    """Code that is kept in it is run: nobody else may have made it, or write to it."""
    facts = os.lstat(folder)
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o077


def _private_folder() -> str:
    base = os.environ.get("TMPDIR") or "/tmp"
    folder = os.path.join(base, f"hpc-cifar-{os.getuid()}")  # noqa: PTH118  pathlib would slow down every start
    try:
        os.mkdir(folder, 0o700)  # noqa: PTH102
    except FileExistsError:
        if not _mine(folder):
            import tempfile

            return tempfile.mkdtemp(prefix="hpc-cifar-")
    return folder


def _keep_login(home: str) -> None:
    """A home that can only be read still has the login of W&B."""
    for name, place in (("NETRC", ".netrc"), ("WANDB_CONFIG_DIR", ".config/wandb")):
        if os.access(f"{home}/{place}", os.R_OK):
            os.environ.setdefault(name, f"{home}/{place}")


def provide() -> None:
    """Set HOME and USER where they are missing or of no use."""
    home = os.path.expanduser("~")  # noqa: PTH111
    if home in ("~", "/") or not os.access(home, os.W_OK | os.X_OK):
        _keep_login(home)
        try:
            os.environ["HOME"] = _private_folder()
        except OSError:  # nothing can be written anywhere: --help and --version work all the same
            pass
    if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        import pwd

        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            os.environ["USER"] = str(os.getuid())


provide()
