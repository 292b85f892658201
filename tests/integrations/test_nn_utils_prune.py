"""Scores inside torch.nn.utils.prune: the same channels as the plain formula, whatever torch's own code does."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import idap
from idap.errors import InvalidInputError, NonFiniteError
from idap.filters import plan_channels
from idap.integrations.nn_utils_prune import (
    ChannelPruning,
    ln_structured_arguments,
    masked_channels,
    prune_channels,
    remove_masks,
)


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Network(nn.Module):
    """Convolutions with and without batch norm, depthwise and grouped, transposed, then linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.depthwise = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.grouped = nn.Conv2d(10, 8, 1, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.conv2, self.bn2 = nn.Conv2d(6, 9, 3, bias=False), nn.BatchNorm2d(9)
        self.fc1, self.fc2 = nn.Linear(9, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(self.depthwise(F.relu(self.bn1(self.conv1(x))))))
        x = F.relu(self.bn2(self.conv2(F.relu(self.up(x)))))
        return self.fc2(F.relu(self.fc1(x.mean((2, 3)))))


class Plain(nn.Module):
    """A chain that nothing else reads from."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.conv2, self.bn2 = nn.Conv2d(10, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc1, self.fc2 = nn.Linear(8 * 4, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.adaptive_avg_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def spread_out(model: nn.Module) -> nn.Module:
    """Float64, batch norms with statistics and shifts of their own."""
    model.double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


def filters_of(module: nn.Module) -> Tensor:
    """(out_channels, weights of each), one filter at a time."""
    weight = module.weight.detach()
    if isinstance(module, nn.ConvTranspose2d):
        own = module.out_channels // module.groups
        rows = weight.chunk(module.groups)
        return torch.stack([rows[k // own][:, k % own].flatten() for k in range(module.out_channels)])
    return (weight.t() if isinstance(module, Conv1D) else weight).flatten(1)


def plain_scores(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """``(1 / (C·S)) · mean_b ‖relu(Y[b, k])‖₂ · ‖W_k‖₂`` in float64, by hooks that keep the outputs."""
    model = copy.deepcopy(model).double().eval()
    outputs: dict[str, list[Tensor]] = {}
    layers = {
        n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
    }
    for name, module in layers.items():
        module.register_forward_hook(lambda _, args, y, name=name: outputs.setdefault(name, []).append(y))
    with torch.no_grad():
        for batch in batches:
            model(batch.double())
    scores = {}
    for name, module in layers.items():
        y = torch.cat(outputs[name])
        y = y.reshape(y.shape[0], y.shape[1], -1)
        norms = torch.stack(
            [torch.stack([sample.relu().norm() for sample in own]).mean() for own in y.unbind(1)]
        )
        scores[name] = norms * filters_of(module).norm(dim=1) / (y.shape[1] * y.shape[2])
    return scores


def lowest(scores: Tensor, count: int) -> tuple[int, ...]:
    """Sorted by score, then by index, with Python's own sort."""
    order = sorted(range(len(scores)), key=lambda k: (scores[k].item(), k))
    return tuple(sorted(order[:count]))


def zero_channels(module: nn.Module) -> tuple[int, ...]:
    return tuple(k for k, row in enumerate(filters_of(module)) if not row.any())


# ------------------------------------------------------------------------------- ln_structured

LAYERS = {
    "linear": lambda: nn.Linear(5, 11),
    "conv1d": lambda: nn.Conv1d(4, 9, 3),
    "conv2d": lambda: nn.Conv2d(3, 13, 3),
    "depthwise": lambda: nn.Conv2d(6, 12, 3, groups=6),
    "conv3d": lambda: nn.Conv3d(2, 7, 2),
    "transposed": lambda: nn.ConvTranspose2d(4, 10, 2),
    "gpt2": lambda: Conv1D(9, 4),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("n", [0.1, 0.5, 1, 2, "fro", 7, 1000, math.inf, -math.inf, -1, -0.1, -1000])
def test_ln_structured_removes_the_lowest_scores_for_any_norm(kind, n):
    layer = LAYERS[kind]()
    model = nn.Sequential(layer)
    width = len(filters_of(layer)) if kind in ("gpt2", "transposed") else layer.weight.shape[0]
    scores = torch.randn(width, dtype=torch.float64)
    for name, own in ln_structured_arguments(model, {"0": scores}).items():
        prune.ln_structured(model.get_submodule(name), amount=4, n=n, **own)
    masked = masked_channels(model)["0"]
    assert masked == lowest(scores, 4)
    rows = layer.weight.t() if kind == "gpt2" else layer.weight.transpose(0, own["dim"])
    assert tuple(k for k, row in enumerate(rows) if not row.any()) == masked


def test_nuclear_norm_where_torch_has_it():
    layer, scores = nn.Conv1d(4, 9, 3), torch.randn(9)
    (own,) = ln_structured_arguments(nn.Sequential(layer), {"0": scores}).values()
    prune.ln_structured(layer, amount=5, n="nuc", **own)
    assert zero_channels(layer) == lowest(scores, 5)


@pytest.mark.parametrize(
    "scores",
    [
        1.0 + torch.tensor([3, 1, 2, 0, 4, 5], dtype=torch.float64) * 2.0**-52,  # neighbours in float64
        torch.tensor([1e300, -1e308, 1e-308, 0.0, 5e-324, 1e308], dtype=torch.float64),
        torch.zeros(6),
        torch.tensor([2.0, 1.0, 2.0, 1.0, 1.0, 2.0]),
    ],
    ids=["close", "extreme", "equal", "tied"],
)
def test_scores_of_any_range_keep_their_order(scores):
    for count in range(1, 6):
        for n in (1, 2, 50, math.inf, -math.inf):
            layer = nn.Conv2d(3, 6, 5)
            (own,) = ln_structured_arguments(nn.Sequential(layer), {"0": scores}).values()
            prune.ln_structured(layer, amount=count, n=n, **own)
            assert zero_channels(layer) == lowest(scores, count)
        layer = nn.Conv2d(3, 6, 5)
        ChannelPruning.apply(layer, "weight", count, scores)
        assert zero_channels(layer) == lowest(scores, count)


def test_ln_structured_of_thousands_of_channels():
    layer = nn.Linear(2000, 5000)
    scores = torch.rand(5000)
    (own,) = ln_structured_arguments(nn.Sequential(layer), {"0": scores}).values()
    assert own["importance_scores"].untyped_storage().nbytes() == 5000 * 8  # a view
    prune.ln_structured(layer, amount=2500, n=2, **own)
    assert masked_channels(nn.Sequential(layer))["0"] == lowest(scores, 2500)


def test_grouped_transposed_convolutions_are_refused_by_one_and_masked_by_the_other():
    layer = nn.ConvTranspose2d(6, 12, 2, groups=3)
    scores = torch.rand(12)
    with pytest.raises(InvalidInputError, match="one channel of every group"):
        ln_structured_arguments(nn.Sequential(layer), {"0": scores})
    x = torch.randn(2, 6, 3, 3)
    before = layer(x)
    ChannelPruning.apply(layer, "weight", 4, scores)
    ChannelPruning.apply(layer, "bias", 4, scores)
    ChannelPruning.apply(layer, "weight", 3, scores)  # a container, slicing along dim=1
    ChannelPruning.apply(layer, "bias", 3, scores)
    wanted = before.clone()
    wanted[:, list(lowest(scores, 7))] = 0
    torch.testing.assert_close(layer(x), wanted)
    # Whole slices along dim=1 go, so that the container hands on less than the weight.
    layer = nn.ConvTranspose2d(6, 12, 2, groups=3)
    scores = torch.tensor([0.0, 5, 6, 7, 1, 8, 9, 3, 2, 10, 11, 12])
    ChannelPruning.apply(layer, "weight", 3, scores)
    ChannelPruning.apply(layer, "weight", 1, scores)
    assert zero_channels(layer) == (0, 4, 7, 8)


# ------------------------------------------------------------------------------ ChannelPruning


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=12), st.data())
def test_iterating_counts_what_is_left(values, data):
    scores = torch.tensor(values, dtype=torch.float64)
    first = data.draw(st.integers(0, len(values)))
    share = data.draw(st.floats(0, 1))
    fresh = torch.rand(len(values))
    layer = nn.Linear(3, len(values))
    ChannelPruning.apply(layer, "weight", first, scores)
    ChannelPruning.apply(layer, "bias", first, scores)
    gone = set(lowest(scores, first))
    assert set(zero_channels(layer)) == gone
    ChannelPruning.apply(layer, "weight", share, fresh)
    ChannelPruning.apply(layer, "bias", share, fresh)
    left = [k for k in range(len(values)) if k not in gone]
    second = sorted(left, key=lambda k: (fresh[k].item(), k))[: round(share * len(left))]
    assert set(zero_channels(layer)) == gone | set(second)
    assert {k for k, b in enumerate(layer.bias_mask) if b == 0} == gone | set(second)


def test_containers_hooks_removal_and_other_methods():
    layer, scores = nn.Conv2d(3, 8, 3).bfloat16(), torch.arange(8.0)
    assert isinstance(ChannelPruning.apply(layer, "weight", 0.25, scores), ChannelPruning)
    assert layer.weight_mask.dtype == torch.bfloat16
    prune.random_unstructured(layer, "weight", 5)
    container = ChannelPruning.apply(layer, "weight", 2, scores)
    assert isinstance(container, prune.PruningContainer)
    assert len(container) == 3
    assert layer.weight_mask.dtype == torch.bfloat16
    assert masked_channels(nn.Sequential(layer)) == {"0": (0, 1, 2, 3)}
    with torch.no_grad():
        layer.weight_orig.fill_(1.0)  # as after a step of training
    layer(torch.randn(1, 3, 4, 4).bfloat16())
    assert not layer.weight[:4].any()
    assert layer.weight[4:].any()
    prune.remove(layer, "weight")
    assert not prune.is_pruned(layer)
    assert not layer.weight[:4].any()
    assert isinstance(layer.weight, nn.Parameter)


def test_input_channels_by_an_explicit_dimension_and_a_mask_of_ones():
    for dim in (1, -3):
        layer, scores = nn.Conv2d(5, 4, 3), torch.tensor([3.0, 0, 2, 4, 1])
        ChannelPruning.apply(layer, "weight", 2, scores, dim=dim)
        assert [k for k in range(5) if not layer.weight[:, k].any()] == [1, 4]
    layer = nn.Linear(2, 3)
    ChannelPruning.apply(layer, "weight", 0.1, torch.arange(3.0))
    assert layer.weight_mask.all()


def test_wrong_arguments_leave_the_module_as_it_was():
    layer, scores = nn.Linear(4, 6), torch.arange(6.0)
    ChannelPruning.apply(layer, "weight", 2, scores)
    state, hooks = copy.deepcopy(layer.state_dict()), len(layer._forward_pre_hooks)
    for error, match, arguments in [
        (InvalidInputError, "4 channels", ("weight", 5, scores)),
        (InvalidInputError, "got 5, wanted 6", ("weight", 1, scores[:5])),
        (InvalidInputError, "amount", ("weight", 1.5, scores)),
        (InvalidInputError, "amount", ("weight", -1, scores)),
        (InvalidInputError, "amount", ("weight", True, scores)),
        (InvalidInputError, "amount", ("weight", math.nan, scores)),
        (InvalidInputError, "amount", ("weight", "half", scores)),
        (InvalidInputError, "shape", ("weight", 1, scores.view(2, 3))),
        (InvalidInputError, "scores of", ("weight", 1, "abcdef")),
        (InvalidInputError, "dim", ("weight", 1, scores, 2)),
        (InvalidInputError, "no parameter", ("gamma", 1, scores)),
        (NonFiniteError, "channel 0", ("weight", 1, scores * math.nan)),
        (NonFiniteError, "channel 5", ("weight", 1, scores / torch.tensor([1, 1, 1, 1, 1, 0.0]))),
    ]:
        with pytest.raises(error, match=match):
            ChannelPruning.apply(layer, *arguments)
        assert len(layer._forward_pre_hooks) == hooks
        for key, value in layer.state_dict().items():
            assert torch.equal(value, state[key])


# ------------------------------------------------------------------------------ whole models


def test_the_channels_of_the_plain_formula_by_all_three_ways():
    model = spread_out(Network())
    batches = [torch.randn(3, 3, 9, 9, dtype=torch.float64) for _ in range(2)]
    wanted = plain_scores(model, batches)
    scores = idap.flow_divergence(model, idap.profile(model, batches, progress=False))
    assert scores.keys() == wanted.keys()
    expected = {name: lowest(own, round(0.4 * len(own))) for name, own in wanted.items()}

    one = copy.deepcopy(model)
    assert prune_channels(one, scores, 0.4) == expected
    assert masked_channels(one) == expected
    two, three = copy.deepcopy(model), copy.deepcopy(model)
    for name, own in scores.items():
        ChannelPruning.apply(two.get_submodule(name), "weight", 0.4, own)
    assert masked_channels(two) == expected
    simple = {name: own for name, own in scores.items() if name != "up"}
    for name, arguments in ln_structured_arguments(three, simple).items():
        prune.ln_structured(three.get_submodule(name), amount=0.4, n=2, **arguments)
    assert masked_channels(three) == {name: own for name, own in expected.items() if name != "up"}

    # Masked: what the layer makes is zero in those channels and as it was in the others.
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    y = model.conv2(x)
    y[:, list(expected["conv2"])] = 0
    torch.testing.assert_close(one.conv2(x), y)
    y = model.up(z := torch.randn(2, 8, 3, 3, dtype=torch.float64))
    y[:, list(expected["up"])] = 0
    torch.testing.assert_close(one.up(z), y)


def test_global_ranking_is_exact_and_iterates():
    model = spread_out(Network())
    batches = [torch.randn(4, 3, 8, 8, dtype=torch.float64)]
    masked: dict[str, set[int]] = {}
    for normalize in ("mean", None, "mean"):
        wanted = plain_scores(model, batches)
        left = {
            name: [k for k in range(len(s)) if k not in masked.get(name, ())] for name, s in wanted.items()
        }
        table = []
        for position, (name, own) in enumerate(wanted.items()):
            values = own[left[name]]
            values = values / values.abs().mean() if normalize else values
            ranked = sorted(zip(values.tolist(), left[name], strict=True))
            table += [(value, position, k, name) for value, k in ranked[: len(ranked) - 2]]
        expected: dict[str, set[int]] = {}
        for _, _, k, name in sorted(table)[:7]:
            expected.setdefault(name, set()).add(k)
        scores = idap.flow_divergence(
            model, idap.profile(model, batches, blocks=(), heads=(), progress=False)
        )
        removed = prune_channels(model, scores, 7, scope="global", normalize=normalize, min_width=2)
        assert sum(map(len, removed.values())) == 7
        assert {name: set(own) for name, own in removed.items()} == expected
        for name, own in expected.items():
            masked.setdefault(name, set()).update(own)
        assert {name: set(own) for name, own in masked_channels(model).items()} == masked


def test_equal_scores_go_in_the_order_of_layers_and_channels():
    model = Network()
    scores = {name: torch.ones(own) for name, own in (("fc1", 12), ("conv1", 10), ("conv2", 9))}
    assert prune_channels(model, scores, 13, scope="global") == {"fc1": tuple(range(11)), "conv1": (0, 1)}
    model = Network()
    assert prune_channels(model, scores, 2)["conv2"] == (0, 1)
    assert masked_channels(model) == {"conv1": (0, 1), "conv2": (0, 1), "fc1": (0, 1)}


def test_a_whole_layer_goes_only_when_asked():
    scores = {"conv1": torch.arange(10.0), "conv2": torch.arange(9.0)}
    model = Network()
    assert {n: len(own) for n, own in prune_channels(model, scores, 1.0).items()} == {"conv1": 9, "conv2": 8}
    model = Network()
    for scope, amount in (("local", 9), ("global", 18), ("global", 1.0)):
        with pytest.raises(InvalidInputError, match="can go with min_width=1"):
            prune_channels(model, scores, amount, scope=scope)
    assert not prune.is_pruned(model)
    assert len(prune_channels(model, scores, 1.0, scope="global", min_width=0)["conv2"]) == 9
    assert prune_channels(model, scores, 0.5) == {}


def test_biases_and_batch_norms_go_along_when_asked():
    model = spread_out(Plain())
    scores = {"conv1": torch.arange(10.0), "fc1": torch.arange(12.0)}
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    weights = copy.deepcopy(model)
    prune_channels(weights, scores, 3, include_bias=False)
    torch.testing.assert_close(
        weights.conv1(x)[:, :3], model.conv1.bias[:3].view(1, 3, 1, 1).expand(2, 3, 8, 8)
    )
    biases = copy.deepcopy(model)
    prune_channels(biases, scores, 3)
    assert not biases.conv1(x)[:, :3].any()
    assert biases.bn1(biases.conv1(x))[:, :3].any()  # a batch norm makes constants of zeros
    prune_channels(model, scores, 3, example_inputs=x)
    assert not model.bn1(model.conv1(x))[:, :3].any()
    assert model.bn1(model.conv1(x))[:, 3:].any(dim=(0, 2, 3)).all()


def test_masks_hold_in_training_and_are_cut_out_exactly():
    model = spread_out(Plain())
    batches = [torch.randn(4, 3, 8, 8, dtype=torch.float64)]
    removed = {}
    for _ in range(2):
        p = idap.profile(model, batches, blocks=(), heads=(), progress=False)
        scores = {k: v for k, v in idap.flow_divergence(model, p).items() if k != "fc2"}
        prune_channels(model, scores, 2, example_inputs=batches[0])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            model.train()(batches[0]).square().mean().backward()
            optimizer.step()
        model.eval()
    with torch.no_grad():
        wanted = model(batches[0])
    removed = remove_masks(model)
    assert {name: len(own) for name, own in removed.items()} == {"conv1": 4, "conv2": 4, "fc1": 4}
    assert not prune.is_pruned(model)
    torch.testing.assert_close(model(batches[0]), wanted, rtol=1e-12, atol=1e-12)
    plan = plan_channels(model, removed, batches[0])
    smaller = plan.apply(model)
    assert (smaller.conv1.out_channels, smaller.conv2.out_channels, smaller.fc1.out_features) == (6, 4, 8)
    assert smaller.fc1.in_features == 4 * 4
    kept = [k for k in range(10) if k not in removed["conv1"]]
    assert torch.equal(smaller.conv1.weight, model.conv1.weight[kept])
    torch.testing.assert_close(smaller(batches[0]), wanted, rtol=1e-10, atol=1e-10)
    assert plan.after.params == idap.count_params(smaller) < plan.before.params


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.out(self.depthwise(x + self.branch(x)))


def test_coupled_channels_are_cut_where_all_that_make_them_are_masked():
    model = Sum().double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    plan = plan_channels(model, {"stem": (0, 1, 2), "branch": (2, 4, 1)}, x)
    pruned = plan.apply(model)
    assert pruned.stem.out_channels == pruned.depthwise.groups == pruned.out.in_channels == 6
    assert torch.equal(
        pruned.branch.weight[:, :, 0, 0], model.branch.weight[[0, 3, 4, 5, 6, 7]][:, [0, 3, 4, 5, 6, 7], 0, 0]
    )
    assert any("2 of 4 stay" in own.reason for own in plan.skipped)
    whole = plan_channels(model, {"stem": range(8), "branch": range(8)}, x)
    assert whole.apply(model).stem.out_channels == 1
    assert plan_channels(model, {"stem": (1,)}, x).steps == ()
    assert plan_channels(model, {}, x).before.params == idap.count_params(model)


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right = self.conv(x).chunk(2, 1)
        return self.left(left), self.right(right)


def test_no_layer_is_left_without_inputs():
    model, x = Halves().double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    plan = plan_channels(model, {"conv": (0, 1, 2, 3, 5, 6, 7)}, x)
    pruned = plan.apply(model)
    assert (pruned.left.in_channels, pruned.right.in_channels) == (1, 1)
    assert any("1 of 7 stay" in own.reason for own in plan.skipped)


def test_what_cannot_be_masked_or_cut_is_refused():
    model = Network()
    scores = {"conv1": torch.arange(10.0)}
    for error, match, own, options in [
        (InvalidInputError, "'nowhere' is no layer", {"nowhere": torch.ones(3)}, {}),
        (InvalidInputError, "wanted \\(10,\\)", {"conv1": torch.ones(3)}, {}),
        (InvalidInputError, "BatchNorm2d", {"bn1": torch.ones(10)}, {}),
        (InvalidInputError, "none of a layer", {}, {}),
        (NonFiniteError, "conv1", {"conv1": torch.full((10,), math.nan)}, {}),
        (InvalidInputError, "scope", scores, {"scope": "all"}),
        (InvalidInputError, "normalize", scores, {"normalize": "max"}),
        (InvalidInputError, "min_width", scores, {"min_width": -1}),
    ]:
        with pytest.raises(error, match=match):
            prune_channels(model, own, 2, **options)
    with pytest.raises(InvalidInputError, match=r"got shape \(3,\), wanted \(9,\)"):
        prune_channels(nn.Sequential(Conv1D(9, 4)), {"0": torch.ones(3)}, 1)
    parametrizations.weight_norm(model.conv2)
    with pytest.raises(InvalidInputError, match="parametrised"):
        prune_channels(model, scores | {"conv2": torch.ones(9)}, 2)
    assert not prune.is_pruned(model)
    prune_channels(model, scores, 2)
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(InvalidInputError, match="still has masks"):
        plan_channels(model, {}, x)
    model = Plain().eval()
    for removed, match in (
        ({"bn1": (0,)}, "BatchNorm2d"),
        ({"gone": (0,)}, "not there"),
        ({"conv1": (10,)}, "0 to 9"),
        ({"conv1": (-1,)}, "0 to 9"),
    ):
        with pytest.raises(InvalidInputError, match=match):
            plan_channels(model, removed, x)


def test_scores_of_heads_are_passed_over_and_conv1d_is_masked_by_columns():
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), Conv1D(9, 16)).eval()
    scores = idap.flow_divergence(model, idap.profile(model, [torch.randn(3, 5, 16)], progress=False))
    assert "0.self_attn" in scores
    scores.pop("0.self_attn.out_proj", None)
    removed = prune_channels(model, scores, 3)
    assert "0.self_attn" not in removed
    assert removed["1"] == lowest(scores["1"], 3)
    assert not model(torch.randn(2, 5, 16))[..., list(removed["1"])].any()


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


@pytest.mark.parametrize(
    ("behind", "same"),
    [
        (lambda: nn.ReLU(), True),
        (lambda: nn.Conv2d(6, 6, 3, groups=6, bias=False), True),
        (lambda: Shift(), False),
        (lambda: nn.Conv2d(6, 6, 3, groups=6), False),
        (lambda: nn.Sequential(nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6)), False),
        (lambda: nn.Sigmoid(), False),
    ],
)
def test_constants_behind_the_mask_go_with_the_channel(behind, same):
    model = spread_out(nn.Sequential(nn.Conv2d(3, 6, 3), behind(), nn.Conv2d(6, 4, 1)))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    prune_channels(model, {"0": torch.arange(6.0)}, 2, example_inputs=x)
    masked = model(x).detach()
    plan = plan_channels(model, remove_masks(model), x)
    cut = plan.apply(model)
    assert cut[0].out_channels == 4
    assert torch.allclose(cut(x), masked, atol=1e-5) == same
