"""A scorer of your own on the three functions of idap_kernels, without anything else of this package.

Hooks read each feature map once, as it is made; what stays is a small buffer a layer. Random weights and data.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock

from idap_kernels import ChannelStats, channel_stats, filter_norms, pair_stats


def main() -> None:
    torch.manual_seed(0)
    model = resnet18(weights=None).eval()
    stats: dict[str, ChannelStats] = {}
    change: dict[str, list[Tensor]] = {}

    def watch_filters(name: str, layer: nn.Conv2d) -> None:
        def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            stats[name] = channel_stats(y, out=stats.get(name))  # (B, C, H, W): adds to what came before

        layer.register_forward_hook(hook)

    def watch_block(name: str, block: nn.Module) -> None:
        def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            if y.shape == args[0].shape:
                change.setdefault(name, []).append(pair_stats(args[0], y).relative_change)  # (B,)

        block.register_forward_hook(hook)

    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    for name, layer in layers.items():
        watch_filters(name, layer)
    for name, module in model.named_modules():
        if isinstance(module, BasicBlock):
            watch_block(name, module)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 64, 64))

    norms = dict(zip(layers, filter_norms([layer.weight for layer in layers.values()])))
    print("layer                 least filter by: flow divergence   share of zeros   |W| x RMS")
    for name, seen in list(stats.items())[:6]:
        flow = seen.flow_norm * norms[name]
        print(
            f"{name:22}{int(flow.argmin()):32}{int(seen.apoz.argmax()):17}{int((norms[name] * seen.rms).argmin()):12}"
        )
    least = min(change, key=lambda name: float(torch.cat(change[name]).mean()))
    print(
        f"block that changes its input least: {least} ({float(torch.cat(change[least]).mean()):.2f} of its norm)"
    )


if __name__ == "__main__":
    main()
