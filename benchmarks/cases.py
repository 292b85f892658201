"""The cases that kernels are measured on, as data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One feature map: its shape, its memory layout and its dtype."""

    shape: tuple[int, ...]
    layout: str  # contiguous | channels_last | tokens: (B, T, C)
    dtype: str

    @property
    def name(self) -> str:
        return f"{'x'.join(map(str, self.shape))}-{self.layout}-{self.dtype}"

    @property
    def channel_dim(self) -> int:
        return 2 if self.layout == "tokens" else 1

    @property
    def nbytes(self) -> int:
        size = DTYPES[self.dtype].itemsize
        for n in self.shape:
            size *= n
        return size

    def make(self, device: str = "cpu", seed: int = 0) -> Tensor:
        """A map of normal values around 0.1: about half of them positive, as before a ReLU."""
        generator = torch.Generator(device=device).manual_seed(seed)
        x = torch.empty(self.shape, dtype=torch.float32, device=device)
        x.normal_(0.1, 1.0, generator=generator)
        x = x.to(DTYPES[self.dtype])
        return x.to(memory_format=torch.channels_last) if self.layout == "channels_last" else x


_MAPS = [
    (32, 64, 112, 112),
    (32, 256, 56, 56),
    (32, 512, 28, 28),
    (32, 1024, 14, 14),
    (32, 2048, 7, 7),
    (1, 256, 56, 56),
    (1, 2048, 7, 7),
]
_TOKENS = [(32, 197, 768), (8, 512, 3072)]
_GPU_MAPS = [(256, 64, 112, 112), (64, 1024, 14, 14), (64, 2048, 7, 7)]
_GPU_TOKENS = [(16, 4096, 4096)]
# 8 MB in either dtype: the batch is that of float32, and twice it for halves.
_GPU_8MB_MAPS = [(10, 64, 56, 56), (10, 1024, 14, 14), (20, 2048, 7, 7)]
_GPU_8MB_TOKENS = [(13, 197, 768)]


def grid(device: str) -> list[Case]:
    """Every case for a device; a GPU gets larger maps, and some of 8 MB, as well."""
    cases = []
    for dtype in ("float32", "bfloat16"):
        maps: list[tuple[int, ...]] = list(_MAPS)
        tokens: list[tuple[int, ...]] = list(_TOKENS)
        if device == "cuda":
            scale = 4 // DTYPES[dtype].itemsize
            maps += [*_GPU_MAPS, *((scale * b, *rest) for b, *rest in _GPU_8MB_MAPS)]
            tokens += [*_GPU_TOKENS, *((scale * b, *rest) for b, *rest in _GPU_8MB_TOKENS)]
        for layout in ("contiguous", "channels_last"):
            cases += [Case(shape, layout, dtype) for shape in maps]
        cases += [Case(shape, "tokens", dtype) for shape in tokens]
    return cases


def copies(nbytes: int, cache: int) -> int:
    """Copies of ``nbytes`` each that, used in turns, find nothing of themselves in a cache of that size."""
    return max(1, min(1024, -(-4 * cache // nbytes)))
