"""What a rank need not do before its first step: every restart of a preempted job pays for it."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc_cifar import files

pytestmark = pytest.mark.slow
TRAIN = """\
import sys
from hpc_cifar.cli.main import main
assert main(["train", *sys.argv[1:], "--name", "one", "--max-steps", "2"]) == 0
assert "torch._dynamo" not in sys.modules, "torch's compiler was imported, for nothing"
"""


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_compiler_is_not_imported(optimizer: str, digits_data: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    names = {"sgd": "{name: sgd, lr: 0.1, momentum: 0.9}", "adamw": "{name: adamw, lr: 0.001}"}
    model = "model: {family: sequential, layers: [flatten, {dense: {units: 10}}]}\n"
    data = "data: {dataset: digits, batch_size: 64}\n"
    job.write_text(f"name: small\nepochs: 1\n{model}{data}optimizer: {names[optimizer]}\nschedule: {{name: constant}}\n")
    environment = {**os.environ, "HPC_CIFAR_DATA": str(digits_data), "HPC_CIFAR_RUNS": str(tmp_path / "runs")}
    command = [sys.executable, "-c", TRAIN, str(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def compiled(package: Path, cache: dict[str, str]) -> int:
    """Import the kernels of a copy of the package; how many files of machine code there are then."""
    environment = {**os.environ, "PYTHONPATH": str(package), **cache}
    code = "import hpc_cifar.data.kernels as k; assert k.fill_of('float32').signatures; print(k.__file__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment, cwd=package, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(package)), "the copy was not what ran"
    return len(list(Path(cache["FOLDER"]).rglob("*.nbc")))


@pytest.mark.parametrize("variable", ["NUMBA_CACHE_DIR", "XDG_CACHE_HOME"])
def test_two_copies_of_the_code_compile_once(variable: str, repository: Path, tmp_path: Path) -> None:
    """Every run trains from its own snapshot of the code."""
    folder = tmp_path / "cache"
    cache = {"FOLDER": str(folder), "NUMBA_CACHE_DIR": "", variable: str(folder)}
    for name in ("one", "two"):
        shutil.copytree(repository / "hpc_cifar", tmp_path / name / "hpc_cifar")
    assert compiled(tmp_path / "one", cache) == 1
    assert compiled(tmp_path / "two", cache) == 1
    kernels = tmp_path / "two" / "hpc_cifar" / "data" / "kernels.py"
    kernels.write_text(kernels.read_text() + "\n# changed\n")
    assert compiled(tmp_path / "two", cache) == 2, "changed code must not run what was compiled before"


def test_kernels_compile_where_nothing_can_be_kept(repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository / "hpc_cifar", tmp_path / "hpc_cifar")
    folder = tmp_path / "file"
    folder.write_text("")  # a file where the cache folder would be: nobody, not even root, can write below it
    assert compiled(tmp_path, {"FOLDER": str(folder), "NUMBA_CACHE_DIR": str(folder)}) == 0


def pages_in_memory(path: Path) -> float:
    """Share of a file's pages that are in the page cache; see mincore(2), which reads none of them."""
    size = path.stat().st_size
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        begin = ctypes.c_char.from_buffer(mapped)
        code = ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(ctypes.addressof(begin)), ctypes.c_size_t(size), found)
        del begin
        assert code == 0, os.strerror(ctypes.get_errno())
        return sum(byte & 1 for byte in found) / len(found)


def test_files_are_read_ahead(tmp_path: Path) -> None:
    path = tmp_path / "train-images.npy"
    path.write_bytes(os.urandom(8 * 2**20))
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if pages_in_memory(path):
        pytest.skip("this file system keeps everything in memory, such as tmpfs does")
    files.read_ahead([tmp_path / "*.npy", tmp_path / "missing" / "*"]).join()
    deadline = time.monotonic() + 10
    while pages_in_memory(path) < 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
