"""Whoever chooses a loss, an optimizer or a kind of section wrongly is told what there is; times with and without quotes."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_cifar.config.load import load_cluster, load_experiment
from hpc_cifar.errors import HpcCifarError

HEAD = "name: x\nepochs: 1\nmodel: {family: sequential, layers: [flatten, dense: {units: 10}]}\ndata: {batch_size: 8}\n"
OPTIMIZER = "optimizer: {name: sgd, lr: 0.1}\n"
LOSS = "the loss is cross-entropy, the only one there is; its one option is label_smoothing"


def said(tmp_path: Path, text: str) -> str:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(HpcCifarError) as caught:
        load_experiment(path, [])
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("loss: {name: focal}", f"loss.name: unknown key; {LOSS}"),
        ("loss: {type: focal}", LOSS),
        ("loss: focal", LOSS),
        ("loss: {focal: {gamma: 2}}", LOSS),
        ("loss: {label_smoothin: 0.1}", "did you mean 'label_smoothing'?"),
        ("loss: {seed: 1}", "'seed' belongs at the top level of the file, check the indentation"),
        ("schedule: {type: cosine}", "schedule.name: is missing; name one of constant, cosine"),
        ("schedule: {name: cosine, kind: x}", "schedule.kind: unknown key; name chooses it, one of constant, cosine"),
        ("schedule: {name: zigzag}", "unknown schedule 'zigzag'; schedules are constant"),
        (
            "checkpoint: {name: best}",
            "checkpoint.name: unknown key; there is one kind of checkpoint; valid keys are every_epochs",
        ),
        ("training: {precision: fp8}", "should be one of auto, float32, bf16, float64, not 'fp8'"),
        ("training: {selection: {type: hard, share: 0.5}}", "there is one kind of selection; valid keys are from_epoch"),
    ],
)
def test_what_there_is_to_choose_is_said(tmp_path: Path, text: str, words: str) -> None:
    message = said(tmp_path, f"{HEAD}{OPTIMIZER}{text}\n")
    assert words in message and ("seed" in text or "top level" not in message)


def test_a_model_and_an_optimizer_are_chosen_by_their_own_word(tmp_path: Path) -> None:
    message = said(tmp_path, HEAD + "optimizer: {name: sgd, lr: 0.1, type: adam}\n")
    assert "optimizer.type: unknown key; name chooses it, one of sgd, adam, adamw, muon, lars" in message
    message = said(tmp_path, HEAD.replace("sequential,", "sequential, type: resnet,") + OPTIMIZER)
    assert "model.type: unknown key; family chooses it, one of sequential, torchvision, timm" in message


@pytest.mark.parametrize(
    "time", ["24:00:00", "1:00:00", "01:00:00", "0:30:00", "190:20:30", "1-00:00:00", "00:00:01", "59:59:59"]
)
def test_a_time_is_a_time_with_quotes_and_without(tmp_path: Path, time: str) -> None:
    for written in (time, f'"{time}"', f"'{time}'"):
        path = tmp_path / "x.yaml"
        path.write_text(f"{HEAD}{OPTIMIZER}resources: {{time: {written}}}\n")
        assert load_experiment(path, []).resources.time == time
        assert load_experiment(path, [f"resources.time={time}"]).resources.time == time
        (tmp_path / "site.yaml").write_text(f"max_time: {written}\n")
        assert load_cluster(tmp_path / "site.yaml").max_time == time


@pytest.mark.parametrize(
    "time", ["36000", "10:00", "1:60:00", "1:00:60", "-1:00:00", "+1:00:00", "1:2:3", "10:00:00.5", "1_0:00:00"]
)
def test_what_is_no_time_is_refused_and_not_taken_for_seconds(tmp_path: Path, time: str) -> None:
    assert "resources.time: should be " in said(tmp_path, f"{HEAD}{OPTIMIZER}resources: {{time: {time}}}\n")
