from __future__ import annotations

import pytest
import torch

from idap_kernels import InvalidInputError, available_backends, filter_norms

from .common import TOLERANCE

needs_cpu = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason=f"CPU kernels: {available_backends()['cpu']}"
)

WEIGHTS = [
    (1, 1),
    (64, 3, 7, 7),
    (33, 17),
    (10, 2048),
    (5, 1, 3, 3),
    (3, 70000),
    (129, 65, 1, 1),
    (2, 3, 4, 5, 6),
]


@needs_cpu
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
def test_all_layers_at_once_agree_with_the_definition(dim, dtype):
    weights = [torch.randn(s, dtype=torch.float64).to(dtype) for s in WEIGHTS]
    weights += [w.transpose(0, 1) for w in weights]  # other strides
    weights += [torch.randn(40, 50, dtype=torch.float64).to(dtype)[3:30, 1::2]]
    norms = filter_norms(weights, dim=dim, backend="cpu")
    assert len(norms) == len(weights)
    for norm, w in zip(norms, weights):
        exact = w.double().movedim(dim, 0).flatten(1).norm(dim=1)
        assert norm.dtype == torch.float64
        torch.testing.assert_close(norm, exact, rtol=TOLERANCE[dtype], atol=1e-300)
    for norm, reference in zip(norms, filter_norms(weights, dim=dim, backend="reference")):
        torch.testing.assert_close(norm, reference, rtol=TOLERANCE[dtype], atol=1e-300)


@needs_cpu
def test_dtypes_mix():
    weights = [torch.randn(4, 5, dtype=d) for d in TOLERANCE]
    for norm, w in zip(filter_norms(weights), weights):
        torch.testing.assert_close(norm, w.double().norm(dim=1), rtol=1e-5, atol=0)


@needs_cpu
def test_half_precision_does_not_overflow():
    w = torch.full((2, 1000), 60000.0, dtype=torch.float16)
    assert filter_norms([w])[0].isfinite().all()


@needs_cpu
def test_threads_do_not_change_a_bit():
    weights = [torch.randn(s) for s in WEIGHTS]
    torch.set_num_threads(1)
    one = filter_norms(weights)
    torch.set_num_threads(6)
    assert all(torch.equal(a, b) for a, b in zip(filter_norms(weights), one))


def test_parameters_and_an_empty_list():
    assert filter_norms([]) == []
    layer = torch.nn.Linear(4, 3)
    torch.testing.assert_close(filter_norms([layer.weight])[0], layer.weight.detach().double().norm(dim=1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: filter_norms(torch.zeros(2, 3)), "sequence"),
        (lambda: filter_norms([torch.zeros(3)]), "two dimensions"),
        (lambda: filter_norms([torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int8)]), r"weights\[1\]"),
        (lambda: filter_norms([torch.zeros(2, 3)], dim=2), "dim is 2"),
        (lambda: filter_norms([torch.zeros(0, 3)]), "empty"),
        (lambda: filter_norms([torch.zeros(2, 3), torch.zeros(2, 3, device="meta")]), "meta"),
    ],
)
def test_bad_input_raises_our_own_error(make, message):
    with pytest.raises(InvalidInputError, match=message):
        make()


@needs_cpu
def test_weights_too_small_or_large_to_square_in_float():
    for factor in (1e-25, 1e25):
        w = torch.randn(4, 33) * factor
        torch.testing.assert_close(filter_norms([w])[0], w.double().norm(dim=1), rtol=1e-12, atol=0)


def test_six_dimensions_that_do_not_merge():
    w = torch.randn(4, 4, 4, 4, 4, 8)[:, :3, :3, :3, :3, :3]
    torch.testing.assert_close(filter_norms([w])[0], w.double().flatten(1).norm(dim=1))
