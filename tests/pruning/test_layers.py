"""Removable blocks: found where they are, left alone where they are not, replaced in their own form."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from pruning_networks import Chain, Residual
from torch import Tensor, nn
from torch.nn import functional as F

from idap.complexity import count_macs, count_params
from idap.errors import InvalidInputError, NonFiniteError, TargetUnreachableError
from idap.layers import IdentityBlock, find_blocks, truncate_layers

torchvision = pytest.importorskip("torchvision")

# Counts of removable blocks and of all blocks of that class.
ARCHITECTURES: dict[str, tuple[int, dict[str, int]]] = {
    "resnet18": (32, {"BasicBlock": 5}),
    "resnet50": (32, {"Bottleneck": 12}),
    "mobilenet_v3_large": (32, {"InvertedResidual": 10}),
    "convnext_small": (32, {"CNBlock": 36}),
    "efficientnet_b4": (32, {"MBConv": 25}),
    "efficientnet_v2_s": (32, {"MBConv": 27, "FusedMBConv": 8}),
    "shufflenet_v2_x1_0": (32, {"InvertedResidual": 13}),
    "regnet_y_400mf": (32, {"ResBottleneckBlock": 12}),
    "swin_t": (64, {"SwinTransformerBlock": 12}),
    "inception_v3": (96, {"InceptionA": 1, "InceptionC": 4, "InceptionE": 1}),
    "squeezenet1_1": (64, {"Fire": 4}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_torchvision(name: str) -> None:
    size, wanted = ARCHITECTURES[name]
    arguments = {"inception_v3": {"aux_logits": False, "init_weights": False}}.get(name, {})
    model = torchvision.models.get_model(name, weights=None, **arguments)
    blocks = find_blocks(model, torch.randn(1, 3, size, size))
    assert Counter(block.type for block in blocks) == wanted
    modules = dict(model.named_modules())
    for block in blocks:
        assert type(modules[block.name]).__name__ == block.type
        assert block.params == count_params(modules[block.name])
    if blocks:
        plan = truncate_layers(
            model, {block.name: 1.0 for block in blocks}, torch.randn(1, 3, size, size), count=len(blocks)
        )
        assert plan.removed_blocks == tuple(block.name for block in blocks)
        assert plan.after.params == plan.before.params - sum(block.params for block in blocks)


def test_vision_transformer() -> None:
    model = torchvision.models.VisionTransformer(32, 8, num_layers=5, num_heads=2, hidden_dim=16, mlp_dim=32)
    blocks = find_blocks(model, torch.randn(2, 3, 32, 32))
    assert [block.name for block in blocks] == [f"encoder.layers.encoder_layer_{i}" for i in range(5)]
    assert all(block.residual and block.shape == (2, 17, 16) for block in blocks)


def test_encoder_and_decoder_layers() -> None:
    model = nn.Transformer(16, 2, 2, 3, 32, batch_first=True)
    inputs = (torch.randn(1, 5, 16), torch.randn(1, 7, 16))
    names = [block.name for block in find_blocks(model, inputs)]
    assert names == ["encoder.layers.0", "encoder.layers.1", *(f"decoder.layers.{i}" for i in range(3))]
    # torch's encoder and decoder look into their first layers (layers[0].self_attn), which have to stay.
    plan = truncate_layers(model, dict.fromkeys(names, 0.0), inputs, count=3)
    assert plan.removed_blocks == ("encoder.layers.1", "decoder.layers.1", "decoder.layers.2")
    reasons = {s.root: s.reason for s in plan.skipped}
    assert set(reasons) == {"encoder.layers.0", "decoder.layers.0"}
    assert all("no attribute 'self_attn'" in reason for reason in reasons.values())
    assert truncate_layers(model, dict.fromkeys(names, 0.0), inputs, macs=0.7).removed_blocks
    with pytest.raises(TargetUnreachableError, match="3 of Transformer can go"):
        truncate_layers(model, dict.fromkeys(names, 0.0), inputs, count=4)


TINY = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
# Class of transformers, of its configuration, settings, lists of layers, and the layers that must stay.
LANGUAGE_MODELS: dict[str, tuple[str, str, dict[str, Any], list[str], set[str]]] = {
    "bert": (
        "BertForSequenceClassification", "BertConfig", TINY | {"intermediate_size": 32},
        ["bert.encoder.layer"], set(),
    ),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": 60, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32, "bos_token_id": 0,
         "eos_token_id": 1, "initializer_range": 0.3},
        ["transformer.h"], set(),
    ),
    "llama": (
        "LlamaForCausalLM", "LlamaConfig", TINY | {"intermediate_size": 32, "num_key_value_heads": 1},
        ["model.layers"], set(),
    ),
    # The first layer of a stack owns the bias of positions that the others are given.
    "t5": (
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2,
         "decoder_start_token_id": 0},
        ["encoder.block", "decoder.block"], {"encoder.block.0", "decoder.block.0"},
    ),
}  # fmt: skip


def language_model(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    factory, config, settings, _, _ = LANGUAGE_MODELS[name]
    model = getattr(transformers, factory)(getattr(transformers, config)(**settings)).eval()
    ids = torch.randint(2, 60, (2, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model, inputs | ({"decoder_input_ids": ids[:, :5]} if name == "t5" else {})


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_whole_layers_of_language_models(name: str) -> None:
    model, inputs = language_model(name)
    _, _, _, stacks, staying = LANGUAGE_MODELS[name]
    layers = [f"{stack}.{i}" for stack in stacks for i in range(3)]
    blocks = find_blocks(model, inputs, projections=True)
    assert [block.name for block in blocks] == [layer for layer in layers if layer not in staying]
    assert all(block.residual and block.projection is None for block in blocks)
    # All layers are offered; the second of each stack goes, and those that must not go stay.
    divergences = {layer: float(not layer.endswith(".1")) for layer in layers}
    plan = truncate_layers(model, divergences, inputs, count=len(stacks))
    assert plan.removed_blocks == tuple(f"{stack}.1" for stack in stacks)
    assert {s.root for s in plan.skipped} == staying
    short = plan.apply(model, inputs)
    for stack in stacks:
        del model.get_submodule(stack)[1]
    with torch.no_grad():
        assert torch.equal(short(**inputs).logits, model(**inputs).logits)


def test_a_language_model_without_its_first_layer_generates() -> None:
    model, inputs = language_model("gpt2")
    plan = truncate_layers(model, {"transformer.h.0": 0.0}, inputs, count=1)
    short = plan.apply(model, inputs)
    wanted = inputs["input_ids"]
    with torch.no_grad():
        for _ in range(5):
            wanted = torch.cat([wanted, short(wanted, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    # Every step after the first reads the cache, which has nothing of the layer that is gone.
    got = short.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(got, wanted)
    assert not torch.equal(got, model.generate(
        **inputs, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
    ))  # fmt: skip


def test_timm_vision_transformer() -> None:
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, depth=3, embed_dim=24, num_heads=3)
    x = torch.randn(2, 3, 32, 32)
    blocks = find_blocks(model, x, projections=True)
    assert [(b.name, b.type, b.shape) for b in blocks] == [
        (f"blocks.{i}", "Block", (2, 17, 24)) for i in range(3)
    ]
    short = truncate_layers(model, {"blocks.1": 0.0}, x, count=1).apply(model, x)
    del model.blocks[1]
    with torch.no_grad():
        assert torch.equal(short.eval()(x), model.eval()(x))


def test_transformer_encoder_of_torch() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.Linear(4, 16), nn.TransformerEncoder(layer, 3), nn.Linear(16, 3))
    x = torch.randn(2, 5, 4)
    blocks = find_blocks(model, x, projections=True)
    assert [block.name for block in blocks] == [f"1.layers.{i}" for i in range(3)]
    plan = truncate_layers(model, {"1.layers.2": 0.0, "1.layers.1": 1.0}, x, count=1)
    short = plan.apply(model, x)
    del model[1].layers[2]
    with torch.no_grad():
        torch.testing.assert_close(short.eval()(x), model.eval()(x))


class Halves(nn.Module):
    """A layer of two parts with a sum each, which alone are all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.wide = Layer(), Wide()

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(self.mix(x)[0])


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


def test_a_layer_of_two_parts_is_a_block_only_in_a_row_of_its_class() -> None:
    x = torch.randn(2, 3, 4)
    row = nn.Sequential(nn.Linear(4, 8), nn.Sequential(Halves(), Halves()), nn.Linear(8, 2))
    assert [block.name for block in find_blocks(row, x)] == ["1.0", "1.1"]
    alone = nn.Sequential(nn.Linear(4, 8), Halves(), nn.Linear(8, 2))
    assert [block.name for block in find_blocks(alone, x)] == ["1.mix", "1.wide"]
    stages = nn.Sequential(
        nn.Linear(4, 8), *(nn.Sequential(Wide(), PostNorm()) for _ in range(2)), nn.Linear(8, 2)
    )
    assert [block.name for block in find_blocks(stages, x)] == ["1.0", "1.1", "2.0", "2.1"]


class Layer(nn.Module):
    """A transformer layer as text models have them: masks pass through, a tuple comes back."""

    def __init__(self, made_here: bool = False) -> None:
        super().__init__()
        self.fc, self.made_here = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), made_here

    def forward(self, hidden: Tensor, mask: Tensor | None = None, *, bias: Tensor | None = None) -> Any:
        if self.made_here:
            bias = hidden.mean()
        return hidden + self.fc(hidden), None, bias, mask


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.layers = nn.ModuleList([Layer(True), Layer(), Layer()])
        self.out = nn.Linear(8, 2)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        hidden, bias = self.embed(ids), None
        for layer in self.layers:
            hidden, _, bias, mask = layer(hidden, mask, bias=bias)
        return {"logits": self.out(hidden), "bias": bias}


def test_tuples_come_back_in_the_shape_of_the_block() -> None:
    model = Stack()
    inputs = {"ids": torch.randint(0, 9, (2, 3)), "mask": torch.ones(2, 3)}
    blocks = find_blocks(model, inputs)
    # The first layer makes the bias that the others pass on, so that it cannot go.
    assert [block.name for block in blocks] == ["layers.1", "layers.2"]
    assert blocks[0].returns == ["hidden", "none", ["kwarg", "bias"], ["arg", 1]]
    plan = truncate_layers(model, {"layers.0": 0.0, "layers.1": 0.2, "layers.2": 0.1}, inputs, count=2)
    assert plan.removed_blocks == ("layers.2", "layers.1")
    assert {s.root: s.reason for s in plan.skipped} == {"layers.0": "the identity cannot stand in for it"}
    short = plan.apply(model, inputs)
    hidden, _, bias, _ = model.layers[0](model.embed(inputs["ids"]))
    got = short(**inputs)
    assert torch.equal(got["logits"], model.out(hidden))
    assert torch.equal(got["bias"], bias)


def test_identity_block() -> None:
    x, mask = torch.randn(2, 3), torch.ones(2)
    assert IdentityBlock()(x, mask, flag=True) is x
    assert IdentityBlock()(hidden_states=x) is x
    assert IdentityBlock(["hidden", "none", ["arg", 1], ["arg", 5], ["kwarg", "m"], ["kwarg", "k"]])(
        x, mask, m=mask
    ) == (x, None, mask, None, mask, None)
    half = x.half()
    assert IdentityBlock()(half).dtype == torch.float16
    assert not list(IdentityBlock().parameters())


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once = (nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
        self.bare = nn.Sequential(nn.ReLU(), nn.Dropout())
        self.wide = nn.Sequential(nn.Linear(4, 6))
        self.leaf = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.leaf(self.wide(self.bare(self.once(self.twice(self.twice(x))))))


def test_what_is_no_block() -> None:
    # Called twice, without parameters, of another width, a single layer: none of these.
    assert [block.name for block in find_blocks(Shared(), torch.randn(2, 4))] == ["once"]
    assert find_blocks(Chain(), torch.randn(1, 3, 8, 8)) == []
    assert find_blocks(Residual(), torch.randn(1, 3, 8, 8)) == []


def test_branches_of_a_net_are_no_blocks_but_its_trunk_is() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = (nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.left(x)[..., :2], self.right(x)[..., 2:]], -1)

    model = nn.Sequential(nn.Linear(4, 4), Branches(), nn.Linear(4, 2))
    assert [(b.name, b.residual) for b in find_blocks(model, torch.randn(2, 4))] == [("1", False)]


class Gate(nn.Module):
    """Squeeze and excite: of the same shape, with layers, but no block of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))


class Unit(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv, self.gate, self.skip = nn.Conv2d(before, after, 1), Gate(after), before == after

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate(F.relu(self.conv(x)))
        return x + y if self.skip else y


class First(Unit):
    pass


def test_parts_of_the_one_unit_without_a_sum_are_no_blocks() -> None:
    model = nn.Sequential(First(3, 8), Unit(8, 8), Unit(8, 6), Unit(6, 6))
    assert [block.name for block in find_blocks(model, torch.randn(1, 3, 4, 4))] == ["1", "3"]


class PostNorm(nn.Module):
    """An attention-like part with a sum of its own, then a larger one: both belong to one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = Layer(), nn.LayerNorm(8)
        self.wide, self.narrow = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)[0]
        return self.norm(x + self.narrow(F.gelu(self.wide(x))))


def test_a_layer_of_two_sums_is_one_block() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(PostNorm(), PostNorm()), nn.Linear(8, 2))
    assert [block.name for block in find_blocks(model, torch.randn(2, 3, 4))] == ["1.0", "1.1"]


def test_the_lowest_divergence_goes_first_and_ties_go_in_order() -> None:
    model = torchvision.models.resnet18(weights=None)
    x = torch.randn(1, 3, 32, 32)
    names = [block.name for block in find_blocks(model, x)]
    divergences = dict(zip(names, [3.0, 1.0, 2.0, 1.0, 5.0], strict=True))
    plan = truncate_layers(model, divergences, x, count=3)
    assert plan.removed_blocks == (names[1], names[3], names[2])
    plan = truncate_layers(model, divergences, x, count=1, ignore=[names[1]])
    assert plan.removed_blocks == (names[3],)
    assert {s.root: s.reason for s in plan.skipped}[names[1]] == "ignored on request"
    del divergences[names[0]]
    plan = truncate_layers(model, divergences, x, count=4)
    assert names[0] not in plan.removed_blocks
    assert truncate_layers(model, divergences, x, count=0).steps == ()


def test_macs_target() -> None:
    model = torchvision.models.resnet18(weights=None)
    x = torch.randn(1, 3, 32, 32)
    names = [block.name for block in find_blocks(model, x)]
    divergences = {name: float(i) for i, name in enumerate(names)}
    full = count_macs(model, x)
    plan = truncate_layers(model, divergences, x, macs=0.7)
    assert plan.after.macs <= 0.7 * full
    fewer = truncate_layers(model, divergences, x, count=len(plan.removed_blocks) - 1)
    assert fewer.after.macs > 0.7 * full
    with pytest.raises(TargetUnreachableError, match="with all 5 blocks gone"):
        truncate_layers(model, divergences, x, macs=0.05)
    with pytest.raises(TargetUnreachableError, match="count=6"):
        truncate_layers(model, divergences, x, count=6)


def test_bad_arguments() -> None:
    model = torchvision.models.resnet18(weights=None)
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(InvalidInputError, match="exactly one"):
        truncate_layers(model, {}, x)
    with pytest.raises(InvalidInputError, match="exactly one"):
        truncate_layers(model, {}, x, count=1, macs=0.5)
    with pytest.raises(InvalidInputError, match="count"):
        truncate_layers(model, {}, x, count=-1)
    with pytest.raises(InvalidInputError, match="no module of ResNet"):
        truncate_layers(model, {"layer9": 1.0}, x, count=1)
    with pytest.raises(NonFiniteError, match=r"layer1\.0"):
        truncate_layers(model, {"layer1.0": float("nan")}, x, count=1)


def test_the_model_comes_out_as_it_went_in() -> None:
    model = torchvision.models.resnet18(weights=None).train()
    model.conv1.weight.requires_grad_(False)
    state = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        find_blocks(model, torch.randn(2, 3, 32, 32))
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not model.conv1.weight.requires_grad
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is state[name][0]
        assert torch.equal(tensor, state[name][1])


def test_a_model_that_raises_is_left_alone() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(5, 4)).train()
    with pytest.raises(RuntimeError):
        find_blocks(model, torch.randn(2, 4))
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert F.relu(model[0](torch.randn(2, 4))).shape == (2, 4)


@pytest.mark.parametrize("divergences", [None, 3, {"stem": "words"}, {"stem": torch.ones(2)}])
def test_divergences_of_the_wrong_kind_are_named(divergences: Any) -> None:
    model = Residual()
    with pytest.raises(InvalidInputError, match=r"divergences.*layer_divergence\(model, profile\)"):
        truncate_layers(model, divergences, torch.randn(2, 3, 8, 8), count=1)
