"""Attention heads as units: exact removal in every style of attention, their divergence, whole runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_networks import ATTENTION, Gpt, SmallViT, randomise, scores_of
from torch import Tensor, nn

import idap
from idap import inputs
from idap.adapters.attention import attention_modules, count_heads, remove_heads
from idap.adapters.multihead import HeadwiseAttention
from idap.complexity import count_macs, count_params
from idap.errors import InvalidInputError, PlanMismatchError, SurgeryError
from idap.filters import CostModel, prune_filters
from idap.groups import Group, GroupScan, cut, find_groups, is_head_group, side_size
from idap.heads import AttentionHeads, attention_divergence, find_heads, head_divergence
from idap.plan import Cost, PruningPlan, channel_step

LIMIT = 1e-10


def removing(model: nn.Module, groups: list[Group], units: Callable[[Group], list[int]]) -> PruningPlan:
    return PruningPlan(type(model).__name__, (channel_step((group, units(group)) for group in groups),))


def head_groups(model: nn.Module, example: Any) -> list[Group]:
    return [group for group in find_groups(model, example).groups if is_head_group(group)]


def prove(model: nn.Module, example: Any, sizes: dict[str, int], *, kept_macs: bool = True) -> nn.Module:
    """Every head group loses its second unit, exactly; what is left has heads to lose as well."""
    randomise(model).eval()
    groups = head_groups(model, example)
    assert {group.root: group.size for group in groups} == sizes
    plan = removing(model, groups, lambda group: [1])
    pruned = plan.apply(model, example)
    assert plan.exactness_error(model, example) <= LIMIT
    # The comparison can fail: with another head's columns taken from one output projection it does.
    (step,) = plan.steps
    reader = next(r for r in step.removals if r.kind == "linear_in")
    gone = len(reader.removed)
    others = tuple(range(gone)) if reader.removed[0] else tuple(range(reader.size - gone, reader.size))
    wrong = [replace(r, removed=others) if r is reader else r for r in step.removals]
    broken = replace(plan, steps=(replace(step, removals=tuple(wrong)),)).apply(model)
    with torch.no_grad():
        good, bad = (inputs.outputs_of(inputs.call(m, example))[0][1] for m in (pruned, broken))
    assert (good - bad).abs().max() > 100 * LIMIT * good.abs().max()
    if kept_macs:
        cost = CostModel(model, example, groups, [[1, *(u for u in range(g.size) if u != 1)] for g in groups])
        wanted = Cost(count_params(pruned), count_macs(pruned, example))
        assert cost([1] * len(groups)) == wanted
        assert wanted.macs < count_macs(model, example)
    left = {group.root: group.size for group in head_groups(pruned, example)}
    assert left == {root: size - 1 for root, size in sizes.items() if size > 2}
    return pruned


@pytest.mark.parametrize("name", ATTENTION)
def test_own_attention(name: str) -> None:
    factory, sizes = ATTENTION[name]
    model = factory()
    before = dict(vars(model.attn))
    pruned = prove(model, torch.randn(2, 5, 24, dtype=torch.float64), sizes)
    for key, value in vars(pruned.attn).items():
        if isinstance(value, int) and not isinstance(value, bool):
            share = 1 if key in ("head_dim", "groups", "embed_dim") else (sizes_left(sizes))
            assert value == before[key] * share, key


def sizes_left(sizes: dict[str, int]) -> float:
    (size,) = sizes.values()
    return (size - 1) / size


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 10, "vdim": 14}, {"add_bias_kv": True}])
def test_multihead_attention(batch_first: bool, options: dict[str, Any]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(24, 4, batch_first=batch_first, **options)
            self.fc = nn.Linear(24, 3)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.fc(self.attn(q, k, v, need_weights=False)[0])

    shapes = [(2, 5, 24), (2, 7, options.get("kdim", 24)), (2, 7, options.get("vdim", 24))]
    example = [torch.randn(s if batch_first else (s[1], s[0], s[2]), dtype=torch.float64) for s in shapes]
    model = Net()
    pruned = prove(model, example, {"attn": 4})
    assert isinstance(pruned.attn, HeadwiseAttention)
    assert (pruned.attn.num_heads, pruned.attn.embed_dim, pruned.attn.kept_heads) == (3, 24, (0, 2, 3))
    assert type(model.attn) is nn.MultiheadAttention
    assert type(copy.deepcopy(pruned).attn) is HeadwiseAttention


def whole(attention: nn.MultiheadAttention) -> HeadwiseAttention:
    """The replacement module with all heads, which must do what the original does."""
    other = copy.deepcopy(attention)
    other.__class__ = HeadwiseAttention
    assert isinstance(other, HeadwiseAttention)
    return other


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_the_replacement_has_the_interface_of_the_original(batch_first: bool, extra: dict[str, Any]) -> None:
    original = randomise(nn.MultiheadAttention(12, 3, batch_first=batch_first, **extra)).eval()
    replacement = whole(original)
    q = torch.randn((2, 5, 12) if batch_first else (5, 2, 12), dtype=torch.float64)
    k = torch.randn((2, 6, 12) if batch_first else (6, 2, 12), dtype=torch.float64)
    bool_mask, float_mask = torch.rand(5, 6) > 0.7, torch.randn(5, 6, dtype=torch.float64)
    each = torch.randn(6, 5, 6, dtype=torch.float64)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    causal = torch.ones(5, 6, dtype=torch.bool).triu(2)
    bool_mask[:, 0] = False
    for options in (
        {}, {"need_weights": False}, {"average_attn_weights": False}, {"attn_mask": bool_mask},
        {"attn_mask": float_mask, "need_weights": False}, {"attn_mask": each},
        {"key_padding_mask": padding}, {"key_padding_mask": padding, "attn_mask": bool_mask},
        {"attn_mask": causal, "is_causal": True},
    ):  # fmt: skip
        with torch.no_grad():
            wanted, got = original(q, k, k, **options), replacement(q, k, k, **options)
        torch.testing.assert_close(got[0], wanted[0])
        assert (got[1] is None) == (wanted[1] is None)
        if wanted[1] is not None:
            torch.testing.assert_close(got[1], wanted[1])
    one = torch.randn(4, 12, dtype=torch.float64)  # without a batch
    for got, wanted in zip(replacement(one, one, one), original(one, one, one), strict=True):
        torch.testing.assert_close(got, wanted)
    with pytest.raises(InvalidInputError, match="is_causal"):
        replacement(q, k, k, is_causal=True)
    with pytest.raises(InvalidInputError, match="attn_mask"):
        replacement(q, k, k, attn_mask=torch.zeros(3, 3, dtype=torch.float64))


def test_masks_for_every_head_may_be_those_of_the_original() -> None:
    attention = randomise(nn.MultiheadAttention(12, 3, batch_first=True)).eval()
    x, mask = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(6, 5, 5, dtype=torch.float64)
    pruned = copy.deepcopy(attention)
    cut(pruned, "", "mha", [1])
    cut(pruned, "out_proj", "linear_in", [4, 5, 6, 7])
    short = mask.view(2, 3, 5, 5)[:, [0, 2]].reshape(4, 5, 5)
    torch.testing.assert_close(
        pruned(x, x, x, attn_mask=mask)[0], pruned(x, x, x, attn_mask=short)[0], atol=0, rtol=0
    )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
def test_encoder_layers_stay_off_the_fused_path(padded: bool) -> None:
    layer = nn.TransformerEncoderLayer(24, 4, 32, batch_first=True, dropout=0.1)
    model = nn.Sequential()
    model.encoder = nn.TransformerEncoder(layer, 2)
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 4:] = padded
    encoder = randomise(nn.TransformerEncoder(layer, 2)).eval()
    # With padding and the fused path on, the encoder hands nested tensors to its layers.
    example = {"src": x, "src_key_padding_mask": mask} if padded else {"src": x}
    prove(encoder, example, {"layers.0.self_attn": 4, "layers.1.self_attn": 4})
    one = removing(encoder, head_groups(encoder, example)[:1], lambda group: [0, 2])
    assert one.exactness_error(encoder, example) <= LIMIT


def test_decoder_layer_has_two_attentions() -> None:
    model = nn.TransformerDecoderLayer(24, 4, 32, batch_first=True)
    example = (torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(2, 7, 24, dtype=torch.float64))
    prove(model, example, {"self_attn": 4, "multihead_attn": 4})


def test_torchvision_vit() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(
        32, 8, num_layers=2, num_heads=4, hidden_dim=48, mlp_dim=96, num_classes=7
    )
    name = "encoder.layers.encoder_layer_{}.self_attention"
    prove(model, torch.randn(2, 3, 32, 32, dtype=torch.float64), {name.format(0): 4, name.format(1): 4})


@pytest.mark.parametrize("fused", [True, False])
def test_timm_vit(fused: bool) -> None:
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=7, qk_norm=not fused
    )
    for block in model.blocks:
        block.attn.fused_attn = fused
    sizes = {"blocks.0.attn.qkv": 4, "blocks.1.attn.qkv": 4}
    pruned = prove(model, torch.randn(2, 3, 32, 32, dtype=torch.float64), sizes)
    attn = pruned.blocks[0].attn
    assert (attn.num_heads, attn.head_dim, attn.attn_dim, attn.qkv.in_features) == (3, 12, 36, 48)


def test_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 32}
    tokens = {"input_ids": torch.randint(0, 50, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    tokens["attention_mask"][1, 4:] = 0
    for implementation in ("eager", "sdpa"):
        bert = transformers.BertForSequenceClassification(
            transformers.BertConfig(
                num_attention_heads=4, attn_implementation=implementation, num_labels=3, **common
            )
        )
        query = "bert.encoder.layer.{}.attention.self.query"
        pruned = prove(bert, tokens, {query.format(0): 4, query.format(1): 4})
        own = pruned.bert.encoder.layer[0].attention.self
        assert (own.num_attention_heads, own.all_head_size, own.attention_head_size) == (3, 18, 6)
        llama = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                num_attention_heads=6,
                num_key_value_heads=3,
                attn_implementation=implementation,
                head_dim=4,
                use_cache=False,
                **common,
            )
        )
        query = "model.layers.{}.self_attn.q_proj"
        pruned = prove(llama, tokens, {query.format(0): 3, query.format(1): 3})
        attn = pruned.model.layers[1].self_attn
        assert [p.out_features for p in (attn.q_proj, attn.k_proj, attn.v_proj)] == [16, 8, 8]
        assert (attn.o_proj.in_features, attn.o_proj.out_features) == (16, 24)


def test_gpt2() -> None:
    """Fused queries, keys and values in layers that keep their weights the other way round."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=4)
    tokens = {"input_ids": torch.randint(0, 50, (2, 6))}
    pruned = prove(transformers.GPT2Model(config), tokens, {"h.0.attn.c_attn": 4, "h.1.attn.c_attn": 4})
    attn = pruned.h[0].attn
    assert (attn.num_heads, attn.head_dim, attn.split_size) == (3, 6, 18)
    assert (attn.c_attn.nf, attn.c_proj.nx) == (54, 18)


# ------------------------------------------------------------------------------------ what stays as it is


def test_a_forward_pass_that_keeps_the_number_of_heads_is_skipped_with_the_reason() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 4
            self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            b, t, c = x.shape
            q, k, v = self.qkv(x).reshape(b, t, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
            y = torch.softmax(q @ k.transpose(-2, -1), -1) @ v
            return x + self.proj(y.transpose(1, 2).reshape(b, t, c))

    layers = [part for _ in range(40) for part in (Fixed(), nn.Linear(16, 16))]
    model = nn.Sequential(*layers, nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 3))
    x = torch.randn(2, 5, 16)
    plan = prune_filters(model, scores_of(model), x, ratio=0.3, round_to=1)
    reasons = {s.root: s.reason for s in plan.skipped}
    # Far more than the check would try one by one.
    assert sum("breaks the model" in reasons.get(f"{2 * i}.qkv", "") for i in range(40)) > 30
    (step,) = plan.steps
    assert not any(removal.layer.endswith("qkv") for removal in step.removals)


def test_a_subclass_of_multihead_attention_is_left_alone() -> None:
    class Own(nn.MultiheadAttention):
        pass

    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layer.self_attn = Own(8, 2, batch_first=True)
    skipped = {s.root: s.reason for s in find_groups(layer, torch.randn(2, 3, 8)).skipped}
    assert "Own is not a plain nn.MultiheadAttention" in skipped["self_attn"]


def test_channels_that_are_no_whole_heads_stay() -> None:
    # One head: what the products join are its channels.
    model = ATTENTION["fused"][0](heads=1)
    scan = find_groups(model, torch.randn(2, 5, 24))
    assert not scan.groups
    assert any("only whole heads" in s.reason or "only one unit" in s.reason for s in scan.skipped)


def test_ignore_and_one_head_at_least() -> None:
    model, x = SmallViT(), torch.randn(2, 3, 16, 16)
    for rule in ("blocks.0.attn", "blocks.0.attn.qkv", "blocks.0"):
        roots = {g.root for g in find_groups(model, x, ignore=[rule]).groups}
        assert "blocks.0.attn.qkv" not in roots
        assert "blocks.1.attn.qkv" in roots
    scores = {f"blocks.{i}.attn": torch.arange(4.0) for i in range(2)}
    plan = prune_filters(model, scores, x, ratio=0.75, max_ratio=1.0)
    pruned = plan.apply(model)
    assert [block.attn.num_heads for block in pruned.blocks] == [1, 1]
    for options in ({"max_ratio": 0.5}, {"min_width": 12, "max_ratio": 1.0}):
        # A head is 6 channels wide.
        half = prune_filters(model, scores, x, ratio=0.5, **options).apply(model)
        assert [block.attn.num_heads for block in half.blocks] == [2, 2]
        with pytest.raises(idap.errors.TargetUnreachableError):
            prune_filters(model, scores, x, ratio=0.7, **options)


# ------------------------------------------------------------------------------------ attributes


def test_attributes_follow_the_heads() -> None:
    module = nn.Module()
    module.num_heads, module.num_key_value_heads, module.all_head_size, module.embed_dim = 8, 4, 32, 32
    module.bias = nn.Module()
    module.bias.num_heads, module.bias.bias_shape, module.bias.heads = 8, (16, 16, 8), 3
    model = nn.Module()
    model.attn = module
    assert side_size(model, "attn", "heads") == count_heads(module) == 8
    cut(model, "attn", "heads", [0, 1])
    assert vars(module)["num_key_value_heads"] == 3
    assert (module.num_heads, module.all_head_size, module.embed_dim) == (6, 24, 32)
    assert vars(module.bias)["bias_shape"] == (16, 16, 6)
    assert (module.bias.num_heads, module.bias.heads) == (6, 3)
    with pytest.raises(SurgeryError, match="go together"):
        remove_heads(module, "attn", [0])
    with pytest.raises(PlanMismatchError, match="has none"):
        remove_heads(nn.Identity(), "x", [0])
    with pytest.raises(PlanMismatchError, match="removes attention heads here"):
        side_size(nn.Sequential(nn.Identity()), "0", "heads")
    assert attention_modules(nn.Sequential(nn.Linear(2, 2))) == {}


# ------------------------------------------------------------------------------------ divergence


def by_hand(model: SmallViT, x: Tensor, block: int) -> Tensor:
    """The formula, from the heads themselves."""
    attn = model.blocks[block].attn
    seen = []
    handle = attn.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model.eval()(x)
    handle.remove()
    heads = seen[0].unflatten(-1, (attn.num_heads, -1))
    w = attn.qkv.weight.detach().unflatten(0, (3, attn.num_heads, -1))
    tokens = heads.shape[1]
    norm = heads.square().sum((1, 3)).mean(0).sqrt()
    return norm / tokens * w.square().sum((2, 3)).sqrt().sum(0)


def test_divergence_is_the_formula_and_adds_up() -> None:
    model, x = randomise(SmallViT()), torch.randn(3, 3, 16, 16, dtype=torch.float64)
    profile = idap.profile(model, [x], progress=False)
    scores = head_divergence(model, profile)
    assert list(scores) == ["blocks.0.attn", "blocks.1.attn"]
    close = torch.testing.assert_close
    for block in range(2):
        close(scores[f"blocks.{block}.attn"], by_hand(model, x, block))
    assert attention_divergence(model, profile) == pytest.approx(
        {name: float(own.sum()) for name, own in scores.items()}
    )
    # Twice the data, or in parts: the same. Twice the signal before the projection: twice the score.
    again = idap.profile(model, [x, x], progress=False)
    merged = idap.profile(model, [x[:1]], progress=False).merge(idap.profile(model, [x[1:]], progress=False))
    for other in (again, merged):
        for name, own in head_divergence(model, other).items():
            close(own, scores[name])
    restored = idap.ActivationProfile.from_state_dict(profile.state_dict())
    assert restored.heads == profile.heads
    close(head_divergence(model, restored)["blocks.0.attn"], scores["blocks.0.attn"])
    assert set(idap.flow_divergence(model, profile)) == {*profile.layers, *scores}


def test_a_layer_with_the_heads_of_two_has_the_sum_of_their_divergences() -> None:
    # The theorem: heads side by side in one attention, or each in an attention of its own, add up alike.
    torch.manual_seed(0)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    both = randomise(ATTENTION["separate"][0]()).eval()
    total = attention_divergence(both, idap.profile(both, [x], progress=False))["attn"]
    groups = head_groups(both, x)
    parts = 0.0
    for kept in ([0, 1], [2, 3]):
        lost = [head for head in range(4) if head not in kept]
        half = removing(both, groups, lambda group, lost=lost: lost).apply(both, x)
        parts += attention_divergence(half, idap.profile(half, [x], progress=False))["attn"]
    assert parts == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("kind", ["fused", "mha"])
def test_permuted_heads_have_permuted_scores_and_a_dead_head_none(kind: str) -> None:
    x, order = torch.randn(2, 5, 24, dtype=torch.float64), [2, 0, 3, 1]
    if kind == "mha":
        model: nn.Module = nn.TransformerEncoderLayer(24, 4, 32, batch_first=True)
        name, weight, bias, out = "self_attn", "in_proj_weight", "in_proj_bias", "out_proj"
        owner = model.self_attn
    else:
        model = ATTENTION["fused"][0]()
        name, weight, bias, out = "attn", "weight", "bias", "proj"
        owner = model.attn.qkv
    randomise(model).eval()
    projection = model.get_submodule(f"{name}.{out}")
    with torch.no_grad():
        for tensor in (getattr(owner, weight), getattr(owner, bias)):
            tensor.unflatten(0, (3, 4, 6))[2, 1] = 0  # its values
    wanted = idap.flow_divergence(model, idap.profile(model, [x], progress=False))[name]
    assert wanted[1] == 0
    assert (wanted[[0, 2, 3]] > 0).all()
    with torch.no_grad():
        y = model(x)
        for tensor in (getattr(owner, weight), getattr(owner, bias)):
            tensor.copy_(tensor.unflatten(0, (3, 4, 6))[:, order].flatten(0, 2))
        columns = projection.weight.unflatten(1, (4, 6))[:, order].flatten(1)
        projection.weight.copy_(columns)
        torch.testing.assert_close(model(x), y)
    got = idap.flow_divergence(model, idap.profile(model, [x], progress=False))[name]
    torch.testing.assert_close(got, wanted[order])


def test_shared_keys_and_values() -> None:
    model = randomise(ATTENTION["grouped"][0]()).eval()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    scan = find_groups(model, x)
    own = find_heads(model, scan)["attn"]
    assert own.heads == 6
    assert own.query.channels[3] == (12, 13, 14, 15)
    assert own.key.channels[2] == own.key.channels[3] == (4, 5, 6, 7)
    assert own.output.channels[5] == (20, 21, 22, 23)
    assert AttentionHeads.from_dict(own.to_dict()) == own
    scores = head_divergence(model, idap.profile(model, [x], heads={"attn": own}, progress=False))
    assert scores["attn"].shape == (6,)
    # Units are the three key heads; their score is the mean of two query heads each.
    plan = prune_filters(
        model, {"attn": torch.tensor([9.0, 9, 1, 2, 9, 0])}, x, ratio=0.34, groups=scan, round_to=8
    )
    (step,) = plan.steps
    assert {r.kind: r.removed for r in step.removals if r.layer == "attn"} == {"heads": (2, 3)}
    with pytest.raises(InvalidInputError, match="malformed"):
        AttentionHeads.from_dict({"name": "x"})


def test_profile_options() -> None:
    model, x = SmallViT(), torch.randn(2, 3, 16, 16)
    assert idap.profile(model, [x], heads=(), progress=False).heads == {}
    heads = find_heads(model, find_groups(model, x))
    some = idap.profile(model, [x], heads=[heads["blocks.1.attn"]], progress=False)
    assert list(some.heads) == ["blocks.1.attn"]
    assert list(some.inputs) == ["blocks.1.attn.proj"]
    full = idap.profile(model, [x], progress=False)
    assert full.heads == heads
    with pytest.raises(InvalidInputError, match="different"):
        some.merge(full)
    with pytest.raises(InvalidInputError, match=r"wanted what idap\.heads\.find_heads"):
        idap.profile(model, [x], heads=["blocks.1.attn"], progress=False)
    del full.inputs["blocks.0.attn.proj"]
    with pytest.raises(InvalidInputError, match="no statistics of what enters"):
        head_divergence(model, full)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    idap.profile(encoder, [torch.randn(2, 3, 8)], progress=False)
    assert type(encoder.self_attn) is nn.MultiheadAttention


# ------------------------------------------------------------------------------------ choice


def test_scores_of_heads() -> None:
    model, x = SmallViT(), torch.randn(2, 3, 16, 16)
    scores = scores_of(model) | {"blocks.0.attn": torch.tensor([5.0, 0.1, 5, 5])}
    scan = find_groups(model, x)
    only = GroupScan([g for g in scan.groups if g.root == "blocks.0.attn.qkv"], [])
    plan = prune_filters(model, scores, x, ratio=0.25, groups=only)
    (step,) = plan.steps
    assert {r.layer: r.removed for r in step.removals if r.kind == "heads"} == {"blocks.0.attn": (1,)}
    del scores["blocks.0.attn"]  # then the mean over its rows of queries, keys and values
    rows = scores["blocks.0.attn.qkv"].view(3, 4, 6).mean((0, 2))
    (step,) = prune_filters(model, scores, x, ratio=0.25, groups=only).steps
    assert {r.removed for r in step.removals if r.kind == "heads"} == {(int(rows.argmin()),)}
    with pytest.raises(InvalidInputError, match=r"wanted \(4,\)"):
        prune_filters(model, {"blocks.0.attn": torch.rand(5)}, x, ratio=0.25)


def test_a_scan_made_before() -> None:
    model, x = SmallViT(), torch.randn(2, 3, 16, 16)
    scores = scores_of(model)
    scan = find_groups(model, x)
    plan = prune_filters(model, scores, x, ratio=0.3, groups=scan)
    assert plan == prune_filters(model, scores, x, ratio=0.3)
    pruned = plan.apply(model)
    with pytest.raises(InvalidInputError, match="found on another model"):
        prune_filters(pruned, scores_of(pruned), x, ratio=0.3, groups=scan)
    with pytest.raises(InvalidInputError, match=r"wanted what idap\.groups\.find_groups"):
        prune_filters(model, scores, x, ratio=0.3, groups=[])  # type: ignore[arg-type]


@pytest.mark.parametrize("style", ["own", "torch", "gpt"])
def test_the_whole_way(style: str, tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(3)
        if style == "own":
            return randomise(SmallViT())
        if style == "gpt":
            return randomise(Gpt())
        layer = nn.TransformerEncoderLayer(24, 4, 32, batch_first=True, norm_first=True)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        return randomise(nn.Sequential(nn.Linear(6, 24), encoder, nn.Linear(24, 5)))

    model = make().eval()
    torch.manual_seed(4)
    shape = {"own": (4, 3, 16, 16), "torch": (4, 5, 6), "gpt": (4, 7, 24)}[style]
    x = torch.randn(shape, dtype=torch.float64)
    scores = idap.flow_divergence(model, idap.profile(model, [x], progress=False))
    plan = prune_filters(model, scores, x, macs=0.6)
    assert any(r.kind in ("heads", "mha") for step in plan.steps for r in step.removals)
    assert plan.exactness_error(model, x) <= LIMIT
    plan = PruningPlan.from_dict(plan.to_dict())
    pruned = plan.apply(model, x)
    assert plan.after == Cost(count_params(pruned), count_macs(pruned, x))
    assert 0.5 < plan.after.macs / plan.before.macs <= 0.6
    # A second round, on what the first one gave.
    again = prune_filters(
        pruned, idap.flow_divergence(pruned, idap.profile(pruned, [x], progress=False)), x, ratio=0.2
    )
    both = plan.then(again)
    smaller = both.apply(model, x)
    assert both.exactness_error(model, x) <= LIMIT
    idap.save(directory=tmp_path / "saved", model=smaller, plan=both)
    loaded = idap.load(tmp_path / "saved", make)
    with torch.no_grad():
        assert torch.equal(loaded(x), smaller(x))
    assert smaller.train()(x).sum().isfinite()
    smaller(x).sum().backward()
    assert all(p.grad is not None for p in smaller.parameters())
