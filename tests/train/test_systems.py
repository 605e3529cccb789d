"""Every job file of the package trains on real images, resumes once, and is evaluated."""

from __future__ import annotations

import math
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
import ranks
from rich.console import Console

from hpc_cifar import files
from hpc_cifar.config.claim import bounds
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.config.load import load_experiment
from hpc_cifar.config.packaged import job_files
from hpc_cifar.data.prepare import prepare
from hpc_cifar.train import evaluation, trained

pytestmark = pytest.mark.slow
JOBS = [path for path in job_files() if path.stem != "quickstart-digits"]  # its images are no photographs


@pytest.fixture(scope="module")
def real_images(lossless_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 training and 100 test images of CIFAR-10."""
    root, few = tmp_path_factory.mktemp("subset"), tmp_path_factory.mktemp("few")
    with tarfile.open(lossless_archive) as archive:
        for member in archive:
            name = Path(member.name).name
            if name.startswith(("data_batch_", "test_batch")) and (stream := archive.extractfile(member)):
                batch = pickle.load(stream, encoding="bytes")
                some = {b"data": batch[b"data"][:100], b"labels": batch[b"labels"][:100]}
                (few / name).write_bytes(pickle.dumps(some, protocol=2))
    prepare("cifar10", archive=few, root=root, console=Console(quiet=True))
    return root


def short(path: Path) -> Experiment:
    """Three steps of the job; its network, optimizer, schedule, augmentation and evaluation as they are."""
    values: dict[str, Any] = load_experiment(path).model_dump()
    values["epochs"] = 1
    values["data"] |= {"train_images": 48, "batch_size": 16, "workers": 0}
    values["tracking"]["wandb"] = "disabled"
    values["training"]["log_every_steps"] = 1
    values["resources"] = {"nodes": 1, "processes_per_node": 1}
    values["schedule"] = {"warmup_epochs": 0.0} | values["schedule"] | _epochs_that_fit(values["schedule"])
    values["schedule"] = {key: value for key, value in values["schedule"].items() if key in _fields(values["schedule"]["name"])}
    if "family" in values["model"] and values["model"]["family"] != "sequential":
        values["model"]["weights"] = None  # torchvision's cannot be downloaded here
        values["model"]["batch_norm"] = "auto"
        if values["model"]["resize"]:
            values["model"]["resize"] = min(values["model"]["resize"], 75 if "inception" in values["model"]["name"] else 48)
    return Experiment.model_validate(values)


def _fields(name: str) -> set[str]:
    from typing import get_args

    from hpc_cifar.config.optimization import ScheduleConfig

    kinds = get_args(get_args(ScheduleConfig)[0])
    (kind,) = [one for one in kinds if get_args(one.model_fields["name"].annotation) == (name,)]
    return set(kind.model_fields)


def _epochs_that_fit(schedule: dict[str, Any]) -> dict[str, Any]:
    if schedule["name"] == "staged":
        return {"stages": [{"epoch": 1, "lr": schedule["stages"][0]["lr"]}]}
    return {"warmup_epochs": min(schedule.get("warmup_epochs", 0.0), 0.5)}


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_trains_resumes_and_is_evaluated(path: Path, real_images: Path, tmp_path: Path) -> None:
    run = ranks.new_run(tmp_path, short(path))
    stopped = ranks.complete(run, real_images, 1, max_steps=2)
    assert (stopped["state"], stopped["steps"]) == ("stopped", 2) and 0 <= stopped["val_accuracy"] <= 1
    result = ranks.complete(run, real_images, 1)
    assert (result["state"], result["steps"], result["restarts"]) == ("finished", 3, 1), result
    assert 0 <= result["test_accuracy"] <= 1 and result["test_loss"] > 0
    assert sorted(ranks.losses(run)) == [1, 2, 3]
    assert "resuming at step 2 of 3" in ranks.logs(run)
    found, _ = evaluation.evaluate(trained.load(run, real_images), "test", tta=False, pictures=False, maps_of=None)
    assert found["accuracy"] == pytest.approx(result["test_accuracy"], abs=1e-9) and found["images"] == 100


def test_a_published_system_in_full(cifar_data: Path, tmp_path: Path) -> None:
    """What its source claims of ten epochs on 50,000 images, and no test set that is easier than it should be."""
    [path] = [path for path in JOBS if path.stem == "ann-1"]
    experiment = load_experiment(path)
    run = ranks.new_run(tmp_path, experiment)
    result = ranks.complete(run, cifar_data, 1)
    last = [row for row in files.read_json_lines(run.metrics_file) if row["kind"] == "epoch"][-1]
    assert experiment.claim is not None and experiment.claim.train_accuracy is not None
    assert (result["state"], result["epochs"], result["steps"]) == ("finished", 10, 10 * math.ceil(50_000 / 32))
    low, high = bounds(experiment.claim.train_accuracy)
    assert low is not None and high is not None  # "about 37 %"
    assert low - 0.035 <= last["train_accuracy"] <= high + 0.035
    assert 0.30 < last["val_accuracy"] == result["test_accuracy"] < last["train_accuracy"] + 0.01
