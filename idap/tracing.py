"""Channels followed through one traced forward pass.

The autograd graph of the model's outputs, with hooks that tell which part of it is which layer. Every axis of
every tensor on the way of a prunable channel is followed through the operations, with the exact sizes
autograd saved: views, permutations, concatenations, splits, broadcasts, contractions. What cannot be followed
is noted, never guessed. The work is linear in the size of the graph.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from . import inputs as _inputs
from .adapters.detection import REGION_POOLING
from .adapters.shuffle import ShuffleUnit
from .errors import GraphError, GraphTimeoutError, InvalidInputError
from .inputs import Inputs
from .profile import is_linear, is_transposed_linear

Indices: TypeAlias = "NDArray[np.int64]"
INEXACT = "removal is not exact"
_TAKEN = "takes its positions by number"

# ------------------------------------------------------------------------------------------------
# The traced pass
# ------------------------------------------------------------------------------------------------

# A tensor of the traced pass: the autograd node that made it and which of the node's outputs it is.
_Edge: TypeAlias = "tuple[Any, int]"
# An axis: of a tensor (edge, dimension), of a side of a layer (kind, name), or of a parameter.
Axis: TypeAlias = "tuple[Any, ...]"
# The part of an axis that carries channels: (slower positions, channels, faster positions), whose product is
# the length of the axis. Batch times heads is (batch, heads, 1).
_Span: TypeAlias = "tuple[int, int, int]"
# How the elements of two axes correspond; None: one to one.
_Pairs: TypeAlias = "Callable[[], tuple[Indices, Indices]] | None"


@dataclass
class _LayerCall:
    name: str
    module: nn.Module
    sources: list[_Edge]
    source_shapes: list[tuple[int, ...]]
    sink: _Edge
    sink_shape: tuple[int, ...]


@dataclass
class _Operation:
    node: Any
    name: str
    sources: list[_Edge | None]
    shapes: list[tuple[int, ...] | None]
    results: list[tuple[int, ...]]


@dataclass
class Trace:
    layers: dict[_Edge, _LayerCall] = field(default_factory=dict)
    operations: dict[Any, _Operation] = field(default_factory=dict)
    parameters: dict[Any, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    consumers: dict[_Edge, list[tuple[Any, int]]] = field(default_factory=dict)
    outputs: list[tuple[_Edge, tuple[int, ...]]] = field(default_factory=list)
    inputs: set[_Edge] = field(default_factory=set)
    order: dict[str, int] = field(default_factory=dict)


class Deadline:
    def __init__(self, seconds: float) -> None:
        if not seconds > 0:
            raise InvalidInputError(f"time_limit: got {seconds!r}, wanted a number of seconds above 0")
        self.seconds = seconds
        self.end = time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self.end:
            raise GraphTimeoutError(
                f"finding the coupled channels took longer than time_limit={self.seconds:g} s; raise it, "
                "use smaller example inputs, or name layers in `ignore` and prune the model in parts"
            )


def is_frozen_bn(module: nn.Module) -> bool:
    names = ("weight", "bias", "running_mean", "running_var")
    return "FrozenBatchNorm" in type(module).__name__ and all(name in module._buffers for name in names)


_OPAQUE = (nn.MultiheadAttention, nn.RNNBase)
_LAYER_TYPES: tuple[type[nn.Module], ...] = (
    _ConvNd, nn.Linear, _BatchNorm, nn.LayerNorm, nn.GroupNorm, _InstanceNorm, nn.PReLU, nn.Embedding,
    *_OPAQUE,
)  # fmt: skip


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, _LAYER_TYPES) or is_frozen_bn(module) or is_transposed_linear(module)


def _makes_channels(module: nn.Module) -> bool:
    return isinstance(module, (_ConvNd, nn.Embedding)) or is_linear(module)


def _shape(edge: _Edge) -> tuple[int, ...]:
    node, position = edge
    return tuple(int(size) for size in node._input_metadata[position].shape)


def _edge(tensor: Tensor) -> _Edge:
    return tensor.grad_fn, tensor.output_nr


def trace_model(model: nn.Module, example_inputs: Inputs, deadline: Deadline) -> Trace:
    """Run a copy on the CPU and lay its autograd graph out with layers in place of what they did inside."""
    trace = Trace()
    names = {module: name for name, module in model.named_modules()}
    parameter_names = {parameter: name for name, parameter in model.named_parameters()}

    opaque = 0  # modules with layers inside that are taken as a whole, and run now

    def before(module: nn.Module, args: Any) -> None:
        nonlocal opaque
        deadline.check()
        opaque += isinstance(module, _OPAQUE)

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal opaque
        opaque -= isinstance(module, _OPAQUE)
        result = _inputs.first_tensor(output)
        if opaque or result is None or result.grad_fn is None:
            return
        arguments = [
            tensor for _, tensor in _inputs.named_tensors((args, kwargs)) if tensor.grad_fn is not None
        ]
        results = [result]
        if isinstance(module, _OPAQUE):
            results = [tensor for _, tensor in _inputs.named_tensors(output) if tensor.grad_fn is not None]
        else:
            arguments = arguments[:1]
        name = names[module]
        trace.order.setdefault(name, len(trace.order))
        sources, shapes = (
            [_edge(tensor) for tensor in arguments],
            [tuple(tensor.shape) for tensor in arguments],
        )
        if isinstance(module, ShuffleUnit):
            # What it does inside is followed; the layer of this name is the shuffle at its end.
            cat = result.grad_fn.next_functions[0]
            if module.split is None:
                sources, shapes = [], []
            sources, shapes = [cat, *sources], [_shape(cat), *shapes]
        for tensor in results:
            call = _LayerCall(name, module, sources, shapes, _edge(tensor), tuple(tensor.shape))
            trace.layers[call.sink] = call

    def attach(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        moved = tensor.detach().requires_grad_(True).clone()
        trace.inputs.add(_edge(moved))
        return moved

    handles: list[Any] = []
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(before))
            if _is_layer(module) or isinstance(module, ShuffleUnit):
                handles.append(module.register_forward_hook(after, with_kwargs=True))
        # Fused attention is one node of the graph; the plain one is made of products and a softmax.
        with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            output = _inputs.call(
                model, _inputs.map_tensors(_inputs.without_inference(example_inputs), attach)
            )
    finally:
        for handle in handles:
            handle.remove()
    tensors = [tensor for _, tensor in _inputs.named_tensors(output) if tensor.grad_fn is not None]
    if not tensors:
        raise GraphError(
            f"{type(model).__name__} returned no tensor that depends on its parameters, so that no "
            "channels can be followed; check that its forward pass does not detach or disable gradients"
        )
    trace.outputs = [(_edge(tensor), tuple(tensor.shape)) for tensor in tensors]
    # Layers whose results are detached later (proposals of a detector) read channels as well.
    stack = list(dict.fromkeys([*(edge for edge, _ in trace.outputs), *trace.layers]))
    seen: set[_Edge] = set(stack)
    count = 0

    def follow(consumer: Any, position: int, source: _Edge | None) -> None:
        if source is None:
            return
        trace.consumers.setdefault(source, []).append((consumer, position))
        if source not in seen:
            seen.add(source)
            stack.append(source)

    done: set[Any] = set()
    while stack:
        count += 1
        if count % 256 == 0:
            deadline.check()
        edge = stack.pop()
        node = edge[0]
        call = trace.layers.get(edge)
        if call is not None:
            for position, source in enumerate(call.sources):
                follow(call, position, source)
            continue
        if node in done or edge in trace.inputs:
            continue
        done.add(node)
        if hasattr(node, "variable"):
            parameter = node.variable
            trace.parameters[node] = (parameter_names.get(parameter, ""), tuple(parameter.shape))
            continue
        origins: list[_Edge | None] = [None if up is None else (up, nr) for up, nr in node.next_functions]
        shapes = [None if origin is None else _edge_shape(origin) for origin in origins]
        results = [tuple(int(size) for size in meta.shape) for meta in node._input_metadata]
        trace.operations[node] = _Operation(node, node.name(), origins, shapes, results)
        for position, origin in enumerate(origins):
            follow(trace.operations[node], position, origin)
    return trace


def _edge_shape(edge: _Edge) -> tuple[int, ...]:
    node = edge[0]
    if hasattr(node, "variable"):
        return tuple(node.variable.shape)
    return _shape(edge)


# ------------------------------------------------------------------------------------------------
# What operations do to axes
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Link:
    """Axis ``a`` corresponds to axis ``b`` of one operation; each ("in" or "out", position, dim).

    ``factor``, if any, is (outer, size, inner): ``a`` is merged into ``b``, between ``outer`` slower and
    ``inner`` faster positions.
    """

    a: tuple[str, int, int]
    b: tuple[str, int, int]
    pairs: _Pairs = None
    factor: _Span | None = None


@dataclass
class _Rules:
    links: list[_Link] = field(default_factory=list)
    notes: list[tuple[tuple[str, int, int], str]] = field(default_factory=list)


def _saved_dim(value: int, rank: int) -> int:
    # Negative dimensions come back as unsigned 64-bit numbers.
    value = int(value)
    if value >= 1 << 63:
        value -= 1 << 64
    return value % rank if rank else 0


def _stretch(outer: int, size: int, inner: int) -> Callable[[], tuple[Indices, Indices]]:
    """Axis merged between ``outer`` slower and ``inner`` faster positions: (own, merged) indices."""

    def pairs() -> tuple[Indices, Indices]:
        merged = np.arange(outer * size * inner, dtype=np.int64)
        return (merged // inner) % size, merged

    return pairs


def _swap(pairs: Callable[[], tuple[Indices, Indices]]) -> Callable[[], tuple[Indices, Indices]]:
    return lambda: pairs()[::-1]


def _shift(offset: int, size: int, step: int = 1) -> Callable[[], tuple[Indices, Indices]]:
    """Index i of a narrow axis is ``offset + i * step`` of a wide one: (narrow, wide) indices."""
    return lambda: (np.arange(size, dtype=np.int64), offset + step * np.arange(size, dtype=np.int64))


def _merged(span: _Span, factor: _Span) -> _Span:
    """The span of a merged axis whose part, at ``factor``, has the given one."""
    return factor[0] * span[0], span[1], span[2] * factor[2]


def _within(span: _Span, factor: _Span) -> _Span | None:
    """The span of the part at ``factor`` of a merged axis that has the given one; None: no channels in it."""
    _, channels, faster = span
    _, size, inner = factor
    low, high = max(faster, inner), min(faster * channels, inner * size)
    if low >= high:
        return None
    if high % low or low % inner or (inner * size) % high:
        return 1, size, 1
    return inner * size // high, high // low, low // inner


def _view(rules: _Rules, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    """Match the dimensions of two shapes of one row-major buffer."""
    left = [(dim, size) for dim, size in enumerate(before) if size != 1]
    right = [(dim, size) for dim, size in enumerate(after) if size != 1]
    i = j = 0
    while i < len(left) and j < len(right):
        i0, j0 = i, j
        a, b = left[i][1], right[j][1]
        while a != b:
            if a < b:
                i += 1
                a *= left[i][1]
            else:
                j += 1
                b *= right[j][1]
        i, j = i + 1, j + 1
        many, one, side, other = left[i0:i], right[j0:j], "in", "out"
        if len(many) == 1:
            many, one, side, other = one, many, "out", "in"
        if len(one) != 1:
            for where, dims in (("in", left[i0:i]), ("out", right[j0:j])):
                for dim, _ in dims:
                    rules.notes.append(
                        ((where, 0, dim), f"a reshape from {before} to {after} mixes its positions")
                    )
            continue
        outer = 1
        total = one[0][1]
        for dim, size in many:
            inner = total // (outer * size)
            alone = len(many) == 1
            pairs, factor = (None, None) if alone else (_stretch(outer, size, inner), (outer, size, inner))
            rules.links.append(_Link((side, 0, dim), (other, 0, one[0][0]), pairs, factor))
            outer *= size


def _broadcast(rules: _Rules, operation: _Operation) -> bool:
    """Elementwise with broadcasting; False if the shapes say otherwise."""
    result = operation.results[0]
    for shape in operation.shapes:
        if shape is None:
            continue
        if len(shape) > len(result):
            return False
        for size, full in zip(reversed(shape), reversed(result), strict=False):
            if size not in (1, full):
                return False
    for position, shape in enumerate(operation.shapes):
        if shape is None:
            continue
        lead = len(result) - len(shape)
        for dim, size in enumerate(shape):
            if size == result[dim + lead] and size != 1:
                rules.links.append(_Link(("in", position, dim), ("out", 0, dim + lead)))
    return True


_SPATIAL = (
    ("2d", 2), ("2D", 2), ("1d", 1), ("1D", 1), ("3d", 3), ("3D", 3),
)  # fmt: skip
_MIXING = (
    "Cumsum", "Cumprod", "Flip", "Roll", "Sort", "Topk", "Kthvalue", "Gather", "Scatter", "Index",
    "Embedding", "Fft", "Convolution", "BatchNorm", "CopySlices", "AsStrided", "Trace", "Tril", "Triu",
    "Inverse",
)  # fmt: skip


def _is_dense(node: Any, shape: tuple[int, ...], result: tuple[int, ...]) -> bool:
    """Whether as_strided leaves a row-major tensor as it is; pooling channels-last maps to 1x1 does so."""
    wanted, width = [], 1
    for size in reversed(shape):
        wanted.append(width)
        width *= size
    pairs = zip(shape, reversed(wanted), node._saved_stride, strict=True) if shape == result else ()
    return shape == result and all(size == 1 or stride == dense for size, dense, stride in pairs)


def _opaque(rules: _Rules, operation: _Operation, why: str, but: int | None = None) -> None:
    for position, shape in enumerate(operation.shapes):
        for dim in range(len(shape or ())):
            if dim != but:
                rules.notes.append((("in", position, dim), why))
    for position, shape in enumerate(operation.results):
        for dim in range(len(shape)):
            if dim != but:
                rules.notes.append((("out", position, dim), why))


def _matmul(rules: _Rules, operation: _Operation, left: int, right: int, batch: int) -> None:
    for dim in range(batch):
        rules.links.append(_Link(("in", left, dim), ("out", 0, dim)))
        rules.links.append(_Link(("in", right, dim), ("out", 0, dim)))
    rules.links.append(_Link(("in", left, batch), ("out", 0, batch)))
    rules.links.append(_Link(("in", left, batch + 1), ("in", right, batch)))
    rules.links.append(_Link(("in", right, batch + 1), ("out", 0, batch + 1)))


def _rules_of(operation: _Operation) -> _Rules:
    """How the axes of an operation's inputs and outputs correspond."""
    rules = _Rules()
    node, name = operation.node, operation.name.removesuffix("0").removesuffix("1").removesuffix("Backward")
    known = [shape for shape in operation.shapes if shape is not None]
    result = operation.results[0] if operation.results else ()
    if not known:
        return rules
    first = next(i for i, shape in enumerate(operation.shapes) if shape is not None)
    shape = known[0]

    def each_other_dim(position: int, taken: int, nr: int = 0, shift: int = 0) -> None:
        for dim in range(len(operation.shapes[position] or ())):
            if dim != taken:
                target = dim + (shift if dim > taken else 0)
                rules.links.append(_Link(("in", position, dim), ("out", nr, target)))

    if name == "Cat":
        dim = _saved_dim(node._saved_dim, len(result))
        missing = [i for i, s in enumerate(operation.shapes) if s is None]
        if len(missing) > 1:
            _opaque(rules, operation, "a concatenation with several constants")
            return rules
        gap = result[dim] - sum(s[dim] for s in known)
        offset = 0
        for position, s in enumerate(operation.shapes):
            size = gap if s is None else s[dim]
            if s is not None:
                each_other_dim(position, dim)
                rules.links.append(_Link(("in", position, dim), ("out", 0, dim), _shift(offset, size)))
            offset += size
    elif name == "Stack":
        dim = _saved_dim(node._saved_dim, len(result))
        for position, s in enumerate(operation.shapes):
            for d in range(len(s or ())):
                rules.links.append(_Link(("in", position, d), ("out", 0, d + (d >= dim))))
    elif name in ("Split", "SplitWithSizes", "UnsafeSplit"):
        dim = _saved_dim(node._saved_dim, len(shape))
        offset = 0
        for nr, part in enumerate(operation.results):
            each_other_dim(first, dim, nr)
            rules.links.append(_Link(("out", nr, dim), ("in", first, dim), _shift(offset, part[dim])))
            offset += part[dim]
        if len(operation.results) > 1 and all(part[dim] == 1 for part in operation.results):
            rules.notes.append((("in", first, dim), f"a split {_TAKEN}"))
    elif name == "Unbind":
        dim = _saved_dim(node._saved_dim, len(shape))
        for nr in range(len(operation.results)):
            each_other_dim(first, dim, nr, -1)
        rules.notes.append((("in", first, dim), f"an unbind {_TAKEN}"))
    elif name == "Slice":
        dim = _saved_dim(node._saved_dim, len(shape))
        start, step = int(node._saved_start), int(node._saved_step)
        start = start - (1 << 64) if start >= 1 << 63 else start
        start = min(max(start + shape[dim] if start < 0 else start, 0), shape[dim])
        each_other_dim(first, dim)
        if (start, step, result[dim]) == (0, 1, shape[dim]):
            rules.links.append(_Link(("out", 0, dim), ("in", first, dim)))
        else:
            rules.links.append(_Link(("out", 0, dim), ("in", first, dim), _shift(start, result[dim], step)))
    elif name == "AsStrided" and _is_dense(node, shape, result):
        _view(rules, shape, result)
    elif name == "Select":
        dim = _saved_dim(node._saved_dim, len(shape))
        each_other_dim(first, dim, 0, -1)
        rules.notes.append((("in", first, dim), f"a selection {_TAKEN}"))
    elif name == "Permute":
        for target, origin in enumerate(node._saved_dims):
            rules.links.append(_Link(("in", first, _saved_dim(origin, len(shape))), ("out", 0, target)))
    elif name in ("Transpose", "T"):
        one, two = (0, 1) if name == "T" else (node._saved_dim0, node._saved_dim1)
        order = list(range(len(shape)))
        if order:
            one, two = _saved_dim(one, len(shape)), _saved_dim(two, len(shape)) if len(shape) > 1 else 0
            order[one], order[two] = order[two], order[one]
        for target, origin in enumerate(order):
            rules.links.append(_Link(("in", first, origin), ("out", 0, target)))
    elif name in (
        "View",
        "UnsafeView",
        "ReshapeAlias",
        "Squeeze",
        "Unsqueeze",
        "Reshape",
        "ViewAs",
        "_Reshape",
    ):
        if math.prod(shape) == math.prod(result):
            _view(rules, shape, result)
        else:
            _opaque(rules, operation, f"the view {operation.name}")
    elif name in (
        "Mean",
        "Sum",
        "Amax",
        "Amin",
        "Max",
        "Min",
        "Var",
        "Std",
        "LinalgVectorNorm",
        "Norm",
        "Logsumexp",
    ):
        _reduce(rules, operation, name, first, shape, result)
    elif (name == "Index" and _leading_index(rules, node, first, shape, result)) or (
        name == "IndexPut" and _leading_put(rules, operation)
    ):
        pass
    elif any(operator in name for operator in REGION_POOLING) and len(shape) == len(result) == 4:
        _opaque(rules, operation, f"{operation.name} mixes it", but=1)
        rules.links.append(_Link(("in", first, 1), ("out", 0, 1)))
    elif name in ("Softmax", "LogSoftmax", "SafeSoftmax"):
        _broadcast(rules, operation)
        dim = _saved_dim(node._saved_dim, len(shape))
        rules.notes.append((("in", first, dim), f"{INEXACT}: a softmax spans its channels"))
    elif name in ("NativeLayerNorm", "NativeGroupNorm", "FusedRmsNorm"):
        _opaque(rules, operation, f"{INEXACT}: a functional {name} spans its channels")
    elif name in ("Mm", "Bmm"):
        _matmul(rules, operation, 0, 1, 0 if name == "Mm" else 1)
    elif name in ("Addmm", "Baddbmm"):
        _matmul(rules, operation, 1, 2, 0 if name == "Addmm" else 1)
        bias = operation.shapes[0]
        for dim, size in enumerate(bias or ()):
            target = dim + len(result) - len(bias or ())
            if size == result[target] and size != 1:
                rules.links.append(_Link(("in", 0, dim), ("out", 0, target)))
    elif name.startswith("ScaledDotProduct"):
        _opaque(rules, operation, f"it enters {operation.name}, a fused attention, which is not followed")
    elif any(word in name for word in _MIXING):
        _opaque(rules, operation, f"it goes through {operation.name}, which is not followed")
    elif any(word in name for word in ("Pool", "Upsample", "Pad")):
        spatial = next((n for word, n in _SPATIAL if word in name), 0 if "Pad" in name else 2)
        for dim in range(len(shape)):
            fixed = dim < len(shape) - spatial if spatial else shape[dim] == result[dim]
            if fixed and shape[dim] == result[dim]:
                rules.links.append(_Link(("in", first, dim), ("out", 0, dim)))
            else:
                for where in ("in", "out"):
                    rules.notes.append(
                        ((where, first if where == "in" else 0, dim), f"{operation.name} mixes it")
                    )
    elif not _broadcast(rules, operation):
        _opaque(rules, operation, f"it goes through {operation.name}, which is not followed")
    return rules


def _leading_index(
    rules: _Rules, node: Any, first: int, shape: tuple[int, ...], result: tuple[int, ...]
) -> bool:
    """A table read by an index tensor, as ``bias[index]``; False for any other kind of indexing."""
    indices = [index for index in node._saved_indices if index is not None]
    if len(indices) != 1 or node._saved_indices[0] is None or indices[0].dtype in (torch.bool, torch.uint8):
        return False
    rules.notes.append((("in", first, 0), f"an index {_TAKEN}"))
    shift = indices[0].dim() - 1
    for dim in range(1, len(shape)):
        rules.links.append(_Link(("in", first, dim), ("out", 0, dim + shift)))
    return True


def _leading_put(rules: _Rules, operation: _Operation) -> bool:
    """Rows written into a table, as ``table[index] = rows``; False for any other kind of assignment."""
    indices = [index for index in operation.node._saved_indices if index is not None]
    result = operation.results[0]
    table, rows = operation.shapes[0], operation.shapes[1]
    if len(indices) != 1 or operation.node._saved_indices[0] is None or indices[0].dim() != 1:
        return False
    rules.notes.append((("out", 0, 0), f"an index {_TAKEN}"))
    for position, shape in ((0, table), (1, rows)):
        for dim, size in enumerate(shape or ()):
            target = dim + len(result) - len(shape or ())
            if target > 0 and size == result[target]:
                rules.links.append(_Link(("in", position, dim), ("out", 0, target)))
            else:
                rules.notes.append((("in", position, dim), f"an index {_TAKEN}"))
    return True


def _reduce(
    rules: _Rules,
    operation: _Operation,
    name: str,
    first: int,
    shape: tuple[int, ...],
    result: tuple[int, ...],
) -> None:
    saved = getattr(operation.node, "_saved_dim", None)
    if saved is None or (isinstance(saved, tuple) and not saved):
        dims = set(range(len(shape)))
    else:
        dims = {_saved_dim(dim, len(shape)) for dim in (saved if isinstance(saved, tuple) else (saved,))}
    keep = len(result) == len(shape)
    target = 0
    for dim in range(len(shape)):
        if dim in dims:
            target += keep
            # A sum loses just the removed contributions; an average also changes what it divides by.
            if name != "Sum":
                rules.notes.append(
                    (("in", first, dim), f"{INEXACT}: a reduction ({name.lower()}) spans its channels")
                )
        else:
            rules.links.append(_Link(("in", first, dim), ("out", 0, target)))
            target += 1


# ------------------------------------------------------------------------------------------------
# Following the channels
# ------------------------------------------------------------------------------------------------


class Axes:
    """Axes joined one to one are one class; other correspondences are kept as pairs of elements."""

    def __init__(self) -> None:
        self.parent: dict[Axis, Axis] = {}
        self.size: dict[Axis, int] = {}
        self.relations: list[tuple[Axis, Axis, Callable[[], tuple[Indices, Indices]]]] = []
        self.notes: list[tuple[Axis, str]] = []

    def add(self, axis: Axis, size: int) -> bool:
        if axis in self.parent:
            return False
        self.parent[axis] = axis
        self.size[axis] = size
        return True

    def find(self, axis: Axis) -> Axis:
        while self.parent[axis] is not axis:
            self.parent[axis] = self.parent[self.parent[axis]]
            axis = self.parent[axis]
        return axis

    def join(self, a: Axis, b: Axis) -> None:
        if self.size[a] != self.size[b]:
            reason = f"two coupled axes have different sizes, {self.size[a]} and {self.size[b]}"
            self.notes += [(a, reason), (b, reason)]
            return
        a, b = self.find(a), self.find(b)
        if a is not b:
            self.parent[b] = a


def components(count: int, a: Indices, b: Indices) -> Indices:
    """Connected components under the edges a[i] - b[i], labelled by their lowest element."""
    labels = np.arange(count, dtype=np.int64)
    while len(a):
        low, high = np.minimum(labels[a], labels[b]), np.maximum(labels[a], labels[b])
        open_ = low != high
        if not open_.any():
            break
        a, b = a[open_], b[open_]
        np.minimum.at(labels, high[open_], low[open_])
        while True:
            jumped = labels[labels]
            if np.array_equal(jumped, labels):
                break
            labels = jumped
    return labels


def _layer_sides(call: _LayerCall) -> tuple[int, int, str | None, str | None]:
    """Channel dimension of the input and output, kind of the input side and of the output side."""
    module = call.module
    last_in = len(call.source_shapes[0]) - 1 if call.source_shapes else 0
    last_out = len(call.sink_shape) - 1
    if isinstance(module, _ConvNd):
        spatial = len(module.kernel_size)
        depthwise = 1 < module.groups == module.in_channels == module.out_channels
        kinds = ("depthwise", "depthwise") if depthwise else ("conv_in", "conv_out")
        return last_in - spatial, last_out - spatial, *kinds
    if is_linear(module):
        return last_in, last_out, "linear_in", "linear_out"
    if isinstance(module, nn.Embedding):
        return -1, last_out, None, "embedding"
    if isinstance(module, nn.LayerNorm):
        dim = layernorm_dim(module, call.sink_shape)
        return dim, dim, "layernorm", "layernorm"
    if isinstance(module, nn.PReLU):
        return (1, 1, "prelu", "prelu") if module.num_parameters > 1 else (-1, -1, None, None)
    kind = "groupnorm" if isinstance(module, nn.GroupNorm) else "frozen_bn" if is_frozen_bn(module) else "bn"
    if isinstance(module, _InstanceNorm):
        kind = "instancenorm"
        return (
            len(call.sink_shape) - _instance_spatial(module) - 1,
            len(call.sink_shape) - _instance_spatial(module) - 1,
            kind,
            kind,
        )
    return 1, 1, kind, kind


def layernorm_dim(module: nn.LayerNorm, shape: tuple[int, ...]) -> int:
    """The dimension of ``shape`` that a LayerNorm over one dimension norms over.

    The last one, but for subclasses that take (B, C, H, W) and permute inside, as several libraries have them.
    """
    maps = type(module) is not nn.LayerNorm and len(shape) == 4
    named = "2d" in type(module).__name__.lower()
    return 1 if maps and (named or shape[-1] != module.normalized_shape[-1]) else len(shape) - 1


def is_norm_note(note: str) -> bool:
    """Whether a note tells that a layer of LayerNorm or GroupNorm spans the channels, and nothing worse."""
    return note.startswith((f"{INEXACT}: the LayerNorm ", f"{INEXACT}: the GroupNorm "))


def _instance_spatial(module: nn.Module) -> int:
    name = type(module).__name__
    return next((n for word, n in _SPATIAL if word in name), 2)


def side_width(module: nn.Module, kind: str) -> int:
    if kind == "conv_out" or kind == "depthwise":
        return int(module.out_channels)  # type: ignore[arg-type]
    if kind == "conv_in":
        return int(module.in_channels)  # type: ignore[arg-type]
    if kind == "linear_out":
        return int(module.nf if is_transposed_linear(module) else module.out_features)  # type: ignore[arg-type]
    if kind == "linear_in":
        return int(module.weight.shape[0] if is_transposed_linear(module) else module.in_features)  # type: ignore
    if kind in ("bn", "instancenorm"):
        return int(module.num_features)  # type: ignore[arg-type]
    if kind == "frozen_bn":
        return int(module.weight.numel())  # type: ignore[operator, union-attr]
    if kind == "layernorm":
        return int(module.normalized_shape[-1])  # type: ignore[index]
    if kind == "groupnorm":
        return int(module.num_channels)  # type: ignore[arg-type]
    if kind == "prelu":
        return int(module.num_parameters)  # type: ignore[arg-type]
    if kind == "embedding":
        return int(module.embedding_dim)  # type: ignore[arg-type]
    if kind == "shuffle":
        return len(module.order)  # type: ignore[arg-type]
    raise InvalidInputError(f"unknown kind of surgery: got {kind!r}, see idap.groups.Member.kind")


def layer_obstacle(module: nn.Module) -> str | None:
    """Why no channel of this layer can be removed, whatever the rest of the model is."""
    if isinstance(module, nn.MultiheadAttention):
        return "the width of an nn.MultiheadAttention stays; only its heads are removed"
    if isinstance(module, nn.RNNBase):
        return f"{type(module).__name__}: recurrent layers are not pruned"
    if _makes_channels(module) and module._parameters.get("weight") is None:
        return "its weight is computed from other parameters (a parametrization or weight norm)"
    if isinstance(module, _ConvTransposeNd) and module.groups > 1:
        depthwise = module.groups == module.in_channels == module.out_channels
        if not depthwise:
            return "grouped transposed convolutions are not pruned"
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        return f"{INEXACT}: a LayerNorm over {tuple(module.normalized_shape)} spans its channels"
    return None


def _parameter_sides(model: nn.Module, name: str) -> list[tuple[str, str, int] | None]:
    """Layer, kind and dimension of the side that each dimension of a parameter is cut with; None where it is not."""
    layer, _, key = name.rpartition(".")
    module, shape = model.get_submodule(layer), model.get_parameter(name).shape
    if not _is_layer(module):
        return [(name, "parameter", dim) for dim in range(len(shape))]
    kinds: list[str] = []
    if isinstance(module, nn.Embedding):
        return [None, (layer, "embedding", 0)]
    if is_linear(module) or (isinstance(module, _ConvNd) and module.groups == 1):
        kind = "linear" if is_linear(module) else "conv"
        kinds = [f"{kind}_out", f"{kind}_in"]
        if is_transposed_linear(module) or isinstance(module, _ConvTransposeNd):
            kinds.reverse()
        kinds = kinds if key == "weight" else [f"{kind}_out"]
    return [(layer, kinds[dim], 0) if dim < len(kinds) else None for dim in range(len(shape))]


class Follower:
    """Breadth-first walk over axes, from the output channels of every layer that makes channels."""

    def __init__(self, model: nn.Module, trace: Trace, deadline: Deadline) -> None:
        self.model = model
        self.trace = trace
        self.deadline = deadline
        self.axes = Axes()
        self.spans: dict[Axis, _Span] = {}
        self.rules: dict[Any, _Rules] = {}
        self.sides: dict[Axis, tuple[str, str, int]] = {}
        self.queue: list[Axis] = []
        self.shuffled: set[_Edge] = set()
        self.owned = {
            name + "." + key if name else key
            for name, module in model.named_modules()
            if _is_layer(module)
            for key, _ in module.named_parameters()
        }

    def reach(self, axis: Axis, size: int, span: _Span | None = None) -> Axis:
        if self.axes.add(axis, size):
            self.spans[axis] = span or (1, size, 1)
            self.queue.append(axis)
        return axis

    def side(self, name: str, kind: str, size: int, dim: int = 0) -> Axis:
        axis = ("side", name, kind, dim)
        if self.axes.add(axis, size):
            self.sides[axis] = (name, kind, dim)
            module = None if kind == "parameter" else self.model.get_submodule(name)
            if module is not None:
                self._inner_coupling(axis, module, kind)
        return axis

    def _inner_coupling(self, axis: Axis, module: nn.Module, kind: str) -> None:
        obstacle = layer_obstacle(module)
        if obstacle:
            self.axes.notes.append((axis, f"{axis[1]}: {obstacle}"))
        parts = 1
        if kind in ("conv_in", "conv_out"):
            parts = int(module.groups)  # type: ignore[arg-type]
        elif kind == "groupnorm":
            if int(module.num_groups) == 1:  # type: ignore[arg-type]
                self.axes.notes.append((axis, f"{INEXACT}: the GroupNorm {axis[1]} spans its channels"))
                return
            # Whole groups go: each is normalised by itself, so that those that stay do not change.
            width = self.axes.size[axis] // int(module.num_groups)  # type: ignore[arg-type]
            if width > 1:
                channels = np.arange(self.axes.size[axis], dtype=np.int64)
                self.axes.relations.append((axis, axis, lambda: (channels, channels - channels % width)))
            return
        elif kind == "layernorm":
            self.axes.notes.append((axis, f"{INEXACT}: the LayerNorm {axis[1]} spans its channels"))
        if parts > 1:
            # Each part loses the channels at the same positions, or the parts end up unequal.
            width = self.axes.size[axis] // parts
            everything = np.arange(self.axes.size[axis], dtype=np.int64)
            self.axes.relations.append((axis, axis, lambda: (everything, everything % width)))

    def run(self) -> None:
        for maker in self.trace.layers.values():
            if _makes_channels(maker.module):
                dim = _layer_sides(maker)[1]
                self.reach((*maker.sink, dim), maker.sink_shape[dim])
        steps = 0
        while self.queue:
            steps += 1
            if steps % 256 == 0:
                self.deadline.check()
            node, position, dim = axis = self.queue.pop()
            edge = (node, position)
            call = self.trace.layers.get(edge)
            if call is not None:
                self._through_layer(call, axis, dim, leaving=True, position=0)
            elif edge in self.trace.inputs:
                self.axes.notes.append((axis, "it is tied to an input of the model"))
            elif node in self.trace.parameters:
                self._at_parameter(axis, node, dim)
            elif node in self.trace.operations:
                self._through_operation(self.trace.operations[node], ("out", position, dim), axis)
            for consumer, at in self.trace.consumers.get(edge, ()):
                if isinstance(consumer, _LayerCall):
                    self._through_layer(consumer, axis, dim, leaving=False, position=at)
                else:
                    self._through_operation(consumer, ("in", at, dim), axis)
        outputs = {edge for edge, _ in self.trace.outputs}
        for edge, call in self.trace.layers.items():
            if edge not in self.trace.consumers and edge not in outputs:
                for dim in range(len(call.sink_shape)):
                    if (*edge, dim) in self.axes.parent:
                        self.axes.notes.append(((*edge, dim), f"{call.name} is used where no gradient goes"))
        for edge, shape in self.trace.outputs:
            for dim in range(len(shape)):
                if (*edge, dim) in self.axes.parent:
                    self.axes.notes.append(((*edge, dim), "its channels are an output of the model"))
        self._tie()

    def _tie(self) -> None:
        """What is one parameter in several places loses the same channels in all of them."""
        names: dict[nn.Parameter, list[str]] = {}
        # Not a module that is registered twice, but parameters of several.
        for owner, module in self.model.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                names.setdefault(parameter, []).append(f"{owner}.{key}" if owner else key)
        for parameter, own in names.items():
            sides = [_parameter_sides(self.model, name) for name in own] if len(own) > 1 else []
            for dim, size in enumerate(parameter.shape if sides else ()):
                known = dict.fromkeys(side for each in sides if (side := each[dim]) is not None)
                for followed in [side for side in known if ("side", *side) in self.axes.parent]:
                    axis = ("side", *followed)
                    if any(each[dim] is None for each in sides):
                        self.axes.notes.append(
                            (axis, f"{own[0]} and {own[1]} are one parameter, and it cannot be cut in both")
                        )
                    for layer, kind, number in known:
                        self.axes.join(axis, self.side(layer, kind, size, number))

    def _at_parameter(self, axis: Axis, node: Any, dim: int) -> None:
        name, _ = self.trace.parameters[node]
        if not name or name in self.owned:
            self.axes.notes.append((axis, f"the parameter {name or '?'} is used outside its layer"))
        else:
            self.axes.join(self.side(name, "parameter", self.axes.size[axis], dim), axis)

    def _through_layer(self, call: _LayerCall, axis: Axis, dim: int, *, leaving: bool, position: int) -> None:
        module = call.module
        if isinstance(module, _OPAQUE):
            self.axes.notes.append((axis, f"{call.name}: {layer_obstacle(module)}"))
            return
        if isinstance(module, ShuffleUnit):
            self._through_shuffle(call, module, axis, dim, leaving=leaving)
            return
        dim_in, dim_out, kind_in, kind_out = _layer_sides(call)
        channel, kind = (dim_out, kind_out) if leaving else (dim_in, kind_in)
        across = kind_in is None or kind_in == kind_out
        if dim == channel and kind is not None:
            size = side_width(module, kind)
            if size != self.axes.size[axis]:
                self.axes.notes.append(
                    (axis, f"{call.name} has {size} channels where {self.axes.size[axis]} come")
                )
                return
            self.axes.join(self.side(call.name, kind, size), axis)
            if not across:
                return
        elif isinstance(module, _ConvNd):
            self.axes.notes.append((axis, f"{call.name} convolves over it"))
            return
        elif isinstance(module, nn.Embedding) or not call.sources:
            return
        if isinstance(module, nn.Embedding):
            return
        span = self.spans[axis]
        if leaving and call.sources:
            self.axes.join(self.reach((*call.sources[0], dim), call.source_shapes[0][dim], span), axis)
        elif not leaving:
            self.axes.join(self.reach((*call.sink, dim), call.sink_shape[dim], span), axis)

    def _through_shuffle(
        self, call: _LayerCall, module: ShuffleUnit, axis: Axis, dim: int, *, leaving: bool
    ) -> None:
        if dim != 1:
            edge, shape = (
                (call.sources[0], call.source_shapes[0]) if leaving else (call.sink, call.sink_shape)
            )
            self.axes.join(self.reach((*edge, dim), shape[dim], self.spans[axis]), axis)
            return
        shuffled = self.reach((*call.sink, dim), call.sink_shape[dim])
        if call.sink in self.shuffled:
            return
        self.shuffled.add(call.sink)
        self.axes.join(self.side(call.name, "shuffle", len(module.order)), shuffled)
        order = np.array(module.order, dtype=np.int64)
        together = self.reach((*call.sources[0], dim), call.source_shapes[0][dim])
        self.axes.relations.append((together, shuffled, lambda: (order, np.arange(len(order)))))
        if module.split is None:
            return
        # What comes keeps the numbers of what goes, so that the identity can stand in for the unit.
        self.axes.join(self.reach((*call.sources[1], dim), call.source_shapes[1][dim]), shuffled)
        if order[0] == 0 and module.split > 0:
            # No unit makes it; by itself it would be a unit of the group without a channel in the branches.
            self.axes.relations.append((shuffled, shuffled, lambda: (np.array([0]), np.array([1]))))

    def _through_operation(self, operation: _Operation, here: tuple[str, int, int], axis: Axis) -> None:
        rules = self._rules(operation)
        for place, why in rules.notes:
            if place == here:
                self.axes.notes.append((axis, why))
        merged = [link for link in rules.links if link.factor is not None and link.b == here]
        part = self._part(operation, merged, axis) if merged else None
        for link in rules.links:
            if here == link.a:
                other, pairs = link.b, link.pairs
            elif here == link.b and (link.factor is None or link is part):
                other, pairs = link.a, None if link.pairs is None else _swap(link.pairs)
            else:
                continue
            there = self._axis(operation, other)
            if there is None:
                continue
            span = self.spans[axis] if pairs is None else None
            if link.factor is not None:
                span = _merged(self.spans[axis], link.factor)
                if link is part:
                    span = _within(self.spans[axis], link.factor)
            target = self.reach(*there, span)
            if pairs is None:
                self.axes.join(axis, target)
            else:
                self.axes.relations.append((axis, target, pairs))

    def _part(self, operation: _Operation, merged: list[_Link], axis: Axis) -> _Link | None:
        """Which of the axes merged into one carries its channels; taking all would couple all with all.

        The slowest of those that hold channels, and are not taken apart later (as the three of a fused
        query, key and value). None if one was reached on its own way, and so is followed already.
        """
        if any(self._known(operation, link.a) for link in merged):
            return None
        carrying = [link for link in merged if link.factor and _within(self.spans[axis], link.factor)]
        whole = [link for link in carrying if not self._taken_apart(operation, link.a)]
        return next(iter(whole or carrying), None)

    def _taken_apart(self, operation: _Operation, place: tuple[str, int, int], steps: int = 8) -> bool:
        """Whether an axis ends, up to transpositions, where its positions are picked by number."""
        there = self._axis(operation, place)
        if there is None or place[0] != "out" or not steps:
            return False
        (node, position, dim), _ = there
        for consumer, at in self.trace.consumers.get((node, position), ()):
            if isinstance(consumer, _LayerCall):
                continue
            rules = self._rules(consumer)
            here = ("in", at, dim)
            if consumer.name.startswith(("Unbind", "Select", "Split")) and any(
                noted == here and _TAKEN in why for noted, why in rules.notes
            ):
                return True
            for link in rules.links:
                if link.a == here and link.pairs is None and self._taken_apart(consumer, link.b, steps - 1):
                    return True
        return False

    def _rules(self, operation: _Operation) -> _Rules:
        rules = self.rules.get(operation.node)
        if rules is None:
            rules = self.rules[operation.node] = _rules_of(operation)
        return rules

    def _known(self, operation: _Operation, place: tuple[str, int, int]) -> bool:
        there = self._axis(operation, place)
        return there is not None and there[0] in self.axes.parent

    def _axis(self, operation: _Operation, place: tuple[str, int, int]) -> tuple[Axis, int] | None:
        where, position, dim = place
        if where == "out":
            return (operation.node, position, dim), operation.results[position][dim]
        source, shape = operation.sources[position], operation.shapes[position]
        if source is None or shape is None:
            return None
        return (*source, dim), shape[dim]
