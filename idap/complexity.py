"""Size and arithmetic of a model: parameters and multiply-accumulates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from . import inputs as _inputs
from .adapters.detection import most_proposals
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
    attention; two operations a multiply-accumulate), in evaluation mode and without gradients. A detector that
    looks into regions counts with as many as it may propose, since how many it does depends on the image: see
    :func:`idap.adapters.detection.most_proposals`.
    """
    return macs_by_module(model, example_inputs, ())[0]


def macs_by_module(
    model: nn.Module, example_inputs: Inputs, names: Iterable[str]
) -> tuple[int, dict[str, int]]:
    """Multiply-accumulates of one forward pass, counted as :func:`count_macs` does.

    Returns:
        Those of the whole model, and those inside each of the named modules, over all of its calls.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here, since it imports Triton

    counter = FlopCounterMode(display=False)
    inside: dict[str, int] = dict.fromkeys(names, 0)
    handles: list[Any] = []

    def watch(name: str) -> None:
        def before(module: nn.Module, args: Any) -> None:
            inside[name] -= int(counter.get_total_flops())

        def after(module: nn.Module, args: Any, output: Any) -> None:
            inside[name] += int(counter.get_total_flops())

        module = model.get_submodule(name)
        handles.extend((module.register_forward_pre_hook(before), module.register_forward_hook(after)))

    try:
        for name in inside:
            watch(name)
        with (
            _no_mha_fast_path(),
            most_proposals(model),
            _inputs.evaluating(model),
            torch.no_grad(),
            counter,
        ):
            _inputs.call(model, _inputs.to_model(example_inputs, model))
    finally:
        for handle in handles:
            handle.remove()
    return int(counter.get_total_flops()) // 2, {name: flops // 2 for name, flops in inside.items()}
