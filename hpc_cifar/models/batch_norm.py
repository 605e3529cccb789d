"""Batch normalisation with statistics of one rank or of all ranks, on any device.

torch's ``SyncBatchNorm`` refuses CPU tensors; this one also takes ranks with different or zero numbers of samples.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm(nn.Module):
    """Normalise each channel of (n, channels) or (n, channels, height, width).

    Args:
        channels: size of dimension 1.
        keep: share of the old running statistics kept at every step (torch's ``momentum`` is ``1 - keep``).
        eps: added to the variance.
        group: process group whose joint batch gives the statistics; None for this rank's batch alone.

    A rank whose own batch has fewer than two values a channel cannot estimate a variance; with local statistics it
    normalises that batch with its running statistics and leaves them as they are.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, keep: float = 0.9, eps: float = 1e-5, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.keep = keep
        self.eps = eps
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.group is not None:
            return self._over_all_ranks(x)
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

    def _over_all_ranks(self, x: Tensor) -> Tensor:
        assert self.group is not None
        y, mean, var, count = _GlobalBatchNorm.apply(x, self.weight, self.bias, self.eps, self.group)
        with torch.no_grad():
            unbiased = var * (count / (count - 1).clamp(min=1))
            self.running_mean.lerp_(mean, 1 - self.keep)
            self.running_var.lerp_(unbiased, 1 - self.keep)
        result: Tensor = y
        return result

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, keep={self.keep}, eps={self.eps}, global={self.group is not None}"


class _GlobalBatchNorm(torch.autograd.Function):
    """y, mean, variance, count over the joint batch; statistics are merged from every rank's (mean, variance, count)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: dist.ProcessGroup) -> Any:
        channels = x.shape[1]
        axes = [0, *range(2, x.dim())]
        here = x.new_tensor(x.numel() // channels, dtype=torch.float32).expand(1)
        if x.numel():
            var, mean = torch.var_mean(x.float(), dim=axes, correction=0)
        else:
            mean = var = x.new_zeros(channels, dtype=torch.float32)
        mine = torch.cat([mean, var, here])
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, mine, group=group)
        table = torch.stack(everyone)
        means, variances, counts = table[:, :channels], table[:, channels:-1], table[:, -1:]
        count = counts.sum()
        mean = (means * counts).sum(0) / count
        var = ((variances + (means - mean).square()) * counts).sum(0) / count
        y = F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), count)
        ctx.group, ctx.axes = group, axes
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        shape = [1, -1] + [1] * (x.dim() - 2)
        centred = x.float() - mean.view(shape)
        grad = grad.float()
        sum_grad = grad.sum(ctx.axes)
        sum_grad_centred = (grad * centred).sum(ctx.axes)
        both = torch.cat([sum_grad, sum_grad_centred])
        dist.all_reduce(both, group=ctx.group)
        all_grad, all_centred = both.chunk(2)
        slope = inverse_std.square() * all_centred / count
        grad_x = (grad - (all_grad / count).view(shape) - centred * slope.view(shape)) * (inverse_std * weight).view(shape)
        # weight and bias get this rank's share: gradient synchronisation sums them like all others
        return grad_x.to(x.dtype), sum_grad_centred * inverse_std, sum_grad, None, None
