"""What sources usually leave open is either stated by a job's source or named in its ``inferred``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hpc_cifar.config.experiment import Experiment
from hpc_cifar.config.layers import BatchNorm, Conv, Dense, Dropout, all_layers
from hpc_cifar.config.load import load_experiment
from hpc_cifar.config.model import PretrainedModel, SequentialModel
from hpc_cifar.config.optimization import SGD, Adam, InverseTime, Plateau, Staged
from hpc_cifar.config.packaged import job_files

JOBS = {path.stem: load_experiment(path) for path in job_files()}
CLAIMED = {name: made for name, made in JOBS.items() if made.claim is not None}

# kinds of choices that the text of a source makes; what it says of one model holds for those that it derives from it
STATED = {
    "three-conv-maxnorm": {"padding", "hidden activation", "dropout", "epochs"},
    "whitened-aptx": {"padding", "rate", "epochs", "flip", "crop"},  # its table of layers has the sizes
    "ann-1": {"epochs", "validation"}, "ann-3": {"epochs", "validation"},
    "cnn-1": {"validation"}, "cnn-3": {"validation"}, "cnn-5-dropout": {"validation", "dropout"},
    "deep300": {"epochs", "batch", "rate", "momentum", "validation"},
    "mfm-01": {"epochs"},
    "mfm-08": {"batch"}, "mfm-09": {"batch"}, "mfm-10": {"batch", "rate"}, "mfm-11": {"batch", "rate"},
    "vgg16-frozen": {"flip"}, "vgg16-finetuned": {"flip"}, "resnet50-frozen": {"flip"}, "inceptionv3-75": {"flip"},
    "vgg16-last4": {"flip", "rate"},
    "cnn-l2-plateau": {
        "dropout", "flip", "rotation", "shift", "rate", "batch", "epochs", "early stopping", "best weights",
    },
}  # fmt: skip


def small(number: float) -> str:
    """As people write it: ``1e-3``."""
    return f"{number:.0e}".replace("e-0", "e-")


def choices(made: Experiment) -> Iterator[tuple[str, list[str]]]:
    """Each kind of choice that a job makes, and the words by which ``inferred`` names it."""
    model, optimizer, augment = made.model, made.optimizer, made.data.augment
    layers = list(all_layers(model.layers if isinstance(model, SequentialModel) else model.head or ()))
    yield "epochs", [f"{made.epochs} epochs"]
    yield (
        "batch",
        [f"batches of {made.data.batch_size}" if isinstance(model, PretrainedModel) else f"batch {made.data.batch_size}"],
    )
    yield "rate", [f"rate of {optimizer.lr:g}"]
    yield "validation", ["stratified split" if made.data.validation == 0.2 else "validation"]
    if model.init == "glorot_uniform":
        yield "first weights", ["Glorot"]
    if isinstance(model, PretrainedModel):
        yield "weights", ["IMAGENET1K_" + str(model.weights).removeprefix("imagenet-").upper()]
        yield "pixels", ["pixels in 0..1"]
        if model.resize:
            yield "enlarging", ["enlarged"]
    for layer in layers:
        match layer:
            case Conv():
                if layer.padding == "same":
                    yield "padding", ["padding same"]
                if layer.l2:
                    yield "L2", [f"L2 of {small(layer.l2)}", "second and third convolution"]
                if layer.init == "whiten":
                    yield "whitening", [f"whiten_eps {small(layer.whiten_eps)}", "trained, not fixed"]
            case BatchNorm():
                yield "BatchNorm", ["BatchNorm", f"{layer.momentum:g}", small(layer.eps)]
            case Dropout():
                yield "dropout", ["ropout", f"{layer.rate:g}".removeprefix("0")]
            case Dense() if layer is not layers[-1] and layer.units != 10:
                yield "hidden activation", ["ReLU"]
        if getattr(layer, "max_norm", None):
            yield "max norm", ["MaxNorm"]
    if isinstance(optimizer, Adam):
        yield "Adam", [f"Adam's beta {optimizer.beta1:g} and {optimizer.beta2:g}", f"eps {small(optimizer.eps)}"]
    if isinstance(optimizer, SGD):
        yield "momentum", [f"momentum {optimizer.momentum:g}" if optimizer.momentum else "momentum"]
    if augment.flip != "none":
        yield "flip", ["flip"]
    if augment.crop_padding:
        yield "crop", ["crop"]
    if augment.rotation_degrees:
        yield "rotation", [f"rotations up to {augment.rotation_degrees:g} degrees"]
    if any(augment.shifts):
        yield "shift", ["shifts up to"]
    if augment.warps:
        yield "what comes into view", [f"bring the {augment.warp_fill} pixel into view"]
    if made.loss.label_smoothing:
        yield "label smoothing", [f"label smoothing {made.loss.label_smoothing:g}"]
    if made.training.early_stopping:
        yield "early stopping", ["early stopping", "patience", str(made.training.early_stopping.patience)]
    if made.checkpoint.select == "best":
        yield "best weights", ["best weights"]
    words = {Staged: "stages", InverseTime: "decay", Plateau: "plateau"}.get(type(made.schedule))
    if words:
        yield "schedule", [words]


def unnamed(made: Experiment, stated: set[str], inferred: tuple[str, ...]) -> set[str]:
    """Kinds of choices of a job that neither its source states nor ``inferred`` names."""
    text = " ".join(inferred)
    return {kind for kind, words in choices(made) if kind not in stated and not all(word in text for word in words)}


@pytest.mark.parametrize("name", CLAIMED)
def test_every_choice_that_a_source_leaves_open_is_marked(name: str) -> None:
    made, stated = CLAIMED[name], STATED.get(name, set())
    assert made.claim is not None
    assert unnamed(made, stated, made.claim.inferred) == set()
    made_here = {kind for kind, _ in choices(made)}
    assert unnamed(made, stated, ()) == made_here - stated, "nothing is found where nothing is named"
    assert stated <= made_here, "an exception of a choice that the job does not make"


@pytest.mark.parametrize("name", CLAIMED)
def test_inferred_names_no_default_of_another_optimizer(name: str) -> None:
    claim = CLAIMED[name].claim
    assert claim is not None
    assert any("Adam's beta" in entry for entry in claim.inferred) == isinstance(CLAIMED[name].optimizer, Adam)


def test_deep300_differs_from_its_tuned_twin_in_what_keras_has() -> None:
    """The same layers; its source used Keras, and the twin is ours."""
    source, ours = JOBS["deep300"].model, JOBS["deep300-tuned"].model
    assert isinstance(source, SequentialModel) and isinstance(ours, SequentialModel)
    assert [layer.type for layer in source.layers] == [layer.type for layer in ours.layers]
    assert (source.init, ours.init) == ("glorot_uniform", "torch")
    assert {(n.momentum, n.eps) for n in source.layers if isinstance(n, BatchNorm)} == {(0.99, 1e-3)}
