"""llm-compressor's Wanda on our kernel: the row scalars and the masks of its own modifier."""

from __future__ import annotations

import copy
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
pytest.importorskip("llmcompressor")

from llmcompressor import oneshot
from llmcompressor.core import State
from llmcompressor.modifiers.pruning import WandaPruningModifier
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from idap.errors import InvalidInputError, NonFiniteError
from idap.integrations.llmcompressor import IdapWandaPruningModifier

pytestmark = pytest.mark.filterwarnings("ignore")


def calibrated(kind: type, layer: nn.Module, inputs: list[Tensor], **options: Any) -> WandaPruningModifier:
    """A modifier that has seen a layer's inputs through the hook it registers itself."""
    model = nn.Sequential(layer)
    modifier = kind(sparsity=0.5, targets=[type(layer).__name__], **options)
    modifier._target_layers = {"0": layer}
    modifier.on_calibration_start(State(model=model), None)
    if layer not in modifier._module_names:  # of a type that the library does not look for
        modifier._module_names[layer], modifier._module_sparsities[layer] = "0", modifier.sparsity
        modifier.register_hook(layer, modifier.calibrate_module, "forward")
    with torch.no_grad():
        for x in inputs:
            model(x)
    modifier.remove_hooks()
    return modifier


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["tokens", "flat", "strided", "pointwise", "square_conv1d"])
def test_row_scalars_are_the_library_s(name: str, dtype: torch.dtype) -> None:
    layer, inputs = {
        "tokens": (nn.Linear(16, 12), [torch.randn(b, 7, 16) for b in (3, 1, 4)]),
        "flat": (nn.Linear(16, 12), [torch.randn(t, 16) for t in (9, 2)]),
        "strided": (nn.Linear(16, 12), [torch.randn(7, 3, 40)[..., 5:37:2].transpose(0, 1)]),
        "pointwise": (nn.Conv2d(16, 12, 1), [torch.randn(b, 16, 5, 4) for b in (3, 2)]),
        "square_conv1d": (Conv1D(16, 16), [torch.randn(b, 7, 16) for b in (3, 2)]),
    }[name]
    layer, inputs = layer.to(dtype), [(x * 3).to(dtype) for x in inputs]
    mine = calibrated(IdapWandaPruningModifier, layer, inputs)
    theirs = calibrated(WandaPruningModifier, layer, inputs)
    got, want = mine._row_scalars[layer], theirs._row_scalars[layer]
    assert got.dtype == want.dtype
    assert mine._num_samples == theirs._num_samples
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    samples = sum(x.shape[0] if x.dim() > 2 else 1 for x in inputs)
    axis = 1 if name == "pointwise" else -1
    plain = torch.cat([x.double().movedim(axis, 0).flatten(1) for x in inputs], 1).square().sum(1) / samples
    torch.testing.assert_close(got.double(), plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize("structure", ["0:0", "2:4"])
def test_masks_are_the_library_s(structure: str) -> None:
    layer = nn.Linear(32, 24)
    inputs = [torch.randn(b, 5, 32) * torch.rand(32) * 4 for b in (3, 2)]
    norms = torch.cat([x.double().flatten(0, 1) for x in inputs]).norm(dim=0)
    score = layer.weight.detach().double().abs() * norms
    weights = []
    for kind in (WandaPruningModifier, IdapWandaPruningModifier):
        twin = copy.deepcopy(layer)
        modifier = calibrated(kind, twin, inputs, mask_structure=structure)
        modifier.compress_modules()
        weights.append(twin.weight)
        assert not modifier._row_scalars
        assert not modifier._num_samples
    assert not modifier._energy
    assert torch.equal(weights[0], weights[1])
    parts = score if structure == "0:0" else score.unflatten(1, (-1, 4))
    removed = parts.argsort(-1)[..., : parts.shape[-1] // 2]
    want = torch.ones_like(parts).scatter_(-1, removed, 0).view_as(score)
    assert torch.equal(weights[1], layer.weight * want.float())


def test_a_second_round_starts_anew() -> None:
    layer = nn.Linear(8, 4)
    first, second = torch.randn(2, 3, 8), torch.randn(4, 3, 8) * 2
    modifier = calibrated(IdapWandaPruningModifier, layer, [first])
    modifier.compress_modules()
    modifier.calibrate_module(layer, (second,), second)
    torch.testing.assert_close(
        modifier._row_scalars[layer].double(), second.double().square().sum((0, 1)) / 4, rtol=1e-5, atol=0
    )
    modifier.compress_modules()
    assert int((layer.weight == 0).sum()) == 16


def test_a_call_without_tokens_counts_as_theirs() -> None:
    layer = nn.Linear(8, 4)
    inputs = [torch.randn(0, 8), torch.randn(5, 8), torch.randn(0, 8)]
    mine = calibrated(IdapWandaPruningModifier, layer, inputs)
    theirs = calibrated(WandaPruningModifier, layer, inputs)
    torch.testing.assert_close(mine._row_scalars[layer], theirs._row_scalars[layer], rtol=1e-5, atol=0)
    assert not calibrated(IdapWandaPruningModifier, layer, inputs[:1])._row_scalars[layer].any()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 4, 3), (3, 7, 6)),
        (nn.Conv2d(3, 4, (2, 3), stride=2, padding=1), (3, 7, 6)),
        (nn.Conv2d(3, 4, 3, stride=(3, 2), padding=(0, 2), dilation=2), (3, 9, 8)),
        (nn.Conv2d(3, 4, (4, 3), padding="same"), (3, 5, 5)),
        (nn.Conv2d(3, 4, 5, padding=4), (3, 2, 1)),
        (nn.Conv2d(3, 4, 2, stride=3, padding=1), (3, 1, 7)),
        (nn.Linear(6, 4), (2, 3, 6)),
        (Conv1D(4, 6), (5, 6)),
    ],
)
def test_beyond_the_library(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Where its own accumulation raises: larger kernels, more dimensions, GPT-2's linear layers."""
    inputs = [torch.randn(b, *shape) for b in (2, 1)]
    with pytest.raises((RuntimeError, TypeError)):
        calibrated(WandaPruningModifier, copy.deepcopy(layer), inputs)
    modifier = calibrated(IdapWandaPruningModifier, layer, inputs)
    x = torch.cat(inputs).double()
    if isinstance(layer, nn.Conv2d):
        left, right, top, bottom = layer._reversed_padding_repeated_twice
        x = nn.functional.pad(x, (left, right, top, bottom))
        columns = nn.functional.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)
        plain = columns.square().sum((0, 2)) / 3
        weight = layer.weight.detach().flatten(1)
    else:
        plain = x.flatten(0, -2).square().sum(0) / 3
        weight = layer.weight.detach() if isinstance(layer, nn.Linear) else layer.weight.detach().t()
    torch.testing.assert_close(modifier._row_scalars[layer].double(), plain, rtol=1e-5, atol=1e-12)
    order = (weight.double().abs() * plain.sqrt()).argsort(dim=1, stable=True)
    want = torch.ones_like(weight).scatter_(1, order[:, : weight.shape[1] // 2], 0) * weight
    modifier.compress_modules()
    after = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight.flatten(1)
    assert torch.equal(after, want)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(16, 12), torch.randn(7, 3, 40)[..., 5:37:2].transpose(0, 1)),
        (nn.Conv2d(4, 3, 3, stride=2, padding=1), torch.randn(2, 4, 6, 5)),
    ],
)
def test_the_input_is_read_where_it_lies(
    layer: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import idap.integrations.llmcompressor as module

    reads: list[Tensor] = []
    kernel = module.channel_stats

    def watching(y: Tensor, **options: Any) -> Any:
        reads.append(y)
        return kernel(y, **options)

    monkeypatch.setattr(module, "channel_stats", watching)
    layer, x = layer.bfloat16(), x.bfloat16()
    calibrated(IdapWandaPruningModifier, layer, [x])
    assert len(reads) == (1 if isinstance(layer, nn.Linear) else 9)
    for y in reads:
        assert y.dtype == torch.bfloat16
        assert y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_an_unbatched_image_is_one_sample() -> None:
    layer, x = nn.Conv2d(3, 4, 1), torch.randn(3, 5, 4)
    modifier = calibrated(IdapWandaPruningModifier, layer, [x])
    want = x.double().square().sum((1, 2))
    torch.testing.assert_close(modifier._row_scalars[layer].double(), want, rtol=1e-5, atol=0)


def test_no_samples_at_all_leave_no_energy() -> None:
    layer = nn.Linear(8, 4)
    modifier = calibrated(IdapWandaPruningModifier, layer, [torch.randn(0, 3, 8)])
    assert torch.equal(modifier._row_scalars[layer], torch.zeros(8))


def test_what_is_wrong_is_said() -> None:
    for layer, x in (
        (nn.Conv2d(4, 4, 3, groups=2), torch.randn(1, 4, 5, 5)),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), torch.randn(1, 4, 5, 5)),
        (nn.Conv1d(4, 4, 3), torch.randn(1, 4, 5)),
    ):
        with pytest.raises(InvalidInputError, match=r"layer '0'.*ignore="):
            calibrated(IdapWandaPruningModifier, layer, [x])
    layer, x = nn.Linear(8, 4), torch.randn(2, 3, 8)
    before = layer.weight.detach().clone()
    modifier = calibrated(IdapWandaPruningModifier, layer, [x, x / 0])
    with pytest.raises(NonFiniteError, match="layer '0'"):
        modifier.compress_modules()
    assert torch.equal(layer.weight, before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama of random weights, as a folder: oneshot reads the configuration of its model from one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("structure", "pipeline"), [("2:4", "sequential"), ("0:0", "sequential"), ("2:4", "basic")]
)
def test_oneshot(checkpoint: Path, structure: str, pipeline: str) -> None:
    """The library's own entry point, from a data loader to pruned weights."""
    tokens = torch.randint(128, (8, 16), generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(
        [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens], batch_size=2
    )
    start = LlamaForCausalLM.from_pretrained(checkpoint)
    models = []
    for kind in (WandaPruningModifier, IdapWandaPruningModifier):
        model = LlamaForCausalLM.from_pretrained(checkpoint)
        recipe = kind(sparsity=0.5, mask_structure=structure, targets=["Linear"], ignore=["re:.*lm_head"])
        oneshot(model=model, dataset=loader, recipe=recipe, num_calibration_samples=8, pipeline=pipeline)
        models.append(model)
    theirs, mine = (dict(model.named_parameters()) for model in models)
    pruned = 0
    for name, before in start.named_parameters():
        assert torch.equal(mine[name], theirs[name])
        if "proj" in name:
            pruned += 1
            assert (mine[name] != 0).sum(1).unique().tolist() == [before.shape[1] // 2]
        else:
            assert torch.equal(mine[name], before)
    assert pruned == 14
    with torch.no_grad():
        assert models[1](tokens).logits.isfinite().all()


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["llmcompressor", "llmcompressor.modifiers.pruning"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "idap.integrations.llmcompressor")
    with pytest.raises(ImportError, match="pip install llmcompressor"):
        importlib.import_module("idap.integrations.llmcompressor")
