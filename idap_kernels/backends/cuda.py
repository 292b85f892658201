"""The compiled CUDA kernels: one launch a call, on the caller's stream, no host synchronisation."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..build_info import extension_missing
from ..dispatch import ACTIVATION_CODES, DTYPE_CODES, OUTPUT_ACTIVATION_CODES, BatchNorm
from . import reference
from .self_check import self_check

_native: Any
try:
    from .. import _cuda as _native  # type: ignore[attr-defined,no-redef]
except ImportError as error:
    _native = None
    _import_error: ImportError | None = error
else:
    _import_error = None

OLDEST_CAPABILITY = (7, 5)
_INSUFFICIENT_DRIVER = 35  # cudaErrorInsufficientDriver
_NO_DEVICE = 100  # cudaErrorNoDevice
_NO_KERNEL_IMAGE = 209  # cudaErrorNoKernelImageForDevice


class _Workspace:
    """Memory that the kernels borrow, with what a native call takes: addresses and sizes."""

    def __init__(self, scratch: int, tickets: int, device: int) -> None:
        where = torch.device("cuda", device)
        self.scratch = torch.empty(scratch, dtype=torch.uint8, device=where)  # any content
        self.tickets = torch.zeros(tickets, dtype=torch.int32, device=where)  # zero between launches
        self.lent = self.scratch.data_ptr(), scratch, self.tickets.data_ptr(), tickets


# By (device, stream): launches on one stream follow each other, so they can share.
_workspaces: dict[tuple[int, int], _Workspace] = {}
_device_reasons: dict[int, str | None] = {}


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@cache
def unavailable() -> str | None:
    if _native is None:
        return extension_missing("_cuda", _import_error)
    count, (code, name, text) = _native.devices()
    if code == _INSUFFICIENT_DRIVER:
        driver = _native.driver_version()
        if driver == 0:
            return "no NVIDIA driver was found on this machine"
        return (
            f"the NVIDIA driver is too old: it supports CUDA {_version(driver)}, the kernels were built with "
            f"CUDA {_version(_native.runtime_version())}. Update the driver, or build with an older toolkit "
            "(CUDA_HOME)"
        )
    if code == _NO_DEVICE or (code == 0 and count == 0):
        return "the driver shows no NVIDIA GPU (is CUDA_VISIBLE_DEVICES set?)"
    if code != 0:
        return f"the CUDA runtime cannot start: {name}: {text}"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} cannot use the GPU: install a CUDA build of torch"
    reasons = [_device_unfit(i) for i in range(count)]
    if all(reasons):
        return "; ".join(f"GPU {i}: {reason}" for i, reason in enumerate(reasons))
    return None


def architectures() -> str:
    """What the binary was compiled for, such as ``75;80;90;120+PTX``; the last also runs on newer GPUs."""
    return str(_native.archs())


def versions() -> dict[str, str]:
    """CUDA versions: of the runtime linked in, and the newest that the driver supports."""
    driver = _native.driver_version()
    return {"runtime": _version(_native.runtime_version()), "driver": _version(driver) if driver else "none"}


def _device_unfit(index: int) -> str | None:
    """Why this GPU cannot run the kernels, as far as the driver can tell."""
    name, major, minor, (code, error, text) = _native.device_info(index)
    if code:
        return f"the driver cannot describe it: {error}: {text}"
    if (major, minor) < OLDEST_CAPABILITY:
        return f"{name} is sm_{major}{minor}, older than sm_75"
    return None


def _device_broken(index: int) -> str | None:
    """Why the kernels cannot be trusted on this GPU; its first call finds out, and it is remembered."""
    if index in _device_reasons:
        return _device_reasons[index]
    if torch.cuda.is_current_stream_capturing():
        return None  # loading modules and comparing results are not allowed now
    reason = _device_unfit(index)
    if reason is None:
        code, error, text = _native.kernels_load(index)
        if code == _NO_KERNEL_IMAGE:
            name, major, minor, _ = _native.device_info(index)
            reason = (
                f"{name} is sm_{major}{minor}, the kernels were compiled for {architectures()}: build again "
                f"with IDAP_CUDA_ARCHS={major}{minor}"
            )
        elif code:
            reason = f"the kernels do not load: {error}: {text}"
        else:
            reason = self_check(sys.modules[__name__], torch.device("cuda", index))  # type: ignore[arg-type]
    _device_reasons[index] = reason
    return reason


def refuses(x: Tensor) -> str | None:
    if x.device.type != "cuda":
        return f"the tensor is on {x.device}, not on a CUDA GPU"
    if x.dim() > 6:
        return f"the tensor has {x.dim()} dimensions; the kernels take 6"
    return _device_broken(x.device.index)


def _launch(device: int, call: Any, *args: Any) -> None:
    """Run a native call with the workspace of the current stream, made larger when the call asks."""
    stream = torch._C._cuda_getCurrentRawStream(device)  # the address alone, without an object around it
    # A graph may be replayed on any stream beside eager calls: what it uses must be its own. Allocated
    # during the capture, the workspace belongs to the graph, and zeroing it is part of every replay.
    shared = not torch.cuda.is_current_stream_capturing()
    workspace = _workspaces.get((device, stream)) if shared else None
    lent = workspace.lent if workspace else (0, 0, 0, 0)
    wanted = call(*args, *lent, device, stream)
    if wanted is None:
        return
    least = (1 << 20, 1 << 12) if shared else (1, 1)
    scratch, tickets = (max(n) for n in zip(least, lent[1::2], wanted))
    workspace = _Workspace(scratch, tickets, device)
    if shared:
        _workspaces[device, stream] = workspace
    call(*args, *workspace.lent, device, stream)


def _map_arguments(
    x: Tensor, channel_dim: int, sample_dim: int, activation: str, state: Tensor, accumulate: bool
) -> tuple[Any, ...]:
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
    )


def channel_stats(
    x: Tensor, channel_dim: int, sample_dim: int, activation: str, state: Tensor, accumulate: bool
) -> None:
    _launch(
        x.device.index,
        _native.channel_stats,
        *_map_arguments(x, channel_dim, sample_dim, activation, state, accumulate),
    )


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
    if x.dtype is torch.float64:  # too rare for kernels that everybody would have to compile
        reference.bn_act(x, norm, act, y, channel_dim)
        channel_stats(x, channel_dim, sample_dim, activation, state, accumulate)
        return
    _launch(
        x.device.index,
        _native.bn_act_stats,
        *_map_arguments(x, channel_dim, sample_dim, activation, state, accumulate),
        y.data_ptr(),
        norm.mean.data_ptr(),
        norm.var.data_ptr(),
        0 if norm.weight is None else norm.weight.data_ptr(),
        0 if norm.bias is None else norm.bias.data_ptr(),
        DTYPE_CODES[norm.mean.dtype],
        norm.eps,
        OUTPUT_ACTIVATION_CODES[act],
    )


def pair_stats(x: Tensor, y: Tensor, row_dims: int, out: Tensor) -> None:
    _launch(
        x.device.index,
        _native.pair_stats,
        x.data_ptr(),
        y.data_ptr(),
        DTYPE_CODES[x.dtype],
        x.shape,
        x.stride(),
        y.stride(),
        row_dims,
        out.data_ptr(),
    )


def filter_norms(weights: list[Tensor], dim: int, out: Tensor) -> None:
    table = []
    address = out.data_ptr()
    for w in weights:
        table.append((w.data_ptr(), DTYPE_CODES[w.dtype], w.shape, w.stride(), dim % w.dim(), address))
        address += 8 * w.shape[dim]
    _native.filter_norms(table, out.device.index, torch.cuda.current_stream(out.device).cuda_stream)
