from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idap_kernels import InvalidInputError, PairStats, available_backends, pair_stats

from .common import SHAPES, TOLERANCE, layouts

needs_cpu = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason=f"CPU kernels: {available_backends()['cpu']}"
)


def assert_pairs_close(got: PairStats, wanted: PairStats, tolerance: float, what: str) -> None:
    assert got.state.shape == wanted.state.shape
    scale = torch.stack([wanted.xx, wanted.yy, (wanted.xx * wanted.yy).sqrt(), wanted.dd])
    error = ((got.state - wanted.state).abs() / scale.clamp_min(1e-300)).max()
    assert error <= tolerance, f"{what}: {error:.1e}"


@needs_cpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("per", ["sample", "token"])
def test_every_layout_agrees_with_the_reference(dtype, per):
    for shape in SHAPES:
        x = torch.randn(shape, dtype=torch.float64).to(dtype)
        y = (x.double() + 0.1 * torch.randn(shape)).to(dtype)
        for layout, (a, _) in layouts(x).items():
            b = layouts(y)[layout][0]
            for second in (b, b.contiguous()):  # also with layouts that differ
                got = pair_stats(a, second, per=per, backend="cpu")
                wanted = pair_stats(a, second, per=per, backend="reference")
                assert_pairs_close(got, wanted, TOLERANCE[dtype], f"{layout} {shape}")


def test_reference_against_the_definitions():
    x, y = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    s = pair_stats(x, y, backend="reference")
    a, b = x.flatten(1), y.flatten(1)
    torch.testing.assert_close(s.relative_change, (b - a).norm(dim=1) / a.norm(dim=1))
    torch.testing.assert_close(s.cosine, torch.cosine_similarity(a, b, dim=1))
    torch.testing.assert_close(s.block_influence, 1 - torch.cosine_similarity(a, b, dim=1))
    tokens = pair_stats(x, y, per="token", backend="reference")
    torch.testing.assert_close(tokens.xy, (x * y).sum(-1).flatten())


@needs_cpu
def test_a_small_difference_does_not_cancel():
    x = torch.randn(2, 50000) * 1e3
    y = x.clone()
    y[:, ::7] += 0.5
    exact = (y.double() - x.double()).square().sum(1)
    torch.testing.assert_close(pair_stats(x, y).dd, exact, rtol=1e-6, atol=0)
    assert torch.equal(pair_stats(x, x).dd, torch.zeros(2, dtype=torch.float64))


@needs_cpu
def test_threads_do_not_change_a_bit():
    for shape in [(1, 300000), (3, 100001), (7, 5, 200), (2, 3, 50, 51)]:
        x, y = torch.randn(shape), torch.randn(shape)
        torch.set_num_threads(1)
        one = pair_stats(x, y).state
        torch.set_num_threads(5)
        assert torch.equal(pair_stats(x, y).state, one)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.01, 100.0))
def test_divergence_does_not_change_with_a_common_scale(factor):
    x, y = torch.randn(4, 30, dtype=torch.float64), torch.randn(4, 30, dtype=torch.float64)
    torch.testing.assert_close(
        pair_stats(factor * x, factor * y).relative_change, pair_stats(x, y).relative_change
    )


def test_zeros_give_numbers():
    z, x = torch.zeros(2, 8), torch.randn(2, 8)
    assert torch.equal(pair_stats(z, z).relative_change, torch.zeros(2, dtype=torch.float64))
    assert torch.equal(pair_stats(x, z).cosine, torch.zeros(2, dtype=torch.float64))
    assert pair_stats(z, x).relative_change.isfinite().all()


def test_merge_keeps_the_order_of_rows():
    x, y = torch.randn(5, 8), torch.randn(5, 8)
    merged = pair_stats(x[:2], y[:2]).merge(pair_stats(x[2:], y[2:]))
    torch.testing.assert_close(merged.state, pair_stats(x, y).state)
    again = PairStats.from_state_dict(merged.state_dict())
    assert torch.equal(again.state, merged.state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pair_stats(torch.zeros(2, 3), torch.zeros(2, 4)), "must be the same"),
        (lambda: pair_stats(torch.zeros(2, 3), torch.zeros(2, 3).double()), "must be the same"),
        (lambda: pair_stats(torch.zeros(2, 3), torch.zeros(2, 3, device="meta")), "must be the same"),
        (lambda: pair_stats(torch.zeros(2, 3), torch.zeros(2, 3), per="row"), "'row'"),
        (lambda: pair_stats(torch.zeros(3), torch.zeros(3)), "two dimensions"),
        (lambda: pair_stats(torch.zeros(0, 3), torch.zeros(0, 3)), "empty"),
        (lambda: pair_stats(torch.zeros(2, 3), None), "NoneType"),
        (lambda: pair_stats(torch.zeros(2, 3).long(), torch.zeros(2, 3).long()), "dtype"),
        (lambda: pair_stats(torch.zeros(2, 3), torch.zeros(2, 3), backend="tpu"), "tpu"),
        (lambda: PairStats.from_state_dict({}), "state"),
    ],
)
def test_bad_input_raises_our_own_error(make, message):
    with pytest.raises(InvalidInputError, match=message):
        make()


def test_the_cosine_of_small_vectors():
    x = torch.full((2, 8), 1e-12)
    torch.testing.assert_close(pair_stats(x, 2 * x).cosine, torch.ones(2, dtype=torch.float64))
