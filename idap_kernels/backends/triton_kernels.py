# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: SIM108 -- both sides of a conditional expression are compiled
"""The Triton kernels. Importing this imports Triton; ``triton.py`` does so at the first call.

Shared by all: offsets in 64 bits; sums in the precision of the data (float for halves) over at most
``triton_plan.MAX_ADDS`` values of a thread, then in double; the order of every sum depends on
the plan alone, so results are the same bits every time. Lengths and strides come divided by ``VEC`` where the plan
found them to be multiples of it: multiplied again here, the compiler knows, and joins loads into vectors.
"""

import triton
import triton.language as tl

RELU, IDENTITY, GELU, SILU, RELU6, HARDSWISH = (tl.constexpr(code) for code in range(6))
QUANTITIES = tl.constexpr(9)  # of a record, see channel_kernel


@triton.jit
def _activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == RELU:
        return tl.maximum(y, 0.0)
    elif ACTIVATION == IDENTITY:
        return y
    elif ACTIVATION == GELU:
        return 0.5 * y * (1.0 + tl.erf(y * 0.70710678118654752))
    else:
        return y / (1.0 + tl.exp(-y))


@triton.jit
def _clamp6(n):
    return tl.where(n < 0.0, 0.0, tl.where(n > 6.0, 6.0, n))


@triton.jit
def _output(n, ACT: tl.constexpr):
    """What is written for a normalized value. NaN stays NaN, which the smaller or larger of two may leave out."""
    if ACT == RELU:
        return tl.where(n < 0.0, 0.0, n)
    elif ACT == RELU6:
        return _clamp6(n)
    elif ACT == HARDSWISH:
        return n * (_clamp6(n + 3.0) * 0.16666666666666666)  # in this order large values do not overflow
    else:
        return _activate(n, ACT)


@triton.jit
def _root(v):
    if v.dtype == tl.float64:
        return tl.sqrt(v)
    else:
        return tl.sqrt_rn(v)


@triton.jit
def _walk(p, n0, n1, n2, n3, s0, s1, s2, s3, s4, DIMS: tl.constexpr, INNER: tl.constexpr):
    """Offset of index ``p`` over dimensions of sizes n and strides s, innermost first; INNER: s0 is one."""
    if DIMS <= 1:
        if INNER:
            return p
        else:
            return p.to(tl.int64) * s0
    else:
        if INNER:
            offset = (p % n0).to(tl.int64)
        else:
            offset = (p % n0).to(tl.int64) * s0
        p = p // n0
        if DIMS > 2:
            offset += (p % n1).to(tl.int64) * s1
            p = p // n1
        if DIMS > 3:
            offset += (p % n2).to(tl.int64) * s2
            p = p // n2
        if DIMS > 4:
            offset += (p % n3).to(tl.int64) * s3
            p = p // n3
        if DIMS == 2:
            return offset + p.to(tl.int64) * s1
        elif DIMS == 3:
            return offset + p.to(tl.int64) * s2
        elif DIMS == 4:
            return offset + p.to(tl.int64) * s3
        else:
            return offset + p.to(tl.int64) * s4


@triton.jit
def _within(v, RUN: tl.constexpr):
    """Adds up the RUN neighbours of the last dimension that one thread holds."""
    if RUN == 1:
        return v
    else:
        return tl.sum(tl.reshape(v, [v.shape[0], v.shape[1], v.shape[2] // RUN, RUN]), 3)


@triton.jit
def _take(y, there, k, fill, s, sq, positive, low, high, RUN: tl.constexpr, MASKED: tl.constexpr):
    """Adds a tile to what threads keep; nothing passes between them. Where nothing is ``there``, y is zero."""
    d = y - k
    filled = y
    if MASKED:
        d = tl.where(there, d, 0.0)
        filled = tl.where(there, y, fill)
    s += _within(d, RUN)
    sq += _within(d * d, RUN)
    positive += _within((y > 0.0).to(y.dtype), RUN)
    if RUN > 1:
        parts = tl.reshape(filled, [y.shape[0], y.shape[1], y.shape[2] // RUN, RUN])
        low = tl.minimum(low, tl.min(parts, 3))
        high = tl.maximum(high, tl.max(parts, 3))
    else:
        low = tl.minimum(low, filled)
        high = tl.maximum(high, filled)
    return s, sq, positive, low, high


@triton.jit
def _norm(mean, var, weight, bias, eps_low, eps_high, channel, there, REAL: tl.constexpr):
    """Center, scale and offset of a batch norm. A float argument has 32 bits: eps comes as the halves of its 64."""
    bits = (eps_high.to(tl.int64) << 32) | (eps_low.to(tl.int64) & 0xFFFFFFFF)
    eps = bits.to(tl.float64, bitcast=True).to(REAL)
    center = tl.load(mean + channel, mask=there, other=0.0).to(REAL)
    root = _root(tl.load(var + channel, mask=there, other=1.0).to(REAL) + eps)
    if weight is None:
        scale = 1.0 / root
    else:
        scale = tl.load(weight + channel, mask=there, other=1.0).to(REAL) / root
    if bias is None:
        offset = tl.zeros_like(center)
    else:
        offset = tl.load(bias + channel, mask=there, other=0.0).to(REAL)
    return center, scale, offset


@triton.jit
def _write(to, places, taken, there, center, scale, offset, ACT: tl.constexpr, MASKED: tl.constexpr):
    """Writes the tiles that one step took. All its loads come before: behind a store they would have to wait, as it
    might change what they read for all that the compiler knows."""
    for u in tl.static_range(len(taken)):
        n = _output((taken[u].to(center.dtype) - center) * scale + offset, ACT).to(to.dtype.element_ty)
        if MASKED:
            tl.store(to + places[u], n, mask=there[u])
        else:
            tl.store(to + places[u], n)


@triton.jit
def _last(ticket, programs):
    """Whether this program is the last of ``programs`` to come here; what the others wrote is then visible to it.

    The barrier orders the writes of this program's threads before the release of the one that counts, and the count
    of the last acquires what all released. The counter is left as it was found, at zero.
    """
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(ticket, 0)
    tl.debug_barrier()
    return last


@triton.jit
def _add_records(first, stride, count, per, total, CHANNELS: tl.constexpr, MERGE: tl.constexpr):
    """Adds ``count`` records up. Record i stands for min(per, total - i * per) elements of each channel.

    Deviations are taken from the mean of the first record: their sums then simply add, by Chan's rule with a common
    shift. The shift is the mean of a part of the data, so what the subtraction at the end cancels is bounded by the
    number of parts.
    """
    index = tl.arange(0, MERGE)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    shift = tl.load(first + channel, cache_modifier=".cg")
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
    dev = tl.zeros([MERGE, CHANNELS], tl.float64)
    dev2 = tl.zeros([MERGE, CHANNELS], tl.float64)
    abs_sum = tl.zeros([MERGE, CHANNELS], tl.float64)
    act_sq = tl.zeros([MERGE, CHANNELS], tl.float64)
    positive = tl.zeros([MERGE, CHANNELS], tl.float64)
    norm = tl.zeros([MERGE, CHANNELS], tl.float64)
    abs_mean_sq = tl.zeros([MERGE, CHANNELS], tl.float64)
    low = tl.full([MERGE, CHANNELS], float("inf"), tl.float64)
    high = tl.full([MERGE, CHANNELS], float("-inf"), tl.float64)
    for begin in range(0, count, MERGE):
        record = begin + index
        there = (record < count) & (channel < CHANNELS)
        p = first + record.to(tl.int64) * stride + channel
        n = tl.minimum(total - record.to(tl.int64) * per, per).to(tl.float64)
        d = tl.where(there, tl.load(p, mask=there, other=0.0, cache_modifier=".cg") - shift, 0.0)
        dev += n * d
        dev2 += n * d * d + tl.load(p + CHANNELS, mask=there, other=0.0, cache_modifier=".cg")
        abs_sum += tl.load(p + 2 * CHANNELS, mask=there, other=0.0, cache_modifier=".cg")
        act_sq += tl.load(p + 3 * CHANNELS, mask=there, other=0.0, cache_modifier=".cg")
        positive += tl.load(p + 4 * CHANNELS, mask=there, other=0.0, cache_modifier=".cg")
        norm += tl.load(p + 5 * CHANNELS, mask=there, other=0.0, cache_modifier=".cg")
        abs_mean_sq += tl.load(p + 6 * CHANNELS, mask=there, other=0.0, cache_modifier=".cg")
        v = tl.load(p + 7 * CHANNELS, mask=there, other=float("inf"), cache_modifier=".cg")
        low = tl.minimum(low, v)
        v = tl.load(p + 8 * CHANNELS, mask=there, other=float("-inf"), cache_modifier=".cg")
        high = tl.maximum(high, v)
    elements = total.to(tl.float64)
    dev_sum = tl.sum(dev, 0)
    m2 = tl.sum(dev2, 0) - dev_sum * (dev_sum / elements)
    mean = tl.sum(shift, 0) + dev_sum / elements
    return (
        mean,
        tl.where(m2 < 0.0, 0.0, m2),
        tl.sum(abs_sum, 0),
        tl.sum(act_sq, 0),
        tl.sum(positive, 0),
        tl.sum(norm, 0),
        tl.sum(abs_mean_sq, 0),
        tl.min(low, 0),
        tl.max(high, 0),
    )


@triton.jit
def _store_record(
    p, mean, m2, abs_sum, act_sq, positive, norm, abs_mean_sq, low, high, CHANNELS: tl.constexpr
):
    p += tl.arange(0, CHANNELS)
    tl.store(p, mean)
    tl.store(p + CHANNELS, m2)
    tl.store(p + 2 * CHANNELS, abs_sum)
    tl.store(p + 3 * CHANNELS, act_sq)
    tl.store(p + 4 * CHANNELS, positive)
    tl.store(p + 5 * CHANNELS, norm)
    tl.store(p + 6 * CHANNELS, abs_mean_sq)
    tl.store(p + 7 * CHANNELS, low)
    tl.store(p + 8 * CHANNELS, high)


@triton.jit
def _add_to(p, value, there, old):
    """Adds to a row of the state; where ``old`` is false, the row holds nothing yet."""
    tl.store(p, value + tl.load(p, mask=there & old, other=0.0), mask=there)


@triton.jit(
    do_not_specialize=[
        "records", "tickets", "state", "bn_mean", "bn_var", "bn_weight", "bn_bias", "eps_low", "eps_high",
        "samples", "channels", "positions", "sample_stride", "channel_stride",
        "n0", "n1", "n2", "s0", "s1", "s2", "s3",
        "tiles", "sample_blocks", "per_block", "pieces", "piece", "accumulate",
    ]
)  # fmt: skip
def channel_kernel(
    x,
    records,  # sample_blocks x pieces x tiles x QUANTITIES x CHANNELS doubles; then the same for whole rows
    tickets,  # tiles; then sample_blocks x tiles where rows come in pieces
    state,  # 11 x channels doubles
    result,  # as x, or None, and then so are the next six
    bn_mean,  # channels numbers, as are the next three
    bn_var,
    bn_weight,  # or None
    bn_bias,  # or None
    eps_low,
    eps_high,
    samples,
    channels,
    positions,
    sample_stride,
    channel_stride,
    n0,
    n1,
    n2,
    s0,
    s1,
    s2,
    s3,
    tiles,
    sample_blocks,
    per_block,
    pieces,
    piece,
    accumulate,
    ACTIVATION: tl.constexpr,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VEC: tl.constexpr,
    DIMS: tl.constexpr,
    WIDE: tl.constexpr,
    OVER_SAMPLES: tl.constexpr,
    WHOLE: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Statistics of all channels of a map, read once; see ``triton_plan.plan_channel_stats``.

    A program adds ``per_block`` samples (or a piece of one) of CHANNELS channels up and leaves a record: mean, sum of
    squared deviations, sum of |y|, of act(y)², number of positives, sums over samples of the two roots, smallest,
    largest. The last program of a row adds its pieces up and takes the roots; the last of a channel tile adds all up
    and merges them into the state.

    With a ``result``, the tiles that are added up are also normalized, activated and written to the same places of it.
    """
    WRITE: tl.constexpr = result is not None
    REAL: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    RUN: tl.constexpr = VEC if ROWS else 1  # neighbouring positions that a thread takes at once
    WIDTH: tl.constexpr = LANES * RUN
    STEP: tl.constexpr = WIDTH if OVER_SAMPLES else (UNROLL * WIDTH)
    ROUND: tl.constexpr = (UNROLL * SAMPLES) if OVER_SAMPLES else SAMPLES

    if WIDE:
        positions = positions.to(tl.int64)
        piece = piece.to(tl.int64)
        n0 = n0.to(tl.int64)
    sample_stride = sample_stride.to(tl.int64) * VEC
    s1 = s1.to(tl.int64) * VEC
    s2 = s2.to(tl.int64) * VEC
    s3 = s3.to(tl.int64) * VEC
    if ROWS:
        positions = positions * VEC
        piece = piece * VEC
        n0 = n0 * VEC
        channel_stride = channel_stride.to(tl.int64) * VEC
        s0 = s0.to(tl.int64)
    else:
        channel_stride = channel_stride.to(tl.int64)
        s0 = s0.to(tl.int64) * VEC
    if COLUMNS:
        channels = channels * VEC

    pid = tl.program_id(0)
    tile = pid % tiles
    slot = pid // tiles
    part = slot % pieces
    block = slot // pieces

    # The dimensions of a tile: samples, channels, and positions, of which a thread takes RUN neighbours.
    b = tl.arange(0, SAMPLES)[:, None, None]
    c = tl.arange(0, CHANNELS)[None, :, None]
    lane = tl.arange(0, WIDTH)[None, None, :]
    channel = tile * CHANNELS + c
    if COLUMNS:
        of_channel = channel
    else:
        of_channel = channel.to(tl.int64) * channel_stride
    base = x + of_channel
    if WRITE:
        to = result + of_channel
        center, scale, bias = _norm(
            bn_mean, bn_var, bn_weight, bn_bias, eps_low, eps_high, channel, channel < channels, REAL
        )
    first_sample = block * per_block
    last_sample = tl.minimum(first_sample + per_block, samples)
    begin = part * piece
    end = tl.minimum(begin + piece, positions)

    # Deviations are taken from the mean of the first chunk, a part of what this program adds up: the sum of their
    # squares then exceeds the one about the true mean by no more than the number of chunks.
    seen = tl.zeros([SAMPLES, CHANNELS, WIDTH], REAL)
    total = tl.zeros([SAMPLES, CHANNELS, WIDTH], REAL)
    some = tl.full([SAMPLES, CHANNELS, WIDTH], float("inf"), REAL)
    for u in tl.static_range(UNROLL):
        sample = first_sample + b
        position = begin + lane
        if OVER_SAMPLES:
            sample += u * SAMPLES
        else:
            position += u * WIDTH
        there = (sample < last_sample) & (channel < channels) & (position < end)
        offset = sample.to(tl.int64) * sample_stride + _walk(
            position, n0, n1, n2, n2, s0, s1, s2, s3, s3, DIMS=DIMS, INNER=ROWS
        )
        y = tl.load(base + offset, mask=there, other=0.0).to(REAL)
        seen += there.to(REAL)
        total += y
        some = tl.minimum(some, tl.where(there, y, float("inf")))
    shift = tl.sum(tl.sum(total, 2), 0) / tl.maximum(tl.sum(tl.sum(seen, 2), 0), 1.0)
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
    k = shift[None, :, None]
    # Any value of the channel, for what a tile has no value for: it changes neither extreme.
    fill = tl.min(tl.min(some, 2), 0)[None, :, None]

    s = tl.zeros([SAMPLES, CHANNELS, LANES], REAL)
    sq = tl.zeros([SAMPLES, CHANNELS, LANES], REAL)
    positive = tl.zeros([SAMPLES, CHANNELS, LANES], REAL)
    low = tl.full([SAMPLES, CHANNELS, LANES], float("inf"), REAL)
    high = tl.full([SAMPLES, CHANNELS, LANES], float("-inf"), REAL)
    abs_sum = tl.zeros([SAMPLES, CHANNELS], REAL)
    act_sq = tl.zeros([SAMPLES, CHANNELS], REAL)
    norm = tl.zeros([SAMPLES, CHANNELS], REAL)
    abs_mean_sq = tl.zeros([SAMPLES, CHANNELS], REAL)
    mean_of = 1.0 / positions.to(REAL)
    for first in range(first_sample, last_sample, ROUND):
        if OVER_SAMPLES:  # a row is a run of one thread
            taken, places, masks = (), (), ()
            for u in tl.static_range(UNROLL):
                sample = first + u * SAMPLES + b
                position = begin + lane
                there = (sample < last_sample) & (channel < channels) & (position < end)
                offset = sample.to(tl.int64) * sample_stride + _walk(
                    position, n0, n1, n2, n2, s0, s1, s2, s3, s3, DIMS=DIMS, INNER=ROWS
                )
                v = tl.load(base + offset, mask=there, other=0.0)
                taken += (v,)
                places += (offset,)
                masks += (there,)
                y = v.to(REAL)
                s, sq, positive, low, high = _take(
                    y, there, k, fill, s, sq, positive, low, high, RUN, MASKED=True
                )
                a = _activate(y, ACTIVATION)
                row_abs = tl.sum(tl.abs(y), 2)
                row_sq = tl.sum(a * a, 2)
                abs_sum += row_abs
                act_sq += row_sq
                norm += _root(row_sq)
                abs_mean_sq += (row_abs * mean_of) * (row_abs * mean_of)
            if WRITE:
                _write(to, places, taken, masks, center, scale, bias, ACT, MASKED=True)
        else:
            lane_abs = tl.zeros([SAMPLES, CHANNELS, LANES], REAL)
            lane_sq = tl.zeros([SAMPLES, CHANNELS, LANES], REAL)
            sample = first + b
            rows = base + sample.to(tl.int64) * sample_stride
            if WRITE:
                to_rows = to + sample.to(tl.int64) * sample_stride
            rows_there = (sample < last_sample) & (channel < channels)
            whole_end = begin
            if WHOLE:
                whole = (first + SAMPLES <= last_sample) & ((tile + 1) * CHANNELS <= channels)
                whole_end = begin + tl.where(whole, (end - begin) // STEP * STEP, 0)
                for at in range(begin, whole_end, STEP):
                    taken, places = (), ()
                    for u in tl.static_range(UNROLL):
                        position = at + u * WIDTH + lane
                        along = _walk(position, n0, n1, n2, n2, s0, s1, s2, s3, s3, DIMS=DIMS, INNER=ROWS)
                        v = tl.load(rows + along)
                        taken += (v,)
                        places += (along,)
                        y = v.to(REAL)
                        s, sq, positive, low, high = _take(
                            y, y, k, fill, s, sq, positive, low, high, RUN, MASKED=False
                        )
                        a = _activate(y, ACTIVATION)
                        lane_abs += _within(tl.abs(y), RUN)
                        lane_sq += _within(a * a, RUN)
                    if WRITE:
                        _write(to_rows, places, taken, taken, center, scale, bias, ACT, MASKED=False)
            for at in range(whole_end, end, STEP):
                taken, places, masks = (), (), ()
                for u in tl.static_range(UNROLL):
                    position = at + u * WIDTH + lane
                    there = rows_there & (position < end)
                    along = _walk(position, n0, n1, n2, n2, s0, s1, s2, s3, s3, DIMS=DIMS, INNER=ROWS)
                    v = tl.load(rows + along, mask=there, other=0.0)
                    taken += (v,)
                    places += (along,)
                    masks += (there,)
                    y = v.to(REAL)
                    s, sq, positive, low, high = _take(
                        y, there, k, fill, s, sq, positive, low, high, RUN, MASKED=True
                    )
                    a = _activate(y, ACTIVATION)
                    lane_abs += _within(tl.abs(y), RUN)
                    lane_sq += _within(a * a, RUN)
                if WRITE:
                    _write(to_rows, places, taken, masks, center, scale, bias, ACT, MASKED=True)
            row_abs = tl.sum(lane_abs, 2)
            row_sq = tl.sum(lane_sq, 2)
            abs_sum += row_abs
            act_sq += row_sq
            norm += _root(row_sq)
            abs_mean_sq += (row_abs * mean_of) * (row_abs * mean_of)

    elements = (last_sample - first_sample).to(tl.float64) * (end - begin).to(tl.float64)
    dev = tl.sum(tl.sum(s.to(tl.float64), 2), 0)
    m2 = tl.sum(tl.sum(sq.to(tl.float64), 2), 0) - dev * (dev / elements)
    RECORD: tl.constexpr = QUANTITIES * CHANNELS
    stride = tiles.to(tl.int64) * RECORD
    records += tile.to(tl.int64) * RECORD
    _store_record(
        records + slot * stride,
        shift.to(tl.float64) + dev / elements,
        tl.where(m2 < 0.0, 0.0, m2),
        tl.sum(abs_sum.to(tl.float64), 0),
        tl.sum(act_sq.to(tl.float64), 0),
        tl.sum(tl.sum(positive.to(tl.float64), 2), 0),
        tl.sum(norm.to(tl.float64), 0),
        tl.sum(abs_mean_sq.to(tl.float64), 0),
        tl.min(tl.min(low, 2), 0).to(tl.float64),
        tl.max(tl.max(high, 2), 0).to(tl.float64),
        CHANNELS,
    )

    per = per_block * positions.to(tl.int64)
    last = tile >= 0
    if pieces > 1:
        last = _last(tickets + tiles + block.to(tl.int64) * tiles + tile, pieces)
        per = positions.to(tl.int64)
        if last:
            mean, m2, row_abs_sum, row_act_sq, row_positive, _, _, row_low, row_high = _add_records(
                records + block * (pieces * stride), stride, pieces, piece.to(tl.int64), per, CHANNELS, MERGE
            )
            abs_mean = row_abs_sum / positions.to(tl.float64)
            _store_record(
                records + (sample_blocks.to(tl.int64) * pieces + block) * stride,
                mean, m2, row_abs_sum, row_act_sq, row_positive, tl.sqrt(row_act_sq), abs_mean * abs_mean,
                row_low, row_high, CHANNELS,
            )  # fmt: skip
        records += sample_blocks.to(tl.int64) * pieces * stride
    if last:
        last = _last(tickets + tile, sample_blocks)
        if last:
            everything = samples * positions.to(tl.int64)
            mean, m2, all_abs, all_act_sq, all_positive, all_norm, all_abs_mean_sq, all_low, all_high = (
                _add_records(records, stride, sample_blocks, per, everything, CHANNELS, MERGE)
            )
            index = tile * CHANNELS + tl.arange(0, CHANNELS)
            there_c = index < channels
            row = channels.to(tl.int64)
            p = state + index
            nan = tl.where(all_abs != all_abs, float("nan"), 0.0)  # |y| cannot cancel: a NaN in the data
            before = tl.load(p, mask=index < channels * accumulate, other=0.0)
            old = before > 0.0
            held = there_c & old
            count = everything.to(tl.float64)
            share = count / (before + count)
            old_mean = tl.load(p + 2 * row, mask=held, other=0.0)
            old_m2 = tl.load(p + 3 * row, mask=held, other=0.0)
            old_low = tl.load(p + 9 * row, mask=held, other=float("inf"))
            old_high = tl.load(p + 10 * row, mask=held, other=float("-inf"))
            delta = mean - old_mean
            merged = tl.where(tl.abs(delta) < float("inf"), old_mean + delta * share, old_mean + mean)
            m2 = tl.where(old, old_m2 + m2 + delta * delta * before * share, m2)
            # The smaller and larger of two numbers leave NaN out; adding nothing to both brings it back.
            low_nan = tl.where((old_low != old_low) | (all_abs != all_abs), float("nan"), 0.0)
            high_nan = tl.where((old_high != old_high) | (all_abs != all_abs), float("nan"), 0.0)
            tl.store(p, before + count, mask=there_c)
            _add_to(p + row, tl.zeros([CHANNELS], tl.float64) + samples, there_c, old)
            tl.store(p + 2 * row, tl.where(old, merged, mean) + nan, mask=there_c)
            tl.store(p + 3 * row, m2 + nan, mask=there_c)
            _add_to(p + 4 * row, all_abs, there_c, old)
            _add_to(p + 5 * row, all_act_sq + nan, there_c, old)
            _add_to(p + 6 * row, all_norm + nan, there_c, old)
            _add_to(p + 7 * row, all_abs_mean_sq + nan, there_c, old)
            _add_to(p + 8 * row, all_positive, there_c, old)
            tl.store(p + 9 * row, tl.minimum(old_low, all_low) + low_nan, mask=there_c)
            tl.store(p + 10 * row, tl.maximum(old_high, all_high) + high_nan, mask=there_c)


@triton.jit(
    do_not_specialize=[
        "records", "tickets", "out", "rows", "elements", "pieces", "piece",
        "m0", "m1", "m2", "m3", "n0", "n1", "n2", "n3",
        "rx0", "rx1", "rx2", "rx3", "rx4", "ry0", "ry1", "ry2", "ry3", "ry4",
        "sx0", "sx1", "sx2", "sx3", "sx4", "sy0", "sy1", "sy2", "sy3", "sy4",
    ]
)  # fmt: skip
def pair_kernel(
    x,
    y,
    records,  # rows x pieces x 4 doubles
    tickets,  # rows
    out,  # 4 x rows doubles
    rows,
    elements,
    pieces,
    piece,
    m0, m1, m2, m3,
    rx0, rx1, rx2, rx3, rx4,
    ry0, ry1, ry2, ry3, ry4,
    n0, n1, n2, n3,
    sx0, sx1, sx2, sx3, sx4,
    sy0, sy1, sy2, sy3, sy4,
    VEC: tl.constexpr,
    INNER: tl.constexpr,
    ROW_DIMS: tl.constexpr,
    DIMS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    MERGE: tl.constexpr,
):  # fmt: skip
    """Products of the rows of two tensors; see ``triton_plan.plan_pair_stats``.

    Strides of rows come in units of VEC, and so do the lengths and outer strides within a row where VEC > 1, which
    needs an innermost stride of one in both.
    """
    REAL: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    if WIDE:
        rows = rows.to(tl.int64)
        elements = elements.to(tl.int64)
        piece = piece.to(tl.int64)
        n0 = n0.to(tl.int64)
    elements = elements * VEC
    piece = piece * VEC
    n0 = n0 * VEC
    pid = tl.program_id(0)
    part = pid % pieces
    block = pid // pieces
    if WIDE:
        row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    else:
        row = block * ROWS + tl.arange(0, ROWS)
    row_x = _walk(
        row, m0, m1, m2, m3, rx0.to(tl.int64), rx1.to(tl.int64), rx2.to(tl.int64), rx3.to(tl.int64),
        rx4.to(tl.int64), DIMS=ROW_DIMS, INNER=False,
    )  # fmt: skip
    row_y = _walk(
        row, m0, m1, m2, m3, ry0.to(tl.int64), ry1.to(tl.int64), ry2.to(tl.int64), ry3.to(tl.int64),
        ry4.to(tl.int64), DIMS=ROW_DIMS, INNER=False,
    )  # fmt: skip
    row_x = x + (row_x * VEC)[:, None]
    row_y = y + (row_y * VEC)[:, None]
    lane = tl.arange(0, LANES * VEC)[None, :]
    row_there = (row < rows)[:, None]
    begin = part * piece
    end = tl.minimum(begin + piece, elements)
    xx = tl.zeros([ROWS, LANES * VEC], REAL)
    yy = tl.zeros([ROWS, LANES * VEC], REAL)
    xy = tl.zeros([ROWS, LANES * VEC], REAL)
    dd = tl.zeros([ROWS, LANES * VEC], REAL)
    for at in range(begin, end, UNROLL * LANES * VEC):
        for u in tl.static_range(UNROLL):
            position = at + u * (LANES * VEC) + lane
            there = row_there & (position < end)
            off_x = _walk(
                position, n0, n1, n2, n3, sx0.to(tl.int64), sx1.to(tl.int64) * VEC, sx2.to(tl.int64) * VEC,
                sx3.to(tl.int64) * VEC, sx4.to(tl.int64) * VEC, DIMS=DIMS, INNER=INNER,
            )  # fmt: skip
            off_y = _walk(
                position, n0, n1, n2, n3, sy0.to(tl.int64), sy1.to(tl.int64) * VEC, sy2.to(tl.int64) * VEC,
                sy3.to(tl.int64) * VEC, sy4.to(tl.int64) * VEC, DIMS=DIMS, INNER=INNER,
            )  # fmt: skip
            p = tl.load(row_x + off_x, mask=there, other=0.0).to(REAL)
            q = tl.load(row_y + off_y, mask=there, other=0.0).to(REAL)
            d = q - p
            xx += p * p
            yy += q * q
            xy += p * q
            dd += d * d
    sum_xx = tl.sum(xx.to(tl.float64), 1)
    sum_yy = tl.sum(yy.to(tl.float64), 1)
    sum_xy = tl.sum(xy.to(tl.float64), 1)
    sum_dd = tl.sum(dd.to(tl.float64), 1)
    there_r = row < rows
    stride = rows.to(tl.int64)
    if pieces == 1:
        o = out + row
        tl.store(o, sum_xx, mask=there_r)
        tl.store(o + stride, sum_yy, mask=there_r)
        tl.store(o + 2 * stride, sum_xy, mask=there_r)
        tl.store(o + 3 * stride, sum_dd, mask=there_r)
    else:  # then ROWS is one
        r = records + (row.to(tl.int64) * pieces + part) * 4
        tl.store(r, sum_xx)
        tl.store(r + 1, sum_yy)
        tl.store(r + 2, sum_xy)
        tl.store(r + 3, sum_dd)
        if _last(tickets + block, pieces):
            all_xx = tl.zeros([MERGE], tl.float64)
            all_yy = tl.zeros([MERGE], tl.float64)
            all_xy = tl.zeros([MERGE], tl.float64)
            all_dd = tl.zeros([MERGE], tl.float64)
            for first in range(0, pieces, MERGE):
                i = first + tl.arange(0, MERGE)
                part_of = records + (block.to(tl.int64) * pieces + i) * 4
                all_xx += tl.load(part_of, mask=i < pieces, other=0.0, cache_modifier=".cg")
                all_yy += tl.load(part_of + 1, mask=i < pieces, other=0.0, cache_modifier=".cg")
                all_xy += tl.load(part_of + 2, mask=i < pieces, other=0.0, cache_modifier=".cg")
                all_dd += tl.load(part_of + 3, mask=i < pieces, other=0.0, cache_modifier=".cg")
            all_out = out + block
            tl.store(all_out, tl.sum(all_xx, 0))
            tl.store(all_out + stride, tl.sum(all_yy, 0))
            tl.store(all_out + 2 * stride, tl.sum(all_xy, 0))
            tl.store(all_out + 3 * stride, tl.sum(all_dd, 0))


# Words of an entry of the table of layers, all int64.
ENTRY = tl.constexpr(16)


@triton.jit(
    do_not_specialize=[
        "table", "index", "address", "dtype", "dims", "out", "filters", "filter_stride", "first_program", "elements",
        "n0", "n1", "n2", "s0", "s1", "s2", "s3",
    ]
)  # fmt: skip
def entry_kernel(
    table, index, address, dtype, dims, out, filters, filter_stride, first_program, elements,
    n0, n1, n2, s0, s1, s2, s3,
):  # fmt: skip
    """Writes a layer into the table: as arguments of a launch, its numbers need no copy from the host's memory."""
    p = table + index * ENTRY
    # Added to a number, it makes one of 64 bits: the interpreter keeps those from 2^31 to 2^32 in 32.
    zero = tl.program_id(0).to(tl.int64)
    tl.store(p, address + zero)
    tl.store(p + 1, dtype + zero)
    tl.store(p + 2, dims + zero)
    tl.store(p + 3, out + zero)
    tl.store(p + 4, filters + zero)
    tl.store(p + 5, filter_stride + zero)
    tl.store(p + 6, first_program + zero)
    tl.store(p + 7, elements + zero)
    tl.store(p + 8, n0 + zero)
    tl.store(p + 9, n1 + zero)
    tl.store(p + 10, n2 + zero)
    tl.store(p + 11, s0 + zero)
    tl.store(p + 12, s1 + zero)
    tl.store(p + 13, s2 + zero)
    tl.store(p + 14, s3 + zero)


@triton.jit
def _squares(
    base, row, filters, filter_stride, elements, dims, n0, n1, n2, s0, s1, s2, s3,
    ROWS: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, LANES)[None, :].to(tl.int64)
    rows = base + (row * filter_stride)[:, None]
    row_there = (row < filters)[:, None]
    total = tl.zeros([ROWS, LANES], tl.float64)
    for at in range(0, elements, UNROLL * LANES):
        for u in tl.static_range(UNROLL):
            p = at + u * LANES + lane
            if dims <= 1:
                offset = p * s0
            else:
                offset = _walk(p, n0, n1, n2, n2, s0, s1, s2, s3, s3, DIMS=4, INNER=False)
            w = tl.load(rows + offset, mask=row_there & (p < elements), other=0.0)
            if base.dtype.element_ty != tl.float64:
                w = w.to(tl.float32)  # from which every value of the halves is exact
            w = w.to(tl.float64)
            total += w * w
    return tl.sum(total, 1)


@triton.jit
def _norms(entry, out, base, first, ROWS: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr):
    row = (first * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    filters = tl.load(entry + 4)
    total = _squares(
        base, row, filters, tl.load(entry + 5), tl.load(entry + 7), tl.load(entry + 2),
        tl.load(entry + 8), tl.load(entry + 9), tl.load(entry + 10),
        tl.load(entry + 11), tl.load(entry + 12), tl.load(entry + 13), tl.load(entry + 14),
        ROWS, UNROLL, LANES,
    )  # fmt: skip
    tl.store(out + tl.load(entry + 3) + row, tl.sqrt(total), mask=row < filters)


@triton.jit(do_not_specialize=["table", "out", "entries"])
def filter_kernel(
    table,  # entries x ENTRY
    out,
    entries,
    LONG: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
):
    """L2 norms of all filters of all layers: squares and sums in double, so no weight is too large or too small.

    A program takes ROWS filters of LANES threads, or one filter of all its threads where filters have LONG elements.
    """
    pid = tl.program_id(0)
    before = pid * 0
    for begin in range(0, entries, 128):
        index = begin + tl.arange(0, 128)
        first = tl.load(table + index * ENTRY + 6, mask=index < entries, other=9223372036854775807)
        before += tl.sum((first <= pid).to(tl.int32), 0)
    entry = table + (before - 1) * ENTRY
    first = pid - tl.load(entry + 6)
    address = tl.load(entry)
    dtype = tl.load(entry + 1)
    if tl.load(entry + 7) >= LONG:
        if dtype == 0:
            _norms(entry, out, address.to(tl.pointer_type(tl.float32)), first, 1, UNROLL, ROWS * LANES)
        elif dtype == 1:
            _norms(entry, out, address.to(tl.pointer_type(tl.float64)), first, 1, UNROLL, ROWS * LANES)
        elif dtype == 2:
            _norms(entry, out, address.to(tl.pointer_type(tl.float16)), first, 1, UNROLL, ROWS * LANES)
        else:
            _norms(entry, out, address.to(tl.pointer_type(tl.bfloat16)), first, 1, UNROLL, ROWS * LANES)
    else:
        if dtype == 0:
            _norms(entry, out, address.to(tl.pointer_type(tl.float32)), first, ROWS, UNROLL, LANES)
        elif dtype == 1:
            _norms(entry, out, address.to(tl.pointer_type(tl.float64)), first, ROWS, UNROLL, LANES)
        elif dtype == 2:
            _norms(entry, out, address.to(tl.pointer_type(tl.float16)), first, ROWS, UNROLL, LANES)
        else:
            _norms(entry, out, address.to(tl.pointer_type(tl.bfloat16)), first, ROWS, UNROLL, LANES)
