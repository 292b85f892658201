"""The three language models of the paper, built by transformers from configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..inputs import Inputs
from .architectures import Architecture, PaperFigures
from .resolve import _library

_SMALL_VOCABULARY = 101


def _built(model: str, configuration: str, **settings: Any) -> nn.Module:
    """A model in evaluation mode that gives no cache of keys and values, unless it is called with ``use_cache``.

    ``generate`` does so. A cache is an output of no known type to ``torch.export``.
    """
    transformers = _library("transformers")
    built: nn.Module = getattr(transformers, model)(getattr(transformers, configuration)(**settings))
    for module in built.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "use_cache"):
            config.use_cache = False
    return built.eval()


def bert_base(classes: int = 2) -> nn.Module:
    """``BertForSequenceClassification`` of 12 layers, 768 channels and 12 heads, with ``classes`` outputs."""
    return _built("BertForSequenceClassification", "BertConfig", num_labels=classes)


def small_bert(classes: int = 3) -> nn.Module:
    """The same of 3 layers, 32 channels and 4 heads."""
    return _built(
        "BertForSequenceClassification",
        "BertConfig",
        vocab_size=_SMALL_VOCABULARY,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,
        num_labels=classes,
    )


def gpt2_base() -> nn.Module:
    """``GPT2LMHeadModel`` of 12 layers, 768 channels and 12 heads, its output tied to its embedding."""
    return _built("GPT2LMHeadModel", "GPT2Config")


def small_gpt2() -> nn.Module:
    """The same of 3 layers, 32 channels and 4 heads."""
    return _built(
        "GPT2LMHeadModel",
        "GPT2Config",
        vocab_size=_SMALL_VOCABULARY,
        n_positions=64,
        n_embd=32,
        n_layer=3,
        n_head=4,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )


def t5_base() -> nn.Module:
    """``T5ForConditionalGeneration`` of 12 + 12 layers, 768 channels and 12 heads of 64."""
    return _built(
        "T5ForConditionalGeneration",
        "T5Config",
        d_model=768,
        d_kv=64,
        d_ff=3072,
        num_layers=12,
        num_heads=12,
        decoder_start_token_id=0,
    )


def small_t5() -> nn.Module:
    """The same of 3 + 3 layers, 32 channels and 4 heads of 8."""
    return _built(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=_SMALL_VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=3,
        num_heads=4,
        decoder_start_token_id=0,
    )


def _text(vocabulary: int, length: int, answer: int = 0) -> Callable[[int], Inputs]:
    """A function of a batch size giving random tokens (B, length), every other text a quarter shorter than that.

    With ``answer``, also as many tokens for a decoder.
    """

    def inputs(batch: int) -> dict[str, Tensor]:
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[1::2, length - length // 4 :] = 0
        found = {"input_ids": torch.randint(2, vocabulary, (batch, length)), "attention_mask": mask}
        if answer:
            found["decoder_input_ids"] = torch.randint(2, vocabulary, (batch, answer))
        return found

    return inputs


_NO_CACHE = "It gives no cache unless it generates: with one, torch.export refuses the library's own model"
_WIDTHS = "Whole heads and channels of the MLPs go, which is exact; the width of the trunk stays by default"

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        name="bert_base",
        title="BERT Base",
        task="language",
        builders={"transformers": bert_base},
        inputs=_text(30522, 128),
        paper=PaperFigures(speedup=1.61),
        small=small_bert,
        small_inputs=_text(_SMALL_VOCABULARY, 12),
        notes=(f"{_WIDTHS}, as layer norms span it.",),
    ),
    Architecture(
        name="gpt2_base",
        title="GPT-2 Base",
        task="language",
        builders={"transformers": gpt2_base},
        inputs=_text(50257, 128),
        paper=PaperFigures(speedup=1.50),
        small=small_gpt2,
        small_inputs=_text(_SMALL_VOCABULARY, 12),
        notes=(
            f"{_WIDTHS}, as layer norms span it; with exact=False it goes too, and the output stays tied to the "
            "embedding.",
            "Its linear layers keep their weights as (inputs, outputs).",
            f"{_NO_CACHE} (Found DynamicCache in output, which is not a known type).",
        ),
    ),
    Architecture(
        name="t5_base",
        title="T5 Base",
        task="language",
        builders={"transformers": t5_base},
        inputs=_text(32128, 128, 64),
        paper=PaperFigures(speedup=1.53),
        small=small_t5,
        small_inputs=_text(_SMALL_VOCABULARY, 12, 7),
        notes=(
            "Whole heads and channels of the MLPs go, which is exact; the width of the trunk stays, as the encoder "
            "gives it out and shares its embedding with the decoder.",
            "Each layer loses its own heads: the table of position biases, which the first layer of a stack has for "
            "all, stays whole.",
            "The first block of each stack stays, as it makes the position biases.",
            f"{_NO_CACHE} (Found EncoderDecoderCache in output, which is not a known type).",
        ),
    ),
)
