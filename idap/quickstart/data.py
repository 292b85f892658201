"""The embedded digits: fixed splits as tensors, and shuffled, augmented training batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

DATA_FILE = Path(__file__).with_name("digits.safetensors")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Images ``(N, 1, H, W)`` in ``[0, 1]``, 8x8 if they are the embedded ones, and their labels ``(N,)``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, batch_size: int) -> list[Tensor]:
        """The images alone, in order, as a list of batches ``(<= batch_size, 1, H, W)``."""
        return list(self.images.split(batch_size))


def load_digits() -> dict[str, Split]:
    """Read the embedded digits; keys are ``train``, ``validation`` and ``test``."""
    tensors = load_file(DATA_FILE)
    images = tensors["images"].unsqueeze(1).float() / 16
    labels = tensors["labels"].long()
    return {
        name: Split(images[tensors["split"] == i], labels[tensors["split"] == i])
        for i, name in enumerate(SPLITS)
    }


class TrainingBatches:
    """Batches ``(images, labels)`` in a new order every pass, each image moved by up to ``pixels``.

    Draws from torch's global generator, so the seed given to :func:`idap.training.finetune` fixes both order
    and shifts. A last batch of one image is left out: batch norm cannot train on it.
    """

    def __init__(self, split: Split, batch_size: int = 64, *, augment: bool = True, pixels: int = 1) -> None:
        self.split = split
        self.batch_size = batch_size
        self.augment = augment
        self.pixels = pixels

    def __len__(self) -> int:
        full, rest = divmod(len(self.split), self.batch_size)
        return full + (rest > 1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.split))
        for chunk in order.split(self.batch_size)[: len(self)]:
            images = self.split.images[chunk]
            yield (_shift(images, self.pixels) if self.augment else images), self.split.labels[chunk]


def _shift(images: Tensor, pixels: int = 1) -> Tensor:
    """Images (B, C, H, W), each moved by ``-pixels`` to ``pixels`` along both axes, zeros moving in."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (pixels, pixels, pixels, pixels))
    rows = torch.randint(0, 2 * pixels + 1, (batch, 1)) + torch.arange(height)
    columns = torch.randint(0, 2 * pixels + 1, (batch, 1)) + torch.arange(width)
    # Index dimensions come first in the result when a slice lies between them.
    picked = padded[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()
