"""The CUDA kernels on a GPU. Without one, every test here is skipped with the reason."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from torch import Tensor

from idap_kernels import (
    ChannelStats,
    available_backends,
    bn_act_stats,
    channel_stats,
    filter_norms,
    pair_stats,
)
from idap_kernels.channel_stats import ROWS
from idap_kernels.dispatch import OUTPUT_ACTIVATION_CODES, why_not

from .common import SHAPES, TOLERANCE, assert_state_close, layouts

_reason = available_backends()["cuda"]
pytestmark = pytest.mark.skipif(_reason is not None, reason=f"CUDA kernels: {_reason}")

COUNT, MEAN, M2, POSITIVE, MIN, MAX = (
    ROWS.index(n) for n in ("count", "mean", "m2", "positive", "min", "max")
)

# Every shape of work and both levels of records: see plan.h.
WORK = [
    ((5, 37, 7, 7), {}),
    ((70, 64, 6, 6), {}),
    ((2, 3, 96, 96), {}),
    ((1, 2, 40000), {}),
    ((32, 64, 56, 56), {}),
    ((3, 300, 40), {"channel_dim": 2}),
    ((1, 18000, 30), {"channel_dim": 2}),
    ((2, 9000, 32), {"channel_dim": 2}),
    ((33, 300), {}),
]


def bits(t: Tensor) -> Tensor:
    return t.view(torch.int64)


def test_the_self_check_passes():
    assert why_not("cuda", torch.empty(1, 1, device="cuda")) is None


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("activation", ["relu", "identity", "gelu", "silu"])
def test_channel_stats_agrees_with_the_reference(dtype, activation):
    for shape in SHAPES:
        x = (torch.randn(shape, dtype=torch.float64) * 1.7 + 0.2).to(dtype).cuda()
        for layout, (y, dims) in layouts(x).items():
            got = channel_stats(y, activation=activation, backend="cuda", **dims).state
            wanted = channel_stats(y, activation=activation, backend="reference", **dims).state
            assert_state_close(got, wanted, TOLERANCE[dtype], f"{layout} {shape}")


@pytest.mark.parametrize(("shape", "dims"), WORK)
def test_accumulation_and_equal_bits(shape, dims):
    x = torch.randn(shape, device="cuda") + 3
    y = torch.randn(shape, device="cuda") * 2
    runs = []
    for _ in range(20):
        stats = channel_stats(x, backend="cuda", **dims)
        runs.append(channel_stats(y, backend="cuda", out=stats, **dims).state)
    for other in runs[1:]:
        assert torch.equal(bits(runs[0]), bits(other))
    wanted = channel_stats(torch.cat([x, y]), backend="reference", **dims).state
    assert_state_close(runs[0], wanted, 1e-5, str(shape))


@pytest.mark.parametrize(("shape", "dims"), WORK)
def test_variance_survives_a_large_offset(shape, dims):
    x = torch.randn(shape, device="cuda") + 1e4
    got = channel_stats(x, backend="cuda", **dims).state
    wanted = channel_stats(x, backend="reference", **dims).state
    assert ((got[M2] - wanted[M2]) / wanted[M2]).abs().max() < 1e-4


@pytest.mark.parametrize(("shape", "dims"), WORK)
def test_nan_stays_in_its_channel(shape, dims):
    channel_dim = dims.get("channel_dim", 1)
    x = torch.randn(shape, device="cuda")
    x.select(channel_dim, 1)[-1].fill_(math.nan)
    got = channel_stats(x, backend="cuda", **dims).state
    assert got[[MEAN, M2, MIN, MAX], 1].isnan().all()
    assert not got[:, 0].isnan().any()
    wanted = channel_stats(x, backend="reference", **dims).state
    assert torch.equal(got[POSITIVE], wanted[POSITIVE])


# ------------------------------------------------------------------------------- bn_act_stats


def parameters(channels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    mean, spread, weight, bias = torch.randn(4, channels, device="cuda")
    return [t.to(dtype) for t in (mean, spread.square() + 0.1, weight, bias)]


def assert_map_close(got: Tensor, wanted: Tensor, what: str) -> None:
    assert got.dtype == wanted.dtype
    assert got.stride() == wanted.stride()
    rounding = max(torch.finfo(got.dtype).eps, 1e-14)
    rtol, atol = (16 * rounding, 80 * rounding) if got.dtype.itemsize > 2 else (rounding, 1e-5)
    torch.testing.assert_close(
        got, wanted, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("act", OUTPUT_ACTIVATION_CODES)
def test_bn_act_stats_agrees_with_the_reference(dtype, act):
    for shape in SHAPES:
        x = (torch.randn(shape, dtype=torch.float64) * 1.7 + 0.2).to(dtype).cuda()
        for layout, (y, dims) in layouts(x).items():
            given = parameters(y.shape[dims.get("channel_dim", 1)])
            got, stats = bn_act_stats(y, *given, act=act, backend="cuda", **dims)
            wanted, exact = bn_act_stats(y, *given, act=act, backend="reference", **dims)
            assert_map_close(got, wanted, f"{layout} {shape}")
            assert_state_close(stats.state, exact.state, TOLERANCE[dtype], f"{layout} {shape}")


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bn_act_stats_with_parameters_of_another_type(dtype, kind):
    """Half maps with float32 parameters are what autocast makes."""
    x = torch.randn(4, 37, 14, 14, device="cuda").to(dtype)
    mean, var, weight, bias = parameters(37, kind)
    for given in ((mean, var, weight, bias), (mean, var), (mean, var, weight), (mean, var, None, bias)):
        for memory in (torch.contiguous_format, torch.channels_last):
            y = x.contiguous(memory_format=memory)
            got, _ = bn_act_stats(y, *given, act="identity", backend="cuda")
            assert_map_close(
                got, bn_act_stats(y, *given, act="identity", backend="reference")[0], str(memory)
            )


@pytest.mark.parametrize(("shape", "dims"), WORK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bn_act_stats_has_equal_bits_every_time(shape, dims, dtype):
    x = (torch.randn(shape, device="cuda") + 3).to(dtype)
    given = parameters(shape[dims.get("channel_dim", 1)])
    plain = channel_stats(x, backend="cuda", **dims).state
    first, _ = bn_act_stats(x, *given, backend="cuda", **dims)
    for _ in range(20):
        y, stats = bn_act_stats(x, *given, backend="cuda", **dims)
        assert torch.equal(y, first)
        assert torch.equal(bits(stats.state), bits(plain))


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_bn_act_stats_of_an_unaligned_map(offset):
    for dtype in (torch.float32, torch.float16):
        x = torch.randn(4 * 8 * 28 * 28 + offset, device="cuda").to(dtype)[offset:].view(4, 8, 28, 28)
        given = parameters(8)
        got, stats = bn_act_stats(x, *given, backend="cuda")
        wanted, exact = bn_act_stats(x, *given, backend="reference")
        assert_map_close(got, wanted, str(dtype))
        assert_state_close(stats.state, exact.state, TOLERANCE[dtype], str(dtype))


@pytest.mark.parametrize("act", OUTPUT_ACTIVATION_CODES)
def test_bn_act_stats_keeps_what_is_not_finite(act):
    x = torch.randn(2, 4, 8, 8, device="cuda")
    x[0, :, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    zeros, ones = torch.zeros(4, device="cuda"), torch.ones(4, device="cuda")
    got, _ = bn_act_stats(x, zeros, ones, act=act, eps=0.0, backend="cuda")
    assert_map_close(got, bn_act_stats(x, zeros, ones, act=act, eps=0.0, backend="reference")[0], act)
    assert got[0, :, 0, 0].isnan().all()


@pytest.mark.parametrize(("shape", "dims"), WORK)
def test_bn_act_stats_in_a_graph_and_on_another_stream(shape, dims):
    x = torch.zeros(shape, device="cuda")
    given = parameters(shape[dims.get("channel_dim", 1)])
    stats = ChannelStats.empty(len(given[0]), device="cuda")
    bn_act_stats(x, *given, backend="cuda", **dims)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = bn_act_stats(x, *given, out=stats, backend="cuda", **dims)
    stats.state.zero_()
    parts = []
    for i in range(3):
        x.copy_(torch.randn(shape, device="cuda") + i)
        parts.append(x.clone())
        graph.replay()
        assert_map_close(y, bn_act_stats(parts[-1], *given, backend="reference", **dims)[0], str(shape))
    wanted = channel_stats(torch.cat(parts), backend="reference", **dims).state
    assert_state_close(stats.state, wanted, 1e-5, str(shape))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(2.0)
        y, stats = bn_act_stats(x, *given, backend="cuda", **dims)
    stream.synchronize()
    assert (stats.state[MIN] == 2).all()
    assert_map_close(y, bn_act_stats(x, *given, backend="reference", **dims)[0], str(shape))


# ------------------------------------------------------------------------------- all of them


def test_workspaces_of_changing_size():
    first = {
        shape: channel_stats(torch.ones(shape, device="cuda"), backend="cuda", **dims).state
        for shape, dims in WORK
    }
    for shape, dims in reversed(WORK):
        again = channel_stats(torch.ones(shape, device="cuda"), backend="cuda", **dims).state
        assert torch.equal(first[shape], again)


def test_one_launch_a_call():
    x = torch.randn(32, 64, 56, 56, device="cuda")
    stats = ChannelStats.empty(64, device="cuda")
    given = parameters(64)
    for call in (
        lambda: channel_stats(x, out=stats, backend="cuda"),
        lambda: bn_act_stats(x, *given, out=stats, backend="cuda"),
    ):
        call()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
        kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        if not kernels:
            pytest.skip("the profiler shows no kernels on this machine")
        assert len(kernels) == 1, kernels


def test_no_host_synchronisation():
    x = torch.randn(8, 64, 56, 56, device="cuda")
    weights = [torch.randn(64, 32, 3, 3, device="cuda")]
    stats = ChannelStats.empty(64, device="cuda")
    given = parameters(64)

    def everything() -> None:
        channel_stats(x, out=stats, backend="cuda")
        bn_act_stats(x, *given, out=stats, backend="cuda")
        pair_stats(x, x, backend="cuda")
        filter_norms(weights, backend="cuda")

    everything()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_side_stream():
    """The kernels wait for what was queued before on the current stream, and only there."""
    stream = torch.cuda.Stream()
    x = torch.zeros(16, 64, 56, 56, device="cuda")
    channel_stats(x, backend="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(2.0)
        got = channel_stats(x, backend="cuda").state
    stream.synchronize()
    assert (got[MIN] == 2).all()
    assert (got[MEAN] == 2).all()


def test_streams_do_not_share_a_workspace():
    streams = [torch.cuda.Stream() for _ in range(4)]
    maps = [torch.full((2, 3, 96, 96), float(i + 1), device="cuda") for i in range(4)]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[] for _ in streams]

    def work(i: int) -> None:
        with torch.cuda.stream(streams[i]):
            results[i] += [channel_stats(maps[i], backend="cuda").state for _ in range(50)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    torch.cuda.synchronize()
    for i, states in enumerate(results):
        assert len(states) == 50
        assert all((s[MEAN] == i + 1).all() for s in states)


@pytest.mark.parametrize(("shape", "dims"), WORK)
def test_graph_capture_and_replay(shape, dims):
    x = torch.randn(shape, device="cuda")
    channels = x.shape[dims.get("channel_dim", 1)]
    stats = ChannelStats.empty(channels, device="cuda")
    channel_stats(x, backend="cuda", **dims)  # loads the kernels before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        channel_stats(x, out=stats, backend="cuda", **dims)
        pairs = pair_stats(x, x, backend="cuda")
        norms = filter_norms([x], backend="cuda")
    stats.state.zero_()
    parts = []
    for i in range(3):
        x.copy_(torch.randn(shape, device="cuda") + i)
        parts.append(x.clone())
        graph.replay()
        channel_stats(parts[-1], backend="cuda", **dims)  # an eager call between replays
    wanted = channel_stats(torch.cat(parts), backend="reference", **dims).state
    assert_state_close(stats.state, wanted, 1e-5, str(shape))
    exact = pair_stats(parts[-1], parts[-1], backend="reference")
    torch.testing.assert_close(pairs.xx, exact.xx, rtol=1e-5, atol=0)
    torch.testing.assert_close(norms[0], filter_norms([parts[-1]], backend="reference")[0], rtol=1e-5, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_second_device():
    with torch.cuda.device(0):
        x = torch.randn(4, 8, 7, 7, device="cuda:1")
        got = channel_stats(x, backend="cuda").state
        assert got.device.index == 1
        assert torch.cuda.current_device() == 0
        assert_state_close(got, channel_stats(x, backend="reference").state, 1e-5, "cuda:1")


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [False, True])
def test_more_than_two_to_the_31_elements(tokens):
    count = 2**31 + 2**21
    if torch.cuda.mem_get_info()[0] < 3 * count * 2:
        pytest.skip("needs 13 GB of free GPU memory")
    x = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    x[-1], x[-2], x[2**31 + 5] = 5.0, -3.0, 2.0  # beyond what 32 bits can count
    shape, dims = ((1, count // 4, 4), {"channel_dim": 2}) if tokens else ((1, 2, count // 2), {})
    got = channel_stats(x.view(shape), backend="cuda", **dims).state
    assert (got[COUNT] == count // x.view(shape).shape[dims.get("channel_dim", 1)]).all()
    assert got[POSITIVE].sum() == 2
    assert got[MAX, -1] == 5
    assert got[MIN].min() == -3
    pairs = pair_stats(x.view(1, -1), x.view(1, -1), backend="cuda")
    assert pairs.xx.item() == 38
    assert pairs.dd.item() == 0


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("per", ["sample", "token"])
def test_pair_stats_agrees_with_the_reference(dtype, per):
    for shape in [(1, 1), (7, 33), (3, 5, 64), (2, 9, 131), (2, 60000), (2, 6, 30, 32), (1, 3, 200, 101)]:
        if per == "token" and len(shape) < 3:
            continue
        x, y = torch.randn(2, *shape, device="cuda").to(dtype)
        for a, b in ((x, y), (x.transpose(-1, -2), y.transpose(-1, -2)), (x[:, ::2], y[:, ::2])):
            got = pair_stats(a, b, per=per, backend="cuda").state
            wanted = pair_stats(a, b, per=per, backend="reference").state
            scale = (wanted[0] * wanted[1]).sqrt().clamp_min(1e-30)
            assert ((got - wanted).abs() / scale).max() <= TOLERANCE[dtype], (shape, a.stride())


def test_filter_norms_of_many_layers():
    shapes = [(64, 3, 7, 7), (64, 64, 1, 1), (256, 64, 3, 3), (10, 4099), (3, 70000), (1000, 2048)]
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
    weights = [
        torch.randn(s, device="cuda").to(d) for s in shapes for d in dtypes
    ] * 30  # more than one table
    for got, wanted in zip(filter_norms(weights, backend="cuda"), filter_norms(weights, backend="reference")):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)


def test_operators_pass_opcheck():
    x = torch.randn(3, 5, 7, 7, device="cuda")
    torch.library.opcheck(torch.ops.idap.channel_stats.default, (x, 1, 0, "relu", "cuda"))
    state = torch.zeros(11, 5, dtype=torch.float64, device="cuda")
    torch.library.opcheck(torch.ops.idap.channel_stats_.default, (state, x, 1, 0, "relu", "cuda"))


def test_torch_compile():
    @torch.compile(fullgraph=True, dynamic=True)
    def step(x: Tensor) -> Tensor:
        return channel_stats(x.relu() + 1, backend="cuda").state

    for batch in (3, 5):
        x = torch.randn(batch, 5, 7, 7, device="cuda")
        wanted = channel_stats(x.relu() + 1, backend="reference").state
        assert_state_close(step(x), wanted, 1e-5, f"batch {batch}")
