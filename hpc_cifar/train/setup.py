"""Everything a rank needs before its first step: device choices, data, network, optimizer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import caches
from ..config.experiment import Experiment
from ..config.model import PretrainedModel
from ..config.shapes import check_fits
from ..data.split import fold, mean_std, split
from ..data.store import Store
from ..errors import HpcCifarError
from ..models import build
from ..plan import Placement, Plan, make_plan, requested_placement
from .distributed import World

WHITENING_IMAGES = 2000


@dataclass(frozen=True)
class Prepared:
    """The data side of a run: its store, its split and the statistics of the training part."""

    store: Store
    train_indices: np.ndarray
    validation_indices: np.ndarray
    mean: np.ndarray
    std: np.ndarray


def prepare_data(experiment: Experiment, data_root: Path, world: World) -> Prepared:
    """Open the dataset, verified, and split it; every rank computes the same split and the same exact statistics.

    Raises:
        DataError: on every rank: the dataset is missing or damaged where one of them is.
        UsageError: the network does not fit its images.
    """
    store = Store.open(data_root, experiment.data.dataset)
    on_each_host(world, store.verify_once)
    check_fits(experiment.model, store.image_shape, len(store.classes), store.dataset)
    labels = store.train.labels
    data = experiment.data
    if data.folds is not None and data.fold is not None:
        train, validation = fold(labels, data.folds, data.fold, data.split_seed)
    else:
        train, validation = split(labels, data.validation, data.split_seed)
    if data.train_images is not None and data.train_images < len(train):
        _, chosen = split(labels[train], data.train_images / len(train), data.split_seed)
        train = train[chosen]
    height, width, channels = store.train.images.shape[1:]
    if isinstance(experiment.model, PretrainedModel):
        from ..models.pretrained import statistics

        expected = statistics(experiment.model)
        mean, std = np.array(expected.mean), np.array(expected.std)
    elif experiment.data.normalize == "mean_std":
        mean, std = mean_std(store.train.moments, train, height * width)
    else:
        mean, std = np.zeros(channels), np.ones(channels)
    return Prepared(store, train, validation, mean, std)


def on_each_host(world: World, check: Callable[[], None]) -> None:
    """Have one rank of each host check something that all of them use. Call on every rank; what one raises, all raise.

    Raises:
        HpcCifarError: that of the first rank that raised one.
    """
    problem: HpcCifarError | None = None
    if world.local_rank == 0:
        try:
            check()
        except HpcCifarError as error:
            problem = error
    found = world.gather(problem)
    if problem := world.share(next((one for one in found if one), None) if found else None):
        raise problem


def split_digest(prepared: Prepared) -> str:
    """Identifies data and split, so that a resumed run can tell that it still trains on the same images."""
    digest = hashlib.sha256(prepared.store.digest.encode())
    digest.update(prepared.train_indices.tobytes())
    return digest.hexdigest()


def actual_plan(experiment: Experiment, prepared: Prepared, world: World) -> Plan:
    """The plan for the processes that are really here, with a note on every difference from the file."""
    wanted = requested_placement(experiment.resources)
    here = Placement(
        nodes=max(1, world.size // max(1, world.local_size)),
        processes_per_node=world.local_size,
        gpus_per_node=world.local_size if world.on_gpu else 0,
        cpus_per_process=torch.get_num_threads(),
    )
    notes = []
    if (here.world_size, here.gpus_per_node) != (wanted.world_size, wanted.gpus_per_node):
        kind = f"x {wanted.gpus_per_node} GPUs" if wanted.gpus_per_node else f"x {wanted.processes_per_node} CPU processes"
        notes.append(
            f"the file asks for {wanted.nodes} node(s) {kind}; here run {world.size} process(es) on the "
            f"{'GPU' if world.on_gpu else 'CPU'}, the global batch stays {experiment.data.batch_size}"
        )
    return make_plan(experiment, here, len(prepared.store.train.labels), tuple(notes))


DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def choose_precision(experiment: Experiment, device: torch.device, begun: str | None = None) -> torch.dtype:
    """``auto`` is bf16 on a GPU or a processor that computes in it, else float32.

    Args:
        begun: in which precision the run was trained before, here or elsewhere, as in its state; ``auto`` keeps to it.
    """
    wanted: str = experiment.training.precision
    if wanted == "auto":
        wanted = begun if begun is not None and begun in DTYPES else "bf16" if computes_in_bf16(device) else "float32"
    return DTYPES[wanted]


def name_of(precision: torch.dtype) -> str:
    """As job files call it."""
    return next(name for name, kind in DTYPES.items() if kind == precision)


def computes_in_bf16(device: torch.device) -> bool:
    """Whether it has instructions for it; torch also emulates bf16 on what has none, slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool({"avx512_bf16", "amx_bf16"} & {flag for line in _processor() for flag in line.split()})


def _processor() -> list[str]:
    """Model and instructions, as Linux states them for each core."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return sorted({line for line in lines if line.startswith(("model name", "flags"))})


def choose_channels_last(experiment: Experiment) -> bool:
    """``auto`` is channels_last, the layout convolutions are fastest in on tensor cores and in oneDNN."""
    wanted = experiment.training.channels_last
    return True if wanted == "auto" else wanted


def compiled(module: nn.Module) -> nn.Module:
    """torch.compile for the shapes of batches as they come; what it makes is kept for other runs on processors of this kind."""
    caches.use("TORCHINDUCTOR_CACHE_DIR", f"inductor-{_kind_of_processor()}")
    caches.use("TRITON_CACHE_DIR", "triton")
    made: nn.Module = torch.compile(module, dynamic=False)  # type: ignore[assignment]
    return made


def _kind_of_processor() -> str:
    """A digest of model, instructions and torch: what is compiled here may not run on another."""
    return hashlib.sha256("\n".join([torch.__version__, *_processor()]).encode()).hexdigest()[:12]


def make_network(
    experiment: Experiment, prepared: Prepared, world: World, channels_last: bool, weights_root: Path | None = None
) -> nn.Module:
    """The network on the device, the same weights on every rank.

    Args:
        weights_root: read pretrained weights; their folder. None where a checkpoint follows.

    Raises:
        UsageError: the pretrained weights are not there, or do not fit.
    """
    torch.manual_seed(experiment.seed)
    store = prepared.store
    joint = experiment.training.batch_norm == "global"
    network = build.build(experiment.model, store.image_shape, joint, len(store.classes))
    problem = _first_weights(experiment, prepared, network, weights_root) if world.main else None
    if problem := world.share(problem):
        raise problem
    wide = experiment.training.precision == "float64"  # bf16 is autocast: the weights stay float32
    network = network.to(world.device, torch.float64 if wide else torch.float32)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    if world.size > 1:  # equal seeds give equal weights; a broadcast makes it certain, and brings what rank 0 alone has read
        for tensor in [*network.parameters(), *network.buffers()]:
            dist.broadcast(tensor.data, src=0)
    return network


def _first_weights(
    experiment: Experiment, prepared: Prepared, network: nn.Module, weights_root: Path | None
) -> HpcCifarError | None:
    """Weights that come from elsewhere than a seed, on rank 0; what went wrong."""
    try:
        if isinstance(experiment.model, PretrainedModel) and weights_root is not None:
            from ..models import weights

            weights.load(experiment.model, network, weights_root)
        build.initialise_from_images(experiment.model, network, lambda: some_images(prepared, WHITENING_IMAGES))
    except HpcCifarError as error:
        return error
    return None


def some_images(prepared: Prepared, count: int) -> Tensor:
    """float32 (n, c, h, w): training images as the network gets them, not augmented; stores may lie class by class."""
    every = np.sort(prepared.train_indices)
    chosen = every[np.linspace(0, len(every) - 1, min(count, len(every))).astype(np.int64)]
    images = torch.from_numpy(np.array(prepared.store.train.images[chosen])).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.from_numpy(np.asarray(values)).float()[:, None, None] for values in (prepared.mean, prepared.std))
    return (images - mean) / std


class AveragedStatistics:
    """Within the block, BatchNorm's running statistics are the mean over the ranks; afterwards each rank has its own again.

    With local statistics every rank keeps its own; evaluation and checkpoints use their mean. Putting a rank's own back keeps
    the training of a run that stopped here equal to that of one that did not.
    """

    def __init__(self, network: nn.Module, world: World, needed: bool) -> None:
        self._buffers = [b for b in network.buffers() if b.is_floating_point()] if needed and world.size > 1 else []
        self._world = world
        self._own: list[Tensor] = []

    def __enter__(self) -> None:
        self._own = [buffer.clone() for buffer in self._buffers]
        if self._buffers:
            flat = self._world.sum(torch.cat([b.flatten() for b in self._buffers])) / self._world.size
            for buffer, mean in zip(self._buffers, torch.split(flat, [b.numel() for b in self._buffers]), strict=True):
                buffer.copy_(mean.view_as(buffer))

    def __exit__(self, *_: object) -> None:
        for buffer, own in zip(self._buffers, self._own, strict=True):
            buffer.copy_(own)
