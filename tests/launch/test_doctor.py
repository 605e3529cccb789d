"""What ``doctor`` says about a machine where something is missing; tests/slurm/test_doctor.py looks at a compute node."""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import COMMANDS, preload, typed
from launch_site import command
from wandb_server import KEY, Server

from hpc_cifar.config.cluster import LOCAL, SLURM
from hpc_cifar.findings import Finding
from hpc_cifar.launch import doctor, machine
from hpc_cifar.train import libraries

preload(*COMMANDS)


def only(found: Any) -> Finding:
    (one,) = list(found)
    assert isinstance(one, Finding)
    assert bool(one.fix) == (one.state != "ok"), "what is not ok says what fixes it"
    return one


def child(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_requirements_that_are_not_met(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.packages().state == "ok"
    wanted = ["numpy>=99", "no-such-thing>=1", "pyyaml>=6", "another; extra == 'dev'", "older; python_version < '3'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    found = only([machine.packages()])
    assert found.state == "problem" and "numpy>=99 (" in found.said and "no-such-thing>=1 (missing)" in found.said
    assert found.fix == "pip install 'numpy>=99' 'no-such-thing>=1'"


def test_an_untested_python_and_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert machine.python().state == "ok"
    monkeypatch.setattr(machine, "PYTHONS", ((3, 8), (3, 9)))
    assert only([machine.python()]).fix == "make an environment with Python 3.8 to 3.9"
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    command(tmp_path, "gcc", "")
    assert only([machine.compiler()]).said == "missing: a C++ compiler; torch.compile and Triton cannot be used"
    command(tmp_path, "g++", "")
    assert machine.compiler().said == "gcc and g++, with Python's headers"


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Have every disk so many GiB free; 50 to begin with."""
    real = shutil.disk_usage("/")

    def free(gib: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=int(gib * 2**30)))

    free(50)
    return free


def test_a_folder_is_written_locked_and_its_clock_read(tmp_path: Path, room: Callable[[float], None]) -> None:
    runs, skew_s = machine.folder("runs", "HPC_CIFAR_RUNS", tmp_path / "a" / "runs")
    assert runs.state == "ok" and "(made when needed)" in runs.said
    assert skew_s is not None and skew_s < machine.SKEW_S[0]
    assert list(tmp_path.iterdir()) == [], "it leaves nothing"
    (tmp_path / "file").touch()
    bad, nothing = machine.folder("runs", "HPC_CIFAR_RUNS", tmp_path / "file" / "runs")
    assert nothing is None
    assert bad.state == "problem" and "Not a directory" in bad.said and "export HPC_CIFAR_RUNS=" in bad.fix


def test_a_full_disk_a_quota_and_one_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: Callable[[float], None]
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    def no_quota(*_: Any) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)
        assert "no locks there" in machine.folder("runs", "X", tmp_path)[0].said
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", no_quota)
        met = machine.folder("runs", "X", tmp_path)[0]
        assert met.state == "problem" and "quota" in met.said and met.fix.startswith("remove old runs")
    for free_gib, state in ((0.5, "problem"), (5, "warning"), (50, "ok")):
        room(free_gib)
        assert machine.folder("runs", "X", tmp_path)[0].state == state


@pytest.mark.parametrize(("ahead_s", "state"), [(0, "ok"), (7, "warning"), (-90, "problem")])
def test_a_clock_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: Callable[[float], None], ahead_s: float, state: str
) -> None:
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + ahead_s)
    runs, skew_s = machine.folder("runs", "X", tmp_path)
    assert runs.state == "ok" and skew_s is not None and only([machine.clock(skew_s, tmp_path)]).state == state


def test_data_that_is_not_there_good_and_damaged(tmp_path: Path, digits_data: Path) -> None:
    missing, writable = machine.data(tmp_path)
    assert writable.name == "data folder"
    assert missing.state == "problem" and missing.fix.startswith("hpc-cifar prepare cifar10")
    shutil.copytree(digits_data, tmp_path / "data")
    good = only(machine.data(tmp_path / "data"))
    assert good.state == "ok" and "1,438 training images" in good.said
    images = tmp_path / "data" / "digits" / "train-images.npy"
    images.write_bytes(images.read_bytes()[:1000])
    damaged = only(machine.data(tmp_path / "data"))
    assert damaged.state == "problem" and "damaged" in damaged.said
    assert damaged.fix.startswith("hpc-cifar prepare digits") and damaged.fix.endswith("--force")


def test_scratch_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(machine.scratch(None)) == []
    assert only(machine.scratch(str(tmp_path))).state == "ok"
    monkeypatch.delenv("NO_SUCH_FOLDER", raising=False)
    assert only(machine.scratch("$NO_SUCH_FOLDER/x")).state == "warning"
    assert "none prefetched" in machine.weights(tmp_path).said
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "torchvision-vgg16.safetensors").touch()
    assert "torchvision-vgg16 in" in machine.weights(tmp_path).said


def test_a_library_that_prints_crashes_or_hangs() -> None:
    row = json.dumps([Finding("FFCV", "ok", "1").as_dict()])
    later = time.monotonic() + 60
    assert doctor._answer("FFCV", child(f"print('noise'); print({row!r})"), later) == [Finding("FFCV", "ok", "1")]
    crashed = only(doctor._answer("torch", child("import os; os.abort()"), later))
    assert crashed.state == "problem" and "it ended by SIGABRT" in crashed.said
    broken = only(doctor._answer("FFCV", child("import no_such_library"), later))
    assert broken.state == "warning" and "No module named 'no_such_library'" in broken.said
    began = time.monotonic()
    hung = only(doctor._answer("torch", child("import time; time.sleep(60)"), began + 0.3))
    assert "did not answer" in hung.said and time.monotonic() - began < 20


def test_gpus_that_a_job_was_given_and_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = only(libraries._gpus(2))
    assert found.state == "problem" and found.said.startswith("torch sees 0 of the 2 GPUs")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert only(libraries._gpus(0)).state == only(libraries._gpus(None)).state == "ok"


def test_a_pipeline_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    found = only(libraries.pipeline("dali"))
    assert found.state == "warning" and found.said.startswith("nvidia-dali-cuda130 is not installed: no job can name")
    assert "hpc-cifar[dali]" in found.fix


def asked(environment: dict[str, str]) -> Finding:
    command = [sys.executable, "-m", "hpc_cifar.train.libraries", "W&B", "0"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=100, check=True)
    return Finding(**json.loads(done.stdout.splitlines()[-1])[0])


def test_a_mirror_that_is_not_installed_is_none_that_a_job_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    found = only(libraries.tensorboard())
    assert (found.state, found.said) == ("ok", importlib.metadata.version("tensorboard"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = only(libraries.tensorboard())
    assert found.state == "ok" and "not installed" in found.said and "pip install 'hpc-cifar[tensorboard]'" in found.said


@pytest.mark.slow
def test_who_we_are_to_wandb(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.delenv("WANDB_BASE_URL")
    here = {"WANDB_BASE_URL": server.url, "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    assert f"no login for {server.url}" in asked(here).said
    good = asked(here | {"WANDB_API_KEY": KEY})
    assert good.state == "ok" and good.said.endswith(f"at {server.url}"), good
    assert KEY not in str(good)
    assert f"no login for {wandb.Settings().base_url}" in asked({name: here[name] for name in ("HOME", "NETRC")}).said
    assert asked(here | {"WANDB_MODE": "offline"}).state == "ok"
    server.trouble = lambda what, number: 401
    refused = asked(here | {"WANDB_API_KEY": KEY})
    assert "does not accept the login" in refused.said and refused.fix == "wandb login --relogin", refused
    gone = asked(here | {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"})
    assert gone.state == "warning" and "does not answer here" in gone.said and "hpc-cifar sync" in gone.fix


def test_a_machine_without_slurm_and_one_that_cannot_requeue(tmp_path: Path, slurm_says: Callable[..., None]) -> None:
    slurm_says()
    assert doctor.requeue(SLURM).state == "ok"
    assert doctor.requeue(SLURM.model_copy(update={"requeue": False})).fix.startswith("chain_links: 5")
    assert doctor.requeue(SLURM.model_copy(update={"requeue": False, "chain_links": 3})).state == "ok"
    (tmp_path / "bin" / "scontrol").unlink()
    os.environ["PATH"] = str(tmp_path / "bin")  # slurm_says restores it
    assert doctor.requeue(SLURM).said.startswith("no scontrol here")
    assert only(doctor.slurm_findings(SLURM)).said == "no sbatch on this machine"


@pytest.mark.slow
def test_the_command(tmp_path: Path, digits_data: Path) -> None:
    environment = {**os.environ, "HPC_CIFAR_RUNS": str(tmp_path / "runs"), "HPC_CIFAR_DATA": str(digits_data)}
    done = typed(["doctor", "--cluster", "local", "--json"], environment, tmp_path, 200)
    said = json.loads(done.stdout)
    assert done.returncode == 0 and said["good"], done.stdout + done.stderr
    (here,) = said["machines"]
    names = [row["name"] for row in here["findings"]]
    assert names[:6] == ["Python", "packages", "compiler", "runs", "clock", "data"]
    assert {"torch", "FFCV", "DALI", "W&B", "TensorBoard", "/dev/shm", "cache"} <= set(names) and "Slurm" not in names
    bad = typed(["doctor", "--cluster", "local"], {**environment, "HPC_CIFAR_DATA": str(tmp_path / "no")}, tmp_path, 200)
    assert bad.returncode == 1
    assert "fix: hpc-cifar prepare cifar10" in bad.stdout
    assert bad.stdout.splitlines()[-1].startswith("doctor: 1 problem")
    assert LOCAL.executor == "local"
