"""Flow divergence inside torch.nn.utils.prune: mask channels in steps, train between, then cut them out.

Random images and labels: the figures show the way, not a result.
"""

from __future__ import annotations

import torch
from torch import nn

import idap
from idap.filters import plan_channels
from idap.integrations.nn_utils_prune import masked_channels, prune_channels, remove_masks


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    model, images, labels = network(), torch.randn(64, 3, 16, 16), torch.randint(10, (64,))
    for step in range(3):
        profile = idap.profile(model, images.split(16), blocks=(), heads=(), progress=False)
        scores = idap.flow_divergence(model, profile)
        del scores["11"]  # the classes stay
        # A fifth of the channels left, in one ranking over all layers; biases and batch norms go with them.
        prune_channels(model, scores, 0.2, scope="global", example_inputs=images[:1])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model.train()(images), labels)
            loss.backward()
            optimizer.step()
        print(f"step {step}: masked {sum(map(len, masked_channels(model).values()))}, loss {loss.item():.3f}")

    # So far nothing is smaller. Now the masks become zeros, and the zeros go.
    removed = remove_masks(model.eval())
    plan = plan_channels(model, removed, images[:1])
    smaller = plan.apply(model)
    print(plan.summary())
    print(f"largest difference of the outputs: {(smaller(images) - model(images)).abs().max():.1e}")


if __name__ == "__main__":
    main()
