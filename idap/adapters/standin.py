"""A module's class changed in place, by what an adapter puts before it."""

from __future__ import annotations

from typing import Any

from torch import nn


class StandIn(nn.Module):
    """Base of what adapters put before a module's own class; see :func:`turn_into`."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made when it is asked for, so that pickle finds it under no name.
        return _empty, type(self).__bases__, self.__dict__


_CLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def _class(before: type[nn.Module], own: type[nn.Module]) -> type[nn.Module]:
    if (before, own) not in _CLASSES:
        names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
        _CLASSES[before, own] = type(own.__name__, (before, own), names)
    return _CLASSES[before, own]


def _empty(before: type[nn.Module], own: type[nn.Module]) -> nn.Module:
    kind = _class(before, own)
    return kind.__new__(kind)


def turn_into(module: nn.Module, before: type[StandIn]) -> None:
    """Let the methods of ``before`` go before those of the module's class, in place.

    Hooks, names, weights and references to the module stay, as do the name of its class and what ``isinstance``
    says. It can be copied and pickled.
    """
    module.__class__ = _class(before, type(module))
