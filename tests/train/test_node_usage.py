"""How busy nodes are: what the kernel and a stand-in for NVML say, and what of it reaches the rows of a run."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

from hpc_cifar import files
from hpc_cifar.config import difference
from hpc_cifar.runs import Run
from hpc_cifar.track.metrics import MetricsLog
from hpc_cifar.track.rows import NODES_LINE, Tail, rows_but_steps, rows_of
from hpc_cifar.train import cgroups, loop, node_usage, rehearsal
from hpc_cifar.train.distributed import World
from hpc_cifar.train.node_usage import Look, NodeUsage, Sampler, ticks, used_host_bytes
from hpc_cifar.train.nvml import Gpus

GIB = 2**30
SLOWLY = {rehearsal.VARIABLE: "0.02"}  # seconds of a step more, so that the first epoch is looked at


# ---- what the kernel says ------------------------------------------------------------------------------------------------


def test_busy_and_all_time_of_each_processor(tmp_path: Path) -> None:
    lines = ["cpu  11 0 5 80 20 1 2 1 9 0", "cpu0 6 0 3 40 10 1 1 1 4 0", "cpu13 5 0 2 40 10 0 1 0 5 0", "intr 5 0", "ctxt 9"]
    (tmp_path / "stat").write_text("\n".join(lines))
    assert ticks(tmp_path / "stat") == {0: (12, 62), 13: (8, 58)}


@pytest.mark.parametrize(
    ("listed", "below"), [("0::/slurm/job_1/step_0\n", ""), ("5:memory:/\n3:cpuset:/slurm/job_1/step_0\n0::/\n", "cpuset")]
)
def test_the_processors_are_those_of_the_job(tmp_path: Path, listed: str, below: str) -> None:
    """Not all of a shared node, and not those of one task alone."""
    (tmp_path / "own").write_text(listed)
    name = "cpuset.cpus" if below else "cpuset.cpus.effective"
    for folder, text in {"": "0-15", "slurm": "0-31", "slurm/job_1": "0-3,8", "slurm/job_1/step_0": "0"}.items():
        path = tmp_path / "groups" / below / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(f"{text}\n")
    assert cgroups.processors(set(range(16)), tmp_path / "groups", tmp_path / "own") == {0, 1, 2, 3, 8}


@pytest.mark.parametrize("listed", ["0::/elsewhere/on/the/host\n", "", "7:pids:/a\n\n"])
def test_a_container_sees_its_own_group_as_the_uppermost(tmp_path: Path, listed: str) -> None:
    (tmp_path / "own").write_text(listed)
    (tmp_path / "cpuset.cpus.effective").write_text("2-3\n")
    found = cgroups.processors({0, 1, 2, 3}, tmp_path, tmp_path / "own")
    assert found == ({2, 3} if listed.startswith("0::") else {0, 1, 2, 3})


def test_memory_in_use_is_that_of_the_job_where_it_has_a_limit(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal:  {64 * 2**20} kB\nMemFree: 5 kB\nMemAvailable:  {40 * 2**20} kB\n")
    (tmp_path / "own").write_text("0::/job_1/step_0\n")
    values = {"": ("max", 30 * GIB), "job_1": (8 * GIB, 5 * GIB), "job_1/step_0": (8 * GIB, GIB)}
    for folder, (limit, used) in values.items():
        path = tmp_path / "groups" / folder
        path.mkdir(parents=True, exist_ok=True)
        for name, value in (("max", limit), ("current", used), ("stat", f"inactive_file {GIB // 2}")):
            (path / f"memory.{name}").write_text(f"{value}\n")
    assert used_host_bytes(tmp_path / "meminfo", tmp_path / "groups", tmp_path / "own") == 4.5 * GIB
    (tmp_path / "own").write_text("0::/\n")
    assert used_host_bytes(tmp_path / "meminfo", tmp_path / "groups", tmp_path / "own") == 24 * GIB


def test_a_look_at_this_node_is_plausible() -> None:
    look = Look()
    end = time.monotonic() + 0.2
    while time.monotonic() < end:  # one processor is busy
        pass
    found = look()
    assert found.keys() == {"cpu_percent", "memory_mib"}
    assert 80 / (os.cpu_count() or 1) < found["cpu_percent"] <= 100
    assert 100 < found["memory_mib"] < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20


# ---- what NVML says ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nvml(compiled: Callable[[str], Path]) -> str:
    """A stand-in for the driver's library."""
    return str(compiled("nvml"))


def test_gpus_say_what_the_library_knows(nvml: str) -> None:
    gpus = Gpus(["aaaa", "gone", "bbbb"], nvml)
    first = {"gpu0_memory_mib": 3072.0, "gpu0_power_watts": 312.5, "gpu0_temperature_c": 61.0}
    assert gpus.sample() == first | {"gpu0_percent": 50.0, "gpu2_memory_mib": 5.0, "gpu2_power_watts": 70.0}
    assert gpus.sample()["gpu0_percent"] == 100.0


def test_without_the_library_there_is_nothing_to_say() -> None:
    assert Gpus(["aaaa"], "libnothing-at-all.so.1").sample() == {}
    assert Gpus(["aaaa"], "libc.so.6").sample() == {}, "it is another library"
    assert Gpus([]).sample() == {}


def test_means_over_the_looks_reach_the_row(nvml: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_usage, "Gpus", lambda uuids: Gpus(uuids, nvml))
    monkeypatch.setattr(node_usage, "EVERY_S", node_usage.SOON_S)
    monkeypatch.setattr(node_usage, "_uuids", lambda world: ["aaaa", "bbbb"])
    nodes = NodeUsage(World(0, 1, 0, 1, torch.device("cpu"), None))
    time.sleep(5 * node_usage.SOON_S)
    found = nodes.taken()
    nodes.close()
    assert 50 < found["node0_gpu0_percent"] < 100, "sometimes 50, sometimes 100"
    assert found["node0_gpu1_memory_mib"] == 5.0 and found["node0_memory_mib"] > 0
    assert "node0_gpu1_percent" not in found


@pytest.mark.component("gpu")
def test_a_real_gpu_tells_all_of_it() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device here")
    uuids = node_usage._uuids(World(0, 1, 0, 1, torch.device("cuda", 0), None))
    found = Gpus(uuids).sample()
    assert found.keys() == {f"gpu0_{name}" for name in ("percent", "memory_mib", "power_watts", "temperature_c")}
    assert found["gpu0_memory_mib"] > 0 and 0 <= found["gpu0_percent"] <= 100 and 0 < found["gpu0_temperature_c"] < 120


# ---- the thread, and what meets ------------------------------------------------------------------------------------------


def until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_mean_is_of_the_looks_since_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_usage, "EVERY_S", node_usage.SOON_S / 10)
    values, asked = iter([10.0, 20.0, 45.0]), []

    def look() -> dict[str, float]:
        asked.append(1)
        return {"cpu_percent": next(values)}  # at the end an error, which is nobody's business

    sampler = Sampler(look=lambda uuids: look)  # type: ignore[arg-type, return-value]
    until(lambda: len(asked) == 4)
    assert sampler.taken() == {"cpu_percent": 25.0}
    assert sampler.taken() == {}
    sampler.close()


@dataclasses.dataclass(frozen=True)
class Met(World):
    """Ranks that meet by heart."""

    every: Sequence[Any] = ()

    def gather(self, value: Any) -> list[Any] | None:
        assert self.every, "a single node has nobody to meet"
        return list(self.every) if self.main else None


CPU = torch.device("cpu")


def test_a_single_node_sends_nothing_and_its_first_rank_alone_looks() -> None:
    before = threading.active_count()
    assert NodeUsage(Met(1, 2, 1, 2, CPU, None)).taken() == {}
    assert threading.active_count() == before
    first = NodeUsage(Met(0, 2, 0, 2, CPU, None))
    assert threading.active_count() == before + 1
    until(lambda: first.taken().keys() == {"node0_cpu_percent", "node0_memory_mib"})
    first.close()
    until(lambda: threading.active_count() == before)


def test_nodes_have_the_numbers_of_their_first_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    every = [{"cpu_percent": 1.0}, None, {}, None, {"cpu_percent": 3.0, "gpu0_percent": 4.0}, None]
    nodes = NodeUsage(Met(0, 6, 0, 2, CPU, None, every))
    assert nodes.taken() == {"node0_cpu_percent": 1.0, "node2_cpu_percent": 3.0, "node2_gpu0_percent": 4.0}
    monkeypatch.setattr(node_usage, "MOST_NODES", 2)
    assert nodes.taken() == {"node0_cpu_percent": 1.0}
    nodes.close()
    assert NodeUsage(Met(3, 6, 1, 2, CPU, None, every)).taken() == {}


# ---- rows of runs --------------------------------------------------------------------------------------------------------


def kinds(run: Run) -> list[tuple[str, int]]:
    return [(row["kind"], row["step"]) for row in files.read_json_lines(run.metrics_file) if row["kind"] != "event"]


def test_a_row_stands_before_that_of_its_epoch(tmp_path: Path, digits_data: Path) -> None:
    config = ranks.experiment(training={"log_every_steps": 13})
    run = ranks.new_run(tmp_path, config)
    ranks.complete(run, digits_data, 1, environment=SLOWLY)
    ends = [step for kind, step in kinds(run) if kind == "epoch"]
    assert len(ends) == 2
    rows = [row for row in files.read_json_lines(run.metrics_file) if row["kind"] == "system"]
    seen = [row["step"] for row in rows]  # nobody may have looked in the second one
    assert seen in (ends, ends[:1]) and [row["epoch"] for row in rows] == [1, 2][: len(rows)]
    wanted = [(kind, step) for step in ends for kind in ("step", "system", "epoch") if kind != "system" or step in seen]
    assert kinds(run) == wanted
    numbers = [number for number, _ in Tail(run.metrics_file).new()]
    assert numbers == sorted(set(numbers)) and len(numbers) == len(wanted)
    for row in rows:
        assert row.keys() - {"kind", "epoch", "step", "time"} == {"node0_cpu_percent", "node0_memory_mib"}
        assert 0 < row["node0_cpu_percent"] <= 100


def test_those_after_the_last_checkpoint_are_made_again(tmp_path: Path, digits_data: Path) -> None:
    run = ranks.new_run(tmp_path, ranks.experiment(epochs=3))
    ranks.complete(run, digits_data, 1, max_steps=20, environment=SLOWLY)
    log = run.metrics_file.read_text()
    run.metrics_file.write_text(log + '{"kind": "system", "epoch": 2, "step": 26, "time": 1.0, "node0_cpu_percent": 7.0}\n')
    ranks.complete(run, digits_data, 1, environment=SLOWLY)
    rows = [row for row in files.read_json_lines(run.metrics_file) if row["kind"] == "system"]
    found = [row["epoch"] for row in rows]
    assert found == sorted(set(found)) and found[0] == 1
    assert 7.0 not in [row.get("node0_cpu_percent") for row in rows]


def test_without_them_there_is_no_thread_and_no_row(tmp_path: Path, digits_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not difference.matters("tracking.nodes", True, False)
    monkeypatch.setattr("hpc_cifar.train.records.NodeUsage", None)
    run = ranks.new_run(tmp_path, ranks.experiment(epochs=1, tracking={"nodes": False}))
    assert loop.train(run, data_root=digits_data, console=False)["state"] == "finished"
    assert {kind for kind, _ in kinds(run)} == {"step", "epoch"}


def test_readers_of_epochs_need_not_read_them(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    figures = {f"node{node}_gpu{gpu}_memory_mib": 1e-05 * gpu for node in range(64) for gpu in range(64)}
    for step in (1, 2):
        log.write("step", epoch=step, step=step, train_loss=1.0)
        log.write("system", epoch=step, step=step, **figures)
        log.write("epoch", epoch=step, step=step, val_loss=1.0)
    log.close()
    lines = log._path.read_bytes().splitlines()
    assert NODES_LINE.fullmatch(lines[1]) and not any(NODES_LINE.fullmatch(line) for line in (lines[0], lines[2]))
    assert len(rows_of(log._path)[0]) == 6 and rows_of(log._path)[1] == 0
    rows, damaged = rows_but_steps(log._path)
    assert [row["kind"] for row in rows] == ["epoch", "epoch"] and damaged == 0


@pytest.mark.slow
def test_two_nodes_are_in_one_row(tmp_path: Path, digits_data: Path) -> None:
    """Two agents of torchrun, as on two machines, with two ranks each."""
    config = ranks.experiment(data={"batch_size": 400}, resources={"nodes": 2, "processes_per_node": 2})
    files.write_json(tmp_path / "job.yaml", config.model_dump(mode="json"))  # YAML as well
    run = Run(tmp_path / "two")
    common = {**os.environ, "HPC_CIFAR_RUNS": str(tmp_path), "HPC_CIFAR_DATA": str(digits_data), "HPC_CIFAR_THREADS": "1"}
    where = ["--nnodes=2", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={ranks.free_port()}"]
    command = ["-m", "hpc_cifar", "train", str(tmp_path / "job.yaml"), "--name", run.id]
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *where, f"--node-rank={node}", *command],
            env=common | SLOWLY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    said = [agent.communicate(timeout=240)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    rows = [row for row in files.read_json_lines(run.metrics_file) if row["kind"] == "system"]
    assert rows and all(row.keys() & {"node0_memory_mib", "node1_memory_mib"} for row in rows), said
    figures = {name for row in rows for name in row if name.startswith("node")}
    assert figures == {f"node{node}_{name}" for node in range(2) for name in ("cpu_percent", "memory_mib")}
