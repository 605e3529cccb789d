"""Pretrained weights of experiments before they are submitted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config.experiment import Experiment
from ..config.model import PretrainedModel
from ..data.store import Store
from ..errors import DataError, UsageError


def with_weights(experiments: Sequence[Experiment], data_root: Path, *, copy: bool = True) -> list[Experiment]:
    """Experiments that name the files of their pretrained weights, each of which fits its network and dataset.

    Args:
        copy: copy those that not every node sees to below ``data_root``.

    Raises:
        UsageError: what is wrong with any of them, a line each.
    """
    if not any(isinstance(one.model, PretrainedModel) for one in experiments):
        return list(experiments)
    from ..models import weights  # imports torch, which takes a second or two

    place = weights.below if copy else weights.check
    known: dict[tuple[Any, str], Path | None] = {}
    made, problems = [], []
    for one in experiments:
        model, key = one.model, (one.model, one.data.dataset)
        if isinstance(model, PretrainedModel):
            try:
                if key not in known:
                    store = Store.open(data_root, one.data.dataset)
                    known[key] = place(model, data_root, store.image_shape, len(store.classes))
                path = known[key]
            except (UsageError, DataError) as error:
                problems.append(str(error))
                continue
            one = one.model_copy(update={"model": model.model_copy(update={"weights": str(path) if path else None})})
        made.append(one)
    if problems:
        raise UsageError("\n".join(dict.fromkeys(problems)))
    return made
