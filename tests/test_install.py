"""How the package gets onto a machine: wheel and sdist, a fresh environment, FFCV without root, what the image is made of.

The image itself is built and used by `make container-test`, which takes too long to be a test here.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
UNPACKED = ("PYTHONPATH", "PYTHONSAFEPATH", "XDG_CACHE_HOME", "VIRTUAL_ENV")  # uv keeps its packages in the user's own cache


def call(*command: str | Path, cwd: Path, code: int = 0, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in UNPACKED}
    done = subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def built(what: str, source: Path, folder: Path) -> Path:
    call(sys.executable, "-m", "build", f"--{what}", "--no-isolation", "--outdir", folder, source, cwd=folder.parent)
    (made,) = folder.iterdir()
    return made


def digests(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


# -- wheel and sdist -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("wheel", repository, tmp_path_factory.mktemp("wheel") / "dist")


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_files(repository: Path, wheel: Path) -> None:
    names = set(digests(wheel))
    assert {f"hpc_cifar/_files/jobs/{job.name}" for job in (repository / "jobs").glob("*.yaml")} <= names
    assert "hpc_cifar/_files/clusters/gpu8.yaml" in names
    assert {str(path.relative_to(repository)) for path in (repository / "hpc_cifar").rglob("*.py")} <= names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"hpc_cifar"}


@pytest.mark.slow
def test_a_wheel_from_the_sdist_is_the_same(repository: Path, wheel: Path, tmp_path: Path) -> None:
    sdist = built("sdist", repository, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    for name in ("Makefile", "Containerfile", ".containerignore", "scripts/container/home.py", "scripts/container.sh"):
        assert (source / name).is_file(), f"{name} is not in the sdist"
    assert digests(built("wheel", source, tmp_path / "again")) == digests(wheel)


@pytest.mark.slow
@pytest.mark.timeout(900)  # a guard: what uv has not in its cache it downloads, some 3 GB
def test_a_fresh_environment_with_only_the_wheel(repository: Path, wheel: Path, tmp_path: Path) -> None:
    """A dry run for a cluster that is not here, then what somebody reads who has no FFCV."""
    uv, python = BIN / "uv", tmp_path / "venv" / "bin" / "python"
    call(uv, "venv", "--quiet", "--no-project", "--python", sys.executable, tmp_path / "venv", cwd=tmp_path)
    install = [uv, "pip", "install", "--quiet", "--no-config", "--python", python]
    call(*install, "--require-hashes", "--only-binary", ":all:", "-r", repository / "requirements.lock", cwd=tmp_path)
    call(*install, "--no-deps", wheel, cwd=tmp_path)
    call(uv, "pip", "check", "--quiet", "--python", python, cwd=tmp_path)
    program = tmp_path / "venv" / "bin" / "hpc-cifar"
    assert "deep300" in call(program, "jobs", cwd=tmp_path)
    dry = call(program, "submit", "deep300", "--cluster", "gpu8", "--dry-run", cwd=tmp_path)
    assert "#SBATCH --gpus-per-node=8" in dry and "GPU-hours" in dry
    site = {"HPC_CIFAR_DATA": str(tmp_path / "data")}
    said = call(program, "prepare", "digits", "--beton", cwd=tmp_path, code=2, **site)
    assert re.search(r"--beton: ffcv is not installed \(pip install the wheel that `make ffcv-wheel` builds", said)
    call(program, "prepare", "digits", cwd=tmp_path, **site)
    said = call(program, "train", "quickstart-digits", "--set", "data.pipeline=dali", cwd=tmp_path, code=2, **site)
    assert "data.pipeline: dali: nvidia-dali-cuda130 is not installed (pip install 'hpc-cifar[dali]'" in said


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.component("ffcv")
def test_the_ffcv_wheel_brings_its_libraries(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("ffcv", reason="ffcv is not installed: it needs libopencv-dev libturbojpeg0-dev pkg-config g++")
    said = call(repository / "scripts" / "ffcv_wheel.sh", tmp_path / "dist", cwd=tmp_path, PYTHON=sys.executable)
    (wheel,) = (tmp_path / "dist").glob("ffcv-*-manylinux_*.whl")
    assert str(wheel) in said
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        needed = re.findall(r"^Requires-Dist: (opencv\S*)", archive.read(metadata).decode(), flags=re.MULTILINE)
    assert needed == ["opencv-python-headless"]
    code = "import ffcv, ffcv.loader; print(ffcv.__file__, open('/proc/self/maps').read())"
    loaded = call(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert loaded.startswith(str(tmp_path / "site"))
    libraries = {Path(line.split()[-1]) for line in loaded.splitlines() if re.search(r"/lib(opencv_|turbojpeg|GLX)", line)}
    assert len(libraries) == 4 and {path.parent for path in libraries} == {tmp_path / "site" / "ffcv.libs"}


# -- the image -----------------------------------------------------------------------------------------------------------


def instructions(repository: Path) -> list[tuple[str, str]]:
    text = (repository / "Containerfile").read_text(encoding="utf-8")
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(line.split(maxsplit=1)[0], " ".join(line.split()[1:])) for line in lines if line.strip()]


def test_the_image_suits_any_runtime(repository: Path) -> None:
    """Who runs it, where, and with what in front of the command, is for the cluster to say."""
    made = instructions(repository)
    verbs = [verb for verb, _ in made]
    assert verbs[0] == "ARG" and made[0][1].startswith("BASE_IMAGE=")
    assert [rest for verb, rest in made if verb == "FROM"] == ["${BASE_IMAGE} AS builder", "${BASE_IMAGE}"]
    image = made[len(verbs) - verbs[::-1].index("FROM") :]
    assert {verb for verb, _ in image} <= {"ARG", "LABEL", "RUN", "COPY", "ENV"}
    assert {rest.partition("=")[0] for verb, rest in image if verb == "ENV"} == {"PATH"}
    assert [rest for verb, rest in image if verb == "COPY"] == ["--from=builder /opt/venv /opt/venv"]
    (labels,) = (rest for verb, rest in image if verb == "LABEL")
    for name in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{name}=" in labels


def test_everything_that_is_copied_gets_there(repository: Path) -> None:
    kept = {line[1:] for line in (repository / ".containerignore").read_text(encoding="utf-8").splitlines() if line[0] == "!"}
    for verb, rest in instructions(repository):
        if verb == "COPY" and "--from" not in rest:
            for source in rest.split()[:-1]:
                assert (repository / source).exists()
                assert source in kept or ("requirements-*.lock" in kept and source.endswith(".lock"))


@pytest.mark.parametrize("home", ["/", "/nowhere", "its own"])
def test_who_has_no_home_in_the_image_gets_one(repository: Path, tmp_path: Path, home: str) -> None:
    """`make container-test` does it as a user without a name, too."""
    script = str(repository / "scripts" / "container" / "home.py")
    code = f"import runpy, os; runpy.run_path({script!r}); print(os.environ['HOME'])"
    environment = {"TMPDIR": str(tmp_path), "HOME": str(tmp_path) if home == "its own" else home}

    def found() -> Path:
        command = [sys.executable, "-c", code]
        return Path(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip())

    folder = found()
    if home == "its own":
        assert folder == tmp_path
        return
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    assert found() == folder, "what was compiled there is found again"
    folder.chmod(0o770)
    assert found() not in (folder, tmp_path), "others may write code into it"


def test_a_home_that_can_only_be_read_keeps_the_login(repository: Path, tmp_path: Path) -> None:
    script, home = str(repository / "scripts" / "container" / "home.py"), tmp_path / "home"
    home.mkdir()
    (home / ".netrc").touch()
    readable = "os.access = lambda path, how: os.path.exists(path) and how == os.R_OK"  # root may write everywhere
    shown = "print(os.environ['HOME'], os.environ['NETRC'], os.environ.get('WANDB_CONFIG_DIR'))"
    command = [sys.executable, "-c", f"import runpy, os; {readable}; runpy.run_path({script!r}); {shown}"]
    environment = {"TMPDIR": str(tmp_path), "HOME": str(home)}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert said == [str(tmp_path / f"hpc-cifar-{os.getuid()}"), str(home / ".netrc"), "None"]
