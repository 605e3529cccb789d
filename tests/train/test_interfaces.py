"""Interfaces that a job is told to use are looked for before C++ does."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_cifar.errors import RunError
from hpc_cifar.train import distributed, interfaces, node_check

HERE = ("lo", "eth0", "ib0", "ib10", "docker0")


@pytest.mark.parametrize(
    ("name", "value", "good"),
    [
        ("GLOO_SOCKET_IFNAME", "ib0", True),
        ("GLOO_SOCKET_IFNAME", "eth0,ib0", True),
        ("GLOO_SOCKET_IFNAME", "ib", False),
        ("GLOO_SOCKET_IFNAME", "ib1", False),
        ("GLOO_SOCKET_IFNAME", "eth0,hsn0", False),
        ("NCCL_SOCKET_IFNAME", "ib", True),
        ("NCCL_SOCKET_IFNAME", "hsn,ib1", True),
        ("NCCL_SOCKET_IFNAME", "hsn", False),
        ("NCCL_SOCKET_IFNAME", "=ib0", True),
        ("NCCL_SOCKET_IFNAME", "=ib", False),
        ("NCCL_SOCKET_IFNAME", "=hsn0,eth0", True),
        ("NCCL_SOCKET_IFNAME", "^docker,lo", True),
        ("NCCL_SOCKET_IFNAME", "^lo,eth,ib,docker", False),
        ("NCCL_SOCKET_IFNAME", "^=lo,eth0,ib0,docker0", True),
        ("NCCL_SOCKET_IFNAME", "^=lo,eth0,ib0,ib10,docker0", False),
    ],
)
def test_what_gloo_and_nccl_make_of_a_name(name: str, value: str, good: bool) -> None:
    found = interfaces.problems(gpu=True, environment={name: value}, here=HERE)
    assert (found == []) is good
    for line in found:
        assert line.startswith(f"{name}={value}: ") and line.endswith("this machine has lo, eth0, ib0, ib10, docker0")


def test_jobs_on_gpus_need_both_and_others_gloo_alone() -> None:
    environment = {"GLOO_SOCKET_IFNAME": "no0", "NCCL_SOCKET_IFNAME": "no1"}
    assert len(interfaces.problems(gpu=True, environment=environment, here=HERE)) == 2
    [line] = interfaces.problems(gpu=False, environment=environment, here=HERE)
    assert "no interface no0 here" in line
    assert interfaces.problems(gpu=True, environment={}, here=()) == []


def test_preflight_and_training_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib77")
    place = {"gpu": False, "local_rank": 0, "local_size": 1}
    found = node_check.problems_here(tmp_path, tmp_path, "digits", verify=False, **place)  # type: ignore[arg-type]
    assert not [line for line in found if "ib77" in line]  # one process needs no network
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = node_check.problems_here(tmp_path, tmp_path, "digits", verify=False, **place)  # type: ignore[arg-type]
    assert [
        line for line in found if line.startswith("network: GLOO_SOCKET_IFNAME=ib77: no interface ib77 here; this machine has")
    ]
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match="GLOO_SOCKET_IFNAME=ib77"):
        distributed.connect(use_gpu=False)
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(RunError, match="MASTER_ADDR not set"):
        distributed.connect(use_gpu=False)
