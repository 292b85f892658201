from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from idap_kernels import (
    BackendUnavailable,
    ChannelStats,
    InvalidInputError,
    available_backends,
    bn_act_stats,
    channel_stats,
)

from .common import SHAPES, TOLERANCE, assert_state_close, layouts

BACKENDS = [
    "reference",
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            available_backends()["cpu"] is not None, reason=f"CPU kernels: {available_backends()['cpu']}"
        ),
    ),
]
# Half a unit in the last place, as a share; float32 sums a few roundings up.
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
DTYPES = list(ROUNDING)


def name(dtype):
    return str(dtype).removeprefix("torch.")


def parameters(channels, dtype=torch.float32):
    """Running mean and variance, weight and bias (C,) of a batch norm that moves and turns its channels."""
    mean, weight, bias = torch.randn(3, channels, dtype=torch.float64)
    var = torch.rand(channels, dtype=torch.float64) * 3 + 0.05
    return [t.to(dtype) for t in (mean, var, weight, bias)]


def defined(x, mean, var, weight, bias, eps, act, channel_dim):
    """The definition, in float64 and element by element."""
    shape = [1] * x.dim()
    shape[channel_dim] = -1
    mean, var, weight, bias = (
        None if t is None else t.double().view(shape) for t in (mean, var, weight, bias)
    )
    n = (x.double() - mean) / (var + eps).sqrt()
    n = n * (1 if weight is None else weight) + (0 if bias is None else bias)
    return {
        "identity": lambda: n,
        "relu": lambda: n.clamp(min=0),
        "relu6": lambda: n.clamp(0, 6),
        "gelu": lambda: n * 0.5 * (1 + torch.erf(n / math.sqrt(2))),
        "silu": lambda: n / (1 + torch.exp(-n)),
        "hardswish": lambda: n * (n + 3).clamp(0, 6) / 6,
    }[act]()


ACTS = ["identity", "relu", "relu6", "gelu", "silu", "hardswish"]


def assert_map_close(y, wanted, x, what):
    # Cancellation between x and the mean: the largest value is the scale.
    error = ((y.double() - wanted).abs() / (wanted.abs() + 0.05 * wanted.abs().max())).nan_to_num(0).max()
    assert error <= ROUNDING[x.dtype], f"{what}: {float(error):.1e}"
    assert y.dtype == x.dtype
    assert y.shape == x.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_every_layout_and_shape(backend, dtype):
    for i, shape in enumerate(SHAPES):
        x = (torch.randn(shape, dtype=torch.float64) * 1.7 + 0.2).to(dtype)
        for layout, (view, dims) in layouts(x).items():
            act = ACTS[i % len(ACTS)]
            channel_dim = dims.get("channel_dim", 1) % view.dim()
            norm = parameters(
                view.shape[channel_dim], torch.float64 if dtype == torch.float64 else torch.float32
            )
            y, stats = bn_act_stats(view, *norm, eps=1e-3, act=act, backend=backend, **dims)
            what = f"{layout} {shape} {act}"
            assert_map_close(y, defined(view, *norm, 1e-3, act, channel_dim), view, what)
            wanted = channel_stats(view, backend="reference", **dims).state
            assert_state_close(stats.state, wanted, TOLERANCE[dtype], what)
            if torch.empty_like(view).stride() == view.stride():
                assert y.stride() == view.stride(), what


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("act", ACTS)
def test_every_activation_dtype_and_kind_of_parameters(backend, act):
    for dtype in DTYPES:
        x = (torch.randn(3, 21, 5, 7) * 2).to(dtype)
        for given in DTYPES:
            mean, var, weight, bias = parameters(21, given)
            for w, b in ((weight, bias), (None, bias), (weight, None), (None, None)):
                y, stats = bn_act_stats(x, mean, var, w, b, act=act, activation="silu", backend=backend)
                assert_map_close(y, defined(x, mean, var, w, b, 1e-5, act, 1), x, f"{dtype} {given}")
                wanted = channel_stats(x, activation="silu", backend=backend)
                assert_state_close(stats.state, wanted.state, TOLERANCE[dtype], f"{dtype} {given}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_is_as_in_torch(backend):
    values = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3e38, -3e38, 1e-40]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.tensor(values, dtype=dtype).repeat(9).reshape(1, 1, -1)
        mean, var = torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype)
        modules = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "gelu": F.gelu, "hardswish": F.hardswish}
        for act, function in modules.items():
            y, _ = bn_act_stats(x, mean, var, eps=0.0, act=act, backend=backend)
            wanted = function(x.double()).to(dtype)
            torch.testing.assert_close(y, wanted, equal_nan=True, rtol=1e-2, atol=1e-30)
        y, _ = bn_act_stats(x, torch.tensor([float("nan")], dtype=dtype), var, act="relu", backend=backend)
        assert y.isnan().all()  # a broken norm must not look like a dead channel


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_but_the_result_is_written(backend):
    x = torch.randn(2, 19, 9, 11)
    norm = parameters(19)
    before = [t.clone() for t in (x, *norm)]
    y, stats = bn_act_stats(x, *norm, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *norm)))
    assert y.data_ptr() != x.data_ptr()
    again, _ = bn_act_stats(x, *norm, backend=backend)
    assert torch.equal(y, again)
    assert stats.count == 2 * 99


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_accumulate_as_those_of_channel_stats(backend):
    parts = torch.randn(5, 6, 12, 8, 8).unbind()
    norm = parameters(12)
    running = ChannelStats.empty(12)
    for part in parts:
        _, returned = bn_act_stats(part, *norm, out=running, backend=backend)
        assert returned is running
    whole = channel_stats(torch.cat(parts), backend="reference")
    assert_state_close(running.state, whole.state, 1e-5, "five parts")


def test_gradients_are_not_followed():
    x = torch.randn(2, 3, 4, requires_grad=True)
    mean, var, weight, bias = parameters(3)
    y, stats = bn_act_stats(x, mean, var, weight.requires_grad_(), bias)
    assert not y.requires_grad
    assert not stats.state.requires_grad


def test_of_a_large_map():
    """Above the size from which stores pass the cache, where they do."""
    x = torch.randn(8, 64, 112, 112)
    norm = parameters(64)
    for view in (x, x.to(memory_format=torch.channels_last), x[:, :, 1:, 1:]):
        y, stats = bn_act_stats(view, *norm)
        torch.testing.assert_close(y, F.batch_norm(view, *norm, training=False).relu(), rtol=1e-5, atol=1e-5)
        assert_state_close(stats.state, channel_stats(view, backend="reference").state, 1e-5, "large")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act": "mish"}, "known are relu"),
        ({"activation": "relu6"}, "activation is 'relu6'"),
        ({"running_mean": torch.zeros(4)}, r"running_mean has shape \(4,\); x has 3 channels"),
        ({"running_var": torch.ones(3, 1)}, r"running_var has shape \(3, 1\)"),
        ({"running_var": None}, "running_var is a NoneType"),
        ({"weight": torch.ones(3, dtype=torch.int64)}, "weight has dtype torch.int64"),
        ({"bias": torch.ones(3, device="meta")}, "bias is on meta, x on cpu"),
        ({"channel_dim": 0}, "both dimension 0"),
        ({"x": torch.randn(5)}, "a sample and a channel dimension"),
        ({"x": torch.randn(0, 3, 4)}, "is empty"),
        ({"out": ChannelStats.empty(5)}, "x has 3"),
        ({"backend": "gpu"}, "backend is 'gpu'"),
    ],
)
def test_bad_input(change, message):
    arguments = {
        "x": torch.randn(2, 3, 4),
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        **change,
    }
    with pytest.raises(InvalidInputError, match=message):
        bn_act_stats(**arguments)


def test_a_backend_asked_for_by_name_never_falls_back():
    if available_backends()["cuda"] is None:
        pytest.skip("here the backend works")
    with pytest.raises(BackendUnavailable, match="cuda"):
        bn_act_stats(torch.randn(2, 3, 4), torch.zeros(3), torch.ones(3), backend="cuda")


def test_opcheck():
    x = torch.randn(3, 5, 4)
    norm = parameters(5)
    for sample in (
        x,
        x.bfloat16(),
        torch.randn(3, 5, 4, 6)[:, :, 1:, ::2],
        x.transpose(0, 2).contiguous().transpose(0, 2),
    ):
        for weights in (norm, [*norm[:2], None, None]):
            call = (sample, *weights, 1e-5, "silu", 1, 0, "relu", "auto")
            torch.library.opcheck(torch.ops.idap.bn_act_stats.default, call)
            state = ChannelStats.empty(5).state
            torch.library.opcheck(torch.ops.idap.bn_act_stats_.default, (state, *call))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_functions_give_the_same_bits(dynamic):
    norm = parameters(7)
    running = ChannelStats.empty(7)

    def step(x):
        y, stats = bn_act_stats(x.sin(), *norm, act="hardswish")
        bn_act_stats(y, *norm, out=running)
        return y + 1, stats.flow_norm

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for batch in (2, 3):
        x = torch.randn(batch, 7, 5)
        for got, wanted in zip(compiled(x), step(x)):
            assert torch.equal(got, wanted)
    assert running.samples == 2 * (2 + 3)


def test_export():
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(3).eval()

        def forward(self, x):
            n = self.norm
            y, stats = bn_act_stats(x, n.running_mean, n.running_var, n.weight, n.bias, eps=n.eps)
            return y, stats.flow_norm

    program = torch.export.export(
        Module(), (torch.randn(2, 3, 8),), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    )
    x = torch.randn(5, 3, 8)
    for got, wanted in zip(program.module()(x), Module()(x)):
        torch.testing.assert_close(got, wanted)
