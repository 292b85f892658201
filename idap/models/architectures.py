"""The 22 architectures of the IDAP++ paper: how each is built offline, fed, and what the paper says of it.

Every entry builds with random weights and needs no network; the libraries are imported by the builders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import inputs as _inputs
from ..inputs import Inputs

TASKS = ("classification", "detection", "segmentation", "generation", "language")


@dataclass(frozen=True)
class PaperFigures:
    """What the paper's tables say of an architecture (arXiv 2511.20141); None where they say nothing.

    Attributes:
        gmacs: multiply-accumulates of the network as it is, in 10⁹.
        pruned_gmacs: the smallest pruned network of all its data sets, in 10⁹.
        share: what that is of the network as it is on that data set.
        speedup: batch-1 float32 latency before over after, on an RTX 3060.
    """

    gmacs: float | None = None
    pruned_gmacs: float | None = None
    share: float | None = None
    speedup: float | None = None


def default_loss(model: nn.Module, inputs: Inputs) -> Tensor:
    """The mean square of all that ``model`` returns: a loss that reaches every layer, for any model."""
    outputs = [
        tensor for _, tensor in _inputs.named_tensors(_inputs.call(model, inputs)) if tensor.requires_grad
    ]
    return torch.stack([tensor.float().square().mean() for tensor in outputs]).sum()


@dataclass(frozen=True)
class Architecture:
    """One network of the paper.

    Attributes:
        name: what the command line calls it.
        title: what the paper calls it.
        task: one of :data:`TASKS`.
        builders: by library, the first one the default: functions without required arguments that give the
            network with random weights, in evaluation mode.
        inputs: function of a batch size giving random inputs of the network's own shape.
        paper: the paper's figures.
        small: a small network of the same classes, in which every kind of coupling of the large one occurs,
            and ``small_inputs`` the inputs of that; for tests.
        loss: one training step's loss, a function of (model in training mode, inputs).
        trace_inputs: smaller inputs on which channels are followed, where the full ones take long; by default
            ``inputs(1)``.
        notes: what was tried and found, a sentence each, for the list of ``idap models``.
    """

    name: str
    title: str
    task: str
    builders: Mapping[str, Callable[[], nn.Module]]
    inputs: Callable[[int], Inputs]
    paper: PaperFigures
    small: Callable[[], nn.Module]
    small_inputs: Callable[[int], Inputs]
    loss: Callable[[nn.Module, Inputs], Tensor] = default_loss
    trace_inputs: Callable[[], Inputs] | None = None
    notes: tuple[str, ...] = ()


def images(height: int, width: int | None = None, channels: int = 3) -> Callable[[int], Tensor]:
    """A function of a batch size giving normal noise (B, channels, height, width)."""
    return lambda batch: torch.randn(batch, channels, height, width or height)
