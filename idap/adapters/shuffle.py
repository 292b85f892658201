"""Units that split their channels, concatenate and shuffle them, as those of ShuffleNetV2.

Such a unit cuts its input in two halves, passes the first on, and shuffles it with what its second branch makes of
the other; a unit with a stride shuffles two branches. Halves and shuffle are written as numbers of channels into
the forward pass. Here the channel at which the input is cut, and the channel of the concatenation that every output
is taken from, are attributes that surgery can set.

All units between two that change the resolution keep the same channels of the trunk, so that each of them can still
be left out. The shuffle sends the first half of the channels, j, to 2j; a channel 2j+1 comes from the second
branch. So the channels of the trunk go in chains 2j+1, 2(2j+1), 4(2j+1), ..., one for every channel of the second
branches: what one unit makes, moves up by one step in each unit that it passes, until it reaches the half that is
read. Channel 0 is passed on by all of them, and goes together with channel 1.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .. import inputs as _inputs
from ..errors import PlanMismatchError, SurgeryError
from .standin import StandIn, turn_into


class ShuffleUnit(StandIn):
    """What surgery makes of a unit with the children ``branch1`` and ``branch2`` and the attribute ``stride``.

    Attributes:
        split: channels of the input that are passed on as they are; the others enter ``branch2``. None for a unit
            with a stride, whose branches read all.
        order: for each output channel, the channel of the concatenation that it is.
        source: the same as a tensor. No part of the state dictionary: it follows from the plan.
    """

    split: int | None
    order: tuple[int, ...]
    source: Tensor
    branch1: nn.Module
    branch2: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, outputs, H', W')``."""
        first, second = (
            (self.branch1(x), x) if self.split is None else (x[:, : self.split], x[:, self.split :])
        )
        return torch.cat((first, self.branch2(second)), 1).index_select(1, self.source)

    def take(self, split: int | None, order: tuple[int, ...]) -> None:
        """Set where the input is cut, and which channel of the concatenation each output channel is."""
        self.split, self.order = split, order
        weight = next(self.parameters(), None)
        source = torch.tensor(order, device=None if weight is None else weight.device)
        self.register_buffer("source", source, persistent=False)


def _outputs(module: nn.Module) -> tuple[int, int] | None:
    """Output channels of both branches of what looks like such a unit; the first passes on if it is empty."""
    branches = [module._modules.get(name) for name in ("branch1", "branch2")]
    if any(branch is None for branch in branches) or not isinstance(vars(module).get("stride"), int):
        return None
    widths = [
        next((m.out_channels for m in reversed(list(branch.modules())) if isinstance(m, _ConvNd)), 0)
        for branch in branches
        if branch is not None
    ]
    return (widths[0], widths[1]) if widths[1] else None


def width(module: nn.Module) -> int | None:
    """Output channels of a unit as it is now; None if it is none."""
    if isinstance(module, ShuffleUnit):
        return len(module.order)
    outputs = _outputs(module)
    return None if outputs is None else (outputs[0] or outputs[1]) + outputs[1]


def convert(module: nn.Module) -> None:
    """Change the class of a unit, in place, into one with ``split`` and ``source``; its results stay.

    Hooks, names, weights and references to the module stay as well.
    """
    outputs = _outputs(module)
    assert outputs is not None
    half = outputs[1]
    turn_into(module, ShuffleUnit)
    assert isinstance(module, ShuffleUnit)
    module.take(
        None if outputs[0] else half, tuple(part + channel for channel in range(half) for part in (0, half))
    )


def find_units(model: nn.Module) -> list[str]:
    """Names of the modules that are such units: by their children, and because they compute the same."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, ShuffleUnit) or (_outputs(module) is not None and _computes_it(module)):
            found.append(name)
    return found


def _computes_it(module: nn.Module) -> bool:
    outputs = _outputs(module)
    first = next((layer for layer in module.modules() if isinstance(layer, _ConvNd)), None)
    if outputs is None or not isinstance(first, nn.Conv2d) or outputs[0] not in (0, outputs[1]):
        return False
    channels = first.in_channels if outputs[0] else 2 * outputs[1]
    # With other weights: zeros, as last norms often begin with, would hide what the forward pass does.
    module = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    twin = copy.deepcopy(module)
    convert(twin)
    sample = torch.linspace(-1.0, 1.0, channels * 64, dtype=first.weight.dtype, device=first.weight.device)
    sample = sample.view(1, channels, 8, 8)
    try:
        with torch.no_grad(), _inputs.evaluating(module), _inputs.evaluating(twin):
            wanted, got = module.forward(sample), twin.forward(sample)
    except Exception:
        return False
    return isinstance(wanted, Tensor) and torch.equal(wanted, got)


def convert_all(model: nn.Module, names: Iterable[str]) -> None:
    """:func:`convert` the units of these names that are not converted yet."""
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, ShuffleUnit):
            convert(module)


def remove_channels(module: nn.Module, name: str, removed: list[int]) -> None:
    """Take output channels, and for a unit without a stride the same input channels, out of a unit, in place.

    The layers of its branches are members of their own, and are cut as such.

    Raises:
        PlanMismatchError: if the module is no such unit.
        SurgeryError: if the channels that the unit passes on are not those that it gets.
    """
    if width(module) is None:
        raise PlanMismatchError(f"{name}: the plan cuts a unit that shuffles channels, this is none")
    if not isinstance(module, ShuffleUnit):
        convert(module)
    assert isinstance(module, ShuffleUnit)
    gone = set(removed)
    source, split = module.order, module.split
    kept = [channel for channel in range(len(source)) if channel not in gone]
    taken = sorted(source[channel] for channel in kept)
    if split is not None:
        passed = [channel for channel in taken if channel < split]
        if passed != [channel for channel in kept if channel < split]:
            raise SurgeryError(
                f"{name}: the channels that stay are not passed on to channels that stay; wanted whole chains "
                "through the shuffle, as idap.groups.find_groups couples them"
            )
        split = len(passed)
    place = {channel: position for position, channel in enumerate(taken)}
    module.take(split, tuple(place[source[channel]] for channel in kept))
