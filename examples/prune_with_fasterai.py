"""fasterai's Pruner and Sparsifier choose channels by flow divergence. Random images: shapes, not accuracy."""

from __future__ import annotations

import contextlib
import io

import torch
from fasterai.prune.pruner import Pruner
from fasterai.sparse.sparsifier import Sparsifier
from torchvision.models import resnet18

import idap
from idap.integrations.fasterai import ProfileCriteria


def main() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    batches = [(images, None)]  # pairs (inputs, targets), as a DataLoader gives them

    model = resnet18(weights=None, num_classes=10)
    before = idap.count_macs(model, images[:1]), idap.count_params(model)
    criteria = ProfileCriteria()  # flow divergence; any criterion of idap.criteria goes in its place
    criteria.calibrate(model, batches)
    with contextlib.redirect_stdout(io.StringIO()):  # the library tells which layers it leaves alone
        pruner = Pruner(model, 0.4, "local", criteria, example_inputs=images[:1])
    pruner.prune_model()
    print(
        f"Pruner:     MACs       {before[0] / 1e6:.0f} M -> {idap.count_macs(model, images[:1]) / 1e6:.0f} M"
    )
    print(f"            parameters {before[1] / 1e6:.2f} M -> {idap.count_params(model) / 1e6:.2f} M")

    model = resnet18(weights=None, num_classes=10)
    sparsifier = Sparsifier(model, "filter", "local", ProfileCriteria(), data=batches)  # calibrates itself
    sparsifier.sparsify_model(0.5)
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    print(f"Sparsifier: {zeros:.1%} of the convolutions' weights masked, whole filters")


if __name__ == "__main__":
    main()
