"""A small residual network for the digits, and its trained weights."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS_FILE = Path(__file__).with_name("digits_resnet.safetensors")


class ResidualBlock(nn.Module):
    """``relu(shortcut(x) + bn(conv(relu(bn(conv(x))))))``; a shortcut of a new shape is a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:  # (B, inputs, H, W) -> (B, outputs, H / stride, W / stride)
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.shortcut(x) + self.bn2(self.conv2(y)))


class DigitsResNet(nn.Module):
    """Residual CNN for 8x8 grey images: a stem, stages of residual blocks, the mean, and one linear layer.

    The defaults are the embedded network. Every block but the first of a later stage keeps its shape, so the
    second pruning stage may remove it.
    """

    def __init__(
        self, widths: tuple[int, ...] = (48, 64), depths: tuple[int, ...] = (3, 3), classes: int = 10
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        blocks: list[nn.Module] = []
        inputs = widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for i in range(depth):
                blocks.append(ResidualBlock(inputs, width, stride=2 if stage and i == 0 else 1))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:  # (B, 1, 8, 8) -> (B, classes)
        features: Tensor = self.blocks(self.stem(x))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


def load_network() -> DigitsResNet:
    """The embedded network with its trained weights, in eval mode."""
    model = DigitsResNet()
    model.load_state_dict(load_file(WEIGHTS_FILE))
    return model.eval()
