"""Channel statistics, pair statistics and filter norms of feature maps, each in one read.

Four functions, the same on every backend:

- :func:`channel_stats` — everything about the channels of a feature map
- :func:`bn_act_stats` — the same, in the pass that computes batch norm and activation anyway
- :func:`pair_stats` — how far a block moves its input
- :func:`filter_norms` — the L2 norm of every filter of many layers

``available_backends()`` tells which backends work here and why the others do not.
"""

from .bn_act_stats import bn_act_stats
from .channel_stats import ChannelStats, channel_stats
from .dispatch import available_backends
from .errors import BackendUnavailable, IdapError, InvalidInputError
from .filter_norms import filter_norms
from .pair_stats import PairStats, pair_stats
from .version import __version__

__all__ = [
    "BackendUnavailable",
    "ChannelStats",
    "IdapError",
    "InvalidInputError",
    "PairStats",
    "__version__",
    "available_backends",
    "bn_act_stats",
    "channel_stats",
    "filter_norms",
    "pair_stats",
]
