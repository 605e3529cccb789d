"""A trained network as one safetensors file that stands alone: weights, classes, preprocessing, and how it is built."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from .. import files
from ..config.model import ModelConfig, PretrainedModel
from ..errors import DataError, HpcCifarError, first_line
from . import build, tensors

FORMAT = "hpc-cifar-1"


@dataclasses.dataclass(frozen=True)
class Exported:
    """What a file holds besides the weights.

    Attributes:
        mean, std: of each channel; a pixel is (raw / 255 - mean) / std.
        image: (channels, height, width).
        facts: the run, its data and its figures.
    """

    model: Any
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image: tuple[int, int, int]
    facts: dict[str, Any]

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 (n, h, w, c) as the network takes them: float32 (n, c, h, w)."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


def save(path: Path, network: nn.Module, about: Exported) -> None:
    """Write the file atomically; its metadata is text in safetensors' header.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors.torch import save as to_bytes

    values = {
        "format": FORMAT,
        "model": json.dumps(about.model.model_dump(mode="json")),
        "classes": json.dumps(about.classes),
        "mean": json.dumps(about.mean),
        "std": json.dumps(about.std),
        "image": json.dumps(about.image),
        "facts": json.dumps(about.facts),
    }
    weights = {name: _plain(tensor) for name, tensor in network.state_dict().items()}
    with files.atomic_file(path) as stream:
        stream.write(to_bytes(weights, metadata=values))


def _plain(tensor: Tensor) -> Tensor:
    """On the CPU, one value after the other, floats as float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous().clone()


def load(path: Path) -> tuple[nn.Module, Exported]:
    """The network in evaluation mode on the CPU, and what is to know about it.

    Raises:
        DataError: the file is damaged, or not one that :func:`save` wrote.
    """
    from safetensors import SafetensorError, safe_open

    try:
        tensors.check_regular(path)
        with safe_open(path, "pt") as opened:
            words = opened.metadata() or {}
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a dictionary
    except (SafetensorError, tensors.Unreadable, OSError, ValueError, RuntimeError) as error:
        if tensors.is_out_of_memory(error):
            raise
        raise DataError(f"{path}: cannot be read: {first_line(error)}") from None
    if words.get("format") != FORMAT:
        raise DataError(f"{path}: is no export of hpc-cifar")
    try:
        fields = {name: json.loads(words[name]) for name in ("model", "classes", "mean", "std", "image", "facts")}
        model = TypeAdapter(ModelConfig).validate_python(fields["model"])
        model = model.model_copy(update={"weights": None}) if isinstance(model, PretrainedModel) else model
        about = TypeAdapter(Exported).validate_python(fields | {"model": model})
    except (KeyError, ValueError, TypeError, RecursionError) as error:  # pydantic's are ValueErrors
        raise DataError(f"{path}: its header is damaged ({first_line(error)})") from None
    try:
        with torch.device("meta"):  # the header may ask for a network of any size
            wanted = build.build(model, about.image, classes=len(about.classes)).state_dict()
        if {name: (one.shape, one.dtype) for name, one in wanted.items()} != {
            name: (one.shape, one.dtype) for name, one in weights.items()
        }:
            raise ValueError("other names, shapes or types")
        network = build.build(model, about.image, classes=len(about.classes))
        network.load_state_dict(weights)
    except (RuntimeError, ValueError, HpcCifarError) as error:
        if tensors.is_out_of_memory(error):
            raise
        raise DataError(f"{path}: its weights do not fit its network ({first_line(error)})") from None
    return network.eval(), about
