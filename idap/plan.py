"""What is removed from a model, as data: to JSON and back, applied to a fresh copy, then checked."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from . import complexity
from . import groups as _groups
from . import inputs as _inputs
from .adapters import detection as _detection
from .errors import IdapError, InvalidInputError, NonFiniteError, PlanMismatchError, SurgeryError
from .groups import Skipped
from .inputs import Inputs
from .profile import is_transposed_linear
from .tracing import layernorm_dim

Returns: TypeAlias = "str | list[Any]"
FORMAT = "idap-plan"
FORMAT_VERSION = 2  # 1 knows neither blocks that are cut out, nor units, nor shuffles


class IdentityBlock(nn.Module):
    """Stands in for a removed block: gives its first tensor argument back, in the shape the block returned.

    Args:
        returns: ``"tensor"``: the hidden state alone. Otherwise a list for the items of the returned tuple:
            ``"hidden"``, ``"none"``, ``["arg", position]`` or ``["kwarg", name]`` for an argument that is
            passed on (None when the caller leaves it out).

    Attributes:
        cache_index: the place of the block in a cache of keys and values, if it had one. Models ask a place, mostly
            the first, how many tokens the cache has seen; it stays filled, with one zero a token.
    """

    cache_index: int | None = None

    def __init__(self, returns: Returns = "tensor") -> None:
        super().__init__()
        self.returns = returns

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = _inputs.first_tensor(args)
        if hidden is None:
            hidden = _inputs.first_tensor(kwargs)
        return self.arrange(hidden, args, kwargs)

    def arrange(self, hidden: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``hidden`` in the form in which the block returned its hidden state, for these arguments."""
        if self.cache_index is not None and isinstance(hidden, Tensor) and hidden.dim() == 3:
            _count_tokens((*args, *kwargs.values()), self.cache_index, hidden)
        if self.returns == "tensor":
            return hidden
        items: list[Any] = []
        rules: list[Any] = list(self.returns)
        for rule in rules:
            if rule == "hidden":
                items.append(hidden)
            elif rule == "none":
                items.append(None)
            elif rule[0] == "arg":
                items.append(args[rule[1]] if rule[1] < len(args) else None)
            else:
                items.append(kwargs.get(rule[1]))
        return tuple(items)

    def extra_repr(self) -> str:
        return f"returns={self.returns!r}"


def _count_tokens(arguments: Iterable[Any], index: int, hidden: Tensor) -> None:
    """Let the cache among ``arguments``, if any, know of the tokens of ``hidden`` (B, tokens, C)."""
    cache = next((value for value in arguments if _inputs.is_cache(value)), None)
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", ())
    # Some places hold no tokens, such as those of linear attention.
    if cache is not None and (index >= len(layers) or hasattr(layers[index], "get_seq_length")):
        zeros = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
        cache.update(zeros, zeros, index)


@dataclass(frozen=True)
class Projection:
    """The linear map that stands in for a block whose output has another shape than its input.

    Attributes:
        kind: ``"conv1d"``, ``"conv2d"``, ``"conv3d"``: a convolution with a kernel of one position over
            (B, C, *); ``"linear"``: a linear layer over (B, C) or (B, *, C).
        inputs: channels of the block's input.
        outputs: channels of its output.
        stride: one number a spatial axis, with ``out = ceil(in / stride)``; empty for ``"linear"``.

    Raises:
        InvalidInputError: for an unknown kind, a width or stride below 1, or the wrong number of strides.
    """

    kind: str
    inputs: int
    outputs: int
    stride: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in _SPATIAL:
            raise InvalidInputError(f"projection: got kind {self.kind!r}, wanted one of {list(_SPATIAL)}")
        numbers = (self.inputs, self.outputs, *self.stride)
        whole = all(isinstance(number, int) and number > 0 for number in numbers)
        if not whole or len(self.stride) != _SPATIAL[self.kind]:
            raise InvalidInputError(
                f"projection: got {self.inputs!r} inputs, {self.outputs!r} outputs, stride {self.stride!r}; "
                f"wanted positive whole numbers, and {_SPATIAL[self.kind]} strides for {self.kind}"
            )

    @property
    def params(self) -> int:
        """Number of parameters, with the bias."""
        return (self.inputs + 1) * self.outputs

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape that comes out when ``shape`` goes in."""
        if self.kind == "linear":
            return (*shape[:-1], self.outputs)
        spatial = (-(-size // step) for size, step in zip(shape[2:], self.stride, strict=True))
        return (shape[0], self.outputs, *spatial)


_SPATIAL = {"conv1d": 1, "conv2d": 2, "conv3d": 3, "linear": 0}
_CONVOLUTIONS: dict[str, Any] = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}


class ProjectionBlock(IdentityBlock):
    """Stands in for a removed block whose output has another shape: projects its first tensor argument.

    The weights begin at zero, without drawing random numbers; :func:`idap.layers.fit_projections` fills them.

    Args:
        projection: the linear map; it becomes the submodule ``projection``, an ordinary layer with a bias.
        returns: see :class:`IdentityBlock`.
        memory_format: of the weights of a convolution.
    """

    def __init__(
        self,
        projection: Projection,
        returns: Returns = "tensor",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__(returns)
        sizes: tuple[Any, ...] = (projection.inputs, projection.outputs)
        # On the meta device, since there the layer's own initialisation draws nothing.
        with torch.device("meta"):
            self.projection: nn.Module = (
                nn.Linear(*sizes)
                if projection.kind == "linear"
                else _CONVOLUTIONS[projection.kind](*sizes, 1, stride=projection.stride)
            )
        for name, parameter in list(self.projection.named_parameters()):
            layout = memory_format if parameter.dim() > 2 else torch.contiguous_format
            empty = torch.empty(parameter.shape, device=device, dtype=dtype, memory_format=layout)
            self.projection.register_parameter(name, nn.Parameter(empty.zero_()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = _inputs.first_tensor(args)
        if hidden is None:
            hidden = _inputs.first_tensor(kwargs)
        return self.arrange(self.projection(hidden), args, kwargs)


@dataclass(frozen=True)
class ChannelRemoval:
    """Channels that one side of one layer loses.

    Attributes:
        layer: qualified name of the module (of the parameter, for the kind ``"parameter"``).
        kind: how it is cut; see :class:`idap.groups.Member`.
        size: channels of that side before the step.
        removed: ascending, in the numbering before the step.
        dim: dimension that is cut, for the kind ``"parameter"``.
    """

    layer: str
    kind: str
    size: int
    removed: tuple[int, ...]
    dim: int = 0


@dataclass(frozen=True)
class ChannelStep:
    """One round of channel removal; every side of a layer appears once."""

    removals: tuple[ChannelRemoval, ...]


@dataclass(frozen=True)
class BlockRemoval:
    """A block that the identity, or a projection, stands in for, or that is cut out.

    Attributes:
        name: qualified module name; of a unit, which is a run of children of one module, the first of them.
        type: class name of the module that goes.
        returns: what comes back in its place; see :class:`IdentityBlock`.
        projection: the linear map in its place, in the widths that the steps before leave; None for the
            identity.
        followers: name and class name of the further modules of a unit; the identity takes the place of each.
        cut: nothing takes its place: the module is deleted from the container that it is in. The channels it
            made are removed from what read them by the step of channel removal that comes next.
    """

    name: str
    type: str
    returns: Returns = "tensor"
    projection: Projection | None = None
    followers: tuple[tuple[str, str], ...] = ()
    cut: bool = False

    @property
    def modules(self) -> tuple[tuple[str, str], ...]:
        """Name and class name of every module that goes, in the order in which they run."""
        return ((self.name, self.type), *self.followers)


@dataclass(frozen=True)
class BlockStep:
    """One round of block removal."""

    removals: tuple[BlockRemoval, ...]


Step: TypeAlias = "ChannelStep | BlockStep"


@dataclass(frozen=True)
class Cost:
    """Size of a model: parameters, and multiply-accumulates of one pass over the example inputs."""

    params: int
    macs: int | None = None


@dataclass(frozen=True)
class PruningPlan:
    """Steps that turn one model into a smaller one.

    Attributes:
        model: class name of the model it was made for.
        steps: in the order in which they are applied; each numbers channels as the steps before it leave
            them.
        before: cost of the model it was made for.
        after: cost of what comes out.
        skipped: groups and blocks that were left alone, each with its reason.
    """

    model: str
    steps: tuple[Step, ...] = ()
    before: Cost | None = None
    after: Cost | None = None
    skipped: tuple[Skipped, ...] = field(default=(), compare=False)

    # ---------------------------------------------------------------------------------- applying

    def apply(self, model: nn.Module, example_inputs: Inputs | None = None) -> nn.Module:
        """The pruned counterpart of ``model``, which is left alone.

        Training mode, ``requires_grad`` and tied parameters come out as they are in ``model``. Projections
        come out with weights of zero, in the dtype, memory format and on the device of the block they stand in
        for, and trainable if any of its parameters was.

        Args:
            example_inputs: if given, original and pruned model run on them in evaluation mode, and the
                outputs must have the same structure and shapes, and be finite where the original's are. Where
                blocks go, outputs after the first that they made (such as cached keys) may be missing.

        Raises:
            PlanMismatchError: if the plan was made for another model; names the first layer that differs.
            SurgeryError: if the pruned model raises, or fails the check.
        """
        self.check(model)
        pruned = _carry_out(model, self.steps)
        if example_inputs is not None:
            check_forward(model, pruned, example_inputs, shorter=bool(self.removed_blocks))
        return pruned

    def check(self, model: nn.Module) -> None:
        """Compare the first use of every layer in the plan with ``model``, in order, without touching it.

        Raises:
            PlanMismatchError: names the first layer that differs, and how.
        """
        sizes: dict[tuple[str, str, int], int] = {}
        gone: dict[str, BlockRemoval] = {}
        for step in self.steps:
            if isinstance(step, BlockStep):
                for block in step.removals:
                    for name, kind in block.modules:
                        _check_block(model, name, kind, gone)
                        gone[name] = block
                continue
            for removal in step.removals:
                key = _side_key(removal.layer, removal.kind, removal.dim)
                owner = next((b for name, b in gone.items() if _is_in(removal.layer, name)), None)
                if owner is not None:
                    actual = _projection_size(owner, removal)
                else:
                    actual = _groups.side_size(model, removal.layer, removal.kind, removal.dim)
                actual = sizes.get(key, actual)
                if actual != removal.size:
                    raise PlanMismatchError(
                        f"{removal.layer}: the plan was made for {removal.size} channels ({removal.kind}), "
                        f"the model has {actual}; apply it to a fresh {self.model}"
                    )
                bad = [index for index in removal.removed if not 0 <= index < removal.size]
                if (
                    bad
                    or len(set(removal.removed)) != len(removal.removed)
                    or len(removal.removed) >= removal.size
                ):
                    raise PlanMismatchError(
                        f"{removal.layer}: the plan removes {len(removal.removed)} of {removal.size} "
                        f"channels ({removal.kind}), out of range or repeated: {bad[:4] or 'all of them'}"
                    )
                sizes[key] = removal.size - len(removal.removed)

    def exactness_error(self, model: nn.Module, example_inputs: Inputs) -> float:
        """How far the pruned model is from the original with the removed contributions set to zero.

        The reference is ``model`` at full width in which every layer that reads removed channels has the
        weights that read them set to zero (and blocks replaced as the plan says; projections, and blocks that
        are cut out, give zeros). A LayerNorm or GroupNorm that loses channels norms over those that are kept.
        Both run on ``example_inputs`` in evaluation mode. Only rounding is left, unless a softmax or an average
        spans removed channels. Blocks that go after channels are compared with what the steps before them make.

        Returns:
            Largest absolute difference over all floating outputs, divided by the largest absolute value.
        """
        got = _outputs(self.apply(model), example_inputs)
        return _inexactness(model, self, got, example_inputs)

    # ------------------------------------------------------------------------------- composition

    def then(self, following: PruningPlan) -> PruningPlan:
        """This plan, then ``following``, which was made on what this one gives."""
        return PruningPlan(
            model=self.model,
            steps=self.steps + following.steps,
            before=self.before if self.before is not None else following.before,
            after=following.after if following.after is not None else self.after,
            skipped=following.skipped if following.skipped else self.skipped,
        )

    def __add__(self, following: object) -> PruningPlan:
        if not isinstance(following, PruningPlan):
            return NotImplemented
        return self.then(following)

    @property
    def removed_units(self) -> int:
        """Output channels removed, over all layers and steps."""
        kinds = ("conv_out", "linear_out", "embedding")
        steps = [step for step in self.steps if isinstance(step, ChannelStep)]
        return sum(len(r.removed) for step in steps for r in step.removals if r.kind in kinds)

    @property
    def removed_blocks(self) -> tuple[str, ...]:
        """Names of the removed blocks, in the order of their removal."""
        steps = [step for step in self.steps if isinstance(step, BlockStep)]
        return tuple(removal.name for step in steps for removal in step.removals)

    # ------------------------------------------------------------------------------------- files

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        return {
            "format": FORMAT,
            "version": 2 if _is_new(self.steps) else 1,
            "model": self.model,
            "before": _cost_to_dict(self.before),
            "after": _cost_to_dict(self.after),
            "steps": [_step_to_dict(step) for step in self.steps],
            "skipped": [{"root": s.root, "size": s.size, "reason": s.reason} for s in self.skipped],
        }

    @classmethod
    def from_dict(cls, data: Any) -> PruningPlan:
        """The inverse of :meth:`to_dict`.

        Raises:
            InvalidInputError: if the data is no plan, of a newer version, or damaged.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise InvalidInputError(f"not a pruning plan: wanted a JSON object with format {FORMAT!r}")
        if data.get("version") not in range(1, FORMAT_VERSION + 1):
            raise InvalidInputError(
                f"pruning plan: got format version {data.get('version')!r}, wanted at most {FORMAT_VERSION}; "
                "a newer version of idap wrote it"
            )
        try:
            return cls(
                model=str(data["model"]),
                steps=tuple(_step_from_dict(step) for step in data["steps"]),
                before=_cost_from_dict(data.get("before")),
                after=_cost_from_dict(data.get("after")),
                skipped=tuple(
                    Skipped(s["root"], int(s["size"]), s["reason"]) for s in data.get("skipped", ())
                ),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInputError(f"pruning plan: damaged ({type(error).__name__}: {error})") from error

    def to_json(self) -> str:
        """The plan as a JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """The inverse of :meth:`to_json`.

        Raises:
            InvalidInputError: if the text is no JSON, or no plan.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise InvalidInputError(f"pruning plan: not JSON ({error})") from error
        return cls.from_dict(data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as a JSON file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Read a plan that :meth:`save` wrote.

        Raises:
            InvalidInputError: if the file holds no plan.
        """
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    # ----------------------------------------------------------------------------------- reading

    def summary(self, *, width: int = 12) -> str:
        """A few lines for people: what goes, what it costs before and after, what was left alone.

        Args:
            width: most lines for skipped groups.
        """
        lines = [f"Pruning plan for {self.model}: {len(self.steps)} step(s)"]
        for number, step in enumerate(self.steps, start=1):
            if isinstance(step, BlockStep):
                names = (
                    r.name + (" (projected)" if r.projection else " (cut out)" if r.cut else "")
                    for r in step.removals
                )
                lines.append(f"  {number}. blocks: {', '.join(names) or 'none'}")
                continue
            makers = [r for r in step.removals if r.kind in ("conv_out", "linear_out", "embedding")]
            lost, total = sum(len(r.removed) for r in makers), sum(r.size for r in makers)
            lines.append(f"  {number}. channels: {lost} of {total} in {len(makers)} layers")
        if not self.steps:
            lines.append(
                "  nothing is removed: no target was set or it is met already, or no change that the settings "
                "allow comes nearer to it (a lower round_to allows more)"
            )
        for label, name in (("parameters", "params"), ("MACs", "macs")):
            old, new = getattr(self.before, name, None), getattr(self.after, name, None)
            if old is not None and new is not None:
                change = f" ({100 * (new - old) / old:+.1f} %)" if old else ""
                lines.append(f"  {label}: {old:,} -> {new:,}{change}")
        if self.skipped:
            lines.append(f"  left alone: {len(self.skipped)}")
            lines += [f"    {s.root} ({s.size}): {s.reason}" for s in self.skipped[:width]]
            if len(self.skipped) > width:
                lines.append(f"    ... and {len(self.skipped) - width} more")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()


def measure(model: nn.Module, example_inputs: Inputs) -> Cost:
    """Parameters and multiply-accumulates of a model."""
    return Cost(complexity.count_params(model), complexity.count_macs(model, example_inputs))


def channel_step(chosen: Iterable[tuple[_groups.Group, Iterable[int]]]) -> ChannelStep:
    """The removals that take the chosen units of each group out; channels of one side are joined."""
    joined: dict[tuple[str, str, int], tuple[int, set[int]]] = {}
    for group, units in chosen:
        for member, indices in group.removals(units):
            key = (member.layer, member.kind, member.dim)
            joined.setdefault(key, (member.size, set()))[1].update(indices)
    return ChannelStep(
        tuple(
            ChannelRemoval(layer, kind, size, tuple(sorted(removed)), dim)
            for (layer, kind, dim), (size, removed) in joined.items()
        )
    )


def target_count(name: str, value: float | int, full: int) -> int:
    """A target as a count: a float up to 1.0 is a share of ``full``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InvalidInputError(f"{name}: got {value!r}, wanted a share in (0, 1.0] (float) or a count (int)")
    if isinstance(value, float) and value <= 1.0:
        return math.floor(value * full)
    return int(value)


# --------------------------------------------------------------------------------- internals


def _side_key(layer: str, kind: str, dim: int) -> tuple[str, str, int]:
    # A depthwise convolution and a plain one share no side; every other kind stands for itself.
    return layer, kind, dim


def _is_in(name: str, owner: str) -> bool:
    return name == owner or name.startswith(owner + ".")


def _projection_size(block: BlockRemoval, removal: ChannelRemoval) -> int:
    """Channels of one side of the projection in the place of ``block``, as it was put there."""
    projection = block.projection
    if projection is None or removal.layer != f"{block.name}.projection":
        raise PlanMismatchError(f"{removal.layer}: the plan cuts it after removing the block it is in")
    layer = "linear" if projection.kind == "linear" else "conv"
    sides = {f"{layer}_in": projection.inputs, f"{layer}_out": projection.outputs}
    if removal.kind not in sides:
        raise PlanMismatchError(
            f"{removal.layer}: the plan cuts it as {removal.kind}, but puts a {projection.kind} there"
        )
    return sides[removal.kind]


def _check_block(model: nn.Module, name: str, kind: str, gone: Container[str]) -> None:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise PlanMismatchError(
            f"{name}: the plan removes this block, the model has none of that name"
        ) from None
    if name in gone:
        raise PlanMismatchError(f"{name}: the plan removes this block twice")
    if type(module).__name__ != kind:
        raise PlanMismatchError(
            f"{name}: the plan removes a {kind} here, the model has a {type(module).__name__}"
        )


def _set_submodule(model: nn.Module, name: str, module: nn.Module | None) -> None:
    """Put a module in the place of another; with None that one is deleted."""
    owner, _, child = name.rpartition(".")
    modules = model.get_submodule(owner)._modules
    if module is None:
        del modules[child]
    else:
        modules[child] = module


def _parameter_names(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, key = name.rpartition(".")
    model.get_submodule(owner)._parameters[key] = parameter


def _is_channels_last(weight: Tensor) -> bool:
    if weight.dim() not in (4, 5):
        return False
    # The strides, since a filter of one position is contiguous in either format.
    meta = torch.empty(weight.shape, device="meta")
    layout = torch.channels_last if weight.dim() == 4 else torch.channels_last_3d
    return weight.stride() == torch.empty_like(meta, memory_format=layout).stride() != meta.stride()


def _stand_in(block: BlockRemoval, module: nn.Module) -> IdentityBlock:
    """What takes the place of ``module``: in its mode and, if it has weights, of their kind."""
    places = (vars(part).get("layer_idx") for part in module.modules())
    index = next((place for place in places if isinstance(place, int)), None)
    if block.projection is None:
        identity = IdentityBlock(block.returns).train(module.training)
        identity.cache_index = index
        return identity
    weights = [p for p in module.parameters() if p.is_floating_point()]
    first = next((p for p in weights if p.dim() > 1), weights[0] if weights else torch.empty(0))
    layout = torch.contiguous_format
    if any(_is_channels_last(weight) for weight in weights):
        layout = {"conv2d": torch.channels_last, "conv3d": torch.channels_last_3d}.get(
            block.projection.kind, layout
        )
    return ProjectionBlock(
        block.projection, block.returns, device=first.device, dtype=first.dtype, memory_format=layout
    ).train(module.training)


def _carry_out(model: nn.Module, steps: Iterable[Step]) -> nn.Module:
    """Replay on a deep copy; ties, gradients wanted or not, and modes are those of ``model``."""
    pruned = copy.deepcopy(model)
    wanted = {name: p.requires_grad for name, p in pruned.named_parameters(remove_duplicate=False)}
    ties = [names for names in _parameter_names(pruned).values() if len(names) > 1]
    try:
        for step in steps:
            if isinstance(step, BlockStep):
                for block in step.removals:
                    module = pruned.get_submodule(block.name)
                    for name, _ in block.followers:
                        follower = IdentityBlock().train(pruned.get_submodule(name).training)
                        _set_submodule(pruned, name, follower)
                    gone = [name for name, _ in block.modules]
                    wanted = {n: flag for n, flag in wanted.items() if not any(_is_in(n, g) for g in gone)}
                    ties = [[n for n in names if not any(_is_in(n, g) for g in gone)] for names in ties]
                    if block.cut:
                        _set_submodule(pruned, block.name, None)
                        continue
                    substitute = _stand_in(block, module)
                    _set_submodule(pruned, block.name, substitute)
                    trainable = any(parameter.requires_grad for parameter in module.parameters())
                    wanted |= {f"{block.name}.{n}": trainable for n, _ in substitute.named_parameters()}
                continue
            for removal in step.removals:
                _groups.cut(pruned, removal.layer, removal.kind, removal.removed, removal.dim)
    except IdapError:
        raise
    except Exception as error:
        raise SurgeryError(f"the plan could not be carried out ({type(error).__name__}: {error})") from error
    present = dict(pruned.named_parameters(remove_duplicate=False))
    for names in ties:
        for name in names[1:]:
            first = present[names[0]]
            if first is present[name]:
                continue
            if first.shape != present[name].shape or not _same_values(first, present[name]):
                raise SurgeryError(
                    f"{names[0]} and {name} are one parameter in the model, but the plan cuts them "
                    f"differently ({tuple(first.shape)} and {tuple(present[name].shape)}); ignore one of them"
                )
            _set_parameter(pruned, name, first)
    for name, parameter in pruned.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(wanted[name])
        parameter.grad = None
    return pruned


def _same_values(a: Tensor, b: Tensor) -> bool:
    return a.is_meta or torch.equal(a, b)


# Kinds of members that normalise over several channels.
SPANNING_NORMS = ("layernorm", "groupnorm")


def over_kept(kept: Sequence[int]) -> Callable[..., Tensor]:
    """A forward hook (with keywords) for a LayerNorm or GroupNorm at full width: it norms over ``kept`` alone.

    The channels that are not in ``kept`` come out as zeros, and have no part in a mean or a variance. What a subclass
    does besides, such as an activation, it does to those that are kept.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = _inputs.first_tensor((args, kwargs))
        assert x is not None
        grouped = isinstance(module, nn.GroupNorm)
        dim = 1 if grouped else layernorm_dim(module, tuple(x.shape))  # type: ignore[arg-type]
        parts = int(module.num_groups) if grouped else 1  # type: ignore[arg-type]
        result = torch.zeros_like(output)
        for part in range(parts):
            own = [index for index in kept if index * parts // x.shape[dim] == part]
            if not own:
                continue
            index = torch.tensor(own, device=x.device)
            result.index_copy_(dim, index, _narrow(module, index).forward(x.index_select(dim, index)))
        return result

    return hook


def _narrow(norm: nn.Module, index: Tensor) -> nn.Module:
    """A norm over these channels as one group; shares all that is not a parameter with ``norm``."""
    narrow = copy.copy(norm)
    narrow._parameters = {
        name: None if p is None else nn.Parameter(p.detach()[index], requires_grad=False)
        for name, p in norm._parameters.items()
    }
    if isinstance(norm, nn.GroupNorm):
        vars(narrow).update(num_groups=1, num_channels=len(index))
    else:
        vars(narrow).update(normalized_shape=(len(index),))
    return narrow


class _Silenced(IdentityBlock):
    """A block whose hidden state comes out as zeros, like that of a projection before its fit."""

    def __init__(self, block: nn.Module, returns: Returns) -> None:
        super().__init__(returns)
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # The block runs for the shape alone: at full width it is not the one that the plan names.
        hidden = _inputs.first_tensor(self.block(*args, **kwargs))
        assert hidden is not None
        return self.arrange(torch.zeros_like(hidden), args, kwargs)


def _masked(model: nn.Module, steps: Iterable[Step]) -> nn.Module:
    """A full-width copy in which the weights that read removed channels are zero, and norms pass over them."""
    masked = copy.deepcopy(model)
    left: dict[tuple[str, str, int], list[int]] = {}
    norms: dict[str, list[int]] = {}
    silenced: list[str] = []
    with torch.no_grad():
        for step in steps:
            if isinstance(step, BlockStep):
                for block in step.removals:
                    if block.cut:
                        module = masked.get_submodule(block.name)
                        module.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
                        silenced.append(block.name)
                        continue
                    substitute = IdentityBlock(block.returns)
                    if block.projection is not None:
                        substitute = _Silenced(masked.get_submodule(block.name), block.returns)
                        silenced.append(block.name)
                    _set_submodule(masked, block.name, substitute)
                    for name, _ in block.followers:
                        _set_submodule(masked, name, IdentityBlock())
                continue
            for removal in step.removals:
                if any(_is_in(removal.layer, name) for name in silenced):
                    continue
                key = (removal.layer, removal.kind, removal.dim)
                kept = left.setdefault(key, list(range(removal.size)))
                dropped = set(removal.removed)
                original = [kept[index] for index in removal.removed]
                left[key] = [channel for index, channel in enumerate(kept) if index not in dropped]
                if removal.kind in ("conv_in", "linear_in"):
                    _zero_inputs(masked.get_submodule(removal.layer), original)
                elif removal.kind in SPANNING_NORMS:
                    norms[removal.layer] = left[key]
    for name, kept in norms.items():
        try:
            norm = masked.get_submodule(name)
        except AttributeError:
            continue  # in a block that went later
        norm.register_forward_hook(over_kept(kept), with_kwargs=True)
    return masked.train(model.training)


def _zero_inputs(module: nn.Module, channels: list[int]) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    if getattr(module, "transposed", False) or is_transposed_linear(module):
        weight[channels] = 0
    elif getattr(module, "groups", 1) > 1:
        width = weight.shape[1]
        count = weight.shape[0] // int(module.groups)  # type: ignore[arg-type]
        for channel in channels:
            part = channel // width
            weight[part * count : (part + 1) * count, channel % width] = 0
    else:
        weight[:, channels] = 0


def _run(model: nn.Module, example_inputs: Inputs) -> Any:
    with _inputs.evaluating(model), torch.no_grad():
        return _inputs.call(model, _inputs.to_model(example_inputs, model))


Outputs: TypeAlias = "list[tuple[str, Tensor]]"


def _outputs(model: nn.Module, example_inputs: Inputs) -> Outputs:
    """What the model returns; of a detector also what it selects its boxes from."""
    with _detection.predictions(model) as said:
        return _inputs.outputs_of(_run(model, example_inputs)) + said


def _inexactness(model: nn.Module, plan: PruningPlan, got: Outputs, example_inputs: Inputs) -> float:
    """How far ``got``, the outputs of the pruned model, are from those of the reference at full width.

    Blocks that go after channels begin a part of its own, whose original is what the steps before it made: an
    identity between channels of different numbers, or of widths that agree since then, has no counterpart at
    full width.
    """
    *parts, last = _parts(plan.steps)
    errors: list[float] = []
    for steps in parts:
        pruned = _carry_out(model, steps)
        outputs = _outputs(pruned, example_inputs)
        errors.append(_difference(model, plan, steps, outputs, example_inputs))
        model = pruned
    errors.append(_difference(model, plan, last, got, example_inputs))
    return float(torch.tensor(errors, dtype=torch.float64).max())  # NaN if one of them is


def _parts(steps: Iterable[Step]) -> list[list[Step]]:
    """The steps, cut in two before every removal of blocks that comes after one of channels."""
    parts: list[list[Step]] = [[]]
    for step in steps:
        if isinstance(step, BlockStep) and any(isinstance(other, ChannelStep) for other in parts[-1]):
            parts.append([])
        parts[-1].append(step)
    return parts


def _difference(
    model: nn.Module, plan: PruningPlan, steps: Iterable[Step], got: Outputs, example_inputs: Inputs
) -> float:
    """How far ``got``, what these steps make of ``model`` gives, is from the reference at full width.

    Where scores are equal or nearly so, rounding decides what a detector selects. If its outputs differ, the
    reference is given the regions of the pruned model, and what both say of them is compared, before selection.
    """
    reference, shorter = _masked(model, steps), bool(plan.removed_blocks)
    error = _error(_outputs(reference, example_inputs), got, shorter)
    selected = _detection.selections(got)
    if selected and not error <= _ROUNDING:
        with _detection.same_regions(reference, got):
            again = _outputs(reference, example_inputs)
        left = [[own for own in side if own[0] not in selected] for side in (again, got)]
        error = _error(left[0], left[1], shorter)
    return error


# A relative error that rounding in double precision stays far below.
_ROUNDING = 1e-9


def _error(reference: Outputs, got: Outputs, shorter: bool) -> float:
    free = _detection.free_lengths(reference)
    worst = 0.0
    for path, wanted, have in _paired(reference, got, shorter):
        if path in free and len(wanted) != len(have):
            return math.inf  # other regions or detections were selected
        if wanted.shape != have.shape:
            raise SurgeryError(f"output{path}: got shape {tuple(have.shape)}, wanted {tuple(wanted.shape)}")
        if wanted.is_floating_point() and wanted.numel():
            wanted, have = wanted.double(), have.double()
            error = float((have - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300))
            worst = max(worst, error) if error == error else float("nan")
    return worst


def _paired(wanted: Outputs, got: Outputs, shorter: bool) -> list[tuple[str, Tensor, Tensor]]:
    """Outputs side by side, by their path; with ``shorter``, ``got`` may lack any but the first."""
    theirs = dict(got)
    paths = [path for path, _ in wanted]
    found = [path for path in paths if path in theirs]
    lacking = len(found) < len(paths) and not (shorter and found[:1] == paths[:1])
    if len(found) < len(theirs) or lacking:
        raise SurgeryError(
            f"the pruned model returns {[path for path, _ in got]}, the original {paths}; the model is unchanged"
        )
    return [(path, tensor, theirs[path]) for path, tensor in wanted if path in theirs]


def check_forward(
    model: nn.Module, pruned: nn.Module, example_inputs: Inputs, *, shorter: bool = False
) -> Outputs:
    """Run both models in evaluation mode and compare structure, shapes, dtypes and finiteness of the outputs.

    How many boxes a detector finds in an image is left free: see :func:`idap.adapters.detection.free_lengths`.

    Args:
        shorter: the pruned model may lack outputs after the first, such as the cached keys of a removed block.

    Returns:
        The outputs of the pruned model.

    Raises:
        SurgeryError: if the pruned model raises or gives something of another form.
        NonFiniteError: if the original's own outputs are not finite.
    """
    wanted = _outputs(model, example_inputs)
    try:
        got = _outputs(pruned, example_inputs)
    except Exception as error:
        raise SurgeryError(
            f"the pruned {type(model).__name__} raised {type(error).__name__} in its check: {error}; the "
            "model is unchanged. A width may be written into its forward pass: name that layer in `ignore`"
        ) from error
    free = _detection.free_lengths(wanted)
    for path, old, new in _paired(wanted, got, shorter):
        first = int(path in free)
        if old.dim() != new.dim() or old.shape[first:] != new.shape[first:] or old.dtype != new.dtype:
            raise SurgeryError(
                f"output{path}: got {tuple(new.shape)} {new.dtype} from the pruned model, wanted "
                f"{tuple(old.shape)} {old.dtype}; the model is unchanged"
            )
        if not torch.isfinite(old).all():
            raise NonFiniteError(
                f"output{path}: the model itself gives non-finite values on the example inputs"
            )
        if not torch.isfinite(new).all():
            raise SurgeryError(
                f"output{path}: the pruned model gives non-finite values; the model is unchanged"
            )
    return got


def apply_and_compare(plan: PruningPlan, model: nn.Module, example_inputs: Inputs) -> tuple[nn.Module, float]:
    """``plan.apply(model, example_inputs)`` and ``plan.exactness_error(model, example_inputs)`` in one go.

    Each of the three models is made, and runs, once.

    Raises:
        PlanMismatchError, SurgeryError, NonFiniteError: as :meth:`PruningPlan.apply`.
    """
    plan.check(model)
    pruned = _carry_out(model, plan.steps)
    got = check_forward(model, pruned, example_inputs, shorter=bool(plan.removed_blocks))
    return pruned, _inexactness(model, plan, got, example_inputs)


def _is_new(steps: Iterable[Step]) -> bool:
    """Whether the first version of the format would be read as something else."""
    for step in steps:
        if isinstance(step, BlockStep):
            if any(removal.cut or removal.followers for removal in step.removals):
                return True
        elif any(removal.kind == "shuffle" for removal in step.removals):
            return True
    return False


def _cost_to_dict(cost: Cost | None) -> dict[str, int | None] | None:
    return None if cost is None else {"params": cost.params, "macs": cost.macs}


def _cost_from_dict(data: Mapping[str, Any] | None) -> Cost | None:
    if data is None:
        return None
    return Cost(int(data["params"]), None if data["macs"] is None else int(data["macs"]))


def _block_to_dict(removal: BlockRemoval) -> dict[str, Any]:
    data: dict[str, Any] = {"name": removal.name, "type": removal.type, "returns": removal.returns}
    if removal.projection is not None:
        data["projection"] = asdict(removal.projection) | {"stride": list(removal.projection.stride)}
    if removal.followers:
        data["followers"] = [list(follower) for follower in removal.followers]
    if removal.cut:
        data["cut"] = True
    return data


def _block_from_dict(data: Mapping[str, Any]) -> BlockRemoval:
    form = data.get("projection")
    if form is not None:
        form = Projection(form["kind"], form["inputs"], form["outputs"], tuple(form["stride"]))
    followers = tuple((str(name), str(kind)) for name, kind in data.get("followers", ()))
    return BlockRemoval(data["name"], data["type"], data["returns"], form, followers, bool(data.get("cut")))


def _step_to_dict(step: Step) -> dict[str, Any]:
    if isinstance(step, BlockStep):
        return {
            "kind": "blocks",
            "removals": [_block_to_dict(removal) for removal in step.removals],
        }
    return {
        "kind": "channels",
        "removals": [
            {"layer": r.layer, "kind": r.kind, "size": r.size, "dim": r.dim, "removed": _ranges(r.removed)}
            for r in step.removals
        ],
    }


def _step_from_dict(data: Mapping[str, Any]) -> Step:
    if data["kind"] == "blocks":
        return BlockStep(tuple(_block_from_dict(removal) for removal in data["removals"]))
    if data["kind"] != "channels":
        raise ValueError(f"unknown kind of step {data['kind']!r}")
    return ChannelStep(
        tuple(
            ChannelRemoval(r["layer"], r["kind"], int(r["size"]), _unranges(r["removed"]), int(r["dim"]))
            for r in data["removals"]
        )
    )


def _ranges(indices: Sequence[int]) -> list[int | list[int]]:
    """Ascending numbers with runs written as [first, last]: flattened maps are long runs."""
    out: list[int | list[int]] = []
    for index in indices:
        last = out[-1] if out else None
        if isinstance(last, list) and last[1] == index - 1:
            last[1] = index
        elif isinstance(last, int) and last == index - 1:
            out[-1] = [last, index]
        else:
            out.append(index)
    return out


def _unranges(items: Sequence[int | Sequence[int]]) -> tuple[int, ...]:
    out: list[int] = []
    for item in items:
        if isinstance(item, int):
            out.append(item)
        else:
            first, last = item
            if not 0 <= last - first < 1 << 32:
                raise ValueError(f"not a range: {item!r}")
            out.extend(range(first, last + 1))
    return tuple(out)
