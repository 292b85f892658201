"""Coupled channels: against Torch-Pruning's enumeration, reasons for skipping, limits, side effects."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
import time
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_networks import SMALL, Chain, Dense, Gated, Residual, TokenMLP
from torch import Tensor, nn
from torch.nn import functional as F

from idap.errors import GraphError, GraphTimeoutError, InvalidInputError, PlanMismatchError
from idap.groups import Group, cut, find_groups, resolve_ignore, side_size

torchvision = pytest.importorskip("torchvision")


def by_torch_pruning(model: nn.Module, example: Tensor) -> set[frozenset[tuple[str, str]]]:
    """Layers of every group as Torch-Pruning enumerates them, output layers left out."""
    import torch_pruning as tp

    model = copy.deepcopy(model)
    names = {module: name for name, module in model.named_modules()}
    graph = tp.DependencyGraph().build_dependency(model, (example,), verbose=False)
    found = set()
    for group in graph.get_all_groups(ignored_layers=[], root_module_types=[nn.Conv2d, nn.Linear]):
        sides = set()
        for dependency, _ in group:
            module = dependency.target.module
            if module in names:
                plain = isinstance(module, (nn.Conv2d, nn.Linear)) and getattr(module, "groups", 1) == 1
                reads = plain and graph.is_in_channel_pruning_fn(dependency.handler)
                sides.add((names[module], "in" if reads else "out" if plain else "both"))
        if len(sides) > 1:
            found.add(frozenset(sides))
    return found


def by_us(groups: list[Group]) -> set[frozenset[tuple[str, str]]]:
    def side(kind: str) -> str:
        return kind.rpartition("_")[2] if kind.startswith(("conv_", "linear_")) else "both"

    return {frozenset((m.layer, side(m.kind)) for m in group.members) for group in groups}


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v3_small", "vgg11_bn", "squeezenet1_1"])
def test_the_same_groups_as_torch_pruning(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None)
    example = torch.randn(1, 3, 64, 64)
    theirs = by_torch_pruning(model, example)
    ours = by_us(find_groups(model, example).groups)
    # The classifier's outputs are a group for Torch-Pruning, and an output of the model for us.
    assert ours <= theirs
    assert len(theirs - ours) <= 1


@pytest.mark.parametrize("name", SMALL)
def test_every_channel_of_a_layer_is_in_one_unit_at_most(name: str) -> None:
    factory, example = SMALL[name]
    seen: dict[tuple[str, str], set[int]] = {}
    for group in find_groups(factory(), example()).groups:
        for member in group.members:
            assert len(member.units) == group.size
            indices = [index for unit in member.units for index in unit]
            assert len(indices) == len(set(indices))
            assert all(0 <= index < member.size for index in indices)
            own = seen.setdefault((member.layer, member.kind), set())
            assert own.isdisjoint(indices)
            own.update(indices)


def test_mappings_of_views_concatenations_and_halves() -> None:
    def member(group: Group, layer: str, kind: str) -> Any:
        return next(m for m in group.members if (m.layer, m.kind) == (layer, kind))

    factory, example = SMALL["flatten"]
    groups = {g.root: g for g in find_groups(factory(), example()).groups}
    assert member(groups["conv2"], "fc1", "linear_in").units[3] == tuple(range(48, 64))
    groups = {g.root: g for g in find_groups(Dense(), SMALL["dense"][1]()).groups}
    # cat((x, b, c, a)): three input channels come first, and the stem is read at two places.
    assert member(groups["grow1"], "out", "conv_in").units[0] == (3,)
    assert member(groups["stem"], "out", "conv_in").units[0] == (27,)
    assert member(groups["stem"], "grow2", "conv_in").units[5] == (5,)
    (group,) = find_groups(Gated(), SMALL["gated"][1]()).groups
    assert member(group, "proj", "linear_out").units[5] == (5, 29)
    assert member(group, "out", "linear_in").units[5] == (5,)
    factory, example = SMALL["grouped"]
    groups = {g.root: g for g in find_groups(factory(), example()).groups}
    assert member(groups["conv1"], "conv2", "conv_in").units[1] == (1, 7, 13, 19)
    assert member(groups["conv2"], "conv2", "conv_out").units[1] == (1, 9, 17, 25)


def test_token_flatten_couples_with_a_stride() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(30, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(F.relu(self.fc1(x)).flatten(1))

    (group,) = find_groups(Mixer(), torch.randn(2, 5, 4)).groups
    reader = next(m for m in group.members if m.kind == "linear_in")
    assert reader.units[2] == (2, 8, 14, 20, 26)


def test_group_norm_loses_whole_groups() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 4, 1))
    (group,) = find_groups(model, torch.randn(1, 3, 4, 4)).groups
    assert group.inexact == ()
    assert [member.kind for member in group.members] == ["conv_out", "groupnorm", "conv_in"]
    assert all(
        member.units == tuple(tuple(range(4 * i, 4 * i + 4)) for i in range(4)) for member in group.members
    )


def test_borders_of_group_norms_that_do_not_fall_together_make_wider_units() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm_a = nn.Conv2d(3, 12, 1), nn.GroupNorm(6, 12)
            self.b = nn.Conv2d(12, 12, 1)
            self.norm, self.head = nn.GroupNorm(6, 24), nn.Conv2d(24, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm_a(self.a(x))
            return self.head(self.norm(torch.cat([self.b(x)[:, :10], x, x[:, :2]], 1)))

    scan = find_groups(Skip(), torch.randn(1, 3, 4, 4))
    (group,) = [g for g in scan.groups if g.root == "a"]
    maker = next(m for m in group.members if m.layer == "a")
    # Groups of two in norm_a; in the concatenation x begins in the middle of a group of four, and the last
    # group ends with its first two channels.
    assert [unit for unit in maker.units if unit] == [(0, 1, 10, 11), (2, 3, 4, 5), (6, 7, 8, 9)]
    wide = next(m for m in group.members if m.layer == "norm")
    assert wide.units[0] == (8, 9, 10, 11, 20, 21, 22, 23)


def test_a_group_norm_of_one_group_spans_its_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.GroupNorm(1, 16), nn.ReLU(), nn.Conv2d(16, 4, 1))
    example = torch.randn(1, 3, 4, 4)
    scan = find_groups(model, example)
    assert not scan.groups
    assert "GroupNorm 1 spans its channels" in scan.skipped[0].reason
    (group,) = find_groups(model, example, exact=False).groups
    assert group.size == 16


@pytest.mark.parametrize(
    ("groups", "removed", "left"),
    [
        (4, [4, 5, 6, 7], 3),
        (4, [0, 1, 2, 3, 12, 13, 14, 15], 2),
        (4, [1, 5, 9, 13], 4),  # as plans of earlier versions have it
        (1, [3, 4], 1),
        (16, [3, 4], 14),
    ],
)
def test_cut_group_norm(groups: int, removed: list[int], left: int) -> None:
    model = nn.Sequential(nn.GroupNorm(groups, 16))
    cut(model, "0", "groupnorm", removed)
    assert (model[0].num_groups, model[0].num_channels) == (left, 16 - len(removed))
    assert model(torch.randn(2, 16 - len(removed), 3)).shape == (2, 16 - len(removed), 3)


def test_a_group_norm_keeps_equal_groups() -> None:
    model = nn.Sequential(nn.GroupNorm(4, 16))
    with pytest.raises(PlanMismatchError, match="between 0 and 2 of the 4 channels"):
        cut(model, "0", "groupnorm", [0, 1])
    assert model[0].num_channels == 16


TOKENS, POINTS = torch.randn(5, 2, 4), torch.randn(2, 4)
ENCODER = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
NORMED = nn.utils.parametrizations.weight_norm(nn.Linear(4, 8))

REASONS: dict[str, tuple[nn.Module, Any, str, str]] = {
    "output": (Chain(), torch.randn(1, 3, 8, 8), "fc", "output of the model"),
    "layernorm": (
        nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)),
        POINTS,
        "0",
        "not exact: the La",
    ),
    "softmax": (
        nn.Sequential(nn.Linear(4, 8), nn.Softmax(-1), nn.Linear(8, 2)),
        POINTS,
        "0",
        "not exact: a softm",
    ),
    "attention": (ENCODER, torch.randn(1, 3, 8), "linear2", "output of the model"),
    "rnn": (nn.Sequential(nn.Linear(4, 8), nn.LSTM(8, 8)), TOKENS, "0", "recurrent layers are not pruned"),
    "weight_norm": (nn.Sequential(NORMED, nn.Linear(8, 2)), POINTS, "0", "computed from other parameters"),
    "single": (
        nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 4, 1)),
        torch.randn(1, 3, 4, 4),
        "0",
        "only one unit",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_reasons(case: str) -> None:
    model, example, root, reason = REASONS[case]
    skipped = {s.root: s.reason for s in find_groups(model, example).skipped}
    assert reason in skipped[root]


class OnInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x + self.a(x))


class MeanOverChannels(nn.Module):
    def __init__(self, reduce: str) -> None:
        super().__init__()
        self.a, self.b, self.reduce = nn.Conv2d(3, 8, 1), nn.Conv2d(9, 5, 1), reduce

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(torch.cat([x, getattr(x, self.reduce)(1, keepdim=True)], 1))


def test_an_axis_tied_to_the_input_stays() -> None:
    (skipped, _) = find_groups(OnInput(), torch.randn(1, 3, 4, 4)).skipped
    assert skipped.root == "a"
    assert "tied to an input" in skipped.reason


def test_an_average_over_the_channels_is_not_exact_but_a_sum_is() -> None:
    example = torch.randn(1, 3, 4, 4)
    assert find_groups(MeanOverChannels("sum"), example).groups[0].root == "a"
    scan = find_groups(MeanOverChannels("mean"), example)
    assert not scan.groups
    assert "reduction (mean)" in scan.skipped[0].reason


def test_heads_of_a_custom_attention_are_units_and_its_width_stays() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 2
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            b, t, c = x.shape
            q, k, v = self.qkv(x).reshape(b, t, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c))

    model = nn.Sequential(nn.Linear(4, 8), Attention(), nn.Linear(8, 3))
    scan = find_groups(model, torch.randn(2, 5, 4))
    skipped = {s.root: s.reason for s in scan.skipped}
    assert "only whole heads are removed from 1" in skipped["1.proj"]
    assert [g.root for g in scan.groups] == ["0", "1.qkv"]
    members = {(m.layer, m.kind): m for m in scan.groups[1].members}
    assert members["1", "heads"].units == ((0,), (1,))
    assert members["1.qkv", "linear_out"].units[1] == (*range(4, 8), *range(12, 16), *range(20, 24))
    assert members["1.proj", "linear_in"].units[1] == (4, 5, 6, 7)


def test_frozen_layers_are_followed_too() -> None:
    model = Residual().requires_grad_(False)
    assert {g.root for g in find_groups(model, torch.randn(1, 3, 8, 8)).groups} == {
        "stem",
        "a",
        "c",
        "project",
    }


@pytest.mark.parametrize("how", ["tensor", "tuple", "list", "dict", "mapping"])
def test_forms_of_example_inputs(how: str) -> None:
    x = torch.randn(1, 3, 8, 8)
    forms = {"tensor": x, "tuple": (x,), "list": [x], "dict": {"x": x}, "mapping": UserDict(x=x)}
    assert len(find_groups(Chain(), forms[how]).groups) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    assert len(find_groups(Chain().to(dtype), torch.randn(1, 3, 8, 8, dtype=dtype)).groups) == 2


def test_readers_whose_results_are_detached_count_too() -> None:
    class Proposals(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.score, self.out = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1), nn.Conv2d(16, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.out(x) * self.score(x).detach().amax(1, keepdim=True)

    scan = find_groups(Proposals(), torch.randn(1, 3, 4, 4))
    (group,) = scan.groups
    assert {m.layer for m in group.members} == {"stem", "score", "out"}
    assert "used where no gradient goes" in {s.root: s.reason for s in scan.skipped}["score"]


def test_layer_norms_of_maps_are_known_by_their_class() -> None:
    class LayerNorm2d(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    model = nn.Sequential(nn.Conv2d(3, 8, 1), LayerNorm2d(8), nn.Conv2d(8, 2, 1))
    (first, _) = find_groups(model, torch.randn(1, 3, 8, 8)).skipped
    assert "LayerNorm 1 spans its channels" in first.reason
    (group,) = find_groups(model, torch.randn(1, 3, 8, 8), exact=False).groups
    assert {m.kind for m in group.members} == {"conv_out", "layernorm", "conv_in"}


def test_channels_last_memory_changes_nothing() -> None:
    model, x = torchvision.models.resnet18(weights=None), torch.randn(2, 3, 64, 64)
    scan = find_groups(model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))
    assert scan == find_groups(torchvision.models.resnet18(weights=None), x)


def test_the_model_comes_out_as_it_went_in() -> None:
    model = Residual().train()
    model.bn_a.eval()
    model.stem.weight.requires_grad_(False)
    calls = []
    model.stem.register_forward_hook(lambda *_: calls.append(1))
    state = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    modes = [module.training for module in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with torch.no_grad():
        find_groups(model, torch.randn(2, 3, 8, 8))
    assert [module.training for module in model.modules()] == modes
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is state[name][0]
        assert torch.equal(tensor, state[name][1])
    assert not model.stem.weight.requires_grad
    assert model.a.weight.requires_grad


class Endless(nn.Module):
    def __init__(self, pause: float) -> None:
        super().__init__()
        self.pause = pause
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(1000))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            time.sleep(self.pause)
            x = layer(x)
        return x


@pytest.mark.parametrize("main_thread", [True, False])
def test_time_limit(main_thread: bool) -> None:
    caught: list[BaseException] = []

    def attempt() -> None:
        try:
            find_groups(Endless(0.02), torch.randn(1, 4), time_limit=0.2)
        except GraphTimeoutError as error:
            caught.append(error)

    start = time.perf_counter()
    if main_thread:
        attempt()
    else:
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join(20)
    assert time.perf_counter() - start < 5
    assert len(caught) == 1
    assert "time_limit=0.2 s" in str(caught[0])


def test_models_that_torch_pruning_never_finishes() -> None:
    model = torchvision.models.swin_t(weights=None)
    start = time.perf_counter()
    scan = find_groups(model, torch.randn(1, 3, 64, 64), time_limit=20)
    assert len(scan.groups) == 12
    assert all(group.root.endswith("mlp.0") for group in scan.groups)
    assert time.perf_counter() - start < 20
    assert find_groups(torchvision.models.shufflenet_v2_x1_0(weights=None), torch.randn(1, 3, 64, 64)).groups


def test_torch_pruning_is_imported_late() -> None:
    script = "import sys, idap.filters, idap.layers, idap.artifact; sys.exit('torch_pruning' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", script], cwd=root, timeout=60).returncode == 0


def test_a_model_that_raises() -> None:
    with pytest.raises(GraphError, match="RuntimeError"):
        find_groups(Chain(), torch.randn(1, 4, 8, 8))
    detached = nn.Sequential(nn.Linear(3, 3))
    detached.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(GraphError, match="depends on its parameters"):
        find_groups(detached, torch.randn(1, 3))


@pytest.mark.parametrize("limit", [0, -1.0, float("nan")])
def test_bad_time_limit(limit: float) -> None:
    with pytest.raises(InvalidInputError, match="time_limit"):
        find_groups(Chain(), torch.randn(1, 3, 8, 8), time_limit=limit)


def test_ignore() -> None:
    model, x = Residual(), torch.randn(1, 3, 8, 8)
    for rule in ("stem", "st*m", model.stem, nn.BatchNorm2d):
        scan = find_groups(model, x, ignore=[rule])
        roots = {s.root for s in scan.skipped if "ignored on request" in s.reason}
        assert roots == ({"a"} if rule is nn.BatchNorm2d else {"stem"})
    # b writes into the stem's sum: keeping b's outputs keeps the stem's.
    assert "stem" in {s.root for s in find_groups(model, x, ignore="b").skipped}
    outer = nn.Sequential(model)
    assert resolve_ignore(outer, ["0"]) >= {"0", "0.stem", "0.stem.weight"}
    for bad in ("nothing", nn.LSTM, nn.Linear(1, 1)):
        with pytest.raises(InvalidInputError, match="matches no module"):
            find_groups(model, x, ignore=[bad])
    with pytest.raises(InvalidInputError, match="wanted a name"):
        find_groups(model, x, ignore=[3])


def test_surgery_of_one_layer() -> None:
    model = TokenMLP()
    cut(model, "gamma", "parameter", [0, 39], dim=0)
    assert model.gamma.shape == (38,)
    assert isinstance(model.gamma, nn.Parameter)
    assert side_size(model, "fc1", "linear_out") == 40
    with pytest.raises(PlanMismatchError, match="the model has none"):
        side_size(model, "fc9", "linear_out")
    with pytest.raises(PlanMismatchError, match="the model has a LayerNorm"):
        side_size(model, "norm", "linear_out")
    with pytest.raises(PlanMismatchError, match="cuts dimension 3"):
        side_size(model, "gamma", "parameter", 3)
    with pytest.raises(InvalidInputError, match="unknown kind"):
        side_size(model, "fc1", "rotate")


def test_frozen_batch_norm_is_cut() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), torchvision.ops.FrozenBatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    (group,) = find_groups(model, torch.randn(1, 3, 4, 4)).groups
    assert {m.kind for m in group.members} == {"conv_out", "frozen_bn", "conv_in"}
    cut(model, "1", "frozen_bn", [0])
    assert model[1].running_var.shape == (7,)
