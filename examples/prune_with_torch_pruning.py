"""Torch-Pruning's own pruner with IDAP's scores: one extra forward pass, everything else as before.

Random weights and random data: what is shown is how the parts fit together and what the scoring costs.
"""

from __future__ import annotations

import time

import torch
import torch_pruning as tp
from torchvision.models import resnet18

import idap
from idap.integrations.torch_pruning import ChannelImportance


def main() -> None:
    torch.manual_seed(0)
    model = resnet18(weights=None).eval()
    batches = [torch.randn(8, 3, 64, 64) for _ in range(2)]  # your data
    example = batches[0][:1]
    macs, params = idap.count_macs(model, example), idap.count_params(model)

    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=ChannelImportance(model, batches),
        global_pruning=True,
        pruning_ratio=0.5,
        max_pruning_ratio=0.8,
        iterative_steps=2,
        ignored_layers=[model.fc],
        round_to=8,
    )
    print(f"before: {macs / 1e6:7.1f} M MACs, {params / 1e6:5.2f} M parameters")
    for step in (1, 2):
        start = time.perf_counter()
        pruner.step()  # profiles the model as it now is, then removes its least channels
        seconds = time.perf_counter() - start
        macs, params = idap.count_macs(model, example), idap.count_params(model)
        print(f"step {step}: {macs / 1e6:7.1f} M MACs, {params / 1e6:5.2f} M parameters ({seconds:.2f} s)")
    print("output:", tuple(model(example).shape))


if __name__ == "__main__":
    main()
