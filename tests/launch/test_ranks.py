"""Ranks by whatever started them: torchrun, srun, mpirun; or a refusal that names what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_cifar.errors import UsageError
from hpc_cifar.launch import ranks

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "3"}
STEP |= {"SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NNODES": "2", "SLURM_STEP_NODELIST": "n[08-09]"}
STEP |= {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
ONE_NODE = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7"}
OMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
OMPI |= {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "ENVIRONMENT": "BATCH"}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
}
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


@pytest.mark.parametrize(
    ("found", "place"),
    [
        (TORCHRUN, ("3", "4", "1", "2", "n1")),
        (TORCHRUN | BATCH, ("3", "4", "1", "2", "n1")),
        (TORCHRUN | STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, ("3", "4", "1", "2", "n1")),  # srun torchrun
        (STEP, ("3", "4", "1", "2", "n08")),
        (STEP | {"PMI_RANK": "3", "PMI_SIZE": "4"}, ("3", "4", "1", "2", "n08")),  # srun --mpi=pmi2
        (ONE_NODE, ("1", "2", "1", "2", "127.0.0.1")),
        (OMPI, ("1", "2", "1", "2", "127.0.0.1")),
        (OMPI | BATCH, ("1", "2", "1", "2", "127.0.0.1")),
        (HYDRA, ("1", "2", "1", "2", "127.0.0.1")),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234"},
            ("1", "2", "1", "2", "127.0.0.1"),
        ),
        ({"WORLD_SIZE": "4", **STEP}, ("3", "4", "1", "2", "n08")),
    ],
)
def test_ranks_are_taken_from_whoever_knows_them(found: dict[str, str], place: tuple[str, ...]) -> None:
    told = ranks.described(found, 1)
    assert tuple(told[name] for name in PLACE) == place
    assert 0 < int(told["MASTER_PORT"]) < 65536


@pytest.mark.parametrize(
    "found",
    [
        *({}, BATCH, {"SLURM_NTASKS": "4"}, {"WORLD_SIZE": "1", "RANK": "0"}, {"OMPI_COMM_WORLD_SIZE": "1"}),
        *(
            BATCH | {"SLURM_STEP_ID": batch, "SLURM_STEPID": batch} for batch in ("4294967291", "-5")
        ),  # before Slurm 26.05, since
    ],
)
def test_one_process_is_alone(found: dict[str, str]) -> None:
    assert ranks.described(found, 1) == {}


@pytest.mark.parametrize(
    ("found", "missing"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")),
        ({name: value for name, value in TORCHRUN.items() if name != "LOCAL_RANK"}, ("LOCAL_RANK",)),
        ({name: value for name, value in TORCHRUN.items() if name != "MASTER_ADDR"}, ("MASTER_ADDR",)),
        ({name: value for name, value in TORCHRUN.items() if name != "MASTER_PORT"}, ("MASTER_PORT",)),
        ({"RANK": "1", "MASTER_ADDR": "n1"}, ("WORLD_SIZE", "LOCAL_RANK")),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, ("RANK",)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, ("LOCAL_RANK", "MASTER_ADDR")),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, ("LOCAL_RANK", "MASTER_ADDR")),
    ],
)
def test_what_is_missing_is_named_with_what_helps(found: dict[str, str], missing: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as told:
        ranks.described(found, 1)
    assert all(name in str(told.value) for name in missing)
    assert "`srun torchrun`" in str(told.value) and "`hpc-cifar submit`" in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"])
@pytest.mark.parametrize("text", ["²", "٣", "-1", "x", "9" * 5000, "1.5"])
def test_numbers_are_plain_digits(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=name):
        ranks.described(TORCHRUN | {name: text}, 1)


def test_every_rank_finds_the_same_place_and_port() -> None:
    told = [ranks.described(STEP | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 2)}, rank) for rank in range(4)]
    assert {(one["MASTER_ADDR"], one["MASTER_PORT"]) for one in told} == {(told[0]["MASTER_ADDR"], told[0]["MASTER_PORT"])}
    assert [one["RANK"] for one in told] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(("hosts", "first"), [("n1", "n1"), ("gpu-n[01-03,7],m1", "gpu-n01"), ("a[2]-ib,b", "a2-ib"), ("", "")])
def test_the_first_host(hosts: str, first: str) -> None:
    assert ranks.first_host(hosts) == first


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_two_tasks_train_one_run_together(tmp_path: Path, digits_data: Path, launcher: str) -> None:
    names = ranks._MPI[0] if launcher == "mpirun" else ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "")
    tasks = []
    for rank in range(2):
        place = dict(zip(names, (str(rank), "2", str(rank), "2"), strict=True))
        place |= {"SLURM_NNODES": "1", "SLURM_STEP_ID": "3", "SLURM_JOB_ID": str(os.getpid())} if launcher == "srun" else {}
        env = {**os.environ, **{name: value for name, value in place.items() if name}}
        env |= {"HPC_CIFAR_RUNS": str(tmp_path / "runs"), "HPC_CIFAR_DATA": str(digits_data)}
        command = [sys.executable, "-m", "hpc_cifar", "train", "quickstart-digits", "--max-steps", "3"]
        tasks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [task.communicate(timeout=300)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert len([path for path in (tmp_path / "runs").iterdir() if not path.name.startswith(".")]) == 1
    assert "result of" in said[0] and "result of" not in said[1]
