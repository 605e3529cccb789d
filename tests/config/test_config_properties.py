"""No input ends in a traceback: only ConfigError or UsageError, every line printable."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hpc_cifar import runs
from hpc_cifar.config import source
from hpc_cifar.config.cluster import LOCAL, Cluster, find_cluster, with_overrides
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.config.layers import LAYER_NAMES
from hpc_cifar.config.load import load_cluster, load_experiment
from hpc_cifar.config.packaged import find_job, job_files
from hpc_cifar.errors import ConfigError, UsageError

RELAXED = settings(
    max_examples=int(os.environ.get("HPC_CIFAR_EXAMPLES", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
DEEP300 = next(path for path in job_files() if path.stem == "deep300").read_text(encoding="utf-8")

KEYS = sorted(
    {*Experiment.model_fields, *Cluster.model_fields, *LAYER_NAMES}
    | {"lr", "layers", "family", "filters", "units", "batch_size", "validation", "type", "time", "<<", "", "a b", "x\x1b", "é"}
)
WORDS = st.text(max_size=20) | st.sampled_from([*KEYS, "sgd", "5e-4", "0123", "~"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | WORDS
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=25,
)


def must_not_crash(path: Path, sets: Sequence[str] = ()) -> Experiment | None:
    for load in (load_cluster, load_experiment):
        try:
            result = load(path, sets)
        except ConfigError as error:
            assert error.problems
            assert all(line.isprintable() and len(line) < 1200 for line in error.problems), error.problems
            result = None
    assert result is None or isinstance(result, Experiment)
    return result


@pytest.fixture(params=["libyaml", "pure"])
def job(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file to write to, read with either of PyYAML's parsers."""
    if request.param == "pure":
        monkeypatch.setattr(source, "_PARSER", yaml.SafeLoader)
    return tmp_path / "x.yaml"


@RELAXED
@given(data=st.binary(max_size=300))
@example(data=b"\xef\xbb\xbfname: x")
@example(data=b'"\\x00\\x1b\\u2028\\ud800"')
@example(data=b"%YAML 9.9\n---\na")
@example(data=b"&a !!map {*a : *a}")
@example(data=b"? ? ? ?")
@example(data=b"a: " + b"9" * 5000)
def test_bytes(job: Path, data: bytes) -> None:
    job.write_bytes(data)
    must_not_crash(job)


@RELAXED
@given(text=st.text(alphabet="ab: -?\n\t[]{}#&*!|>'\"%@`,0.eE~<=\\\u2028", max_size=120))
def test_yaml_like_text(job: Path, text: str) -> None:
    job.write_text(text, encoding="utf-8")
    must_not_crash(job)


@RELAXED
@given(tree=st.dictionaries(st.sampled_from(KEYS), TREES, max_size=8))
def test_structures(job: Path, tree: dict[str, Any]) -> None:
    job.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    must_not_crash(job)


@RELAXED
@given(data=st.data())
def test_one_value_of_a_valid_file_replaced(job: Path, data: st.DataObject) -> None:
    """Right structure around one wrong value reaches the checks behind the first ones."""
    tree = yaml.safe_load(DEEP300)
    node: Any = tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        inner = node[key]
        if isinstance(inner, dict | list) and inner and data.draw(st.booleans()):
            node = inner
            continue
        node[key] = data.draw(TREES)
        break
    job.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    experiment = must_not_crash(job)
    if experiment is not None:  # what was accepted reads back to the same experiment
        job.write_text(runs.experiment_text(experiment), encoding="utf-8")
        assert load_experiment(job) == experiment


@RELAXED
@given(cut=st.integers(0, len(DEEP300)), length=st.integers(0, 40), put=st.text(max_size=5))
def test_mutated_valid_file(job: Path, cut: int, length: int, put: str) -> None:
    text = DEEP300[:cut] + put + DEEP300[cut + length :]
    job.write_text(text, encoding="utf-8", errors="surrogatepass")
    must_not_crash(job)


@RELAXED
@given(
    changes=st.lists(
        st.text(max_size=30)
        | st.builds(
            "{}{}{}={}".format,
            st.sampled_from(["model.layers", "optimizer", "data.augment", "claim", "name", "schedule"]),
            st.sampled_from(["", ".", "[0]", ".0.conv.", ".3.", ".lr", "..", "[-1]", ".[0]"]),
            st.sampled_from(["", "filters", "0", "name"]),
            st.text(max_size=12) | st.sampled_from(["{name: adam}", "[relu]", "*a", "&a x", "!x y", "null", "1e3", "[", "? "]),
        ),
        max_size=3,
    )
)
@example(changes=["\ud800=\udcff"])
@example(changes=["a=" + "[" * 100_000])
@example(changes=[".".join("a" * 10_000) + "=1"])
def test_set_strings(job: Path, changes: list[str]) -> None:
    job.write_text(DEEP300, encoding="utf-8")
    must_not_crash(job, changes)


@RELAXED
@given(name=st.text(max_size=40))
@example(name="a" * 5000)
@example(name="/" * 300 + "a")
@example(name="..")
@example(name="~/x")
def test_names_of_jobs_and_clusters(name: str) -> None:
    for find in (find_job, lambda name: find_cluster(name, have_sbatch=False)):
        try:
            find(name)
        except UsageError as error:
            assert all(line.isprintable() for line in str(error).splitlines())


@RELAXED
@given(field=st.sampled_from(["partition", "account", "qos", "constraint", "exclude"]), value=st.text(max_size=30))
@example(field="partition", value="gpu\n#SBATCH --wrap=x")
@example(field="constraint", value="a&b\u2028")
def test_nothing_escapes_its_sbatch_line(field: str, value: str) -> None:
    try:
        cluster = with_overrides(LOCAL, **{field: value})
    except UsageError as error:
        assert str(error).startswith(f"--{field}: ")
        assert str(error).isprintable()
        return
    assert getattr(cluster, field) == value
    assert value.isascii()
    assert not set(value) & set(" \t\r\n\"'\\#;$`<>")
