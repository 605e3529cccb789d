"""A closed box for every test, data prepared once a session, and a table of the components that were exercised.

``HPC_CIFAR_REQUIRE=slurm,ffcv,...`` makes the session fail when one of them was not; ``slurm-24.11`` is one version. With
pytest-xdist (``-n 2``) every worker has a box of its own, but for compiled code and prepared data, which they share.
"""

from __future__ import annotations

import fcntl
import functools
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import browser as chromium
import pytest
import wandb_server

SLURMS = ("slurm-22.05", "slurm-24.11", "slurm-26.05")
COMPONENTS = ("slurm", *SLURMS, "accounting", "ffcv", "dali", "wandb", "browser", "gpu", "archive", "modules", "users", "root")
# a test that asks for one of these fixtures exercises the component, without a word about it in the test
COMPONENT_OF_FIXTURE = {"browser": "browser", "cifar_archive": "archive", "cifar_data": "archive"}
# users: two of this machine; root: what is mounted
COMPONENT_OF_FIXTURE |= {"two_users": "users", "small_disk": "root"}
COMPONENT_OF_FIXTURE |= {"slurm_cluster_session": "slurm", "accounting_session": "accounting", "module_program": "modules"}
OTHERS = "others"  # tests of no component
OF_ALL_WORKERS = ("NUMBA_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # caches that processes may share
OnceMade = Callable[[str, Callable[[Path], object]], Path]
REPOSITORY = Path(__file__).resolve().parents[1]

_seen: dict[str, Counter[str]] = defaultdict(Counter)
_reasons: dict[str, Counter[str]] = defaultdict(Counter)
_collected: Counter[str] = Counter()


def pytest_configure(config: pytest.Config) -> None:
    """Point everything that could write or call outside to a temporary folder or a closed port, before torch is imported."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # begun by a shell in the background; tests send it to children
        signal.signal(signal.SIGINT, signal.default_int_handler)
    box = Path(tempfile.mkdtemp(prefix="hpc-cifar-tests-"))
    config.stash[BOX] = box
    archive = os.environ.get("HPC_CIFAR_ARCHIVE")
    if archive:
        os.environ["HPC_CIFAR_ARCHIVE"] = str(Path(archive).expanduser().absolute())
    for name in [name for name in os.environ if name.startswith(("WANDB_", "SLURM_", "SBATCH_", "SUBMITIT_"))]:
        del os.environ[name]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "HPC_CIFAR_CLUSTER"):
        os.environ.pop(name, None)
    # as on a machine that keeps what it has compiled; else every process of these tests compiles the package again
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    folders = {
        "HPC_CIFAR_DATA": "data",
        "HPC_CIFAR_RUNS": "runs",
        "NUMBA_CACHE_DIR": "numba",
        "TORCH_HOME": "torch",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
        "XDG_CACHE_HOME": "cache",
        "XDG_CONFIG_HOME": "config",
        "XDG_DATA_HOME": "share",
        "WANDB_DIR": "wandb",
        "WANDB_CACHE_DIR": "wandb-cache",
        "WANDB_CONFIG_DIR": "wandb-config",
        "WANDB_DATA_DIR": "wandb-data",
    }
    worker = hasattr(config, "workerinput")
    for variable, name in folders.items():
        if worker and variable in OF_ALL_WORKERS:
            continue
        (box / name).mkdir()
        os.environ[variable] = str(box / name)
    if worker:  # which share the processors
        os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.update(
        WANDB_BASE_URL="http://127.0.0.1:9",  # discard: nobody listens
        WANDB_ERROR_REPORTING="false",
        WANDB_SILENT="true",
        NETRC=str(box / "netrc"),
        OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", str(min(2, len(os.sched_getaffinity(0))))),
        PYTHONFAULTHANDLER="1",
    )


def pytest_unconfigure(config: pytest.Config) -> None:
    if BOX in config.stash:
        shutil.rmtree(config.stash[BOX], ignore_errors=True)


BOX = pytest.StashKey[Path]()

# -- fixtures ------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def memory_as_before() -> Iterator[None]:
    """Take back the bound of memory that a command sets for its process, and its number of threads: here more tests follow."""
    limits, threads = resource.getrlimit(resource.RLIMIT_DATA), os.environ.get("OPENBLAS_NUM_THREADS")
    yield
    resource.setrlimit(resource.RLIMIT_DATA, limits)
    if threads is None:
        os.environ.pop("OPENBLAS_NUM_THREADS", None)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def cifar_archive() -> Path:
    """The real CIFAR-10 images."""
    value = os.environ.get("HPC_CIFAR_ARCHIVE", "")
    if not value:
        pytest.skip("HPC_CIFAR_ARCHIVE names no CIFAR-10 archive")
    if not Path(value).exists():
        pytest.fail(f"HPC_CIFAR_ARCHIVE={value}: there is no such file")
    return Path(value)


@pytest.fixture(scope="session")
def lossless_archive(cifar_archive: Path) -> Path:
    """The lossless subset, which lies beside the archive that HPC_CIFAR_ARCHIVE names where both are at hand."""
    path = cifar_archive if "lossless" in cifar_archive.name else cifar_archive.parent / "cifar10-lossless-subset.tar.gz"
    if not path.is_file():
        pytest.skip(f"{path.name} is not beside HPC_CIFAR_ARCHIVE")
    return path


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> OnceMade:
    """A folder by its name, filled by the first worker that asks for it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def made(name: str, fill: Callable[[Path], object]) -> Path:
        folder, done = base / name, base / f"{name}.done"
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def cifar_data(cifar_archive: Path, made_once: OnceMade) -> Path:
    """A store root with CIFAR-10 prepared from the archive; read only."""
    return made_once("cifar", lambda root: prepared("cifar10", cifar_archive, root))


@pytest.fixture(scope="session")
def digits_data(made_once: OnceMade) -> Path:
    """A store root with scikit-learn's digits prepared; read only."""
    return made_once("digits", lambda root: prepared("digits", None, root))


def prepared(dataset: str, archive: Path | None, root: Path) -> None:
    from rich.console import Console

    from hpc_cifar.data.prepare import prepare

    prepare(dataset, archive=archive, root=root, console=Console(quiet=True))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> chromium.Browser:
    program = chromium.find()
    if program is None:
        pytest.skip(f"none of {', '.join(chromium.NAMES)} is installed")
    return chromium.Browser(program, tmp_path_factory.mktemp("browser"))


@pytest.fixture
def server() -> Iterator[wandb_server.Server]:
    """A W&B server on loopback."""
    with wandb_server.serving() as made:
        yield made


# -- the table -----------------------------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        for component in sorted({COMPONENT_OF_FIXTURE[name] for name in fixtures if name in COMPONENT_OF_FIXTURE}):
            item.add_marker(pytest.mark.component(component))
        components = {mark.args[0] for mark in item.iter_markers("component")}
        if "slurm" in components and slurm_version() in SLURMS:
            components.add(slurm_version())
        if unknown := components - set(COMPONENTS):
            raise pytest.UsageError(f"{item.nodeid}: unknown component {sorted(unknown)}; there are {COMPONENTS}")
        item.user_properties.append(("components", sorted(components)))  # travels with the reports of a worker
        _collected.update(components)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and not (report.failed or report.skipped):
        return
    components: Any = dict(report.user_properties).get("components")
    for component in components or (OTHERS,):
        _seen[component][report.outcome] += 1
        if report.skipped and isinstance(report.longrepr, tuple):
            _reasons[component][str(report.longrepr[2]).removeprefix("Skipped: ")] += 1


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Of pytest-xdist: a worker has ended."""
    _collected.update(getattr(node, "workeroutput", {}).get("collected", {}))


@functools.cache
def slurm_version() -> str:
    """The component that this machine's Slurm is, as slurm-22.05; empty where there is none."""
    program = shutil.which("slurmctld", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    said = subprocess.run([program, "-V"], capture_output=True, text=True, check=False).stdout if program else ""
    return f"slurm-{found[0]}" if (found := re.search(r"\d+\.\d+", said)) else ""


def exercised(component: str) -> bool:
    return _seen[component]["passed"] + _seen[component]["failed"] > 0


def required() -> list[str]:
    names = os.environ.get("HPC_CIFAR_REQUIRE", "").replace(",", " ").split()
    if unknown := set(names) - set(COMPONENTS):
        raise pytest.UsageError(f"HPC_CIFAR_REQUIRE: unknown component {sorted(unknown)}; there are {COMPONENTS}")
    return names


def pytest_sessionstart() -> None:
    required()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["collected"] = dict(_collected)
        return
    if session.exitstatus == pytest.ExitCode.OK and not all(exercised(name) for name in required()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("components")
    # versions of Slurm that could not be had, each with the reason, as scripts/run_tests.py found out
    lines = os.environ.get("HPC_CIFAR_NOT_EXERCISED", "").splitlines()
    not_there = dict(line.split("=", 1) for line in lines if "=" in line)
    for component in COMPONENTS:
        if component in SLURMS and not exercised(component) and component not in {*required(), *not_there}:
            continue  # each has a session of its own
        counts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(_seen[component].items()))
        if exercised(component):
            skipped = "; ".join(_reasons[component])
            line = f"{component:11}  exercised      {counts}" + (f" ({skipped})" if skipped else "")
        else:
            reasons = (
                "; ".join(_reasons[component])
                or not_there.get(component)
                or ("not selected" if _collected[component] else "no such test was collected")
            )
            line = f"{component:11}  not exercised  {counts + ': ' if counts else ''}{reasons}"
        terminalreporter.write_line(line)
    if skipped := _seen[OTHERS]["skipped"]:
        terminalreporter.write_line(f"{OTHERS:11}  {skipped} skipped: {'; '.join(_reasons[OTHERS])}")
    for component in required():
        if not exercised(component):
            terminalreporter.write_line(f"FAILED: HPC_CIFAR_REQUIRE asks for {component}, and it was not exercised", red=True)
