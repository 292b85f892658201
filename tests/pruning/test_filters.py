"""The choice of channels: exact counts, ties, targets, widths, scores that make no sense."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_networks import (
    Chain,
    Dense,
    Depthwise,
    Gated,
    Grouped,
    Residual,
    TokenMLP,
    randomise,
    relative_error,
    scores_of,
    zeroed_outputs,
)
from torch import Tensor, nn
from torch.nn import functional as F

from idap.complexity import count_macs, count_params
from idap.errors import InvalidInputError, NonFiniteError, SurgeryError, TargetUnreachableError
from idap.filters import (
    CostModel,
    allowed_removals,
    group_scores,
    prune_filters,
    rank_units,
    removal_order,
)
from idap.groups import Group, Member, find_groups
from idap.plan import ChannelStep, PruningPlan

X = torch.randn(2, 3, 8, 8)


def removed(plan: PruningPlan, layer: str, kind: str = "conv_out") -> tuple[int, ...]:
    for step in plan.steps:
        assert isinstance(step, ChannelStep)
        for removal in step.removals:
            if (removal.layer, removal.kind) == (layer, kind):
                return removal.removed
    return ()


def widths(plan: PruningPlan) -> dict[str, int]:
    (step,) = plan.steps
    assert isinstance(step, ChannelStep)
    return {r.layer: r.size - len(r.removed) for r in step.removals if r.kind in ("conv_out", "linear_out")}


arrays = st.lists(
    st.lists(st.integers(0, 5).map(float), min_size=1, max_size=12).map(np.array), min_size=1, max_size=5
)


@given(arrays, st.sampled_from(["global", "local"]), st.sampled_from(["mean", None]))
def test_ranking_holds_every_unit_once_and_follows_the_scores(values, scope, normalize) -> None:
    ranking = rank_units(values, [len(v) for v in values], scope=scope, normalize=normalize)
    pairs = list(zip(ranking.groups.tolist(), ranking.units.tolist(), strict=True))
    assert sorted(pairs) == [(g, u) for g, v in enumerate(values) for u in range(len(v))]
    for group, scores in enumerate(values):
        own = [unit for g, unit in pairs if g == group]
        assert own == sorted(own, key=lambda unit: (scores[unit], unit))
    if scope == "global" and normalize is None:
        assert pairs == sorted(pairs, key=lambda pair: (values[pair[0]][pair[1]], *pair))
    again = rank_units(values, [len(v) for v in values], scope=scope, normalize=normalize)
    assert (again.groups == ranking.groups).all()
    assert (again.units == ranking.units).all()


@given(arrays)
def test_local_prefixes_take_the_same_share_of_every_group(values) -> None:
    ranking = rank_units(values, [len(v) for v in values], scope="local")
    for length in range(len(ranking) + 1):
        counts = np.bincount(ranking.groups[:length], minlength=len(values))
        shares = [(count - 0.5) / len(v) for count, v in zip(counts, values, strict=True)]
        following = [
            (count + 0.5) / len(v) for count, v in zip(counts, values, strict=True) if count < len(v)
        ]
        assert not following or max(shares) <= min(following) + 1e-12


@given(st.integers(1, 200), st.integers(1, 16), st.floats(0.05, 1.0))
def test_allowed_widths(size: int, step: int, most: float) -> None:
    allowed = allowed_removals(size, step, most)
    assert allowed[0] == 0
    assert (np.diff(allowed) > 0).all()
    for count in allowed[1:].tolist():
        assert (size - count) % step == 0
        assert size - count >= step
        assert count <= size * most + 1e-9


@settings(max_examples=15, deadline=None)
@given(st.floats(0.0, 0.85), st.integers(0, 1000), st.sampled_from(["global", "local"]))
def test_exact_number_of_units(ratio: float, seed: int, scope: str) -> None:
    model = Residual()
    plan = prune_filters(model, scores_of(model, seed), X, ratio=ratio, round_to=1, scope=scope)
    total = 16 + 12 + 20 + 24
    lost = sum(len(removed(plan, root)) for root in ("stem", "a", "c", "project"))
    assert lost == round(ratio * total)


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(16)))
def test_permuting_channels_permutes_the_choice(order: list[int]) -> None:
    model = Chain()
    scores = scores_of(model)
    plan = prune_filters(model, scores, X, ratio=0.4, round_to=1, verify=False)
    permuted = prune_filters(
        model,
        {**scores, "conv1": scores["conv1"][torch.tensor(order)]},
        X,
        ratio=0.4,
        round_to=1,
        verify=False,
    )
    assert {order[i] for i in removed(permuted, "conv1")} == set(removed(plan, "conv1"))
    assert removed(permuted, "conv2") == removed(plan, "conv2")


def test_ties_go_to_the_first_group_and_the_lowest_index() -> None:
    model = Chain()
    scores = {"conv1": torch.ones(16), "conv2": torch.ones(24)}
    plan = prune_filters(model, scores, X, ratio=0.25, round_to=1)
    assert removed(plan, "conv1") == tuple(range(10))
    assert removed(plan, "conv2") == ()
    again = prune_filters(model, scores, X, ratio=0.25, round_to=1)
    assert again == plan


def test_the_lowest_scores_go() -> None:
    model = Chain()
    scores = {"conv1": torch.arange(16.0).flip(0) + 1, "conv2": torch.arange(24.0) + 1000}
    plan = prune_filters(model, scores, X, ratio=0.1, round_to=1, normalize=None)
    assert removed(plan, "conv1") == (12, 13, 14, 15)
    relative = prune_filters(model, {**scores, "conv1": scores["conv1"] * 1e6}, X, ratio=0.1, round_to=1)
    same = prune_filters(model, scores, X, ratio=0.1, round_to=1)
    assert same == relative


@pytest.mark.parametrize(("reduction", "wanted"), [("mean", 1), ("sum", 1), ("max", 0)])
def test_scores_are_reduced_over_the_members(reduction: str, wanted: int) -> None:
    group = Group("a", 2, (
        Member("a", "conv_out", 2, ((0,), (1,))), Member("b", "conv_out", 2, ((1,), (0,))),
        Member("c", "conv_in", 2, ((0,), (1,))),
    ))  # fmt: skip
    own = group_scores(group, {"a": np.array([3.0, 4.0]), "b": np.array([0.0, 3.0])}, reduction)
    assert own is not None
    assert int(own.argmin()) == wanted
    assert own.tolist() == {"mean": [3.0, 2.0], "sum": [6.0, 4.0], "max": [3.0, 4.0]}[reduction]
    assert group_scores(group, {"c": np.array([1.0, 2.0])}) is None
    only_b = group_scores(group, {"b": np.array([7.0, 8.0])})
    assert only_b is not None
    assert only_b.tolist() == [8.0, 7.0]


def test_members_without_scores_do_not_contribute_and_groups_without_any_stay() -> None:
    model = Residual()
    scores = {"b": torch.arange(16.0), "a": torch.arange(12.0)}
    plan = prune_filters(model, scores, X, ratio=0.25, round_to=1, scope="local")
    assert removed(plan, "stem") == (0, 1, 2, 3)
    assert removed(plan, "b") == (0, 1, 2, 3)
    reasons = {s.root: s.reason for s in plan.skipped}
    assert "no scores for any" in reasons["c"]
    assert "no scores for any" in reasons["project"]


@pytest.mark.parametrize("share", [0.9, 0.5, 0.3])
@pytest.mark.parametrize("name", ["macs", "params"])
@pytest.mark.parametrize("factory", [Residual, Dense, Depthwise, Grouped])
def test_targets_are_met_by_the_shortest_prefix(name: str, share: float, factory: type[nn.Module]) -> None:
    model = factory()
    scores = scores_of(model)
    plan = prune_filters(model, scores, X, round_to=1, **{name: share})
    assert plan.before is not None
    assert plan.after is not None
    full, left = getattr(plan.before, name), getattr(plan.after, name)
    assert left <= share * full
    units = sum(g.size for g in find_groups(model, X).groups)
    lost = sum(len(units_) for units_ in _unit_counts(model, plan))
    one_less = prune_filters(model, scores, X, round_to=1, ratio=(lost - 1) / units)
    assert getattr(one_less.after, name) > share * full
    absolute = prune_filters(model, scores, X, round_to=1, **{name: int(share * full)})
    assert absolute == plan


def _unit_counts(model: nn.Module, plan: PruningPlan) -> list[set[int]]:
    found = []
    for group in find_groups(model, X).groups:
        own = set(removed(plan, group.root))
        member = next(m for m in group.members if m.layer == group.root and m.kind == "conv_out")
        found.append({unit for unit, channels in enumerate(member.units) if own & set(channels)})
    return found


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_the_cost_model_is_exact(data: st.DataObject) -> None:
    factory = data.draw(st.sampled_from([Residual, Dense, Depthwise, Grouped, TokenMLP, Gated]))
    x = {TokenMLP: torch.randn(2, 7, 12), Gated: torch.randn(2, 5, 10)}.get(factory, X)
    model = factory()
    groups = find_groups(model, x).groups
    orders = [data.draw(st.permutations(range(group.size))) for group in groups]
    counts = [data.draw(st.integers(0, group.size - 1)) for group in groups]
    from idap.plan import channel_step

    step = channel_step((g, order[:count]) for g, order, count in zip(groups, orders, counts, strict=True))
    pruned = PruningPlan("m", (step,)).apply(model, x)
    cost = CostModel(model, x, groups, orders)(counts)
    assert cost.params == count_params(pruned)
    assert cost.macs == count_macs(pruned, x)


def test_out_of_reach() -> None:
    model = Chain()
    with pytest.raises(TargetUnreachableError, match=r"least that removal reaches is [\d,]+ \("):
        prune_filters(model, scores_of(model), X, macs=0.001)
    with pytest.raises(TargetUnreachableError, match="at most 24 can go"):
        prune_filters(model, scores_of(model), X, ratio=0.8, round_to=8)
    with pytest.raises(TargetUnreachableError, match="max_ratio"):
        prune_filters(model, scores_of(model), X, ratio=0.5, round_to=1, max_ratio=0.2)


@pytest.mark.parametrize("round_to", [2, 4, 8])
@pytest.mark.parametrize("ratio", [0.1, 0.35, 0.5])
def test_what_is_left_is_a_multiple(round_to: int, ratio: float) -> None:
    model = Residual()
    plan = prune_filters(model, scores_of(model), X, ratio=ratio, round_to=round_to)
    full = {"stem": 16, "a": 12, "b": 16, "c": 20, "d": 24, "project": 24}
    for layer, width in widths(plan).items():
        assert width % round_to == 0
        assert round_to <= width < full[layer]


def test_groups_that_cannot_shrink_are_listed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 32, 1), nn.Conv2d(32, 2, 1))
    plan = prune_filters(model, scores_of(model), X, ratio=0.5, round_to=8)
    reasons = {s.root: s.reason for s in plan.skipped}
    assert "cannot shrink with round_to=8" in reasons["0"]
    # 12 is no multiple of 8: it may stay 12, or become 8.
    assert widths(plan) == {"1": 8, "2": 16} or widths(plan) == {"2": 8, "1": 8} or widths(plan) == {"2": 8}
    assert "3" in reasons


def test_rounding_counts_the_channels_of_a_unit() -> None:
    model = Grouped()
    plan = prune_filters(model, scores_of(model), X, ratio=0.5, round_to=8)
    assert all(width % 8 == 0 for width in widths(plan).values())
    assert widths(plan)["conv2"] in (8, 16, 24)


def test_nothing_to_remove() -> None:
    model = Chain()
    plan = prune_filters(model, scores_of(model), X, ratio=0.0)
    assert plan.steps == ()
    assert plan.before == plan.after
    assert prune_filters(model, scores_of(model), X, macs=1.0).steps == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of"),
        ({"ratio": 0.1, "macs": 0.5}, "exactly one of"),
        ({"ratio": 1.0}, r"\[0, 1\)"),
        ({"ratio": -0.1}, r"\[0, 1\)"),
        ({"ratio": float("nan")}, r"\[0, 1\)"),
        ({"macs": 0.0}, "macs"),
        ({"params": True}, "params"),
        ({"ratio": 0.1, "round_to": 0}, "round_to"),
        ({"ratio": 0.1, "scope": "layer"}, "scope"),
        ({"ratio": 0.1, "normalize": "max"}, "normalize"),
        ({"ratio": 0.1, "reduction": "median"}, "reduction"),
        ({"ratio": 0.1, "max_ratio": 0.0}, "max_ratio"),
        ({"ratio": 0.1, "ignore": ["no_such_layer"]}, "matches no module"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    model = Chain()
    with pytest.raises(InvalidInputError, match=message):
        prune_filters(model, scores_of(model), X, **arguments)


def test_bad_scores() -> None:
    model = Chain()
    scores = scores_of(model)
    bad = scores["conv2"].clone()
    bad[3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"conv2.*channel 3"):
        prune_filters(model, {**scores, "conv2": bad}, X, ratio=0.1)
    with pytest.raises(InvalidInputError, match=r"conv1.*wanted \(16,\)"):
        prune_filters(model, {**scores, "conv1": torch.ones(15)}, X, ratio=0.1)
    with pytest.raises(InvalidInputError, match="no layer of Chain"):
        prune_filters(model, {"conv7": torch.ones(16)}, X, ratio=0.1)


class Hidden(nn.Module):
    """Normalises over its channels with plain operations, behind a detour that no graph shows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = x / x.detach().pow(2).mean(-1, keepdim=True).add(1e-3).sqrt()
        return self.c(F.relu(self.b(x)))


class WrittenDown(nn.Module):
    """A width written into the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x) * torch.ones(16)))


@pytest.mark.parametrize(
    ("factory", "reason"), [(Hidden, "not exact: the outputs differ"), (WrittenDown, "breaks")]
)
def test_the_proof_finds_what_the_graph_does_not_show(factory: type[nn.Module], reason: str) -> None:
    model = factory()
    x = torch.randn(4, 6)
    assert len(find_groups(model, x).groups) == 2
    plan = prune_filters(model, scores_of(model), x, ratio=0.5, round_to=1)
    reasons = {s.root: s.reason for s in plan.skipped}
    assert reason in reasons["a"]
    assert len(removed(plan, "b", "linear_out")) == 8
    assert removed(plan, "a", "linear_out") == ()
    assert plan.exactness_error(model, x) < 1e-5


def test_a_model_whose_outputs_are_random_is_refused_with_a_reason() -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(80))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x + torch.randn_like(x) * 100

    model = Random()
    with pytest.raises(SurgeryError, match="same outputs twice"):
        prune_filters(model, scores_of(model), torch.randn(2, 4), ratio=0.5, round_to=1)
    assert prune_filters(
        model, scores_of(model), torch.randn(2, 4), ratio=0.5, round_to=1, verify=False
    ).steps


def test_inexact_groups_on_request() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.GroupNorm(1, 16), nn.ReLU(), nn.Conv2d(16, 4, 1))
    assert prune_filters(model, scores_of(model), X, ratio=0.5).steps == ()
    plan = prune_filters(model, scores_of(model), X, ratio=0.5, exact=False)
    pruned = plan.apply(model, X)
    assert pruned[1].num_channels == 8
    assert pruned[1].num_groups == 1


@pytest.mark.parametrize(
    # Groups of ten channels: four of them make a multiple of 8.
    ("width", "groups", "round_to", "ratio", "left"),
    [(40, 4, 2, 0.5, 20), (320, 32, 8, 0.5, 160), (320, 32, 8, 0.4, 200), (64, 32, 8, 0.4, 40)],
)
def test_whole_groups_of_a_group_norm(
    width: int, groups: int, round_to: int, ratio: float, left: int
) -> None:
    model = randomise(
        nn.Sequential(nn.Conv2d(3, width, 1), nn.GroupNorm(groups, width), nn.ReLU(), nn.Conv2d(width, 4, 1))
    )
    example = X.double()
    plan = prune_filters(model, scores_of(model), example, ratio=ratio, round_to=round_to)
    pruned = plan.apply(model, example)
    assert pruned[1].num_channels == left
    assert pruned[1].num_groups == left * groups // width
    assert relative_error(zeroed_outputs(model, plan, example), [pruned(example).detach()]) <= 1e-12


def test_what_takes_long_goes_first_when_ranked_by_time() -> None:
    def build(slow: str | None) -> dict[str, int]:
        torch.manual_seed(0)
        convs = [nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 3)]
        model = nn.Sequential(*convs)
        scores = {name: torch.linspace(1, 2, conv.out_channels) for name, conv in model.named_children()}
        times = None if slow is None else {"0": 1.0, "1": 1.0, "2": 1.0, "3": 1.0, slow: 20.0}
        x = torch.randn(1, 3, 12, 12)
        plan = prune_filters(model, scores, x, ratio=0.25, round_to=1, times=times)
        return {r.layer: len(r.removed) for s in plan.steps for r in s.removals if r.kind == "conv_out"}

    assert build(None) == {"0": 4, "1": 4, "2": 4}
    # A slow layer is read by one group and made by another: both go before the third.
    assert build("0") == {"0": 12}
    assert build("3") == {"2": 12}
    model = Residual()
    name = next(name for name, _ in model.named_children())
    for wrong, message in (({name: -1.0}, "milliseconds"), ([1.0], "mapping"), ({"nope": 1.0}, "'nope'")):
        with pytest.raises(InvalidInputError, match=message):
            prune_filters(model, scores_of(model), X, ratio=0.25, times=wrong)
    with pytest.raises(InvalidInputError, match="local"):
        prune_filters(model, scores_of(model), X, ratio=0.25, times={name: 1.0}, scope="local")


def test_the_model_is_only_read() -> None:
    model = Residual().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prune_filters(model, scores_of(model), X, ratio=0.5)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.fixture(scope="module")
def shuffled() -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.shufflenet_v2_x0_5(weights=None).eval()
    return model, scores_of(model), torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("target", [{"ratio": 0.3}, {"ratio": 0.4, "round_to": 1}, {"macs": 0.5}])
def test_layers_that_read_part_of_a_group_are_never_emptied(shuffled, target: dict) -> None:
    model, scores, x = shuffled
    plan = prune_filters(model, scores, x, **target)
    (step,) = plan.steps
    assert isinstance(step, ChannelStep)
    assert all(len(removal.removed) < removal.size for removal in step.removals)
    assert plan.exactness_error(model, x) < 1e-4
    small = plan.apply(model, x)
    if "macs" in target:
        assert count_macs(small, x) <= 0.5 * count_macs(model, x)


def test_a_unit_that_would_empty_a_layer_is_passed_over() -> None:
    whole = Member("a", "conv_out", 6, tuple((i,) for i in range(6)))
    part = Member("b", "conv_in", 2, ((0,), (1,), (), (), (), ()))
    group = Group("a", 6, (whole, part))
    scores = np.arange(6.0)
    assert removal_order(group, scores, 1.0).tolist() == [0, 2, 3, 4, 5]
    assert removal_order(group, scores[::-1], 1.0).tolist() == [5, 4, 3, 2, 1]
    assert removal_order(Group("a", 6, (whole,)), scores, 0.5).tolist() == list(range(6))
    wide = Member("b", "conv_in", 4, ((0,), (1,), (2,), (3,), (), ()))
    assert removal_order(Group("a", 6, (whole, wide)), scores, 0.5).tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": "a"}, "ratio"),
        ({"ratio": torch.tensor([0.1, 0.2])}, "ratio"),
        ({"ratio": True}, "ratio"),
        ({"ratio": None, "macs": float("inf")}, "macs"),
        ({"max_ratio": "a"}, "max_ratio"),
        ({"scores": None}, "flow_divergence"),
        ({"scores": torch.ones(8)}, "flow_divergence"),
        ({"scores": {"conv1": "words"}}, "conv1"),
        ({"scores": {"conv1": object()}}, "conv1"),
        ({"scores": {}}, "wanted scores of layers such as"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(change: dict, message: str) -> None:
    model = Chain()
    arguments: dict = {"scores": scores_of(model), "ratio": 0.3} | change
    with pytest.raises(InvalidInputError, match=message):
        prune_filters(model, example_inputs=X, **arguments)


def test_a_profile_instead_of_scores_is_named() -> None:
    from idap.profile import profile

    model = Chain()
    with pytest.raises(InvalidInputError, match=r"ActivationProfile.*flow_divergence\(model, profile\)"):
        prune_filters(model, profile(model, [X], progress=False), X, ratio=0.3)  # type: ignore[arg-type]


def test_scores_of_no_layer_that_can_be_pruned_are_refused() -> None:
    model = Chain()
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    with pytest.raises(InvalidInputError, match="wanted scores of layers such as"):
        prune_filters(model, {last: scores_of(model)[last]}, X, ratio=0.3)


def test_a_plan_that_removes_nothing_says_so() -> None:
    plan = prune_filters(Chain(), scores_of(Chain()), X, ratio=0.01)
    assert plan.steps == ()
    assert "nothing is removed" in plan.summary()


@pytest.mark.parametrize("min_width", [5, 10, 100])
def test_every_layer_keeps_a_least_width(min_width: int) -> None:
    model = Residual()
    options = {"round_to": 1, "max_ratio": 1.0, "min_width": min_width}
    if min_width == 100:  # wider than any layer: nothing may go
        plan = prune_filters(model, scores_of(model), X, ratio=0.0, **options)
        assert {s.reason for s in plan.skipped if "min_width=100" in s.reason}
        with pytest.raises(TargetUnreachableError):
            prune_filters(model, scores_of(model), X, macs=0.99, **options)
        return
    total = {"stem": 16, "a": 12, "c": 20, "project": 24}
    most = sum(size - min_width for size in total.values())
    plan = prune_filters(model, scores_of(model), X, ratio=most / sum(total.values()), **options)
    assert {layer: width for layer, width in widths(plan).items() if layer in total} == dict.fromkeys(
        total, min_width
    )


def test_a_least_width_counts_the_channels_of_the_narrowest_layer() -> None:
    # A unit is two channels of the first layer and one of its reader.
    model, x = Gated(), torch.randn(2, 5, 10)
    plan = prune_filters(model, scores_of(model), x, ratio=15 / 24, round_to=1, min_width=9)
    assert widths(plan)["proj"] == 18
    with pytest.raises(TargetUnreachableError):
        prune_filters(model, scores_of(model), x, ratio=16 / 24, round_to=1, min_width=9)


def test_a_least_width_after_a_channel_shuffle() -> None:
    halves = Member("half", "conv_in", 4, ((0,), (), (1,), (), (2,), (), (3,), ()))
    group = Group("conv", 8, (Member("conv", "conv_out", 8, tuple((i,) for i in range(8))), halves))
    order = removal_order(group, np.arange(8.0), 1.0, 3)
    assert order.tolist() == [0, 1, 3, 5, 7]


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "2"])
def test_a_bad_least_width(bad: object) -> None:
    with pytest.raises(InvalidInputError, match="min_width"):
        prune_filters(Chain(), scores_of(Chain()), X, ratio=0.2, min_width=bad)  # type: ignore[arg-type]
