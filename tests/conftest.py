"""A closed box for every test, data prepared once a session, and a table of the components that were exercised.

``HPC_CIFAR_REQUIRE=slurm,ffcv,...`` makes the session fail when one of them was not.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import browser as chromium
import pytest

COMPONENTS = ("slurm", "accounting", "ffcv", "dali", "wandb", "browser", "gpu", "archive")
# a test that asks for one of these fixtures exercises the component, without a word about it in the test
COMPONENT_OF_FIXTURE = {"browser": "browser", "cifar_archive": "archive", "cifar_data": "archive"}
COMPONENT_OF_FIXTURE |= {"slurm_cluster_session": "slurm", "accounting_session": "accounting"}
OTHERS = "others"  # tests of no component
REPOSITORY = Path(__file__).resolve().parents[1]

_tests_of: dict[str, set[str]] = {}  # node id -> components
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
    for variable, name in folders.items():
        (box / name).mkdir()
        os.environ[variable] = str(box / name)
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
def cifar_data(cifar_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store root with CIFAR-10 prepared from the archive; read only."""
    from rich.console import Console

    from hpc_cifar.data.prepare import prepare

    root = tmp_path_factory.mktemp("cifar")
    prepare("cifar10", archive=cifar_archive, root=root, console=Console(quiet=True))
    return root


@pytest.fixture(scope="session")
def digits_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store root with scikit-learn's digits prepared; read only."""
    from rich.console import Console

    from hpc_cifar.data.prepare import prepare

    root = tmp_path_factory.mktemp("digits")
    prepare("digits", archive=None, root=root, console=Console(quiet=True))
    return root


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> chromium.Browser:
    program = chromium.find()
    if program is None:
        pytest.skip(f"none of {', '.join(chromium.NAMES)} is installed")
    return chromium.Browser(program, tmp_path_factory.mktemp("browser"))


# -- the table -----------------------------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        for component in sorted({COMPONENT_OF_FIXTURE[name] for name in fixtures if name in COMPONENT_OF_FIXTURE}):
            item.add_marker(pytest.mark.component(component))
        components = {mark.args[0] for mark in item.iter_markers("component")}
        if unknown := components - set(COMPONENTS):
            raise pytest.UsageError(f"{item.nodeid}: unknown component {sorted(unknown)}; there are {COMPONENTS}")
        _tests_of[item.nodeid] = components
        _collected.update(components)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and not (report.failed or report.skipped):
        return
    for component in _tests_of.get(report.nodeid) or (OTHERS,):
        _seen[component][report.outcome] += 1
        if report.skipped and isinstance(report.longrepr, tuple):
            _reasons[component][str(report.longrepr[2]).removeprefix("Skipped: ")] += 1


def exercised(component: str) -> bool:
    return _seen[component]["passed"] + _seen[component]["failed"] > 0


def required() -> list[str]:
    names = [name.strip() for name in os.environ.get("HPC_CIFAR_REQUIRE", "").split(",") if name.strip()]
    if unknown := set(names) - set(COMPONENTS):
        raise pytest.UsageError(f"HPC_CIFAR_REQUIRE: unknown component {sorted(unknown)}; there are {COMPONENTS}")
    return names


def pytest_sessionstart() -> None:
    required()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.exitstatus == pytest.ExitCode.OK and not all(exercised(name) for name in required()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("components")
    for component in COMPONENTS:
        counts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(_seen[component].items()))
        if exercised(component):
            skipped = "; ".join(_reasons[component])
            line = f"{component:10}  exercised      {counts}" + (f" ({skipped})" if skipped else "")
        else:
            reasons = "; ".join(_reasons[component]) or (
                "not selected" if _collected[component] else "no such test was collected"
            )
            line = f"{component:10}  not exercised  {counts + ': ' if counts else ''}{reasons}"
        terminalreporter.write_line(line)
    if skipped := _seen[OTHERS]["skipped"]:
        terminalreporter.write_line(f"{OTHERS:10}  {skipped} skipped: {'; '.join(_reasons[OTHERS])}")
    for component in required():
        if not exercised(component):
            terminalreporter.write_line(f"FAILED: HPC_CIFAR_REQUIRE asks for {component}, and it was not exercised", red=True)
