"""The registered operators: schema, fake tensors, torch.compile, torch.export."""

from __future__ import annotations

import warnings

import pytest
import torch

from idap_kernels import ChannelStats, channel_stats, filter_norms, pair_stats


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_opcheck(backend):
    x = torch.randn(3, 5, 4)
    check = torch.library.opcheck
    for sample in (x, x.bfloat16(), x.transpose(1, 2), x[:, 1:, ::2]):
        check(torch.ops.idap.channel_stats.default, (sample, 1, 0, "relu", backend))
        check(
            torch.ops.idap.channel_stats_.default,
            (ChannelStats.empty(sample.shape[1]).state, sample, 1, 0, "relu", backend),
        )
        check(torch.ops.idap.pair_stats.default, (sample, sample * 2, 1, backend))
        check(torch.ops.idap.filter_norms.default, ([sample, x], 0, backend))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_functions_give_the_same_bits(compiler, dynamic):
    def everything(x, w):
        y = x.sin()
        s = channel_stats(y, channel_dim=-1)
        p = pair_stats(x, y, per="token")
        (n,) = filter_norms([w])
        return s.flow_norm * n, s.var, s.apoz, p.relative_change, s.state

    torch._dynamo.reset()
    compiled = torch.compile(everything, backend=compiler, fullgraph=True, dynamic=dynamic)
    for batch in (2, 3):
        x, w = torch.randn(batch, 7, 5), torch.randn(5, 4)
        for got, wanted in zip(compiled(x, w), everything(x, w)):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)


def test_accumulating_inside_a_compiled_function():
    running = ChannelStats.empty(3)

    def step(x):
        channel_stats(x * 2, out=running)
        return x + 1

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 5)
    compiled(x)
    compiled(x)
    wanted = channel_stats(torch.cat([x, x]) * 2)
    torch.testing.assert_close(running.state, wanted.state)


def test_export():
    class Module(torch.nn.Module):
        def forward(self, x):
            return channel_stats(x).flow_norm

    x = torch.randn(2, 3, 8)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Module(), (x,), dynamic_shapes={"x": {0: batch}})
    y = torch.randn(5, 3, 8)
    torch.testing.assert_close(program.module()(y), Module()(y))


def test_fake_tensors_need_no_data():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 3, 4)
        assert channel_stats(x).state.shape == (11, 3)
        assert pair_stats(x, x).state.shape == (4, 2)
        assert filter_norms([x])[0].shape == (2,)


def test_function_transforms():
    x = torch.randn(4, 2, 3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it loops
        mapped = torch.vmap(lambda t: channel_stats(t).flow_norm)(x)
    torch.testing.assert_close(mapped, torch.stack([channel_stats(t).flow_norm for t in x]))
    gradient = torch.func.grad(lambda t: t.sum() + channel_stats(t).flow_norm.sum().float())(x[0])
    assert torch.equal(gradient, torch.ones_like(x[0]))  # statistics are not followed


def test_tracing_records_the_operator():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated, and used
        traced = torch.jit.trace(lambda t: channel_stats(t).state, torch.randn(2, 3, 4))
    x = torch.randn(2, 3, 4)
    assert torch.equal(traced(x), channel_stats(x).state)


def test_tensors_without_memory():
    zeros = torch._efficientzerotensor((2, 3, 4))
    assert torch.equal(channel_stats(zeros).max, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(pair_stats(zeros, zeros).dd, torch.zeros(2, dtype=torch.float64))
    assert torch.equal(filter_norms([zeros])[0], torch.zeros(2, dtype=torch.float64))
