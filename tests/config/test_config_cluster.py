"""Cluster profiles: where they are found, what they refuse, and what the command line overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hpc_cifar.config.cluster import LOCAL, SLURM, Cluster, find_cluster, known_clusters, overshadowed, with_overrides
from hpc_cifar.config.load import load_cluster
from hpc_cifar.config.packaged import cluster_files
from hpc_cifar.errors import ConfigError, UsageError


@pytest.fixture(autouse=True)
def empty_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder and a home without profiles."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("HPC_CIFAR_CLUSTER", raising=False)
    return tmp_path


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_packaged_profiles_are_right_and_named_like_their_files() -> None:
    assert {path.stem for path in cluster_files()} >= {"apptainer", "cpu", "gpu8", "preemptible", "pyxis"}
    for path in cluster_files():
        assert load_cluster(path).name == path.stem
        assert load_cluster(path).description


def test_default_depends_on_sbatch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_cluster(have_sbatch=True) is SLURM
    assert find_cluster(have_sbatch=False) is LOCAL
    monkeypatch.setenv("HPC_CIFAR_CLUSTER", "gpu8")
    assert find_cluster(have_sbatch=False).gpus_per_node_available == 8
    assert find_cluster("cpu", have_sbatch=False).gpu_request == "none"


def test_nearer_profiles_win(empty_site: Path) -> None:
    assert find_cluster("gpu8", have_sbatch=True).description == "nodes with eight GPUs"
    for folder, description in [
        ("home/.config/hpc-cifar/clusters", "mine"),
        ("slurm/profiles", "the project's"),
        ("slurm", "the nearest"),
    ]:
        put(empty_site / folder / "gpu8.yaml", f"description: {description}\n")
        assert find_cluster("gpu8", have_sbatch=True).description == description
        assert find_cluster("gpu8", have_sbatch=True).name == "gpu8"


@pytest.mark.parametrize("name", ["local", "slurm"])
def test_no_profile_replaces_a_built_in_one(empty_site: Path, name: str) -> None:
    for folder in ("slurm", "slurm/profiles", "home/.config/hpc-cifar/clusters"):
        put(empty_site / folder / f"{name}.yaml", "environment: {LD_PRELOAD: /tmp/evil.so}\n")
    for found in (find_cluster(name, have_sbatch=True), find_cluster(have_sbatch=name == "slurm")):
        assert found is {"local": LOCAL, "slurm": SLURM}[name]
    assert known_clusters()[name] is None
    assert overshadowed(name) == Path(f"slurm/{name}.yaml") and overshadowed("gpu8") is None
    assert find_cluster(f"slurm/{name}.yaml", have_sbatch=True).environment, "by its path it is what it says"


def test_explicit_path(empty_site: Path) -> None:
    put(empty_site / "home/site.yaml", "name: site\nexecutor: local\n")
    put(empty_site / "here.yaml", "executor: local\n")
    assert find_cluster(str(empty_site / "home/site.yaml"), have_sbatch=True).name == "site"
    assert find_cluster("here.yaml", have_sbatch=True).name == "here"
    assert find_cluster("~/site.yaml", have_sbatch=True).name == "site"
    with pytest.raises(ConfigError, match=r"^there\.yaml: no such file"):
        find_cluster("there.yaml", have_sbatch=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpu9", "--cluster: no profile named 'gpu9'; did you mean 'gpu8'?; searched slurm, slurm/profiles, "),
        ("frontier", "known profiles are apptainer, cpu, gpu8, local, preemptible, pyxis, slurm; searched"),
        ("..", "no profile named '..'"),
        ("a\x1b[31m", r"no profile named 'a\x1b[31m'"),
    ],
)
def test_unknown_profile_lists_those_there_are(name: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_cluster(name, have_sbatch=True)
    assert words in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "a/b"),
        ("partition", "gpu\n#SBATCH --wrap=x"),
        ("partition", "--wrap=x"),
        ("partition", "a b"),
        ("partition", ""),
        ("account", "x;y"),
        ("qos", "x\ty"),
        ("constraint", "a b"),
        ("constraint", "$(id)"),
        ("exclude", "n1 n2"),
        ("nodelist", "n1\x00"),
        ("gpu_type", "a100:8"),
        ("gpu_type", "a100\n"),
        ("modules", ["cuda; rm"]),
        ("modules", ["-f"]),
        ("setup", ["a\nb"]),
        ("setup", ["a\rb"]),
        ("environment", {"1X": "y"}),
        ("environment", {"X=Y": "y"}),
        ("environment", {"X": "a\nb"}),
        ("environment", {"WANDB_API_KEY": "x"}),
        ("environment", {"HF_TOKEN": "x"}),
        ("python", ""),
        ("python", "-c"),
        ("python", "a\nb"),
        ("python", "$(touch x)"),
        ("python", "a'b"),
        ("python", "~other/bin/python"),
        ("scratch", "scratch/here"),
        ("scratch", "/a\nb"),
        ("scratch", "$(id)"),
        ("preflight", 1),
        ("preflight_timeout_s", 1),
        ("max_time", 3600),
        ("max_time", "1h"),
        ("signal_delay_s", 0),
        ("signal_delay_s", True),
        ("requeue", 1),
        ("exclusive", "yes"),
        ("sbatch_extra", {"comment": "a\nb"}),
        ("sbatch_extra", {"--comment": "a"}),
        ("sbatch_extra", {"output": "x"}),
        ("sbatch_extra", {"job_name": "x"}),
        ("sbatch_extra", {"hold": False}),
        ("sbatch_extra", {"comment": [1]}),
        ("srun_args", ["cpu-bind=cores"]),
        ("srun_args", ["--x\n"]),
        ("gpus_per_node_available", -1),
        ("unknown", 1),
    ],
)
def test_refused(field: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        Cluster.model_validate({"name": "x", field: value})


def test_accepted() -> None:
    cluster = Cluster.model_validate(
        {
            "name": "x",
            "partition": "gpu,long",
            "constraint": "[a100*2&nvlink]|h100",
            "exclude": "n[1-3,7],n9",
            "modules": ["cuda/12.4", "python/3.11@gcc"],
            "setup": ["source /venv/bin/activate && export X=$HOME"],
            "environment": {"NCCL_DEBUG": "WARN", "EMPTY": ""},
            "sbatch_extra": {"reservation": "course", "hold": True, "nice": 100},
            "srun_args": ["--cpu-bind=cores", "-l"],
            "max_time": "2-00:00:00",
        }
    )
    assert cluster.sbatch_extra == {"reservation": "course", "hold": True, "nice": 100}
    assert cluster.signal_delay_s == 120
    assert cluster.requeue


def test_gpu_type_needs_a_gpu_request() -> None:
    with pytest.raises(ValidationError, match="needs gpu_request"):
        Cluster(name="x", gpu_request="none", gpu_type="a100")


def test_overrides() -> None:
    cluster = with_overrides(SLURM, partition="gpu", account=None, exclude="n[1-2]")
    assert (cluster.partition, cluster.account, cluster.exclude) == ("gpu", None, "n[1-2]")
    assert with_overrides(SLURM, partition=None) is SLURM
    with pytest.raises(UsageError, match=r"^--partition: should be a name without spaces .*, not 'a b'$"):
        with_overrides(SLURM, partition="a b")


IMAGE = {"runtime": "apptainer", "image": "/shared/x.sif"}


@pytest.mark.parametrize(
    ("container", "words"),
    [
        ({"runtime": "docker", "image": "/x"}, "'apptainer', 'singularity', 'pyxis' or 'none'"),
        ({"image": "/x"}, "Field required"),
        ({"runtime": "pyxis"}, "image is missing: runtime pyxis needs one"),
        ({"runtime": "none", "image": "/x"}, "runtime none takes no image"),
        ({**IMAGE, "image": "x.sif"}, "should be an absolute path or an address"),
        ({**IMAGE, "image": "/x/$(touch y).sif"}, "without quotes, backslash, comma or"),
        ({**IMAGE, "image": "/x/`y`.sif"}, "without quotes"),
        ({**IMAGE, "image": "/x/y\n.sif"}, "without quotes"),
        ({**IMAGE, "image": "--nv"}, "should be an absolute path"),
        ({**IMAGE, "binds": ["scratch"]}, "should be an absolute path"),
        ({**IMAGE, "binds": ["/a:/b:/c"]}, "should be SOURCE, SOURCE:TARGET or SOURCE:TARGET:ro"),
        ({**IMAGE, "binds": ["/a,/b"]}, "should be an absolute path"),
        ({**IMAGE, "binds": ["/$HOME"]}, "should be an absolute path"),
        ({**IMAGE, "args": ["exec"]}, "an option that begins with"),
        ({**IMAGE, "args": ["--env=a\nb"]}, "on one line"),
        ({**IMAGE, "args": ["--cleanenv"]}, "hides from the ranks what Slurm tells them"),
        ({**IMAGE, "args": ["-C"]}, "hides from the ranks"),
        ({**IMAGE, "runtime": "pyxis", "args": ["--nv"]}, "options of pyxis"),
        ({**IMAGE, "bind": ["/a"]}, "Extra inputs"),
    ],
)
def test_containers_refused(container: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Cluster.model_validate({"name": "x", "container": container})
    assert words in str(caught.value)


def test_containers_accepted() -> None:
    made = Cluster.model_validate(
        {"name": "x", "container": {**IMAGE, "binds": ["/a b:/c:ro", "/scratch"], "args": ["--no-home", "-W=/tmp"]}}
    )
    assert Cluster.model_validate(made.model_dump(mode="json")) == made, "as it is kept in the run directory"
    assert made.container is not None
    assert made.container.binds == ("/a b:/c:ro", "/scratch")
    registry = {"runtime": "pyxis", "image": "registry.example#nvidia/pytorch:25.01-py3", "args": ["--container-mount-home"]}
    assert Cluster.model_validate({"name": "x", "container": registry}).container is not None
    assert Cluster.model_validate({"name": "x", "executor": "local", "container": {"runtime": "none"}}).container is not None
    with pytest.raises(ValidationError, match="container: runtime apptainer needs executor: slurm, not local"):
        Cluster.model_validate({"name": "x", "executor": "local", "container": IMAGE})


@pytest.mark.parametrize(("field", "value"), [("python", "/opt/python"), ("modules", ["cuda"]), ("setup", ["true"])])
def test_what_this_machine_s_own_jobs_do_not_do_is_refused(field: str, value: object) -> None:
    assert Cluster.model_validate({"name": "x", field: value}).executor == "slurm"
    with pytest.raises(
        ValidationError, match=f"{field}: needs executor: slurm, not local, which runs jobs as hpc-cifar itself"
    ):
        Cluster.model_validate({"name": "x", "executor": "local", field: value})


def test_a_container_s_problem_has_a_line(empty_site: Path) -> None:
    put(empty_site / "here.yaml", "executor: slurm\ncontainer:\n  runtime: apptainer\n  imgae: /x.sif\n")
    with pytest.raises(ConfigError) as caught:
        load_cluster(Path("here.yaml"))
    assert "here.yaml:4: container.imgae: unknown key; did you mean 'image'?" in str(caught.value)
