"""Plans as data: JSON, replay, checks, composition, and what a model must not lose."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_networks import SMALL, Chain, Grouped, Residual, scores_of
from torch import Tensor, nn
from torch.nn import functional as F

from idap import plan as plans
from idap.errors import IdapError, InvalidInputError, NonFiniteError, PlanMismatchError, SurgeryError
from idap.filters import prune_filters
from idap.groups import Skipped
from idap.layers import find_blocks, truncate_layers
from idap.plan import (
    BlockRemoval,
    BlockStep,
    ChannelRemoval,
    ChannelStep,
    Cost,
    IdentityBlock,
    Projection,
    PruningPlan,
)

X = torch.randn(2, 3, 8, 8)


def prune(model: nn.Module, x: Any = X, ratio: float = 0.4, seed: int = 0) -> PruningPlan:
    return prune_filters(model, scores_of(model, seed), x, ratio=ratio, round_to=1)


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


indices = st.sets(st.integers(0, 60), max_size=30).map(lambda s: tuple(sorted(s)))
names = st.text("abc.01", min_size=1, max_size=8)
channel_steps = st.lists(
    st.builds(
        ChannelRemoval,
        names,
        st.sampled_from(["conv_out", "bn"]),
        st.integers(61, 99),
        indices,
        st.integers(0, 3),
    ),
    max_size=4,
).map(lambda items: ChannelStep(tuple(items)))
returns = st.sampled_from(["tensor", ["hidden", "none"], ["hidden", ["arg", 1], ["kwarg", "mask"]]])
widths = st.integers(1, 99)
projections = st.none() | st.one_of(
    st.builds(Projection, st.just("linear"), widths, widths),
    st.builds(Projection, st.just("conv2d"), widths, widths, st.tuples(widths, widths)),
)
followers = st.lists(st.tuples(names, names), max_size=2).map(tuple)
block_steps = st.lists(
    st.builds(BlockRemoval, names, names, returns, projections, followers, st.booleans()), max_size=3
).map(lambda items: BlockStep(tuple(items)))
costs = st.none() | st.builds(Cost, st.integers(0, 10**15), st.none() | st.integers(0, 10**15))
any_plan = st.builds(
    PruningPlan, names, st.lists(channel_steps | block_steps, max_size=4).map(tuple), costs, costs,
    st.lists(st.builds(Skipped, names, st.integers(0, 9), names), max_size=3).map(tuple),
)  # fmt: skip


@given(any_plan)
def test_json_round_trip(plan: PruningPlan) -> None:
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan
    assert again.skipped == plan.skipped
    assert again.to_json() == plan.to_json()
    assert plan.model in plan.summary()


@pytest.mark.parametrize("name", SMALL)
def test_replay_gives_the_same_bits_on_every_copy(name: str, tmp_path: Any) -> None:
    factory, example = SMALL[name]
    model, x = factory(), example()
    plan = prune(model, x)
    plan.save(tmp_path / "plan.json")
    again = PruningPlan.load(tmp_path / "plan.json").apply(copy.deepcopy(model))
    first = plan.apply(model, x)
    assert same_bits(first, again)
    assert not same_bits(first, model)
    with torch.no_grad():
        assert torch.equal(first.eval()(x), again.eval()(x))


def test_training_mode_gradients_and_state_are_kept() -> None:
    model = Residual().train()
    model.bn_a.eval()
    model.stem.weight.requires_grad_(False)
    model.b.requires_grad_(False)
    model(X).sum().backward()
    plan = prune(model)
    pruned = plan.apply(model, X)
    assert [m.training for m in pruned.modules()] == [m.training for m in model.modules()]
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in pruned.named_parameters()} == wanted
    assert all(p.grad is None for p in pruned.parameters())
    assert model.a.weight.grad is not None
    assert model.a.weight.shape == (12, 16, 3, 3)
    pruned(X).sum().backward()
    assert pruned.a.weight.grad.shape == pruned.a.weight.shape
    assert pruned.stem.weight.grad is None
    shared = {t.data_ptr() for t in model.state_dict().values()} & {
        t.data_ptr() for t in pruned.state_dict().values()
    }
    assert not shared


class Tied(nn.Module):
    """An embedding whose weight is also the last linear layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(11, 16), nn.Linear(16, 11, bias=False)
        self.fc1, self.fc2 = nn.Linear(16, 24), nn.Linear(24, 16)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.out(x + self.fc2(F.relu(self.fc1(x))))


def test_tied_weights_stay_tied() -> None:
    model, x = Tied(), torch.randint(0, 11, (2, 5))
    plan = prune_filters(model, scores_of(model), x, ratio=0.5, round_to=4)
    roots = {r.layer for step in plan.steps for r in step.removals}
    assert roots >= {"embed", "out", "fc1", "fc2"}
    pruned = plan.apply(model, x)
    assert pruned.out.weight is pruned.embed.weight
    assert pruned.embed.weight.shape[1] < 16
    assert pruned.fc1.out_features < 24
    assert len(list(pruned.parameters())) == len(list(model.parameters()))
    assert plan.exactness_error(model.double(), x) < 1e-10


def test_ties_that_a_plan_would_break() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    plan = PruningPlan("Sequential", (ChannelStep((
        ChannelRemoval("0", "linear_out", 6, (0,)), ChannelRemoval("1", "linear_in", 6, (0,)),
    )),))  # fmt: skip
    with pytest.raises(SurgeryError, match=r"0\.weight and 1\.weight are one parameter"):
        plan.apply(model)
    found = prune_filters(model, scores_of(model), torch.randn(2, 6), ratio=0.5, round_to=1)
    assert found.steps == ()
    assert ["an output of the model" in s.reason for s in found.skipped] == [True]
    # The rows of an embedding are no channels, those of a linear layer are.
    rows = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3))
    rows[1].weight = rows[0].weight
    found = prune_filters(rows, scores_of(rows), torch.randint(0, 6, (2, 3)), ratio=0.0, round_to=1)
    reasons = {s.root: s.reason for s in found.skipped}
    assert reasons["1"] == "0.weight and 1.weight are one parameter, and it cannot be cut in both"


def test_shared_layers_are_cut_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.twice, self.out = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.relu(self.twice(F.relu(self.twice(F.relu(self.stem(x)))))))

    model = Shared().double()
    x = torch.randn(3, 4, dtype=torch.float64)
    plan = prune(model, x, 0.25)
    pruned = plan.apply(model, x)
    assert pruned.twice.weight.shape == (12, 12)
    assert plan.exactness_error(model, x) < 1e-12


def test_plans_compose() -> None:
    model = Residual().double()
    x = X.double()
    first = prune(model, x, 0.3)
    middle = first.apply(model, x)
    second = prune(middle, x, 0.3, seed=1)
    both = first + second
    assert same_bits(both.apply(model, x), second.apply(middle, x))
    assert both.before == first.before
    assert both.after == second.after
    assert both.exactness_error(model, x) < 1e-12
    assert PruningPlan.from_json(both.to_json()) == both
    with pytest.raises(TypeError):
        first + 1  # type: ignore[operator]


class Counting(Residual):
    """Counts its forward passes, over all copies."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        Counting.runs += 1
        return super().forward(x)


def test_apply_and_compare_is_both_in_three_passes() -> None:
    model = Counting().double()
    x = X.double()
    plan = prune(model, x)
    Counting.runs = 0
    pruned, error = plans.apply_and_compare(plan, model, x)
    assert Counting.runs == 3
    assert same_bits(pruned, plan.apply(model, x))
    assert error == plan.exactness_error(model, x) < 1e-12
    with pytest.raises(SurgeryError, match="KeyError"):
        plans.apply_and_compare(prune(Chain()), Trap(), X)


class Keeper(nn.Module):
    """Gives what its blocks have kept beside its result, as models with a cache do."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
            cache.append(self.fc(x))
            return x + cache[-1]

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.order = nn.ModuleList([Keeper.Part(), Keeper.Part()]), ("out", "cache")

    def forward(self, x: Tensor) -> dict[str, Any]:
        cache: list[Tensor] = []
        for part in self.parts:
            x = part(x, cache)
        found = {"out": x, "cache": cache}
        return {key: found[key] for key in self.order}


def test_what_a_removed_block_kept_may_be_missing() -> None:
    model, x = Keeper(), torch.randn(2, 4)
    plan = PruningPlan("Keeper", (BlockStep((BlockRemoval("parts.1", "Part"),)),))
    assert len(plan.apply(model, x)(x)["cache"]) == 1
    assert plan.exactness_error(model, x) == 0.0
    model.parts[0] = IdentityBlock()
    plan.apply(model, x)
    model.order = ("cache", "out")
    with pytest.raises(SurgeryError, match="the pruned model returns"):
        plan.apply(model, x)


def test_channels_then_blocks() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(weights=None, num_classes=10)
    x = torch.randn(1, 3, 32, 32)
    first = prune_filters(model, scores_of(model), x, ratio=0.3)
    middle = first.apply(model, x)
    divergences = {block.name: float(i) for i, block in enumerate(find_blocks(middle, x))}
    second = truncate_layers(middle, divergences, x, count=2)
    both = first.then(second)
    whole = both.apply(model, x)
    assert both.removed_blocks == ("layer1.0", "layer1.1")
    assert isinstance(whole.layer1[0], IdentityBlock)
    assert same_bits(whole, second.apply(middle))
    assert both.exactness_error(model, x) < 1e-5
    assert both.after == plans.measure(whole, x)
    again = second.then(first)
    with pytest.raises(PlanMismatchError, match=r"layer1\.0.*after removing the block"):
        again.apply(model)


def test_a_plan_for_another_model_names_the_first_difference() -> None:
    plan = prune(Residual())
    wider = Residual()
    wider.a = nn.Conv2d(16, 13, 3, padding=1)
    with pytest.raises(PlanMismatchError, match=r"a: the plan was made for 12 channels \(conv_out\).*has 13"):
        plan.apply(wider)
    other = Residual()
    other.bn_a = nn.Identity()
    with pytest.raises(PlanMismatchError, match=r"bn_a: the plan cuts a BatchNorm here.*has a Identity"):
        plan.apply(other)
    with pytest.raises(PlanMismatchError, match="the model has none of that name"):
        plan.apply(Grouped())
    with pytest.raises(PlanMismatchError, match="to a fresh Residual"):
        plan.apply(plan.apply(Residual()))
    blocks = PruningPlan("M", (BlockStep((BlockRemoval("a", "Bottleneck"),)),))
    with pytest.raises(
        PlanMismatchError, match="a: the plan removes a Bottleneck here, the model has a Conv2d"
    ):
        blocks.apply(Residual())
    with pytest.raises(PlanMismatchError, match="out of range"):
        PruningPlan("M", (ChannelStep((ChannelRemoval("a", "conv_out", 12, (12,)),)),)).apply(Residual())


class Trap(Chain):
    """Raises, or gives nonsense, once its first layer is narrower."""

    trap = "raise"

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.conv1.out_channels < 16:
            if self.trap == "raise":
                raise KeyError("narrow")
            if self.trap == "interrupt":
                raise KeyboardInterrupt
            if self.trap == "nan":
                return out * float("nan")
            return out[:, :2] if self.trap == "shape" else out.double()
        return out


@pytest.mark.parametrize("trap", ["raise", "interrupt", "nan", "shape", "dtype"])
def test_a_failed_check_leaves_the_model_unharmed(trap: str) -> None:
    plan = prune(Chain())
    model = Trap().train()
    model.trap = trap
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    with pytest.raises(KeyboardInterrupt if trap == "interrupt" else SurgeryError):
        plan.apply(model, X)
    assert all(module.training for module in model.modules())
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is before[name][0]
        assert torch.equal(tensor, before[name][1])
    assert torch.isfinite(model(X)).all()


def test_a_model_that_gives_nan_itself() -> None:
    model = Chain()
    plan = prune(model)
    with torch.no_grad():
        model.fc.bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match="the model itself"):
        plan.apply(model, X)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"format": "other"}', '{"format": "idap-plan", "version": 99}',
        '{"format": "idap-plan", "version": 1}',
        '{"format": "idap-plan", "version": 1, "model": "m", "steps": [{"kind": "magic", "removals": []}]}',
        '{"format": "idap-plan", "version": 1, "model": "m", "steps": [{"kind": "blocks", "removals": 3}]}',
    ],
)  # fmt: skip
def test_damaged_json(text: str) -> None:
    with pytest.raises(InvalidInputError):
        PruningPlan.from_json(text)


@settings(max_examples=30)
@given(st.data())
def test_truncated_json_never_gives_a_plan(data: st.DataObject) -> None:
    text = PruningPlan("m", (ChannelStep((ChannelRemoval("a", "bn", 4, (0, 1, 3)),)),)).to_json()
    cut = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(IdapError):
        PruningPlan.from_json(text[:cut])


def test_runs_are_written_as_ranges() -> None:
    plan = PruningPlan("m", (ChannelStep((ChannelRemoval("a", "bn", 99, (0, 1, 2, 7, 9, 10)),)),))
    written = json.loads(plan.to_json())["steps"][0]["removals"][0]["removed"]
    assert written == [[0, 2], 7, [9, 10]]


def test_summary() -> None:
    plan = prune(Residual())
    text = str(plan)
    assert "Residual" in text
    assert f"{plan.before.params:,} -> {plan.after.params:,}" in text
    removals = (BlockRemoval("a", "A"), BlockRemoval("b", "B", projection=Projection("linear", 3, 4)))
    assert "blocks: a, b (projected)" in PruningPlan("M", (BlockStep(removals),)).summary()
    assert "fc (5): its channels are an output of the model" in text
    many = replace(plan, skipped=plan.skipped * 20)
    assert "... and 15 more" in many.summary(width=5)


def test_meta_models_can_be_pruned_for_their_shapes() -> None:
    plan = prune(Residual())
    with torch.device("meta"):
        model = Residual()
    pruned = plan.apply(model)
    assert sum(p.numel() for p in pruned.parameters()) == plan.after.params


def test_plans_that_an_older_reader_would_take_for_another_are_of_the_second_version():
    plain = BlockRemoval("a", "Conv2d")
    for removal, version in (
        (plain, 1),
        (replace(plain, cut=True), 2),
        (replace(plain, followers=(("b", "ReLU"),)), 2),
        (ChannelRemoval("a", "conv_out", 4, (1,)), 1),
        (ChannelRemoval("a", "shuffle", 4, (1,)), 2),
    ):
        kind = BlockStep if isinstance(removal, BlockRemoval) else ChannelStep
        plan = PruningPlan("M", (kind((removal,)),))
        assert plan.to_dict()["version"] == version
        assert PruningPlan.from_dict(plan.to_dict()) == plan
