"""The CUDA kernels, run thread by thread on the host, against the float64 reference; and their plans.

The same .cu files that nvcc compiles are compiled by the host's compiler with
``cuda_emulation/emulation.h`` in the place of the CUDA headers.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from idap_kernels.backends import reference
from idap_kernels.dispatch import ACTIVATION_CODES, DTYPE_CODES, OUTPUT_ACTIVATION_CODES, BatchNorm

from .common import SHAPES, TOLERANCE, assert_state_close, layouts

ROOT = Path(__file__).parents[2]
KERNELS = [
    *["channel_rows", "channel_columns", "bn_act_rows", "bn_act_columns", "channel_stats"],
    *["pair_stats", "filter_norms"],
]
FLAGS = ["-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-fPIC", "-Wno-unknown-pragmas"]
THREADS = 256
QUANTITIES = 9

ROWS, PIECES, COLUMNS = 0, 1, 2
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
MEAN, M2, ACT_SQ, ACT_NORM, POSITIVE, MIN, MAX = 2, 3, 5, 6, 8, 9, 10

CHANNEL_FIELDS = [
    *[
        "shape",
        "vec",
        "lanes",
        "tile",
        "tiles",
        "samples_per_block",
        "sample_blocks",
        "pieces",
        "piece",
        "slices",
    ],
    *["group_samples", "group_pieces", "groups_per_row", "groups", "blocks", "tickets", "scratch"],
    *["samples", "channels", "positions"],
]
PAIR_FIELDS = ["vec", "lanes", "pieces", "piece", "blocks", "tickets", "scratch", "rows", "elements"]


def _ints(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


class Guarded:
    """Memory between two walls: a write beside it is noticed."""

    WALL = 64

    def __init__(self, count: int, fill: float, dtype: torch.dtype = F64) -> None:
        self.all = torch.full((count + 2 * self.WALL,), 123, dtype=dtype)
        self.inside = self.all[self.WALL : self.WALL + count]
        self.inside.fill_(fill)

    def check(self) -> None:
        assert (self.all[: self.WALL] == 123).all(), "a write in front of the buffer"
        assert (self.all[self.WALL + self.inside.numel() :] == 123).all(), "a write behind the buffer"


class Emulator:
    def __init__(self, path: Path) -> None:
        self.lib = ctypes.CDLL(str(path))
        self.lib.emulation_error.restype = ctypes.c_char_p
        self.lib.emulation_launches.restype = ctypes.c_int64
        self.lib.fast_divide.restype = ctypes.c_uint32
        self.lib.fast_divide.argtypes = [ctypes.c_uint32, ctypes.c_int64]

    def allow(self, *tensors: Tensor) -> None:
        for t in tensors:
            storage = t.untyped_storage()
            self.lib.emulation_allow(ctypes.c_void_p(storage.data_ptr()), ctypes.c_int64(storage.nbytes()))

    def done(self, status: int) -> None:
        assert status == 0, (status, self.lib.emulation_error().decode())

    def channel_plan(
        self,
        sizes: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype = F32,
        channel_dim: int = 1,
        sample_dim: int = 0,
        address: int = 0,
        y_address: int = 0,
    ) -> dict[str, int]:
        out = _ints([0] * len(CHANNEL_FIELDS))
        code = self.lib.channel_plan(
            ctypes.c_void_p(address),
            DTYPE_CODES[dtype],
            len(sizes),
            _ints(sizes),
            _ints(strides),
            channel_dim,
            sample_dim,
            ctypes.c_void_p(y_address),
            out,
        )
        assert code == 0, "no plan"
        return dict(zip(CHANNEL_FIELDS, out))

    def plan_of(
        self, x: Tensor, channel_dim: int = 1, sample_dim: int = 0, y: Tensor | None = None
    ) -> dict[str, int]:
        """The plan of channel_stats, or with ``y`` of bn_act_stats."""
        y_address = 0 if y is None else y.data_ptr()
        return self.channel_plan(
            x.shape, x.stride(), x.dtype, channel_dim, sample_dim, x.data_ptr(), y_address
        )

    def channel_stats(
        self,
        x: Tensor,
        channel_dim: int = 1,
        sample_dim: int = 0,
        activation: str = "relu",
        state: Tensor | None = None,
        order: int = 0,
        counts: Tensor | None = None,
    ) -> Tensor:
        return self._channel_call(
            self.lib.channel_stats, (), x, None, channel_dim, sample_dim, activation, state, order, counts
        )

    def bn_act_stats(
        self,
        x: Tensor,
        norm: BatchNorm,
        act: str = "relu",
        channel_dim: int = 1,
        sample_dim: int = 0,
        activation: str = "relu",
        state: Tensor | None = None,
        order: int = 0,
        counts: Tensor | None = None,
        y_offset: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """y, ``y_offset`` elements past an aligned address, and the statistics."""
        memory = Guarded(x.numel() + y_offset, 77, x.dtype)
        y = torch.as_strided(memory.all, x.shape, x.stride(), Guarded.WALL + y_offset)
        stores = torch.zeros(memory.inside.nbytes, dtype=torch.int16)
        parameters = (ctypes.c_void_p * 4)(*[t.data_ptr() if t is not None else 0 for t in norm[:4]])
        extra = (
            ctypes.c_void_p(y.data_ptr()),
            parameters,
            DTYPE_CODES[norm.mean.dtype],
            ctypes.c_double(norm.eps),
            OUTPUT_ACTIVATION_CODES[act],
        )

        def prepare() -> None:
            self.allow(*(t for t in norm[:4] if t is not None))
            self.lib.emulation_writable(
                ctypes.c_void_p(memory.inside.data_ptr()),
                ctypes.c_int64(memory.inside.nbytes),
                ctypes.c_void_p(stores.data_ptr()),
            )

        result = self._channel_call(
            self.lib.bn_act_stats, extra, x, y, channel_dim, sample_dim, activation, state, order, counts, prepare
        )  # fmt: skip
        memory.check()
        gap = y_offset * x.element_size()
        assert (stores[:gap] == 0).all(), "a store in front of y"
        assert (stores[gap:] == 1).all(), "an element of y was not stored exactly once"
        return y.clone(), result

    def _channel_call(
        self,
        call: Callable[..., int],
        extra: Sequence[object],
        x: Tensor,
        y: Tensor | None,
        channel_dim: int,
        sample_dim: int,
        activation: str,
        state: Tensor | None,
        order: int,
        counts: Tensor | None,
        prepare: Callable[[], None] = lambda: None,
    ) -> Tensor:
        plan = self.plan_of(x, channel_dim, sample_dim, y)
        channels = x.shape[channel_dim]
        target = Guarded(11 * channels, math.nan)
        if state is not None:
            target.inside.copy_(state.flatten())
        scratch = Guarded(plan["scratch"] // 8, math.nan)
        tickets = Guarded(plan["tickets"], 0, torch.int32)
        self.lib.emulation_reset(order)
        self.allow(x, scratch.all)
        if counts is not None:
            assert counts.dtype == torch.int16
            size = ctypes.c_int64(counts.numel())
            self.lib.emulation_watch(
                ctypes.c_void_p(x.untyped_storage().data_ptr()), size, ctypes.c_void_p(counts.data_ptr())
            )
        prepare()
        self.done(
            call(
                ctypes.c_void_p(x.data_ptr()),
                DTYPE_CODES[x.dtype],
                x.dim(),
                _ints(x.shape),
                _ints(x.stride()),
                channel_dim,
                sample_dim,
                ACTIVATION_CODES[activation],
                int(state is not None),
                ctypes.c_void_p(target.inside.data_ptr()),
                *extra,
                ctypes.c_void_p(scratch.inside.data_ptr()),
                ctypes.c_int64(plan["scratch"]),
                ctypes.c_void_p(tickets.inside.data_ptr()),
                ctypes.c_int64(plan["tickets"]),
            )
        )
        assert self.lib.emulation_launches() == 1
        for buffer in (target, scratch, tickets):
            buffer.check()
        assert (tickets.inside == 0).all(), "a ticket was not handed back"
        return target.inside.reshape(11, channels).clone()

    def pair_plan(self, x: Tensor, y: Tensor, row_dims: int) -> dict[str, int]:
        out = _ints([0] * len(PAIR_FIELDS))
        code = self.lib.pair_plan(
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(y.data_ptr()),
            DTYPE_CODES[x.dtype],
            x.dim(),
            _ints(x.shape),
            _ints(x.stride()),
            _ints(y.stride()),
            row_dims,
            out,
        )
        assert code == 0, "no plan"
        return dict(zip(PAIR_FIELDS, out))

    def pair_stats(self, x: Tensor, y: Tensor, row_dims: int, order: int = 0) -> Tensor:
        plan = self.pair_plan(x, y, row_dims)
        out = Guarded(4 * plan["rows"], math.nan)
        scratch = Guarded(plan["scratch"] // 8, math.nan)
        tickets = Guarded(plan["tickets"], 0, torch.int32)
        self.lib.emulation_reset(order)
        self.allow(x, y, scratch.all)
        self.done(
            self.lib.pair_stats(
                ctypes.c_void_p(x.data_ptr()),
                ctypes.c_void_p(y.data_ptr()),
                DTYPE_CODES[x.dtype],
                x.dim(),
                _ints(x.shape),
                _ints(x.stride()),
                _ints(y.stride()),
                row_dims,
                ctypes.c_void_p(out.inside.data_ptr()),
                ctypes.c_void_p(scratch.inside.data_ptr()),
                ctypes.c_int64(plan["scratch"]),
                ctypes.c_void_p(tickets.inside.data_ptr()),
                ctypes.c_int64(plan["tickets"]),
            )
        )
        for buffer in (out, scratch, tickets):
            buffer.check()
        assert (tickets.inside == 0).all(), "a ticket was not handed back"
        return out.inside.reshape(4, -1).clone()

    def filter_norms(self, weights: list[Tensor], dim: int, order: int = 0) -> list[Tensor]:
        n = len(weights)
        outs = [Guarded(w.shape[dim], math.nan) for w in weights]
        self.lib.emulation_reset(order)
        self.allow(*weights)
        pad = [[0] * (6 - w.dim()) for w in weights]
        self.done(
            self.lib.filter_norms(
                n,
                (ctypes.c_void_p * n)(*[w.data_ptr() for w in weights]),
                (ctypes.c_int * n)(*[DTYPE_CODES[w.dtype] for w in weights]),
                (ctypes.c_int * n)(*[w.dim() for w in weights]),
                _ints([v for w, p in zip(weights, pad) for v in [*w.shape, *p]]),
                _ints([v for w, p in zip(weights, pad) for v in [*w.stride(), *p]]),
                (ctypes.c_int * n)(*[dim % w.dim() for w in weights]),
                (ctypes.c_void_p * n)(*[o.inside.data_ptr() for o in outs]),
            )
        )
        for out in outs:
            out.check()
        return [o.inside.clone() for o in outs]


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("the emulation needs g++ on Linux")
    folder = tmp_path_factory.mktemp("cuda_emulation")
    include = [f"-I{Path(__file__).parent / 'cuda_emulation'}", f"-I{ROOT / 'csrc'}"]
    sources = [ROOT / "csrc" / "cuda" / f"{name}.cu" for name in KERNELS]
    sources.append(Path(__file__).parent / "cuda_emulation" / "emulate.cpp")
    objects = [folder / f"{source.stem}.o" for source in sources]
    for start in range(0, len(sources), 2):  # two compilers at a time
        running = [
            subprocess.Popen(
                [compiler, *FLAGS, *include, "-x", "c++", "-c", str(source), "-o", str(target)],
                stderr=subprocess.PIPE,
                text=True,
            )
            for source, target in zip(sources[start : start + 2], objects[start : start + 2])
        ]
        for process in running:
            _, errors = process.communicate()
            assert process.returncode == 0, errors
    library = folder / "libemulation.so"
    subprocess.run([compiler, "-shared", *map(str, objects), "-o", str(library)], check=True)
    return Emulator(library)


def expected(x: Tensor, channel_dim: int = 1, sample_dim: int = 0, activation: str = "relu") -> Tensor:
    state = torch.empty(11, x.shape[channel_dim], dtype=F64)
    reference.channel_stats(x, channel_dim, sample_dim, activation, state, False)
    return state


def assert_states(got: Tensor, want: Tensor, dtype: torch.dtype = F32) -> None:
    """Exact counts and extremes; sums to the accuracy of the type they were added in."""
    exact = [0, 1, POSITIVE, MIN, MAX]
    torch.testing.assert_close(got[exact], want[exact], rtol=0, atol=0, equal_nan=True)
    rtol = 1e-12 if dtype == F64 else 3e-6
    deviation = (want[M2] / want[0]).sqrt().nan_to_num(0, 0, 0)
    error = (got[MEAN] - want[MEAN]).abs()
    agree = (error <= rtol * (deviation + want[MEAN].abs() * (1e-6 if dtype != F64 else 1))) | got[MEAN].eq(
        want[MEAN]
    )
    assert (agree | (got[MEAN].isnan() & want[MEAN].isnan())).all(), (got[MEAN], want[MEAN])
    rest = [r for r in range(11) if r not in [*exact, MEAN]]
    torch.testing.assert_close(got[rest], want[rest], rtol=rtol, atol=1e-30, equal_nan=True)


def randn(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


Layout = Callable[[torch.dtype], tuple[Tensor, int, int]]

# (map, channel_dim, sample_dim) by name; the comment names the shape of work.
LAYOUTS: dict[str, Layout] = {
    "one element": lambda t: (randn(1, 1, dtype=t), 1, 0),
    "one row": lambda t: (randn(1, 1, 1000, dtype=t), 1, 0),
    "7x7": lambda t: (randn(5, 37, 7, 7, dtype=t), 1, 0),  # rows of 8 threads, tiles cut off
    "3 channels of 5": lambda t: (randn(9, 3, 5, dtype=t), 1, 0),  # samples side by side
    "8x8, aligned": lambda t: (randn(6, 10, 8, 8, dtype=t), 1, 0),  # vectors
    "14x14": lambda t: (randn(3, 21, 14, 14, dtype=t), 1, 0),  # 8-byte loads for halves
    "long rows": lambda t: (randn(2, 3, 96, 96, dtype=t), 1, 0),  # pieces
    "odd long rows": lambda t: (randn(2, 2, 71, 73, dtype=t), 1, 0),  # pieces, scalar
    "long piece of batch 1": lambda t: (randn(1, 2, 40000, dtype=t), 1, 0),  # several pieces a row
    "many rows": lambda t: (randn(70, 64, 36, dtype=t), 1, 0),  # several samples a block
    "channels-last": lambda t: (
        randn(3, 20, 11, 13, dtype=t).to(memory_format=torch.channels_last),
        1,
        0,
    ),
    "channels-last, 3 channels": lambda t: (
        randn(2, 3, 33, 35, dtype=t).to(memory_format=torch.channels_last),
        1,
        0,
    ),
    "channels-last, 7x7": lambda t: (randn(3, 70, 7, 7, dtype=t).to(memory_format=torch.channels_last), 1, 0),
    "tokens": lambda t: (randn(2, 197, 48, dtype=t), 2, 0),
    "tokens, odd": lambda t: (randn(2, 131, 37, dtype=t), 2, 0),
    "tokens, time first": lambda t: (randn(90, 3, 40, dtype=t), 2, 1),
    "tokens, many": lambda t: (randn(1, 18000, 30, dtype=t), 2, 0),  # records of records
    "tokens, two samples": lambda t: (randn(2, 9000, 32, dtype=t), 2, 0),  # samples over several groups
    "tokens, many samples": lambda t: (randn(160, 70, 32, dtype=t), 2, 0),  # groups of several samples
    "vectors": lambda t: (randn(33, 300, dtype=t), 1, 0),
    "vectors, transposed": lambda t: (randn(70, 33, dtype=t).T, 1, 0),
    "slice of channels": lambda t: (randn(3, 12, 10, 10, dtype=t)[:, 3:8], 1, 0),
    "slice of positions": lambda t: (randn(2, 5, 20, 22, dtype=t)[:, :, 3:17, 1:20], 1, 0),
    "long slice": lambda t: (randn(2, 2, 60, 70, dtype=t)[:, :, 1:59, 3:67], 1, 0),
    "aligned slice": lambda t: (randn(2, 3, 40, 64, dtype=t)[:, :, 4:36, 8:56], 1, 0),
    "slice of channels-last": lambda t: (
        randn(2, 24, 12, 14, dtype=t).to(memory_format=torch.channels_last)[:, 5:17, 1:11, 2:],
        1,
        0,
    ),
    "off by one element": lambda t: (randn(2 * 6 * 64 + 1, dtype=t)[1:].view(2, 6, 64), 1, 0),
    "every second": lambda t: (randn(3, 8, 20, 18, dtype=t)[:, ::2, ::2, ::3], 1, 0),
    "expanded": lambda t: (randn(1, 5, 1, 9, dtype=t).expand(4, 5, 6, 9), 1, 0),
    "expanded channels": lambda t: (randn(3, 1, 80, dtype=t).expand(3, 6, 80), 1, 0),
    "five dimensions": lambda t: (randn(2, 4, 3, 5, 7, dtype=t).permute(0, 1, 4, 2, 3), 1, 0),
    "six dimensions": lambda t: (randn(2, 3, 4, 5, 6, 7, dtype=t)[:, :, ::2, 1:, ::3, 2:], 1, 0),
    "channels outermost": lambda t: (randn(7, 3, 50, dtype=t), 0, 1),
    "split rows": lambda t: (randn(6, 3, 37, 8, dtype=t), 2, 1),  # positions on both sides of the others
    "split long rows": lambda t: (randn(60, 2, 3, 70, dtype=t), 2, 1),
    "split tokens": lambda t: (randn(20, 3, 17, 24, dtype=t), 3, 1),
    "three runs": lambda t: (randn(5, 3, 6, 4, 7, dtype=t), 3, 1),
    "sample innermost": lambda t: (randn(5, 60, 9, dtype=t), 0, 2),
}


@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_channel_stats_equals_the_reference(emulator: Emulator, layout: str, dtype: torch.dtype) -> None:
    x, channel_dim, sample_dim = LAYOUTS[layout](dtype)
    got = emulator.channel_stats(x, channel_dim, sample_dim)
    assert_states(got, expected(x, channel_dim, sample_dim), dtype)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_channel_stats_on_the_shared_grid(emulator: Emulator, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        for name, (x, dims) in layouts((randn(*shape) * 1.7 + 0.2).to(dtype)).items():
            channel_dim, sample_dim = dims.get("channel_dim", 1) % x.dim(), dims.get("sample_dim", 0)
            got = emulator.channel_stats(x, channel_dim, sample_dim)
            assert_state_close(got, expected(x, channel_dim, sample_dim), TOLERANCE[dtype], f"{name} {shape}")


def test_layouts_reach_every_shape_of_work(emulator: Emulator) -> None:
    seen = set()
    for layout in LAYOUTS.values():
        for dtype in (F32, F64, BF16):
            x, channel_dim, sample_dim = layout(dtype)
            p = emulator.plan_of(x, channel_dim, sample_dim)
            seen.add((p["shape"], p["vec"] > 1))
            seen |= {
                name
                for name, true in {
                    "levels": p["groups"] > 1,
                    "row over groups": p["groups_per_row"] > 1,
                    "pieces": p["shape"] == PIECES and p["pieces"] > 1,
                    "samples": p["samples_per_block"] > THREADS // p["lanes"] // p["tile"],
                    "half vectors": dtype == BF16 and p["shape"] == ROWS and p["vec"] == 4,
                }.items()
                if true
            }
    assert {(s, v) for s in (ROWS, PIECES, COLUMNS) for v in (False, True)} <= seen
    assert {"levels", "row over groups", "pieces", "samples", "half vectors"} <= seen


@pytest.mark.parametrize("activation", ["identity", "gelu", "silu"])
@pytest.mark.parametrize("layout", ["7x7", "long rows", "tokens", "vectors"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_activations(emulator: Emulator, layout: str, activation: str, dtype: torch.dtype) -> None:
    x, channel_dim, sample_dim = LAYOUTS[layout](dtype)
    got = emulator.channel_stats(x, channel_dim, sample_dim, activation)
    assert_states(got, expected(x, channel_dim, sample_dim, activation), dtype)


@pytest.mark.parametrize("layout", ["7x7", "long piece of batch 1", "tokens, many", "many rows"])
def test_bits_do_not_depend_on_the_order_of_threads_and_blocks(emulator: Emulator, layout: str) -> None:
    x, channel_dim, sample_dim = LAYOUTS[layout](F32)
    runs = [emulator.channel_stats(x, channel_dim, sample_dim, order=order) for order in (0, 1, 2)]
    for other in runs[1:]:
        assert torch.equal(runs[0].view(torch.int64), other.view(torch.int64))


READ_ONCE = ["7x7", "long rows", "tokens", "channels-last", "slice of positions", "vectors"]


def assert_read_once(x: Tensor, channel_dim: int, sample_dim: int, counts: Tensor) -> None:
    per_element = counts.view(-1, 4)[:, 0]
    inside = torch.zeros_like(per_element)
    torch.as_strided(inside, x.shape, x.stride(), x.storage_offset()).fill_(1)
    pivots = torch.zeros_like(inside)  # the first element of a channel is read by every block too
    firsts = torch.as_strided(pivots, x.shape, x.stride(), x.storage_offset())
    firsts.movedim((channel_dim, sample_dim), (0, 1))[(slice(None), *[0] * (x.dim() - 1))].fill_(1)
    plain = pivots == 0
    assert torch.equal(per_element[plain], inside[plain])
    assert (per_element[~plain] >= 1).all()


@pytest.mark.parametrize("layout", READ_ONCE)
def test_every_element_is_read_once(emulator: Emulator, layout: str) -> None:
    x, channel_dim, sample_dim = LAYOUTS[layout](F32)
    counts = torch.zeros(x.untyped_storage().nbytes(), dtype=torch.int16)
    emulator.channel_stats(x, channel_dim, sample_dim, counts=counts)
    assert_read_once(x, channel_dim, sample_dim, counts)


@pytest.mark.parametrize("layout", ["7x7", "long rows", "tokens", "vectors", "3 channels of 5"])
def test_accumulation_equals_one_pass_over_everything(emulator: Emulator, layout: str) -> None:
    x, channel_dim, sample_dim = LAYOUTS[layout](F32)
    more = (x * 3 + 100).contiguous()
    state = torch.zeros(11, x.shape[channel_dim], dtype=F64)
    for part in (x, more):
        state = emulator.channel_stats(part, channel_dim, sample_dim, state=state)
    assert_states(state, expected(torch.cat([x, more], sample_dim), channel_dim, sample_dim))


@pytest.mark.parametrize("layout", ["7x7", "8x8, aligned", "long rows", "tokens", "channels-last", "vectors"])
@pytest.mark.parametrize("first", [None, 0.0, 2e4])
def test_variance_survives_a_large_offset(emulator: Emulator, layout: str, first: float | None) -> None:
    x, channel_dim, sample_dim = LAYOUTS[layout](F32)
    x = x + 1e4
    if first is not None:  # the pivot of the call, far from the mean
        x[(0,) * x.dim()] = first
    got, want = (
        emulator.channel_stats(x, channel_dim, sample_dim),
        expected(x, channel_dim, sample_dim),
    )
    error = ((got[M2] - want[M2]) / want[M2]).abs().max()
    assert error < 1e-5
    assert ((got[MEAN] - want[MEAN]) / want[MEAN]).abs().max() < 1e-9


@pytest.mark.parametrize("layout", ["7x7", "long rows", "tokens", "vectors"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_nan_stays_in_its_channel_and_never_counts_as_positive(
    emulator: Emulator, layout: str, activation: str
) -> None:
    x, channel_dim, sample_dim = LAYOUTS[layout](F32)
    x.select(channel_dim, 1).flatten()[0] = 0  # a view of dense maps only; the writes below do the work
    for where in (0, -1):
        at = [where] * x.dim()
        at[channel_dim] = 2
        x[tuple(at)] = math.nan
    got, want = (
        emulator.channel_stats(x, channel_dim, sample_dim, activation),
        expected(x, channel_dim, sample_dim, activation),
    )
    assert_states(got, want)
    clean = [r for r in range(11) if r not in (0, 1, POSITIVE)]
    assert got[clean, 2].isnan().all()
    assert not got[:, [0, 1]].isnan().any()


def test_infinities(emulator: Emulator) -> None:
    x = randn(3, 4, 6, 6)
    x[0, 1, 0, 0] = math.inf
    x[2, 2, 3, 3] = -math.inf
    got = emulator.channel_stats(x)
    want = expected(x)
    assert got[MEAN, 1] == math.inf
    assert got[MEAN, 2] == -math.inf
    torch.testing.assert_close(got[[POSITIVE, MIN, MAX]], want[[POSITIVE, MIN, MAX]], rtol=0, atol=0)
    torch.testing.assert_close(got[:, [0, 3]], want[:, [0, 3]], rtol=3e-6, atol=1e-6)


def test_nan_in_the_state_stays(emulator: Emulator) -> None:
    x = randn(3, 4, 6, 6)
    bad = x.clone()
    bad[1, 2, 3, 4] = math.nan
    state = emulator.channel_stats(x, state=emulator.channel_stats(bad))
    assert state[[MIN, MAX, MEAN], 2].isnan().all()
    assert not state[:, [0, 1, 3]].isnan().any()


def test_constant_channels_have_no_variance(emulator: Emulator) -> None:
    for layout in ("7x7", "tokens", "long rows"):
        x, channel_dim, sample_dim = LAYOUTS[layout](F32)
        x.fill_(0.1)
        got = emulator.channel_stats(x, channel_dim, sample_dim)
        assert (got[M2] <= 1e-12 * got[0]).all()
        assert (got[MIN] == got[MAX]).all()


# --------------------------------------------------------------------------------- bn_act_stats

# Half a unit in the last place of a number rounded to the type, and float32's own errors before that.
ROUNDING = {F32: 2e-6, F16: 2**-11 * 1.01, BF16: 2**-8 * 1.01}
ACTS = list(OUTPUT_ACTIVATION_CODES)


def dense(x: Tensor) -> Tensor:
    """A map without gaps or overlaps, as bn_act_stats hands them to a backend."""
    y = torch.empty_like(x)
    return x if x.stride() == y.stride() else y.copy_(x)


def batch_norm(channels: int, dtype: torch.dtype = F32, given: str = "weight bias") -> BatchNorm:
    mean, spread, weight, bias = randn(4, channels, seed=7)
    weight[::5] = 0
    return BatchNorm(
        mean.to(dtype),
        (spread.square() + 0.1).to(dtype),
        weight.to(dtype) if "weight" in given else None,
        bias.to(dtype) if "bias" in given else None,
        1e-3,
    )


def assert_y(y: Tensor, x: Tensor, norm: BatchNorm, act: str, channel_dim: int) -> None:
    want, ignored = torch.empty_like(x, dtype=F64), torch.empty(11, x.shape[channel_dim], dtype=F64)
    sample_dim = 1 if channel_dim == 0 else 0
    reference.bn_act_stats(x, norm, act, want, channel_dim, sample_dim, "relu", ignored, False)
    assert y.stride() == x.stride()
    torch.testing.assert_close(y.double(), want, rtol=ROUNDING[x.dtype], atol=4e-6, equal_nan=True)
    if x.dtype != F32:  # to nearest: what float32 got wrong before may go the other way, beside ties
        other_way = (y != want.to(y.dtype)) & (want.abs() > 0.01)
        assert other_way.double().mean() < 0.005


def bits(t: Tensor) -> Tensor:
    return t.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[t.element_size()])


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bn_act_stats_equals_the_reference(emulator: Emulator, layout: str, dtype: torch.dtype) -> None:
    x, channel_dim, sample_dim = LAYOUTS[layout](dtype)
    x = dense(x)
    norm = batch_norm(x.shape[channel_dim])
    y, state = emulator.bn_act_stats(x, norm, "relu", channel_dim, sample_dim)
    assert_y(y, x, norm, "relu", channel_dim)
    assert torch.equal(bits(state), bits(emulator.channel_stats(x, channel_dim, sample_dim)))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_bn_act_stats_on_the_shared_grid(emulator: Emulator, dtype: torch.dtype) -> None:
    for i, shape in enumerate(SHAPES):
        for x, dims in layouts((randn(*shape) * 1.7 + 0.2).to(dtype)).values():
            x = dense(x)
            channel_dim, sample_dim = dims.get("channel_dim", 1) % x.dim(), dims.get("sample_dim", 0)
            norm, act = batch_norm(x.shape[channel_dim]), ACTS[i % len(ACTS)]
            y, state = emulator.bn_act_stats(x, norm, act, channel_dim, sample_dim)
            assert_y(y, x, norm, act, channel_dim)
            assert torch.equal(bits(state), bits(emulator.channel_stats(x, channel_dim, sample_dim)))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("layout", ["7x7", "8x8, aligned", "long rows", "tokens", "tokens, odd", "vectors"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_output_activations(emulator: Emulator, layout: str, act: str, dtype: torch.dtype) -> None:
    x, channel_dim, sample_dim = LAYOUTS[layout](dtype)
    x *= 3  # past both ends of relu6 and hardswish
    norm = batch_norm(x.shape[channel_dim])
    for activation in ("relu", "gelu"):  # of the statistics: it has no say in y
        y, state = emulator.bn_act_stats(x, norm, act, channel_dim, sample_dim, activation)
        assert_y(y, x, norm, act, channel_dim)
        plain = emulator.channel_stats(x, channel_dim, sample_dim, activation)
        assert torch.equal(bits(state), bits(plain))


@pytest.mark.parametrize("given", ["weight bias", "weight", "bias", "neither"])
@pytest.mark.parametrize("parameters", [F32, F64, F16, BF16], ids=str)
@pytest.mark.parametrize("layout", ["7x7", "channels-last"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_parameters_of_every_kind(
    emulator: Emulator, layout: str, dtype: torch.dtype, parameters: torch.dtype, given: str
) -> None:
    x, channel_dim, sample_dim = LAYOUTS[layout](dtype)
    norm = batch_norm(x.shape[channel_dim], parameters, given)
    y, _ = emulator.bn_act_stats(x, norm, "identity", channel_dim, sample_dim)
    assert_y(y, x, norm, "identity", channel_dim)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("layout", ["7x7", "8x8, aligned", "long rows", "tokens", "tokens, odd"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_what_is_not_finite_is_written_as_torch_does(
    emulator: Emulator, layout: str, act: str, dtype: torch.dtype
) -> None:
    x, channel_dim, sample_dim = LAYOUTS[layout](dtype)
    plain = BatchNorm(
        *torch.tensor([0.0, 1.0, 1.0, 0.0]).repeat_interleave(x.shape[channel_dim]).chunk(4), 0.0
    )
    flat = x.movedim((channel_dim, sample_dim), (0, 1)).flatten(2)
    for i, value in enumerate((math.nan, math.inf, -math.inf, -0.0, 65504.0)):
        flat[i % flat.shape[0], -1, i] = flat[0, 0, 5 * i] = value
    x = flat.unflatten(2, [n for d, n in enumerate(x.shape) if d not in (channel_dim, sample_dim)])
    x = dense(x.movedim((0, 1), (channel_dim, sample_dim)))
    y, _ = emulator.bn_act_stats(x, plain, act, channel_dim, sample_dim)
    assert y.isnan().any()
    assert y.isinf().any() or act == "relu6"
    assert_y(y, x, plain, act, channel_dim)


@pytest.mark.parametrize("layout", ["8x8, aligned", "14x14", "long rows", "tokens", "vectors"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_alignment_of_either_side_narrows_both(emulator: Emulator, layout: str, dtype: torch.dtype) -> None:
    x, channel_dim, sample_dim = LAYOUTS[layout](dtype)
    norm = batch_norm(x.shape[channel_dim])
    for x_offset, y_offset in ((1, 0), (0, 1), (1, 1), (4, 0), (0, 4), (2, 2)):
        memory = torch.full((x.numel() + x_offset,), math.nan, dtype=dtype)
        moved = torch.as_strided(memory, x.shape, x.stride(), x_offset).copy_(x)
        y, state = emulator.bn_act_stats(moved, norm, "silu", channel_dim, sample_dim, y_offset=y_offset)
        assert_y(y, moved, norm, "silu", channel_dim)
        assert_states(state, expected(x, channel_dim, sample_dim), dtype)


def test_the_plan_minds_the_alignment_of_both_sides(emulator: Emulator) -> None:
    shape, strides = (2, 64, 32, 32), contiguous_strides((2, 64, 32, 32))
    last = [64 * 32 * 32, 1, 32 * 64, 64]
    for dtype, width, narrow in ((F32, 4, 1), (BF16, 8, 4)):
        size = torch.empty((), dtype=dtype).element_size()
        for at in ((64, 64 + size), (64 + size, 64)):
            assert emulator.channel_plan(shape, strides, dtype, address=at[0], y_address=at[1])["vec"] == 1
            assert emulator.channel_plan(shape, last, dtype, address=at[0], y_address=at[1])["vec"] == 1
        assert emulator.channel_plan(shape, strides, dtype, address=64, y_address=72)["vec"] == narrow
        alone = emulator.channel_plan(shape, strides, dtype, address=64)
        assert emulator.channel_plan(shape, strides, dtype, address=64, y_address=128) == alone
        assert alone["vec"] == width


@pytest.mark.parametrize("layout", ["7x7", "long piece of batch 1", "tokens, many", "many rows"])
def test_bn_act_bits_do_not_depend_on_the_order(emulator: Emulator, layout: str) -> None:
    x, channel_dim, sample_dim = LAYOUTS[layout](F32)
    norm = batch_norm(x.shape[channel_dim])
    first, *others = [
        emulator.bn_act_stats(x, norm, "gelu", channel_dim, sample_dim, order=order) for order in (0, 1, 2)
    ]
    for other in others:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, other))


@pytest.mark.parametrize("layout", READ_ONCE)
def test_bn_act_stats_reads_every_element_once(emulator: Emulator, layout: str) -> None:
    x, channel_dim, sample_dim = LAYOUTS[layout](F32)
    x = dense(x)
    counts = torch.zeros(x.untyped_storage().nbytes(), dtype=torch.int16)
    emulator.bn_act_stats(x, batch_norm(x.shape[channel_dim]), "relu", channel_dim, sample_dim, counts=counts)
    assert_read_once(x, channel_dim, sample_dim, counts)


def test_bn_act_stats_accumulates(emulator: Emulator) -> None:
    for layout in ("7x7", "long rows", "tokens"):
        x, channel_dim, sample_dim = LAYOUTS[layout](F32)
        more, norm = (x * 3 + 100).contiguous(), batch_norm(x.shape[channel_dim])
        state = plain = torch.zeros(11, x.shape[channel_dim], dtype=F64)
        for part in (x, more):
            _, state = emulator.bn_act_stats(part, norm, "relu", channel_dim, sample_dim, state=state)
            plain = emulator.channel_stats(part, channel_dim, sample_dim, state=plain)
        assert torch.equal(bits(state), bits(plain))


@pytest.mark.parametrize("layout", ["7x7", "8x8, aligned", "tokens"])
def test_y_survives_a_large_offset(emulator: Emulator, layout: str) -> None:
    x, channel_dim, sample_dim = LAYOUTS[layout](F32)
    x, channels = x + 1e4, x.shape[channel_dim]
    norm = batch_norm(channels)._replace(mean=torch.full((channels,), 1e4))
    y, _ = emulator.bn_act_stats(x, norm, "identity", channel_dim, sample_dim)
    assert_y(y, x, norm, "identity", channel_dim)


# ---------------------------------------------------------------------------------------- plans

# (shape, channel_dim, sample_dim, channels_last) of the benchmark grid
GRID: list[tuple[tuple[int, ...], int, bool]] = [
    *[
        ((b, c, s, s), 1, last)
        for b, c, s in [
            (32, 64, 112), (32, 256, 56), (32, 512, 28), (32, 1024, 14), (32, 2048, 7), (1, 256, 56), (1, 2048, 7),
            (256, 64, 112), (64, 1024, 14), (64, 2048, 7), (1, 3, 1024), (1024, 8192, 1), (1, 1, 1 << 10),
        ]
        for last in (False, True)
    ],
    ((32, 197, 768), 2, False),
    ((8, 512, 3072), 2, False),
    ((16, 4096, 4096), 2, False),
    ((2, 1 << 15, 1 << 16), 1, False),  # 2^32 elements
    ((1024, 8192, 1 << 10), 1, False),
    ((1024, 1 << 20, 64), 2, False),
    ((1, 1, 1 << 33), 1, False),  # 2^33 positions
    ((1, 1 << 33, 2), 2, False),
]  # fmt: skip


def contiguous_strides(shape: Sequence[int]) -> list[int]:
    strides = [1]
    for n in reversed(shape[1:]):
        strides.insert(0, strides[0] * n)
    return strides


def check_plan(p: dict[str, int]) -> None:
    """Every element is dealt out exactly once, no block is without work, the sums fit."""
    assert p["tile"] & (p["tile"] - 1) == 0
    assert p["lanes"] & (p["lanes"] - 1) == 0
    assert 1 <= p["tile"] <= THREADS
    assert (p["tiles"] - 1) * p["tile"] < p["channels"] <= p["tiles"] * p["tile"]
    assert (p["sample_blocks"] - 1) * p["samples_per_block"] < p["samples"]
    assert p["samples"] <= p["sample_blocks"] * p["samples_per_block"]
    units = p["positions"] if p["shape"] == COLUMNS else p["positions"] // p["vec"]
    assert (p["pieces"] - 1) * p["piece"] < units <= p["pieces"] * p["piece"]
    assert p["slices"] == p["sample_blocks"] * p["pieces"]
    assert p["blocks"] == p["tiles"] * p["slices"] <= 1 << 30  # gridDim.x; y and z are not used
    if p["shape"] == ROWS:
        assert p["pieces"] == 1
        assert p["lanes"] <= 32
        assert THREADS % (p["lanes"] * p["tile"]) == 0
    else:
        assert p["samples_per_block"] == 1
    if p["shape"] == COLUMNS:
        assert p["lanes"] * p["vec"] == p["tile"]
        assert 2 * THREADS * p["vec"] <= QUANTITIES * THREADS
        assert p["vec"] == 1 or p["channels"] % p["vec"] == 0
    # a thread's count of positives is 32 bits
    rows_side_by_side = THREADS // p["lanes"] // p["tile"] if p["shape"] == ROWS else 1
    along = {ROWS: p["lanes"], PIECES: THREADS, COLUMNS: THREADS // p["lanes"]}[p["shape"]]
    steps = -(-p["piece"] // along) * p["vec"] * -(-p["samples_per_block"] // rows_side_by_side)
    assert steps < 1 << 32
    # groups of records
    if p["groups_per_row"] > 1:
        assert p["groups"] == p["sample_blocks"] * p["groups_per_row"]
        assert (
            (p["groups_per_row"] - 1) * p["group_pieces"]
            < p["pieces"]
            <= p["groups_per_row"] * p["group_pieces"]
        )
    else:
        assert p["group_pieces"] == p["pieces"]
        assert (p["groups"] - 1) * p["group_samples"] < p["sample_blocks"] <= p["groups"] * p["group_samples"]
    assert p["tickets"] == (p["tiles"] * (p["groups"] + 1) if p["slices"] > 1 else 0)
    records = p["slices"] + (p["groups"] if p["groups"] > 1 else 0)
    assert p["scratch"] == records * p["tiles"] * p["tile"] * QUANTITIES * 8


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize(("shape", "channel_dim", "channels_last"), GRID)
def test_plans_of_the_grid(
    emulator: Emulator, shape: tuple[int, ...], channel_dim: int, channels_last: bool, dtype: torch.dtype
) -> None:
    strides = contiguous_strides(shape)
    if channels_last:
        _, c, h, w = shape
        strides = [c * h * w, 1, w * c, c]
    p = emulator.channel_plan(shape, strides, dtype, channel_dim)
    check_plan(p)
    elements = math.prod(shape)
    size = torch.empty((), dtype=dtype).element_size()
    if elements * size >= 64 << 20:
        assert p["blocks"] >= 256, "too little work at once for a large GPU"
        assert p["scratch"] <= elements * size / 8, "the records weigh against the map"


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_plans_of_anything(emulator: Emulator, data: st.DataObject) -> None:
    sizes = data.draw(
        st.lists(st.sampled_from([1, 2, 3, 7, 8, 49, 64, 100, 197, 1024, 5000]), min_size=2, max_size=5)
    )
    if math.prod(sizes) > 1 << 40:
        sizes = sizes[:2]
    order = data.draw(st.permutations(range(len(sizes))))
    strides, step = [0] * len(sizes), 1
    for d in order:
        strides[d] = step
        step *= sizes[d] + data.draw(st.sampled_from([0, 0, 0, 1, 8]))
    channel_dim, sample_dim = data.draw(st.permutations(range(len(sizes))))[:2]
    dtype = data.draw(st.sampled_from([F32, F64, F16, BF16]))
    address = data.draw(st.sampled_from([0, 2, 4, 8, 16])) * torch.empty((), dtype=dtype).element_size()
    check_plan(emulator.channel_plan(sizes, strides, dtype, channel_dim, sample_dim, address))


def test_alignment_decides_the_width_of_loads(emulator: Emulator) -> None:
    shape, strides = (2, 64, 32, 32), contiguous_strides((2, 64, 32, 32))
    assert emulator.channel_plan(shape, strides, F32, address=64)["vec"] == 4
    assert emulator.channel_plan(shape, strides, F32, address=68)["vec"] == 1
    assert emulator.channel_plan(shape, strides, BF16, address=64)["vec"] == 8
    assert emulator.channel_plan(shape, strides, BF16, address=72)["vec"] == 4
    assert emulator.channel_plan(shape, strides, BF16, address=66)["vec"] == 1
    assert emulator.channel_plan(shape, strides, F64, address=64)["vec"] == 2


@settings(max_examples=500, deadline=None)
@given(n=st.integers(0, 2**31 - 1), d=st.integers(1, 2**31 - 1))
def test_division_by_multiplication(emulator: Emulator, n: int, d: int) -> None:
    for value in {n, n - n % d, max(n - n % d - 1, 0), 2**31 - 1, d, d - 1}:
        assert emulator.lib.fast_divide(value, d) == value // d


# ----------------------------------------------------------------------------------- pair_stats


def pairs() -> Iterator[tuple[str, Tensor, Tensor, int]]:
    def two(*shape: int) -> tuple[Tensor, Tensor]:
        return randn(*shape), randn(*shape, seed=1)

    last = torch.channels_last
    yield "one element", *two(1, 1), 1
    yield "short rows", *two(7, 33), 1
    yield "samples", *two(3, 5, 9, 7), 1
    yield "aligned tokens", *two(3, 5, 64), 2
    yield "odd tokens", *two(2, 9, 131), 2
    yield "long rows", *two(2, 60000), 1
    yield "one long row", *two(1, 3, 200, 101), 1
    x, y = two(2, 6, 30, 32)
    yield "both channels-last", x.to(memory_format=last), y.to(memory_format=last), 1
    yield "one channels-last", x, y.to(memory_format=last), 1
    yield "slices", x[:, 1:5, 2:, 3:], y[:, 2:, 1:29, :29], 1
    yield "expanded", x[:, :1].expand(2, 6, 30, 32), y, 1
    yield "time first", x.permute(2, 0, 1, 3), y.permute(2, 0, 1, 3), 2
    yield "rows of slices", randn(3, 4, 2, 5, 8)[:, ::2, :, 1:], randn(3, 2, 2, 4, 8, seed=1), 4


@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
@pytest.mark.parametrize("case", [p[0] for p in pairs()])
def test_pair_stats_equals_the_reference(emulator: Emulator, case: str, dtype: torch.dtype) -> None:
    x, y, row_dims = next((x, y, r) for name, x, y, r in pairs() if name == case)
    keep = x.stride() if 0 in x.stride() else None
    x, y = x.to(dtype), y.to(dtype)
    if keep is not None:
        x = x[:, :1].expand(x.shape)
    want = torch.empty(4, math.prod(x.shape[:row_dims]), dtype=F64)
    reference.pair_stats(x, y, row_dims, want)
    scale = (want[0] * want[1]).sqrt()  # x.y may cancel: its error is that of its terms
    runs = [emulator.pair_stats(x, y, row_dims, order=order) for order in (0, 1)]
    assert torch.equal(runs[0], runs[1])
    rtol = 1e-12 if dtype == F64 else 3e-6
    torch.testing.assert_close(runs[0][[0, 1, 3]], want[[0, 1, 3]], rtol=rtol, atol=0)
    assert ((runs[0][2] - want[2]).abs() <= rtol * scale).all()


def test_pair_difference_does_not_cancel(emulator: Emulator) -> None:
    x = randn(2, 4000) + 1e3
    y = (x.double() + 1e-3 * randn(2, 4000, seed=1).double()).float()
    want = torch.empty(4, 2, dtype=F64)
    reference.pair_stats(x, y, 1, want)
    torch.testing.assert_close(emulator.pair_stats(x, y, 1)[3], want[3], rtol=1e-6, atol=0)


# --------------------------------------------------------------------------------- filter_norms


def test_filter_norms_of_many_layers_in_one_launch(emulator: Emulator) -> None:
    weights = [
        randn(5, 3, 3, 3),
        randn(9, 64, 1, 1).half(),
        randn(2, 20000),  # a block per filter, vectors
        randn(2, 5001, dtype=F64),
        randn(3, 4099),  # a block per filter, scalar
        randn(17, 32).bfloat16(),
        randn(6, 8, 5, 5).to(memory_format=torch.channels_last),
        randn(12, 8, 6, 5)[::2, 1:7, ::2],  # three dimensions remain
        randn(7)[:, None],
        torch.zeros(3, 4),
    ]
    want = torch.empty(sum(w.shape[0] for w in weights), dtype=F64)
    reference.filter_norms(weights, 0, want)
    runs = [torch.cat(emulator.filter_norms(weights, 0, order=order)) for order in (0, 1)]
    assert emulator.lib.emulation_launches() == 1
    assert torch.equal(runs[0], runs[1])
    torch.testing.assert_close(runs[0], want, rtol=2e-6, atol=0)


def test_filter_norms_of_another_dimension(emulator: Emulator) -> None:
    weights = [randn(8, 6, 3, 3), randn(30, 14)]
    want = torch.empty(20, dtype=F64)
    reference.filter_norms(weights, 1, want)
    torch.testing.assert_close(torch.cat(emulator.filter_norms(weights, 1)), want, rtol=2e-6, atol=0)


def test_filter_norms_of_more_layers_than_a_table_holds(emulator: Emulator) -> None:
    table = emulator.lib.filter_table()
    weights = [randn(2, 3, seed=i) for i in range(table + 3)]
    want = torch.empty(2 * len(weights), dtype=F64)
    reference.filter_norms(weights, 0, want)
    torch.testing.assert_close(torch.cat(emulator.filter_norms(weights, 0)), want, rtol=2e-6, atol=0)
    assert emulator.lib.emulation_launches() == 2
