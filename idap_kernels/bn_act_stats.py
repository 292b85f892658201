"""Batch norm, activation and the statistics of what went in, in one read and one write."""

from __future__ import annotations

import torch
from torch import Tensor

from .channel_stats import ROWS, ChannelStats, check_map
from .dispatch import (
    OUTPUT_ACTIVATION_CODES,
    BatchNorm,
    check_backend_name,
    check_tensor,
    is_plain,
    materialized,
    select,
)
from .errors import InvalidInputError


def bn_act_stats(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    act: str = "relu",
    channel_dim: int = 1,
    sample_dim: int = 0,
    activation: str = "relu",
    out: ChannelStats | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ChannelStats]:
    """Batch norm in evaluation mode and an activation, with the statistics of ``x`` from the same read.

    What a network computes after a convolution anyway, ``act(batch_norm(x))``, and what
    ``channel_stats(x)`` gives, in one pass: ``x`` is read once, the result written once.
    The batch norm is ``(x - running_mean) * weight / sqrt(running_var + eps) + bias`` (Ioffe and Szegedy,
    2015); it and the activation are computed in float32 (float64 for float64) and rounded once.

    Args:
        x: feature map, as for :func:`channel_stats`. Gradients are not followed. One with gaps or overlaps
            in memory, such as a slice, is copied first.
        running_mean: (C,), floating point, on the device of ``x``.
        running_var: (C,), likewise; not negative.
        weight: (C,), likewise; ``None`` for ones.
        bias: (C,), likewise; ``None`` for zeros.
        eps: added to the variance.
        act: what is applied to the normalized map: ``identity``, ``relu``, ``relu6``, ``gelu`` (by erf),
            ``silu`` or ``hardswish``.
        channel_dim: dimension of the channels; may be negative.
        sample_dim: dimension of the samples; may be negative.
        activation: ``σ`` of the statistics, as for :func:`channel_stats`; it has nothing to do with ``act``.
        out: statistics to accumulate into; they are changed in place and returned.
        backend: ``auto``, or a name from :func:`available_backends`, which then never falls back.

    Returns:
        ``act(batch_norm(x))``, with the shape, dtype and memory layout of ``x``, and the statistics of ``x``.

    Raises:
        InvalidInputError: wrong type, rank, dtype, dimension or activation, an empty ``x``, an ``out`` or
            parameters that do not fit.
        BackendUnavailable: the backend asked for cannot run this call.
    """
    channel_dim, sample_dim = check_map(x, channel_dim, sample_dim, activation, out)
    if act not in OUTPUT_ACTIVATION_CODES:
        raise InvalidInputError(f"act is {act!r}; known are {', '.join(OUTPUT_ACTIVATION_CODES)}")
    parameters = running_mean, running_var, weight, bias
    _check_parameters(x, parameters, channel_dim)
    if is_plain(x, *(p for p in parameters if p is not None)):
        norm = _as_backends_take_it(parameters, eps)
        stats = out
        if stats is None:
            state = torch.empty(len(ROWS), x.shape[channel_dim], dtype=torch.float64, device=x.device)
            stats = ChannelStats(state, activation)
        accumulate = out is not None
        y = fused_pass(x, norm, act, channel_dim, sample_dim, activation, backend, stats.state, accumulate)
        return y, stats
    check_backend_name(backend)
    call = (
        x.detach(), running_mean, running_var, weight, bias, eps, act, channel_dim, sample_dim, activation, backend,
    )  # fmt: skip
    if out is not None:
        return torch.ops.idap.bn_act_stats_(out.state, *call), out
    y, state = torch.ops.idap.bn_act_stats(*call)
    return y, ChannelStats(state, activation)


def prepared(
    x: Tensor, parameters: tuple[Tensor | None, ...], eps: float, channel_dim: int = 1
) -> BatchNorm | None:
    """A batch norm for :func:`fused_pass`, made once for many maps like ``x``; ``None`` unless all are plain tensors.

    Raises:
        InvalidInputError: the parameters (running mean and variance, weight, bias) do not fit.
    """
    _check_parameters(x, parameters, channel_dim)
    if not is_plain(x, *(p for p in parameters if p is not None)):
        return None
    return _as_backends_take_it(parameters, eps)


def _check_parameters(x: Tensor, parameters: tuple[Tensor | None, ...], channel_dim: int) -> None:
    channels = x.shape[channel_dim]
    for name, parameter in zip(("running_mean", "running_var", "weight", "bias"), parameters):
        if parameter is None and not name.startswith("running"):
            continue
        check_tensor(parameter, name)  # type: ignore[arg-type]
        assert parameter is not None
        if parameter.shape != (channels,):
            raise InvalidInputError(
                f"{name} has shape {tuple(parameter.shape)}; x has {channels} channels: it must be ({channels},)"
            )
        if parameter.device != x.device:
            raise InvalidInputError(
                f"{name} is on {parameter.device}, x on {x.device}: they must be on one device"
            )


def _as_backends_take_it(parameters: tuple[Tensor | None, ...], eps: float) -> BatchNorm:
    """The parameters contiguous and of one dtype."""
    dtypes = {t.dtype for t in parameters if t is not None}
    one = torch.float64 if torch.float64 in dtypes else torch.float32
    ready: list[Tensor | None] = []
    for t in parameters:
        if t is not None:
            t = materialized(t.detach()).contiguous()
            t = t.to(one) if len(dtypes) > 1 else t
        ready.append(t)
    mean, var, weight, bias = ready
    assert mean is not None
    assert var is not None
    return BatchNorm(mean, var, weight, bias, float(eps))


def fused_pass(
    x: Tensor,
    norm: BatchNorm,
    act: str,
    channel_dim: int,
    sample_dim: int,
    activation: str,
    backend: str,
    state: Tensor,
    accumulate: bool,
) -> Tensor:
    """``act(norm(x))``; the statistics go into ``state``. Arguments are right, and plain tensors."""
    module = select(x, backend)
    x = materialized(x.detach() if x.requires_grad else x)
    y = torch.empty_like(x)
    if x.stride() != y.stride():  # gaps or overlaps in memory
        x = torch.empty_like(y).copy_(x)
    module.bn_act_stats(x, norm, act, y, channel_dim, sample_dim, activation, state, accumulate)
    return y


@torch.library.custom_op("idap::bn_act_stats", mutates_args=())
def _bn_act_stats_op(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    channel_dim: int,
    sample_dim: int,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    state = torch.empty(len(ROWS), x.shape[channel_dim], dtype=torch.float64, device=x.device)
    norm = _as_backends_take_it((mean, var, weight, bias), eps)
    return fused_pass(x, norm, act, channel_dim, sample_dim, activation, backend, state, False), state


@_bn_act_stats_op.register_fake
def _(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    channel_dim: int,
    sample_dim: int,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((len(ROWS), x.shape[channel_dim]), dtype=torch.float64)


@torch.library.custom_op("idap::bn_act_stats_", mutates_args=("state",))
def _bn_act_stats_update_op(
    state: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    channel_dim: int,
    sample_dim: int,
    activation: str,
    backend: str,
) -> Tensor:
    norm = _as_backends_take_it((mean, var, weight, bias), eps)
    return fused_pass(x, norm, act, channel_dim, sample_dim, activation, backend, state, True)


@_bn_act_stats_update_op.register_fake
def _(
    state: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    channel_dim: int,
    sample_dim: int,
    activation: str,
    backend: str,
) -> Tensor:
    return torch.empty_like(x)
