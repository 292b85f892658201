from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idap_kernels import ChannelStats, InvalidInputError, available_backends, channel_stats
from idap_kernels.channel_stats import ROWS

from .common import SHAPES, TOLERANCE, assert_state_close, layouts

ACTIVATIONS = ["relu", "identity", "gelu", "silu"]

needs_cpu = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason=f"CPU kernels: {available_backends()['cpu']}"
)


@pytest.fixture
def poison():
    """Memory that torch hands out holds NaN, so that what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


@needs_cpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_layout_agrees_with_the_reference(dtype, activation, poison):
    for shape in SHAPES:
        x = (torch.randn(shape, dtype=torch.float64) * 1.7 + 0.2).to(dtype)
        for layout, (y, dims) in layouts(x).items():
            what = f"{layout} {shape}"
            got = channel_stats(y, activation=activation, backend="cpu", **dims).state
            wanted = channel_stats(y, activation=activation, backend="reference", **dims).state
            assert_state_close(got, wanted, TOLERANCE[dtype], what)


def test_reference_against_the_definitions():
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    s = channel_stats(x, backend="reference")
    flat = x.transpose(0, 1).flatten(1)
    relu = x.relu().flatten(2)
    close = torch.testing.assert_close
    assert s.count == 90
    assert s.samples == 3
    close(s.mean, flat.mean(1))
    close(s.var, flat.var(1, correction=0))
    close(s.std, flat.std(1, correction=0))
    close(s.rms, flat.square().mean(1).sqrt())
    close(s.abs_mean, flat.abs().mean(1))
    close(s.min, flat.amin(1))
    close(s.max, flat.amax(1))
    close(s.positive_fraction, (flat > 0).double().mean(1))
    close(s.apoz, (flat <= 0).double().mean(1))
    close(s.flow_norm, relu.norm(dim=2).mean(0))
    close(s.flow_energy, relu.square().sum(2).mean(0))
    close(s.sample_abs_rms, x.abs().flatten(2).mean(2).square().mean(0).sqrt())


@needs_cpu
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_do_not_change_a_bit(threads):
    for shape in [
        (4, 64, 7, 7),
        (2, 3, 200, 333),
        (1, 1, 300000),
        (64, 300),
        (1, 257, 9, 40),
        (16, 200, 14, 14),
        (8, 96, 28, 28),
        (2000, 300),
    ]:
        for dtype in (torch.float32, torch.bfloat16):
            for y, dims in layouts(torch.randn(shape).to(dtype)).values():
                torch.set_num_threads(1)
                one = channel_stats(y, **dims).state
                torch.set_num_threads(threads)
                assert torch.equal(channel_stats(y, **dims).state.nan_to_num(9e9), one.nan_to_num(9e9))


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tiles", "tokens", "stepped"])
def test_variance_far_from_zero(layout):
    shape = (8, 40, 7, 7) if layout == "tiles" else (8, 16, 50, 50)
    x = torch.randn(shape) + 1e4
    dims = {}
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    if layout == "tokens":
        x, dims = x.flatten(2).transpose(1, 2).contiguous(), {"channel_dim": 2}
    if layout == "stepped":
        x = x[..., ::3]
    axes = (0, 1) if layout == "tokens" else (0, 2, 3)
    exact = x.double().var(dim=axes, correction=0)
    error = ((channel_stats(x, **dims).var - exact).abs() / exact).max()
    assert error < 1e-5


@needs_cpu
def test_variance_with_an_outlier_where_the_shift_is_taken():
    # The first element of a block is its shift: here it is as far off as it can be.
    for layout, size in (("rows", 4096), ("channels", 4096), ("tiles", 240), ("tiles", 15)):
        x = torch.full((1, 32, size), 1e4) + torch.randn(1, 32, size)
        x[..., 0] = 0.0
        y = x.transpose(1, 2).contiguous().transpose(1, 2) if layout == "channels" else x
        exact = x.double().var(dim=(0, 2), correction=0)
        assert ((channel_stats(y).var - exact).abs() / exact).max() < 1e-4


@needs_cpu
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_constants_have_no_variance(dtype):
    for shape in [(3, 20, 7, 7), (2, 5, 40, 40), (4, 33), (2, 70, 5, 64)]:
        for y, dims in layouts(torch.full(shape, 0.7).to(dtype)).values():
            if y.isnan().any():
                continue
            s = channel_stats(y, **dims)
            assert s.var.abs().max() <= 1e-12
            assert torch.equal(s.min, s.max)


@needs_cpu
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 40, 7, 7), (2, 40, 70), (2, 40, 30, 40), (3, 40)])
def test_nan_stays_in_its_channel(dtype, shape, sign):
    for layout in ("contiguous", "channels_last"):
        x = torch.randn(shape).to(dtype)
        x[1, 17].fill_(0.5)
        x[1, 17].view(-1)[-1] = torch.copysign(torch.tensor(float("nan")), torch.tensor(sign)).to(dtype)
        if layout == "channels_last":
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        got = channel_stats(x, backend="cpu").state
        wanted = channel_stats(x, backend="reference").state
        others = [c for c in range(40) if c != 17]
        assert_state_close(got[:, others], wanted[:, others], TOLERANCE[dtype], layout)
        for row in ("mean", "m2", "abs_sum", "act_sq_sum", "act_norm_sum", "min", "max"):
            assert got[ROWS.index(row), 17].isnan(), (layout, row)


@needs_cpu
@pytest.mark.parametrize("activation", ["relu", "identity", "silu"])
@pytest.mark.parametrize("values", [[float("inf")], [float("-inf")], [float("inf"), float("-inf")]])
@pytest.mark.parametrize("shape", [(2, 20, 7, 7), (2, 20, 500), (2, 20)])
def test_infinities_agree_with_the_reference(shape, values, activation):
    x = torch.randn(shape)
    for i, value in enumerate(values):
        x[i, 3].view(-1)[-1] = value
    got = channel_stats(x, activation=activation, backend="cpu").state
    wanted = channel_stats(x, activation=activation, backend="reference").state
    assert torch.equal(got.isfinite(), wanted.isfinite())
    assert torch.equal(got[:, 3].nan_to_num(1.5), wanted[:, 3].nan_to_num(1.5)) or torch.allclose(
        got[:, 3], wanted[:, 3], rtol=1e-5, equal_nan=True
    )


@needs_cpu
def test_more_than_2_31_elements():
    elements = 2**31 + 192
    try:
        zeros = np.zeros(elements, dtype=np.uint16)  # pages that nothing wrote cost no memory
    except MemoryError as error:
        pytest.skip(f"not enough memory: {error}")
    x = torch.from_numpy(zeros).view(torch.bfloat16).view(1, 2, -1)
    x[0, 1, -1] = 3.0
    s = channel_stats(x)
    assert s.max.tolist() == [0.0, 3.0]
    assert s.flow_norm.tolist() == [0.0, 3.0]
    assert s.count == elements // 2
    last = x.view(-1, 64).as_strided((2, 64), ((elements - 64), 1))  # rows 2^31 elements apart
    assert channel_stats(last).max.tolist() == [0.0] * 63 + [3.0]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.sampled_from(["relu", "identity", "silu"]))
def test_merging_equals_concatenating(sizes, activation):
    x = torch.randn(sum(sizes), 6, 5, 3)
    parts = [channel_stats(p, activation=activation) for p in x.split(sizes)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    running = ChannelStats.empty(6, activation=activation)
    for p in x.split(sizes):
        assert channel_stats(p, activation=activation, out=running) is running
    whole = channel_stats(x, activation=activation)
    assert_state_close(merged.state, whole.state, 1e-6, "merge")
    assert_state_close(running.state, whole.state, 1e-6, "out")


def test_merging_with_nothing_changes_nothing():
    s = channel_stats(torch.randn(2, 5, 4) - 10)
    empty = ChannelStats.empty(5)
    assert torch.equal(s.merge(empty).state, s.state)
    assert torch.equal(empty.merge(s).state, s.state)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_accumulating_keeps_a_nan(backend):
    if available_backends()[backend]:
        pytest.skip(available_backends()[backend])
    x = torch.randn(2, 3, 4)
    bad = x.clone()
    bad[0, 1, 2] = float("nan")
    for order in ([bad, x], [x, bad]):
        running = ChannelStats.empty(3)
        for part in order:
            channel_stats(part, out=running, backend=backend)
        assert running.min.isnan().tolist() == [False, True, False]
        assert running.max.isnan().tolist() == [False, True, False]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.floats(0.01, 100.0))
def test_scaling_and_permuting(channels, positions, factor):
    x = torch.randn(3, channels, positions, dtype=torch.float64)
    s, scaled = channel_stats(x), channel_stats(x * factor)
    torch.testing.assert_close(scaled.flow_norm, factor * s.flow_norm)
    order = torch.randperm(channels)
    torch.testing.assert_close(channel_stats(x[:, order]).flow_norm, s.flow_norm[order])


def test_a_dead_channel_has_no_flow():
    x = torch.randn(4, 5, 6)
    x[:, 2] = -x[:, 2].abs()
    s = channel_stats(x)
    assert s.flow_norm[2] == 0
    assert s.apoz[2] == 1


def test_parameters_gradients_and_negated_views():
    x = torch.nn.Parameter(torch.randn(2, 3, 4))
    state = channel_stats(x).state
    assert not state.requires_grad
    assert x.grad is None
    z = torch.randn(2, 3, 4, dtype=torch.complex64).conj().imag  # a view with its sign still to be turned
    assert z.is_neg()
    assert_state_close(
        channel_stats(z).state, channel_stats(z.clone(), backend="reference").state, 2e-6, "negated"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: channel_stats(torch.randn(3)), "shape"),
        (lambda: channel_stats(torch.zeros(2, 3, dtype=torch.int32)), "dtype"),
        (lambda: channel_stats(torch.zeros(2, 3, dtype=torch.complex64)), "dtype"),
        (lambda: channel_stats([[1.0, 2.0]]), "list"),
        (lambda: channel_stats(torch.zeros(0, 3, 4)), "empty"),
        (lambda: channel_stats(torch.zeros(2, 0)), "empty"),
        (lambda: channel_stats(torch.zeros(2, 3), channel_dim=2), "channel_dim is 2"),
        (lambda: channel_stats(torch.zeros(2, 3), sample_dim=-3), "sample_dim is -3"),
        (lambda: channel_stats(torch.zeros(2, 3), channel_dim=0), "both"),
        (lambda: channel_stats(torch.zeros(2, 3), activation="tanh"), "tanh"),
        (lambda: channel_stats(torch.zeros(2, 3), backend="gpu"), "gpu"),
        (lambda: channel_stats(torch.zeros(2, 3).to_sparse()), "to_dense"),
        (lambda: channel_stats(torch.zeros(2, 3), out=ChannelStats.empty(4)), "4 channels"),
        (lambda: channel_stats(torch.zeros(2, 3), out=torch.zeros(11, 3)), "ChannelStats"),
        (lambda: channel_stats(torch.zeros(2, 3), out=ChannelStats.empty(3, activation="silu")), "silu"),
        (lambda: channel_stats(torch.zeros(2, 3), out=ChannelStats.empty(3, device="meta")), "meta"),
        (lambda: ChannelStats.empty(3).merge(ChannelStats.empty(4)), "merge"),
        (lambda: ChannelStats.from_state_dict({"activation": "relu"}), "state"),
        (lambda: ChannelStats.from_state_dict({"state": torch.zeros(2, 3), "activation": "relu"}), "11"),
        (lambda: ChannelStats.empty(3).all_reduce(), "init_process_group"),
        (lambda: ChannelStats.empty(0), "at least one"),
        (lambda: ChannelStats.empty(3, activation="tanh"), "tanh"),
        (lambda: channel_stats(torch.zeros(2, 3), channel_dim=1.0), "float"),
        (lambda: channel_stats(torch.zeros(2, 3), sample_dim=None), "NoneType"),
        (lambda: channel_stats(torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])), "nested"),
    ],
)
def test_bad_input_raises_our_own_error(make, message):
    with pytest.raises(InvalidInputError, match=message):
        make()


def test_an_error_leaves_out_as_it_was():
    running = ChannelStats.empty(3)
    channel_stats(torch.randn(2, 3, 4), out=running)
    before = running.state.clone()
    with pytest.raises(InvalidInputError):
        channel_stats(torch.randn(2, 4, 4), out=running)
    assert torch.equal(running.state, before)


def test_state_dict_round_trip():
    s = channel_stats(torch.randn(2, 3, 4), activation="silu")
    again = ChannelStats.from_state_dict(s.state_dict())
    assert torch.equal(again.state, s.state)
    assert again.activation == "silu"
