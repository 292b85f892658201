"""Each shape of work of a GPU backend once, against the reference on the same device: a wrong kernel must not serve."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dispatch import BatchNorm
from . import reference

if TYPE_CHECKING:
    from ..dispatch import Backend


def self_check(backend: Backend, device: torch.device) -> str | None:
    """Why ``backend`` cannot be trusted on ``device``, in words; ``None`` if its results are right."""
    try:
        with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            wrong = _wrong_result(backend, device)
    except (RuntimeError, ValueError) as error:
        return f"self-check failed: {error}"
    return f"self-check failed: {wrong} on this device" if wrong else None


def _wrong_result(backend: Backend, device: torch.device) -> str | None:
    def wave(*shape: int) -> Tensor:  # no random numbers: the caller's generator stays as it is
        n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64, device=device)
        return ((n * 0.7).sin() * 3 + (n * 0.013).cos()).reshape(shape)

    # (what, map, channel_dim): whole rows, pieces of rows, channels-last pieces, thread by thread
    maps = [
        ("7x7 maps", wave(3, 5, 7, 7), 1),
        ("long rows", wave(2, 3, 48, 52), 1),
        ("tokens", wave(3, 90, 12), 2),
        ("vectors", wave(5, 13), 1),
    ]
    for what, y, channel_dim in maps:
        for dtype in (torch.float32, torch.bfloat16):
            x = y.to(dtype)
            got = wave(11, x.shape[channel_dim]).fill_(torch.nan)
            want = torch.empty_like(got)
            for accumulate in (False, True):
                backend.channel_stats(x, channel_dim, 0, "relu", got, accumulate)
                reference.channel_stats(x, channel_dim, 0, "relu", want, accumulate)
            if not torch.allclose(got, want, rtol=1e-4, atol=1e-5):
                return f"channel_stats of {what} in {dtype} is wrong"
            mean, spread, weight, bias = wave(4, x.shape[channel_dim]).float()
            norm = BatchNorm(mean, spread.square() + 0.1, weight, bias, 1e-5)
            act = "relu" if dtype == torch.float32 else "hardswish"  # in Triton each has a kernel of its own
            written, exact = torch.full_like(x, torch.nan), torch.empty_like(x)
            backend.bn_act_stats(x, norm, act, written, channel_dim, 0, "relu", got.fill_(torch.nan), False)
            reference.bn_act_stats(x, norm, act, exact, channel_dim, 0, "relu", want, False)
            close = torch.allclose(
                written.float(), exact.float(), rtol=1e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-4
            )
            if not (close and torch.allclose(got, want, rtol=1e-4, atol=1e-5)):
                return f"bn_act_stats of {what} in {dtype} is wrong"
    for rows, row_dims in (((3, 3000), 1), ((2, 30000), 1), ((4, 5, 33), 2)):
        x, y = wave(*rows).float(), wave(*rows).flip(0).float()
        got = wave(4, x.flatten(0, row_dims - 1).shape[0]).fill_(torch.nan)
        want = torch.empty_like(got)
        backend.pair_stats(x, y, row_dims, got)
        reference.pair_stats(x, y, row_dims, want)
        if not torch.allclose(got, want, rtol=1e-5, atol=1e-2):
            return "pair_stats is wrong"
    weights = [wave(7, 3, 3, 3).float(), wave(5, 11).half(), wave(2, 3000).bfloat16(), wave(3, 4)]
    norms = wave(17).fill_(torch.nan)
    backend.filter_norms(weights, 0, norms)
    exact = torch.empty_like(norms)
    reference.filter_norms(weights, 0, exact)
    if not torch.allclose(norms, exact, rtol=1e-5, atol=0):
        return "filter_norms is wrong"
    return None
