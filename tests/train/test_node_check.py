"""Checks of this node with real faults, and real ranks that agree on what is wrong."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hpc_cifar.train.meeting import Report, Verdict, judge
from hpc_cifar.train.node_check import free_host_bytes, problems_here

# ranks 0 and 1 are on node a, rank 2 is on node b
RANK = """\
import os, signal, sys
import torch
from hpc_cifar.train.distributed import connected
from hpc_cifar.train.meeting import Meeting
from hpc_cifar.train.node_check import problems_of_sum
how, rank = sys.argv[1], int(os.environ["RANK"])
met = Meeting("b" if rank == 2 else "a", ["a", "b"], 3.0 if how == "absent" else 60.0)
verdict = met.agree("node", ["data: gone"] if how == "problem" and rank == 2 else [])
if verdict.good:
    if how == "freeze":
        met.timeout_s = 3.0
        if rank == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
    verdict = met.agree("sum", problems_of_sum(met, gpu=False, local_rank=rank % 2, local_size=2), joint=True)
print(verdict.leader, verdict, sep="|", flush=True)
if verdict.good:
    with connected(use_gpu=False) as world:  # at the same address, and nothing is left of the trial
        print(world.sum(torch.ones(1)).item())
"""


def ranks(how: str, which: tuple[int, ...] = (0, 1, 2)) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, how],
            env={**os.environ, **shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in which
    ]


def said(processes: list[subprocess.Popen[str]]) -> list[str]:
    return [process.communicate(timeout=60)[0].strip() for process in processes]


@pytest.mark.slow
def test_good_nodes_agree_and_then_train_at_the_same_address() -> None:
    assert said(ranks("well")) == ["0|\n3.0"] * 3


@pytest.mark.slow
def test_every_rank_learns_whose_node_is_bad() -> None:
    assert said(ranks("problem")) == ["0|b: data: gone"] * 3


@pytest.mark.slow
def test_a_rank_that_hangs_in_the_sum_is_named() -> None:
    first, second, frozen = ranks("freeze")
    try:
        assert said([first, second]) == ["0|b: no answer within 3 s"] * 2
    finally:
        frozen.kill()
        frozen.wait()


@pytest.mark.slow
def test_rank_0_may_be_the_one_that_does_not_answer() -> None:
    for line in said(ranks("absent", (1, 2))):
        leader, _, text = line.partition("|")
        assert leader == "None"
        assert text.startswith("a: rank 0 cannot be reached at 127.0.0.1:")


def reports(*problems: str | None) -> dict[int, Report]:
    """Rank r is on node r; None did not answer."""
    return {rank: Report(f"n{rank}", (text,) if text else ()) for rank, text in enumerate(problems) if text is not None}


@pytest.mark.parametrize(
    ("problems", "joint", "expected"),
    [
        (("", "", ""), False, Verdict()),
        (("gone", "", ""), False, Verdict({"n0": "gone"}, leader=1)),
        (("", None, "full"), False, Verdict({"n1": "no answer within 9 s", "n2": "full"})),
        (("hung", None, "hung"), True, Verdict({"n1": "no answer within 9 s"})),
        (("", "", "wrong"), True, Verdict({"n2": "wrong"})),
        (("lost", "lost", "lost"), True, Verdict(together="lost")),
        (("full", "full", "full"), False, Verdict({"n0": "full", "n1": "full", "n2": "full"}, leader=0)),
    ],
)
def test_verdicts(problems: tuple[str | None, ...], joint: bool, expected: Verdict) -> None:
    assert judge(reports(*problems), ["n0", "n1", "n2"], 1, 9, joint=joint) == expected


def here(run: Path, data: Path, *, gpu: bool = False, verify: bool = True) -> list[str]:
    return problems_here(run, data, "digits", gpu=gpu, local_rank=0, local_size=1, verify=verify)


def test_a_good_node_has_no_problems_and_nothing_is_left(tmp_path: Path, digits_data: Path) -> None:
    assert here(tmp_path, digits_data) == []
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_is_said(tmp_path: Path, digits_data: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(digits_data, data)
    with (data / "digits" / "test-images.npy").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\xaa")
    folder, damaged = here(tmp_path / "none", data)
    assert folder == f"run directory: {tmp_path / 'none'}: No such file or directory"
    assert damaged.startswith(f"data: {data}/digits: the store is damaged (test-images.npy is not what was written")
    assert here(tmp_path, data, verify=False) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is needed to miss one")
def test_a_gpu_that_was_asked_for_and_is_not_there(tmp_path: Path, digits_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert here(tmp_path, digits_data, gpu=True) == ["device: torch sees 0 GPUs for 1 processes (CUDA_VISIBLE_DEVICES: 0,1)"]


def test_free_memory_is_plausible() -> None:
    assert 0 < free_host_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def group(folder: Path, limit: str, used: int, cached: int, v1: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
    for name, text in zip(names, (limit, str(used)), strict=True):
        (folder / name).write_text(f"{text}\n")
    below = f"inactive_file 1\ntotal_inactive_file {cached}\n" if v1 else f"inactive_file {cached}\n"
    (folder / "memory.stat").write_text(f"cache 5\n{below}")


@pytest.mark.parametrize("where", ["/slurm/job_1/step_0", "/elsewhere/on/the/host"])
@pytest.mark.parametrize(
    ("v1", "listed"),
    [
        (False, "0::{}\n"),
        (True, "12:cpu,cpuacct:/\n10:memory:{}\n1:name=systemd:/user\n"),
        (True, "5:hugetlb,memory:{}\n0::/\n"),
    ],
)
def test_memory_that_a_control_group_leaves(tmp_path: Path, v1: bool, listed: str, where: str) -> None:
    """A job has the limit of its own group, or of one above; a container sees its own one as the uppermost."""
    groups, own = tmp_path / "groups", tmp_path / "own"
    own.write_text(listed.format(where))
    top = groups / "memory" if v1 else groups
    unlimited = "9223372036854771712" if v1 else "max"
    group(top, "4000000" if "elsewhere" in where else unlimited, 3_000_000, 500_000, v1)
    group(top / "slurm/job_1", "4000000", 3_000_000, 500_000, v1)
    group(top / "slurm/job_1/step_0", unlimited, 10, 0, v1)
    assert free_host_bytes(groups, own) == 1_500_000


def test_memory_of_a_group_that_is_full_is_none(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("4:memory:/a\n")
    group(tmp_path / "memory" / "a", "1000", 2000, 0, v1=True)
    assert free_host_bytes(tmp_path, tmp_path / "own") == 0
