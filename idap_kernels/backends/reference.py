"""Every statistic in plain PyTorch and float64: what the other backends are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import BatchNorm

_ACTIVATIONS = {
    "relu": F.relu,
    "identity": lambda y: y,
    "gelu": F.gelu,
    "silu": F.silu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
}


def unavailable() -> str | None:
    return None


def refuses(x: Tensor) -> str | None:
    if x.device.type == "mps":
        return "MPS has no float64; move the tensor to the CPU"
    return None


def channel_stats(
    x: Tensor, channel_dim: int, sample_dim: int, activation: str, state: Tensor, accumulate: bool
) -> None:
    y = x.detach().to(torch.float64).movedim((sample_dim, channel_dim), (0, 1))
    y = y.reshape(*y.shape[:2], -1)  # (B, C, S)
    samples, positions = y.shape[0], y.shape[2]
    act = _ACTIVATIONS[activation](y)
    mean = y.mean(dim=(0, 2))
    new = torch.stack(
        [
            torch.full_like(mean, samples * positions),
            torch.full_like(mean, samples),
            mean,
            (y - mean[:, None]).square().sum(dim=(0, 2)),
            y.abs().sum(dim=(0, 2)),
            act.square().sum(dim=(0, 2)),
            act.square().sum(dim=2).sqrt().sum(dim=0),
            y.abs().mean(dim=2).square().sum(dim=0),
            (y > 0).sum(dim=(0, 2)).to(torch.float64),
            y.amin(dim=(0, 2)),
            y.amax(dim=(0, 2)),
        ]
    )
    state.copy_(merge_states(state, new) if accumulate else new)


def merge_states(a: Tensor, b: Tensor) -> Tensor:
    """The state (11, C) of both parts of the data.

    Mean and M2 by Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
    sample variances" (1979); the other rows add up, or take the smaller or larger.
    """
    count = a[0] + b[0]
    delta = b[2] - a[2]
    share = b[0] / count.clamp_min(1)
    mean = torch.where(delta.isfinite(), a[2] + delta * share, a[2] + b[2])
    m2 = a[3] + b[3] + delta.square() * a[0] * share
    merged = torch.stack(
        [
            count,
            a[1] + b[1],
            mean,
            m2,
            a[4] + b[4],
            a[5] + b[5],
            a[6] + b[6],
            a[7] + b[7],
            a[8] + b[8],
            torch.minimum(a[9], b[9]),
            torch.maximum(a[10], b[10]),
        ]
    )
    # An empty side, whose min and max say nothing yet, leaves the other as it is.
    return torch.where(a[0] == 0, b, torch.where(b[0] == 0, a, merged))


def bn_act_stats(
    x: Tensor,
    norm: BatchNorm,
    act: str,
    y: Tensor,
    channel_dim: int,
    sample_dim: int,
    activation: str,
    state: Tensor,
    accumulate: bool,
) -> None:
    bn_act(x, norm, act, y, channel_dim)
    channel_stats(x, channel_dim, sample_dim, activation, state, accumulate)


def bn_act(x: Tensor, norm: BatchNorm, act: str, y: Tensor, channel_dim: int) -> None:
    """Write ``act(norm(x))`` into ``y``, computed in float64."""
    mean, var, weight, bias = (None if t is None else t.detach().to(torch.float64) for t in norm[:4])
    wide = x.detach().to(torch.float64).movedim(channel_dim, 1)
    normalized = F.batch_norm(wide, mean, var, weight, bias, training=False, eps=norm.eps)
    y.copy_(_ACTIVATIONS[act](normalized).movedim(1, channel_dim))


def pair_stats(x: Tensor, y: Tensor, row_dims: int, out: Tensor) -> None:
    a = x.detach().to(torch.float64).flatten(0, row_dims - 1).flatten(1)  # (R, N)
    b = y.detach().to(torch.float64).flatten(0, row_dims - 1).flatten(1)
    out.copy_(
        torch.stack(
            [a.square().sum(1), b.square().sum(1), (a * b).sum(1), (b - a).square().sum(1)],
        )
    )


def filter_norms(weights: list[Tensor], dim: int, out: Tensor) -> None:
    norms = [w.detach().to(torch.float64).movedim(dim, 0).flatten(1).square().sum(1).sqrt() for w in weights]
    torch.cat(norms, out=out)
