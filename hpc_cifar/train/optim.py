"""Optimizers of the job file, from torch and timm."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..config.optimization import LARS, SGD, Adam, AdamW, Muon, Optimizer
from ..errors import RunError
from ..models.build import Rule
from . import contents

LR_FACTOR = "lr_factor"
"""Name of the factor on the rate in a group of parameters."""
LR_EPOCHS = "lr_epochs"
"""Name of the epochs over which a group's rate falls to 0; in few groups."""


def build(
    config: Optimizer, parameters: Iterable[nn.Parameter], rules: Sequence[Rule] = (), capturable: bool = False
) -> torch.optim.Optimizer:
    """The optimizer over those of ``parameters`` that are trained.

    Its rate is set before every step from the schedule: in each group the rate times the group's ``lr_factor``.

    Args:
        rules: what holds for single parameters: factors on the rate and on the decay. Their L2 is added by :func:`add_l2`.
        capturable: its step will be recorded in a CUDA graph.
    """
    groups = _groups(config, [p for p in parameters if p.requires_grad], rules)
    made = _build(config, groups, capturable)
    if capturable:
        made._warned_capturable_if_run_uncaptured = True  # its first steps are not recorded, as train/graph.py wants it
    if config.lookahead is not None:
        from .lookahead import Lookahead  # timm takes a while to import

        return Lookahead(made, config.lookahead.alpha, config.lookahead.steps)  # type: ignore[no-untyped-call]
    return made


def _groups(config: Optimizer, parameters: list[nn.Parameter], rules: Sequence[Rule]) -> list[dict[str, Any]]:
    """Parameters that are treated alike, in the order of their first one; a single group where there are no rules."""
    of = {id(rule.parameter): rule for rule in rules}
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    last_layer = next((p for p in reversed(parameters) if p.dim() > 1), None)  # a network's order is that of its layers
    for parameter in parameters:
        rule = of.get(id(parameter), Rule(parameter))
        group: dict[str, Any] = {"weight_decay": config.weight_decay * rule.decay_factor, LR_FACTOR: rule.lr_factor}
        if rule.epochs is not None:
            group[LR_EPOCHS] = rule.epochs
        if isinstance(config, Muon):
            group |= _of_muon(config, rule, is_last_layer=parameter is last_layer)
        if isinstance(config, LARS):  # biases and normalisations are neither adapted nor decayed, as in the paper's followers
            group["always_adapt"] = parameter.dim() > 1
            if parameter.dim() < 2:
                group["weight_decay"] = 0.0
        groups.setdefault(tuple(group.items()), group | {"params": []})["params"].append(parameter)
    return list(groups.values())


def _of_muon(config: Muon, rule: Rule, is_last_layer: bool) -> dict[str, Any]:
    """Whether Muon updates a parameter; its rate and decay if it does not."""
    last_layer_lr = config.last_layer_lr if is_last_layer else None
    if rule.parameter.dim() > 1 and last_layer_lr is None:
        return {"use_muon": True}
    rate = last_layer_lr or config.other_lr
    decay = config.weight_decay if config.other_weight_decay is None else config.other_weight_decay
    return {
        "use_muon": False,
        LR_FACTOR: rule.lr_factor * rate / config.lr,
        # rate times decay stays
        "weight_decay": decay * rule.decay_factor * config.other_lr / rate,
    }


def _build(config: Optimizer, groups: list[dict[str, Any]], capturable: bool) -> torch.optim.Optimizer:
    match config:
        case SGD():
            return _plain(torch.optim.SGD)(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
        case Adam() | AdamW():
            kind: type[torch.optim.Optimizer] = torch.optim.AdamW if isinstance(config, AdamW) else torch.optim.Adam
            betas = (config.beta1, config.beta2)
            return _plain(kind)(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True, capturable=capturable)
        case Muon():
            from . import muon  # timm takes a while to import

            return muon.build(config, groups, capturable, _plain)
        case LARS():
            from timm.optim.lars import Lars

            return _plain(Lars)(
                groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, trust_coeff=config.trust_coefficient
            )


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state that may have been saved where steps were recorded and now are not, or the other way round.

    Args:
        state: is changed: its groups become capturable where those of ``optimizer`` are. torch puts counts of steps on the
            device or the host by that.

    Raises:
        RunError: an earlier version made other groups of these parameters.
        ValueError: it is the state of other parameters.
    """
    groups, saved_groups = optimizer.param_groups, state["param_groups"]
    kinds = [[(len(one["params"]), one.get("use_muon"), "ns_steps" in one) for one in some] for some in (groups, saved_groups)]
    if kinds[0] != kinds[1]:
        raise RunError(
            "the checkpoint is of an earlier version of hpc-cifar, whose optimizer treated these parameters otherwise: "
            "go on with that version, or train the job anew under another name"
        )
    if problem := contents.of_optimizer(state, optimizer):
        raise ValueError(problem)
    for group, saved in zip(groups, saved_groups, strict=True):
        saved["weight_decay"] = group["weight_decay"]  # an earlier version had the L2 of layers in it
        if "capturable" in group:
            saved["capturable"] = group["capturable"]
    optimizer.load_state_dict(state)


def halves(optimizer: torch.optim.Optimizer, graph: bool) -> tuple[Callable[[], object], Callable[[], object] | None]:
    """What a step does on the device alone, and what of it the host decides: with lookahead and a graph, when to go back."""
    wrapper: Any = optimizer
    if not graph or not hasattr(wrapper, "step_slow"):
        return optimizer.step, None
    return wrapper.step_fast, wrapper.step_slow


def penalty(rules: Sequence[Rule]) -> float:
    """The ``l2`` of layers: each times the sum of its squared weights, summed; the same on every rank.

    A part of the loss that is minimised, whose gradient :func:`add_l2` adds.
    """
    parts = [rule.l2 * rule.parameter.detach().double().square().sum() for rule in rules if rule.l2]
    return float(torch.stack(parts).sum()) if parts else 0.0


@torch.no_grad()
def add_l2(rules: Sequence[Rule]) -> None:
    """Add the gradient of the ``l2`` of layers, 2 x l2 x weight, to gradients that are summed over the ranks.

    As in Keras it is part of what clipping and the optimizer see, so AdamW and Muon do not decouple it.
    """
    for rule in rules:
        if rule.l2 and rule.parameter.grad is not None:
            rule.parameter.grad.add_(rule.parameter, alpha=2 * rule.l2)


def keep_norms(rules: Sequence[Rule]) -> None:
    """Shorten the weights of every filter or unit that have become longer than their ``max_norm``."""
    with torch.no_grad():
        for rule in rules:
            if rule.max_norm is not None:
                rule.parameter.renorm_(2, 0, rule.max_norm)


def _plain(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """The optimizer without what it does for torch.compile, which compiles networks here and no optimizer.

    Its methods import torch's compiler, only to be left alone by it: a third of the time in which a rank starts. Each is
    replaced by the function of torch that it wraps; on a torch that wraps nothing this changes nothing.
    """
    names = ("step", "zero_grad", "add_param_group", "state_dict", "load_state_dict")
    methods: dict[str, Any] = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    return type(kind.__name__, (kind,), {**methods, "step": torch.no_grad()(methods["step"])})


class EMA:
    """Exponential moving average of the parameters, corrected for its start: the first update copies them.

    Args:
        parameters: the live parameters, in a fixed order.
        decay: share of the old average kept at every step, once enough steps are behind it.
        on_device: keep the share of an update in device memory, so that :meth:`apply` can be replayed in a CUDA graph.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float, on_device: bool = False) -> None:
        self._live = [p for p in parameters if p.requires_grad]
        self.shadow = [p.detach().clone() for p in self._live]
        self.decay = decay
        self.updates = 0
        self._share = 0.0  # of the live parameters
        self._share_on_device = torch.zeros((), dtype=self.shadow[0].dtype, device=self.shadow[0].device) if on_device else None

    def prepare(self) -> None:
        """Count an update, whose share of the live parameters follows from the count: short at first, as in TensorFlow's
        num_updates rule.
        """
        self.updates += 1
        self._share = 1 - min(self.decay, (self.updates - 1) / (self.updates + 8))
        if self._share_on_device is not None:
            self._share_on_device.fill_(self._share)

    @torch.no_grad()
    def apply(self) -> None:
        """The device's part of an update."""
        live = [p.detach() for p in self._live]
        if self._share_on_device is None:
            torch._foreach_lerp_(self.shadow, live, self._share)
            return
        moves = torch._foreach_sub(live, self.shadow)
        torch._foreach_mul_(moves, self._share_on_device)
        torch._foreach_add_(self.shadow, moves)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the live parameters with the average; calling it twice restores them."""
        for live, average in zip(self._live, self.shadow, strict=True):
            saved = live.detach().clone()
            live.copy_(average)
            average.copy_(saved)
