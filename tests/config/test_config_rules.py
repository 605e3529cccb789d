"""Rules between the fields of an experiment: what goes together, and the words where it does not."""

from __future__ import annotations

import pytest

from hpc_cifar.config.load import load_experiment
from hpc_cifar.config.packaged import find_job
from hpc_cifar.errors import ConfigError


@pytest.mark.parametrize(
    ("job", "changes", "words"),
    [
        ("quickstart", ["data.folds=5"], "folds and fold go together"),
        ("quickstart", ["data.folds=5", "data.fold=5"], "fold: should be 0 to 4, since folds is 5, not 5"),
        (
            "quickstart",
            ["training.graph=true", "optimizer={name: lars, lr: 1}"],
            "training.graph: lars keeps its rates on the host",
        ),
        ("quickstart", ["optimizer={name: muon, other_momentum: 0.5}"], "other_momentum counts only with other: sgd"),
        ("three-conv-maxnorm", ["optimizer={name: muon, normalize_weights: true}"], "leave the layers' max_norm out"),
        ("quickstart", ["model.layers.0.conv={filters: 8, bias: false, bias_lr_factor: 2}"], "bias_epochs need a bias"),
        ("quickstart", ["model.layers.0.conv={filters: 8, whiten_eps: 0.1}"], "whiten_eps counts only with init: whiten"),
        ("quickstart", ["optimizer={name: muon, other: sgd, other_momentum: 0}"], "nesterov needs an other_momentum above 0"),
        ("quickstart", ["training.graph=true", "training.gradient_sync=ddp"], "training.graph: gradient_sync: ddp"),
        (
            "quickstart",
            ["training.compile=true", "training.batch_norm=global"],
            "training.compile: goes with batch_norm: local",
        ),
        (
            "effnet-lite0",
            ["training.batch_norm_images=100"],
            "training.batch_norm_images: no layer in model.head is a batch_norm",
        ),
        (
            "quickstart",
            ["training.batch_norm_images=100", "model.layers=[flatten, {dense: {units: 10}}]"],
            "training.batch_norm_images: no layer in model.layers is a batch_norm; leave it out",
        ),
        ("quickstart", ["training.batch_norm_images=1"], "batch_norm_images: should be"),
        ("vgg16-finetuned", ["training.batch_norm=global"], "training.batch_norm: global goes with family: sequential"),
        (
            "effnet-lite0",
            ["data.normalize=zero_one", "model.preprocessing=weights"],
            "data.normalize: zero_one does not count here",
        ),
        ("quickstart", ["data.augment.padding_mode=reflect", "data.augment.crop_padding=32"], "should be at most 31 with"),
        (
            "quickstart",
            ["data.augment={crop_padding: 1, padding_mode: constant, padding_value: [1, 2]}"],
            "data.augment.padding_value: should be one value or 3, not 2",
        ),
        ("quickstart", ["data.augment.cutout=32"], "would hide whole images of 32 x 32"),
        (
            "quickstart",
            ["schedule={name: cosine, warmup_epochs: 4}"],
            "warmup_epochs: 4 should be fewer than the run's 4 epochs",
        ),
        (
            "quickstart",
            ["schedule={name: step, epochs: [5], factor: 0.1}"],
            "schedule.epochs: 5 lies after the run's last epoch, 4",
        ),
        ("quickstart", ["schedule={name: staged, stages: [{epoch: 1, lr: 1}, {epoch: 9, lr: 1}]}"], "epoch 9 lies after"),
        (
            "effnet-lite0",
            ["model.cache_features=true", "data.augment.flip=random"],
            "model.cache_features: true needs data.augment",
        ),
        ("effnet-lite0", ["model.cache_features=true", "training.test_time_augmentation=true"], "views are of images"),
        ("quickstart", ["data.validation=test", "data.folds=5", "data.fold=1"], "leave validation: test out"),
        ("quickstart", ["resources={gpus_per_node: 2, processes_per_node: 3}"], "one process a GPU"),
    ],
)
def test_what_does_not_go_together_is_said(job: str, changes: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(find_job(job), changes)
    assert words in "\n".join(caught.value.problems)
