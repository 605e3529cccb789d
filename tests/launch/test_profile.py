"""What ``init`` makes of a big site's answers; tests/slurm/test_init.py asks a real Slurm."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from hpc_cifar.config.cluster import Cluster
from hpc_cifar.errors import LaunchError
from hpc_cifar.launch import profile
from hpc_cifar.launch.discover import Association, Nodes, Partition, Site, gpus_of


@pytest.mark.parametrize(
    ("gres", "expected"),
    [
        ("(null)", {}),
        ("gpu:4", {"": 4}),
        ("gpu", {"": 1}),
        ("gpu:a100", {"a100": 1}),
        ("gpu:a100:4(S:0-1)", {"a100": 4}),
        ("gpu:a100:4(S:0,3),shard:a100:16", {"a100": 4}),
        ("gpu:a100_3g.20gb:2,gpu:a100:2", {"a100_3g.20gb": 2, "a100": 2}),
        ("craynetwork:4,gpu:h100:8(IDX:0-7)", {"h100": 8}),
        ("lscratch:800", {}),
    ],
)
def test_gres(gres: str, expected: dict[str, int]) -> None:
    assert gpus_of(gres) == expected


def partition(name: str, *nodes: Nodes, **settings: str) -> Partition:
    return Partition(name, settings.pop("Default", "NO") == "YES", True, {"MaxTime": "2-00:00:00", **settings}, nodes)


CPU = Nodes(100, 128, 257_000, {}, "epyc")
V100, A100 = Nodes(8, 40, 385_000, {"v100": 4}, ""), Nodes(4, 128, 515_000, {"a100": 8}, "nvlink,ib")
CONFIG = {
    "ClusterName": "big iron",
    "SLURM_VERSION": "23.11.4",
    "AccountingStorageEnforce": "associations,limits,qos",
    "SelectType": "select/cons_tres",
    "SelectTypeParameters": "CR_CORE_MEMORY",
    "PreemptType": "preempt/qos",
    "PreemptMode": "GANG,SUSPEND",
    "JobRequeue": "0",
}
ACCOUNTS = (Association("bio", "", ("normal", "long"), "normal"), Association("phys", "gpu", ("gpuq",), ""))


def written(one: Partition, **changes: Any) -> tuple[dict[str, Any], str]:
    config = CONFIG | changes.pop("config", {})
    site = Site(config, (one,), "me", changes.pop("default_account", "bio"), changes.pop("associations", ACCOUNTS), **changes)
    text = profile.text_of(site, "big", one)
    found: dict[str, Any] = yaml.safe_load(text)
    Cluster.model_validate(found)
    return found, text


@pytest.mark.parametrize("length", [30, 32, 33, 34, 60, 200])
def test_long_names_stay_names(length: int) -> None:
    """A comment needs a blank before it, or it belongs to the value."""
    name = "p" * length
    found, _ = written(partition(name, Nodes(4, 128, 515_000, {"g" * min(length, 60): 8, "x": 1}, "f" * length)))
    assert found["partition"] == name


def test_a_partition_of_many_kinds() -> None:
    found, text = written(partition("gpu", V100, A100, AllowAccounts="phys,chem", PreemptMode="CANCEL", GraceTime="0"))
    assert (found["gpu_type"], found["gpus_per_node_available"], found["cpus_per_process"]) == ("a100", 8, 16)
    assert (found["account"], found["max_time"]) == ("phys", "2-00:00:00")
    assert "# sacctmgr: an account of yours" in text
    assert "8 x 40 CPUs, 376 GiB, 4 v100 GPUs; 4 x 128 CPUs, 503 GiB, 8 a100 GPUs [nvlink,ib]" in text
    assert "without this line a job gets the site's default" in text
    assert "ends a preempted job for good" in text and "set checkpoint.every_steps" in text
    assert "JobRequeue=0: off by default" in text


@pytest.mark.parametrize(
    ("name", "value", "signals"),
    [
        ("SlurmctldParameters", "enable_configless,preempt_send_user_signal", "SIGUSR2 and SIGTERM"),
        ("PreemptParameters", "send_user_signal", "SIGUSR2 and SIGTERM"),  # since 23.02
        ("PreemptParameters", "(null)", "SIGTERM"),
        ("PreemptParameters", "strict_order", "SIGTERM"),
    ],
)
def test_the_signal_of_a_preemption(name: str, value: str, signals: str) -> None:
    _, text = written(partition("gpu", A100, GraceTime="30", PreemptMode="REQUEUE"), config={name: value})
    assert f"A preempted job is told by {signals} and has GraceTime=30 s to end." in text


def test_a_partition_without_gpus_or_accounts() -> None:
    why = "sacctmgr did not say: down"
    found, text = written(partition("no", CPU), associations=(), accounting=why, config={"PreemptMode": "OFF"})
    assert (found["partition"], found["gpu_request"], found["gpus_per_node_available"]) == ("no", "none", 0)
    assert "account" not in found and f"# {why}" in text
    assert found["preemptible"] is False


def test_older_slurm_and_numbers_as_names() -> None:
    one = partition("0123", A100, MaxTime="10:00:00", AllowQos="normal")
    found, text = written(one, config={"SelectType": "select/cons_res"})
    assert (found["partition"], found["gpu_request"], found["max_time"]) == ("0123", "gres", "10:00:00")
    assert "yours are normal; normal without this line" in text


def test_what_makes_no_profile_is_said() -> None:
    with pytest.raises(LaunchError, match="makes no profile: partition: should be a name without spaces"):
        written(partition("a; touch x", CPU))


def test_words_of_slurm_stay_comments() -> None:
    evil = partition("gpu", Nodes(1, 1, 1, {}, "x\nexecutor: local\u2028y"))
    found, _ = written(evil, associations=(), accounting="a\nname: evil")
    assert found["executor"] == "slurm"
    assert found["name"] == "big"
