"""Small parts of a launch, each for itself."""

from __future__ import annotations

import dataclasses
import importlib
import os
import pickle
import py_compile
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_cifar import lifetime, records
from hpc_cifar.config.experiment import Resources
from hpc_cifar.errors import RunError
from hpc_cifar.launch import job, local, process, provenance, snapshot
from hpc_cifar.records import Process
from hpc_cifar.runs import Run


@pytest.mark.parametrize(
    ("resources", "gpus", "cpus", "expected", "note"),
    [
        (
            {"gpus_per_node": 8},
            0,
            16,
            (1, 2, 0),
            "asks for 1 node x 8 GPUs; this machine has no GPU, so 2 processes on the CPU",
        ),
        ({"gpus_per_node": 8}, 0, 1, (1, 1, 0), "no GPU, so 1 process on the CPU"),
        ({"gpus_per_node": 8}, 1, 16, (1, 1, 1), "this machine has 1 GPU"),
        ({"nodes": 4, "gpus_per_node": 2}, 4, 16, (1, 2, 2), "asks for 4 nodes x 2 GPUs; this machine has 2 GPUs"),
        ({"gpus_per_node": 2}, 2, 16, (1, 2, 2), None),
        ({"processes_per_node": 3}, 0, 16, (1, 3, 0), None),
        ({}, 4, 16, (1, 2, 0), "does not say how many processes"),
        ({"processes_per_node": 2, "nodes": 2}, 0, 16, (1, 2, 0), "one machine"),
    ],
)
def test_local_placement(
    resources: dict[str, int], gpus: int, cpus: int, expected: tuple[int, int, int], note: str | None
) -> None:
    placement, notes = local.local_placement(Resources.model_validate(resources), gpus, cpus)
    assert (placement.nodes, placement.processes_per_node, placement.gpus_per_node) == expected
    assert (note in notes[0]) if note else not notes


@pytest.mark.parametrize(
    ("value", "expected"),
    [("", []), ("-1", []), ("3", ["3"]), ("1,0", ["1", "0"]), ("GPU-ab12,GPU-cd", ["GPU-ab12", "GPU-cd"]), ("0,-1,2", ["0"])],
)
def test_visible_gpus_respect_what_is_set(monkeypatch: pytest.MonkeyPatch, value: str, expected: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert local.visible_gpus() == expected


def test_the_pickled_job_is_tiny_and_light() -> None:
    made = job.TrainJob(Path("/runs/x"), Path("/data"))
    assert len(pickle.dumps(made)) < 200
    assert vars(pickle.loads(pickle.dumps(made))) == {"run": "/runs/x", "data_root": "/data"}
    code = "import sys, hpc_cifar.launch.job; print([m for m in ('torch', 'pydantic', 'yaml', 'submitit') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_ports_differ_between_restarts_and_agree_between_ranks() -> None:
    ports = {job.port_for("123", restart) for restart in range(50)}
    assert len(ports) > 45
    assert all(10_000 <= port < 30_000 for port in ports)
    assert job.port_for("123", 1) == job.port_for("123", 1)


def test_identity_tells_a_process_from_its_successor() -> None:
    me = records.of(Process, process.identity(os.getpid()))
    assert process.is_alive(me)
    assert not process.is_alive(dataclasses.replace(me, pid_started=1))
    assert not process.is_alive(dataclasses.replace(me, boot="another"))
    with subprocess.Popen(["sleep", "60"]) as child:
        who = records.of(Process, process.identity(child.pid))
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not process.is_alive(who)  # a zombie runs no more


def test_snapshot_is_whole_and_taken_once(tmp_path: Path) -> None:
    code = snapshot.take(tmp_path / "code")
    ours = {p.relative_to(snapshot.PACKAGE) for p in snapshot.PACKAGE.rglob("*.py")}
    assert {p.relative_to(code / "hpc_cifar") for p in (code / "hpc_cifar").rglob("*.py")} == ours
    (code / "hpc_cifar" / "__init__.py").write_text("mine")
    snapshot.take(tmp_path / "code")
    assert (code / "hpc_cifar" / "__init__.py").read_text() == "mine"


def test_a_snapshot_leaves_out_what_is_no_code_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "hpc_cifar"
    package.mkdir()
    (package / "__init__.py").touch()
    with (package / "weights.pt").open("wb") as stream:
        stream.truncate(60 << 20)
    os.mkfifo(package / "fifo")
    code = snapshot.take(tmp_path / "code", package)
    assert sorted(path.name for path in (code / "hpc_cifar").iterdir()) == ["__init__.py"]
    assert "weights.pt (60.0 MiB) is no code: runs get no copy of it" in capsys.readouterr().err
    assert all(path.stat().st_size < snapshot.LARGEST for path in snapshot.PACKAGE.rglob("*.*") if path.is_file())


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: str, target: str) -> str:
        raise OSError(28, "No space left on device", target)

    monkeypatch.setattr(snapshot, "_copy", full)
    monkeypatch.setattr(snapshot, "_link", full)
    for make in (lambda: snapshot.take(tmp_path / "code"), lambda: snapshot.share(tmp_path / "code", snapshot.PACKAGE)):
        with pytest.raises(RunError, match="No space left on device") as told:
            make()
        assert len(str(told.value)) < 400 and "\n" not in str(told.value)


def test_a_snapshot_has_the_bytecode_of_this_python_and_uses_it(tmp_path: Path) -> None:
    package = tmp_path / "site" / "hpc_cifar"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import sys\n\n\ndef where():\n    return sys._getframe().f_code.co_filename\n")
    py_compile.compile(str(package / "__init__.py"))
    (package / "__pycache__" / "__init__.cpython-27.pyc").write_bytes(b"of another Python")
    code = snapshot.take(tmp_path / "code", package)
    [kept] = code.rglob("*.pyc")
    assert kept.name.endswith(f".{sys.implementation.cache_tag}.pyc")
    read = "import hpc_cifar; print(hpc_cifar.where())"
    done = subprocess.run([sys.executable, "-v", "-c", read], cwd=code, capture_output=True, text=True, check=True)
    assert str(kept) in done.stderr and "wrote" not in done.stderr, "the bytecode was read, none was made"
    assert done.stdout.strip() == str(code / "hpc_cifar" / "__init__.py"), "and it names the file of the snapshot"
    (package / "__init__.py").write_text("def where():\n    return 'edited'\n")  # so the bytecode is of another one
    snapshot.take(tmp_path / "later", package)
    done = subprocess.run([sys.executable, "-c", read], cwd=tmp_path / "later", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "edited"


def test_a_rank_leaves_with_its_exit_code_and_all_that_was_printed(tmp_path: Path) -> None:
    """Only where the process is for the job alone, after all exit handlers, and never instead of a failure."""
    script = """
import atexit, ctypes, sys
from hpc_cifar import lifetime
atexit.register(print, "handler")
ctypes.CDLL(None).printf(b"library\\n")
class Slow:
    def __del__(self): print("torn down")
kept = Slow()
lifetime.leave_soon(int(sys.argv[1]))
{end}
"""
    for end, code, torn in (("sys.exit(3)", 3, False), ("pass", 3, False), ("raise OSError", 1, True)):
        done = subprocess.run(
            [sys.executable, "-c", script.format(end=end), "3"], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert done.returncode == code, done
        assert {"handler", "library"} <= set(done.stdout.split()), done
        assert ("torn" in done.stdout) == torn, done
    job.leave(1)  # pytest is not a rank
    assert lifetime._code is None


SECRETS = ("hunter2hunter2", "a" * 40, "ghp_abcdefghij0123456789", "wandb_v1_0123456789abcdef")


def test_provenance_has_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("x = 1\n")
    (package / ".env").write_text("X=1\n")
    for command in (["init", "-q"], ["add", "-f", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=package, check=True)
    (package / "__init__.py").write_text(
        f"x = 2\npassword = '{SECRETS[0]}'\nWANDB_API_KEY={SECRETS[1]}\n# {SECRETS[2]}\nurl = 'https://me:{SECRETS[3]}@host/x'\n"
    )
    (package / ".env").write_text("X=topsecretvalue\n")
    monkeypatch.setattr(sys, "argv", ["hpc-cifar", "--set", f"api_key={SECRETS[0]}"])
    found = provenance.git(package)
    assert found is not None
    assert found["dirty"]
    assert "+x = 2" in found["diff"]
    everything = found["diff"] + str(provenance.collect())
    assert not [secret for secret in (*SECRETS, "topsecretvalue") if secret in everything]


def test_provenance_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git() is None
    found = provenance.collect(["x"])
    assert found["git"] is None
    assert found["packages"]["submitit"]


def test_a_package_inside_somebody_elses_repository_has_no_commit(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "__init__.py").touch()
    assert provenance.git(tmp_path / "site-packages") is None


def test_signals_before_training_end_the_start_once() -> None:
    early = job.EarlySignals()
    early(signal.SIGUSR2, None)  # during the imports
    early.armed = True
    with pytest.raises(job.EarlyStop):
        early.check()
    early(signal.SIGTERM, None)  # the next one must not break off what the first began
    assert early.noted == [signal.SIGUSR2, signal.SIGTERM]
    with pytest.raises(job.EarlyStop):  # somebody swallowed it: training does not begin
        early.check()
    armed = job.EarlySignals()
    armed.check()
    armed.armed = True
    with pytest.raises(job.EarlyStop):
        armed(signal.SIGTERM, None)
    armed(signal.SIGUSR2, None)


def test_a_signal_during_an_import_waits_for_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library in C++ that runs Python while it is imported ends the process for an exception."""
    (tmp_path / "signalled.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGUSR2)\nreached = [len('not broken off')]\nimport wanted_next\n"
    )
    (tmp_path / "wanted_next.py").write_text("raise RuntimeError('this is never executed')\n")
    monkeypatch.syspath_prepend(tmp_path)
    early = job.EarlySignals()
    early.armed = True
    monkeypatch.setattr(sys, "meta_path", [early, *sys.meta_path])
    before = signal.signal(signal.SIGUSR2, early)
    try:
        with pytest.raises(job.EarlyStop) as stopped:
            importlib.import_module("signalled")
    finally:
        signal.signal(signal.SIGUSR2, before)
    functions = [entry.name for entry in stopped.traceback]
    assert functions[-2:] == ["find_spec", "check"] and "__call__" not in functions
    assert (early.noted, early.armed) == ([signal.SIGUSR2], False)


def test_a_failure_counts_for_its_own_segment(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert not job.first_failure(run, "7.0")
    (tmp_path / "failures.jsonl").write_text('{"segment": "7.0", "rank": 1, "reason": "no GPU"}\n')
    assert job.first_failure(run, "7.0") == "rank 1: no GPU" and not job.first_failure(run, "7.1")
