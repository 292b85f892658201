"""Size and arithmetic of a model: parameters and multiply-accumulates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from . import inputs as _inputs
from .inputs import Inputs


@contextmanager
def _no_mha_fast_path() -> Iterator[None]:
    # The fused attention of evaluation mode is one opaque operator, which the counter does not see.
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def count_params(model: nn.Module) -> int:
    """Number of parameters; a tensor used in several places counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example_inputs: Inputs) -> int:
    """Multiply-accumulates of one forward pass over ``example_inputs``, the whole batch.

    Counted by :class:`torch.utils.flop_counter.FlopCounterMode` (matrix products, convolutions and
    attention; two operations a multiply-accumulate), in evaluation mode and without gradients.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here, since it imports Triton

    counter = FlopCounterMode(display=False)
    with _no_mha_fast_path(), _inputs.evaluating(model), torch.no_grad(), counter:
        _inputs.call(model, _inputs.to_model(example_inputs, model))
    return int(counter.get_total_flops()) // 2
