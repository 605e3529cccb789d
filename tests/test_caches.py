"""Caches of compiled code are nobody else's: numba, Triton and Inductor run what they find there."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_cifar import caches
from hpc_cifar.launch import machine

STRANGER = 54321
COMPILE = "import hpc_cifar.data.kernels as k; assert k.fill_of('float32').signatures"


class Poison:
    """A pickle that leaves a mark where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without caches of its own; nothing is kept elsewhere either."""
    (tmp_path / "home").mkdir(mode=0o700)
    (tmp_path / "tmp").mkdir(mode=0o700)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(caches, "_said", set())
    monkeypatch.setattr(caches, "_looked_through", set())
    for variable in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "home"


def compile_kernel(**variables: str) -> str:
    """What a process says that has the kernels compiled, or loads them, as in a group whose members share files."""
    environment = {**os.environ, **variables}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False, umask=0o002
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_all_levels_are_made_private_whatever_the_umask(home: Path) -> None:
    before = os.umask(0o002)
    try:
        folder = caches.cache_folder("code")
    finally:
        os.umask(before)
    assert folder == home / ".cache" / "hpc-cifar" / "code"
    assert [path.stat().st_mode & 0o777 for path in (folder, *folder.parents[:2])] == [0o700] * 3


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "NUMBA_CACHE_DIR"])
def test_an_index_that_a_member_of_the_group_planted_is_not_loaded(home: Path, tmp_path: Path, variable: str) -> None:
    """umask 002: what the cache folders were made with, a member of the group could replace."""
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o775)
    cache.chmod(0o775)
    compile_kernel(**{variable: str(cache)})
    for folder in (path for path in cache.rglob("*") if path.is_dir()):
        folder.chmod(0o775)
    mark = tmp_path / "ran as the victim"
    places = [path.parent for path in cache.rglob("*.nbi")] or [cache]
    for place in places:
        for name in (path.name for path in (*home.rglob("*.nbi"), *cache.rglob("*.nbi"), *(tmp_path / "tmp").rglob("*.nbi"))):
            (place / name).write_bytes(pickle.dumps(Poison(mark)))
    said = compile_kernel(**{variable: str(cache)})
    assert not mark.exists(), "somebody else's code was run"
    assert f"warning: {cache} can be written by others (mode 775)" in said and "serves instead" in said
    assert said.count("\n") == 1, "said once"


def test_each_level_counts(home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "one" / "two" / "cache"
    cache.mkdir(parents=True)
    for level in (tmp_path / "one", tmp_path / "one" / "two", cache, cache / "hpc-cifar", cache / "hpc-cifar" / "code"):
        level.mkdir(exist_ok=True, mode=0o700)
        for mode in (0o720, 0o702, 0o777):
            level.chmod(mode)
            folder = caches.cache_folder("code", str(cache))
            assert folder == home / ".cache" / "hpc-cifar" / "code", (level, oct(mode))
        level.chmod(0o700)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == len(set(said)) == 15
    assert caches.cache_folder("code", str(cache)) == cache / "hpc-cifar" / "code"
    assert caches.cache_folder("code", str(cache)) and not capfd.readouterr().err


def test_the_sticky_bit_guards_what_is_below_but_not_the_folder_itself(home: Path, tmp_path: Path) -> None:
    cache = tmp_path / "sticky"
    cache.mkdir()
    cache.chmod(0o1777)
    folder = caches.cache_folder("code", str(cache))
    assert folder == cache / "hpc-cifar" / "code"
    folder.chmod(0o1777)
    assert caches.cache_folder("code", str(cache)) == home / ".cache" / "hpc-cifar" / "code"


def test_folders_and_files_of_others_are_refused(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = caches.cache_folder("code", str(tmp_path / "cache"))
    assert folder is not None
    file = folder / "index"
    file.write_text("")
    stat = Path.lstat
    for foreign in (file, folder, folder.parent, tmp_path / "cache"):

        def facts(path: Path, foreign: Path = foreign) -> os.stat_result:
            found = stat(path)
            return os.stat_result([*found[:4], STRANGER, *found[5:]]) if path == foreign else found

        with monkeypatch.context() as patched:
            patched.setattr(Path, "lstat", facts)
            patched.setattr(caches, "_looked_through", set())  # as in another process
            assert caches.cache_folder("code", str(tmp_path / "cache")) == home / ".cache" / "hpc-cifar" / "code", foreign
            _, refused = caches.find("code", str(tmp_path / "cache"))
        assert refused == [f"{foreign} belongs to another user"]


def test_what_vanishes_meanwhile_is_passed_over_and_the_tree_is_looked_through_once(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other ranks make and rename temporary files in it."""
    folder = tmp_path / "cache" / "hpc-cifar" / "code"
    folder.mkdir(parents=True, mode=0o700)
    for number in range(3):
        (folder / f"{number}.tmp").write_text("")
    stat = Path.lstat
    looked: list[str] = []

    def vanish(path: Path) -> os.stat_result:
        if path.suffix == ".tmp":
            looked.append(path.name)
            path.unlink(missing_ok=True)
        return stat(path)

    monkeypatch.setattr(Path, "lstat", vanish)
    for parent in (folder.parent, folder.parent.parent):
        parent.chmod(0o700)
    assert caches.cache_folder("code", str(tmp_path / "cache")) == folder
    (folder / "3.tmp").write_text("")
    assert caches.cache_folder("code", str(tmp_path / "cache")) == folder
    assert sorted(looked) == ["0.tmp", "1.tmp", "2.tmp"]


def test_a_link_is_followed_once_and_what_it_points_to_is_looked_at(home: Path, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "open")
    assert caches.cache_folder("code", str(tmp_path / "link")) == home / ".cache" / "hpc-cifar" / "code"
    (tmp_path / "open").chmod(0o755)
    assert caches.cache_folder("code", str(tmp_path / "link")) == tmp_path / "open" / "hpc-cifar" / "code"


def test_a_library_never_chooses_its_own_folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's own lies in /tmp, where anybody can have made it."""
    caches.use("TORCHINDUCTOR_CACHE_DIR", "inductor")
    first = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    assert first == str(home / ".cache" / "hpc-cifar" / "inductor")
    caches.use("TORCHINDUCTOR_CACHE_DIR", "inductor")  # as a process does that was begun by one that did
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == first
    for place in (home, tmp_path / "tmp"):
        place.chmod(0o777)
    caches.use("TORCHINDUCTOR_CACHE_DIR", "inductor")
    last = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert last != Path(first) and last.stat().st_mode & 0o777 == 0o700


def test_doctor_names_the_folder_that_others_can_write(home: Path) -> None:
    assert machine.caches().state == "ok"
    (home / ".cache").chmod(0o775)
    found = machine.caches()
    assert found.state == "warning" and f"{home / '.cache'} can be written by others (mode 775)" in found.said
