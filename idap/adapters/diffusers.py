"""Widths that diffusers' samplers keep as numbers, and compare with what comes."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd


def follow_convolution(owner: nn.Module, conv: nn.Module) -> None:
    """Write the widths of a convolution that was cut into the up- or downsampler around it, if ``owner`` is one.

    ``Upsample2D`` and ``Downsample2D`` (and their one-dimensional relatives) assert in every pass that their
    input has ``channels`` channels.
    """
    if not type(owner).__module__.startswith("diffusers.") or not isinstance(conv, _ConvNd):
        return
    own = vars(owner)
    if isinstance(own.get("channels"), int) and isinstance(own.get("out_channels"), int):
        own["channels"], own["out_channels"] = conv.in_channels, conv.out_channels
