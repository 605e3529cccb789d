"""What a profile adds for sbatch contradicts neither the job nor another field, in full or abbreviated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hpc_cifar.config.cluster import Cluster, with_overrides
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.config.load import load_cluster
from hpc_cifar.config.sbatch import RESERVED
from hpc_cifar.errors import UsageError
from hpc_cifar.launch import script
from hpc_cifar.plan import make_plan, requested_placement


def refused(**fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        Cluster.model_validate({"name": "x", **fields})
    return str(caught.value)


@pytest.mark.parametrize("option", sorted(RESERVED))
def test_no_beginning_of_a_reserved_option_is_taken(option: str) -> None:
    for length in range(2, len(option) + 1):
        name = option[:length].rstrip("-")
        assert "should not set" in refused(sbatch_extra={name: 1}), name
        assert "should not set" in refused(sbatch_extra={name.replace("-", "_"): 1}), name


@pytest.mark.parametrize(("name", "meant"), [("outpu", "output"), ("wra", "wrap"), ("dep", "dependency"), ("tim", "time")])
def test_the_option_that_is_meant_is_named(name: str, meant: str) -> None:
    assert f"should not set {name}, which sbatch may take for {meant}" in refused(sbatch_extra={name: "x"})


PAIRS = [
    ({"memory_gib_per_node": 8}, "mem-per-gpu"), ({"memory_gib_per_node": 8}, "mem_per_cpu"),
    ({"memory_gib_per_node": 8}, "mem-per-g"), ({"partition": "a"}, "partition"), ({"partition": "a"}, "parti"),
    ({"account": "a"}, "account"), ({"qos": "a"}, "qos"), ({"constraint": "a"}, "constraint"), ({"exclude": "n1"}, "exclude"),
    ({"nodelist": "n1"}, "nodelist"), ({"nodelist": "n1"}, "nodefile"), ({"exclusive": True}, "exclusive"),
    ({"exclusive": True}, "oversubscribe"), ({"exclusive": True}, "share"), ({"exclusive": True}, "oversub"),
    ({"container": {"runtime": "pyxis", "image": "a.sqsh"}}, "container-image"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "option"), PAIRS)
def test_each_pair_that_contradicts_is_refused_and_each_half_alone_is_right(field: dict[str, Any], option: str) -> None:
    said = refused(**field, sbatch_extra={option: "x"})
    assert f"sbatch_extra: {option}" in said and f"contradicts {next(iter(field))}: keep one of them" in said
    Cluster.model_validate({"name": "x", **field})
    Cluster.model_validate({"name": "x", "sbatch_extra": {option: "x"}})


@pytest.mark.parametrize("value", ["gres/gpu=1", "gres/gpu:a100=2", "cpu=3", "mem=4G"])
def test_trackable_resources_that_the_job_has_already_are_refused_and_others_are_not(value: str) -> None:
    for name in ("tres-per-node", "tres_per_task", "tres-per-t"):
        assert "should not set" in refused(sbatch_extra={name: value})
    Cluster.model_validate({"name": "x", "sbatch_extra": {"tres-per-node": "license/matlab"}})


def test_what_contradicts_nothing_stays_allowed() -> None:
    extra = {"reservation": "week", "hold": True, "nice": 100, "comment": "x", "mail-type": "END", "gres-flags": "x"}
    extra |= {"switches": 1, "tmp": "9G", "licenses": "a", "mem-bind": "local", "export-file": "x", "threads-per-core": 1}
    Cluster.model_validate({"name": "x", "sbatch_extra": extra})


def test_a_profile_says_it_by_its_file_and_an_option_of_the_command_line_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("memory_gib_per_node: 32\nsbatch_extra: {mem-per-gpu: 8G}\n")
    with pytest.raises(UsageError, match=r"site\.yaml.*mem-per-gpu contradicts memory_gib_per_node"):
        load_cluster(path)
    profile = Cluster.model_validate({"name": "x", "sbatch_extra": {"partition": "long"}})
    with pytest.raises(UsageError) as caught:
        with_overrides(profile, partition="short")
    assert str(caught.value) == "sbatch_extra: partition contradicts partition: keep one of them"


def test_the_memory_of_a_job_file_contradicts_too(tmp_path: Path) -> None:
    fields = {"name": "x", "epochs": 1, "model": {"family": "sequential", "layers": ["flatten", {"dense": {"units": 10}}]}}
    fields |= {"data": {"batch_size": 8}, "optimizer": {"name": "sgd", "lr": 0.1}, "resources": {"memory_gib_per_node": 8}}
    experiment = Experiment.model_validate(fields)
    profile = Cluster.model_validate({"name": "site", "sbatch_extra": {"mem-per-cpu": "2G"}})
    plan = make_plan(experiment, requested_placement(experiment.resources), 1000)
    with pytest.raises(UsageError, match="profile site: sbatch_extra: mem-per-cpu contradicts memory_gib_per_node"):
        script.executor(experiment, profile, plan, tmp_path)


def test_a_local_profile_takes_no_interpreter() -> None:
    assert "python: needs executor: slurm" in refused(executor="local", python="/usr/bin/python3")
