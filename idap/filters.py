"""Stage 1: which channels to remove, decided on scores alone; the model is only read."""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.prune import is_pruned

from . import complexity
from . import inputs as _inputs
from . import plan as _plan
from .adapters import detection as _detection
from .adapters.attention import count_heads
from .adapters.multihead import projections_called
from .criteria import in_width, out_width
from .errors import (
    IdapError,
    InvalidInputError,
    NonFiniteError,
    PlanMismatchError,
    SurgeryError,
    TargetUnreachableError,
)
from .groups import (
    ONE_UNIT,
    Group,
    GroupScan,
    Ignore,
    Member,
    Skipped,
    find_groups,
    is_head_group,
    side_size,
)
from .inputs import Inputs
from .plan import ChannelRemoval, Cost, PruningPlan
from .profile import is_scored

Floats = NDArray[np.float64]
_HEADS = ("heads", "mha")
_SCORED = ("conv_out", "depthwise", "linear_out", "embedding", *_HEADS)
REDUCTIONS: dict[str, Callable[..., Any]] = {"mean": np.mean, "sum": np.sum, "max": np.max}


# ------------------------------------------------------------------------------------------------
# Scores
# ------------------------------------------------------------------------------------------------


def check_scores(model: nn.Module, scores: Mapping[str, Tensor]) -> dict[str, Floats]:
    """Scores as float64 arrays, one number an output channel of each layer, or a head of each attention.

    Raises:
        InvalidInputError: if the scores are no mapping, a name is no layer of the model, or a score is no
            tensor of numbers or has the wrong length.
        NonFiniteError: if a score is NaN or infinite; names the layer and the channel.
    """
    if not isinstance(scores, Mapping):
        raise InvalidInputError(
            f"scores: got {type(scores).__name__}, wanted a mapping from layer names to tensors (output "
            "channels,); pass flow_divergence(model, profile), or another criterion of idap.criteria"
        )
    checked: dict[str, Floats] = {}
    modules = dict(model.named_modules())
    for name, score in scores.items():
        module = modules.get(name)
        if module is None:
            raise InvalidInputError(f"scores: {name!r} is no layer of {type(model).__name__}")
        try:
            values = torch.as_tensor(score).detach().to("cpu", torch.float64).numpy()
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidInputError(
                f"scores[{name!r}]: got {type(score).__name__}, wanted a tensor with a number a channel"
            ) from error
        width = getattr(module, "embedding_dim", count_heads(module))
        width = out_width(module) if is_scored(module) else width
        if values.ndim != 1 or (isinstance(width, int) and len(values) != width):
            raise InvalidInputError(
                f"scores[{name!r}]: got shape {tuple(values.shape)}, wanted ({width},), a number a channel"
            )
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise NonFiniteError(
                f"scores[{name!r}]: channel {int(bad[0])} has the score {values[bad[0]]}, wanted numbers; "
                "profile on data without NaN, or leave the layer out"
            )
        checked[name] = values
    return checked


def group_scores(group: Group, scores: Mapping[str, Floats], reduction: str = "mean") -> Floats | None:
    """One score a unit, shape (group.size,): reduced over the unit's channels in a member, then over members.

    Members without scores do not contribute. None if no member has scores; NaN for a unit that none of the
    scored members has channels of. Where the units are attention heads and the attention module has scores,
    these alone count, and not those of the channels that make queries, keys and values.
    """
    reduce_ = REDUCTIONS[reduction]
    rows: list[Floats] = []
    scored = [member for member in group.members if member.kind in _SCORED and member.layer in scores]
    heads = [member for member in scored if member.kind in _HEADS]
    for member in heads or scored:
        values = scores[member.layer]
        if len(values) != member.size:
            raise InvalidInputError(
                f"scores[{member.layer!r}]: got {len(values)} numbers, wanted {member.size}"
            )
        widths = {len(unit) for unit in member.units}
        if len(widths) == 1 and 0 not in widths:
            rows.append(reduce_(values[np.array(member.units)], axis=1))
        else:
            each = [reduce_(values[list(unit)]) if unit else np.nan for unit in member.units]
            rows.append(np.array(each, dtype=np.float64))
    if not rows:
        return None
    table = np.stack(rows)
    if not np.isnan(table).any():
        return np.asarray(reduce_(table, axis=0), dtype=np.float64)
    result = np.full(group.size, np.nan)
    for unit in range(group.size):
        present = table[:, unit][~np.isnan(table[:, unit])]
        if len(present):
            result[unit] = reduce_(present)
    return result


# ------------------------------------------------------------------------------------------------
# Ranking
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranking:
    """Units in the order of their removal.

    Attributes:
        groups: (n,) number of the group of each unit.
        units: (n,) number of the unit within its group.
    """

    groups: NDArray[np.int64]
    units: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.groups)


def rank_units(
    scores: Sequence[Floats],
    capacity: Sequence[int],
    *,
    scope: str = "global",
    normalize: str | None = "mean",
    orders: Sequence[NDArray[np.int64]] | None = None,
    times: Sequence[float] | None = None,
) -> Ranking:
    """Order all units that may go, lowest score first.

    Ties: the group that comes first in the model goes first, and within a group the lower unit.

    Args:
        scores: one array a group.
        capacity: the most units that each group may lose; its highest-scored units never appear.
        scope: ``"global"`` ranks by score; ``"local"`` by the share of its group that a unit's removal
            completes, so that every prefix takes about the same share of every group.
        normalize: for ``"global"``: ``"mean"`` divides by the mean absolute score of the group, None does
            nothing.
        orders: for each group its units in ascending order of score; those that are not in it never go. All
            units if not given.
        times: for each group what one unit takes, by which ``"global"`` divides its scores.
    """
    if orders is None:
        orders = [np.argsort(values, kind="stable") for values in scores]
    keys: list[Floats] = []
    group_of: list[NDArray[np.int64]] = []
    unit_of: list[NDArray[np.int64]] = []
    for number, (values, most, order) in enumerate(zip(scores, capacity, orders, strict=True)):
        if scope == "local":
            key = (np.arange(len(order)) + 0.5) / max(len(values), 1)
        else:
            scale = float(np.mean(np.abs(values))) if normalize == "mean" and len(values) else 1.0
            key = values[order] / scale if scale > 0 else values[order]
            if times is not None:
                key = key / times[number]
        keys.append(key[:most])
        group_of.append(np.full(min(most, len(order)), number, dtype=np.int64))
        unit_of.append(order[:most].astype(np.int64))
    empty = np.empty(0, dtype=np.int64)
    groups = np.concatenate(group_of) if group_of else empty
    units = np.concatenate(unit_of) if unit_of else empty
    # Stable: within a group the order of removal stays, also among equal keys.
    ranks = np.argsort(np.concatenate(keys), kind="stable") if keys else empty
    return Ranking(groups[ranks], units[ranks])


def removal_order(group: Group, scores: Floats, max_ratio: float, min_width: int = 1) -> NDArray[np.int64]:
    """The units that may go one after another, lowest score first.

    After a channel shuffle or a split, a layer holds channels of some units only. A unit that would leave such
    a layer with less than ``min_width`` channels, or less than the share ``1 - max_ratio`` of those it has in
    the group, is passed over, and the next one considered.

    Args:
        scores: (group.size,), as :func:`group_scores` gives them.

    Returns:
        At most ``group.size`` numbers of units; every prefix leaves every layer with channels.
    """
    order: NDArray[np.int64] = np.argsort(scores, kind="stable")
    held = np.array([[len(unit) for unit in member.units] for member in group.members], dtype=np.int64)
    # Those that hold a channel of every unit, all alike, are bounded by the number of units alone.
    held = held[(held != held[:, :1]).any(axis=1)]
    if not len(held):
        return order
    total = held.sum(axis=1)
    least = np.maximum(np.minimum(min_width, total), np.ceil(total * (1.0 - max_ratio) - 1e-9))
    spare = total - least.astype(np.int64)
    going: list[int] = []
    for unit in order.tolist():
        if (held[:, unit] <= spare).all():
            spare -= held[:, unit]
            going.append(unit)
    return np.array(going, dtype=np.int64)


def allowed_removals(size: int, step: int, most: float, least: int = 1) -> NDArray[np.int64]:
    """How many of ``size`` units may go, ascending from 0, so that a positive multiple of ``step`` is left.

    A size that is no multiple itself may stay as it is, or fall to a multiple below it. At least ``least``
    units stay, and at least the share ``1 - most``.
    """
    least = max(step, math.ceil(size * (1.0 - most) - 1e-9), least, 1)
    widths = [width for width in range(step, size, step) if width >= least]
    return np.array([0, *sorted(size - width for width in widths)], dtype=np.int64)


def _nearest(allowed: NDArray[np.int64], wanted: int) -> int:
    """The allowed number nearest to ``wanted``; the smaller of two as near."""
    position = int(np.searchsorted(allowed, wanted))
    if position == 0:
        return int(allowed[0])
    if position == len(allowed):
        return int(allowed[-1])
    low, high = int(allowed[position - 1]), int(allowed[position])
    return low if wanted - low <= high - wanted else high


def unit_times(groups: Sequence[Group], times: Mapping[str, float]) -> list[float]:
    """Milliseconds that a unit of each group takes: of every layer the share of its channels that the unit has.

    A layer that loses inputs and outputs counts on both sides. Groups without a time get the least of the
    others, so that nothing is divided by zero; all get 1 if none has a time.

    Args:
        times: by layer name, as :func:`idap.layer_times` measures them.
    """
    each = []
    for group in groups:
        parts = (
            times.get(member.layer, 0.0) * sum(map(len, member.units)) / member.size
            for member in group.members
        )
        each.append(sum(parts) / group.size)
    least = min((own for own in each if own > 0), default=1.0)
    return [own if own > 0 else least for own in each]


def _check_times(model: nn.Module, times: Mapping[str, float] | None, scope: str) -> None:
    if times is None:
        return
    if scope != "global":
        raise InvalidInputError(f"times: only a global ranking goes by them, got scope={scope!r}")
    if not isinstance(times, Mapping):
        raise InvalidInputError(
            f"times: got {type(times).__name__}, wanted a mapping from layer names to milliseconds, as "
            "layer_times(model, example_inputs) gives it"
        )
    modules = dict(model.named_modules())
    for name, value in times.items():
        if name not in modules:
            raise InvalidInputError(f"times: {name!r} is no module of {type(model).__name__}")
        if not (_is_number(value) and 0 <= value < math.inf):
            raise InvalidInputError(f"times[{name!r}]: got {value!r}, wanted milliseconds, 0 or more")


# ------------------------------------------------------------------------------------------------
# Cost of a selection, without carrying it out
# ------------------------------------------------------------------------------------------------


class CostModel:
    """Parameters and multiply-accumulates as functions of how many units each group loses.

    Convolutions and linear layers cost (positions) x (inputs per part) x (outputs) x (kernel); the products of
    queries, keys and values cost in proportion to the heads; what else a model does stays as it is.

    Args:
        groups: with their units in the order of ``orders``.
        measured: of the same model, for more groups: what it measured is not measured again.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        groups: Sequence[Group],
        orders: Sequence[Any],
        measured: CostModel | None = None,
    ):
        self._modules = dict(model.named_modules())
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._cumulated: list[list[tuple[tuple[str, str, int], NDArray[np.int64]]]] = []
        self._size: dict[tuple[str, str, int], int] = {}
        for group, order in zip(groups, orders, strict=True):
            sides = []
            for member in group.members:
                counts = np.array([len(member.units[unit]) for unit in order], dtype=np.int64)
                key = (member.layer, member.kind, member.dim)
                self._size[key] = member.size
                sides.append((key, np.concatenate(([0], np.cumsum(counts)))))
            self._cumulated.append(sides)
        layers = {key[0] for key in self._size}
        self._repeated = self._tied_to_others(layers)
        self._kinds: dict[str, list[tuple[str, str, int]]] = {layer: [] for layer in layers}
        for key in self._size:
            self._kinds[key[0]].append(key)
        self._positions: dict[str, int] = {}
        self._products_of_heads: dict[str, int] = {}
        if measured is None:
            self.base = Cost(complexity.count_params(model), self._measure(model, example_inputs, layers))
        else:
            self.base = measured.base
            self._positions, self._products_of_heads = measured._positions, measured._products_of_heads
        full = dict(self._size)
        self._fixed_params = self.base.params - sum(self._layer_params(layer, full) for layer in layers)
        assert self.base.macs is not None
        self._fixed_macs = self.base.macs - sum(self._layer_macs(layer, full) for layer in layers)

    def _tied_to_others(self, layers: Iterable[str]) -> set[str]:
        """The layers whose weights are those of another one of ``layers``, which counts them."""
        weights = {
            layer: self._parameters.get(f"{layer}.weight", self._parameters.get(layer))
            for layer in sorted(layers)
        }
        owners = {id(weight): layer for layer, weight in weights.items()}
        return {layer for layer, own in weights.items() if own is not None and owners[id(own)] != layer}

    def _measure(self, model: nn.Module, example_inputs: Inputs, layers: set[str]) -> int:
        """Multiply-accumulates of the model; on the way the positions of its layers and the products of heads."""
        names = {module: name for name, module in self._modules.items()}
        attention = {key[0] for key in self._size if key[1] in _HEADS}
        inner = {
            owner: [
                name
                for name, module in self._modules.items()
                if is_scored(module) and (not owner or name.startswith(owner + "."))
            ]
            for owner in attention
        }

        def count(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            result = _inputs.first_tensor(output)
            entering = _inputs.first_tensor(args)
            if result is None or entering is None:
                return
            if isinstance(module, _ConvNd):
                own = entering.numel() // module.in_channels if module.transposed else 0
                own = own or result.numel() // module.out_channels
            else:
                own = result.numel() // out_width(module)
            self._positions[names[module]] = self._positions.get(names[module], 0) + own

        handles = [
            self._modules[layer].register_forward_hook(count)
            for layer in layers
            if layer in self._modules and is_scored(self._modules[layer])
        ]
        try:
            watched = {name for own in inner.values() for name in own} | attention
            total, inside = complexity.macs_by_module(model, example_inputs, watched)
        finally:
            for handle in handles:
                handle.remove()
        for owner, own in inner.items():
            self._products_of_heads[owner] = inside[owner] - sum(inside[name] for name in own)
        return total

    def _width(self, layer: str, side: str, left: Mapping[tuple[str, str, int], int]) -> int:
        module = self._modules[layer]
        both = left.get((layer, "depthwise", 0))
        if both is not None:
            return both
        kind = ("conv_" if isinstance(module, _ConvNd) else "linear_") + side
        return left.get((layer, kind, 0), in_width(module) if side == "in" else out_width(module))

    def _products(self, layer: str, left: Mapping[tuple[str, str, int], int]) -> tuple[int, int]:
        """Weights of a layer without its bias, and its outputs."""
        module = self._modules[layer]
        outs, ins = self._width(layer, "out", left), self._width(layer, "in", left)
        if isinstance(module, _ConvNd):
            groups = outs if (layer, "depthwise", 0) in left else module.groups
            return outs * (ins // groups) * math.prod(module.kernel_size), outs
        return outs * ins, outs

    def _layer_params(self, layer: str, left: Mapping[tuple[str, str, int], int]) -> int:
        module = self._modules.get(layer)
        if module is not None and is_scored(module):
            weights, outs = self._products(layer, left)
            weights = 0 if layer in self._repeated else weights
            return weights + (outs if module.bias is not None else 0)
        if module is None:
            shape = list(self._parameters[layer].shape)
            for _, _, dim in self._kinds[layer]:
                shape[dim] = left[(layer, "parameter", dim)]
            return 0 if layer in self._repeated else math.prod(shape)
        total = 0
        for key in () if layer in self._repeated else self._kinds[layer]:
            # The layers of an attention are counted by themselves; nn.MultiheadAttention has its projections.
            if key[1] != "heads":
                own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
                total += own // self._size[key] * left[key]
        return total

    def _layer_macs(self, layer: str, left: Mapping[tuple[str, str, int], int]) -> int:
        if layer in self._products_of_heads:
            heads = next(key for key in self._kinds[layer] if key[1] in _HEADS)
            return self._products_of_heads[layer] // self._size[heads] * left[heads]
        return self._positions[layer] * self._products(layer, left)[0] if layer in self._positions else 0

    def __call__(self, removed: Sequence[int]) -> Cost:
        """The cost when group i loses the first ``removed[i]`` units of its own order."""
        left = dict(self._size)
        for count, sides in zip(removed, self._cumulated, strict=True):
            for key, cumulated in sides if count else ():
                left[key] -= int(cumulated[count])
        params = self._fixed_params + sum(self._layer_params(layer, left) for layer in self._kinds)
        macs = self._fixed_macs + sum(self._layer_macs(layer, left) for layer in self._kinds)
        return Cost(params, macs)


# ------------------------------------------------------------------------------------------------
# The decision
# ------------------------------------------------------------------------------------------------


def _unit_step(group: Group, round_to: int) -> int:
    """Units that make a multiple of ``round_to`` channels in every member; a head is a unit whatever its width."""
    if is_head_group(group):
        return 1
    per_unit = 0
    for member in group.members:
        for unit in member.units:
            per_unit = math.gcd(per_unit, len(unit))
    return round_to // math.gcd(round_to, per_unit or 1)


def _least_units(group: Group, min_width: int) -> int:
    """Units that leave every layer with ``min_width`` channels, where all units have as many channels in it."""
    least = 1
    for member in group.members:
        widths = {len(unit) for unit in member.units}
        if member.kind not in _HEADS and len(widths) == 1 and 0 not in widths:
            least = max(least, -(-min_width // widths.pop()))
    return least


def prune_filters(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    example_inputs: Inputs,
    *,
    ratio: float | None = None,
    macs: float | int | None = None,
    params: float | int | None = None,
    round_to: int = 8,
    ignore: Ignore = (),
    scope: str = "global",
    normalize: str | None = "mean",
    reduction: str = "mean",
    max_ratio: float = 0.9,
    min_width: int = 1,
    exact: bool = True,
    verify: bool = True,
    groups: GroupScan | None = None,
    times: Mapping[str, float] | None = None,
    time_limit: float = 60.0,
) -> PruningPlan:
    """Choose the channels to remove and return them as a plan; ``model`` is not changed.

    Exactly one of ``ratio``, ``macs`` and ``params`` is given. Ties in the ranking: the group whose first
    layer runs first, then the lower index. For ``macs`` and ``params`` the plan removes the shortest prefix
    of the ranking that meets the target.

    Args:
        scores: per layer name, shape (output channels,), and per attention module (heads,); high means
            important. Layers without scores do not contribute; groups in which no layer has scores are left
            alone. Heads without scores of their own are scored by the channels of their queries, keys and values.
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
        ratio: share of the units of all prunable groups to remove, in [0, 1); exactly ``round(ratio *
            units)`` with ``round_to=1``, else the nearest number that the widths allow.
        macs: multiply-accumulates to reach: a share of the present ones (float up to 1.0) or a count.
        params: parameters to reach, likewise.
        round_to: what is left of each group is a multiple of this many channels, and at least that many. A
            group whose width is no multiple keeps it or falls to a multiple; one that cannot shrink is
            skipped. A layer that reads only part of a group (after a channel shuffle or a split) keeps at
            least one channel, but not always a multiple. Attention heads go one by one, whatever their width.
        ignore: layers whose output channels stay: names or patterns, module classes, modules.
        scope: ``"global"``: one ranking over all groups. ``"local"``: about the same share of every group.
        normalize: for the global ranking: ``"mean"`` divides the scores of a group by their mean, since
            divergences of different layers come in different units (they carry 1/(channels x positions)), and
            raw numbers would empty whole layers first; None compares them as they are.
        reduction: over the channels of a unit and over the members of a group: ``"mean"``, ``"sum"``,
            ``"max"``.
        max_ratio: the largest share of any one group to remove, also of the part of it that a layer reads.
        min_width: channels that every layer keeps at least of a group (all it has, if it has fewer).
        exact: leave groups alone whose removal is not exact; see :func:`idap.groups.find_groups`.
        verify: compare the pruned model with the original whose removed contributions are set to zero, and leave
            out groups that fail. With ``exact=False``, LayerNorms and GroupNorms of that original norm over the
            channels that are kept; if a softmax or an average spans the channels of a chosen group, or without
            ``verify``, only the form of the outputs is checked.
        groups: what :func:`idap.groups.find_groups` gave for this model, so that it is not done again;
            ``ignore`` and ``time_limit`` then play no part, and the scan tells which groups are exact.
        times: milliseconds that each layer takes, by name, as :func:`idap.layer_times` measures them. The global
            ranking then goes by score per millisecond that a unit takes in all its layers, so that what is slow
            and carries little goes first.
        time_limit: seconds for finding the groups.

    Raises:
        InvalidInputError: for arguments out of range, unknown layer names, scores of the wrong length, scores
            for none of the layers that can be pruned, groups of another model.
        NonFiniteError: for NaN or infinite scores; names the layer.
        TargetUnreachableError: if the target cannot be met; says how far the removal could go.
        GraphTimeoutError, GraphError: if the groups cannot be found.
        SurgeryError: if so many groups fail the check that the check makes no sense for this model.
    """
    given = [
        name for name, value in (("ratio", ratio), ("macs", macs), ("params", params)) if value is not None
    ]
    if len(given) != 1:
        raise InvalidInputError(f"got {given or 'no target'}, wanted exactly one of ratio, macs and params")
    if ratio is not None and not (_is_number(ratio) and 0.0 <= ratio < 1.0):
        raise InvalidInputError(f"ratio: got {ratio!r}, wanted a share in [0, 1), a plain number")
    if not isinstance(round_to, int) or isinstance(round_to, bool) or round_to < 1:
        raise InvalidInputError(
            f"round_to: got {round_to!r}, wanted a positive whole number (1: no rounding)"
        )
    if not (_is_number(max_ratio) and 0.0 < max_ratio <= 1.0):
        raise InvalidInputError(f"max_ratio: got {max_ratio!r}, wanted a share in (0, 1], a plain number")
    if not isinstance(min_width, int) or isinstance(min_width, bool) or min_width < 1:
        raise InvalidInputError(f"min_width: got {min_width!r}, wanted a positive whole number of channels")
    for name, target in (("macs", macs), ("params", params)):
        if target is not None:
            _plan.target_count(name, target, 1)
    for name, value, known in (
        ("scope", scope, ("global", "local")),
        ("normalize", normalize, ("mean", None)),
        ("reduction", reduction, tuple(REDUCTIONS)),
    ):
        if value not in known:
            raise InvalidInputError(f"{name}: got {value!r}, wanted one of {known}")
    checked = check_scores(model, scores)
    _check_times(model, times, scope)
    if groups is None:
        scan = find_groups(model, example_inputs, ignore=ignore, exact=exact, time_limit=time_limit)
    else:
        scan = _checked_scan(model, groups)
    skipped = list(scan.skipped)
    chosen_from: list[Group] = []
    values: list[Floats] = []
    orders: list[NDArray[np.int64]] = []
    allowed: list[NDArray[np.int64]] = []
    _check_coverage(model, scan.groups, checked)
    for group in scan.groups:
        own = group_scores(group, checked, reduction)
        if own is None:
            skipped.append(Skipped(group.root, group.size, "no scores for any of its layers"))
            continue
        if np.isnan(own).any():
            skipped.append(Skipped(group.root, group.size, "no scores for some of its channels"))
            continue
        order = removal_order(group, own, max_ratio, min_width)
        removals = allowed_removals(
            group.size, _unit_step(group, round_to), max_ratio, _least_units(group, min_width)
        )
        removals = removals[removals <= len(order)]
        if len(removals) == 1:
            limits = f"round_to={round_to}, max_ratio={max_ratio:g} and min_width={min_width}"
            skipped.append(Skipped(group.root, group.size, f"{_CANNOT_SHRINK} with {limits}"))
        else:
            chosen_from.append(group)
            values.append(own)
            orders.append(order)
            allowed.append(removals)
    cost: CostModel | None = None
    while True:
        cost = CostModel(model, example_inputs, chosen_from, orders, cost)
        fixed = [own for own in skipped if own.reason.startswith((_CANNOT_SHRINK, ONE_UNIT))]
        each = None if times is None else unit_times(chosen_from, times)
        chosen = _decide(
            chosen_from, values, orders, allowed, cost, ratio, macs, params, scope, normalize, fixed, each
        )
        plan = PruningPlan(type(model).__name__, (), cost.base, cost.base, tuple(skipped))
        if not chosen:
            return plan
        plan, failures = _checked(model, plan, chosen, example_inputs, verify)
        if not failures:
            return plan
        for group, reason in failures:
            number = next(i for i, other in enumerate(chosen_from) if other is group)
            del chosen_from[number], values[number], orders[number], allowed[number]
            skipped.append(Skipped(group.root, group.size, reason))


def plan_channels(
    model: nn.Module,
    removed: Mapping[str, Sequence[int]],
    example_inputs: Inputs,
    *,
    exact: bool = True,
    verify: bool = True,
) -> PruningPlan:
    """The plan that cuts out the channels in ``removed``, and no others; ``model`` is not changed.

    Coupled channels go if every layer that makes them has them in ``removed``; depthwise convolutions and norms
    follow the layer before them. What stays, and why, is in ``plan.skipped``. The pruned model computes what
    ``model`` computes with the removed channels' contributions at zero: all that they carry when a layer reads
    them, also constants that a bias, a norm or an added parameter gave them on the way.

    Args:
        model: without masks of ``torch.nn.utils.prune``, which ``prune.remove`` makes permanent.
        removed: per layer name, channel numbers, such as
            :func:`idap.integrations.nn_utils_prune.masked_channels` gives.
        example_inputs: as for :func:`idap.prune_filters`, and so are ``exact`` and ``verify``.

    Raises:
        InvalidInputError: unknown layers or channels, or a model that still has masks.
        GraphError: the channels of the model cannot be followed.
    """
    modules = dict(model.named_modules())
    if is_pruned(model):
        raise InvalidInputError(
            "model still has masks of torch.nn.utils.prune: remove them first (prune.remove)"
        )
    if not isinstance(removed, Mapping):
        raise InvalidInputError(
            f"removed: got {type(removed).__name__}, wanted a mapping from layer names to channel numbers"
        )
    gone: dict[str, set[int]] = {}
    for name, given in removed.items():
        module = modules.get(name)
        if module is None or not is_scored(module):
            what = "not there" if module is None else f"a {type(module).__name__}"
            raise InvalidInputError(f"removed: {name!r} is {what}; wanted convolutions and linear layers")
        try:
            channels = torch.as_tensor(given).flatten().tolist()
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidInputError(
                f"removed[{name!r}]: got {type(given).__name__}, wanted channel numbers"
            ) from error
        width = out_width(module)
        bad = [c for c in channels if isinstance(c, bool) or not isinstance(c, int) or not 0 <= c < width]
        if bad:
            raise InvalidInputError(
                f"removed[{name!r}]: got {bad[0]!r}, wanted channels from 0 to {width - 1}"
            )
        gone[name] = {int(channel) for channel in channels}
    scan = find_groups(model, example_inputs, exact=exact)
    chosen: list[tuple[Group, list[int]]] = []
    skipped = list(scan.skipped)
    for group in scan.groups:
        makers = [m for m in group.members if m.kind in ("conv_out", "linear_out", "embedding")]
        units = [
            unit
            for unit in range(group.size)
            if makers and all(gone.get(m.layer, set()).issuperset(m.units[unit]) for m in makers)
        ]
        kept = np.ones(group.size)
        kept[units] = 0.0
        # Without those that would leave a layer that reads only part of the group with nothing.
        order = removal_order(group, kept, 1.0)[: group.size - 1].tolist()
        going = [unit for unit in order if not kept[unit]]
        asked = {
            unit
            for m in makers
            for unit, own in enumerate(m.units)
            if not gone.get(m.layer, set()).isdisjoint(own)
        }
        if going:
            chosen.append((group, going))
        if stays := len(asked) - len(going):
            reason = (
                f"{stays} of {len(asked)} stay: layers coupled with it keep them, or nothing would be left"
            )
            skipped.append(Skipped(group.root, group.size, reason))
    before = _plan.measure(model, example_inputs)
    while True:
        plan = PruningPlan(type(model).__name__, (), before, before, tuple(skipped))
        if not chosen:
            return plan
        plan, failures = _checked(model, plan, chosen, example_inputs, verify)
        if not failures:
            return plan
        skipped += [Skipped(group.root, group.size, reason) for group, reason in failures]
        chosen = [own for own in chosen if all(own[0] is not group for group, _ in failures)]


def _checked(
    model: nn.Module,
    plan: PruningPlan,
    chosen: _Chosen,
    example_inputs: Inputs,
    verify: bool,
) -> tuple[PruningPlan, list[tuple[Group, str]]]:
    """The plan with the chosen units as its step and what comes out of it; or the groups that fail, and why."""
    exact = verify and all(group.provable for group, _ in chosen)
    plan = replace(plan, steps=(_plan.channel_step(chosen),))
    after = _proved(model, plan, example_inputs, exact)
    if after is not None:
        return replace(plan, after=after), []
    pruned, failures = _examine(model, plan, chosen, example_inputs, exact)
    if failures:
        return plan, failures
    assert pruned is not None
    return replace(plan, after=_plan.measure(pruned, example_inputs)), []


def _checked_scan(model: nn.Module, scan: GroupScan) -> GroupScan:
    if not isinstance(scan, GroupScan):
        raise InvalidInputError(
            f"groups: got {type(scan).__name__}, wanted what idap.groups.find_groups gives for this model"
        )
    for group in scan.groups:
        for member in group.members:
            try:
                size = side_size(model, member.layer, member.kind, member.dim)
            except PlanMismatchError as error:
                raise InvalidInputError(f"groups: found on another model: {error}") from error
            if size != member.size:
                raise InvalidInputError(
                    f"groups: found on another model: {member.layer} has {size} channels ({member.kind}), "
                    f"in the scan {member.size}; call find_groups on this one"
                )
    return scan


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_coverage(model: nn.Module, groups: Sequence[Group], scores: Mapping[str, Floats]) -> None:
    wanted = [m.layer for group in groups for m in group.members if m.kind in _SCORED]
    if wanted and not any(layer in scores for layer in wanted):
        raise InvalidInputError(
            f"scores: got {', '.join(map(repr, list(scores)[:3])) or 'none'}, which is no layer of "
            f"{type(model).__name__} that can be pruned; wanted scores of layers such as "
            f"{', '.join(map(repr, wanted[:3]))}, as flow_divergence(model, profile) gives them"
        )


_CANNOT_SHRINK = "cannot shrink"
_NAMED = 4


def _at_minimum(groups: Sequence[Group], capacity: Sequence[int], fixed: Sequence[Skipped]) -> str:
    """The groups when each has lost what it may, and those that may lose nothing: the first few, and how many."""
    named = [f"{own.root} ({own.size})" for own in fixed]
    named += [
        f"{group.root} ({group.size - most} of {group.size})"
        for group, most in zip(groups, capacity, strict=True)
    ]
    if not named:
        return "No group of its channels can be pruned; idap.groups.find_groups tells why"
    more = f", and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    count = f"{len(named)} groups are" if len(named) > 1 else "One group is"
    return f"{count} at the minimum then (units left): {', '.join(named[:_NAMED])}{more}"


def _decide(
    groups: Sequence[Group],
    values: Sequence[Floats],
    orders: Sequence[NDArray[np.int64]],
    allowed: Sequence[NDArray[np.int64]],
    cost: CostModel,
    ratio: float | None,
    macs: float | int | None,
    params: float | int | None,
    scope: str,
    normalize: str | None,
    fixed: Sequence[Skipped] = (),
    times: Sequence[float] | None = None,
) -> list[tuple[Group, list[int]]]:
    capacity = [int(own[-1]) for own in allowed]
    ranking = rank_units(values, capacity, scope=scope, normalize=normalize, orders=orders, times=times)

    def removed(length: int) -> list[int]:
        counts = np.bincount(ranking.groups[:length], minlength=len(groups))
        return [_nearest(own, int(count)) for own, count in zip(allowed, counts, strict=True)]

    lengths = range(len(ranking) + 1)
    if ratio is not None:
        total = sum(group.size for group in groups)
        wanted = round(ratio * total)
        most = sum(removed(len(ranking)))
        if wanted > most:
            raise TargetUnreachableError(
                f"ratio={ratio:g} asks for {wanted} of {total} units, at most {most} can go "
                f"({len(groups)} groups); lower round_to or raise max_ratio. {_at_minimum(groups, capacity, fixed)}"
            )
        length = bisect_left(lengths, wanted, key=lambda n: sum(removed(n)))
        if length and wanted - sum(removed(length - 1)) <= sum(removed(length)) - wanted:
            length -= 1
    else:
        name = "macs" if macs is not None else "params"
        value = macs if macs is not None else params
        full = getattr(cost.base, name)
        assert value is not None
        wanted = _plan.target_count(name, value, full)
        reachable = getattr(cost(removed(len(ranking))), name)
        if reachable > wanted:
            raise TargetUnreachableError(
                f"{name}={value!r} asks for {wanted:,}, the least that removal reaches is {reachable:,} "
                f"({100 * reachable / full:.1f} % of {full:,}); lower round_to or raise max_ratio. "
                + _at_minimum(groups, capacity, fixed)
            )
        length = bisect_left(lengths, -wanted, key=lambda n: -getattr(cost(removed(n)), name))
    counts = removed(length)
    return [
        (group, [int(unit) for unit in order[:count]])
        for group, order, count in zip(groups, orders, counts, strict=True)
        if count
    ]


# ------------------------------------------------------------------------------------------------
# The proof
# ------------------------------------------------------------------------------------------------

_Chosen = list[tuple[Group, list[int]]]
# Halving finds a few faulty groups among hundreds in this many; more means that the check itself makes no sense.
_MOST_TRIES = 64
# Relative error of the outputs that rounding in single precision makes at most.
_CLEARLY = 1e-4
_BREAKS = "its removal breaks the model"


def _proved(model: nn.Module, plan: PruningPlan, example_inputs: Inputs, exact: bool) -> Cost | None:
    """The cost of the pruned model if it clearly does what it should, in one pass of it and one of a reference.

    None if not, or not clearly: :func:`_examine` then finds out what is wrong.
    """
    outputs: list[Any] = []
    try:
        pruned = plan.apply(model)
        handle = pruned.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            with _detection.predictions(pruned) as said:
                after = _plan.measure(pruned, example_inputs)
        finally:
            handle.remove()
        got = _inputs.outputs_of(outputs[-1]) + said
        with (
            _contributions_zeroed(model, plan if exact else None),
            _detection.most_proposals(model),
            _detection.same_regions(model, got),
            _detection.predictions(model) as said,
            _inputs.evaluating(model),
            torch.no_grad(),
        ):
            output = _inputs.call(model, _inputs.to_model(example_inputs, model))
            wanted = _inputs.outputs_of(output) + said
    except Exception:
        return None
    if len(wanted) != len(got):
        return None
    # Rounding may swap them; they follow from the predictions, which are compared.
    selected = _detection.selections(got)
    for (path, old), (other, new) in zip(wanted, got, strict=True):
        first = int(path in selected)
        if path != other or old.shape[first:] != new.shape[first:] or old.dtype != new.dtype:
            return None
        if not torch.isfinite(old).all() or not torch.isfinite(new).all():
            return None
        if exact and not first and old.is_floating_point() and old.numel():
            old, new = old.double(), new.double()
            if not (new - old).abs().max() <= _CLEARLY * old.abs().max():
                return None
    return after


@contextmanager
def _contributions_zeroed(model: nn.Module, plan: PruningPlan | None) -> Iterator[None]:
    """Hooks that set to zero what the layers of ``model`` read of the removed channels of a one-step plan.

    Norms that span channels norm over those that are kept.
    """

    def hook(mask: Tensor) -> Callable[..., tuple[Any, ...]]:
        return lambda module, args: (args[0] * mask.to(args[0]), *args[1:])

    handles: list[Any] = []
    readers: list[str] = []
    try:
        for removal in plan.steps[0].removals if plan is not None else ():
            if not isinstance(removal, ChannelRemoval):
                continue
            if removal.kind in _plan.SPANNING_NORMS:
                gone = set(removal.removed)
                kept = [index for index in range(removal.size) if index not in gone]
                norm = model.get_submodule(removal.layer)
                handles.append(norm.register_forward_hook(_plan.over_kept(kept), with_kwargs=True))
            if removal.kind not in ("conv_in", "linear_in"):
                continue
            module = model.get_submodule(removal.layer)
            mask = torch.ones(removal.size)
            mask[list(removal.removed)] = 0
            if isinstance(module, _ConvNd):
                mask = mask.view(-1, *[1] * len(module.kernel_size))
            handles.append(module.register_forward_pre_hook(hook(mask)))
            readers.append(removal.layer)
        with projections_called(model, readers):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _examine(
    model: nn.Module, plan: PruningPlan, chosen: _Chosen, example_inputs: Inputs, exact: bool
) -> tuple[nn.Module | None, list[tuple[Group, str]]]:
    """The checked pruned model, or the groups whose removal does not do what it should."""
    pruned, problem = _try(model, plan, example_inputs, exact)
    if problem is None:
        return pruned, []

    tries = 0

    def fails(part: _Chosen) -> str | None:
        nonlocal tries
        tries += 1
        if tries > _MOST_TRIES:
            raise SurgeryError(
                f"too many groups fail the check, one like this: {problem}. Does the model "
                "give the same outputs twice? Name layers in `ignore`, or pass verify=False"
            )
        return _try(model, replace(plan, steps=(_plan.channel_step(part),)), example_inputs, exact)[1]

    def narrow(part: _Chosen, problem: str) -> list[tuple[Group, str]]:
        if len(part) == 1:
            return [(part[0][0], problem)]
        heads = [item for item in part if is_head_group(item[0])]
        others = [item for item in part if not is_head_group(item[0])]
        parts = [sub for sub in (heads, others) if sub]
        alike = len(parts) == 1 and len({_likeness(model, group) for group, _ in part}) == 1
        # Groups of one kind fail alike, when a forward pass has a number of heads or a width written into it.
        if alike and _BREAKS in problem and fails(part[:1]) and fails(part[-1:]):
            return [(group, problem) for group, _ in part]
        found: list[tuple[Group, str]] = []
        if len(parts) < 2:
            parts = [part[: len(part) // 2], part[len(part) // 2 :]]
        for half in parts:
            trouble = fails(half)
            if trouble is not None:
                found += narrow(half, trouble)
        # Harmless apart and harmful together: none of them can be trusted.
        return found or [(group, f"{problem} (together with other groups)") for group, _ in part]

    return None, narrow(chosen, problem)


def _likeness(model: nn.Module, group: Group) -> frozenset[tuple[str, type[Any]]]:
    """The kinds of the members and their layers' classes; of heads, the class of the attention alone."""
    owners = [member for member in group.members if member.kind in _HEADS] or group.members
    modules = dict(model.named_modules())
    return frozenset((member.kind, type(modules.get(member.layer))) for member in owners)


def _try(
    model: nn.Module, plan: PruningPlan, example_inputs: Inputs, exact: bool
) -> tuple[nn.Module | None, str | None]:
    try:
        if not exact:
            return plan.apply(model, example_inputs), None
        pruned, error_found = _plan.apply_and_compare(plan, model, example_inputs)
    except (SurgeryError, PlanMismatchError) as error:
        return None, f"{_BREAKS}: {error}"
    limit = _CLEARLY
    if not error_found <= limit:
        # Rounding or a wrong result: double precision tells them apart.
        try:
            wide = _widen(example_inputs)
            error_found = plan.exactness_error(copy.deepcopy(model).double(), wide)
            limit = 1e-7
        except (IdapError, RuntimeError, TypeError, ValueError):
            limit = 1e-2
    if error_found <= limit:
        return pruned, None
    return (
        None,
        f"removal is not exact: the outputs differ by {error_found:.1e} from those with its channels at zero",
    )


def _widen(example_inputs: Inputs) -> Any:
    return _inputs.map_tensors(example_inputs, lambda t: t.double() if t.is_floating_point() else t)


__all__ = [
    "CostModel",
    "Member",
    "Ranking",
    "allowed_removals",
    "check_scores",
    "group_scores",
    "prune_filters",
    "rank_units",
    "removal_order",
]
