"""BERT, GPT-2 and T5: exact surgery of heads and MLPs, text generated from the cache, ties, files, export."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_networks import randomise, relative_error, scores_of, zeroed_outputs
from torch import Tensor, nn

import idap
from idap import criteria
from idap.filters import CostModel
from idap.groups import find_groups, is_head_group
from idap.models.language import ARCHITECTURES, small_bert, small_gpt2, small_t5
from idap.plan import Cost, PruningPlan, channel_step

from . import network_checks as checks

transformers = pytest.importorskip("transformers")

NAMES = [architecture.name for architecture in ARCHITECTURES]
# What makes heads or hidden channels, and what reads them, by the ends of their names.
READERS = {
    "attention.self": "attention.output.dense", "intermediate.dense": "output.dense",
    "bert.pooler.dense": "classifier",
    ".attn": ".attn.c_proj", "mlp.c_fc": "mlp.c_proj",
    "SelfAttention": "SelfAttention.o", "EncDecAttention": "EncDecAttention.o",
    "DenseReluDense.wi": "DenseReluDense.wo",
}  # fmt: skip


@pytest.fixture(scope="module")
def networks() -> dict[str, checks.Pruned]:
    # The paper has no multiply-accumulates of language models.
    shares = [replace(own, paper=replace(own.paper, share=0.4)) for own in ARCHITECTURES]
    return {architecture.name: checks.pruned(architecture) for architecture in shares}


def tokens(batch: int = 2, length: int = 12) -> dict[str, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1:, length - 3 :] = 0
    return {"input_ids": torch.randint(2, 101, (batch, length)), "attention_mask": mask}


def silenced(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """A full-width copy in which nothing is read of the heads and hidden channels that the plan removes.

    By the numbers of the heads and of the hidden channels, not by the columns that the plan cuts.
    """
    reference = copy.deepcopy(model)
    (step,) = plan.steps
    touched = 0
    for removal in step.removals:
        end = next((end for end in READERS if removal.layer.endswith(end)), None)
        if removal.kind not in ("heads", "linear_out") or end is None:
            continue
        reader = reference.get_submodule(removal.layer.removesuffix(end) + READERS[end])
        inputs_first = reader.weight.detach() if hasattr(reader, "nf") else reader.weight.detach().t()
        inputs_first.unflatten(0, (removal.size, -1))[list(removal.removed)] = 0
        touched += 1
    assert touched
    return reference


# ------------------------------------------------------------------------------------------------
# What every network must show
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_stage_1(networks: dict[str, checks.Pruned], name: str) -> None:
    own = networks[name]
    checks.check_stage_1(own)
    got = checks.outputs(own.network, own.example)
    assert relative_error(checks.outputs(silenced(own.model, own.plan), own.example), got) <= 1e-10
    assert [tuple(p.shape) for p in own.network.parameters()] != [
        tuple(p.shape) for p in own.model.parameters()
    ]
    (step,) = own.plan.steps
    heads = [removal for removal in step.removals if removal.kind == "heads"]
    assert len(heads) == (9 if name == "t5_base" else 3)
    for removal in heads:
        assert 0 < len(removal.removed) < removal.size == 4


@pytest.mark.parametrize(("name", "least"), [("bert_base", 3), ("gpt2_base", 3), ("t5_base", 4)])
def test_stage_2(networks: dict[str, checks.Pruned], name: str, least: int) -> None:
    checks.check_stage_2(networks[name], least, 2)


@pytest.mark.parametrize("name", NAMES)
def test_trains(networks: dict[str, checks.Pruned], name: str) -> None:
    checks.check_training(networks[name])


@pytest.mark.slow
def test_reload(networks: dict[str, checks.Pruned], tmp_path: Path) -> None:
    checks.check_reload(networks.values(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["pt2", "onnx"])
def test_export(networks: dict[str, checks.Pruned], name: str, form: str, tmp_path: Path) -> None:
    own = networks[name]
    network = own.plan.apply(own.model).float()
    export = {"pt2": idap.export_program, "onnx": idap.export_onnx}[form]
    assert export(network, tmp_path / f"network.{form}", own.architecture.small_inputs(2)).stat().st_size > 0


@pytest.mark.parametrize("name", NAMES)
def test_all_that_is_left_alone_has_its_reason(name: str) -> None:
    (architecture,) = (own for own in ARCHITECTURES if own.name == name)
    scan = find_groups(architecture.small(), architecture.small_inputs(2))
    for skipped in scan.skipped:
        assert "an output of the model" in skipped.reason or "the LayerNorm " in skipped.reason, skipped
    assert len(scan.skipped) == 2


@pytest.mark.parametrize(
    ("name", "macs"), [("bert_base", 11.174), ("gpt2_base", 16.107), ("t5_base", 21.133)]
)
def test_macs(name: str, macs: float) -> None:
    (architecture,) = (own for own in ARCHITECTURES if own.name == name)
    with torch.device("meta"):
        network = next(iter(architecture.builders.values()))()
        example = {key: value for key, value in architecture.inputs(1).items() if key != "attention_mask"}
        if name == "gpt2_base":
            # The values of any other mask are looked at, which meta tensors have not.
            example["attention_mask"] = torch.zeros(1, 1, 128, 128)
    assert idap.count_macs(network, example) / 1e9 == pytest.approx(macs, rel=1e-3)


# ------------------------------------------------------------------------------------------------
# Text
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2_base", "t5_base"])
@pytest.mark.parametrize("cached", [True, False])
def test_generates_what_the_silenced_original_does(
    networks: dict[str, checks.Pruned], name: str, cached: bool
) -> None:
    own = networks[name]
    settings: dict[str, Any] = {
        "do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6, "use_cache": cached, "pad_token_id": 0,
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    x = {key: value for key, value in own.example.items() if key != "decoder_input_ids"}
    if name == "gpt2_base":
        x["attention_mask"] = x["attention_mask"].flip(1)  # a text goes on at its right end
    got, wanted = (m.generate(**x, **settings) for m in (own.network, silenced(own.model, own.plan)))
    assert torch.equal(got.sequences, wanted.sequences)
    assert relative_error(list(wanted.logits), list(got.logits)) <= 1e-10
    assert (got.past_key_values is not None) == cached


@pytest.mark.parametrize("name", ["gpt2_base", "t5_base"])
def test_a_model_that_returns_its_cache_is_pruned_alike(
    networks: dict[str, checks.Pruned], name: str
) -> None:
    own = networks[name]
    model = copy.deepcopy(own.model)
    for module in (model, getattr(model, "decoder", model)):
        module.config.use_cache = True
    assert model(**own.example).past_key_values is not None
    scores = idap.flow_divergence(model, idap.profile(model, [own.example]))
    plan = idap.prune_filters(model, scores, own.example, macs=0.4, round_to=4)
    assert plan == own.plan
    assert plan.exactness_error(model, own.example) <= 1e-10
    assert torch.equal(
        plan.apply(model, own.example)(**own.example).logits, own.network(**own.example).logits
    )


@pytest.mark.parametrize(
    ("name", "block"),
    [("gpt2_base", "transformer.h.0"), ("gpt2_base", "transformer.h.2"), ("t5_base", "decoder.block.1")],
)
def test_the_cache_counts_tokens_without_the_layer_that_is_asked(
    networks: dict[str, checks.Pruned], name: str, block: str
) -> None:
    own = networks[name]
    plan = idap.truncate_layers(own.network, {block: 0.0}, own.example, count=1)
    assert plan.removed_blocks == (block,)
    short = plan.apply(own.network)
    x = {key: value for key, value in own.example.items() if key != "decoder_input_ids"}
    x["attention_mask"] = x["attention_mask"].flip(1)
    settings: dict[str, Any] = {
        "do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6, "pad_token_id": 0,
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    for beams in (1, 2):
        found = [short.generate(**x, **settings, num_beams=beams, use_cache=use) for use in (True, False)]
        assert torch.equal(found[0].sequences, found[1].sequences)
        assert relative_error(list(found[1].logits), list(found[0].logits)) <= 1e-10
        assert found[0].past_key_values.get_seq_length() == found[0].sequences.shape[1] - 1
    again = pickle.loads(pickle.dumps(short))
    assert torch.equal(again.generate(**x, **settings).sequences, short.generate(**x, **settings).sequences)


# ------------------------------------------------------------------------------------------------
# T5: heads of every layer by themselves
# ------------------------------------------------------------------------------------------------


def test_layers_of_t5_keep_heads_of_their_own(networks: dict[str, checks.Pruned]) -> None:
    own = networks["t5_base"]
    scan = find_groups(own.model, own.example)
    groups = [group for group in scan.groups if is_head_group(group)]
    assert [group.size for group in groups] == [4] * 9
    # A different number in every layer, none in the first of the encoder, all but one in the next.
    units = [[], [0, 1, 2], [3], [1], [0, 2], [], [2, 3], [0], [0, 1, 3]]
    plan = PruningPlan(type(own.model).__name__, (channel_step(zip(groups, units, strict=True)),))
    pruned = plan.apply(own.model, own.example)
    left = [pruned.get_submodule(group.members[0].layer) for group in groups]
    assert [module.n_heads for module in left] == [4 - len(gone) for gone in units]
    assert [module.inner_dim for module in left] == [module.q.out_features for module in left]
    for stack in (pruned.encoder, pruned.decoder):
        table = stack.block[0].layer[0].SelfAttention.relative_attention_bias
        assert table.weight.shape == (32, 4)
    got = checks.outputs(pruned, own.example)
    assert relative_error(checks.outputs(silenced(own.model, plan), own.example), got) <= 1e-10
    # Its copies, and the other way to compute attention.
    for again in (copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned))):
        assert type(again.decoder.block[0].layer[0].SelfAttention) is type(left[3]) is not type(left[0])
        assert all(map(torch.equal, checks.outputs(again, own.example), got))
    pruned.set_attn_implementation("eager")
    assert relative_error(got, checks.outputs(pruned, own.example)) <= 1e-10
    weights = pruned(**own.example, output_attentions=True).decoder_attentions
    assert [w.shape[1] for w in weights] == [m.n_heads for m in left[3::2]]
    assert not [name for name, value in vars(left[3]).items() if isinstance(value, Tensor)]


def test_heads_of_t5_go_twice(networks: dict[str, checks.Pruned]) -> None:
    own = networks["t5_base"]
    plans, model = [], own.model
    for unit in (1, 2, 0):
        groups = [g for g in find_groups(model, own.example).groups if is_head_group(g)]
        assert len(groups) == 9
        plans.append(PruningPlan("T5ForConditionalGeneration", (channel_step((g, [unit]) for g in groups),)))
        model = plans[-1].apply(model, own.example)
    attention = model.decoder.block[2].layer[0].SelfAttention
    assert (attention.n_heads, attention.kept_heads) == (1, (2,))
    assert type(attention).__bases__[1] is type(own.model.decoder.block[2].layer[0].SelfAttention)
    assert (plans[0] + plans[1] + plans[2]).exactness_error(own.model, own.example) <= 1e-10


@pytest.mark.parametrize(
    ("kind", "columns"), [("MT5", 4), ("UMT5", 2), ("Pop2Piano", 4), ("SwitchTransformers", 4)]
)
def test_relatives_of_t5(kind: str, columns: int) -> None:
    """Those that share a table of biases keep its columns; where each layer has its own, it is cut."""
    small = {"vocab_size": 101, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "use_cache": False}
    if kind == "SwitchTransformers":
        small |= {"num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 0, "num_decoder_layers": 2}
    config = getattr(transformers, f"{kind}Config")(num_layers=2, **small)
    model = randomise(getattr(transformers, f"{kind}ForConditionalGeneration")(config)).eval()
    x = {**tokens(), "decoder_input_ids": torch.randint(2, 101, (2, 5))}
    groups = [group for group in find_groups(model, x).groups if is_head_group(group)]
    assert [group.size for group in groups] == [4] * 6
    units = ([i % 4] if i % 2 else [0, 3] for i in range(6))
    plan = PruningPlan(type(model).__name__, (channel_step(zip(groups, units, strict=True)),))
    pruned = plan.apply(model, x)
    table = pruned.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    assert table.embedding_dim == columns
    assert relative_error(zeroed_outputs(model, plan, x), checks.outputs(pruned, x)) <= 1e-10


# ------------------------------------------------------------------------------------------------
# GPT-2: linear layers that keep their weights the other way round
# ------------------------------------------------------------------------------------------------


class Transposed(nn.Module):
    """A linear layer in the manner of GPT-2."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def straight(layer: Transposed) -> nn.Linear:
    twin = nn.Linear(layer.nx, layer.nf)
    twin.load_state_dict({"weight": layer.weight.detach().t().contiguous(), "bias": layer.bias.detach()})
    return twin


def test_a_transposed_linear_layer_is_a_linear_layer() -> None:
    model = nn.Sequential(
        Transposed(12, 6), nn.GELU(), Transposed(12, 12), nn.Tanh(), Transposed(3, 12)
    ).double()
    twin = nn.Sequential(*(straight(m) if isinstance(m, Transposed) else m for m in model)).double()
    x = torch.randn(8, 6, dtype=torch.float64)
    records = [idap.profile(m, [x]) for m in (model, twin)]
    names = {"flow_divergence": idap.flow_divergence, **criteria.RIVALS}
    names["taylor"] = criteria.taylor([(x, torch.arange(8) % 3)])
    for name, criterion in names.items():
        own, wanted = (criterion(m, record) for m, record in zip((model, twin), records, strict=True))
        assert list(own) == list(wanted) == ["0", "2", "4"]
        for layer in own:
            assert torch.allclose(own[layer], wanted[layer], rtol=1e-12), name
    plans = [
        idap.prune_filters(m, idap.flow_divergence(m, r), x, macs=0.5, round_to=1)
        for m, r in zip((model, twin), records, strict=True)
    ]
    assert plans[0] == replace(plans[1], model="Sequential")
    (step,) = plans[0].steps
    assert {(r.layer, r.kind) for r in step.removals} == {
        ("0", "linear_out"), ("2", "linear_in"), ("2", "linear_out"), ("4", "linear_in"),
    }  # fmt: skip
    pruned, other = (plan.apply(m) for plan, m in zip(plans, (model, twin), strict=True))
    assert torch.allclose(pruned(x), other(x), rtol=1e-12)
    assert [(m.nx, m.nf) for m in pruned[::2]] == [tuple(m.weight.shape) for m in pruned[::2]]
    assert plans[0].exactness_error(model, x) <= 1e-12
    assert Cost(idap.count_params(pruned), idap.count_macs(pruned, x)) == plans[0].after


def entering(model: nn.Module, layer: str, example: Any) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    checks.outputs(model, example)
    handle.remove()
    return seen[0]


def test_fused_heads_of_gpt2(networks: dict[str, checks.Pruned]) -> None:
    own = networks["gpt2_base"]
    record = idap.profile(own.model, [own.example])
    scores = idap.flow_divergence(own.model, record)
    for number in range(3):
        name = f"transformer.h.{number}.attn"
        heads = record.heads[name]
        assert heads.query.layer == heads.value.layer == f"{name}.c_attn"
        assert heads.key.channels[1] == tuple(range(32 + 8, 32 + 16))
        # Seen by itself: the weights of head 1, and what it gives to the output projection.
        weight = own.model.get_submodule(f"{name}.c_attn").weight
        parts = [weight[:, 32 * part + 8 : 32 * part + 16].norm() for part in range(3)]
        given = entering(own.model, f"{name}.c_proj", own.example)[..., 8:16]
        energy = given.square().sum((1, 2)).mean().sqrt()
        assert float(scores[name][1]) == pytest.approx((energy / 12 * sum(parts)).item(), rel=1e-9)
    attention = own.network.transformer.h[0].attn
    assert attention.split_size == attention.num_heads * 8 == attention.c_attn.nf // 3
    assert attention.c_proj.nx == attention.split_size


@pytest.mark.parametrize("target", ["macs", "params"])
def test_the_trunk_of_gpt2_with_its_ties(networks: dict[str, checks.Pruned], target: str) -> None:
    """Embedding and output are one parameter before and after, and counted once."""
    own = networks["gpt2_base"]
    scores = idap.flow_divergence(own.model, idap.profile(own.model, [own.example]))
    plan = idap.prune_filters(own.model, scores, own.example, exact=False, round_to=4, **{target: 0.3})
    pruned = plan.apply(own.model, own.example)
    assert pruned.lm_head.weight is pruned.transformer.wte.weight
    assert pruned.transformer.wte.embedding_dim == pruned.lm_head.in_features < 32
    assert getattr(plan.after, target) <= 0.3 * getattr(plan.before, target)
    assert idap.count_params(pruned) == plan.after.params
    got = checks.outputs(pruned, own.example)
    assert relative_error(zeroed_outputs(own.model, plan, own.example), got) <= 1e-10
    scan = find_groups(own.model, own.example, exact=False)
    orders = [range(group.size) for group in scan.groups]
    counts = [group.size // 2 for group in scan.groups]
    chosen = [(group, range(count)) for group, count in zip(scan.groups, counts, strict=True)]
    halved = PruningPlan("GPT2LMHeadModel", (channel_step(chosen),)).apply(own.model)
    wanted = Cost(idap.count_params(halved), idap.count_macs(halved, own.example))
    assert CostModel(own.model, own.example, scan.groups, orders)(counts) == wanted


# ------------------------------------------------------------------------------------------------
# Ties and trunks of the others
# ------------------------------------------------------------------------------------------------


def test_a_tie_couples_layers_that_no_channel_does() -> None:
    """BERT's output for masked words shares the embedding, but reads another layer."""
    config = transformers.BertConfig(
        vocab_size=101, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    model = randomise(transformers.BertForMaskedLM(config)).eval()
    x = tokens()
    scan = find_groups(model, x, exact=False)
    trunk = next(group for group in scan.groups if group.root.endswith("word_embeddings"))
    layers = {member.layer for member in trunk.members}
    assert {"cls.predictions.decoder", "cls.predictions.transform.dense"} <= layers
    plan = PruningPlan("BertForMaskedLM", (channel_step([(trunk, [0, 5, 6, 30])]),))
    pruned = plan.apply(model, x)
    assert pruned.cls.predictions.decoder.weight is pruned.bert.embeddings.word_embeddings.weight
    assert relative_error(zeroed_outputs(model, plan, x), checks.outputs(pruned, x)) <= 1e-10


def test_the_trunk_of_bert() -> None:
    model, x = randomise(small_bert()).eval(), tokens()
    plan = idap.prune_filters(model, scores_of(model), x, macs=0.3, round_to=4, exact=False)
    pruned = plan.apply(model, x)
    assert pruned.bert.embeddings.word_embeddings.embedding_dim < 32
    assert relative_error(zeroed_outputs(model, plan, x), checks.outputs(pruned, x)) <= 1e-10


def test_the_trunk_of_t5_is_refused_as_it_is_given_out() -> None:
    """The encoder's is an output; the decoder's shares the embedding with it, through a module that never runs."""
    x = {**tokens(), "decoder_input_ids": torch.randint(2, 101, (2, 5))}
    scan = find_groups(small_t5(), x, exact=False)
    (trunk,) = (skipped for skipped in scan.skipped if skipped.size == 32)
    assert "an output of the model" in trunk.reason


def test_grouped_queries_of_llama() -> None:
    config = transformers.LlamaConfig(
        vocab_size=101, hidden_size=24, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
        head_dim=4, intermediate_size=48,
    )  # fmt: skip
    model, x = randomise(transformers.LlamaForCausalLM(config)).eval(), tokens()
    scores = idap.flow_divergence(model, idap.profile(model, [x]))
    plan = idap.prune_filters(model, scores, x, macs=0.6, round_to=4)
    pruned = plan.apply(model, x)
    attention = pruned.model.layers[0].self_attn
    assert attention.q_proj.out_features == 2 * attention.k_proj.out_features < 24
    assert relative_error(zeroed_outputs(model, plan, x), checks.outputs(pruned, x)) <= 1e-10
    texts = [
        m.generate(x["input_ids"], do_sample=False, max_new_tokens=5, use_cache=cached, pad_token_id=0)
        for m, cached in ((pruned, True), (pruned, False))
    ]
    assert torch.equal(*texts)


def test_builders_take_a_number_of_classes() -> None:
    assert small_bert(7)(**tokens()).logits.shape == (2, 7)
    assert small_gpt2().lm_head.out_features == 101
