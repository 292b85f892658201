"""Wanda's norms, scores and masks against plain PyTorch on the concatenated inputs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

import idap
from idap.errors import EmptyDataError, InvalidInputError, NonFiniteError
from idap.integrations import wanda
from idap_kernels import channel_stats


class Conv1D(nn.Module):
    """A linear layer with its weight as (in, out), as GPT-2 has it."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 6), (8,)),
    "tokens": (lambda: nn.Linear(8, 5), (7, 8)),
    "windows": (lambda: nn.Linear(8, 5), (2, 3, 8)),
    "transposed_linear": (lambda: Conv1D(6, 8), (7, 8)),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3), (8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 6, (3, 2), stride=2), (8, 7, 5)),
    "conv3d": (lambda: nn.Conv3d(8, 4, 2), (8, 3, 4, 5)),
    "grouped": (lambda: nn.Conv2d(8, 6, 3, groups=2), (8, 7, 5)),
    "depthwise": (lambda: nn.Conv2d(8, 16, 3, groups=8), (8, 7, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, (2, 3)), (8, 4, 5)),
    "transposed_grouped": (lambda: nn.ConvTranspose2d(8, 6, 3, groups=2), (8, 4, 5)),
}


def filters_of(layer: nn.Module, weight: Tensor) -> list[dict[int, Tensor]]:
    """For each output: input channel -> the weights (kernel positions,) with which it is read."""
    if isinstance(layer, Conv1D):
        return [{i: weight[i, o].reshape(-1) for i in range(8)} for o in range(6)]
    if isinstance(layer, nn.Linear):
        return [{i: weight[o, i].reshape(-1) for i in range(8)} for o in range(len(weight))]
    groups, outs, ins = layer.groups, layer.out_channels // layer.groups, 8 // layer.groups
    found = []
    for o in range(groups * outs):
        g = o // outs
        if layer.transposed:
            found.append({g * ins + i: weight[g * ins + i, o - g * outs].reshape(-1) for i in range(ins)})
        else:
            found.append({g * ins + i: weight[o, i].reshape(-1) for i in range(ins)})
    return found


def case(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Tensor], Tensor]:
    """A model of one layer, its batches, and the norms of its input channels in float64."""
    build, shape = CASES[name]
    model = nn.Sequential(build()).to(dtype)
    channels = torch.rand(8) * 3
    axis = -1 if isinstance(model[0], (nn.Linear, Conv1D)) else -len(shape)
    by_channel = channels.view([-1 if d == len(shape) + axis else 1 for d in range(len(shape))])
    batches = [(torch.randn(size, *shape) * by_channel).to(dtype) for size in (3, 1, 4)]
    x = torch.cat(batches).double().movedim(axis if axis == -1 else 1, 0).flatten(1)
    return model, batches, x.norm(dim=1)


@pytest.mark.parametrize("name", CASES)
def test_energy_and_scores(name: str) -> None:
    model, batches, norms = case(name)
    energy = wanda.input_energy(model, batches)
    assert list(energy) == ["0"]
    assert energy["0"].dtype == torch.float64
    torch.testing.assert_close(energy["0"], norms.square(), rtol=1e-5, atol=0)
    weight = model[0].weight.detach()
    scores = wanda.scores(model, energy)["0"]
    assert scores.shape == weight.shape
    got, plain = filters_of(model[0], scores), filters_of(model[0], weight.double())
    for mine, reads in zip(got, plain, strict=True):
        for i, weights in reads.items():
            torch.testing.assert_close(mine[i], weights.abs() * norms[i], rtol=1e-5, atol=0)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("name", CASES)
def test_unstructured_masks(name: str, sparsity: float) -> None:
    model, batches, norms = case(name)
    layer = model[0]
    kept = wanda.masks(model, wanda.input_energy(model, batches), sparsity=sparsity)["0"]
    assert kept.shape == layer.weight.shape
    assert kept.dtype == torch.bool
    plain = filters_of(layer, layer.weight.detach().double())
    for reads, stays in zip(plain, filters_of(layer, kept), strict=True):
        ranked = sorted(
            ((abs(float(w)) * float(norms[i]), i, k) for i, ws in reads.items() for k, w in enumerate(ws))
        )
        removed = {(i, k) for _, i, k in ranked[: int(len(ranked) * sparsity)]}
        assert {(i, k) for i, s in stays.items() for k, stay in enumerate(s) if not stay} == removed


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 4), (1, 2)])
@pytest.mark.parametrize("name", [n for n in CASES if n != "depthwise"])
def test_patterns(name: str, pattern: tuple[int, int]) -> None:
    n, m = pattern
    model, batches, norms = case(name)
    layer = model[0]
    kept = wanda.masks(model, wanda.input_energy(model, batches), pattern=pattern)["0"]
    plain = filters_of(layer, layer.weight.detach().double())
    for reads, stays in zip(plain, filters_of(layer, kept), strict=True):
        channels = sorted(reads)
        for start in range(0, len(channels), m):
            part = channels[start : start + m]
            for k in range(len(reads[part[0]])):
                ranked = sorted(part, key=lambda i: abs(float(reads[i][k])) * float(norms[i]))
                assert [i for i in ranked if stays[i][k]] == ranked[m - n :]


def test_whole_model_applied_and_removed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(1), nn.Linear(8 * 16, 6))
    batches = [torch.randn(5, 3, 6, 6), torch.randn(2, 3, 6, 6)]
    plain = copy.deepcopy(model)
    with torch.no_grad():
        x = torch.cat(batches).double()
        hidden = F.conv2d(x, plain[0].weight.double(), plain[0].bias.double()).relu().flatten(1)
    norm = {0: x.transpose(0, 1).flatten(1).norm(dim=1), 3: hidden.norm(dim=0)}
    model.train()
    chosen = wanda.prune(model, batches, sparsity=0.5)
    assert model.training
    assert list(chosen) == ["0", "3"]
    for index, values in norm.items():
        score = plain[index].weight.double().abs() * values.view(
            1, -1, *[1] * (plain[index].weight.dim() - 2)
        )
        score = score.flatten(1)
        middle = (
            score.sort(1).values[:, score.shape[1] // 2 - 1 : score.shape[1] // 2 + 1].mean(1, keepdim=True)
        )
        want = (score > middle).view_as(plain[index].weight)
        assert torch.equal(chosen[str(index)], want)
        assert torch.equal(model[index].weight, plain[index].weight * want)
        assert torch.equal(model[index].weight_orig, plain[index].weight)
        torch_prune.remove(model[index], "weight")
        assert torch.equal(model[index].weight, plain[index].weight * want)


def test_a_second_step_goes_further() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    batches = [torch.randn(9, 8)]
    weight = model[0].weight.detach().double()
    first = wanda.prune(model, batches, sparsity=0.25)["0"]
    second = wanda.prune(model, batches, sparsity=0.75)["0"]
    assert not (second & ~first).any()
    order = (weight.abs() * batches[0].double().norm(dim=0)).argsort(1)
    want = torch.ones_like(first).scatter_(1, order[:, :6], False)
    assert torch.equal(model[0].weight != 0, want)
    # A step of an optimiser shows in weight_orig alone until the next forward pass.
    with torch.no_grad():
        model[0].weight_orig.mul_(torch.arange(1, 9))
    energy = wanda.input_energy(model, batches)
    order = (model[0].weight_orig.detach() * want).double().abs() * batches[0].double().norm(dim=0)
    again = wanda.masks(model, energy, sparsity=0.875)["0"]
    assert torch.equal(again, torch.ones_like(again).scatter_(1, order.argsort(1)[:, :7], False))


def test_ties_go_by_index() -> None:
    model = nn.Sequential(nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.fill_(0.5)
    energy = {"0": torch.ones(8, dtype=torch.float64)}
    kept = wanda.masks(model, energy, sparsity=0.5)["0"]
    assert torch.equal(kept, (torch.arange(8) >= 4).expand(2, 8))
    kept = wanda.masks(model, energy, pattern=(2, 4))["0"]
    assert torch.equal(kept, (torch.arange(8) % 4 >= 2).expand(2, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    model, batches, norms = case("tokens", dtype)
    energy = wanda.input_energy(model, batches)["0"]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(energy, norms.square(), rtol=tolerance, atol=0)
    wanda.prune(model, batches, pattern=(2, 4))
    assert model[0].weight.dtype == dtype
    assert (model[0].weight != 0).sum() == 20


def test_layers_asked_for_and_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(4, 4)
            self.unused = nn.Linear(4, 4)
            self.last = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.shared(self.shared(x)))

    model, x = Twice(), torch.randn(5, 4)
    energy = wanda.input_energy(model, [(x, None)], forward=lambda m, batch: m(batch[0]))
    assert list(energy) == ["shared", "last"]
    with torch.no_grad():
        both = torch.cat([x, model.shared(x)]).double()
    torch.testing.assert_close(energy["shared"], both.square().sum(0), rtol=1e-5, atol=0)
    assert list(wanda.input_energy(model, [x], layers=["last"])) == ["last"]
    assert wanda.input_energy(model, [x], layers=[]) == {}


def test_sum_of_squares() -> None:
    x = torch.randn(6, 3, 5)
    stats = channel_stats(x, activation="identity")
    torch.testing.assert_close(
        wanda.sum_of_squares(stats), x.double().square().sum((0, 2)), rtol=1e-6, atol=0
    )
    empty = type(stats).empty(3, activation="identity")
    assert torch.equal(wanda.sum_of_squares(empty), torch.zeros(3, dtype=torch.float64))
    with pytest.raises(InvalidInputError, match="identity"):
        wanda.sum_of_squares(channel_stats(x))


def test_what_is_wrong_is_said() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    x = torch.randn(2, 3, 6, 6)
    before = copy.deepcopy(model.state_dict())
    energy = wanda.input_energy(model, [x])
    for wrong in (
        {},
        {"sparsity": 0.5, "pattern": (2, 4)},
        {"sparsity": 1.0},
        {"sparsity": -0.1},
        {"pattern": (4, 2)},
        {"pattern": (0, 4)},
        {"pattern": 4},
        {"pattern": (2.0, 4.0)},
        {"pattern": (True, 4)},
        {"sparsity": "0.5"},
        {"sparsity": False},
    ):
        with pytest.raises(InvalidInputError, match=r"0\.5|\(2, 4\)"):
            wanda.masks(model, energy, **wrong)
        with pytest.raises(InvalidInputError):
            wanda.prune(model, [x], **wrong)
    with pytest.raises(InvalidInputError, match=r"'0' reads 3 .*layers="):
        wanda.prune(model, [x], pattern=(2, 4))
    assert wanda.prune(copy.deepcopy(model), [x], pattern=(2, 4), layers=["2"]).keys() == {"2"}
    with pytest.raises(InvalidInputError, match="'nowhere'"):
        wanda.scores(model, {"nowhere": energy["0"]})
    with pytest.raises(InvalidInputError, match="ReLU"):
        wanda.scores(model, {"1": energy["0"]})
    with pytest.raises(InvalidInputError, match="3 input channels"):
        wanda.scores(model, {"0": energy["2"]})
    with pytest.raises(InvalidInputError, match="mask of layer '2'"):
        wanda.apply_masks(model, {"0": torch.ones(8, 3, 3, 3), "2": torch.ones(3)})
    with pytest.raises(InvalidInputError, match="mask of layer '0': got list, wanted a tensor"):
        wanda.apply_masks(model, {"0": [[1]]})
    for mask in (torch.full((8, 3, 3, 3), 0.5), torch.full((8, 3, 3, 3), float("nan"))):
        with pytest.raises(InvalidInputError, match="other than 0 and 1"):
            wanda.apply_masks(model, {"2": torch.ones(4, 8, 1, 1), "0": mask})
    with pytest.raises(InvalidInputError, match="energy of layer '0': got list, wanted a tensor"):
        wanda.scores(model, {"0": [1.0] * 3})
    with pytest.raises(InvalidInputError, match="layer '0' is negative at channel 1"):
        wanda.masks(model, {"0": torch.tensor([1.0, -1.0, 2.0])}, sparsity=0.5)
    with pytest.raises(InvalidInputError, match="no module named"):
        wanda.input_energy(model, [x], layers=["nowhere"])
    with pytest.raises(EmptyDataError):
        wanda.input_energy(model, [])
    with pytest.raises(NonFiniteError, match="'0'"):
        wanda.input_energy(model, [x / 0])
    with torch.no_grad():
        bad = copy.deepcopy(model)
        bad[2].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="'2'"):
        wanda.prune(bad, [x], sparsity=0.5)
    assert not hasattr(bad[0], "weight_mask")
    assert not hasattr(model[0], "weight_mask")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_no_output_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass reads the inputs of the layers asked for and nothing else."""
    import importlib

    module = importlib.import_module("idap.profile")
    shapes: list[tuple[int, ...]] = []
    kernel = module.channel_stats

    def counting(x: Tensor, **options: object) -> idap.ActivationProfile:
        shapes.append(tuple(x.shape))
        return kernel(x, **options)

    monkeypatch.setattr(module, "channel_stats", counting)
    model = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3))
    wanda.input_energy(model, [torch.randn(5, 4)] * 2)
    assert shapes == [(5, 4), (5, 7)] * 2


class Partial(nn.Module):
    """One of its two layers is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_layers_that_the_data_never_reaches_are_named() -> None:
    model, x = Partial(), torch.randn(5, 4)
    with pytest.warns(UserWarning, match="never reached 'idle'") as seen:
        assert wanda.input_energy(model, [x], layers=["used", "idle"]).keys() == {"used"}
    assert [w.filename for w in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert wanda.input_energy(model, [x]).keys() == {"used"}  # nobody asked for the other
        wanda.prune(copy.deepcopy(model), [x], sparsity=0.5, layers=["used"])
    with pytest.warns(UserWarning, match="never reached 'idle'") as seen:
        assert wanda.prune(model, [x], sparsity=0.5).keys() == {"used"}
    assert [w.filename for w in seen] == [__file__]
    assert not hasattr(model.idle, "weight_mask")


def test_masks_of_numbers_work_as_those_of_bool() -> None:
    one, two = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3))
    mask = torch.rand(3, 4) > 0.5
    wanda.apply_masks(one, {"0": mask})
    wanda.apply_masks(two, {"0": mask.double()})
    assert torch.equal(one[0].weight == 0, ~mask)
    assert torch.equal(two[0].weight == 0, ~mask)
