"""The same cases under pytest-benchmark, one group a case, for a look at a single one.

pytest benchmarks --benchmark-enable -k "32x2048x7x7 and float32"

The committed figures come from bench_kernels.py, which takes the functions of a case in turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_kernels import resnet50_weights
from cases import Case, grid
from peers import (
    eager_bn_act,
    eager_bn_act_stats,
    eager_channel_stats,
    eager_filter_norms,
    eager_pair_stats,
    released_expression,
)

from idap_kernels import bn_act_stats, channel_stats, filter_norms, pair_stats

CHANNEL_STATS: dict[str, Callable[[torch.Tensor, int], Any]] = {
    "idap": lambda x, dim: channel_stats(x, channel_dim=dim),
    "eager": eager_channel_stats,
    "released": released_expression,
    "compile": torch.compile(eager_channel_stats, dynamic=False),
}
compiled_bn_act_stats = torch.compile(eager_bn_act_stats, dynamic=False)
Norm = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
BN_ACT_STATS: dict[str, Callable[[torch.Tensor, Norm, int], Any]] = {
    "idap": lambda x, norm, dim: bn_act_stats(x, *norm, channel_dim=dim),
    "forward": lambda x, norm, dim: eager_bn_act(x, *norm, channel_dim=dim),
    "separate": lambda x, norm, dim: (
        eager_bn_act(x, *norm, channel_dim=dim),
        channel_stats(x, channel_dim=dim),
    ),
    "compile": lambda x, norm, dim: compiled_bn_act_stats(x, *norm, channel_dim=dim),
}
PAIR_STATS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "idap": pair_stats,
    "eager": eager_pair_stats,
    "compile": torch.compile(eager_pair_stats, dynamic=False),
}
FILTER_NORMS: dict[str, Callable[[list[torch.Tensor]], Any]] = {
    "idap": filter_norms,
    "eager": eager_filter_norms,
    "compile": torch.compile(eager_filter_norms, dynamic=False),
}


@pytest.mark.parametrize("who", CHANNEL_STATS)
@pytest.mark.parametrize("case", grid("cpu"), ids=lambda case: case.name)
def test_channel_stats(benchmark: Any, case: Case, who: str) -> None:
    benchmark.group = f"channel_stats {case.name}"
    x = case.make()
    torch._dynamo.reset()
    benchmark.pedantic(CHANNEL_STATS[who], (x, case.channel_dim), rounds=20, warmup_rounds=2)


@pytest.mark.parametrize("who", BN_ACT_STATS)
@pytest.mark.parametrize("case", grid("cpu"), ids=lambda case: case.name)
def test_bn_act_stats(benchmark: Any, case: Case, who: str) -> None:
    benchmark.group = f"bn_act_stats {case.name}"
    x = case.make()
    norm = tuple(torch.rand(4, case.shape[case.channel_dim]) + 0.5)
    torch._dynamo.reset()
    function = BN_ACT_STATS[who]
    benchmark.pedantic(function, (x, norm, case.channel_dim), rounds=20, warmup_rounds=2)


@pytest.mark.parametrize("who", PAIR_STATS)
@pytest.mark.parametrize("case", grid("cpu"), ids=lambda case: case.name)
def test_pair_stats(benchmark: Any, case: Case, who: str) -> None:
    benchmark.group = f"pair_stats {case.name}"
    x, y = case.make(seed=0), case.make(seed=1)
    torch._dynamo.reset()
    benchmark.pedantic(PAIR_STATS[who], (x, y), rounds=20, warmup_rounds=2)


@pytest.mark.parametrize("who", FILTER_NORMS)
def test_filter_norms(benchmark: Any, who: str) -> None:
    benchmark.group = "filter_norms resnet50"
    weights = resnet50_weights("cpu")
    torch._dynamo.reset()
    benchmark.pedantic(FILTER_NORMS[who], (weights,), rounds=20, warmup_rounds=2)
