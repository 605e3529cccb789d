"""Batch normalisation with statistics of one rank or of all ranks, on any device.

torch's ``SyncBatchNorm`` refuses CPU tensors; this one also takes ranks with different or zero numbers of samples.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in the type that sums are made in: float32 for the half types, else its own."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class BatchNorm(nn.Module):
    """Normalise each channel of (n, channels) or (n, channels, height, width).

    Args:
        channels: size of dimension 1.
        keep: share of the old running statistics kept at every step (torch's ``momentum`` is ``1 - keep``).
        eps: added to the variance.
        over_all_ranks: whether the joint batch of all ranks gives the statistics, or this rank's batch alone.

    The joint statistics are the same for any number of ranks, to float tolerance. So on a CPU they are not torch's own even
    for one rank: torch sums channels_last tensors one value after the other there, and its means were seen 5e-4 off.

    A rank whose own batch has fewer than two values a channel cannot estimate a variance; with local statistics it
    normalises that batch with its running statistics and leaves them as they are.

    Attributes:
        alone: while it is set, this rank's batch alone gives the statistics, by the sums that joint ones are made with.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, keep: float = 0.9, eps: float = 1e-5, over_all_ranks: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.keep = keep
        self.eps = eps
        self.over_all_ranks = over_all_ranks
        self.alone = False

    def forward(self, x: Tensor) -> Tensor:
        several = not self.alone and dist.is_initialized() and dist.get_world_size() > 1
        if self.training and (self.over_all_ranks or self.alone) and (several or x.device.type == "cpu"):
            return self._joint(x, several)
        update = self.training and x.numel() // x.shape[1] > 1
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=update,
            momentum=1 - self.keep,
            eps=self.eps,
        )

    def _joint(self, x: Tensor, several: bool) -> Tensor:
        y, mean, var, count = _JointBatchNorm.apply(x, self.weight, self.bias, self.eps, several)
        with torch.no_grad():
            unbiased = var * (count / (count - 1).clamp(min=1))
            self.running_mean.lerp_(mean, 1 - self.keep)
            self.running_var.lerp_(unbiased, 1 - self.keep)
        result: Tensor = y
        return result

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, keep={self.keep}, eps={self.eps}, over_all_ranks={self.over_all_ranks}"


def _mean_and_variance(x: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
    """Over ``axes``, each (channels,); two plain sums, which torch adds pairwise in every memory layout."""
    mean = x.mean(axes, keepdim=True)
    return mean.flatten(), (x - mean).square_().mean(axes)


class _JointBatchNorm(torch.autograd.Function):
    """y, mean, variance, count over the joint batch; statistics are merged from every rank's (mean, variance, count)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, several: bool) -> Any:
        channels = x.shape[1]
        axes = [0, *range(2, x.dim())]
        wide = at_least_float32(x)
        count = wide.new_full((), x.numel() // channels)  # on the device: nothing is copied from the host
        if x.numel():
            mean, var = _mean_and_variance(wide, axes)
        else:
            mean = var = wide.new_zeros(channels)
        if several:
            mean, var, count = _merge_over_ranks(mean, var, count)
        y = F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), count)
        ctx.several, ctx.axes = several, axes
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        shape = [1, -1] + [1] * (x.dim() - 2)
        centred = at_least_float32(x) - mean.view(shape)
        grad = at_least_float32(grad)
        sum_grad = grad.sum(ctx.axes)
        sum_grad_centred = (grad * centred).sum(ctx.axes)
        both = torch.cat([sum_grad, sum_grad_centred])
        if ctx.several:
            dist.all_reduce(both)
        all_grad, all_centred = both.chunk(2)
        slope = inverse_std.square() * all_centred / count
        # in place: these tensors are as large as the activations
        grad_x = centred.mul_(-slope.view(shape)).add_(grad).sub_((all_grad / count).view(shape))
        grad_x.mul_((inverse_std * weight).view(shape))
        # weight and bias get this rank's share: gradient synchronisation sums them like all others
        return grad_x.to(x.dtype), sum_grad_centred * inverse_std, sum_grad, None, None


def _merge_over_ranks(mean: Tensor, var: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and number of the joint values; a rank with none has count 0."""
    mine = torch.cat([mean, var, count.view(1)])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    table = torch.stack(everyone)
    means, variances, counts = table[:, : len(mean)], table[:, len(mean) : -1], table[:, -1:]
    total = counts.sum()
    joint = (means * counts).sum(0) / total
    return joint, ((variances + (means - joint).square()) * counts).sum(0) / total, total
