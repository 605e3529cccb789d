"""Every kind of wrong job file: the exact line and words a user sees."""

# One case a line reads better than a wrapped one:
# ruff: noqa: E501

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from hpc_cifar import runs
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.config.load import load_cluster, load_experiment
from hpc_cifar.errors import ConfigError

GOOD = """\
name: tiny
seed: 1
epochs: 2
model:
  family: sequential
  layers:
    - conv: {filters: 4}
    - relu
    - flatten
    - dense: {units: 10}
data: {batch_size: 32}
optimizer: {name: sgd, lr: 5e-4}
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def problems(folder: Path, text: str | bytes, sets: Sequence[str] = ()) -> list[str]:
    """The problems of a file, with the folder left out."""
    with pytest.raises(ConfigError) as caught:
        load_experiment(write(folder, text), sets)
    assert caught.value.exit_code == 2
    assert all(line.isprintable() for line in caught.value.problems)
    return [line.replace(f"{folder}/", "") for line in caught.value.problems]


def test_the_good_file_is_good(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path, GOOD))
    assert experiment.optimizer.lr == 5e-4
    assert experiment.model.layers[1].type == "relu"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("epochs: 2", "epochs: 0", "x.yaml:3: epochs: should be at least 1, not 0"),
        ("epochs: 2", "epochs: true", "x.yaml:3: epochs: should be a number, not true or false"),
        ("epochs: 2", "epochs: 2.5", "x.yaml:3: epochs: should be a whole number, not 2.5"),
        ("epochs: 2", "epochs: two", "x.yaml:3: epochs: should be a number, not the text 'two'"),
        ("epochs: 2", "epochs:", "x.yaml:3: epochs: should be a whole number, not nothing"),
        ("epochs: 2", "epochs: .nan", "x.yaml:3: epochs: should be a finite number, not .nan"),
        ("epochs: 2", "epochs: [1]", "x.yaml:3: epochs: should be a whole number, not a list"),
        ("epochs: 2", "epochs: 0123", "x.yaml:3: epochs: should be a number, not the text '0123'; write 123 without the leading zero"),
        ("epochs: 2", "epochs: 1_000", "x.yaml:3: epochs: should be a number, not the text '1_000'; write 1000"),
        ("epochs: 2", "epochs: 99999999", "x.yaml:3: epochs: should be at most 1000000, not 99999999"),
        ("epochs: 2", "epoch: 2\nepochs: 3", "x.yaml:3: epoch: unknown key; did you mean 'epochs'?"),
        ("epochs: 2", "epochs: 2\nlr: 3", "x.yaml:4: lr: unknown key; it belongs in optimizer: optimizer.lr"),
        ("epochs: 2", "epochs: 2\nepochs: 3", "x.yaml:4: epochs: is given twice, first on line 3; keep one of them"),
        ("epochs: 2\n", "", "x.yaml:1: epochs: is missing; add a whole number of at least 1, such as epochs: 10"),
        ("lr: 5e-4", "lr: .inf", "x.yaml:12: optimizer.lr: should be a finite number, not .inf"),
        ("lr: 5e-4", "lr: 1e999", "x.yaml:12: optimizer.lr: should be a finite number, not 1e999"),
        ("lr: 5e-4", "lr: -5e-4", "x.yaml:12: optimizer.lr: should be more than 0, not -5e-4"),
        ("epochs: 2", "epochs: 1e-2", "x.yaml:3: epochs: should be a whole number, not 0.01"),
        ("lr: 5e-4", "lr: 0", "x.yaml:12: optimizer.lr: should be more than 0, not 0"),
        ("lr: 5e-4", "learning_rate: 1, lr: 1", "x.yaml:12: optimizer.learning_rate: unknown key; did you mean 'lr'?"),
        ("lr: 5e-4", "lr: 1, nesterov: true", "x.yaml:12: optimizer: nesterov needs a momentum above 0"),
        ("name: sgd", "name: sdg", "x.yaml:12: optimizer.name: unknown optimizer 'sdg'; did you mean 'sgd'?"),
        ("name: sgd", "name: lion", "x.yaml:12: optimizer.name: unknown optimizer 'lion'; optimizers are sgd, adam, adamw"),
        ("{name: sgd, lr: 5e-4}", "sgd", "x.yaml:12: optimizer: should be a mapping such as {name: sgd}, not 'sgd'"),
        ("{name: sgd, lr: 5e-4}", "{lr: 1}", "x.yaml:12: optimizer.name: is missing; name one of sgd, adam, adamw"),
        ("seed: 1", "schedule: {name: cosin}", "x.yaml:2: schedule.name: unknown schedule 'cosin'; did you mean 'cosine'?"),
        ("- relu", "- rleu", "x.yaml:8: model.layers[1]: unknown layer 'rleu'; did you mean 'relu'?"),
        ("- relu", "- fc: {units: 3}", "x.yaml:8: model.layers[1]: unknown layer 'fc'; did you mean 'dense'?"),
        ("- relu", "- dense", "x.yaml:8: model.layers[1].dense.units: is missing; add the number of outputs, such as dense: {units: 10}"),
        ("- relu", "- conv: 3", "x.yaml:8: model.layers[1]: the options of conv should be a mapping such as conv: {...}, not 3"),
        ("- relu", "- relu: {x: 1}", "x.yaml:8: model.layers[1].relu.x: unknown key; relu has no options"),
        ("- relu", "- conv:\n      filters: 3", "x.yaml:8: model.layers[1]: a layer has one key; put the options inside it, such as conv: {...}"),
        ("filters: 4", "filters: 4, kernal: 5", "x.yaml:7: model.layers[0].conv.kernal: unknown key; did you mean 'kernel'?"),
        ("filters: 4", "filters: 4, kernel: 4", "x.yaml:7: model.layers[0]: conv with padding: same needs an odd kernel, not 4; use an odd one or padding: valid"),
        ("- flatten", "- flatten\n    - conv: {filters: 3}", "x.yaml:10: model.layers[3]: conv needs an input of channels x height x width, but gets 4,096 values; move it before flatten or the global pool"),
        ("- flatten", "- max_pool: {size: 33}", "x.yaml:9: model.layers[2]: max_pool of size 33 is larger than its input of 4x32x32; remove it or use a smaller size"),
        ("    - flatten\n", "", "x.yaml:9: model.layers[2]: dense needs a flat input, but gets 4x32x32; put flatten or global_avg_pool before it"),
        ("units: 10", "units: 11", "x.yaml:10: model.layers[3]: dense is the last layer and delivers 11 values, but there are 10 classes; end with dense: {units: 10}"),
        ("  family: sequential\n", "", "x.yaml:4: model.family: is missing; name one of sequential, torchvision, timm"),
        ("family: sequential", "family: resnet", "x.yaml:5: model.family: unknown model 'resnet'; models are sequential, torchvision, timm"),
        ("seed: 1", "training: {channels_last: maybe}", "x.yaml:2: training.channels_last: should be auto or true or false, not 'maybe'"),
        ("batch_size: 32", "batch_size: 32, validation: tset", "x.yaml:11: data.validation: should be test or a number, not the text 'tset'"),
        ("batch_size: 32", "batch_size: 32, dataset: ../x", "x.yaml:11: data.dataset: should be 1 to 32 lower-case letters, digits, '_' or '-' (a prepared dataset), not '../x'"),
        ("name: tiny", "name: a/b", "starting with a letter or digit (it names a folder and a Slurm job), not 'a/b'"),
        ("name: tiny", "name: ../../etc", "not '../../etc'"),
        ("name: tiny", 'name: "a\\nb"', r"not 'a\nb'"),
        ("name: tiny", "name: two words", "not 'two words'"),
        ("name: tiny", "name: a$(id)", "not 'a$(id)'"),
        ("name: tiny", "name: it's", "(it names a folder and a Slurm job), not"),
        ("name: tiny", "name: a`id`", "not 'a`id`'"),
        ("name: tiny", "name: größe", "not 'größe'"),
        ("seed: 1", "partition: gpu", "x.yaml:2: partition: unknown key; valid keys are"),
        ("seed: 1", "resources: {account: me}", "x.yaml:2: resources.account: unknown key; valid keys are"),
        ("name: tiny", "name: true", 'x.yaml:1: name: should be text, not true; in quotes it is text: "true"'),
        ("name: tiny", "name: 12", 'x.yaml:1: name: should be text, not 12; in quotes it is text: "12"'),
        ("name: tiny", "name: " + "a" * 90, "..."),
        ("name: tiny", 'name: "a\\e[31mb"', r"x.yaml:1: name: holds the control character '\x1b'; remove it"),
        ("name: tiny", 'name: "a\\ud800"', "x.yaml:1: column 11: not valid YAML: found invalid Unicode character escape code"),
        ("seed: 1", "resources: {time: 36000}", 'x.yaml:2: resources.time: should be quoted text such as "01:00:00" (hours:minutes:seconds), not 36000'),
        ("seed: 1", "resources: {time: '00:00:00'}", "x.yaml:2: resources.time: should be \"HH:MM:SS\" or \"D-HH:MM:SS\" and longer than zero, not '00:00:00'"),
        ("seed: 1", "tracking: {wandb: off}", "x.yaml:2: tracking.wandb: should be one of online, offline, disabled, not 'off'"),
        ("seed: 1", "claim: {source: x, test_accuracy: 75%}", "x.yaml:2: claim.test_accuracy: should be a number, not the text '75%'; write a fraction of 1"),
        ("seed: 1", "claim: {source: x, test_accuracy: {at_least: 0.5, at_most: 0.4}}", "x.yaml:2: claim.test_accuracy: at_least: 0.5 is above at_most: 0.4"),
        ("seed: 1", "claim: {source: x, test_accuracy: {}}", "x.yaml:2: claim.test_accuracy: a range needs at_least, at_most or both"),
        ("seed: 1", "claim: {source: x, test_accuracy: {at_least: 40}}", "x.yaml:2: claim.test_accuracy.at_least: should be at most 1, not 40"),
        ("seed: 1", "claim: {source: x, test_accuracy: {at_most: .nan}}", "x.yaml:2: claim.test_accuracy.at_most: should be a finite number, not .nan"),
        ("seed: 1", "claim: {source: x, test_accuracy: {at_leest: 0.4}}", "x.yaml:2: claim.test_accuracy.at_leest: unknown key; did you mean 'at_least'?"),
        ("seed: 1", "claim: {source: x, test_accuracy: [0.4, 0.5]}", "x.yaml:2: claim.test_accuracy: should be a number, not a list"),
        ("seed: 1", "claim: {source: x, test_accuracy: 3}", "x.yaml:2: claim.test_accuracy: should be at most 1, not 3"),
        ("seed: 1", "seed: !!python/object/apply:os.system [x]", "x.yaml:2: seed: the tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed; write the plain value"),
        ("seed: 1", "seed: *a", "x.yaml:2: seed: the alias *a has no anchor &a before it"),
        ("seed: 1", "claim: &a {source: *a}", "x.yaml:2: claim.source: the alias *a holds itself; write the value out"),
        ("seed: 1", "data:\n  <<: {batch_size: 3}", "the merge key << is not supported; write the keys out"),
        ("seed: 1", "? [a, b]\n: 1", "a key should be plain text, not a list or mapping; check brackets and dashes"),
        ("seed: 1", "---\nseed: 1", "x.yaml:2: a second YAML document begins here; keep one a file"),
        ("seed: 1", "\tseed: 1", "x.yaml:2: column 1: a tab; YAML is indented with spaces only"),
        ("seed: 1", "seed: 1: 2", "x.yaml:2: column 8: not valid YAML: a ':' that cannot stand here"),
        ("seed: 1", "seed: [1", "a bracket is not closed or a comma is missing (opened on line 2)"),
        ("seed: 1", 'seed: "1', "a quote is not closed (opened on line 2); add the closing quote"),
        ("seed: 1", "seed: @x", "x.yaml:2: column 7: text cannot begin with '@'; put it in quotes"),
        ("seed: 1", "seed: 1\x07", r"x.yaml:2: column 8: the character '\x07' is not allowed; remove it"),
        ("seed: 1", "claim: {source: x, inferred: " + "[" * 60 + "]" * 60 + "}", "is nested more than 40 levels deep; no job file needs that"),
        ("seed: 1", "checkpoint: {select: best}", None),
    ],
)  # fmt: skip
def test_one_problem(tmp_path: Path, old: str, new: str, expected: str | None) -> None:
    assert old in GOOD
    text = GOOD.replace(old, new, 1)
    if expected is None:
        load_experiment(write(tmp_path, text))
        return
    found = problems(tmp_path, text)
    assert any(expected in line for line in found), found
    assert all(re.match(r"x\.yaml:\d+: ", line) for line in found)
    assert len(found) <= 2, found


def test_yaml_1_1_traps_are_read_as_meant(tmp_path: Path) -> None:
    text = GOOD.replace("name: tiny", "name: no").replace("seed: 1", "resources: {time: 10:00:00}")
    experiment = load_experiment(write(tmp_path, text + "tracking: {project: 0123, group: on}\n"))
    assert experiment.name == "no"
    assert experiment.resources.time == "10:00:00"
    assert (experiment.tracking.project, experiment.tracking.group) == ("0123", "on")


def test_quoted_number_is_a_number_only_with_an_exponent(tmp_path: Path) -> None:
    assert load_experiment(write(tmp_path, GOOD.replace("5e-4", '"5e-4"'))).optimizer.lr == 5e-4
    assert problems(tmp_path, GOOD.replace("5e-4", '"0.1"')) == [
        "x.yaml:12: optimizer.lr: should be a number, not the text '0.1'"
    ]


def test_what_a_run_keeps_reads_back(tmp_path: Path) -> None:
    """experiment.yaml of a run is written by PyYAML, which leaves unquoted what YAML 1.1 reads as text."""
    traps = [
        "5e-4",
        "1e3",
        "0123",
        "1_000",
        "10:00:00",
        "-.5",
        ".5",
        "1.",
        "no",
        "on",
        "~",
        "0x10",
        "2001-01-01",
        "=",
        "<<",
        ".nan",
    ]
    path = write(tmp_path, GOOD + f"tracking: {{tags: {traps}}}\nresources: {{hang_timeout_s: null}}\n")
    experiment = load_experiment(path)
    assert experiment.tracking.tags == tuple(traps) and experiment.resources.hang_timeout_s is None
    text = runs.experiment_text(experiment)
    assert Experiment.model_validate(yaml.safe_load(text)) == experiment
    assert load_experiment(write(tmp_path, text)) == experiment


def test_all_problems_of_a_file_at_once(tmp_path: Path) -> None:
    text = (
        GOOD.replace("epochs: 2", "epochs: 0\nepochs: 3\nepoch: 3")
        .replace("- relu", "- rleu")
        .replace("name: sgd", "name: sdg")
    )
    assert problems(tmp_path, text, ["seed=-1"]) == [
        "--set: seed: should be at least 0, not -1",
        "x.yaml:3: epochs: should be at least 1, not 0",
        "x.yaml:4: epochs: is given twice, first on line 3; keep one of them",
        "x.yaml:5: epoch: unknown key; did you mean 'epochs'?",
        "x.yaml:10: model.layers[1]: unknown layer 'rleu'; did you mean 'relu'?",
        "x.yaml:14: optimizer.name: unknown optimizer 'sdg'; did you mean 'sgd'?",
    ]


def test_a_layer_that_does_not_fit_is_found_beside_other_problems(tmp_path: Path) -> None:
    found = problems(tmp_path, GOOD.replace("    - flatten\n", "").replace("epochs: 2", "epochs: 0"))
    assert [line.split(": ")[1] for line in found] == ["epochs", "model.layers[2]"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("checkpoint:\n  select: best\n", "14: checkpoint.select: best would choose weights by the test set"),
        ("training: {early_stopping: {patience: 3}}\n", "13: training.early_stopping: would choose the last epoch by the test"),
        ("schedule: {name: plateau}\n", "13: schedule.name: plateau would choose the rates by the test set"),
    ],
)
def test_nothing_is_chosen_by_the_test_set(tmp_path: Path, more: str, words: str) -> None:
    text = GOOD.replace("batch_size: 32", "batch_size: 32, validation: test") + more
    (line,) = problems(tmp_path, text)
    assert line.startswith(f"x.yaml:{words}")


def test_images_are_chosen_in_some_epochs(tmp_path: Path) -> None:
    text = GOOD + "training: {selection: {share: 0.5, from_epoch: 3, until_epoch: 2}}\n"
    (line,) = problems(tmp_path, text)
    assert "training.selection: until_epoch: should be after from_epoch, 3, not 2" in line


def test_nothing_changes_fixed_weights(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, GOOD.replace("filters: 4", "filters: 4, fixed_weights: true, max_norm: 2"))
    assert "model.layers[0].conv: fixed_weights: l2 and max_norm are for weights that are trained" in line


def test_l2_is_no_decoupled_decay(tmp_path: Path) -> None:
    text = GOOD.replace("dense: {units: 10", "dense: {l2: 0.1, units: 10").replace("name: sgd", "name: adamw")
    text = text.replace(", momentum: 0.9", "")
    (line,) = problems(tmp_path, text)
    assert "model.layers: l2 is a part of the gradient, which adamw keeps apart" in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "x.yaml: is empty; it should hold one experiment"),
        (b"\n\n", "x.yaml: is empty; it should hold one experiment"),
        (b"# only a comment\n", "x.yaml: is empty; it should hold one experiment"),
        (b"---\n", "x.yaml:2: should hold one experiment as lines of key: value, not nothing but comments"),
        (b"- a\n", "x.yaml:1: should hold one experiment as lines of key: value, not a list"),
        (b"just text\n", "x.yaml:1: should hold one experiment as lines of key: value, not 'just text'"),
        (b"name: x\nseed: \xff\xfe\n", "x.yaml:2: byte 14: 0xff is not UTF-8; save the file as UTF-8"),
        ("name: x\n".encode("utf-16"), "x.yaml:1: byte 0: 0xff is not UTF-8; save the file as UTF-8"),
        (b"a: 1\n" * 2_000_000, "x.yaml: is 10.0 MB; a job file or profile has at most 1 MB"),
        (b"[" * 900_000, "x.yaml:1: is nested more than 40 levels deep; no job file needs that"),
    ],
    ids=["empty", "blank", "comment", "dashes", "list", "text", "latin", "utf16", "10MB", "brackets"],
)
def test_files_that_are_no_experiment(tmp_path: Path, text: bytes, expected: str) -> None:
    start = time.process_time()
    (line,) = problems(tmp_path, text)
    assert time.process_time() - start < 2
    assert re.sub(r"(x\.yaml:1): [^:]*\]: ", r"\1: ", line) == expected


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, expected in [
        (tmp_path / "missing.yaml", "no such file; check the path"),
        (tmp_path, "is a directory; name a YAML file"),
        (Path("/dev/zero"), "is not a regular file; name a YAML file"),
        (Path("nul\0.yaml"), "no such file; its name holds a NUL character"),
        (tmp_path / ("x" * 300), "cannot be read: File name too long"),
        (tmp_path / "a\x1b[31m\n.yaml", "no such file; check the path"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load_experiment(path)
        (line,) = caught.value.problems
        assert line.endswith(expected)
        assert line.isprintable()


def test_alias_bomb_costs_nothing(tmp_path: Path) -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    start = time.process_time()
    (line,) = problems(tmp_path, "\n".join(rows))
    assert "values once its aliases are expanded; make the file smaller" in line
    assert time.process_time() - start < 1


def test_deep_nesting_through_aliases(tmp_path: Path) -> None:
    rows = ["a0: &a0 " + "[" * 30 + "]" * 30]
    rows += [f"a{i}: &a{i} " + "[" * 30 + f"*a{i - 1}" + "]" * 30 for i in range(1, 200)]
    (line,) = problems(tmp_path, "\n".join(rows))
    assert "is nested more than 40 levels deep" in line


def test_an_honest_alias_works(tmp_path: Path) -> None:
    text = GOOD.replace("- conv: {filters: 4}\n    - relu", "- &block conv: {filters: 4}\n    - *block")
    text = text.replace("- &block conv: {filters: 4}", "- &block {conv: {filters: 4}}")
    experiment = load_experiment(write(tmp_path, text), ["model.layers.1.conv.filters=8"])
    assert [getattr(layer, "filters", None) for layer in experiment.model.layers[:2]] == [4, 8]


def test_a_flood_of_problems_is_cut(tmp_path: Path) -> None:
    found = problems(tmp_path, GOOD + "".join(f"key{i}: 1\n" for i in range(500)))
    assert len(found) == 51
    assert found[-1] == "x.yaml: 450 more problems are not shown; fix these first"


def test_thousand_layers_load_fast(tmp_path: Path) -> None:
    layers = "    - conv: {filters: 4, kernel: 3, padding: same, bias: false}\n    - relu\n" * 498
    path = write(tmp_path, GOOD.replace("    - relu\n", layers))
    load_experiment(path)
    start = time.process_time()
    assert len(load_experiment(path).model.layers) == 999
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("epochs", "--set: 'epochs': should be key=value, such as --set optimizer.lr=0.1"),
        ("=3", "--set: '=3': should be key=value, such as --set optimizer.lr=0.1"),
        ("a..b=3", "--set: 'a..b=3': should be key=value, such as --set optimizer.lr=0.1"),
        ("optimizer.lrr=3", "--set: optimizer.lrr: unknown key; did you mean 'lr'?"),
        ("optimiser.lr=3", "--set: optimiser: unknown key; did you mean 'optimizer'?"),
        ("epochs=0", "--set: epochs: should be at least 1, not 0"),
        ("epochs=[1", "--set: epochs: not valid YAML: a bracket is not closed or a comma is missing"),
        ("epochs=\udcff", r"--set: epochs: the character '\udcff' is not allowed; remove it"),
        ("name.x=1", "--set: name.x: name is 'tiny' and has no fields; set name as a whole"),
        ("model.layers.9=relu", "--set: model.layers.9: should be the number of a list entry, 0 to 3, not '9'"),
        ("model.layers.x=relu", "--set: model.layers.x: should be the number of a list entry, 0 to 3, not 'x'"),
        ("model.layers.1=rleu", "--set: model.layers[1]: unknown layer 'rleu'; did you mean 'relu'?"),
        ("data.augment=5", "--set: data.augment: should be a mapping (key: value), not 5"),
        ("model.layers=5", "--set: model.layers: should be a list, not 5"),
        ("model.layers=[]", "--set: model.layers: should have at least 1 entry, not 0"),
        (f"model.layers=[{', '.join(['relu'] * 1001)}]", "--set: model.layers: should have at most 1,000 entries, not 1001"),
        ("tracking.project=''", "--set: tracking.project: should be text of at least 1 character, not ''"),
        (f"tracking.project={'x' * 200}", "--set: tracking.project: should be text of at most 128 characters, not 'xxx"),
        ("optimizer.name=adam", None),
        ("optimizer={name: adam}", None),
        ("schedule.name=cosine", None),
        ("model.layers[0].conv.filters=64", None),
        ("claim=null", None),
        ("data.augment={crop_padding: 4, flip: random}", None),
    ],
)  # fmt: skip
def test_set(tmp_path: Path, change: str, expected: str | None) -> None:
    if expected is None:
        assert load_experiment(write(tmp_path, GOOD), [change])
    else:
        assert expected in "\n".join(problems(tmp_path, GOOD, [change]))


def test_profile_problems_have_lines(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(
        "executor: slrum\npartition: 'a b'\nsetup: [\"x\\ny\"]\nenvironment: {WANDB_API_KEY: x}\nsbatch_extra: {mem: 3}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_cluster(path)
    assert [line.replace(f"{tmp_path}/", "") for line in caught.value.problems] == [
        "site.yaml:1: executor: should be one of slurm, local, not 'slrum'; did you mean 'slurm'?",
        "site.yaml:2: partition: should be a name without spaces (letters, digits and _ . , @ + : -), not 'a b'",
        r"site.yaml:3: setup[0]: should be one line without control characters, not 'x\ny'",
        "site.yaml:4: environment: should not hold WANDB_API_KEY: keys and tokens do not belong in a file; "
        "export it where you submit, or log in",
        "site.yaml:5: sbatch_extra: should not set mem: it follows from the job and the other fields of the profile",
    ]
