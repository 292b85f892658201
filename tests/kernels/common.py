"""The grid of odd shapes and layouts, and the one table of tolerances."""

from __future__ import annotations

import torch
from torch import Tensor

from idap_kernels.channel_stats import ROWS

# Largest error of a row against float64, as a share of the row's scale. Accumulation is in float32 for
# all but float64, over blocks of at most a few hundred values a lane, so length does not matter.
TOLERANCE = {
    torch.float32: 1e-5,
    torch.float16: 1e-5,
    torch.bfloat16: 1e-5,
    torch.float64: 1e-12,
}

SHAPES = [
    (1, 1),
    (2, 3),
    (300, 33),
    (32, 257),
    (1, 1, 1),
    (3, 5, 7),
    (5, 700, 1),
    (1, 9, 130),
    (2, 16, 49),
    (2, 3, 5, 7),
    (4, 64, 7, 7),
    (3, 47, 7, 7),
    (2, 50, 3, 3),
    (2, 130, 2, 2),
    (3, 40, 14, 14),
    (1, 33, 15, 17),
    (2, 19, 28, 28),
    (2, 5, 57, 61),
    (1, 3, 300, 300),
    (1, 300, 9, 129),
    (2, 6, 3, 4, 5),
    (2, 4, 2, 3, 3, 2),
]


def layouts(x: Tensor) -> dict[str, tuple[Tensor, dict[str, int]]]:
    """Views and copies of ``x`` in other layouts, with the dimensions to pass."""
    found: dict[str, tuple[Tensor, dict[str, int]]] = {"contiguous": (x, {})}
    if x.dim() == 4:
        found["channels_last"] = (x.to(memory_format=torch.channels_last), {})
        found["transposed"] = (x.transpose(2, 3), {})
    if x.dim() == 3:
        found["tokens"] = (x, {"channel_dim": -1})
        found["sequence_first"] = (x, {"channel_dim": 2, "sample_dim": 1})
    if x.dim() >= 3:
        wide = x.new_full([n + 3 for n in x.shape], float("nan"))
        inner = wide[tuple(slice(1, n + 1) for n in x.shape)]
        inner.copy_(x)
        found["slice"] = (inner, {})
        if x.shape[-1] > 2:
            found["stepped"] = (x[..., ::2], {})
        found["expanded"] = (x[:, :1].expand_as(x), {})
    qkv = x.new_full((*x.shape[:-1], 3 * x.shape[-1]), float("nan"))
    qkv[..., x.shape[-1] : 2 * x.shape[-1]] = x
    found["chunk"] = (qkv.chunk(3, dim=-1)[1], {"channel_dim": -1})
    return found


def row_errors(got: Tensor, wanted: Tensor) -> dict[str, float]:
    """The largest error of each row of a state (11, C), as a share of the row's scale in its channel.

    The scale of the mean and the extremes is the largest magnitude in the channel, since they may lie near
    zero; a sum of non-negative terms is its own scale, up to a millionth of the largest channel's.
    """
    magnitude = wanted[9].abs().maximum(wanted[10].abs())
    errors = {}
    for i, name in enumerate(ROWS):
        scale = wanted[i].abs() + 1e-6 * wanted[i].abs().max()
        if name in ("mean", "min", "max"):
            scale = magnitude
        if name == "m2":  # a channel of equal values has rounding noise alone
            scale = scale + wanted[0] * (1e-6 * magnitude) ** 2
        errors[name] = float(((got[i] - wanted[i]).abs() / scale.clamp_min(1e-300)).max())
    return errors


def assert_state_close(got: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    assert got.shape == wanted.shape
    assert got.dtype == torch.float64
    wrong = {name: error for name, error in row_errors(got, wanted).items() if not error <= tolerance}
    assert not wrong, f"{what}: {wrong}"
