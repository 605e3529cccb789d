"""Other versions of Slurm for the test cluster: a Debian root of each, and commands that run inside one.

    python slurm/testbed/roots.py make 24.11
    python slurm/testbed/roots.py within 24.11 .venv/bin/python -m pytest tests/slurm

Needs root and mmdebstrap. The roots (520 MB and up to two minutes each) lie in HPC_CIFAR_SLURM_ROOTS, else in the user's
cache. Inside one, this checkout, its Python, /dev, /sys and /tmp are those outside; what a command leaves running ends with
it. Exit code 75: the root could not be made.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import IO

from processes import ClusterError

# of Debian, the first one that has the version
SUITES = {"22.05": ("bookworm",), "24.11": ("trixie",), "26.05": ("forky", "sid")}
PACKAGES = (
    *("slurm-wlm", "munge", "slurmdbd", "mariadb-server", "mount", "procps", "hostname"),
    *("libsqlite3-0", "libffi8", "libexpat1"),  # to which a Python from outside links; OpenSSL comes with the others
)
LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*")
STAMP = "hpc-cifar-root.json"
CHECKOUT = Path(__file__).resolve().parents[2]
CANNOT_BE_HAD = 75

# What unshare's shell does: $1 is the root, $2 the number of paths that are bound into it, then these, then the command. It
# pivots instead of changing the root, since nsenter, which tests use, goes to the root of the namespace. The last shell is the
# namespace's first process: it stays, to take in what is orphaned.
ENTER = """\
set -eu
root=$1 number=$2
shift 2
mount --bind "$root" "$root"
while [ "$number" -gt 0 ]; do
  if [ -d "$1" ]; then mkdir -p "$root$1"; else mkdir -p "$root${1%/*}" && touch "$root$1"; fi
  mount --rbind "$1" "$root$1"
  number=$((number - 1))
  shift
done
mount -t proc proc "$root/proc"
here=$PWD
cd "$root"
mkdir -p .outside
pivot_root . .outside
umount --lazy /.outside
cd "$here"
"$@" || exit $?
exit 0
"""


class CannotBeHad(ClusterError):
    """There is no root of the version, and none can be made."""


@dataclasses.dataclass(frozen=True)
class Root:
    """A Debian root with one version of Slurm, whether it is there or not."""

    version: str

    @property
    def folder(self) -> Path:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return Path(os.environ.get("HPC_CIFAR_SLURM_ROOTS") or cache / "hpc-cifar" / "slurm-roots") / self.version

    def stamp(self) -> dict[str, str]:
        """What it holds, if it was made to its end and as it would be made today; else empty."""
        try:
            found = json.loads((self.folder / STAMP).read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and found.get("recipe") == recipe(self.version) else {}

    def make(self) -> None:
        """Make it, unless it is there; two at once: one waits.

        Raises:
            CannotBeHad: with the last words of whoever refused.
        """
        if self.stamp():
            return
        if os.geteuid() != 0:
            raise CannotBeHad(f"a root with Slurm {self.version} needs root to be made and used")
        if shutil.which("mmdebstrap") is None:
            raise CannotBeHad("missing mmdebstrap: apt-get install --no-install-recommends mmdebstrap")
        with self.lock() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.stamp():
                return
            problems = []
            for suite in SUITES[self.version]:
                try:
                    self._make_from(suite)
                    return
                except CannotBeHad as error:
                    problems.append(f"{suite}: {error}")
            raise CannotBeHad(f"Slurm {self.version}: {'; '.join(problems)}")

    def lock(self) -> IO[str]:
        """A file to lock: by one who makes the root, or by all who use it."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        return self.folder.with_name(f"{self.version}.lock").open("w")

    def _make_from(self, suite: str) -> None:
        source = mirror()
        new = self.folder.with_name(f"{self.version}.new")
        shutil.rmtree(new, ignore_errors=True)  # of one that was interrupted; nothing is mounted there any more
        print(f"roots: making one with Slurm {self.version} from Debian {suite} in {self.folder}", file=sys.stderr, flush=True)
        options = ["--quiet", "--mode=root", "--variant=minbase", '--aptopt=Acquire::Check-Valid-Until "false"']
        options += [f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT]
        command = ["mmdebstrap", *options, f"--include={','.join(PACKAGES)}", suite, str(new), source]
        try:
            made = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
            if made.returncode != 0:
                raise CannotBeHad(" | ".join(made.stderr.strip().splitlines()[-2:]) or "mmdebstrap failed without a word")
            listing = ["dpkg-query", f"--admindir={new}/var/lib/dpkg", "--show", "--showformat=${Version}", "slurmctld"]
            package = subprocess.run(listing, capture_output=True, text=True, check=False).stdout.strip()
            if not package.startswith(f"{self.version}."):
                raise CannotBeHad(f"it has Slurm {package or 'not at all'} now")
            stamp = {"recipe": recipe(self.version), "suite": suite, "slurmctld": package}
            (new / STAMP).write_text(json.dumps(stamp) + "\n")
            shutil.rmtree(self.folder, ignore_errors=True)
            new.rename(self.folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def recipe(version: str) -> str:
    """A digest of how a root is made: one that was made in another way is made anew."""
    return hashlib.sha256(json.dumps([SUITES[version], PACKAGES, LEFT_OUT]).encode()).hexdigest()[:16]


def mirror() -> str:
    """Where apt gets Debian's packages from on this machine."""
    if given := os.environ.get("DEBIAN_MIRROR"):
        return given
    command = ["apt-get", "indextargets", "--format", "$(ORIGIN) $(CODENAME) $(REPO_URI)", "Created-By: Packages"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        told = ""
    for line in told.splitlines():
        origin, codename, address = [*line.split(), "", "", ""][:3]
        if origin == "Debian" and "-" not in codename and address:
            return address
    raise CannotBeHad("apt's sources name no Debian mirror; give one in DEBIAN_MIRROR")


def outside() -> list[str]:
    """What is the same inside a root: devices, temporary files, this checkout and the Python of its environment."""
    python = [sys.base_prefix]
    if sys.base_prefix == "/usr":  # of the system, beside much that the root has in its own version
        python, link = [sysconfig.get_path("stdlib")], Path(sys.executable)
        while link.is_symlink():
            link = Path(os.path.normpath(link.parent / link.readlink()))
            python.append(str(link))
    return ["/dev", "/sys", "/tmp", str(CHECKOUT), *python]


def host_version() -> str:
    """Of the Slurm that is installed here, as 22.05; empty where there is none."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    if (program := shutil.which("slurmctld", path=path)) is None:
        return ""
    said = subprocess.run([program, "-V"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"\d+\.\d+", said)
    return found[0] if found else ""


def within(root: Root, command: list[str]) -> int:
    """Run a command inside, in this checkout's folder; its exit code. Its processes end with it."""
    paths = outside()
    apart = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    shell = ["sh", "-c", ENTER, "within", str(root.folder), str(len(paths)), *paths]
    hosts, names = root.folder / "etc" / "hosts", f"127.0.0.1 localhost {socket.gethostname().split('.')[0]}\n"
    with root.lock() as lock:  # nobody makes it anew meanwhile
        fcntl.flock(lock, fcntl.LOCK_SH)
        if not hosts.exists() or hosts.read_text() != names:
            hosts.write_text(names)
        return subprocess.run([*apart, *shell, *command], cwd=CHECKOUT, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    made = verbs.add_parser("make", help="make the root, unless it is there")
    entered = verbs.add_parser("within", help="run a command in it, in this checkout's folder")
    for verb in (made, entered):
        verb.add_argument("version", choices=SUITES)
    entered.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    root = Root(arguments.version)
    try:
        root.make()
    except CannotBeHad as error:
        print(f"roots: {error}", file=sys.stderr)
        return CANNOT_BE_HAD
    if arguments.verb == "within":
        return within(root, arguments.command)
    print(f"{root.folder}: {root.stamp()['slurmctld']} of Debian {root.stamp()['suite']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
