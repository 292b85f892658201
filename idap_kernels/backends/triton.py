"""The Triton kernels: compiled where they run; one launch a call, on the caller's stream, no host synchronisation.

Triton itself is imported at the first question about this backend. Kernels are compiled at their first use, for what
``triton_plan`` compiles in, and kept on disk by Triton; a new batch size compiles nothing. Where ``TRITON_INTERPRET=1``
was set before, Triton runs them in Python on CPU tensors, and only there.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import struct
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..dispatch import ACTIVATION_CODES, DTYPE_CODES, OUTPUT_ACTIVATION_CODES, BatchNorm
from ..errors import BackendUnavailable
from . import triton_plan as plans
from .self_check import self_check

OLDEST_TRITON = (3, 3)
OLDEST_CAPABILITY = (7, 5)
TUNE_VARIABLE = "IDAP_TRITON_TUNE"
_INTERPRETER_PROGRAMS = 1  # "multiprocessors" of the interpreter, which runs one program after the other

_TABLES = 16  # tables of layers kept

# Memory the kernels borrow, by (device, stream): launches on one stream follow each other, so they can
# share. [scratch, float64, any content; tickets, int32, zero between launches]
_workspaces: dict[tuple[int, int], list[Tensor]] = {}
_tables: OrderedDict[tuple[Any, ...], tuple[Tensor, int]] = OrderedDict()
_device_reasons: dict[int, str | None] = {}
_tuned: dict[Path, dict[str, plans.Config]] = {}


@cache
def _import_kernels() -> tuple[Any, str | None]:
    """The module of the kernels, or why there is none."""
    try:
        import triton

        numbers = tuple(int(part) for part in triton.__version__.split(".")[:2])
        if numbers < OLDEST_TRITON:
            return (
                None,
                f"Triton {triton.__version__} is too old: 3.3 or newer is needed (torch 2.7 brings it)",
            )
        return importlib.import_module(".triton_kernels", __package__), None
    except Exception as error:
        return None, f"Triton does not import: {type(error).__name__}: {error}"


@cache
def interpreting() -> bool:
    """Whether Triton runs the kernels in Python, on CPU tensors; decided at its first import."""
    if os.environ.get("TRITON_INTERPRET", "").lower() not in ("1", "true", "on", "yes", "y", "t"):
        return False
    kernels, _ = _import_kernels()
    return kernels is not None and type(kernels.channel_kernel).__name__ == "InterpretedFunction"


def version() -> str:
    """The version of Triton."""
    import triton

    return str(triton.__version__)


@cache
def unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (its wheels are for Linux)"
    if not interpreting():  # what needs no import first: it takes most of a second
        if not torch.cuda.is_available():
            return _no_gpu()
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is no CUDA build, and the kernels are written for NVIDIA GPUs"
        reasons = [_device_unfit(i) for i in range(torch.cuda.device_count())]
        if not reasons:
            return _no_gpu()
        if all(reasons):
            return "; ".join(f"GPU {i}: {reason}" for i, reason in enumerate(reasons))
    return _import_kernels()[1]


def _no_gpu() -> str:
    """Why torch finds no GPU, in words."""
    hint = "; with TRITON_INTERPRET=1 the kernels run, slowly, on CPU tensors"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build: install one{hint}"
    try:
        torch.cuda.init()
    except Exception as error:
        return f"torch finds no usable GPU: {str(error).strip().splitlines()[0]}{hint}"
    return f"torch finds no usable GPU{hint}"


def _device_unfit(index: int) -> str | None:
    """Why this GPU cannot run the kernels, as far as torch can tell."""
    properties = torch.cuda.get_device_properties(index)
    if (properties.major, properties.minor) < OLDEST_CAPABILITY:
        return f"{properties.name} is sm_{properties.major}{properties.minor}, older than sm_75"
    return None


def _device_broken(index: int) -> str | None:
    """Why the kernels cannot be trusted on this GPU; its first call finds out, and it is remembered."""
    if index in _device_reasons:
        return _device_reasons[index]
    if torch.cuda.is_current_stream_capturing():
        return None  # compiling, loading and comparing results are not allowed now
    reason = _device_unfit(index)
    if reason is None:
        reason = self_check(sys.modules[__name__], torch.device("cuda", index))  # type: ignore[arg-type]
    # A kernel that does not compile leaves its own reason.
    _device_reasons[index] = _device_reasons.get(index) or reason
    return _device_reasons[index]


def refuses(x: Tensor) -> str | None:
    if interpreting():
        if x.device.type != "cpu":
            return f"TRITON_INTERPRET is set, and the tensor is on {x.device}, not on the CPU"
    elif x.device.type != "cuda":
        return f"the tensor is on {x.device}, not on a CUDA GPU"
    if x.dim() > 6:
        return f"the tensor has {x.dim()} dimensions; the kernels take 6"
    return None if interpreting() else _device_broken(x.device.index)


@cache
def _multiprocessors(index: int | None) -> int:
    if index is None:
        return _INTERPRETER_PROGRAMS
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def _capturing() -> bool:
    return not interpreting() and torch.cuda.is_current_stream_capturing()


def _stream_key(device: torch.device) -> tuple[int, int]:
    if interpreting():
        return -1, 0
    return device.index, torch.cuda.current_stream(device).cuda_stream


def _workspace(device: torch.device, scratch: int, tickets: int) -> list[Tensor]:
    """The workspace of the current stream, made larger when the call asks."""
    # A graph may be replayed on any stream beside eager calls: what it uses must be its own. Allocated
    # during the capture, the workspace belongs to the graph, and zeroing it is part of every replay.
    shared = not _capturing()
    key = _stream_key(device)
    have = _workspaces.get(key) if shared else None
    if have is not None and have[0].numel() >= scratch and have[1].numel() >= tickets:
        return have
    if shared:
        scratch, tickets = max(scratch, 1 << 17), max(tickets, 1 << 12)
    if have is not None:
        scratch, tickets = max(scratch, have[0].numel()), max(tickets, have[1].numel())
    made = [
        torch.empty(max(scratch, 1), dtype=torch.float64, device=device),
        torch.zeros(max(tickets, 1), dtype=torch.int32, device=device),
    ]
    if shared:
        _workspaces[key] = made
    return made


def _launch(
    device: torch.device,
    kernel: Any,
    programs: int,
    warps: int,
    registers: int | None,
    *args: Any,
    **constants: Any,
) -> None:
    """Run a kernel. One that does not compile or load takes the backend out of service on its GPU.

    Raises:
        BackendUnavailable: it did not start. Nothing was written.
    """
    other = device.type == "cuda" and device.index != torch.cuda.current_device()
    try:
        with torch.cuda.device(device) if other else nullcontext():
            kernel[(programs,)](*args, **constants, num_warps=warps, maxnreg=registers, enable_fp_fusion=True)
    except Exception as error:
        if interpreting():
            raise
        text = " ".join(str(error).split())
        reason = f"a kernel did not compile or start: {type(error).__name__}: {text[:500]}"
        if not _capturing():  # where nothing can be compiled or loaded; that says nothing of the kernel
            _device_reasons[device.index] = reason
        raise BackendUnavailable(f"backend 'triton' stopped: {reason}") from error


def channel_stats(
    x: Tensor, channel_dim: int, sample_dim: int, activation: str, state: Tensor, accumulate: bool
) -> None:
    _channel_kernel(x, None, None, None, channel_dim, sample_dim, activation, state, accumulate)


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
    _channel_kernel(x, norm, act, y, channel_dim, sample_dim, activation, state, accumulate)


def _channel_kernel(
    x: Tensor,
    norm: BatchNorm | None,
    act: str | None,
    y: Tensor | None,
    channel_dim: int,
    sample_dim: int,
    activation: str,
    state: Tensor,
    accumulate: bool,
) -> None:
    """Statistics of ``x``; with a ``norm``, also ``y``."""
    shape, stride = tuple(x.shape), x.stride()
    what = (
        channel_dim,
        sample_dim,
        x.element_size(),
        x.data_ptr() % 16 == 0 and (y is None or y.data_ptr() % 16 == 0),
        _multiprocessors(x.device.index),
    )
    parameters: tuple[Tensor | int | None, ...] = (None,) * 6
    if norm is not None:
        parameters = (*norm[:4], *struct.unpack("<ii", struct.pack("<d", norm.eps)))

    def plan(config: plans.Config) -> plans.ChannelPlan:
        return plans.plan_channel_stats(shape, stride, *what, config, activation, act)

    def run(config: plans.Config, y: Tensor | None, state: Tensor, accumulate: bool) -> None:
        p = plan(config)
        scratch, tickets = _workspace(x.device, p.scratch, p.tickets)
        along = p.vec if p.rows else 1  # the unit of what runs along the positions
        s0, *outer = p.strides
        _launch(
            x.device,
            _import_kernels()[0].channel_kernel,
            p.programs,
            p.warps,
            p.registers,
            x,
            scratch,
            tickets,
            state,
            y,
            *parameters,
            shape[sample_dim],
            shape[channel_dim] // (p.vec if p.columns else 1),
            p.positions // along,
            stride[sample_dim] // p.vec,
            stride[channel_dim] // along,
            p.sizes[0] // along,
            *p.sizes[1:],
            s0 if p.rows else s0 // p.vec,
            *[s // p.vec for s in outer],
            p.tiles,
            p.sample_blocks,
            p.per_block,
            p.pieces,
            p.piece // along,
            int(accumulate),
            ACTIVATION=ACTIVATION_CODES[activation],
            ACT=None if act is None else OUTPUT_ACTIVATION_CODES[act],
            **p.constants(),
        )

    def try_out(config: plans.Config) -> None:
        run(config, None if y is None else torch.empty_like(y), torch.empty_like(state), False)

    config = plans.DEFAULT
    if TUNE_VARIABLE in os.environ:
        p = plan(config)
        op = "channel_stats" if norm is None else f"bn_act_stats {act} {norm.mean.dtype}"
        key = (op, x.dtype, shape[channel_dim], p.positions, activation, p.constants())
        config = _tuned_config(x.device, key, try_out)
    run(config, y, state, accumulate)


def pair_stats(x: Tensor, y: Tensor, row_dims: int, out: Tensor) -> None:
    shape = tuple(x.shape)
    aligned = x.data_ptr() % 16 == 0 and y.data_ptr() % 16 == 0
    what = (row_dims, x.element_size(), aligned, _multiprocessors(x.device.index))

    def plan(config: plans.Config) -> plans.PairPlan:
        return plans.plan_pair_stats(shape, x.stride(), y.stride(), *what, config)

    def run(config: plans.Config, out: Tensor) -> None:
        p = plan(config)
        scratch, tickets = _workspace(x.device, p.scratch, p.tickets)
        _launch(
            x.device,
            _import_kernels()[0].pair_kernel,
            p.programs,
            p.warps,
            None,
            x,
            y,
            scratch,
            tickets,
            out,
            p.rows,
            p.elements // p.vec,
            p.pieces,
            p.piece // p.vec,
            *p.row_sizes[:4],
            *[s // p.vec for s, _ in p.row_strides],
            *[s // p.vec for _, s in p.row_strides],
            p.sizes[0] // p.vec,
            *p.sizes[1:4],
            p.strides[0][0],
            *[s // p.vec for s, _ in p.strides[1:]],
            p.strides[0][1],
            *[s // p.vec for _, s in p.strides[1:]],
            **p.constants(),
        )

    config = plans.DEFAULT
    if TUNE_VARIABLE in os.environ:
        p = plan(config)
        key = ("pair_stats", x.dtype, p.elements, p.constants())
        config = _tuned_config(x.device, key, lambda c: run(c, torch.empty_like(out)))
    run(config, out)


def filter_norms(weights: list[Tensor], dim: int, out: Tensor) -> None:
    device = out.device
    layers = tuple((w.data_ptr(), w.dtype, tuple(w.shape), w.stride()) for w in weights)
    key = (_stream_key(device), dim, layers)
    # A graph keeps a table of its own, which every replay writes: one that is kept here may be freed.
    kept = not _capturing()
    table, programs = _tables.get(key, (None, 0)) if kept else (None, 0)
    if table is None:
        table, programs = _layer_table(layers, dim, device)
        if kept:
            _tables[key] = table, programs
            while len(_tables) > _TABLES:
                _tables.popitem(last=False)
    kernel = _import_kernels()[0].filter_kernel
    _launch(device, kernel, programs, 4, None, table, out, len(layers), **plans.FILTER_CONSTANTS)


def _layer_table(
    layers: tuple[tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]], ...],
    dim: int,
    device: torch.device,
) -> tuple[Tensor, int]:
    """The layers on the device, and the programs that they need. The numbers travel as arguments of a small kernel
    for each layer: no copy from the host, nothing to wait for."""
    table = torch.empty(len(layers) * plans.ENTRY_WORDS, dtype=torch.int64, device=device)
    kernel = _import_kernels()[0].entry_kernel
    first_filter = first_program = 0
    for i, (address, dtype, shape, stride) in enumerate(layers):
        e = plans.plan_filters(shape, stride, dim)
        _launch(
            device, kernel, 1, 1, None, table, i, address, DTYPE_CODES[dtype], e.dims, first_filter, e.filters,
            e.filter_stride, first_program, e.elements, *e.sizes, *e.strides,
        )  # fmt: skip
        first_filter += e.filters
        first_program += e.programs
    return table, first_program


def _tuned_config(
    device: torch.device, key: tuple[Any, ...], run: Callable[[plans.Config], None]
) -> plans.Config:
    """The fastest configuration for a key, from the file of ``IDAP_TRITON_TUNE``, or measured now and kept there.

    Results of different configurations differ in their last bits; with one file they stay the same.
    """
    path = Path(os.environ[TUNE_VARIABLE]).expanduser()
    known = _tuned.setdefault(path, {})
    if not known:
        known.update(_read_tuned(path))
    gpu = "interpreter" if interpreting() else torch.cuda.get_device_name(device)
    name = " ".join(str(part) for part in (gpu, *key))
    if name not in known:
        if _capturing():
            return plans.DEFAULT
        times = {config: _time(device, run, config) for config in plans.CANDIDATES}
        known[name] = min(times, key=lambda config: times[config])
        path.parent.mkdir(parents=True, exist_ok=True)
        # Others may have measured meanwhile.
        merged = {**_read_tuned(path), **known}
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(
            json.dumps({k: asdict(v) for k, v in merged.items()}, indent=1), encoding="utf-8"
        )
        temporary.replace(path)
    return known[name]


def _read_tuned(path: Path) -> dict[str, plans.Config]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {name: plans.Config(**values) for name, values in data.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # not there yet, or not ours: measured again


def _time(device: torch.device, run: Callable[[plans.Config], None], config: plans.Config) -> float:
    """Milliseconds of a run: the best of ten after the first; infinite where it does not compile or start."""
    try:
        run(config)
    except BackendUnavailable:
        _device_reasons[device.index] = None  # the configuration was at fault, not the kernel
        return float("inf")
    times = []
    for _ in range(1 if interpreting() else 10):
        if interpreting():
            begin = time.perf_counter()
            run(config)
            times.append(1e3 * (time.perf_counter() - begin))
        else:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.device(device):
                start.record()
                run(config)
                end.record()
                end.synchronize()
            times.append(start.elapsed_time(end))
    return min(times)
