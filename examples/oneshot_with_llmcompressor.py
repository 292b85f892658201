"""llm-compressor's oneshot, Wanda 2:4, with our kernel reading the inputs. A tiny Llama of random weights."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")

import torch
from llmcompressor import oneshot
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from idap.integrations.llmcompressor import IdapWandaPruningModifier


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    tokens = torch.randint(128, (8, 32))
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    with tempfile.TemporaryDirectory() as folder:  # oneshot reads configuration and tokenizer from a folder
        LlamaForCausalLM(config).save_pretrained(folder)
        words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a").save_pretrained(folder)
        model = LlamaForCausalLM.from_pretrained(folder)
        recipe = IdapWandaPruningModifier(
            sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"]
        )
        oneshot(model=model, dataset=torch.utils.data.DataLoader(data, batch_size=4), recipe=recipe)
    for name, parameter in model.named_parameters():
        if "layers.0" in name and parameter.dim() == 2:
            zeros = (parameter == 0).double()
            fours = zeros.unflatten(1, (-1, 4)).sum(2)
            print(f"{name:<46} zeros {zeros.mean():.0%}, two of every four: {bool((fours == 2).all())}")


if __name__ == "__main__":
    main()
