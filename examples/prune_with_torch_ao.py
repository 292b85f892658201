"""Flow divergence inside torch.ao.pruning: masks in three steps with a scheduler, then real removal.

Random images: the figures show the way, not a result.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.ao.pruning import LambdaSL

import idap
from idap.integrations.torch_ao import ChannelScoreSparsifier


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    model, images = network().eval(), torch.randn(32, 3, 16, 16)
    original = copy.deepcopy(model)

    def scores(current: nn.Module) -> dict[str, torch.Tensor]:
        return idap.flow_divergence(current, idap.profile(current, images.split(16), progress=False))

    sparsifier = ChannelScoreSparsifier(scores, sparsity_level=0.6)  # fresh scores at every step
    sparsifier.prepare(model)
    print("left alone:", sparsifier.skipped)
    scheduler = LambdaSL(sparsifier, lambda epoch: (epoch + 1) / 3)
    for _ in range(3):
        sparsifier.step()
        print("masked:", {name: len(gone) for name, gone in sparsifier.masked_channels().items()})
        # Train here.
        scheduler.step()

    masked = model(images)
    pruned = sparsifier.prune()
    for name, which in (("original", original), ("pruned", pruned)):
        macs = idap.count_macs(which, images[:1])
        print(f"{name}: {idap.count_params(which):,} parameters, {macs:,} MACs")
    print(
        f"largest difference of the outputs, masked and removed: {(pruned(images) - masked).abs().max():.1e}"
    )


if __name__ == "__main__":
    main()
