"""Whose a file is, and whether somebody else could have put it there.

One's own is what belongs to the user of this process. Root may do everything anyway, so folders and profiles of root are
trusted; a run of root's is somebody else's all the same. Whoever owns a folder of runs may exchange what lies in it, and is
trusted by those who keep runs there. File systems that show another owner (NFS with ``all_squash``, user namespaces) make
one's own files those of ``nobody``: they are refused like anybody else's, in one line that says whose they seem to be.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import stat
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .errors import RunError, UsageError

OTHERS = stat.S_IWGRP | stat.S_IWOTH
REACHES = stat.S_IXGRP | stat.S_IXOTH  # of a folder: others reach what is in it
ROOT_MODE, PRIVATE = 0o755, 0o700  # of the folder of runs, whose names may be seen; of what only its owner needs
NOT_READ = frozenset(("code", "wandb"))  # of a run: what only jobs, and W&B's own client, look at
MOST_ENTRIES = 200_000  # of a run of somebody else


def uid() -> int:
    """The user as whom files are made, and who may read them."""
    return os.geteuid()


def name_of(user: int) -> str:
    """``alice``, or the number of a user without a name here."""
    with contextlib.suppress(KeyError):
        name = pwd.getpwuid(user).pw_name
        if name.isprintable() and name:
            return name
    return f"user {user}"


def names_of(users: Collection[int], most: int = 3) -> str:
    """``alice, bob`` for a message."""
    names = sorted(name_of(user) for user in users)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def number_of(name: str, option: str) -> int:
    """The user with that name or number.

    Raises:
        UsageError: there is none; the message names the option.
    """
    if name.isascii() and name.isdecimal() and len(name) < 11:
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except (KeyError, ValueError):
        raise UsageError(f"{option} {name!a}: there is no such user on this machine") from None


def others_can_write(facts: os.stat_result) -> bool:
    """Whether more people than its owner may write it, or make, rename and remove files in it that are not theirs."""
    return bool(facts.st_mode & OTHERS) and not (stat.S_ISDIR(facts.st_mode) and facts.st_mode & stat.S_ISVTX)


# ---- the folder of runs ------------------------------------------------------------------------------------------------


def root_problem(root: Path) -> str:
    """Why no job should be started from this folder of runs; "" if nothing speaks against it, or it is not there yet."""
    try:
        facts = root.stat()
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"{root}: {cannot_be_read(root, error)}"
    if not stat.S_ISDIR(facts.st_mode):
        return f"{root}: is not a folder; set HPC_CIFAR_RUNS to one"
    if not others_can_write(facts):
        return ""
    return (
        f"{root}: others can write to this folder of runs (mode {stat.S_IMODE(facts.st_mode):04o}), and exchange what runs; "
        f"chmod go-w {root}, or where several people keep their runs: chmod +t {root}; or set HPC_CIFAR_RUNS to another folder"
    )


def check_root(root: Path) -> None:
    """Before anything is executed from a folder of runs.

    Raises:
        RunError: others could exchange what lies in it.
    """
    if problem := root_problem(root):
        raise RunError(problem)


def make_root(root: Path) -> None:
    """Make the folder of runs if it is not there, with its parents; others may see it and never write to it.

    Raises:
        RunError: others could exchange what lies in it.
        OSError: it cannot be made.
    """
    make(root, ROOT_MODE)
    check_root(root)


def make(folder: Path, mode: int) -> None:
    """Make a folder and its missing parents with these permissions, whatever the umask; one that is there stays as it is.

    Raises:
        OSError: it cannot be made, or is no folder.
    """
    for one in [*reversed(folder.parents), folder]:
        if not one.exists():
            with contextlib.suppress(FileExistsError):
                one.mkdir(mode)
                one.chmod(mode)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def part(root: Path, name: str) -> Path:
    """This user's folder for what belongs to many runs, such as ``.arrays``; with the user's number, where the plain name is
    somebody else's. Nothing is made.
    """
    plain = root / name
    try:
        facts = plain.lstat()
    except FileNotFoundError:
        return plain
    return plain if stat.S_ISDIR(facts.st_mode) and facts.st_uid == uid() else root / f"{name}-{uid()}"


def make_part(folder: Path) -> None:
    """Make what :func:`part` named, writable by nobody else.

    Raises:
        RunError: it is somebody else's, or the folder of runs is not safe.
        OSError: it cannot be made.
    """
    make_root(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(PRIVATE)
        folder.chmod(PRIVATE)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != uid():
        raise RunError(f"{folder}: is of {name_of(facts.st_uid)}, or no folder; have it removed, or set HPC_CIFAR_RUNS")
    if facts.st_mode & OTHERS:  # an older version left it to the umask
        folder.chmod(stat.S_IMODE(facts.st_mode) & ~OTHERS)


# ---- runs --------------------------------------------------------------------------------------------------------------


@dataclass
class Listing:
    """Runs of one user below a folder, each with the time of its experiment; ``left_out`` counts those of others by user.

    ``unreadable`` are folders of that user which cannot be read.
    """

    runs: list[tuple[int, Path]] = field(default_factory=list)
    left_out: Counter[int] = field(default_factory=Counter)
    unreadable: int = 0

    def words(self, option: str = "--owner") -> str:
        """How many are left out, and whose; "" if none is.

        Args:
            option: by which the command takes them; "" if it does not.
        """
        said = []
        if self.left_out:
            number = sum(self.left_out.values())
            whose = f"{number} run{'s' if number > 1 else ''} of {names_of(self.left_out)}"
            said.append(f"{whose} left out ({option} USER takes them)" if option else f"{whose} left out")
        if self.unreadable:
            said.append(f"{self.unreadable} that cannot be read left out")
        return ", ".join(said)


def listing(root: Path, user: int | None = None) -> Listing:
    """The runs of a user, by default one's own, below ``root``; nothing of anybody else is opened.

    Raises:
        UsageError: the folder cannot be read.
    """
    mine = uid() if user is None else user
    found = Listing()
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    _sort_in(found, entry, mine)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UsageError(f"{root}: {cannot_be_read(root, error)}, or set HPC_CIFAR_RUNS to another folder") from None
    return found


def _sort_in(found: Listing, entry: os.DirEntry[str], mine: int) -> None:
    whose = mine
    try:
        facts = entry.stat(follow_symlinks=False)
        whose = facts.st_uid
        if whose == mine and stat.S_ISLNK(facts.st_mode):  # a run that its owner keeps elsewhere
            whose = entry.stat().st_uid
        experiment = os.lstat(f"{entry.path}/experiment.yaml")
        if whose == experiment.st_uid == mine:
            found.runs.append((experiment.st_mtime_ns, Path(entry.path)))
        else:
            found.left_out[whose if whose != mine else experiment.st_uid] += 1
    except PermissionError:
        if whose == mine:
            found.unreadable += 1
        else:
            found.left_out[whose] += 1
    except OSError:  # it is no run, or is being removed right now
        pass


def of(path: Path) -> int:
    """The user to whom a run belongs.

    Raises:
        RunError: it is not there, or hidden.
    """
    try:
        return path.stat().st_uid
    except OSError as error:
        raise RunError(f"{path}: {cannot_be_read(path, error)}") from None


def is_own(path: Path) -> bool:
    """Whether a run, or whatever lies there, belongs to this user."""
    with contextlib.suppress(OSError):
        return path.stat().st_uid == uid()
    return False


def is_run_of_another(path: Path, user: int | None = None) -> bool:
    """Whether a run, or a folder that hides what it is, lies there and belongs to somebody else than ``user``."""
    try:
        os.lstat(path / "experiment.yaml")
    except PermissionError:
        pass
    except (OSError, ValueError):
        return False
    with contextlib.suppress(OSError):
        return path.stat().st_uid != (uid() if user is None else user)
    return False


def narrow_umask() -> None:
    """Have nothing that this process makes be writable by others, whatever the user's umask."""
    os.umask(os.umask(OTHERS) | OTHERS)


def check_name(path: Path) -> None:
    """Before a run is begun, or goes on, under a name that is taken.

    Raises:
        RunError: what lies there is somebody else's.
    """
    facts = path.lstat()
    whose = facts.st_uid if facts.st_uid != uid() else of(path)
    if whose != uid():
        raise RunError(f"{path}: is a run of {name_of(whose)}; give this one a name with --name, or set HPC_CIFAR_RUNS")
    check_own(path)


def check_own(path: Path, code_of: str | None = None, *, code: bool = False) -> None:
    """Before a run is resumed, cancelled, uploaded or exported, which runs its code, signals its processes or sends its files.

    Args:
        code_of: the user whose code may run, as the user of the command has said.
        code: whether the code in it is run: then nobody else may be able to write where it lies.

    Raises:
        RunError: it is somebody else's, or others could have written what would be used.
    """
    whose = of(path)
    if whose != uid() and (code_of is None or number_of(code_of, "--code-of") != whose):
        name = name_of(whose) if not name_of(whose).startswith("user ") else str(whose)
        raise RunError(
            f"{path}: is a run of {name_of(whose)}, whose code and files would be used as yours; "
            f"if you trust them: --code-of {name}"
        )
    if whose != uid():
        check_tree(path, everything=True)
    try:
        facts = path.stat()
        loose = path if others_can_write(facts) else None
        if code and loose is None and facts.st_mode & REACHES:
            entries = _entries(path, frozenset(), ("code", "submitit"))
            loose = next((Path(entry.path) for entry in entries if _is_loose(entry, whose)), None)
    except OSError as error:
        raise RunError(f"{error.filename or path}: {cannot_be_read(path, error)}") from None
    if loose is not None and loose.is_symlink():
        raise RunError(f"{loose}: is a link, by which something else would be run; look at it, and remove it")
    if loose is not None:
        raise RunError(
            f"{loose}: others than {name_of(whose)} can write here, and so change what is run; look at it, then: "
            f"chmod -R go-w {path}"
        )


def _is_loose(entry: os.DirEntry[str], whose: int) -> bool:
    facts = entry.stat(follow_symlinks=False)
    return stat.S_ISLNK(facts.st_mode) or others_can_write(facts) or facts.st_uid not in (whose, 0)


def check_tree(path: Path, *, everything: bool = False, parts: Collection[str] = ()) -> None:
    """Before a run is read whose owner might have put anything there: no link leads out of it, and all the rest is regular
    files and folders of its owner's.

    Args:
        everything: also code that is only run and never read.
        parts: look at these of its folders only.

    Raises:
        RunError: something else is there, or cannot be read.
    """
    try:
        whose, inside = path.stat().st_uid, os.path.realpath(path)
        for count, entry in enumerate(_entries(path, frozenset() if everything else NOT_READ, parts)):
            facts = entry.stat(follow_symlinks=False)
            real = os.path.realpath(entry.path) if stat.S_ISLNK(facts.st_mode) else inside
            if real != inside and not real.startswith(f"{inside}{os.sep}"):
                raise RunError(f"{path}: {os.path.relpath(entry.path, path)!a} is a link that leads out of the run")
            if not stat.S_ISLNK(facts.st_mode) | stat.S_ISDIR(facts.st_mode) | stat.S_ISREG(facts.st_mode):
                raise RunError(f"{path}: {os.path.relpath(entry.path, path)!a} is neither a file nor a folder")
            if facts.st_uid not in (whose, 0):
                raise RunError(f"{path}: {os.path.relpath(entry.path, path)!a} is of {name_of(facts.st_uid)}, not of its owner")
            if count > MOST_ENTRIES:
                raise RunError(f"{path}: has more than {MOST_ENTRIES:,} files")
    except FileNotFoundError:
        if not path.exists():
            raise RunError(f"{path}: is not there any more") from None
    except OSError as error:
        raise RunError(f"{error.filename or path}: {cannot_be_read(path, error)}") from None


def _entries(path: Path, skipped: Collection[str], parts: Collection[str]) -> Iterator[os.DirEntry[str]]:
    """Everything below a folder, folders before what is in them, without recursion."""
    waiting = [str(path)]
    while waiting:
        folder = waiting.pop()
        top = folder == str(path)
        with os.scandir(folder) as entries:
            for entry in entries:
                if top and (entry.name in skipped or (parts and entry.name not in parts)):
                    continue
                yield entry
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)


def cannot_be_read(path: Path, error: OSError) -> str:
    """Words for what was answered; of something that is hidden, whom to ask."""
    if not isinstance(error, PermissionError):
        return f"cannot be read: {error.strerror or 'input/output error'}"
    seen = next((whose for one in (path, *path.parents) if (whose := _seen(one)) is not None), None)
    whom = f" {name_of(seen)}" if seen is not None and seen != uid() else ""
    return f"cannot be read by you; ask its owner{whom}"


def _seen(path: Path) -> int | None:
    try:
        return path.lstat().st_uid
    except OSError:
        return None
