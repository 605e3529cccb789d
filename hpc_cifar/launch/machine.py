"""What a machine needs to submit or to train, beside Slurm: Python, packages, a compiler, folders, room, memory, clock."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.metadata
import os
import secrets
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from .. import __version__, owner
from .. import caches as compiled
from ..config.cluster import Cluster
from ..errors import HpcCifarError, first_line
from ..findings import Finding, ok, problem, warning

PYTHONS = ((3, 11), (3, 13))  # the first and the last that are tested
GIB = 2**30
FREE_GIB = (1.0, 10.0)  # of room: below the first no run is safe, below the second few are
PROBE_BYTES = 2**20  # enough to meet a quota
SHARED_MEMORY_MIB = 256  # for the data workers and NCCL of a few ranks
SKEW_S = (2.0, 30.0)  # from which on it is told, and from which on it is a problem
WEIGHTS = "weights"  # below the data folder, as models/weights.py has it, which takes torch to ask


def findings(data_root: Path, runs_root: Path, cluster: Cluster, trains: bool) -> Iterator[Finding]:
    """All of them, in the order in which one would fix them; each takes milliseconds.

    Args:
        trains: whether jobs of this profile run on this machine, which then has its scratch.
    """
    yield python()
    yield packages()
    yield compiler()
    runs, skew_s = folder("runs", "HPC_CIFAR_RUNS", runs_root)
    yield shared(runs_root) or runs
    if skew_s is not None:
        yield clock(skew_s, runs_root)
    yield from data(data_root)
    yield weights(data_root)
    yield from scratch(cluster.scratch if trains else None)
    yield shared_memory()
    yield caches()


def python() -> Finding:
    version = ".".join(str(part) for part in sys.version_info[:3])
    said = f"{version} in {sys.prefix}; hpc-cifar {__version__}"
    first, last = PYTHONS
    if not first <= sys.version_info[:2] <= last:
        wanted = f"{first[0]}.{first[1]} to {last[0]}.{last[1]}"
        return warning("Python", f"{said}: tested is {wanted}", f"make an environment with Python {wanted}")
    return ok("Python", said)


def packages() -> Finding:
    """Whether what hpc-cifar requires is installed, in the versions that it requires."""
    from packaging.requirements import Requirement

    try:
        every = [Requirement(text) for text in importlib.metadata.requires("hpc-cifar") or ()]
    except importlib.metadata.PackageNotFoundError:
        return warning("packages", "hpc-cifar runs from a folder and is not installed: versions are not known", "pip install .")
    wanted = [one for one in every if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = []
    for one in wanted:
        try:
            found = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append((one, "missing"))
            continue
        if not one.specifier.contains(found, prereleases=True):
            wrong.append((one, found))
    if wrong:
        said = ", ".join(f"{one.name}{one.specifier} ({found})" for one, found in wrong)
        return problem("packages", f"required: {said}", "pip install " + " ".join(f"'{one}'" for one, _ in wrong))
    return ok("packages", f"all {len(wanted)} requirements are met")


def compiler() -> Finding:
    """torch.compile (C++) and Triton (C) build code while they run."""
    kinds = {"C": ("CC", "cc", "gcc", "clang"), "C++": ("CXX", "c++", "g++", "clang++")}
    found: list[str] = []
    missing: list[str] = []
    for kind, (variable, *names) in kinds.items():
        one = next((name for name in (os.environ.get(variable, ""), *names) if name and shutil.which(name)), None)
        (missing if one is None else found).append(one or f"a {kind} compiler")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        missing.append("Python.h")
    if missing:
        fix = "module load gcc, a Python with headers, or the container; jobs with training.compile: false need none of it"
        return warning("compiler", f"missing: {', '.join(missing)}; torch.compile and Triton cannot be used", fix)
    return ok("compiler", f"{' and '.join(found)}, with Python's headers")


def folder(name: str, variable: str, path: Path) -> tuple[Finding, float | None]:
    """A folder that is written to, on a file system of which much is asked, and its room.

    Returns:
        Also the seconds between this clock and that of the file system; None where nothing could be written.
    """
    fix = f"export {variable}=FOLDER, one that all nodes see and that you may write to"
    room = f"remove old runs, or {fix}"
    probe = None
    try:
        place = next(one for one in (path, *path.parents) if one.exists())
        probe = place / f".hpc-cifar-doctor-{os.uname().nodename}-{secrets.token_hex(4)}"
        before = time.time()
        probe.write_bytes(os.urandom(PROBE_BYTES))
        skew_s = max(0.0, before - probe.stat().st_mtime, probe.stat().st_mtime - time.time())
        locks = _locks(probe)
        free = shutil.disk_usage(place).free / GIB
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return problem(name, f"{path}: {error.strerror or error}", room if full else fix), None
    finally:
        with contextlib.suppress(OSError):
            if probe is not None:
                probe.unlink()
    said = f"{path}{'' if path == place else ' (made when needed)'}, {free:.1f} GiB free"
    least, enough = FREE_GIB
    if free < enough:
        return (problem if free < least else warning)(name, said, room), skew_s
    if not locks:
        return warning(name, f"{said}; no locks there: two jobs on one run would not exclude each other", fix), skew_s
    return ok(name, said), skew_s


def shared(root: Path) -> Finding | None:
    """Who else can write to the folder of runs, if that matters."""
    if said := owner.root_problem(root):
        words, _, fix = said.partition("; ")
        return problem("runs", words, fix)
    with contextlib.suppress(OSError):
        whose = root.stat().st_uid
        if whose not in (owner.uid(), 0):
            fix = "export HPC_CIFAR_RUNS=FOLDER, one of your own, unless you trust them with what your jobs run"
            return warning("runs", f"{root}: is of {owner.name_of(whose)}, who can exchange runs in it", fix)
    return None


def _locks(probe: Path) -> bool:
    """Whether a second lock is refused, as one on a run directory has to be; network file systems want to write for one."""
    with probe.open("r+b") as one, probe.open("r+b") as two:
        try:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # such as Lustre without -o flock
            return False
    return False


def clock(skew_s: float, place: Path) -> Finding:
    """Heartbeats and lock files compare this clock with the file system's."""
    small, large = SKEW_S
    said = f"{skew_s:.1f} s from that of the file system of {place}"
    if skew_s < small:
        return ok("clock", said)
    fix = "timedatectl shows whether the clock is kept; tell the site's staff"
    return problem("clock", said, fix) if skew_s > large else warning("clock", said, fix)


def data(root: Path) -> Iterator[Finding]:
    """Every prepared dataset below ``root``."""
    from ..data.store import MANIFEST, Store, prepare_command

    try:
        names = sorted(path.parent.name for path in root.glob(f"*/{MANIFEST}")) if root.is_dir() else []
    except OSError:  # a folder that cannot be read has been told of
        return
    if not names:
        words = f"{root}: no dataset is prepared (HPC_CIFAR_DATA names the folder)"
        yield problem("data", words, prepare_command(root, "cifar10"))
        yield folder("data folder", "HPC_CIFAR_DATA", root)[0]  # one that is prepared already need not be writable
    for name in names:
        try:
            found = Store.open(root, name)
            found.verify_once()
            beton = " with FFCV's file" if found.train.beton else ""
            yield ok("data", f"{found.label} in {found.path}: {len(found.train.labels):,} training images{beton}")
        except HpcCifarError as error:
            said, _, fix = first_line(error, 400).partition("; run: ")
            yield problem("data", said, fix or prepare_command(root, name, force=True))


def weights(root: Path) -> Finding:
    """Pretrained weights that ``prepare --weights`` has fetched."""
    found = []
    with contextlib.suppress(OSError):
        found = sorted(path.stem for path in (root / WEIGHTS).glob("*.safetensors"))
    if found:
        return ok("weights", f"{', '.join(found)} in {root / WEIGHTS}")
    return ok("weights", "none prefetched; only transfer jobs need them: hpc-cifar prepare --weights torchvision/vgg16")


def scratch(wanted: str | None) -> Iterator[Finding]:
    """The profile's folder of the node."""
    if wanted is None:
        return
    place = Path(os.path.expandvars(wanted))
    fix = "scratch: /dev/shm in the profile, or another folder that every node has; without one the shared store serves"
    if "$" in str(place) or not place.is_dir() or not os.access(place, os.W_OK):
        yield warning("scratch", f"{wanted} is {place} here, which is no folder that can be written to", fix)
        return
    free = shutil.disk_usage(place).free / GIB
    said = f"{place}, {free:.1f} GiB free"
    yield ok("scratch", said) if free > 1 else warning("scratch", said, fix)


def shared_memory() -> Finding:
    place = Path("/dev/shm")
    if not place.is_dir() or not os.access(place, os.W_OK):
        return warning("/dev/shm", "not there, or not writable: data workers and NCCL fail", "mount it; podman: --ipc=host")
    free = shutil.disk_usage(place).free / 2**20
    if free < SHARED_MEMORY_MIB:
        return warning("/dev/shm", f"{free:,.0f} MiB free", "remove old files there; podman: --shm-size=1g or --ipc=host")
    return ok("/dev/shm", f"{free:,.0f} MiB free")


def caches() -> Finding:
    """Where compiled code is kept between jobs."""
    found, refused = compiled.find("doctor")
    said = "; ".join([*refused, f"{found.parent} serves instead, for compiled code"] if found else refused)
    if found is not None:
        with contextlib.suppress(OSError):
            found.rmdir()
        if not refused:
            return ok("cache", f"{found.parent}, for compiled code")
    fix = "export XDG_CACHE_HOME=FOLDER, one that only you can write, or remove the folder that others can write"
    return warning("cache", said or "no folder for compiled code can be written: every job compiles again", fix)
