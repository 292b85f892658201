"""Timing: what is called, how often, in which order, and the figures. No test looks at a clock."""

import math

import pytest
import torch
from torch import nn

from idap import latency
from idap.errors import InvalidInputError
from idap.latency import LatencyComparison, LatencyStats, compare_latency, layer_times, measure_latency


class Spy(nn.Module):
    """Notes its name at every call, and whether it ran as a timing should."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.name, self.log = name, log

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert torch.is_inference_mode_enabled()
        assert not self.training
        assert not self.layer.training
        self.log.append(self.name)
        return self.layer(x)


def test_counts_modes_and_figures():
    log: list[str] = []
    model = Spy("a", log)
    model.train()
    model.layer.eval()
    stats = measure_latency(model, torch.zeros(1, 3), warmup=4, runs=9, threads=1)
    assert len(log) == 4 + 9
    assert (model.training, model.layer.training) == (True, False)
    assert 0 < stats.p10 <= stats.median <= stats.p90
    assert stats.runs == 9
    assert (stats.device, stats.dtype, stats.threads) == ("cpu", "float32", 1)
    assert stats.torch_version == torch.__version__


def test_models_take_turns_each_after_an_untimed_pass():
    log: list[str] = []
    models = {name: Spy(name, log) for name in "abc"}
    comparison = compare_latency(models, torch.zeros(1, 3), warmup=0, runs=4)
    assert "".join(log) == "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"
    assert {name: len(times) for name, times in comparison.times.items()} == {"a": 4, "b": 4, "c": 4}


def test_speedup_is_the_median_of_ratios_within_rounds():
    stats = LatencyStats(1.0, 1.0, 1.0, 3, "cpu", "float32", 1, "x")
    comparison = LatencyComparison({"a": stats, "b": stats}, {"a": (2.0, 20.0, 3.0), "b": (1.0, 10.0, 1.0)})
    assert comparison.speedup("b", over="a") == pytest.approx(2.0)
    assert comparison.speedup("a", over="b") == pytest.approx(0.5)
    with pytest.raises(InvalidInputError, match="'c'"):
        comparison.speedup("c", over="a")


@pytest.mark.parametrize("n", [1, 2, 5, 10, 101])
def test_quantiles_agree_with_torch(n):
    values = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    for q in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert latency._quantile(values.tolist(), q) == pytest.approx(
            torch.quantile(values, q).item(), rel=1e-12
        )


def test_threads_are_put_back_also_after_an_error():
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError

    before = torch.get_num_threads()
    model = Broken().train()
    with pytest.raises(ZeroDivisionError):
        measure_latency(model, torch.zeros(1), threads=before + 1)
    assert torch.get_num_threads() == before
    assert model.training


def test_keyword_and_positional_inputs_and_a_model_without_parameters():
    class Add(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

    one = torch.ones(2)
    for inputs in ((one, one), {"a": one, "b": one}):
        stats = measure_latency(Add(), inputs, warmup=0, runs=1)
        assert stats.runs == 1
        assert math.isfinite(stats.median)


@pytest.mark.parametrize("change", [{"warmup": -1}, {"runs": 0}, {"threads": 0}])
def test_wrong_arguments(change):
    with pytest.raises(InvalidInputError, match=next(iter(change))):
        measure_latency(nn.Linear(3, 3), torch.zeros(1, 3), **change)


def test_no_model():
    with pytest.raises(InvalidInputError, match="no model"):
        compare_latency({}, torch.zeros(1, 3))


def test_layer_times_are_a_module_s_own(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])

    class Takes(nn.Module):
        def __init__(self, seconds: float, *inner: nn.Module) -> None:
            super().__init__()
            self.seconds, self.inner = seconds, nn.ModuleList(inner)
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for module in self.inner:
                x = module(x)
            clock[0] += self.seconds
            return x

    twice = Takes(0.25)
    model = Takes(1.0, Takes(0.5, Takes(2.0)), twice, twice).train()
    got = layer_times(model, torch.zeros(1), warmup=1, runs=3)
    wanted = {"": 1000.0, "inner.0": 500.0, "inner.0.inner.0": 2000.0, "inner.1": 500.0}
    assert got == pytest.approx(wanted)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for wrong in ({"runs": 0}, {"warmup": -1}, {"threads": 0}):
        with pytest.raises(InvalidInputError, match=next(iter(wrong))):
            layer_times(model, torch.zeros(1), **wrong)
