"""The shape of the package: imports point one way, files stay small, the command line starts without torch."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hpc_cifar"

# docs/architecture.md: a part may import itself and every part on a later line; parts of one line leave each other alone
LAYERS = (
    ("cli",),
    ("launch", "report"),
    ("train", "evaluate"),
    ("data", "models", "track"),
    ("runs", "plan"),
    ("config",),
    ("caches", "files", "findings", "hostile", "lifetime", "processes", "records", "redaction", "stages", "terminal"),
    ("planted", "typed"),
    ("owner", "reading"),
    ("errors",),
)
ORDERED = {("train", "evaluate"), ("runs", "plan")}  # the one line in which an earlier part may use a later one
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
WITH_TORCH = {"data", "models", "train", "evaluate"}
# imported where they are used
LAZY = {"wandb", "wandb_workspaces", "tensorboard", "ffcv", "nvidia", "triton", "plotly", "optuna", "jinja2"}
# each is about one of these and may import it at the top; so nobody may import the module itself at the top
ABOUT = {"hpc_cifar.data.ffcv": "ffcv", "hpc_cifar.data.dali": "nvidia", "hpc_cifar.data.triton_kernel": "triton"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The part of the package a file belongs to: ``data`` for data/store.py, ``plan`` for plan.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every absolute module name that a file imports, and whether that happens as soon as the file is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ("hpc_cifar", *path.relative_to(PACKAGE).parent.parts)

    def walk(node: ast.AST, at_once: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
                for name, _ in walk(child, False):
                    yield name, False
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_once) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = ".".join(package[: len(package) - child.level + 1]) if child.level else ""
                module = ".".join(name for name in (base, child.module) if name)
                yield from ((f"{module}.{alias.name}", at_once) for alias in child.names)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, at_once and not inside)

    yield from walk(tree, True)


def test_every_part_has_its_place() -> None:
    parts = {part_of(path) for path in modules()} - {"__init__", "__main__", "_files"}
    assert parts <= set(LEVEL), "give a new part its line in LAYERS and in docs/architecture.md"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    mine = part_of(path)
    wrong = []
    for name, at_once in imports(path):
        top, _, rest = name.partition(".")
        if top == "hpc_cifar" and mine in LEVEL:
            theirs = rest.partition(".")[0]
            if theirs in LEVEL and theirs != mine and LEVEL[theirs] <= LEVEL[mine] and (mine, theirs) not in ORDERED:
                wrong.append(f"{mine} imports {theirs} ({name})")
        if top == "torch" and mine not in WITH_TORCH:
            wrong.append(f"{mine} imports torch; only {sorted(WITH_TORCH)} may")
        itself = ".".join(("hpc_cifar", *path.relative_to(PACKAGE).with_suffix("").parts))
        lazy = (top in LAZY and ABOUT.get(itself) != top) or name.rpartition(".")[0] in ABOUT or name in ABOUT
        if lazy and at_once:
            wrong.append(f"{name} is imported at the top of the file; import it where it is used")
    assert not wrong


def python_files() -> list[Path]:
    return [
        path
        for folder in ("hpc_cifar", "tests", "slurm", "benchmarks", "scripts")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]


def test_no_file_is_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def help_seconds() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "hpc_cifar", "--help"], check=True, capture_output=True, cwd=ROOT)
    return time.perf_counter() - began


@pytest.mark.alone
def test_the_command_line_starts_at_once() -> None:
    """The best of several, since other processes share the machine."""
    help_seconds()  # byte code
    fastest = min(help_seconds() for _ in range(7))
    assert fastest < 0.3, f"hpc-cifar --help took {fastest:.2f} s"


def test_the_command_line_does_without_torch() -> None:
    code = "import sys, hpc_cifar.cli.main; print({'torch', 'numba', 'sklearn', 'wandb'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("requirements*.lock")))
def test_locks_name_hashes_and_no_registry(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "://" not in text
    pins = re.findall(r"^\S+==\S+.*\n((?:    --hash=sha256:[0-9a-f]{64}.*\n)+)", text, flags=re.MULTILINE)
    assert len(pins) == len(re.findall(r"^[^ \n]", text, flags=re.MULTILINE))


def test_the_base_lock_is_a_part_of_the_test_lock() -> None:
    """So that `make run` after `make test` finds its environment there."""

    def versions(name: str) -> set[str]:
        return set(re.findall(r"^(\S+==\S+)", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE))

    every = versions("requirements-dev.lock")
    assert versions("requirements.lock") <= versions("requirements-all.lock") <= every
    assert versions("requirements-build.lock") <= every


def test_scripts_can_be_executed() -> None:
    scripts = [*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"]
    assert [path.name for path in scripts if not os.access(path, os.X_OK)] == []
