"""What the kernels are compared with: the same statistics as a PyTorch user would write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def eager_channel_stats(x: Tensor, channel_dim: int = 1) -> Tensor:
    """All rows of ``ChannelStats.state`` in float32: (11, C). Half precision is widened first."""
    y = x.float()
    positions = tuple(d for d in range(1, x.dim()) if d != channel_dim)
    everything = (0, *positions)
    var, mean = torch.var_mean(y, dim=everything, correction=0)
    count = x.numel() // x.shape[channel_dim]
    size = count // x.shape[0]
    act = y.relu()
    abs_sum = y.abs().sum(dim=positions)  # (B, C)
    energy = act.square().sum(dim=positions)  # (B, C)
    return torch.stack(
        [
            torch.full_like(mean, count),
            torch.full_like(mean, x.shape[0]),
            mean,
            var * count,
            abs_sum.sum(0),
            energy.sum(0),
            energy.sqrt().sum(0),
            (abs_sum / size).square().sum(0),
            (y > 0).sum(dim=everything).float(),
            y.amin(dim=everything),
            y.amax(dim=everything),
        ]
    )


def released_expression(x: Tensor, channel_dim: int = 1) -> Tensor:
    """The activation term of the method's released code, and nothing else: mean_b ‖relu(x_b)‖₂ (C,)."""
    positions = tuple(d for d in range(1, x.dim()) if d != channel_dim)
    return torch.linalg.vector_norm(x.relu(), dim=positions).mean(0)


def eager_bn_act(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, channel_dim: int = 1
) -> Tensor:
    """What a network runs behind a convolution: batch norm in evaluation mode, then ReLU in place."""
    flat = x if channel_dim == 1 else x.flatten(0, -2)  # tokens (B, T, C), as rows of channels
    return F.batch_norm(flat, mean, var, weight, bias).relu_().view_as(x)


def eager_bn_act_stats(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, channel_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """The same, and the statistics of ``x`` (11, C)."""
    return eager_bn_act(x, mean, var, weight, bias, channel_dim), eager_channel_stats(x, channel_dim)


def eager_pair_stats(x: Tensor, y: Tensor) -> Tensor:
    """x·x, y·y, x·y and ‖y − x‖² of each sample in float32: (4, B)."""
    a, b = x.float().flatten(1), y.float().flatten(1)
    return torch.stack([a.square().sum(1), b.square().sum(1), (a * b).sum(1), (b - a).square().sum(1)])


def eager_filter_norms(weights: list[Tensor]) -> list[Tensor]:
    """The L2 norm of each filter, layer by layer."""
    return [torch.linalg.vector_norm(w.flatten(1), dim=1, dtype=torch.float32) for w in weights]
