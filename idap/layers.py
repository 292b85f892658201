"""Stage 2: blocks that the identity or a projection can stand in for, found by running the model; their removal.

The identity takes the place of a block whose output has the shape of its input; where the shapes differ, a 1x1
convolution or a linear layer does, fitted to the block by least squares (:func:`fit_projections`). In a plain
stack of convolutions a block is a *unit*: one of them, with the norm and the activation behind it. A layer whose
output is only concatenated to what others made (DenseNet) is cut out with its channels.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from . import complexity
from . import inputs as _inputs
from . import plan as _plan
from .errors import (
    EmptyDataError,
    ForwardError,
    GraphError,
    InvalidInputError,
    NonFiniteError,
    PlanMismatchError,
    SurgeryError,
    TargetUnreachableError,
)
from .groups import PRODUCERS, Group, GroupScan, Ignore, Skipped, find_groups, resolve_ignore
from .inputs import Inputs
from .plan import (
    BlockRemoval,
    BlockStep,
    ChannelStep,
    IdentityBlock,
    Projection,
    ProjectionBlock,
    PruningPlan,
    Returns,
    Step,
    target_count,
)

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = [
    "Block",
    "IdentityBlock",
    "Projection",
    "ProjectionBlock",
    "ProjectionFit",
    "block_filter_divergence",
    "find_blocks",
    "fit_projections",
    "truncate_layers",
]


# ------------------------------------------------------------------------------------------------
# Finding blocks
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A module, or a run of modules, that the identity or a projection can replace, or that can be cut out.

    Attributes:
        name: qualified module name; of a unit that of its convolution.
        type: class name of the module.
        shape: shape of its hidden state going in; of a block with neither a projection nor channels of its own
            the same coming out.
        params: number of parameters inside.
        residual: its input reaches its output around the layers inside.
        returns: ``"tensor"``, or how each further item of the returned tuple is made
            (see :class:`IdentityBlock`).
        projection: the linear map that can replace it where the identity cannot, or means little; else None.
        followers: name and class name of the further modules of a unit, in the order in which they run.
        channels: of a block that is cut out the groups of channels that go with it; it alone makes them.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    params: int
    residual: bool
    returns: Returns = "tensor"
    projection: Projection | None = None
    followers: tuple[tuple[str, str], ...] = ()
    channels: tuple[Group, ...] = field(default=(), repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the modules that go: one, or those of a unit."""
        return (self.name, *(name for name, _ in self.followers))

    @property
    def last(self) -> str:
        """Name of the module whose output is that of the block."""
        return self.names[-1]

    def holds(self, name: str) -> bool:
        """Whether a module is one of the block, or inside it."""
        return any(name == own or _is_inside(name, own) for own in self.names)


@dataclass
class _Call:
    """What the hooks saw of one module."""

    module: nn.Module
    shape_in: tuple[int, ...] | None
    source: Any
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    count: int = 1
    sink: Any = None
    shape_out: tuple[int, ...] | None = None
    returns: Returns | None = None
    obstacle: str | None = None
    projection: Projection | None = None


def _describe_output(call: _Call, hidden: Tensor, output: Any) -> tuple[Tensor | None, Returns, str | None]:
    """The hidden state among the outputs, the rule that reproduces the others, or why there is none."""
    if isinstance(output, Tensor):
        return output, "tensor", None
    if not isinstance(output, tuple) or not output or not isinstance(output[0], Tensor):
        return (
            None,
            "tensor",
            f"returns {type(output).__name__}, not a tensor or a tuple that starts with one",
        )
    if hasattr(output, "_fields"):
        return None, "tensor", f"returns a named tuple ({type(output).__name__})"
    args, kwargs = call.arguments
    rules: list[Any] = ["hidden"]
    for position, item in enumerate(output[1:], start=1):
        arg = next((i for i, value in enumerate(args) if value is item and item is not hidden), None)
        key = next((k for k, value in kwargs.items() if value is item and item is not hidden), None)
        if item is None:
            rules.append("none")
        elif arg is not None:
            rules.append(["arg", arg])
        elif key is not None:
            rules.append(["kwarg", key])
        else:
            return output[0], "tensor", f"item {position} of its returned tuple is computed inside"
    return output[0], rules, None


def _reaches(start: Any, goals: set[Any], blocked: set[Any], gates: bool = True) -> bool:
    """Whether the autograd graph leads from ``start`` back to ``goals`` without passing ``blocked``.

    With ``gates=False`` it may not pass a product of two tensors either: a gated input is no residual.
    """
    stack, seen = [start], {start}
    while stack:
        node = stack.pop()
        if node is None or node in blocked:
            continue
        if (
            not gates
            and node.name().startswith("Mul")
            and all(up is not None for up, _ in node.next_functions)
        ):
            continue
        if node in goals:
            return True
        for upstream, _ in node.next_functions:
            if upstream is not None and upstream not in seen:
                seen.add(upstream)
                stack.append(upstream)
    return False


def _projection_of(module: nn.Module, before: tuple[int, ...], after: tuple[int, ...]) -> Projection | None:
    """The linear map from one shape to the other, if there is one that is worth it.

    It has at most two thirds of the parameters of the module: in the place of a single 1x1 convolution it would
    save nothing. Of several strides that fit, which small examples allow, it has the smallest.
    """
    axes = len(before) - 2
    if len(before) != len(after) or axes < 0 or before[0] != after[0] or 0 in before + after:
        return None
    convolutional = any(isinstance(m, _ConvNd) and len(m.kernel_size) == axes for m in module.modules())
    projection = None
    if convolutional:
        stride = tuple(-(-size // left) for size, left in zip(before[2:], after[2:], strict=True))
        projection = Projection(f"conv{axes}d", before[1], after[1], stride)
    elif before[:-1] == after[:-1]:
        projection = Projection("linear", before[-1], after[-1])
    if projection is None or projection.output_shape(before) != after:
        return None
    return projection if 3 * projection.params <= 2 * _size(module) else None


def _record(model: nn.Module, example_inputs: Inputs) -> _Search:
    """Run a copy of ``model`` once: calls by module name, autograd nodes of its outputs and of its inputs."""
    duplicate = _inputs.tracing_copy(model)
    names = {module: name for name, module in duplicate.named_modules()}
    calls: dict[str, _Call] = {}
    origins: set[Any] = set()

    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        name = names[module]
        if name in calls:
            calls[name].count += 1
            return None
        hidden = _inputs.first_tensor((args, kwargs))
        moved = hidden
        if hidden is not None and hidden.grad_fn is None and hidden.is_floating_point():
            # A constant, such as the zeros that the queries of a detector begin with: a node to arrive at.
            given = hidden
            moved = given.detach().requires_grad_(True).clone()
            args = tuple(moved if value is given else value for value in args)
            kwargs = {key: moved if value is given else value for key, value in kwargs.items()}
        shape = None if moved is None else tuple(moved.shape)
        calls[name] = _Call(module, shape, None if moved is None else moved.grad_fn, (args, kwargs))
        return None if moved is hidden else (args, kwargs)

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = calls[names[module]]
        if call.count > 1:
            call.obstacle = "called more than once in a pass"
            return
        entering = _inputs.first_tensor((args, kwargs))
        if entering is None:
            call.obstacle = "takes no tensor"
            return
        leaving, call.returns, call.obstacle = _describe_output(call, entering, output)
        call.arguments = ((), {})
        if leaving is None:
            return
        call.sink, call.shape_out = leaving.grad_fn, tuple(leaving.shape)
        if isinstance(module, nn.Embedding):
            origins.add(leaving.grad_fn)
        if tuple(leaving.shape) != call.shape_in or leaving.dtype != entering.dtype:
            given = any(value is entering for value in (*args, *kwargs.values()))  # not as part of a list
            same_kind = leaving.dtype == entering.dtype and entering.is_floating_point()
            if call.obstacle is None and given and same_kind:
                call.projection = _projection_of(module, tuple(entering.shape), tuple(leaving.shape))
            call.obstacle = f"takes {call.shape_in} and gives {tuple(leaving.shape)}"

    def attach(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        # clone() because a leaf has no autograd node of its own to arrive at
        moved = tensor.detach().requires_grad_(True).clone()
        origins.add(moved.grad_fn)
        return moved

    handles: list[Any] = []
    try:
        for module in duplicate.modules():
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        with torch.inference_mode(False), torch.enable_grad():
            example = _inputs.map_tensors(
                _inputs.to_model(_inputs.without_inference(example_inputs), duplicate), attach
            )
            output = _inputs.call(duplicate, example)
    finally:
        for handle in handles:
            handle.remove()
    sinks = [tensor.grad_fn for _, tensor in _inputs.named_tensors(output) if tensor.grad_fn is not None]
    return _Search(duplicate, calls, sinks, origins)


def _is_cat(node: Any) -> bool:
    return bool(node.name().startswith("Cat"))


def _is_inside(name: str, parent: str) -> bool:
    return name != parent and (parent == "" or name.startswith(parent + "."))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _place(name: str) -> str:
    return re.sub(r"\d+", "#", name)


# Modules whose children have no names in the code that runs them, but are run in their order.
_CONTAINERS = (nn.Sequential, nn.ModuleDict, nn.ModuleList)


class _Search:
    """One recorded pass, and the questions that tell blocks from containers, parts and branches."""

    def __init__(
        self, model: nn.Module, calls: dict[str, _Call], outputs: list[Any], origins: set[Any]
    ) -> None:
        self.calls = calls
        self._model = model
        self._outputs = outputs
        self._origins = origins
        self._layers = [
            (name, call.sink)
            for name, call in calls.items()
            if not any(True for _ in call.module.children())
            and any(p.dim() >= 2 for p in call.module.parameters())
        ]
        self.units = dict(self._units())

    def _units(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Convolutions in containers, and the children right behind each that keep its shape and hold no layer.

        What is in them is called once, each after the other. Not those that are all of their container.
        """
        for owner, container in self._model.named_modules():
            if not isinstance(container, _CONTAINERS):
                continue
            children = [
                (f"{owner}.{key}" if owner else key, child) for key, child in container.named_children()
            ]
            for start, (name, module) in enumerate(children):
                if not isinstance(module, _ConvNd) or not self._runs(name):
                    continue
                last, followers = self.calls[name], []
                for other, follower in children[start + 1 :]:
                    layers = any(p.dim() >= 2 for p in follower.parameters())
                    if layers or isinstance(follower, IdentityBlock) or not self._runs(other):
                        break
                    call = self.calls[other]
                    if call.source is not last.sink or call.shape_out != last.shape_out:
                        break
                    last = call
                    followers.append(other)
                if followers and len(followers) + 1 < len(children):
                    yield name, tuple(followers)

    def _runs(self, name: str) -> bool:
        call = self.calls.get(name)
        return call is not None and call.count == 1 and call.source is not None and call.sink is not None

    def can_stand(self, name: str) -> bool:
        """Whether a module is called once, between two tensors of the autograd graph, and holds layers."""
        call = self.calls[name]
        return (
            name != ""
            and call.sink is not None
            and call.source is not None
            and call.count == 1
            and not isinstance(call.module, ProjectionBlock)
            and any(_is_inside(layer, name) for layer, _ in self._layers)
        )

    def is_container(self, name: str, candidates: Iterable[str]) -> bool:
        """Whether a module only strings blocks together: all that flows through it passes through candidates.

        A layer of a transformer does so too, where its attention and its MLP have a residual sum each. It is
        told by its parts being of as many classes as there are parts, and by being one of a row of its class.
        """
        call = self.calls[name]
        kind = type(call.module)
        cuts: list[str] = []
        if kind is nn.Sequential:
            candidates = (*candidates, *(unit for unit in self.units if self.keeps_shape(unit)))
        for inner in candidates:
            if not _is_inside(inner, name) or any(_is_inside(inner, outer) for outer in cuts):
                continue
            if not _reaches(call.sink, {call.source}, {self.calls[inner].sink}):
                cuts.append(inner)
        # An attention with its own sum inside a layer with another one cuts it too, but is the lesser part.
        if not cuts or 3 * sum(_size(self.calls[n].module) for n in cuts) < 2 * _size(call.module):
            return False
        parts = {type(self.calls[inner].module) for inner in cuts}
        row = [n for n, c in self.calls.items() if type(c.module) is kind and _place(n) == _place(name)]
        return kind is nn.Sequential or not 1 < len(parts) == len(cuts) or len(row) < 2

    def bypassed(self, name: str) -> bool:
        """Whether a module's input reaches its output around the layers inside: a residual sum."""
        call = self.calls[name]
        inside = {sink for layer, sink in self._layers if _is_inside(layer, name)}
        return _reaches(call.sink, {call.source}, inside, gates=False)

    def on_trunk(self, name: str) -> bool:
        """Whether everything between the model's inputs and outputs passes through a module."""
        return not any(_reaches(sink, self._origins, {self.calls[name].sink}) for sink in self._outputs)

    def between_layers(self, name: str) -> bool:
        """Whether layers run before and after a module: it is neither the stem of the model nor its head."""
        call = self.calls[name]
        others = {n: sink for n, sink in self._layers if n != name and not _is_inside(n, name)}
        if not _reaches(call.source, set(others.values()), set()):
            return False
        order = list(self.calls)
        later = set(order[order.index(name) :])
        return any(_reaches(sink, {call.sink}, set()) for layer, sink in others.items() if layer in later)

    def without_parts(self, accepted: dict[str, bool], kinds: set[type], places: set[str]) -> dict[str, bool]:
        """``accepted`` (name to residual) less what is only a part of a module that is like a block."""
        kept = {}
        for name, residual in accepted.items():
            owners = [name[:i] for i, letter in enumerate(name) if letter == "."]
            known = (owner for owner in owners if owner in self.calls)
            if not any(type(self.calls[owner].module) in kinds for owner in known) and (
                residual or not any(_place(owner) in places for owner in owners)
            ):
                kept[name] = residual
        return kept

    def same_shape(self) -> dict[str, bool]:
        """Blocks for the identity: name to whether a residual sum bypasses them."""
        candidates = [name for name, call in self.calls.items() if not call.obstacle and self.can_stand(name)]
        accepted: dict[str, bool] = {}
        for name in candidates:
            if any(_is_inside(name, outer) for outer in accepted) or self.is_container(name, candidates):
                continue
            residual = self.bypassed(name)
            inner = (part for part in candidates if _is_inside(part, name))
            if residual or (self.on_trunk(name) and not any(map(self.bypassed, inner))):
                accepted[name] = residual
        kinds = {type(self.calls[name].module) for name in accepted}
        return self.without_parts(accepted, kinds, {_place(name) for name in accepted})

    def keeps_shape(self, unit: str) -> bool:
        """Whether the output of a unit has the shape of its input."""
        return self.calls[unit].obstacle is None

    def plain_units(self, others: Mapping[str, bool], wanted: Callable[[str], bool]) -> dict[str, bool]:
        """Units on the trunk, beside the ``others``: name to False, since nothing bypasses a unit."""
        accepted = {
            name: False
            for name, followers in self.units.items()
            if wanted(name)
            and not any(_is_inside(name, other) for other in others)
            and self.on_trunk(followers[-1])
            and self.between_layers(name)
        }
        kinds = {type(self.calls[name].module) for name in others} - set(_CONTAINERS)
        return self.without_parts(accepted, kinds, {_place(name) for name in others})

    def growing(self, others: Mapping[str, bool]) -> list[str]:
        """Children of containers whose output is read by concatenations alone, with or beside what they read."""
        readers: dict[Any, list[Any]] = {}
        stack = [sink for sink in self._outputs if sink is not None]
        seen = set(stack)
        while stack:
            node = stack.pop()
            for upstream, _ in node.next_functions:
                if upstream is None:
                    continue
                readers.setdefault(upstream, []).append(node)
                if upstream not in seen:
                    seen.add(upstream)
                    stack.append(upstream)

        def beside(call: _Call) -> bool:
            """Whether a concatenation has what the module reads, or the parts that this was put together of."""
            parts = {call.source}
            if _is_cat(call.source):
                parts = {upstream for upstream, _ in call.source.next_functions if upstream is not None}
            return all(
                any(_reaches(reader, {part}, {call.sink}) for reader in readers[call.sink]) for part in parts
            )

        return [
            name
            for name, call in self.calls.items()
            if call.returns == "tensor"
            and isinstance(self._model.get_submodule(name.rpartition(".")[0]), _CONTAINERS[1:])
            and self.can_stand(name)
            and not any(name == other or _is_inside(name, other) for other in others)
            and call.sink in readers
            and all(map(_is_cat, readers[call.sink]))
            and beside(call)
        ]

    def shape_changing(self, others: Mapping[str, bool]) -> dict[str, bool]:
        """Blocks for a projection, beside the ``others``, which go by the identity or are cut out."""
        # The same class as a block: a block, wherever it stands and whatever it is made of.
        kinds = {type(self.calls[name].module) for name in others if name not in self.units} - {nn.Sequential}
        candidates = [name for name, call in self.calls.items() if call.projection and self.can_stand(name)]
        accepted: dict[str, bool] = {}
        for name in candidates:
            if any(_is_inside(name, outer) for outer in (*accepted, *others)):
                continue
            if any(_is_inside(inner, name) for inner in others):
                continue
            known = type(self.calls[name].module) in kinds
            if not known and self.is_container(name, (*candidates, *others)):
                continue
            residual = self.bypassed(name)
            if (known or residual or self.on_trunk(name)) and self.between_layers(name):
                accepted[name] = residual
        return self.without_parts(accepted, kinds, {_place(name) for name in (*accepted, *others)})


def _cuttable(scan: GroupScan, name: str, shape: tuple[int, ...]) -> tuple[Group, ...]:
    """The groups that all channels of a module's output, of this shape, are; none if others make them too."""
    leaving: list[Group] = []
    spare: dict[tuple[str, str], int] = {}
    for group in scan.groups:
        makers = [member for member in group.members if member.kind in PRODUCERS]
        readers = [member for member in group.members if not _is_inside(member.layer, name)]
        if not readers or not any(_is_inside(member.layer, name) for member in makers):
            continue
        if any(member in readers for member in makers):
            return ()  # something outside makes them as well
        leaving.append(group)
        for member in readers:
            left = spare.get((member.layer, member.kind), member.size) - sum(map(len, member.units))
            if left <= 0:
                return ()  # what reads them has no others
            spare[member.layer, member.kind] = left
    convolutional = any(member.kind == "conv_out" for group in leaving for member in group.members)
    width = shape[1 if convolutional else -1] if len(shape) > 1 else 0
    return tuple(leaving) if sum(group.size for group in leaving) == width else ()


def _own_channels(
    model: nn.Module, example_inputs: Inputs, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[Group, ...]]:
    """By name of a module those groups of channels that make up its output and that it alone makes."""
    if not shapes:
        return {}
    try:
        scan = find_groups(model, example_inputs)
    except GraphError:
        return {}
    found = {name: _cuttable(scan, name, shape) for name, shape in shapes.items()}
    return {name: groups for name, groups in found.items() if groups}


def find_blocks(model: nn.Module, example_inputs: Inputs, *, projections: bool = False) -> list[Block]:
    """Blocks that the identity or a projection can replace, or that can be cut out, in the order in which they run.

    The model (a copy of it, in evaluation mode) runs once under hooks. A block has children and parameters,
    is called once in the pass, takes a hidden state as its first tensor and gives one of the same shape and
    dtype back, alone or at the head of a tuple whose other items are None or arguments passed on. Among
    nested modules of that kind:

    - the outermost counts, unless everything that flows through it passes through such modules inside, which
      hold at least two thirds of its parameters: then it is only a container (a stage, an encoder) and they
      count. One of a row of modules of one class, whose parts are each of another class, is no container: a
      transformer layer made of an attention and an MLP with a residual sum each;
    - a block that its input does not bypass (no residual sum) counts only on the model's trunk, where
      everything between the model's inputs and outputs passes through it, and not if it holds modules that
      their inputs bypass: a stage of a U-Net that happens to keep the shape;
    - nothing counts inside a module of the same class as a block, and no block without a residual sum inside
      one at a like place (the same name but for numbers): the inner parts of the one bottleneck that changes
      the shape are no blocks when the other bottlenecks are.

    Two forms of blocks are no modules of that kind:

    - a unit, in plain stacks such as VGG: a convolution among the children of an ``nn.Sequential`` (or
      ``nn.ModuleDict``, ``nn.ModuleList``), and the children right behind it that hold no layer and keep its
      shape: norm, activation, dropout. Units lie on the trunk, between layers of the model, outside of other
      blocks. Nothing ties the channels of a unit's output to those of its input, so that the identity puts
      values there that the layers behind know nothing of, at full width as much as after stage 1, where only
      the numbers of channels have to agree; fine-tuning has to make up for it. With ``projections`` a unit
      goes for a projection, whatever the shapes, where that saves a third of its parameters;
    - a layer that is cut out: a child of an ``nn.ModuleDict`` or ``nn.ModuleList`` whose output is read by
      concatenations alone, which its input reaches around it as well, as in DenseNet, and whose channels it
      alone makes (:func:`idap.groups.find_groups`, which runs if there is such a child). All that reads the
      concatenation must have other channels besides.

    Args:
        projections: find blocks too whose output has another shape but the same rank and batch: with
            convolutions inside (B, C, *) with another C, each spatial size divided by a whole number (``out =
            ceil(in / stride)``; the example must be large enough to tell the stride), else (B, *, C) with
            another C. The rules of nesting are the same; a module of the same class as a block of the first
            kind is never a container or a branch. They lie between layers of the model (a stem and a head are
            none) and have at least half as many parameters again as the projection.

    Raises:
        InvalidInputError: if the model cannot be copied or the example inputs are of no known form.
    """
    search = _record(model, example_inputs)
    found = search.same_shape()
    found |= search.plain_units(found, search.keeps_shape)
    shapes = {name: shape for name in search.growing(found) if (shape := search.calls[name].shape_out)}
    channels = _own_channels(model, example_inputs, shapes)
    found |= dict.fromkeys(channels, False)
    if projections:
        found |= search.shape_changing(found)
        found |= search.plain_units(found, lambda name: search.calls[name].projection is not None)
    modules = dict(model.named_modules())
    blocks: list[Block] = []
    for name, call in search.calls.items():
        if name in found:
            assert call.shape_in is not None
            assert call.returns is not None
            module = modules[name]
            followers = search.units.get(name, ())
            projection = call.projection
            if projections and followers and projection is None:
                projection = _projection_of(module, call.shape_in, call.shape_in)
            blocks.append(
                Block(
                    name,
                    type(module).__name__,
                    call.shape_in,
                    sum(_size(modules[part]) for part in (name, *followers)),
                    found[name],
                    call.returns,
                    projection if projections and name not in channels else None,
                    tuple((follower, type(modules[follower]).__name__) for follower in followers),
                    channels.get(name, ()),
                )
            )
    return blocks


# ------------------------------------------------------------------------------------------------
# Removing them
# ------------------------------------------------------------------------------------------------


def block_filter_divergence(
    model: nn.Module, scores: Mapping[str, Tensor], blocks: Iterable[Block | str]
) -> dict[str, float]:
    """The mean divergence of the filters of each block: what blocks that go for projections are ranked by.

    There is no norm of a difference of two shapes to take, as :func:`idap.criteria.layer_divergence` does. Of a
    unit only its convolution has filters.

    Args:
        scores: per layer name, shape (output channels,), as :func:`idap.criteria.flow_divergence` gives them.
        blocks: blocks of :func:`find_blocks`, or names of modules.

    Returns:
        One number a block, in their order; blocks in which no layer has scores are left out.

    Raises:
        InvalidInputError: if the model has no module of that name.
    """
    modules = dict(model.named_modules())
    means: dict[str, float] = {}
    for block in blocks:
        name = block.name if isinstance(block, Block) else block
        if name not in modules:
            raise InvalidInputError(f"blocks: {name!r} is no module of {type(model).__name__}")
        own = [
            torch.as_tensor(score).double().flatten()
            for layer, score in scores.items()
            if layer == name or _is_inside(layer, name)
        ]
        if any(score.numel() for score in own):
            means[name] = float(torch.cat([score.cpu() for score in own]).mean())
    return means


def truncate_layers(
    model: nn.Module,
    divergences: Mapping[str, float],
    example_inputs: Inputs,
    *,
    count: int | None = None,
    macs: float | int | None = None,
    ignore: Ignore = (),
    verify: bool = True,
    projections: bool = False,
) -> PruningPlan:
    """Choose the blocks to replace by the identity or to cut out, lowest divergence first.

    ``model`` is not changed. Exactly one of ``count`` and ``macs`` is given. Ties: the block that runs first goes
    first.

    Args:
        divergences: per block name, as :func:`idap.criteria.layer_divergence` gives them, and
            :func:`block_filter_divergence` for blocks that change the shape. Blocks without one stay.
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
        count: number of blocks to remove.
        macs: multiply-accumulates to reach: a share of the present ones (float up to 1.0) or a count. The
            shortest prefix of the ranking that meets it is removed.
        ignore: blocks that stay: names or patterns, module classes, modules.
        verify: run the shortened model and check the form of its outputs; blocks without which the model does
            not run, because something else looks into them, are left alone.
        projections: blocks that change the shape may go too, for a projection, once all others are gone: the
            two kinds of divergence are of different units and are ranked apart. So may units, which then all go
            for projections. The projections of the pruned model begin at zero; :func:`fit_projections` fills
            them.

    Raises:
        InvalidInputError: for arguments out of range, or a name that is no module of the model.
        NonFiniteError: for a divergence that is NaN or infinite; names the block.
        TargetUnreachableError: if too few blocks can go; says how far the removal could go.
    """
    if (count is None) == (macs is None):
        raise InvalidInputError("got both count and macs or neither, wanted exactly one of them")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
        raise InvalidInputError(f"count: got {count!r}, wanted a whole number of blocks, 0 or more")
    if macs is not None:
        target_count("macs", macs, 1)
    if not isinstance(divergences, Mapping):
        raise InvalidInputError(
            f"divergences: got {type(divergences).__name__}, wanted a mapping from block names to numbers; "
            "pass layer_divergence(model, profile)"
        )
    modules = dict(model.named_modules())
    for name, value in divergences.items():
        if name not in modules:
            raise InvalidInputError(f"divergences: {name!r} is no module of {type(model).__name__}")
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidInputError(
                f"divergences[{name!r}]: got {type(value).__name__}, wanted one number a block; "
                "pass layer_divergence(model, profile)"
            ) from error
        if not math.isfinite(number):
            raise NonFiniteError(f"divergences[{name!r}]: got {number}, wanted a finite number")
    covered = resolve_ignore(model, ignore)
    ranked: list[tuple[bool, float, int, Block]] = []
    skipped: list[Skipped] = []
    found = find_blocks(model, example_inputs, projections=projections)
    for order, block in enumerate(found):
        if any(name in covered for name in block.names):
            skipped.append(Skipped(block.name, 1, "ignored on request"))
        elif block.name not in divergences:
            skipped.append(Skipped(block.name, 1, "no divergence given"))
        else:
            ranked.append((block.projection is not None, float(divergences[block.name]), order, block))
    names = {block.name for block in found}
    for name in divergences:
        if name not in names:
            stand_in = "neither the identity nor a projection can" if projections else "the identity cannot"
            skipped.append(Skipped(name, 1, f"{stand_in} stand in for it"))
    ranked.sort(key=lambda item: item[:3])
    before = _plan.measure(model, example_inputs)

    def plan_of(chosen: list[Block]) -> PruningPlan:
        return PruningPlan(type(model).__name__, _steps(chosen), before, None, tuple(skipped))

    def macs_of(chosen: list[Block]) -> int:
        shortened = plan_of(chosen).apply(model)
        try:
            return complexity.count_macs(shortened, example_inputs)
        except Exception as error:
            raise SurgeryError(
                f"{type(model).__name__} without {len(chosen)} blocks raised: {error}"
            ) from error

    def choose() -> list[Block]:
        blocks = [block for *_, block in ranked]
        if count is not None:
            if count > len(blocks):
                raise TargetUnreachableError(
                    f"count={count} blocks asked for, {len(blocks)} of {type(model).__name__} can go "
                    f"({len(skipped)} left alone)"
                )
            return blocks[:count]
        assert before.macs is not None
        assert macs is not None
        wanted = target_count("macs", macs, before.macs)
        reachable = macs_of(blocks)
        if reachable > wanted:
            raise TargetUnreachableError(
                f"macs={macs!r} asks for {wanted:,}, with all {len(blocks)} blocks gone {reachable:,} are "
                f"left ({100 * reachable / before.macs:.1f} % of {before.macs:,})"
            )
        return blocks[: bisect_left(range(len(blocks) + 1), -wanted, key=lambda n: -macs_of(blocks[:n]))]

    while True:
        for at, reason in reversed(_conflicts([block for *_, block in ranked])):
            skipped.append(Skipped(ranked.pop(at)[-1].name, 1, reason))
        try:
            plan = plan_of(choose())
            pruned = _applied(plan, model, example_inputs) if verify else plan.apply(model)
            return replace(plan, after=_plan.measure(pruned, example_inputs))
        except SurgeryError:
            # Some containers look into their blocks; find out which of them must stay.
            broken = [(item, why) for item in ranked if (why := _obstacle(model, item[-1], example_inputs))]
            if not broken:
                raise
            for item, why in broken:
                ranked.remove(item)
                skipped.append(Skipped(item[-1].name, 1, why))


def _steps(chosen: Sequence[Block]) -> tuple[Step, ...]:
    """The steps that remove these blocks: they themselves, then the channels of those that are cut out."""
    if not chosen:
        return ()
    removals = (
        BlockRemoval(b.name, b.type, b.returns, b.projection, b.followers, bool(b.channels)) for b in chosen
    )
    blocks = BlockStep(tuple(removals))
    gone = _plan.channel_step([(group, range(group.size)) for block in chosen for group in block.channels])
    left = tuple(r for r in gone.removals if not any(block.holds(r.layer) for block in chosen))
    return (blocks, ChannelStep(left)) if left else (blocks,)


def _conflicts(blocks: Sequence[Block]) -> list[tuple[int, str]]:
    """Blocks of a ranking that cannot go after those before them: their places, and why."""
    found: list[tuple[int, str]] = []
    going: list[Block] = []
    left: dict[tuple[str, str], int] = {}
    for at, block in enumerate(blocks):
        why: str | None = None
        lost: dict[tuple[str, str], int] = {}
        for member in (member for group in block.channels for member in group.members):
            owner = next((b for b in (block, *going) if b.holds(member.layer)), None)
            if owner is None:
                side = member.layer, member.kind
                lost[side] = lost.get(side, 0) + sum(map(len, member.units))
                left.setdefault(side, member.size)
                if lost[side] >= left[side]:
                    why = f"{member.layer} would have no channel left to read"
            elif not owner.channels:
                why = f"{owner.name}, which goes too, reads its channels: remove it after that"
        if not block.channels:
            for other in going:
                if any(block.holds(member.layer) for group in other.channels for member in group.members):
                    why = f"it reads channels of {other.name}, which goes too: remove it after that"
        if why is None:
            going.append(block)
            for side, count in lost.items():
                left[side] -= count
        else:
            found.append((at, why))
    return found


# Relative difference above which what is left of a model does not compute what it should.
_CLEARLY = 1e-3


def _applied(plan: PruningPlan, model: nn.Module, example_inputs: Inputs) -> nn.Module:
    """What the plan makes of the model, checked; see :meth:`PruningPlan.apply`.

    Raises:
        SurgeryError: also if cutting blocks out does more than to set what they gave to zero, such as in a
            container that counts its children.
    """
    if not any(
        removal.cut for step in plan.steps if isinstance(step, BlockStep) for removal in step.removals
    ):
        return plan.apply(model, example_inputs)
    pruned, error = _plan.apply_and_compare(plan, model, example_inputs)
    if not error <= _CLEARLY:
        raise SurgeryError(
            f"{type(model).__name__} does not compute the same without {', '.join(plan.removed_blocks)} as with "
            f"their outputs at zero (relative difference {error:.1e}); the model is unchanged"
        )
    return pruned


def _obstacle(model: nn.Module, block: Block, example_inputs: Inputs) -> str | None:
    """Why the model does not run without this one block; None if it does."""
    try:
        _applied(PruningPlan(type(model).__name__, _steps([block])), model, example_inputs)
    except SurgeryError as error:
        return f"its removal breaks the model: {error}"
    return None


# ------------------------------------------------------------------------------------------------
# Fitting projections
# ------------------------------------------------------------------------------------------------

# Elements of a slice that is widened to float64 at a time: 32 MiB.
_SLICE = 1 << 22


@dataclass(frozen=True)
class _Moments:
    """Counts, means and centred second moments of rows ``x`` (N, inputs) and ``y`` (N, outputs), in float64.

    Attributes:
        count: N, shape ().
        mean_x, mean_y: (inputs,), (outputs,).
        xx: sum of ``(x - mean_x)ᵀ (x - mean_x)``, (inputs, inputs).
        xy: sum of ``(x - mean_x)ᵀ (y - mean_y)``, (inputs, outputs).
        yy: sum of ``‖y - mean_y‖²``, shape ().
    """

    count: Tensor
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> _Moments:
        step = max(1, _SLICE // (x.shape[1] + y.shape[1]))
        parts = (cls._of_slice(a, b) for a, b in zip(x.split(step), y.split(step), strict=True))
        moments = next(parts)
        for part in parts:
            moments = moments.merge(part)
        return moments

    @classmethod
    def _of_slice(cls, x: Tensor, y: Tensor) -> _Moments:
        if x.device.type == "mps":  # which has no float64
            x, y = x.cpu(), y.cpu()
        x, y = x.double(), y.double()
        mean_x, mean_y = x.mean(0), y.mean(0)
        x, y = x - mean_x, y - mean_y
        return cls(mean_x.new_tensor(len(x)), mean_x, mean_y, x.T @ x, x.T @ y, y.square().sum())

    @classmethod
    def empty(cls, projection: Projection, device: torch.device | str) -> _Moments:
        def zeros(*sizes: int) -> Tensor:
            return torch.zeros(sizes, dtype=torch.float64, device=device)

        ins, outs = projection.inputs, projection.outputs
        return cls(zeros(), zeros(ins), zeros(outs), zeros(ins, ins), zeros(ins, outs), zeros())

    def merge(self, other: _Moments) -> _Moments:
        """The moments of both sets of rows (Chan, Golub & LeVeque, 1983)."""
        count = self.count + other.count
        share = other.count / count.clamp_min(1)
        mean_x = self.mean_x + (other.mean_x - self.mean_x) * share
        mean_y = self.mean_y + (other.mean_y - self.mean_y) * share
        mine, theirs = self.about(mean_x, mean_y), other.about(mean_x, mean_y)
        return _Moments(count, mean_x, mean_y, *(a + b for a, b in zip(mine, theirs, strict=True)))

    def about(self, mean_x: Tensor, mean_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``xx``, ``xy`` and ``yy`` about other means."""
        dx, dy = self.mean_x - mean_x, self.mean_y - mean_y
        return (
            self.xx + self.count * dx.outer(dx),
            self.xy + self.count * dx.outer(dy),
            self.yy + self.count * dy.dot(dy),
        )

    def is_finite(self) -> bool:
        # A NaN or an infinity anywhere in a column is one in its mean, and so in the sum of the means.
        return bool(torch.isfinite(self.mean_x.sum() + self.mean_y.sum() + self.xx.trace() + self.yy))

    def solve(self, ridge: float) -> tuple[Tensor, Tensor, float]:
        """Weight (outputs, inputs), bias (outputs,) and relative residual of the least-squares fit.

        The smallest of all solutions if there are several, as with dead channels.
        """
        xx, xy = self.xx.cpu(), self.xy.cpu()
        values, vectors = torch.linalg.eigh(xx)
        present = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
        damped = values + ridge * xx.trace() / len(xx)
        inverse = torch.where(present, 1 / torch.where(present, damped, 1), 0)
        weight = vectors @ (inverse[:, None] * (vectors.T @ xy))
        mean_x, mean_y = self.mean_x.cpu(), self.mean_y.cpu()
        left = self.yy.cpu() - 2 * (weight * xy).sum() + (weight * (xx @ weight)).sum()
        scale = self.yy.cpu() + self.count.cpu() * mean_y.dot(mean_y)
        residual = math.sqrt(max(float(left / scale), 0.0)) if scale > 0 else 0.0
        return weight.T, mean_y - mean_x @ weight, residual


def _rows(hidden: Tensor, projection: Projection) -> Tensor:
    """(B, C, *) or (B, *, C) as (N, C)."""
    return hidden.flatten(0, -2) if projection.kind == "linear" else hidden.movedim(1, -1).flatten(0, -2)


class ProjectionFit:
    """Least squares between the inputs and the outputs of the blocks that a plan replaces by projections.

    Batches are read one after the other; what is kept of them are, for each block, the second moments
    (inputs + 1) x (inputs + outputs) in float64, and no activation.

    Args:
        plan: may hold other steps; its projections must be in the widths of the model that :meth:`update` gets.

    Raises:
        InvalidInputError: if channels go in a step before a projection, so that no model has both.
    """

    def __init__(self, plan: PruningPlan) -> None:
        if not isinstance(plan, PruningPlan):
            raise InvalidInputError(f"plan: got {type(plan).__name__}, wanted a PruningPlan")
        self.plan = plan
        self._projections: dict[str, Projection] = {}
        self._last: dict[str, str] = {}
        self._moments: dict[str, _Moments] = {}
        narrowed = False
        for step in plan.steps:
            if not isinstance(step, BlockStep):
                narrowed = True
                continue
            own = {r.name: r.projection for r in step.removals if r.projection is not None}
            self._last |= {r.name: r.modules[-1][0] for r in step.removals}
            if own and narrowed:
                raise InvalidInputError(
                    f"{next(iter(own))}: the plan removes channels before it puts a projection there; pass the "
                    "plan of the blocks alone, and the model that it was made on"
                )
            self._projections |= own

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks that get a projection."""
        return tuple(self._projections)

    def update(self, model: nn.Module, batch: Inputs) -> None:
        """Run ``model``, which still has the blocks, on one batch; it is left as it was.

        Raises:
            PlanMismatchError: if the plan was made for another model.
            InvalidInputError: if a block gives another shape than the plan says.
            NonFiniteError: if activations are NaN or infinite; names the block. The batch does not count.
            ForwardError: if the model raises.
        """
        self.plan.check(model)
        entering: dict[str, tuple[tuple[int, ...], Tensor]] = {}
        seen: dict[str, _Moments] = {}
        odd: dict[str, str] = {}
        firsts = {model.get_submodule(name): name for name in self._projections}
        lasts = {model.get_submodule(self._last[name]): name for name in self._projections}

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            name = firsts[module]
            projection = self._projections[name]
            hidden = _inputs.first_tensor(args)
            hidden = _inputs.first_tensor(kwargs) if hidden is None else hidden
            if hidden is None:
                return
            shape = tuple(hidden.shape)
            if projection.stride:
                picks = (slice(None), slice(None), *(slice(None, None, step) for step in projection.stride))
                hidden = hidden[picks]
            # Copied, since the block may write into its input.
            entering[name] = shape, _rows(hidden, projection).clone()

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            name = lasts[module]
            projection = self._projections[name]
            hidden = _inputs.first_tensor(output)
            shape, x = entering.pop(name, ((), None))
            if x is None or hidden is None:
                odd[name] = "takes or gives no tensor"
            elif x.shape[1] != projection.inputs or projection.output_shape(shape) != tuple(hidden.shape):
                odd[name] = (
                    f"takes {shape} and gives {tuple(hidden.shape)}, the plan has {projection.inputs} to "
                    f"{projection.outputs} channels, stride {projection.stride}"
                )
            else:
                moments = _Moments.of(x, _rows(hidden, projection))
                seen[name] = seen[name].merge(moments) if name in seen else moments

        handles: list[Any] = []
        try:
            for module in firsts:
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            for module in lasts:
                handles.append(module.register_forward_hook(after))
            with _inputs.evaluating(model), torch.no_grad():
                _inputs.call(model, _inputs.to_model(batch, model))
        except InvalidInputError:
            raise
        except Exception as error:
            raise ForwardError(
                f"{type(model).__name__} raised {type(error).__name__} on a batch for the projections: {error}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        for name in self._projections:
            if name in odd:
                raise InvalidInputError(
                    f"{name}: {odd[name]}; pass the model that the plan was made on, and inputs like its example"
                )
            if name not in seen:
                raise InvalidInputError(
                    f"{name}: did not run on this batch, so that nothing can be fitted to it"
                )
            if not seen[name].is_finite():
                raise NonFiniteError(
                    f"{name}: its input or output is NaN or infinite on this batch, wanted finite numbers"
                )
        for name, moments in seen.items():
            self._moments[name] = self._moments[name].merge(moments) if name in self._moments else moments

    def merge(self, other: ProjectionFit) -> ProjectionFit:
        """The fit of the batches of both.

        Raises:
            InvalidInputError: if the fits are of different blocks.
        """
        if self._projections != other._projections:
            raise InvalidInputError(f"the fits are of different blocks: {self.blocks} and {other.blocks}")
        merged = ProjectionFit(self.plan)
        merged._moments = dict(self._moments)
        for name, moments in other._moments.items():
            mine = merged._moments.get(name)
            merged._moments[name] = moments if mine is None else mine.merge(moments)
        return merged

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> ProjectionFit:
        """The fit of the batches of all processes of ``group``, the same on each; a process may have had none.

        Raises:
            InvalidInputError: torch.distributed is not initialised.
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise InvalidInputError("all_reduce needs torch.distributed.init_process_group() first")
        on_gpu = dist.get_backend(group) == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

        def total(*tensors: Tensor) -> list[Tensor]:
            flat = torch.cat([tensor.to(device).flatten() for tensor in tensors])
            dist.all_reduce(flat, group=group)
            sizes = [tensor.numel() for tensor in tensors]
            return [part.view(t.shape) for part, t in zip(flat.split(sizes), tensors, strict=True)]

        reduced = ProjectionFit(self.plan)
        for name, projection in self._projections.items():
            own = self._moments.get(name) or _Moments.empty(projection, device)
            count, sum_x, sum_y = total(own.count, own.count * own.mean_x, own.count * own.mean_y)
            if not count > 0:
                continue
            mean_x, mean_y = sum_x / count, sum_y / count
            here = own.about(mean_x.to(own.xx.device), mean_y.to(own.xx.device))
            reduced._moments[name] = _Moments(count, mean_x, mean_y, *total(*here))
        return reduced

    def solve(self, *, ridge: float = 1e-6) -> dict[str, tuple[Tensor, Tensor, float]]:
        """Weight (outputs, inputs) and bias (outputs,) in float64 on the CPU, and relative residual, by block.

        They minimise ``‖Y − X Wᵀ − b‖²_F + λ‖W‖²_F`` with ``λ = ridge`` times the mean over channels of the
        summed squared deviations of ``X``; the residual is ``‖Y − X Wᵀ − b‖_F / ‖Y‖_F``.

        Args:
            ridge: 0 for plain least squares, of which the smallest solution is taken.

        Raises:
            InvalidInputError: if ``ridge`` is negative or not finite.
            EmptyDataError: if there was no batch.
        """
        if isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or not 0 <= ridge < math.inf:
            raise InvalidInputError(f"ridge: got {ridge!r}, wanted a number, 0 or more")
        if self._projections.keys() - self._moments.keys():
            raise EmptyDataError("there is no batch to fit projections to")
        return {name: self._moments[name].solve(ridge) for name in self._projections}

    def write(self, pruned: nn.Module, *, ridge: float = 1e-6) -> dict[str, float]:
        """Solve, and put the weights into ``pruned``; gives the relative residuals, see :meth:`solve`.

        Raises:
            InvalidInputError, EmptyDataError: as :meth:`solve`.
            PlanMismatchError: if ``pruned`` is not what the plan makes.
        """
        layers = {name: _projection_layer(pruned, name, p) for name, p in self._projections.items()}
        residuals: dict[str, float] = {}
        with torch.no_grad():
            for name, (weight, bias, residual) in self.solve(ridge=ridge).items():
                parameters = dict(layers[name].named_parameters())
                parameters["weight"].copy_(weight.reshape(parameters["weight"].shape))
                parameters["bias"].copy_(bias)
                residuals[name] = residual
        return residuals


def _projection_layer(pruned: nn.Module, name: str, projection: Projection) -> nn.Module:
    try:
        block = pruned.get_submodule(name)
    except AttributeError:
        block = None
    wanted = (projection.outputs, projection.inputs)
    if not isinstance(block, ProjectionBlock):
        raise PlanMismatchError(
            f"{name}: wanted the ProjectionBlock that the plan puts there, got {type(block).__name__}; pass what "
            "plan.apply(model) gave"
        )
    shape = next(tuple(p.shape[:2]) for p in block.projection.parameters())
    if shape != wanted:
        raise PlanMismatchError(
            f"{name}: the plan puts a projection of {wanted} channels (out, in) there, the model has {shape}"
        )
    return block.projection


def fit_projections(
    model: nn.Module,
    pruned: nn.Module,
    plan: PruningPlan,
    batches: Iterable[Any],
    *,
    ridge: float = 1e-6,
) -> dict[str, float]:
    """Fill the projections of ``pruned`` by least squares: each learns what its block did in ``model``.

    ``model`` runs over the batches once, in evaluation mode; :class:`ProjectionFit` does the work, and can be
    shared out over processes. The result does not depend on random numbers.

    Args:
        model: the one that ``plan`` was made on, which still has the blocks; left as it is.
        pruned: ``plan.apply(model)``, or a model with the same projections; changed in place.
        batches: inputs of the model: tensors, tuples of positional arguments, mappings of keyword arguments.
        ridge: see :meth:`ProjectionFit.solve`.

    Returns:
        The relative residual ``‖Y − Ŷ‖_F / ‖Y‖_F`` of each projection, by the name of its block; empty, without
        reading a batch, if the plan has none.

    Raises:
        InvalidInputError: for a wrong ``ridge``, batches of no known form or other shapes than the plan says.
        EmptyDataError: if there is no batch.
        NonFiniteError: if activations are NaN or infinite; names the block.
        ForwardError: if the model raises.
        PlanMismatchError: if ``model`` or ``pruned`` is none of this plan.
    """
    fit = ProjectionFit(plan)
    if not fit.blocks:
        return {}
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise InvalidInputError(
            f"batches: got {type(batches).__name__}, wanted an iterable of batches: pass [batch] for one"
        )
    for name in fit.blocks:
        _projection_layer(pruned, name, fit._projections[name])
    for batch in batches:
        fit.update(model, batch)
    return fit.write(pruned, ridge=ridge)
