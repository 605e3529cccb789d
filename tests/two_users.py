"""Two real Unix users, made and removed by the tests that need them, and commands as each of them types them.

Only root can make users. What a user cannot reach (an interpreter below ``/root``) is shown to their commands in a mount
namespace of their own, at the same path.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PROGRAMS = ("useradd", "userdel", "setpriv", "unshare", "mount")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
FOLDER, ALIVE = "hpc-cifar-users-", ".alive"  # of the tests of one process, with a lock that lives as long as it
TRIES = 50  # another worker may be making users


@dataclass(frozen=True)
class User:
    """A user with a home folder that is readable by nobody else."""

    name: str
    uid: int
    gid: int
    home: Path
    views: Path  # where folders that the user cannot reach are mounted

    def runs(
        self, *command: str, cwd: Path | None = None, umask: int = 0o022, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """A program as this user, with nothing of the environment of the tests but its PATH."""
        environment = {
            "HOME": str(self.home), "USER": self.name, "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(self.home), "CUDA_VISIBLE_DEVICES": "", **variables,
        }  # fmt: skip
        words = [f"{name}={value}" for name, value in environment.items()]
        identity = ["setpriv", f"--reuid={self.uid}", f"--regid={self.gid}", "--clear-groups", "env", "-i", *words]
        script = "\n".join(["set -e", *_mounts(self.views), f"umask {umask:04o}", f"cd {shlex.quote(str(cwd or self.home))}"])
        script += f"\nexec {shlex.join([*identity, *command])}"
        command_line = ["unshare", "--mount", "--propagation", "private", "bash", "-c", script]
        return subprocess.run(command_line, capture_output=True, text=True, timeout=180, check=False, stdin=subprocess.DEVNULL)

    def types(
        self, *arguments: str, cwd: Path | None = None, umask: int = 0o022, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """``hpc-cifar ARGUMENTS``."""
        code = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); from hpc_cifar.cli.main import run; run()"
        return self.runs(sys.executable, "-P", "-c", code, *arguments, cwd=cwd, umask=umask, **variables)

    def owns(self, *paths: Path) -> None:
        """Give them files, with all that is in them."""
        for path in paths:
            for one in [path, *path.rglob("*")]:
                os.chown(one, self.uid, self.gid, follow_symlinks=False)


def _mounts(views: Path) -> list[str]:
    """Commands that show what is hidden below a folder of root's alone."""
    lines: list[str] = []
    hidden: dict[Path, list[Path]] = {}
    for path in dict.fromkeys(Path(os.path.realpath(one)) for one in (sys.base_prefix, sys.prefix, REPOSITORY)):
        if blocked := next((one for one in reversed(path.parents) if not one.stat().st_mode & 0o001), None):
            hidden.setdefault(blocked, []).append(path)
    for blocked, paths in hidden.items():
        for number, path in enumerate(paths):
            view = views / f"{blocked.name}-{number}"
            lines += [f"mkdir -p {shlex.quote(str(view))}", f"mount --bind {shlex.quote(str(path))} {shlex.quote(str(view))}"]
        lines.append(f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(blocked))}")
        for number, path in enumerate(paths):
            view, there = shlex.quote(str(views / f"{blocked.name}-{number}")), shlex.quote(str(path))
            lines += [f"mkdir -p {there}", f"mount --bind {view} {there}"]
    return lines


@dataclass(frozen=True)
class Site:
    """Two users, and a folder that both reach, which root owns."""

    alice: User
    bob: User
    folder: Path


def _program(*command: str) -> subprocess.CompletedProcess[str]:
    for _ in range(TRIES):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": PATH})
        if "cannot lock" not in done.stderr:
            break
        time.sleep(0.2)
    return done


@pytest.fixture(scope="session")
def two_users() -> Iterator[Site]:
    """Two users of this machine as long as the tests last."""
    if os.geteuid() != 0:
        pytest.skip("two users can only be made by root")
    if missing := [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]:
        pytest.skip(f"two users need {', '.join(missing)}")
    folder = Path(tempfile.mkdtemp(prefix=FOLDER, dir="/tmp"))
    folder.chmod(0o755)
    alive = (folder / ALIVE).open("w")
    fcntl.flock(alive, fcntl.LOCK_EX)
    _remove_left_behind()
    names = [f"hpcc{secrets.token_hex(3)}{end}" for end in "ab"]
    try:
        users = []
        for name in names:
            done = _program("useradd", "--no-create-home", "--home-dir", str(folder / name), "--shell", "/bin/sh", name)
            if done.returncode != 0:
                pytest.skip(f"two users cannot be made here: {done.stderr.strip()}")
            facts = pwd.getpwnam(name)
            (folder / name).mkdir(mode=0o700)
            os.chown(folder / name, facts.pw_uid, facts.pw_gid)
            users.append(User(name, facts.pw_uid, facts.pw_gid, folder / name, folder / "views"))
        tried = users[0].runs(sys.executable, "-c", "")
        if tried.returncode != 0:
            pytest.skip(f"the Python of these tests cannot be run by another user: {tried.stderr.strip()[-300:]}")
        tried = users[0].types("--version")
        assert tried.returncode == 0, f"no command runs as another user: {tried.stderr}"
        alice, bob = users
        yield Site(alice, bob, folder)
    finally:
        for name in names:
            _remove(name)
        shutil.rmtree(folder, ignore_errors=True)
        alive.close()


def _remove(name: str) -> None:
    """Remove a user, and end what it still runs."""
    with contextlib.suppress(KeyError):
        user = pwd.getpwnam(name).pw_uid
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and entry.stat().st_uid == user:
                    os.kill(int(entry.name), signal.SIGKILL)
        done = _program("userdel", "--force", name)
        assert done.returncode == 0, done.stderr


def _remove_left_behind() -> None:
    """Users of tests that were killed: nobody holds the lock in their folder any more."""
    for user in pwd.getpwall():
        folder = Path(user.pw_dir).parent
        if not re.fullmatch(r"hpcc[0-9a-f]{6}[ab]", user.pw_name) or not folder.name.startswith(FOLDER):
            continue
        try:
            with (folder / ALIVE).open("a") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        except OSError:  # the folder is gone, or of a version without it
            pass
        _remove(user.pw_name)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def shared(two_users: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The same with a folder of the test's own."""
    folder = Path(tempfile.mkdtemp(dir=two_users.folder))
    folder.chmod(0o755)
    yield Site(two_users.alice, two_users.bob, folder)
    shutil.rmtree(folder, ignore_errors=True)
