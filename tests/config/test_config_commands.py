"""validate, schema and jobs; the JSON Schema; packaged files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpc_cifar.cli import configure
from hpc_cifar.config import packaged
from hpc_cifar.config.cluster import known_clusters
from hpc_cifar.config.layers import LAYER_NAMES
from hpc_cifar.config.load import load_cluster, load_experiment
from hpc_cifar.config.packaged import find_job, headline, job_files, job_folder
from hpc_cifar.config.schema import experiment_schema, schema_text
from hpc_cifar.errors import ConfigError, UsageError

DEEP300 = find_job("deep300").resolve()


def test_validate_says_what_a_job_is(capsys: pytest.CaptureFixture[str]) -> None:
    configure.validate([str(DEEP300)])
    assert capsys.readouterr().out == (
        f"ok  {DEEP300}  deep300: 551,722 parameters, 76 steps an epoch, 22,800 steps in 300 epochs, "
        "8 processes on GPUs, at most 8 GPU-hours\n"
    )


def test_validate_reports_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(DEEP300.read_text().replace("epochs: 300", "epochs: 0", 1))
    small = tmp_path / "small.yaml"
    small.write_text(DEEP300.read_text().replace("batch_size: 664", "batch_size: 4"))
    with pytest.raises(ConfigError) as caught:
        configure.validate([str(bad), str(DEEP300), str(small), str(tmp_path / "none.yaml")])
    first, second, third = caught.value.problems
    assert re.fullmatch(r".*/bad\.yaml:\d+: epochs: should be at least 1, not 0", first)
    assert re.fullmatch(r".*/small\.yaml:\d+: data\.batch_size: 4 images for 8 processes .*", second)
    assert third.startswith(f"{tmp_path}/none.yaml: no such job file; packaged jobs are ")
    assert capsys.readouterr().out.startswith(f"ok  {DEEP300}")


def test_validate_takes_names_sets_and_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    configure.validate(["deep300", "jobs/deep300.yaml"], ["epochs=2", "data.dataset=mine"])
    assert capsys.readouterr().out.count("2 epochs (steps depend on the prepared dataset mine)") == 2
    Path("site.yaml").write_text("executor: local\n")
    configure.validate(["site.yaml"])
    assert "cluster profile site: local" in capsys.readouterr().out


def test_every_packaged_job_is_valid_and_says_what_it_shows() -> None:
    assert job_files()
    for path in job_files():
        configure.validate([str(path)])
        assert headline(path).startswith(f"{path.stem}: ")


def test_validate_is_fast_and_imports_no_torch() -> None:
    code = (
        "import sys, time; from hpc_cifar.cli import configure; from hpc_cifar.config import load\n"
        f"path = {str(DEEP300)!r}; configure.validate([path]); taken = []\n"
        "for _ in range(10):\n"
        "    start = time.process_time(); configure.validate([path]); taken.append(time.process_time() - start)\n"
        "print(min(taken), sorted({'torch', 'numpy', 'submitit', 'wandb', 'rich'} & set(sys.modules)))"
    )
    start = os.times()  # processor time, since other work on the machine must not fail this test
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd()).stdout
    end = os.times()
    assert end.children_user + end.children_system - start.children_user - start.children_system < 5
    seconds, modules = output.splitlines()[-1].split(" ", 1)
    assert modules == "[]"
    assert float(seconds) < 0.1


def test_find_job_prefers_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_job("deep300").resolve() == DEEP300
    assert find_job("jobs/deep300.yaml").resolve() == DEEP300
    Path("jobs").mkdir()
    Path("jobs/deep300.yaml").write_text("x: 1\n")
    assert find_job("deep300") == Path("jobs/deep300.yaml")
    with pytest.raises(UsageError, match=r"elsewhere/deep300\.yaml: no such job file; "):
        find_job("elsewhere/deep300.yaml")
    with pytest.raises(UsageError, match="deep30: no such job file; did you mean 'deep300'"):
        find_job("deep30")
    with pytest.raises(UsageError, match="jobs: a directory; name its files"):
        find_job("jobs")


def test_jobs_lists_and_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure.jobs()
    assert re.search(r"^  deep300 +the deep CNN of source 002", capsys.readouterr().out, re.MULTILINE)
    into = tmp_path / "mine" / "jobs"
    configure.jobs(["deep300"], into=into)
    assert (into / "deep300.yaml").read_text() == DEEP300.read_text()
    assert json.loads((into / "experiment.schema.json").read_text()) == experiment_schema()
    (into / "deep300.yaml").write_text("changed")
    with pytest.raises(UsageError, match=r"deep300\.yaml: exists already; use --force"):
        configure.jobs(copy=True, into=into)
    assert (into / "deep300.yaml").read_text() == "changed"
    configure.jobs(["deep300.yaml"], into=into, force=True)
    assert (into / "deep300.yaml").read_text() == DEEP300.read_text()
    with pytest.raises(UsageError, match="'deep30': no such packaged file; did you mean 'deep300'"):
        configure.jobs(["deep30"], into=into)
    with pytest.raises(UsageError, match="cannot be written"):
        configure.jobs(["deep300"], into=into / "deep300.yaml" / "x")


def test_jobs_copies_a_profile_where_it_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    configure.jobs(["cpu", "quickstart"])
    assert sorted(str(path) for path in Path().rglob("*.yaml")) == ["jobs/quickstart.yaml", "slurm/cpu.yaml"]
    assert known_clusters()["cpu"] == Path("slurm/cpu.yaml")


def test_the_two_kinds_of_files_are_told_apart(tmp_path: Path) -> None:
    profile = tmp_path / "site.yaml"
    profile.write_text("executor: slurm\npartition: gpu\n")
    with pytest.raises(ConfigError, match=r"site\.yaml: holds one cluster profile, not one experiment; name it with --cluster"):
        load_experiment(profile)
    with pytest.raises(ConfigError, match=r"deep300\.yaml: holds one experiment, not one cluster profile"):
        load_cluster(DEEP300)


def test_schema_file_is_up_to_date(tmp_path: Path) -> None:
    configure.schema(tmp_path / "s.json")
    assert (tmp_path / "s.json").read_text() == schema_text()
    committed = job_folder() / "experiment.schema.json"
    assert json.loads(committed.read_text()) == experiment_schema(), "run: hpc-cifar schema --out jobs/experiment.schema.json"
    with pytest.raises(UsageError, match="cannot be written"):
        configure.schema(tmp_path / "no" / "s.json")


# ---- a small validator for the keywords that the schema uses, so that no test dependency is needed ---------------------------

ANNOTATIONS = {"$schema", "$defs", "title", "description", "default"}


def violations(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> int:
    """How many keywords of ``schema`` the value violates; a keyword this does not know is an error of the test."""
    number = 0
    for keyword, argument in schema.items():
        match keyword:
            case "$ref":
                number += violations(value, root["$defs"][argument.removeprefix("#/$defs/")], root)
            case "anyOf":
                number += all(violations(value, option, root) for option in argument)
            case "oneOf":
                number += [violations(value, option, root) for option in argument].count(0) != 1
            case "type":
                types = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
                if argument in ("number", "integer"):
                    is_number = isinstance(value, int | float) and not isinstance(value, bool)
                    number += not is_number or (argument == "integer" and value != int(value))
                else:
                    number += not isinstance(value, types[argument])
            case "const":
                number += value != argument
            case "enum":
                number += value not in argument
            case "pattern":
                number += isinstance(value, str) and not re.search(argument, value)
            case "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum":
                if isinstance(value, int | float):
                    lower, strict = "inimum" in keyword, keyword.startswith("exclusive")
                    wrong = value < argument if lower else value > argument
                    number += wrong or (strict and value == argument)
            case "minLength" | "maxLength" | "minItems" | "maxItems" | "minProperties" | "maxProperties":
                if isinstance(value, str | list | dict):
                    number += len(value) < argument if keyword.startswith("min") else len(value) > argument
            case "items":
                number += sum(violations(item, argument, root) for item in value) if isinstance(value, list) else 0
            case "required":
                number += isinstance(value, dict) and not set(argument) <= set(value)
            case "properties":
                if isinstance(value, dict):
                    number += sum(violations(value[key], inner, root) for key, inner in argument.items() if key in value)
            case "additionalProperties":
                assert argument is False
                number += isinstance(value, dict) and not set(value) <= set(schema.get("properties", {}))
            case _:
                assert keyword in ANNOTATIONS, keyword
    return number


def test_schema_accepts_every_packaged_job() -> None:
    schema = experiment_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for path in job_files():
        assert violations(yaml.safe_load(path.read_text()), schema, schema) == 0, path


@pytest.mark.parametrize(
    ("path", "value", "right"),
    [
        ("epochs", 0, False),
        ("epochs", "1e2", True),
        ("epochs", "ten", False),
        ("epoch", 3, False),
        ("name", "a/b", False),
        ("optimizer.lr", "5e-4", True),
        ("optimizer.lr", "0.1", False),
        ("optimizer.name", "sdg", False),
        ("model.layers.0", "relu", True),
        ("model.layers.0", {"relu": None}, True),
        ("model.layers.0", {"conv": {"filters": 3}}, True),
        ("model.layers.0", {"type": "conv", "filters": 3}, True),
        ("model.layers.0", "conv", False),
        ("model.layers.0", {"conv": {"filter": 3}}, False),
        ("model.layers.0", {"conv": {"filters": 3}, "relu": {}}, False),
        ("resources.time", 36000, False),
        ("resources.time", "1-00:00:00", True),
        ("data.dataset", "../x", False),
    ],
)
def test_schema_agrees_with_the_loader(path: str, value: Any, right: bool) -> None:
    schema = experiment_schema()
    tree = yaml.safe_load(DEEP300.read_text())
    node = tree
    *above, last = (int(step) if step.isdigit() else step for step in path.split("."))
    for step in above:
        node = node[step]
    node[last] = value
    assert (violations(tree, schema, schema) == 0) is right


def test_schema_knows_every_layer() -> None:
    short = experiment_schema()["$defs"]["Layer"]["anyOf"][1]["properties"]
    assert tuple(short) == LAYER_NAMES
    assert all("description" in layer for layer in short.values())


def test_files_inside_a_wheel_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel has them in hpc_cifar/_files, where no checkout lies beside the package."""
    for folder, name in [("jobs", "one.yaml"), ("clusters", "site.yaml")]:
        (tmp_path / "hpc_cifar/_files" / folder).mkdir(parents=True)
        (tmp_path / "hpc_cifar/_files" / folder / name).write_text("name: x\n")
    monkeypatch.setattr(packaged, "_PACKAGE", tmp_path / "hpc_cifar")
    assert [path.name for path in packaged.job_files()] == ["one.yaml"]
    assert [path.name for path in packaged.cluster_files()] == ["site.yaml"]
    assert packaged.find_job("one") == tmp_path / "hpc_cifar/_files/jobs/one.yaml"
