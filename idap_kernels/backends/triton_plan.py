"""How the Triton kernels deal their work out.

Pure functions of sizes, strides, element size, pointer alignment and the number of multiprocessors; neither Triton
nor a GPU is asked. What is compiled in (``constants()``) never depends on the number of samples or rows, so a new
batch size compiles nothing. Everything else is an argument of the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

QUANTITIES = 9  # doubles that a program of channel_stats leaves per channel
PAIR_QUANTITIES = 4
MAX_ADDS = 256  # values that a thread adds up, one after the other, in the precision of the data


@dataclass(frozen=True)
class Config:
    """What may be tuned: warps of a program, values in flight per thread, programs per multiprocessor."""

    warps: int = 8
    values: int = 16
    programs: int = 6


DEFAULT = Config()
CANDIDATES = (
    DEFAULT,
    Config(warps=4, programs=12),
    Config(values=32, programs=4),
    Config(values=8, programs=8),
    Config(warps=4, values=32, programs=8),
    Config(programs=12),
)


def ceil_div(a: int, b: int) -> int:
    """The quotient of two non-negative integers, rounded up."""
    return -(-a // b)


def pow2_ceil(n: int) -> int:
    """The smallest power of two that is not less than ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def clamp(value: int, low: int, high: int) -> int:
    """``value``, or the limit that it passes; ``low`` counts where the limits cross."""
    return max(low, min(value, high))


def merge_dims(dims: Sequence[tuple[int, ...]], *, sort: bool) -> list[tuple[int, ...]]:
    """Dimensions ``(size, stride, ...)``, outermost first, with those joined that step through memory as one.

    With ``sort`` their order does not matter, and the largest strides come first.
    """
    kept = [d for d in dims if d[0] != 1]
    if sort:
        kept.sort(key=lambda d: d[1:], reverse=True)
    merged: list[tuple[int, ...]] = []
    for size, *strides in kept:
        if merged and all(outer == inner * size for outer, inner in zip(merged[-1][1:], strides)):
            merged[-1] = (merged[-1][0] * size, *strides)
        else:
            merged.append((size, *strides))
    return merged


def common_width(limit: int, numbers: Sequence[int]) -> int:
    """The largest power of two, up to ``limit``, that divides every number."""
    width = limit
    while any(n % width for n in numbers):
        width //= 2
    return width


@dataclass(frozen=True)
class ChannelPlan:
    """Work of one ``channel_stats`` launch: ``tiles`` x ``sample_blocks`` x ``pieces`` programs."""

    # compiled in
    rows: bool  # neighbouring positions are neighbours in memory
    columns: bool  # neighbouring channels are
    vec: int  # elements that all strides and lengths are multiples of
    dims: int  # position dimensions after merging
    wide: bool  # positions need 64-bit indices
    over_samples: bool  # the unrolled dimension of a tile is samples, not positions
    whole: bool  # rows are long enough for tiles without a gap
    samples_tile: int
    channels_tile: int
    unroll: int
    lanes: int
    merge_tile: int  # records added up side by side
    warps: int
    registers: int  # of a thread, at most
    # arguments
    sizes: tuple[int, int, int]  # of the position dimensions, innermost first, the outermost left out
    strides: tuple[int, int, int, int]  # of the position dimensions, innermost first
    positions: int
    tiles: int
    sample_blocks: int
    per_block: int  # samples of a program
    pieces: int  # programs that share a row; more than one only where per_block is one
    piece: int  # positions of a program

    @property
    def step(self) -> int:
        """Positions of a row that one tile covers."""
        width = self.lanes * (self.vec if self.rows else 1)
        return width if self.over_samples else width * self.unroll

    @property
    def programs(self) -> int:
        """Programs of the launch."""
        return self.tiles * self.sample_blocks * self.pieces

    @property
    def scratch(self) -> int:
        """Doubles of workspace, any content."""
        records = self.sample_blocks * self.pieces + (self.sample_blocks if self.pieces > 1 else 0)
        return records * self.tiles * QUANTITIES * self.channels_tile

    @property
    def tickets(self) -> int:
        """Counters: zero before the launch, left zero by it."""
        return self.tiles * (1 + (self.sample_blocks if self.pieces > 1 else 0))

    def constants(self) -> dict[str, Any]:
        """The kernel's compile-time arguments."""
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "VEC": self.vec,
            "DIMS": self.dims,
            "WIDE": self.wide,
            "OVER_SAMPLES": self.over_samples,
            "WHOLE": self.whole,
            "SAMPLES": self.samples_tile,
            "CHANNELS": self.channels_tile,
            "UNROLL": self.unroll,
            "LANES": self.lanes,
            "MERGE": self.merge_tile,
        }


@lru_cache(maxsize=4096)
def plan_channel_stats(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    channel_dim: int,
    sample_dim: int,
    itemsize: int,
    aligned: bool,
    multiprocessors: int,
    config: Config = DEFAULT,
    activation: str = "relu",
    act: str | None = None,
) -> ChannelPlan:
    """The plan for a map; ``aligned``: its address is a multiple of 16, and that of what is written.

    ``activation`` and ``act`` (of ``bn_act_stats``) bear on the number of registers alone: the sums of both ops are
    the same bits.

    A tile is ``unroll`` x ``samples_tile`` x ``channels_tile`` x ``lanes`` elements, or vectors of ``vec`` along the
    positions where these are neighbours. A thread keeps the unrolled values of one place of the other three, so a
    tile is added up without a word between threads; only whole rows are reduced across them.
    """
    samples, channels = shape[sample_dim], shape[channel_dim]
    sample_stride, channel_stride = stride[sample_dim], stride[channel_dim]
    dims = merge_dims(
        [(n, s) for i, (n, s) in enumerate(zip(shape, stride)) if i not in (channel_dim, sample_dim)],
        sort=True,
    )
    positions = 1
    for size, _ in dims:
        positions *= size
    outer = [s for _, s in dims[:-1]]
    inner_size, inner_stride = dims[-1] if dims else (1, 0)
    threads = 32 * config.warps
    values = config.values // 2 if itemsize == 8 else config.values
    channels_first = channels > 1 and (not dims or channel_stride < inner_stride)
    columns = channels_first and channel_stride == 1
    rows = not channels_first and inner_stride == 1
    widest = 16 // itemsize

    vec = 1
    if columns and aligned:
        # Half the width for halves: each of the channels has its own accumulators.
        vec = common_width(min(widest, 4), [channels, sample_stride, inner_stride, *outer])
    if rows and aligned:
        vec = common_width(widest, [inner_size, sample_stride, channel_stride, *outer])

    over_samples = False
    if channels_first:
        unroll = clamp(values // vec, 1, 8)
        channels_tile = min(pow2_ceil(channels), 32)
        across = max(threads * vec // channels_tile, 1)  # places beside each other for one channel
        lanes = clamp(pow2_ceil(ceil_div(positions, unroll)), 1, across)
        samples_tile = across // lanes
        over_samples = positions == 1
        unroll = unroll if over_samples else min(unroll, pow2_ceil(positions))
    else:
        items = ceil_div(positions, vec)
        unroll = clamp(values // vec, 1, 8)
        if items > 32 * unroll:  # a warp or more on a row
            channels_tile = min(pow2_ceil(channels), config.warps)
            lanes = threads // channels_tile
            samples_tile = 1
        else:
            lanes = clamp(pow2_ceil(ceil_div(items, unroll)), 1, 32)
            over_samples = items == 1
            unroll = unroll if over_samples else min(unroll, pow2_ceil(items))
            channels_tile = min(pow2_ceil(channels), threads // lanes, 64)
            samples_tile = threads // lanes // channels_tile

    step = lanes * (vec if rows else 1) * (1 if over_samples else unroll)
    at_once = samples_tile * (unroll if over_samples else 1)
    chunks = ceil_div(positions, step)
    tiles = ceil_div(channels, channels_tile)
    target = config.programs * multiprocessors
    pieces, per_block = 1, at_once
    if samples_tile == 1 and chunks > 1:
        pieces = clamp(
            ceil_div(target, tiles * samples), ceil_div(chunks * unroll, MAX_ADDS), ceil_div(chunks, 2)
        )
    chunks_per_piece = ceil_div(chunks, pieces)
    pieces = ceil_div(chunks, chunks_per_piece)
    if pieces == 1:
        rounds = ceil_div(samples, at_once)
        each = clamp(tiles * rounds // target, 1, max(MAX_ADDS // (chunks * unroll), 1))
        per_block = at_once * each
    ascending = [*dims[::-1], *[(1, 0)] * 4]
    return ChannelPlan(
        rows=rows,
        columns=columns,
        vec=vec,
        dims=len(dims),
        wide=positions + chunks_per_piece * step >= 1 << 31,
        over_samples=over_samples,
        whole=positions >= step,
        samples_tile=samples_tile,
        channels_tile=channels_tile,
        unroll=unroll,
        lanes=lanes,
        merge_tile=max(2 * threads // channels_tile, 1),
        warps=config.warps,
        registers=_registers(
            channels_first, channels_first and over_samples, itemsize == 8, len(dims) > 1, activation, act
        ),
        sizes=(ascending[0][0], ascending[1][0], ascending[2][0]),
        strides=(ascending[0][1], ascending[1][1], ascending[2][1], ascending[3][1]),
        positions=positions,
        tiles=tiles,
        sample_blocks=ceil_div(samples, per_block),
        per_block=per_block,
        pieces=pieces,
        piece=chunks_per_piece * step,
    )


def _registers(
    columns: bool, alone: bool, double: bool, split: bool, activation: str, act: str | None
) -> int:
    """Registers of a thread, at most: for three programs of 256 threads on a multiprocessor, for two, or for one where
    a thread keeps sums for several channels, wide numbers or values still to be written, and would spill them."""
    need = columns + (alone or double)
    if act is not None:
        need += (need > 0 or split) + ("silu" in (activation, act))
    if "gelu" in (activation, act):
        need += 2 * double + (act is not None)
    return (80, 128, 168, 255)[min(need, 3)]


@dataclass(frozen=True)
class PairPlan:
    """Work of one ``pair_stats`` launch: ``row_blocks`` x ``pieces`` programs."""

    # compiled in
    inner: bool  # neighbouring elements are neighbours in memory, in both tensors
    vec: int
    row_dims: int
    dims: int
    wide: bool
    rows_tile: int
    unroll: int
    lanes: int
    warps: int
    # arguments
    row_sizes: tuple[int, ...]  # five, innermost first
    row_strides: tuple[tuple[int, int], ...]  # of x and of y
    sizes: tuple[int, ...]
    strides: tuple[tuple[int, int], ...]
    rows: int
    elements: int
    row_blocks: int
    pieces: int
    piece: int

    @property
    def programs(self) -> int:
        """Programs of the launch."""
        return self.row_blocks * self.pieces

    @property
    def scratch(self) -> int:
        """Doubles of workspace, any content."""
        return PAIR_QUANTITIES * self.rows * self.pieces if self.pieces > 1 else 0

    @property
    def tickets(self) -> int:
        """Counters: zero before the launch, left zero by it."""
        return self.rows if self.pieces > 1 else 0

    def constants(self) -> dict[str, Any]:
        """The kernel's compile-time arguments."""
        return {
            "INNER": self.inner,
            "VEC": self.vec,
            "ROW_DIMS": self.row_dims,
            "DIMS": self.dims,
            "WIDE": self.wide,
            "ROWS": self.rows_tile,
            "UNROLL": self.unroll,
            "LANES": self.lanes,
            "MERGE": 32 * self.warps,
        }


@lru_cache(maxsize=4096)
def plan_pair_stats(
    shape: tuple[int, ...],
    x_stride: tuple[int, ...],
    y_stride: tuple[int, ...],
    row_dims: int,
    itemsize: int,
    aligned: bool,
    multiprocessors: int,
    config: Config = DEFAULT,
) -> PairPlan:
    """The plan for two tensors; ``aligned``: both addresses are multiples of 16."""
    all_dims = list(zip(shape, x_stride, y_stride))
    outer = merge_dims(all_dims[:row_dims], sort=False)
    inner = merge_dims(all_dims[row_dims:], sort=True)
    rows = elements = 1
    for d in outer:
        rows *= d[0]
    for d in inner:
        elements *= d[0]
    vec = 1
    neighbours = bool(inner) and inner[-1][1] == inner[-1][2] == 1
    if aligned and neighbours:
        # The strides of all row dimensions, also of those with one row: a new batch size compiles nothing.
        strides = [s for d in [*all_dims[:row_dims], *inner[:-1]] for s in d[1:]]
        vec = common_width(16 // itemsize, [inner[-1][0], *strides])
    threads = 32 * config.warps
    items = elements // vec
    unroll = min(clamp(config.values // vec, 1, 8), pow2_ceil(items))
    if elements > 8192:
        rows_tile, lanes = 1, threads
    else:
        lanes = clamp(pow2_ceil(ceil_div(items, unroll)), 1, 32)
        rows_tile = threads // lanes
    step = lanes * vec * unroll
    chunks = ceil_div(elements, step)
    pieces = 1
    if rows_tile == 1:
        pieces = clamp(
            ceil_div(config.programs * multiprocessors, rows),
            ceil_div(chunks * unroll, MAX_ADDS),
            ceil_div(chunks, 2),
        )
    chunks_per_piece = ceil_div(chunks, pieces)

    def ascending(dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [*dims[::-1], *[(1, 0, 0)] * 5][:5]

    row_list, list_ = ascending(outer), ascending(inner)
    return PairPlan(
        inner=neighbours,
        vec=vec,
        row_dims=max(len(outer), 1),  # the same for one row as for many
        dims=len(inner),
        wide=max(rows, elements) + chunks_per_piece * step + rows_tile >= 1 << 31,
        rows_tile=rows_tile,
        unroll=unroll,
        lanes=lanes,
        warps=config.warps,
        row_sizes=tuple(d[0] for d in row_list),
        row_strides=tuple((d[1], d[2]) for d in row_list),
        sizes=tuple(d[0] for d in list_),
        strides=tuple((d[1], d[2]) for d in list_),
        rows=rows,
        elements=elements,
        row_blocks=ceil_div(rows, rows_tile),
        pieces=ceil_div(chunks, chunks_per_piece),
        piece=chunks_per_piece * step,
    )


ENTRY_WORDS = 16  # of a layer in the table of filter_norms
LONG_FILTER = 1024  # elements from which a program takes one filter at a time
FILTER_ROWS = 4  # filters that it takes otherwise
FILTER_CONSTANTS = {"LONG": LONG_FILTER, "ROWS": FILTER_ROWS, "UNROLL": 4, "LANES": 32}


@dataclass(frozen=True)
class FilterPlan:
    """One layer of a ``filter_norms`` launch."""

    dims: int
    filters: int
    filter_stride: int
    elements: int  # of a filter
    sizes: tuple[int, ...]  # three, innermost first
    strides: tuple[int, ...]  # four, innermost first
    programs: int


def plan_filters(shape: tuple[int, ...], stride: tuple[int, ...], dim: int) -> FilterPlan:
    """The plan for a weight of up to five dimensions."""
    dim %= len(shape)
    dims = merge_dims([d for i, d in enumerate(zip(shape, stride)) if i != dim], sort=True)
    elements = 1
    for size, _ in dims:
        elements *= size
    ascending = [*dims[::-1], *[(1, 0)] * 4][:4]
    filters = shape[dim]
    return FilterPlan(
        dims=len(dims),
        filters=filters,
        filter_stride=stride[dim],
        elements=elements,
        sizes=tuple(size for size, _ in ascending[:3]),
        strides=tuple(step for _, step in ascending),
        programs=filters if elements >= LONG_FILTER else ceil_div(filters, FILTER_ROWS),
    )
