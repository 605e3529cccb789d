"""What the script does when its setup fails: real bash on the text that is submitted. Modules are real ones in tests/slurm."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from launch_site import guarded

from hpc_cifar.config.cluster import Cluster
from hpc_cifar.launch import first_words, script

TRAINS = "srun was reached"


def run(folder: Path, files: dict[str, str] | None = None, init: str = "", **profile: object) -> tuple[int, str, str]:
    """Exit code, standard output and the words of the log of a script with this profile; 9 is the code of its ``srun``."""
    code = guarded(folder / "code")
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    cluster = Cluster.model_validate({"name": "mine", **profile})
    text = "\n".join(["#!/bin/bash", "", "# setup", *script.setup_lines(cluster, code), f"echo {TRAINS}", "exit 9", ""])
    path = folder / "slurm_script"
    path.write_text(text)
    done = subprocess.run(
        [str(shutil.which("bash")), str(path)], cwd=folder, capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "SLURM_JOB_ID": "7", "BASH_ENV": init},
    )  # fmt: skip
    assert done.stderr.startswith("hpc-cifar: start 0 of job 7 on ")
    return done.returncode, done.stdout, first_words.of_text(done.stderr)


def failed(line: int, code: int, text: str, how: str = "failed") -> str:
    return f"setup line {line} of profile mine {how} with exit code {code}: `{text}`"


@pytest.mark.parametrize(
    ("setup", "code", "words"),
    [
        (["true", "  false"], 1, failed(2, 1, "false")),
        (["exit 3"], 3, failed(1, 3, "exit 3", "ended the job")),
        (["true", "if true; then", "  exit 4", "fi"], 4, failed(3, 4, "exit 4", "ended the job")),
        (["exit 0"], 0, failed(1, 0, "exit 0", "ended the job")),
        (["echo no GPU here", "exit 3"], 3, failed(2, 3, "exit 3", "ended the job")),
        (["echo no GPU here >&2", "exit 3"], 3, failed(2, 3, "exit 3", "ended the job") + ": no GPU here"),
        (["nvcc --version"], 127, failed(1, 127, "nvcc --version") + ": nvcc: command not found"),
        (["conda() { return 1; }", "conda activate nope"], 1, failed(2, 1, "conda activate nope")),
        (["source ./missing.sh"], 1, failed(1, 1, "source ./missing.sh") + ": ./missing.sh: No such file or directory"),
        (["source ./ends.sh"], 7, failed(1, 7, "source ./ends.sh", "ended the job")),
        (["set -e", "false"], 1, failed(2, 1, "false")),
        (["set -u", "echo $missing"], 1, failed(2, 1, "echo $missing", "ended the job") + ": missing: unbound variable"),
        (["x=$(false)"], 1, failed(1, 1, "x=$(false)")),
        (["(exit 5)"], 5, failed(1, 5, "(exit 5)")),
        (["for x in 1 2; do", "  ls /missing/$x 2>/dev/null", "done"], 2, failed(2, 2, "ls /missing/$x 2>/dev/null")),
        (["set -fu", "IFS=1", "exit 11"], 11, failed(3, 11, "exit 11", "ended the job")),
        (["set -E", "f() { (exit 6); }", "f"], 6, failed(3, 6, "f")),
        (["trap 'echo mine' EXIT", "false"], 1, failed(2, 1, "false")),
    ],
)
def test_a_line_that_fails_is_named_and_ends_the_job(setup: list[str], code: int, words: str, tmp_path: Path) -> None:
    ended, printed, said = run(tmp_path, {"ends.sh": "exit 7\n"}, setup=setup)
    assert TRAINS not in printed
    assert (ended, said) == (code, words)


def test_a_setup_that_bash_cannot_read(tmp_path: Path) -> None:
    code, printed, said = run(tmp_path, setup=["if true; then", "echo never closed"])
    assert (code, printed) == (2, "")
    assert said.startswith("the setup of profile mine ended the job with exit code 2: ")
    assert said.endswith("syntax error: unexpected end of file")


@pytest.mark.parametrize(
    "setup",
    [
        ["if false; then", "  exit 4", "fi"],
        ["false || true", "true && ! false", "while false; do :; done", "[ -e /missing ] && echo there || true"],
        ["cat > text <<X", "false", "exit 3", "X", "grep -q exit text"],
        ["source ./careless.sh"],  # what happens in it is its own affair, as long as it ends well
        ["f() { false; true; }", "f", "(false; true)", "set -E", "f", "(false; true)", "x=$(false; true)"],
        ["mkdir -p /tmp && cd $_", '[ "$PWD" = /tmp ]'],
        ["sh -c 'kill -TERM $$'", "sh -c 'kill -USR2 $$'"],  # the signals of a preemption, before Python listens
        ["set -e", "true"],
        ["set -euo pipefail", "shopt -s failglob"],
        ["exec 3>&1", "exec 2>/dev/null"],
    ],
)
def test_what_is_no_failure(setup: list[str], tmp_path: Path) -> None:
    code, printed, _ = run(tmp_path, {"careless.sh": "false\ntrue\n"}, setup=setup)
    assert (code, printed) == (9, f"{TRAINS}\n")


def test_lines_still_act_on_the_shell(tmp_path: Path) -> None:
    setup = ["export A=1", "cd /", "umask 027", "alias x=y", "f() { echo f; }", "trap 'echo \"$? $A $PWD $(umask)\"' EXIT"]
    code, printed, _ = run(tmp_path, setup=setup)
    assert (code, printed) == (9, f"{TRAINS}\n9 1 / 0027\n")


def test_a_line_that_may_fail(tmp_path: Path) -> None:
    setup = ["false", "nvcc --version"]
    code, printed, said = run(tmp_path, setup=setup, modules=["cuda/99"], environment={"UID": "5"}, setup_may_fail=True)
    assert (code, printed) == (9, f"{TRAINS}\n")
    assert said == "the environment of profile mine failed with exit code 1: `export UID=5`"
    code, printed, said = run(tmp_path / "exit", setup=["exit 3"], setup_may_fail=True)
    assert (code, printed, said) == (3, "", failed(1, 3, "exit 3", "ended the job"))


def test_a_variable_that_cannot_be_set(tmp_path: Path) -> None:
    code, printed, said = run(tmp_path, environment={"UID": "5"})
    words = "the environment of profile mine failed with exit code 1: `export UID=5`: UID: readonly variable"
    assert (code, printed, said) == (1, "", words)


def test_a_module_where_there_are_none(tmp_path: Path) -> None:
    code, printed, said = run(tmp_path, modules=["cuda/99"])
    assert (code, printed, said) == (127, "", "module load cuda/99 failed with exit code 127: module: command not found")


# a stand-in: environment-modules 3.2, which says what is wrong and returns 0, and knows no `module is-loaded`
OLD_MODULES = """
export MODULESHOME=/usr/share/modules
module() {
  case $1:$2 in
    load:good*) export LOADEDMODULES=good/1.0 _LMFILES_=/m/good/1.0 ;;
    show:good*) echo "/m/good/1.0:" >&2 ;;
    *) echo "ModuleCmd_Load.c(213):ERROR:105: Unable to locate a modulefile for '$2'" >&2 ;;
  esac
}
"""


def test_a_module_that_fails_with_code_0(tmp_path: Path) -> None:
    files = {"modules.bash": OLD_MODULES}
    (tmp_path / "bad").mkdir()
    code, printed, said = run(tmp_path / "bad", files, modules=["good", "good/1.0", "cuda/99"], init="modules.bash")
    words = "module load cuda/99 failed with exit code 0 and loaded nothing: "
    error = "ModuleCmd_Load.c(213):ERROR:105: Unable to locate a modulefile for 'cuda/99'"
    assert (code, printed, said) == (1, "", words + error)
    (tmp_path / "good").mkdir()
    code, printed, said = run(tmp_path / "good", files, modules=["good", "good/1.0"], init="modules.bash")
    assert (code, printed, said) == (9, f"{TRAINS}\n", "")
