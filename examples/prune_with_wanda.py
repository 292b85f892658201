"""Wanda with the input norms of one pass: unstructured and 2:4 masks. Random weights and data."""

from __future__ import annotations

import copy

import torch
from torch import nn

from idap.integrations import wanda


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
    model = nn.Sequential(nn.Linear(32, 64), nn.TransformerEncoder(layer, 2), nn.Linear(64, 10)).eval()
    loud = torch.where(torch.arange(32) % 4 == 0, 5.0, 0.5)  # a few input channels carry most of the signal
    batches = [torch.randn(8, 20, 32) * loud for _ in range(4)]
    reference = model(batches[0])

    energy = wanda.input_energy(model, batches)  # sum of x² per input channel, every layer, one pass
    print(f"{len(energy)} layers; energy of the first inputs: {[round(e) for e in energy['0'][:4].tolist()]}")
    equal = {name: torch.ones_like(values) for name, values in energy.items()}  # |W| alone: plain magnitude
    for title, options in (("50 %", {"sparsity": 0.5}), ("2:4", {"pattern": (2, 4)})):
        for ranking, norms in (("wanda", energy), ("magnitude", equal)):
            pruned = copy.deepcopy(model)
            wanda.apply_masks(pruned, wanda.masks(pruned, norms, **options))
            drift = (pruned(batches[0]) - reference).norm() / reference.norm()
            zeros = sum(int((pruned.get_submodule(n).weight == 0).sum()) for n in energy)
            total = sum(pruned.get_submodule(n).weight.numel() for n in energy)
            print(f"{title:>5} {ranking:<10} zeros {zeros / total:.1%}, output changed by {float(drift):.1%}")


if __name__ == "__main__":
    main()
