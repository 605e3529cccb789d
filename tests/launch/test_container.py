"""Containers and interpreters up to the words that a shell reads; ``make container-apptainer`` runs one for real."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from launch_site import unmarked

from hpc_cifar.config.cluster import Cluster
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.errors import UsageError
from hpc_cifar.launch import script, submit

EXPERIMENT = Experiment.model_validate(
    {
        "name": "deep",
        "epochs": 3,
        "model": {"family": "sequential", "layers": ["flatten", {"dense": {"units": 10}}]},
        "data": {"batch_size": 64},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "resources": {"nodes": 2, "gpus_per_node": 4},
    }
)


def text_of(cluster: dict[str, Any], run: str = "/runs/deep 1", gpus: int = 4) -> str:
    made = Cluster.model_validate({"name": "x", **cluster})
    resources = EXPERIMENT.resources.model_copy(update={"gpus_per_node": gpus, "processes_per_node": 4})
    asked = EXPERIMENT.model_copy(update={"resources": resources})
    return script.executor(asked, made, submit.plan_for(asked, made, 1000), Path(run), data_root=Path("/data")).script()


def last_line(cluster: dict[str, Any], run: str = "/runs/deep 1", gpus: int = 4) -> list[str]:
    """The words that a shell reads from the line that starts the ranks."""
    [line] = [line for line in text_of(cluster, run, gpus).splitlines() if line.startswith("srun ")]
    return shlex.split(line)


def test_apptainer_goes_around_python() -> None:
    container = {
        "runtime": "apptainer",
        "image": "/my images/x.sif",
        "binds": ["/scratch", "/a b:/c:ro"],
        "args": ["--no-home"],
    }
    words = last_line({"container": container})
    assert words[words.index("apptainer") :] == [
        *("apptainer", "exec", "--nv", "--bind", "/runs/deep 1:/runs/deep 1", "--bind", "/data:/data"),
        *("--bind", "/scratch:/scratch", "--bind", "/a b:/c:ro", "--no-home", "/my images/x.sif"),
        *("python3", "-u", "-m", "submitit.core._submit", "/runs/deep 1/submitit"),
    ]
    assert words[0] == "srun"
    cpu = last_line({"container": container, "python": "/opt/my venv/bin/python", "gpu_request": "none"}, gpus=0)
    assert "--nv" not in cpu
    assert cpu[cpu.index("/my images/x.sif") + 1] == "/opt/my venv/bin/python"
    assert "singularity" in last_line({"container": {**container, "runtime": "singularity"}})


def test_pyxis_is_an_option_of_srun() -> None:
    container = {
        "runtime": "pyxis",
        "image": "example.org#a/b:1",
        "binds": ["/a b:/c"],
        "args": ["--container-mount-home"],
    }
    words = last_line({"container": container, "environment": {"NCCL_DEBUG": "WARN"}, "srun_args": ["-l"]})
    assert words[words.index("--container-image=example.org#a/b:1") :] == [
        *("--container-image=example.org#a/b:1", "--container-mounts=/runs/deep 1:/runs/deep 1,/data:/data,/a b:/c"),
        *("--container-env=PYTHONPATH,PYTHONSAFEPATH,NCCL_DEBUG", "--container-mount-home", "-l"),
        *("sh", "-c", 'trap "" USR2 TERM; exec "$@"', "sh"),  # signals wait until Python listens
        *("python3", "-u", "-m", "submitit.core._submit", "/runs/deep 1/submitit"),
    ]


def test_inside_a_container_only_the_snapshot_is_on_the_path() -> None:
    base: dict[str, Any] = {"environment": {"X": "a b"}}
    text = text_of({**base, "container": {"runtime": "apptainer", "image": "/x.sif"}})
    assert "export PYTHONPATH='/runs/deep 1/code'\n" in text
    assert "export APPTAINERENV_PYTHONPATH='/runs/deep 1/code'\n" in text
    assert "export APPTAINERENV_X='a b'\n" in text
    text = text_of({**base, "container": {"runtime": "pyxis", "image": "/x.sqsh"}})
    assert "APPTAINERENV" not in text
    assert "export PYTHONPATH='/runs/deep 1/code'\n" in text
    assert unmarked(text_of({**base, "container": {"runtime": "none"}})) == unmarked(text_of(base))


@pytest.mark.parametrize("name", ["a,b", "a:b"])
def test_a_container_cannot_be_given_every_folder(name: str) -> None:
    with pytest.raises(UsageError, match="a comma or a colon in its path"):
        last_line({"container": {"runtime": "pyxis", "image": "/x"}}, run=f"/runs/{name}")
    assert last_line({}, run=f"/runs/{name}")


def test_the_interpreter_is_one_word() -> None:
    assert last_line({"python": "/my venv/bin/python; touch x"})[-5] == "/my venv/bin/python; touch x"
    assert last_line({"python": "~/venv/bin/python"})[-5] == str(Path.home() / "venv/bin/python")
