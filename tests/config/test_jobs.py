"""The job files of the published systems: every number that the sources state or that follows from it, and honest headers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from hpc_cifar.config.experiment import Experiment
from hpc_cifar.config.load import load_experiment
from hpc_cifar.config.model import SequentialModel
from hpc_cifar.config.packaged import job_files
from hpc_cifar.config.shapes import LayerShape, layer_shapes, parameter_count
from hpc_cifar.runs import experiment_text

# no source claims anything for these
OURS = {
    "quickstart", "quickstart-digits", "effnet-lite0", "resnet50-224", "inceptionv3-299", "resnet50-frozen-expected",
    "resnet18", "speed94", "speed96", "speed-cpu", "deep300-large-batch", "deep300-tuned",
}  # fmt: skip
TRANSFER = ["vgg16-frozen", "vgg16-finetuned", "vgg16-last4", "resnet50-frozen", "inceptionv3-75"]
SOURCES = {
    "000": ["three-conv-maxnorm"],
    "001": ["whitened-aptx"],
    "002": ["ann-1", "ann-3", "cnn-1", "cnn-3", "cnn-5-dropout", "deep300"],
    "003": [*(f"mfm-{number:02}" for number in range(1, 12)), *TRANSFER],
    "004": ["cnn-l2-plateau"],
}
STATED = {"ann-1": 30_730, "cnn-1": 513_410, "cnn-3": 356_790, "deep300": 551_722}
JOBS = {path.stem: path for path in job_files()}
CLAIMED = [name for names in SOURCES.values() for name in names]


def experiment(name: str) -> Experiment:
    return load_experiment(JOBS[name])


def shapes(name: str) -> list[LayerShape]:
    model = experiment(name).model
    assert isinstance(model, SequentialModel)
    return layer_shapes(model, classes=10)


def header(path: Path) -> str:
    """The comment at the top, without its line ends."""
    lines = path.read_text(encoding="utf-8").partition("\nname:")[0].splitlines()
    return " ".join(line.lstrip("# ") for line in lines)


@pytest.mark.parametrize("name", CLAIMED)
def test_every_published_system_is_a_job_with_its_claim(name: str) -> None:
    made = experiment(name)
    assert made.name == name and made.claim is not None and made.claim.inferred
    (source,) = (source for source, names in SOURCES.items() if name in names)
    assert made.claim.source.startswith(f"{source}: ")


@pytest.mark.parametrize("name", JOBS)
def test_what_a_run_keeps_of_a_job_reads_back_to_it(name: str) -> None:
    made = experiment(name)
    assert Experiment.model_validate(yaml.safe_load(experiment_text(made))) == made


def test_no_job_is_forgotten_here() -> None:
    assert set(JOBS) == {*CLAIMED, *OURS}


@pytest.mark.parametrize("name", sorted(JOBS))
def test_headers_say_purpose_cost_and_command(name: str) -> None:
    text = header(JOBS[name])
    for word in (f"{name}: ", "Shows: ", "Cost: ", "Command: "):
        assert word in text
    assert "@" not in text
    assert f"jobs/{name}.yaml" in text or "make run" in text
    if isinstance(experiment(name).model, SequentialModel):  # those of a backbone are counted in tests/models
        counts = [int(found.replace(",", "")) for found in re.findall(r"(\d[\d,]{3,})(?: trainable)? parameters", text)]
        assert counts in ([], [parameter_count(shapes(name))]) if name in OURS else counts == [parameter_count(shapes(name))]


@pytest.mark.parametrize(("name", "count"), STATED.items())
def test_parameters_that_the_sources_state(name: str, count: int) -> None:
    assert parameter_count(shapes(name)) == count


def test_about_800_thousand_parameters() -> None:
    assert round(parameter_count(shapes("cnn-5-dropout")), -5) == 800_000


def test_every_line_of_the_table_of_whitened_aptx() -> None:
    """Keras counts the running statistics of BatchNorm, too."""
    rows = [row for row in shapes("whitened-aptx") if row.parameters]
    table = [
        ("conv", (24, 31, 31), 312), ("conv", (128, 31, 31), 27_648), ("batch_norm", (128, 15, 15), 512),
        ("conv", (128, 15, 15), 147_456), ("batch_norm", (128, 15, 15), 512), ("conv", (256, 15, 15), 294_912),
        ("batch_norm", (256, 7, 7), 1_024), ("conv", (256, 7, 7), 589_824), ("batch_norm", (256, 7, 7), 1_024),
        ("conv", (512, 7, 7), 1_179_648), ("batch_norm", (512, 3, 3), 2_048), ("conv", (512, 3, 3), 2_359_296),
        ("batch_norm", (512, 3, 3), 2_048), ("dense", (10,), 5_130),
    ]  # fmt: skip
    assert [(row.type, row.out_shape, row.parameters + row.buffers) for row in rows] == table


def test_the_best_of_source_003_has_23_layers() -> None:
    made = experiment("mfm-10").model
    assert isinstance(made, SequentialModel)
    types = [layer.type for layer in made.layers if layer.type != "relu"]
    assert len(types) == 23 and types[:4] == ["conv", "conv", "batch_norm", "max_pool"]
    assert types.count("dense") == 2 and types.count("global_avg_pool") == 1


def changes(one: str, other: str) -> set[str]:
    """Fields in which two jobs differ, apart from what they are called and claim."""
    before, after = (experiment(name).model_dump(exclude={"name", "claim"}) for name in (one, other))

    def differing(a: object, b: object, path: str) -> set[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            keys = {*a, *b}
            return set().union(*(differing(a.get(key), b.get(key), f"{path}.{key}".strip(".")) for key in keys))
        return set() if a == b else {path}

    return differing(before, after, "")


def test_each_step_of_source_003_changes_what_it_says() -> None:
    steps = {
        2: {"model.layers"},
        3: {"model.layers"},
        4: {"model.layers"},
        5: {"optimizer.name", "optimizer.lr"},
        6: {"training.early_stopping", "checkpoint.select", "checkpoint.monitor", "data.validation"},
        7: {"model.layers"},
        8: {"data.batch_size"},
        9: {"data.augment.rotation_degrees", "data.augment.shift_fraction"},
        10: {"optimizer.lr"},
        11: {"model.layers"},
    }
    for number, expected in steps.items():
        found = changes(f"mfm-{number - 1:02}", f"mfm-{number:02}")
        own = {"momentum", "nesterov", "beta1", "beta2", "eps"}
        assert {path for path in found if path.removeprefix("optimizer.") not in own} == expected, number


def test_jobs_that_validate_on_the_test_set_say_so() -> None:
    for name, path in JOBS.items():
        made = experiment(name)
        if made.data.validation == "test":
            assert "validation: test" in header(path), name


@pytest.mark.parametrize("name", sorted(JOBS))
def test_what_headers_and_claims_suggest_is_valid(name: str) -> None:
    text = JOBS[name].read_text(encoding="utf-8").replace("\n#", "").replace("\n      ", " ")
    for line in re.findall(r"(?:--set (?:'[^']+'|[^\s)']+)\s*)+", text):
        changes = [quoted or plain for quoted, plain in re.findall(r"--set (?:'([^']+)'|([^\s)']+))", line)]
        for change in [[one] for one in changes] if name == "whitened-aptx" else [changes]:
            load_experiment(JOBS[name], change)
