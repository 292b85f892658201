"""Stage 2: blocks that the identity can stand in for, found by running the model, and their removal."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import complexity
from . import inputs as _inputs
from . import plan as _plan
from .errors import InvalidInputError, NonFiniteError, SurgeryError, TargetUnreachableError
from .groups import Ignore, Skipped, resolve_ignore
from .inputs import Inputs
from .plan import BlockRemoval, BlockStep, IdentityBlock, PruningPlan, Returns, target_count

__all__ = ["Block", "IdentityBlock", "find_blocks", "truncate_layers"]


@dataclass(frozen=True)
class Block:
    """A module that the identity can replace.

    Attributes:
        name: qualified module name.
        type: class name of the module.
        shape: shape of its hidden state, the same going in and coming out.
        params: number of parameters inside.
        residual: its input reaches its output around the layers inside.
        returns: ``"tensor"``, or how each further item of the returned tuple is made
            (see :class:`IdentityBlock`).
    """

    name: str
    type: str
    shape: tuple[int, ...]
    params: int
    residual: bool
    returns: Returns = "tensor"


@dataclass
class _Call:
    """What the hooks saw of one module."""

    module: nn.Module
    shape_in: tuple[int, ...] | None
    source: Any
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    count: int = 1
    sink: Any = None
    returns: Returns | None = None
    obstacle: str | None = None


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


def _record(model: nn.Module, example_inputs: Inputs) -> tuple[dict[str, _Call], list[Any], set[Any]]:
    """Run a copy of ``model`` once: calls by module name, autograd nodes of its outputs and of its inputs."""
    duplicate = _inputs.tracing_copy(model)
    names = {module: name for name, module in duplicate.named_modules()}
    calls: dict[str, _Call] = {}
    origins: set[Any] = set()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = names[module]
        if name in calls:
            calls[name].count += 1
            return
        hidden = _inputs.first_tensor(args)
        hidden = _inputs.first_tensor(kwargs) if hidden is None else hidden
        shape = None if hidden is None else tuple(hidden.shape)
        calls[name] = _Call(module, shape, None if hidden is None else hidden.grad_fn, (args, kwargs))

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = calls[names[module]]
        if call.count > 1:
            call.obstacle = "called more than once in a pass"
            return
        entering = _inputs.first_tensor(args)
        entering = _inputs.first_tensor(kwargs) if entering is None else entering
        if entering is None:
            call.obstacle = "takes no tensor"
            return
        leaving, call.returns, call.obstacle = _describe_output(call, entering, output)
        call.arguments = ((), {})
        if leaving is None:
            return
        call.sink = leaving.grad_fn
        if isinstance(module, nn.Embedding):
            origins.add(leaving.grad_fn)
        if tuple(leaving.shape) != call.shape_in or leaving.dtype != entering.dtype:
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
    return calls, sinks, origins


def _is_inside(name: str, parent: str) -> bool:
    return name != parent and (parent == "" or name.startswith(parent + "."))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _place(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def find_blocks(model: nn.Module, example_inputs: Inputs) -> list[Block]:
    """Blocks that the identity can replace, in the order in which they run.

    The model (a copy of it, in evaluation mode) runs once under hooks. A block has children and parameters,
    is called once in the pass, takes a hidden state as its first tensor and gives one of the same shape and
    dtype back, alone or at the head of a tuple whose other items are None or arguments passed on. Among
    nested modules of that kind:

    - the outermost counts, unless everything that flows through it passes through such modules inside, which
      hold at least two thirds of its parameters: then it is only a container (a stage, an encoder) and they count;
    - a block that its input does not bypass (no residual sum) counts only on the model's trunk, where
      everything between the model's inputs and outputs passes through it;
    - nothing counts inside a module of the same class as a block, and no block without a residual sum inside
      one at a like place (the same name but for numbers): the inner parts of the one bottleneck that changes
      the shape are no blocks when the other bottlenecks are.

    Raises:
        InvalidInputError: if the model cannot be copied or the example inputs are of no known form.
    """
    calls, outputs, origins = _record(model, example_inputs)
    children: dict[str, list[str]] = {name: [] for name in calls}
    layers = [
        (name, call.sink)
        for name, call in calls.items()
        if not any(True for _ in call.module.children())
        and any(p.dim() >= 2 for p in call.module.parameters())
    ]
    candidates: list[str] = []
    for name, call in calls.items():
        fits = name != "" and call.obstacle is None and call.sink is not None and call.source is not None
        if fits and call.count == 1 and any(_is_inside(layer, name) for layer, _ in layers):
            candidates.append(name)
    # Modules that no call was seen of (ModuleList) are transparent here: nesting goes by name.
    for name in candidates:
        owner = name
        while owner:
            owner = owner.rpartition(".")[0]
            if owner in children:
                children[owner].append(name)

    def is_container(name: str) -> bool:
        call = calls[name]
        cuts: list[str] = []
        for inner in children[name]:
            if any(_is_inside(inner, outer) for outer in cuts):
                continue
            if not _reaches(call.sink, {call.source}, {calls[inner].sink}):
                cuts.append(inner)
        # An attention with its own sum inside a layer with another one cuts it too, but is the lesser part.
        return bool(cuts) and 3 * sum(_size(calls[inner].module) for inner in cuts) >= 2 * _size(call.module)

    def bypassed(name: str) -> bool:
        call = calls[name]
        inside = {sink for layer, sink in layers if _is_inside(layer, name) and sink is not None}
        return _reaches(call.sink, {call.source}, inside, gates=False)

    def on_trunk(name: str) -> bool:
        return not any(_reaches(sink, origins, {calls[name].sink}) for sink in outputs)

    accepted: dict[str, bool] = {}
    for name in candidates:
        if any(_is_inside(name, outer) for outer in accepted) or is_container(name):
            continue
        residual = bypassed(name)
        if residual or on_trunk(name):
            accepted[name] = residual
    modules = dict(model.named_modules())
    kinds = {type(modules[name]) for name in accepted}
    places = {_place(name) for name in accepted}
    blocks: list[Block] = []
    for name, residual in accepted.items():
        owners = [name[:i] for i, letter in enumerate(name) if letter == "."]
        if any(
            type(modules[owner]) in kinds or (not residual and _place(owner) in places) for owner in owners
        ):
            continue
        call = calls[name]
        assert call.shape_in is not None
        assert call.returns is not None
        module = modules[name]
        params = _size(module)
        blocks.append(Block(name, type(module).__name__, call.shape_in, params, residual, call.returns))
    return blocks


def truncate_layers(
    model: nn.Module,
    divergences: Mapping[str, float],
    example_inputs: Inputs,
    *,
    count: int | None = None,
    macs: float | int | None = None,
    ignore: Ignore = (),
    verify: bool = True,
) -> PruningPlan:
    """Choose the blocks to replace by the identity, lowest divergence first; ``model`` is not changed.

    Exactly one of ``count`` and ``macs`` is given. Ties: the block that runs first goes first.

    Args:
        divergences: per block name, as :func:`idap.criteria.layer_divergence` gives them. Blocks without one
            stay.
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
        count: number of blocks to remove.
        macs: multiply-accumulates to reach: a share of the present ones (float up to 1.0) or a count. The
            shortest prefix of the ranking that meets it is removed.
        ignore: blocks that stay: names or patterns, module classes, modules.
        verify: run the shortened model and check the form of its outputs; blocks without which the model does
            not run, because something else looks into them, are left alone.

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
    ranked: list[tuple[float, int, Block]] = []
    skipped: list[Skipped] = []
    found = find_blocks(model, example_inputs)
    for order, block in enumerate(found):
        if block.name in covered:
            skipped.append(Skipped(block.name, 1, "ignored on request"))
        elif block.name not in divergences:
            skipped.append(Skipped(block.name, 1, "no divergence given"))
        else:
            ranked.append((float(divergences[block.name]), order, block))
    names = {block.name for block in found}
    for name in divergences:
        if name not in names:
            skipped.append(Skipped(name, 1, "the identity cannot stand in for it"))
    ranked.sort(key=lambda item: item[:2])
    before = _plan.measure(model, example_inputs)

    def plan_of(chosen: list[Block]) -> PruningPlan:
        step = BlockStep(tuple(BlockRemoval(block.name, block.type, block.returns) for block in chosen))
        steps = (step,) if chosen else ()
        return PruningPlan(type(model).__name__, steps, before, None, tuple(skipped))

    def macs_of(chosen: list[Block]) -> int:
        shortened = plan_of(chosen).apply(model)
        try:
            return complexity.count_macs(shortened, example_inputs)
        except Exception as error:
            raise SurgeryError(
                f"{type(model).__name__} without {len(chosen)} blocks raised: {error}"
            ) from error

    def choose() -> list[Block]:
        blocks = [block for _, _, block in ranked]
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
        try:
            plan = plan_of(choose())
            pruned = plan.apply(model, example_inputs if verify else None)
            return replace(plan, after=_plan.measure(pruned, example_inputs))
        except SurgeryError:
            # Some containers look into their blocks; find out which of them must stay.
            broken = [(item, why) for item in ranked if (why := _obstacle(model, item[2], example_inputs))]
            if not broken:
                raise
            for item, why in broken:
                ranked.remove(item)
                skipped.append(Skipped(item[2].name, 1, why))


def _obstacle(model: nn.Module, block: Block, example_inputs: Inputs) -> str | None:
    """Why the model does not run without this one block; None if it does."""
    step = BlockStep((BlockRemoval(block.name, block.type, block.returns),))
    try:
        PruningPlan(type(model).__name__, (step,)).apply(model, example_inputs)
    except SurgeryError as error:
        return f"its removal breaks the model: {error}"
    return None
