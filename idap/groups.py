"""Coupled channels of a model as plain data, and the surgery of one layer.

Which channels must go together is read off one traced forward pass: the autograd graph of the model's
outputs, with hooks that tell which part of it is which layer. Every axis of every tensor on the way of a
prunable channel is followed through the operations with the exact sizes autograd saved (views, permutations,
concatenations, splits, broadcasts, contractions); what cannot be followed is reported, never guessed. The
work is linear in the size of the graph, so that it ends for models on which an enumeration of coupled index
lists does not. Most layers are cut by Torch-Pruning's pruning functions; this is the only
file that knows Torch-Pruning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from . import inputs as _inputs
from .adapters import attention as _attention
from .adapters import diffusers as _diffusers
from .adapters import multihead as _multihead
from .adapters import position_bias as _position_bias
from .adapters import shuffle as _shuffle
from .errors import GraphError, InvalidInputError, PlanMismatchError
from .inputs import Inputs
from .profile import is_linear, is_transposed_linear
from .tracing import (
    INEXACT,
    Axis,
    Deadline,
    Follower,
    Indices,
    Trace,
    components,
    is_frozen_bn,
    is_norm_note,
    side_width,
    trace_model,
)

Ignore: TypeAlias = "Iterable[str | type[nn.Module] | nn.Module]"
PRODUCERS = ("conv_out", "linear_out", "embedding", "parameter")


@dataclass(frozen=True)
class Member:
    """One side of one layer in a group.

    Attributes:
        layer: qualified name of the module, or of the parameter for the kind ``"parameter"``.
        kind: how the layer is cut: ``conv_out``, ``conv_in``, ``depthwise``, ``linear_out``, ``linear_in``,
            ``bn``, ``frozen_bn``, ``layernorm``, ``groupnorm``, ``instancenorm``, ``prelu``, ``embedding``,
            ``parameter``. An attention module is a member too, whose channels are its heads: ``heads`` if
            layers of their own make and read them (what is cut are the module's attributes), ``mha`` for
            ``nn.MultiheadAttention``, whose projections are cut with it. So is a unit that shuffles channels:
            ``shuffle``, for its output channels.
        size: channels of that side in the whole layer.
        units: for each unit of the group, the channels of this side that go with it (possibly none).
        dim: the dimension that is cut, for the kind ``"parameter"``; else 0.
    """

    layer: str
    kind: str
    size: int
    units: tuple[tuple[int, ...], ...]
    dim: int = 0


@dataclass(frozen=True)
class Group:
    """Channels that can only be removed together: ``size`` units, each spread over all members.

    Attributes:
        root: the layer that makes them first.
        size: number of units.
        members: in the order in which their layers run.
        inexact: what spans the channels, so that the others do not come out as they were; empty for an exact
            group.
    """

    root: str
    size: int
    members: tuple[Member, ...]
    inexact: tuple[str, ...] = ()

    @property
    def provable(self) -> bool:
        """Whether a reference at full width shows what its removal must give.

        True for exact groups, and where nothing but layers of LayerNorm and GroupNorm spans the channels: the
        reference then norms over those that are kept.
        """
        return all(is_norm_note(note) for note in self.inexact)

    def removals(self, units: Iterable[int]) -> Iterator[tuple[Member, list[int]]]:
        """The channels of each member that go when ``units`` go."""
        chosen = sorted(set(units))
        for member in self.members:
            indices = sorted({index for unit in chosen for index in member.units[unit]})
            if indices:
                yield member, indices


@dataclass(frozen=True)
class Skipped:
    """A group or a block that is left alone, and why."""

    root: str
    size: int
    reason: str


@dataclass(frozen=True)
class GroupScan:
    """All groups of a model, in the order in which their first layers run; prunable ones and others."""

    groups: list[Group]
    skipped: list[Skipped]


ONE_UNIT = "only one unit is left"
_HEAD_KINDS = ("heads", "mha")


def is_head_group(group: Group) -> bool:
    """Whether the units of a group are heads of an attention (or heads that share keys and values)."""
    return any(member.kind in _HEAD_KINDS for member in group.members)


def _matches(name: str, module: nn.Module | None, owners: Sequence[tuple[str, nn.Module]], rule: Any) -> bool:
    if isinstance(rule, str):
        return fnmatchcase(name, rule) or any(fnmatchcase(owner, rule) for owner, _ in owners if owner)
    if isinstance(rule, nn.Module):
        return module is rule or any(owner is rule for _, owner in owners)
    return isinstance(module, rule) or any(isinstance(owner, rule) for _, owner in owners)


def resolve_ignore(model: nn.Module, ignore: Ignore) -> set[str]:
    """Names of all modules and parameters that ``ignore`` covers.

    Args:
        ignore: names or fnmatch patterns (they cover everything below what they match), module classes,
            modules.

    Raises:
        InvalidInputError: if an entry matches nothing, or is of another type.
    """
    if isinstance(ignore, (str, type, nn.Module)):
        ignore = (ignore,)
    covered: set[str] = set()
    modules = dict(model.named_modules())
    names: list[tuple[str, nn.Module | None]] = list(modules.items())
    names += [(name, None) for name, _ in model.named_parameters()]
    for rule in ignore:
        if not isinstance(rule, (str, nn.Module)) and not (
            isinstance(rule, type) and issubclass(rule, nn.Module)
        ):
            raise InvalidInputError(
                f"ignore: got {rule!r}, wanted a name or pattern, a module class or a module"
            )
        hits = set()
        for name, module in names:
            owners = [(name[:i], modules[name[:i]]) for i, letter in enumerate(name) if letter == "."]
            if _matches(name, module, owners, rule):
                hits.add(name)
        if not hits:
            raise InvalidInputError(
                f"ignore: {rule if isinstance(rule, (str, type)) else type(rule).__name__!r} matches no "
                f"module or parameter of {type(model).__name__}; see model.named_modules() for the names"
            )
        covered |= hits
    return covered


def find_groups(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    ignore: Ignore = (),
    exact: bool = True,
    time_limit: float = 60.0,
) -> GroupScan:
    """Groups of coupled channels of ``model``, in its present numbering.

    A copy of the model runs once on the CPU, in evaluation mode; the model itself is not touched. Of the channels
    under a GroupNorm whole groups go together, which leaves the others as they were; where such norms follow a
    concatenation, a unit can be several groups. A GroupNorm of one group is like a LayerNorm.

    Args:
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
        ignore: layers whose output channels stay: names or fnmatch patterns, module classes, modules.
        exact: leave groups alone whose removal is not exact, because a normalisation, a softmax or an average
            spans the removed channels. With False they are offered where surgery is possible.
        time_limit: seconds after which :class:`GraphTimeoutError` is raised. It is looked at before every
            module call and during the analysis; a single module that hangs is not interrupted.

    Returns:
        Groups with more than one unit and no obstacle in ``groups``; all others in ``skipped``, with the
        reason.

    Raises:
        GraphTimeoutError: if the time limit is over.
        GraphError: if the model raises, or returns nothing that depends on its parameters.
        InvalidInputError: if an entry of ``ignore`` matches nothing, or the model cannot be copied.
    """
    deadline = Deadline(time_limit)
    covered = resolve_ignore(model, ignore)
    duplicate = _inputs.tracing_copy(model, "cpu")
    for table in _position_bias.tables(duplicate):
        table.requires_grad_(False)  # followed, it would tie the heads of all layers together
    example = _inputs.to_device(example_inputs, "cpu")
    halves = (torch.float16, torch.bfloat16)
    if any(tensor.dtype in halves for tensor in duplicate.parameters()):
        duplicate = duplicate.float()
        example = _inputs.map_tensors(example, lambda t: t.float() if t.dtype in halves else t)
    try:
        _shuffle.convert_all(duplicate, _shuffle.find_units(duplicate))
        trace = trace_model(duplicate, example, deadline)
    except (GraphError, InvalidInputError):
        raise
    except Exception as error:
        raise GraphError(
            f"{type(model).__name__} raised {type(error).__name__} on the example inputs: {error}"
        ) from error
    follower = Follower(duplicate, trace, deadline)
    follower.run()
    return _collect(duplicate, follower, trace, covered, exact, deadline)


def _collect(
    model: nn.Module, follower: Follower, trace: Trace, covered: set[str], exact: bool, deadline: Deadline
) -> GroupScan:
    axes = follower.axes
    offsets: dict[Axis, int] = {}
    count = 0
    for axis in axes.parent:
        root = axes.find(axis)
        if root not in offsets:
            offsets[root] = count
            count += axes.size[root]
    ends: tuple[list[Indices], list[Indices]] = ([], [])
    for a, b, pairs in axes.relations:
        deadline.check()
        left, right = pairs()
        ends[0].append(left + offsets[axes.find(a)])
        ends[1].append(right + offsets[axes.find(b)])
    empty = np.empty(0, dtype=np.int64)
    labels = components(
        count, np.concatenate(ends[0]) if ends[0] else empty, np.concatenate(ends[1]) if ends[1] else empty
    )

    def labels_of(axis: Axis) -> Indices:
        start = offsets[axes.find(axis)]
        return labels[start : start + axes.size[axis]]

    def rank(item: tuple[Axis, tuple[str, str, int]]) -> tuple[int, str, str, int]:
        name, kind, dim = item[1]
        return trace.order.get(name, len(trace.order)), name, kind, dim

    sides = sorted(follower.sides.items(), key=rank)
    # Units that share a layer which makes channels belong to one group.
    parent: dict[int, int] = {}

    def find(label: int) -> int:
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    producers = [(axis, side) for axis, side in sides if side[1] in PRODUCERS]
    for axis, _ in producers:
        own = [int(label) for label in dict.fromkeys(labels_of(axis).tolist())]
        for label in own:
            parent.setdefault(label, label)
        for label in own[1:]:
            parent[find(label)] = find(own[0])
    unit_numbers: dict[int, dict[int, int]] = {}
    roots: dict[int, str] = {}
    for axis, (name, _, _) in producers:
        for label in dict.fromkeys(labels_of(axis).tolist()):
            group = find(label)
            roots.setdefault(group, name)
            numbers = unit_numbers.setdefault(group, {})
            numbers.setdefault(label, len(numbers))
    members: dict[int, list[Member]] = {group: [] for group in roots}
    for axis, (name, kind, dim) in sides:
        deadline.check()
        own_labels = labels_of(axis)
        touched: dict[int, list[list[int]]] = {}
        for index, label in enumerate(own_labels.tolist()):
            if label not in parent:
                continue
            group = find(label)
            slots = touched.get(group)
            if slots is None:
                slots = touched[group] = [[] for _ in unit_numbers[group]]
            slots[unit_numbers[group][label]].append(index)
        for group, slots in touched.items():
            member = Member(name, kind, len(own_labels), tuple(tuple(slot) for slot in slots), dim)
            members[group].append(member)
    notes: dict[int, list[str]] = {group: [] for group in roots}
    for noted, why in axes.notes:
        for label in np.unique(labels_of(noted)).tolist():
            if label in parent and why not in notes[find(label)]:
                notes[find(label)].append(why)
    found: list[tuple[str, int, list[Member], str | None]] = []
    inexact: dict[str, tuple[str, ...]] = {}
    attention = _attention.attention_modules(model)
    for group, first in roots.items():
        parts, obstacle = _with_heads(members[group], attention, trace.order)
        size = len(unit_numbers[group])
        reason = _reason(parts, size, notes[group], covered, obstacle, exact)
        found.append((first, size, parts, reason))
        inexact[first] = tuple(note for note in notes[group] if INEXACT in note)
    for name in trace.order:
        module = model.get_submodule(name)
        if isinstance(module, nn.MultiheadAttention):
            parts, obstacle = _multihead_members(name, module)
            size = module.num_heads
            found.append((name, size, parts, _reason(parts, size, [], covered, obstacle, exact)))
    followed = [root for root, *_ in found] + [
        m.layer for _, _, own, _ in found for m in own if m.kind == "heads"
    ]
    for name, heads in attention.items():
        if not any(not name or layer == name or layer.startswith(f"{name}.") for layer in followed):
            found.append((name, heads, [], "attention heads: what makes and reads them is not followed"))
    found.sort(key=lambda entry: trace.order.get(entry[0], len(trace.order)))
    return GroupScan(
        [
            Group(root, size, tuple(parts), inexact.get(root, ()))
            for root, size, parts, reason in found
            if reason is None
        ],
        [Skipped(root, size, reason) for root, size, _, reason in found if reason is not None],
    )


def _with_heads(
    members: list[Member], attention: Mapping[str, int], order: Mapping[str, int]
) -> tuple[list[Member], str | None]:
    """The members, with the attention modules whose heads they are made for; or why they are no heads."""
    makers: dict[str, list[Member]] = {}
    for member in members:
        if member.kind.endswith("_in") or member.kind == "parameter":
            continue
        owners = [name for name in attention if not name or member.layer.startswith(name + ".")]
        if owners:
            makers.setdefault(max(owners, key=len), []).append(member)
    heads: list[Member] = []
    for name, own in makers.items():
        size = attention[name]
        places = [order.get(member.layer, 0) for member in own if member.kind in PRODUCERS]
        if not places:
            continue  # a norm of the trunk, in front of the queries
        made = max(order.get(member.layer, 0) for member in own)
        entering = [
            order.get(member.layer, 0)
            for member in members
            if member.kind.endswith("_in") and (not name or member.layer.startswith(name + "."))
        ]
        if entering and max(entering) < min(places):
            continue  # the trunk, which the attention reads first and its output projection makes again
        readers = [
            units
            for member in members
            if member.kind in ("linear_in", "conv_in") and order.get(member.layer, 0) > made
            if (units := _whole_heads(member, size)) is not None
        ]
        if not readers or any(not unit for member in own for unit in member.units):
            return members, f"attention heads: only whole heads are removed from {name or 'the model'}"
        heads.append(Member(name, "heads", size, readers[0]))
    # First, so that a plan sets the attributes while the layers are as wide as these say.
    members = sorted(members, key=lambda member: member.kind != "shuffle")
    return heads + members, None


def _whole_heads(member: Member, heads: int) -> tuple[tuple[int, ...], ...] | None:
    """Which heads each unit is, by the channels that the output projection reads; None if they are not whole."""
    width, rest = divmod(member.size, heads)
    if rest:
        return None
    units: list[tuple[int, ...]] = []
    for channels in member.units:
        own = tuple(sorted({channel // width for channel in channels}))
        if not own or len(channels) != width * len(own):
            return None
        units.append(own)
    return tuple(units) if sorted(head for unit in units for head in unit) == list(range(heads)) else None


def _multihead_members(name: str, module: nn.MultiheadAttention) -> tuple[list[Member], str | None]:
    if not _multihead.supports(module):
        return [], f"attention heads: {type(module).__name__} is not a plain nn.MultiheadAttention"
    size, width = module.num_heads, module.head_dim
    columns = tuple(tuple(range(head * width, (head + 1) * width)) for head in range(size))
    projection = f"{name}.out_proj" if name else "out_proj"
    return [
        Member(name, "mha", size, tuple((head,) for head in range(size))),
        Member(projection, "linear_in", size * width, columns),
    ], None


def _reason(
    members: list[Member], size: int, notes: list[str], covered: set[str], obstacle: str | None, exact: bool
) -> str | None:
    hard = [note for note in notes if INEXACT not in note]
    for note in hard:
        if "output of the model" in note:
            return note
    for member in members:
        if member.layer in covered and not member.kind.endswith("_in"):
            return f"ignored on request ({member.layer})"
    if obstacle is not None:
        return obstacle
    if hard:
        return hard[0]
    if exact and notes:
        return notes[0]
    if size < 2:
        return ONE_UNIT if size else "no units"
    if not any(member.kind in ("conv_out", "linear_out", "mha") for member in members):
        return "no convolution or linear layer makes its channels"
    return None


# ------------------------------------------------------------------------------------------------
# Surgery
# ------------------------------------------------------------------------------------------------

_KINDS = (
    "conv_out", "conv_in", "depthwise", "linear_out", "linear_in", "bn", "frozen_bn", "layernorm",
    "groupnorm", "instancenorm", "prelu", "embedding", "parameter", "shuffle", *_HEAD_KINDS,
)  # fmt: skip

_CLASSES: dict[str, type[nn.Module]] = {
    "conv_out": _ConvNd, "conv_in": _ConvNd, "depthwise": _ConvNd, "linear_out": nn.Linear,
    "linear_in": nn.Linear, "bn": _BatchNorm, "layernorm": nn.LayerNorm, "groupnorm": nn.GroupNorm,
    "instancenorm": _InstanceNorm, "prelu": nn.PReLU, "embedding": nn.Embedding,
    "mha": nn.MultiheadAttention,
}  # fmt: skip


def side_size(model: nn.Module, layer: str, kind: str, dim: int = 0) -> int:
    """Channels that one side of a layer has now; for ``heads`` and ``mha`` the heads of the module.

    Raises:
        PlanMismatchError: if the model has no such layer, or one of another class.
        InvalidInputError: if the kind is unknown.
    """
    if kind not in _KINDS:
        raise InvalidInputError(f"unknown kind of surgery: got {kind!r}, wanted one of {list(_KINDS)}")
    if kind == "parameter":
        try:
            parameter = model.get_parameter(layer)
        except AttributeError:
            raise PlanMismatchError(
                f"{layer}: the plan cuts this parameter, the model has none of that name"
            ) from None
        if not 0 <= dim < parameter.dim():
            raise PlanMismatchError(
                f"{layer}: the plan cuts dimension {dim}, the parameter has {parameter.dim()}"
            )
        return int(parameter.shape[dim])
    try:
        module = model.get_submodule(layer)
    except AttributeError:
        raise PlanMismatchError(
            f"{layer}: the plan cuts this layer, the model has none of that name"
        ) from None
    if kind == "heads":
        heads = _attention.count_heads(module)
        if heads is None:
            raise PlanMismatchError(
                f"{layer}: the plan removes attention heads here, the model has a {type(module).__name__}"
            )
        return heads
    if kind == "shuffle":
        width = _shuffle.width(module)
        if width is None:
            raise PlanMismatchError(
                f"{layer}: the plan cuts a unit that shuffles channels here, the model has a {type(module).__name__}"
            )
        return width
    if kind == "frozen_bn":
        fits = is_frozen_bn(module)
    else:
        fits = is_linear(module) if kind.startswith("linear_") else isinstance(module, _CLASSES[kind])
    if not fits:
        wanted = "FrozenBatchNorm2d" if kind == "frozen_bn" else _CLASSES[kind].__name__.strip("_")
        raise PlanMismatchError(
            f"{layer}: the plan cuts a {wanted} here ({kind}), the model has a {type(module).__name__}"
        )
    return int(module.num_heads) if kind == "mha" else side_width(module, kind)  # type: ignore[arg-type]


def cut(model: nn.Module, layer: str, kind: str, removed: Sequence[int], dim: int = 0) -> None:
    """Remove channels from one side of one layer, in place; by Torch-Pruning's function, where its kind has one.

    For the kinds ``heads`` and ``mha`` the channels are heads; see :class:`Member`.
    """
    import torch_pruning as tp

    indices = list(removed)
    if kind == "parameter":
        owner, _, name = layer.rpartition(".")
        parameter = model.get_parameter(layer)
        pruner = tp.pruner.function.ParameterPruner(pruning_dim=dim)
        module = model.get_submodule(owner)
        setattr(module, name, pruner.prune_out_channels(parameter, indices))
        if isinstance(module, nn.RMSNorm):
            module.normalized_shape = tuple(module.weight.shape)
        return
    module = model.get_submodule(layer)
    if kind in _HEAD_KINDS:
        _attention.remove_heads(module, layer, indices)
        return
    if kind == "shuffle":
        _shuffle.remove_channels(module, layer, indices)
        return
    if kind == "frozen_bn":
        keep = sorted(set(range(side_width(module, kind))) - set(indices))
        for name in ("weight", "bias", "running_mean", "running_var"):
            setattr(module, name, getattr(module, name)[keep].clone())
        return
    if kind == "layernorm":
        _narrow_layernorm(module, indices)  # type: ignore[arg-type]
        return
    if is_transposed_linear(module):
        _narrow_transposed_linear(module, kind, indices)
        return
    size = side_width(module, kind)
    functions = {
        "conv_out": tp.prune_conv_out_channels,
        "conv_in": tp.prune_conv_in_channels,
        "depthwise": tp.prune_depthwise_conv_out_channels,
        "linear_out": tp.prune_linear_out_channels,
        "linear_in": tp.prune_linear_in_channels,
        "bn": tp.prune_batchnorm_out_channels,
        "groupnorm": tp.prune_groupnorm_out_channels,
        "instancenorm": tp.prune_instancenorm_out_channels,
        "prelu": tp.prune_prelu_out_channels,
        "embedding": tp.prune_embedding_out_channels,
    }
    groups = _groups_left(module, layer, indices) if isinstance(module, nn.GroupNorm) else 0
    functions[kind](module, indices)
    if isinstance(module, nn.GroupNorm):
        module.num_groups = groups  # Torch-Pruning leaves it as it was
    if isinstance(module, _ConvNd):
        _diffusers.follow_convolution(model.get_submodule(layer.rpartition(".")[0]), module)
    if kind == "instancenorm" and getattr(module, "running_mean", None) is not None:
        keep = sorted(set(range(size)) - set(indices))
        module.running_mean = module.running_mean[keep].clone()  # type: ignore[index]
        module.running_var = module.running_var[keep].clone()  # type: ignore[index]


def _narrow_layernorm(module: nn.LayerNorm, removed: Sequence[int]) -> None:
    """By ourselves, as Torch-Pruning 1.6.1 leaves the kept weights in the order of a set, which is not ascending."""
    width = module.normalized_shape[-1]
    keep = sorted(set(range(width)) - set(removed))
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(parameter.detach()[keep].clone(), parameter.requires_grad))
    module.normalized_shape = (len(keep),)


def _narrow_transposed_linear(module: nn.Module, kind: str, removed: Sequence[int]) -> None:
    """Cut GPT-2's ``Conv1D``, which Torch-Pruning does not know: its weight is (in, out)."""
    cuts = {"weight": 1, "bias": 0} if kind == "linear_out" else {"weight": 0}
    keep = sorted(set(range(side_width(module, kind))) - set(removed))
    for name, dim in cuts.items():
        parameter = module._parameters.get(name)
        if parameter is not None:
            index = torch.tensor(keep, device=parameter.device)
            smaller = parameter.detach().index_select(dim, index)
            setattr(module, name, nn.Parameter(smaller, parameter.requires_grad))
    setattr(module, "nf" if kind == "linear_out" else "nx", len(keep))


def _groups_left(module: nn.GroupNorm, layer: str, removed: Sequence[int]) -> int:
    """Groups of a GroupNorm without some channels: whole groups are gone, or each lost as many as the others.

    Raises:
        PlanMismatchError: if what is left does not fall into equal groups of channels that were normalised
            together.
    """
    width = module.num_channels // module.num_groups
    lost = np.bincount(np.asarray(removed, dtype=np.int64) // width, minlength=module.num_groups)
    if (lost % width == 0).all():
        return int((lost == 0).sum())
    if (lost == lost[0]).all():
        return module.num_groups
    raise PlanMismatchError(
        f"{layer}: the plan removes between {lost.min()} and {lost.max()} of the {width} channels that a group "
        f"of this GroupNorm has; wanted whole groups, or as many of each of its {module.num_groups} groups"
    )
