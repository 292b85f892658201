"""The compiled CPU kernels: C++ with OpenMP, the instruction set chosen at run time."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch  # before the extension: both then share torch's OpenMP runtime
from torch import Tensor

from ..build_info import extension_missing
from ..dispatch import ACTIVATION_CODES, DTYPE_CODES, OUTPUT_ACTIVATION_CODES, BatchNorm

_native: Any
try:
    from .. import _cpu as _native  # type: ignore[attr-defined,no-redef]
except ImportError as error:
    _native = None
    _import_error: ImportError | None = error
else:
    _import_error = None


@cache
def unavailable() -> str | None:
    if _native is None:
        return extension_missing("_cpu", _import_error)
    try:
        _native.isa()
    except RuntimeError as error:  # IDAP_ISA names a set that is not here
        return str(error)
    return None


def isa() -> str:
    """The instruction set in use: ``avx512``, ``avx2`` or ``portable``."""
    return str(_native.isa())


def uses_openmp() -> bool:
    """Whether the extension was compiled with OpenMP."""
    return bool(_native.openmp())


def refuses(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"the tensor is on {x.device}, not on the CPU"
    if x.dim() > 6:
        return f"the tensor has {x.dim()} dimensions; the kernels take 6"
    return None


def _map_arguments(
    x: Tensor, channel_dim: int, sample_dim: int, activation: str, state: Tensor, accumulate: bool
) -> tuple[object, ...]:
    return (
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        x.shape,
        x.stride(),
        channel_dim,
        sample_dim,
        ACTIVATION_CODES[activation],
        accumulate,
        state.data_ptr(),
        torch.get_num_threads(),
    )


def channel_stats(
    x: Tensor, channel_dim: int, sample_dim: int, activation: str, state: Tensor, accumulate: bool
) -> None:
    _native.channel_stats(*_map_arguments(x, channel_dim, sample_dim, activation, state, accumulate))


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
    _native.bn_act_stats(
        *_map_arguments(x, channel_dim, sample_dim, activation, state, accumulate),
        y.data_ptr(),
        OUTPUT_ACTIVATION_CODES[act],
        DTYPE_CODES[norm.mean.dtype],
        norm.mean.data_ptr(),
        norm.var.data_ptr(),
        0 if norm.weight is None else norm.weight.data_ptr(),
        0 if norm.bias is None else norm.bias.data_ptr(),
        norm.eps,
    )


def pair_stats(x: Tensor, y: Tensor, row_dims: int, out: Tensor) -> None:
    _native.pair_stats(
        x.data_ptr(),
        y.data_ptr(),
        DTYPE_CODES[x.dtype],
        x.shape,
        x.stride(),
        y.stride(),
        row_dims,
        out.data_ptr(),
        torch.get_num_threads(),
    )


def filter_norms(weights: list[Tensor], dim: int, out: Tensor) -> None:
    table = []
    address = out.data_ptr()
    for w in weights:
        table.append((w.data_ptr(), DTYPE_CODES[w.dtype], w.shape, w.stride(), dim % w.dim(), address))
        address += 8 * w.shape[dim]
    _native.filter_norms(table, torch.get_num_threads())
