"""Channel scores inside ``torch.ao.pruning``: a structured sparsifier that removes the lowest-scored channels.

::

    scores = idap.flow_divergence(model, idap.profile(model, batches))
    sparsifier = ChannelScoreSparsifier(scores, sparsity_level=0.5)
    sparsifier.prepare(model)  # masks, in place; train as usual
    sparsifier.step()  # update the masks; again with a higher level, by hand or by a scheduler
    smaller = sparsifier.prune()  # a torch.fx.GraphModule without the masked channels

How the structured pruner of torch 2.15 is limited, and what is done about it here:

- Its patterns know convolutions and linear layers with an activation and a pooling between them, but no batch norm,
  no dropout, no activation before a global pooling. Here the patterns are found in the model's own graph: any chain
  of batch norms, activations, dropout, poolings and a flatten or a mean over the map, up to the layer that reads it.
- Its conversion of two convolutions removes nothing when the first has a bias and the second is padded, drops what
  ``sigmoid`` and other activations with ``f(0) ≠ 0`` make of a masked channel, breaks grouped convolutions, follows
  only the first reader of an output that has several, and stops half-way with a converted model when it finds no
  pattern. Here such layers are left alone, with the reason in :attr:`ChannelScoreSparsifier.skipped`, or refused
  before anything is converted; the others are converted exactly.
- Its hook adds the bias of a linear layer along dimension 1, wrong for tokens (B, T, C), and gives biases no
  gradient. Here a hook of the same kind does both right.
- A graph that ``torch.fx.symbolic_trace`` cannot follow has no :meth:`~ChannelScoreSparsifier.prune`, residual sums,
  concatenations, transposed and grouped convolutions have no conversion. For those: :func:`idap.prune_filters`.
- A layer whose weight or bias another one shares, or whose weight the graph reads besides, is left alone, as is a
  linear layer whose batch norm is over tokens; where their number is that of the channels, which a graph does not
  tell, the prepared model raises :class:`~idap.errors.SurgeryError` when it gets such an input.
- ``load_state_dict`` is the library's, made for masks of single weights: keep the model, not the sparsifier's state.

With ``patterns=`` the library's own conversions run as they are, with all its limits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

try:
    from torch.ao.pruning._experimental.pruner import (
        BaseStructuredSparsifier,
        BiasHook,
        FakeStructuredSparsity,
    )
    from torch.ao.pruning._experimental.pruner.prune_functions import (
        _remove_bias_handles,
        prune_conv2d,
        prune_linear,
    )
except ImportError as error:
    raise ImportError(
        "idap.integrations.torch_ao needs a torch with torch.ao.pruning's structured pruner >= 2.6: "
        "pip install 'torch>=2.6'"
    ) from error

from ..errors import InvalidInputError, SurgeryError
from ..filters import Floats, check_scores

Scores = Mapping[str, Tensor]

# Act on every element by itself and leave zeros zero.
_ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Tanh, nn.Softsign, nn.Tanhshrink, nn.Hardshrink, nn.Softshrink, nn.Identity, nn.Dropout,
)  # fmt: skip
_POOLINGS: tuple[type[nn.Module], ...] = (
    nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout2d,
)  # fmt: skip
_ELEMENTWISE_FUNCTIONS: frozenset[Any] = frozenset({
    F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.hardswish, F.tanh, F.softsign,
    F.tanhshrink, F.hardshrink, F.dropout, torch.relu, torch.tanh, torch.relu_,
})  # fmt: skip
_POOLING_FUNCTIONS: frozenset[Any] = frozenset({
    F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.dropout2d,
})  # fmt: skip
_ELEMENTWISE_METHODS = frozenset({"relu", "relu_", "tanh", "contiguous"})
_LAYERS = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class _Chain:
    """From a layer to the only one that reads it: names, and the pattern by which the library finds it again."""

    norms: tuple[str, ...]
    reader: str
    pattern: tuple[Any, ...]


class ChannelScoreSparsifier(BaseStructuredSparsifier):  # type: ignore[misc]
    """Masks, and with :meth:`prune` removes, the output channels with the lowest scores.

    ``sparsity_level`` is the share of a layer's channels that are masked after a step, those of earlier steps
    included: ``round(level · channels)``, and at least one channel stays. A masked channel stays masked. Ties: the
    lower index goes first. A batch norm behind a layer is masked with it, so that the masked model computes what the
    pruned one does.

    Args:
        scores: per layer name (out_channels,), higher is kept; or a function of the model that gives them, called
            once at every step, such as ``lambda m: idap.flow_divergence(m, idap.profile(m, batches))``. Layers keep
            their names in the prepared model, so that a profile made before :meth:`prepare` fits as well as one
            made of the prepared model, where masked channels score 0.
        sparsity_level: for layers whose configuration has none of its own, in [0, 1].
        patterns: None for those of the model's own graph, see above; or a dictionary of patterns and conversions as
            the library takes it.

    Attributes:
        skipped: after :meth:`prepare`, the convolutions and linear layers that cannot be pruned, each with its
            reason.
    """

    def __init__(
        self,
        scores: Scores | Callable[[nn.Module], Scores],
        *,
        sparsity_level: float = 0.5,
        patterns: Mapping[tuple[Any, ...], Callable[..., None]] | None = None,
    ) -> None:
        if not isinstance(scores, Mapping) and not callable(scores):
            raise InvalidInputError(
                f"scores: got {type(scores).__name__}, wanted a mapping from layer names to tensors, or a "
                "function of the model that gives one"
            )
        _check_level(sparsity_level)
        self.scores = scores
        self.skipped: dict[str, str] = {}
        self._own_patterns = patterns is None
        self._norms: dict[str, tuple[nn.Module, ...]] = {}
        self._now: dict[str, Floats] | None = None
        super().__init__({"sparsity_level": sparsity_level}, patterns=dict(patterns or {}))

    def prepare(self, model: nn.Module, config: list[dict[str, Any]] | None = None) -> None:
        """Attach masks to the layers, in place; nothing is masked yet.

        Args:
            model: in which every layer is called by one name; keep a copy if you need the original.
            config: as the library takes it: ``[{"tensor_fqn": "conv1.weight", "sparsity_level": 0.3}, ...]``, of
                ``nn.Conv2d`` and ``nn.Linear``. None for all that have scores and can be removed.

        Raises:
            InvalidInputError: scores that do not fit the model, a configured layer without scores, of another kind
                or with a weight that another layer shares, a level out of range, or no layer that can be pruned.
                The model is as it was then.
            SurgeryError: ``config`` is None and the graph of the model cannot be traced.
            NonFiniteError: a score is NaN or infinite; names the layer.
        """
        if self.groups:
            raise InvalidInputError("this sparsifier has a model already: make a new one for another model")
        fixed = self.scores if isinstance(self.scores, Mapping) else None
        if fixed is not None:
            check_scores(model, fixed)
        try:
            chains, skipped = _find_chains(model)
        except SurgeryError:
            if config is None:
                raise
            chains, skipped = {}, {}
        if config is None:
            usable = [
                name for name, own in chains.items() if self._own_patterns or own.pattern in self.patterns
            ]
            config = [{"tensor_fqn": f"{n}.weight"} for n in usable if fixed is None or n in fixed]
            if not config:
                reasons = [
                    f"{name!r}: {reason}" for name, reason in skipped.items() if not fixed or name in fixed
                ]
                raise InvalidInputError(
                    f"no layer with scores can be pruned ({'; '.join(reasons[:3]) or 'none has scores'}); "
                    f"layers that can be: {', '.join(map(repr, usable[:5])) or 'none'}"
                )
        for entry in config:
            self._check_entry(model, entry, fixed)
        names = Counter(entry["tensor_fqn"].lstrip(".") for entry in config)
        if twice := [name for name, count in names.items() if count > 1]:
            raise InvalidInputError(f"config: {twice[0]!r} is there {names[twice[0]]} times")
        super().prepare(model, config)
        self.skipped = skipped
        for group in self.groups:
            module, name = group["module"], group["module_fqn"]
            for key, hook in module._forward_hooks.items():
                if type(hook) is BiasHook:
                    module._forward_hooks[key] = _Bias(hook.param, hook.prune_bias)
            norms = chains[name].norms if name in chains and self._own_patterns else ()
            self._norms[name] = tuple(model.get_submodule(norm) for norm in norms)
            for path, norm in zip(norms, self._norms[name], strict=True):
                for parameter in ("weight", "bias"):
                    mask = _mask_of(module).clone()
                    parametrize.register_parametrization(norm, parameter, FakeStructuredSparsity(mask))
                if isinstance(norm, nn.BatchNorm1d):
                    norm.register_forward_pre_hook(_NoTokens(path, name))

    def step(self, use_path: bool = True) -> None:
        """Mask the lowest-scored channels of every layer up to its level; fresh scores if ``scores`` is a function.

        Raises:
            InvalidInputError: scores that do not fit the model or lack a layer, a level out of range. No mask is
                changed then.
            NonFiniteError: a score is NaN or infinite; names the layer.
        """
        if not self.enable_mask_update:
            return
        self._now = self._fresh()
        try:
            for group in self.groups:
                _check_level(group["sparsity_level"])
            super().step(use_path)
        finally:
            self._now = None

    def update_mask(self, module: nn.Module, tensor_name: str, **kwargs: Any) -> None:
        """Mask the lowest-scored channels of one layer; called by :meth:`step` with the layer's configuration."""
        name = kwargs["module_fqn"]
        scores = (self._now if self._now is not None else self._fresh())[name]
        mask = _mask_of(module, tensor_name)
        left = np.flatnonzero(mask.cpu().numpy())
        masked = min(round(kwargs["sparsity_level"] * len(mask)), len(mask) - 1)
        more = masked - (len(mask) - len(left))
        if more > 0:
            gone = left[np.argsort(scores[left], kind="stable")[:more]]
            mask.data[torch.from_numpy(gone).to(mask.device)] = False
        # By copy: moving a prepared model to a device gives every module a mask of its own.
        for norm in self._norms.get(name, ()):
            for parameter in ("weight", "bias"):
                _mask_of(norm, parameter).data.copy_(mask)
        self.state[kwargs["tensor_fqn"]]["mask"] = mask

    def masked_channels(self) -> dict[str, tuple[int, ...]]:
        """Per layer the channels that are masked, or were when :meth:`prune` removed them, ascending."""
        masks = {group["module_fqn"]: self.state[group["tensor_fqn"]]["mask"] for group in self.groups}
        return {name: tuple((~mask).nonzero().flatten().tolist()) for name, mask in masks.items()}

    def prune(self) -> fx.GraphModule:  # type: ignore[override]
        """Remove the masked channels and all masks: the library's conversion, by the patterns of this model.

        The layers are cut in place, those of the model given to :meth:`prepare` too: go on with what is returned.

        Raises:
            SurgeryError: the graph cannot be traced, or a configured layer cannot be removed; says which and why.
                Nothing is changed then. (With ``patterns=`` the library raises what it raises.)
        """
        if self._own_patterns:
            chains, skipped = _find_chains(self.model)
            for group in self.groups:
                name = group["module_fqn"]
                if name not in chains:
                    raise SurgeryError(
                        f"layer {name!r} cannot be removed: {skipped.get(name, 'it is never called')}; leave it out "
                        "of the configuration, or bake the masks in with squash_mask()"
                    )
            self.patterns = {chains[g["module_fqn"]].pattern: _remove_channels for g in self.groups}
        self._zero_biases()
        pruned: fx.GraphModule = super().prune()  # type: ignore[func-returns-value, assignment]
        return pruned

    def squash_mask(self, *args: Any, **kwargs: Any) -> None:
        """Bake the masks into weights, biases and batch norms, and remove them; no channel is removed."""
        self._zero_biases()
        super().squash_mask(*args, **kwargs)
        for group in self.groups:
            module = group["module"]
            _remove_bias_handles(module)
            if "_bias" in module._parameters:
                bias = module._bias
                del module._bias
                module.bias = bias
            for norm in self._norms[group["module_fqn"]]:
                _remove_token_checks(norm)
                for parameter in ("weight", "bias"):
                    parametrize.remove_parametrizations(norm, parameter, leave_parametrized=True)

    def _zero_biases(self) -> None:
        for group in self.groups:
            module = group["module"]
            if getattr(module, "_bias", None) is not None and getattr(module, "prune_bias", False):
                with torch.no_grad():
                    module._bias[~_mask_of(module)] = 0

    def _fresh(self) -> dict[str, Floats]:
        given = self.scores if isinstance(self.scores, Mapping) else self.scores(self.model)
        checked = check_scores(self.model, given)
        missing = [group["module_fqn"] for group in self.groups if group["module_fqn"] not in checked]
        if missing:
            raise InvalidInputError(f"scores: none of layer {missing[0]!r}, which is to be pruned")
        return checked

    def _check_entry(self, model: nn.Module, entry: Any, fixed: Scores | None) -> None:
        full = entry.get("tensor_fqn") if isinstance(entry, dict) else None
        if not isinstance(full, str):
            raise InvalidInputError(f"config: got {entry!r}, wanted dictionaries with a 'tensor_fqn'")
        name, _, tensor = full.lstrip(".").rpartition(".")
        module = dict(model.named_modules()).get(name)
        if tensor != "weight" or type(module) not in _LAYERS:
            raise InvalidInputError(
                f"config: {full!r} is {'of no layer' if module is None else 'of a ' + type(module).__name__}; the "
                "library masks weights of nn.Conv2d and nn.Linear (not yet parametrised)"
            )
        if shared := _shared(module, _owners(model)):  # type: ignore[arg-type]
            raise InvalidInputError(
                f"config: the {shared} of layer {name!r} is shared with another layer, which would change with it; "
                "leave it out, or give the layers weights of their own"
            )
        if fixed is not None and name not in fixed:
            raise InvalidInputError(f"scores: none of layer {name!r}, which is to be pruned")
        if self._own_patterns and not entry.get("prune_bias", True):
            raise InvalidInputError(
                f"config: {full!r} has prune_bias=False: what its biases pass on would be lost; leave that out, or "
                "use the library's patterns="
            )
        _check_level(entry.get("sparsity_level", 0.0))


class _Bias(BiasHook):  # type: ignore[misc]
    """Adds the masked bias to the output: along the last dimension of a linear layer, and with its gradient."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        bias = getattr(module, "_bias", None)
        if bias is None:
            return output
        if self.prune_bias:
            bias = bias * self.param.mask
        return output + (bias if isinstance(module, nn.Linear) else bias.view(-1, 1, 1))


class _NoTokens:
    """A hook of a masked batch norm behind a linear layer: tokens (B, T, C) would be masked, not channels."""

    def __init__(self, norm: str, layer: str) -> None:
        self.norm, self.layer = norm, layer

    def __call__(self, module: nn.Module, args: Any) -> None:
        if args and args[0].dim() > 2:
            raise SurgeryError(
                f"batch norm {self.norm!r} got {tuple(args[0].shape)}, wanted (B, C): it is over dimension 1, the "
                f"channels of {self.layer!r} are the last, so its mask is one of tokens; prepare the model anew, with "
                f"{self.layer!r} left out of the scores or of the configuration"
            )


def _remove_token_checks(norm: nn.Module) -> None:
    # By type and not by handle: a model that was copied has hooks of its own.
    for key in [key for key, hook in norm._forward_pre_hooks.items() if isinstance(hook, _NoTokens)]:
        del norm._forward_pre_hooks[key]


def _check_level(level: Any) -> None:
    if not isinstance(level, Real) or isinstance(level, bool) or not 0.0 <= float(level) <= 1.0:
        raise InvalidInputError(f"sparsity_level: got {level!r}, wanted a share in [0, 1]")


def _mask_of(module: nn.Module, tensor_name: str = "weight") -> Tensor:
    own = module.parametrizations[tensor_name]  # type: ignore[index]
    mask = next(p.mask for p in own if isinstance(p, FakeStructuredSparsity))  # type: ignore[union-attr]
    assert isinstance(mask, Tensor)
    return mask


# ------------------------------------------------------------------------------------------------
# The graph
# ------------------------------------------------------------------------------------------------


def _find_chains(model: nn.Module) -> tuple[dict[str, _Chain], dict[str, str]]:
    """The layers whose channels can be removed, in the order of their calls; of the others the reason."""
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception as error:
        raise SurgeryError(
            f"torch.fx cannot trace {type(model).__name__} ({error}); prune it with idap.prune_filters"
        ) from error
    modules = dict(model.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    owners = _owners(model)
    # A parametrised weight is read by a call of its parametrisations.
    reads = [str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")]

    def bound(name: str, bias: bool = True) -> str | None:
        if shared := _shared(modules[name], owners, bias):
            return f"its {shared} is shared with another layer"
        if any(read.startswith(f"{name}.") for read in reads):
            return "its weight is read elsewhere"
        return None

    chains: dict[str, _Chain] = {}
    skipped: dict[str, str] = {}
    for node in graph.nodes:
        if node.op == "call_module" and _type(modules[node.target]) in _LAYERS:
            found = bound(node.target) or _follow(node, modules, calls, bound)
            if isinstance(found, str):
                skipped[node.target] = found
            else:
                chains[node.target] = found
    for name, module in modules.items():
        if _type(module) in _LAYERS and name not in calls:
            skipped[name] = "torch.fx sees no call of it"
    return chains, skipped


def _owners(model: nn.Module) -> Counter[int]:
    """In how many places the model has each parameter, by its id; the originals of parametrised ones too."""
    return Counter(id(own) for module in model.modules() for own in module._parameters.values())


def _shared(module: nn.Module, owners: Mapping[int, int], bias: bool = True) -> str | None:
    """Which of the parameters of a layer is that of another one too: "weight", "bias" or neither."""
    kinds = {"bias" if "bias" in n else "weight" for n, p in module.named_parameters() if owners[id(p)] > 1}
    return "weight" if "weight" in kinds else "bias" if bias and kinds else None


def _follow(
    node: fx.Node,
    modules: Mapping[str, nn.Module],
    calls: Mapping[Any, int],
    bound: Callable[..., str | None],
) -> _Chain | str:
    """The chain that starts at a layer, or why there is none; ``bound`` says why a module cannot be cut."""
    layer = modules[str(node.target)]
    spatial = isinstance(layer, nn.Conv2d)
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return f"it is a convolution with groups={layer.groups}"
    width = int(layer.out_channels if spatial else layer.out_features)  # type: ignore[arg-type]
    norms: list[str] = []
    pattern: list[Any] = [_type(layer)]
    flat = False
    if calls[node.target] > 1:
        return f"it is called {calls[node.target]} times"
    while True:
        if len(node.users) != 1:
            return f"its output is read in {len(node.users)} places"
        before, node = node, next(iter(node.users))
        if node.op == "output":
            return "its channels are outputs of the model"
        if node.all_input_nodes != [before] or not node.args or node.args[0] is not before:
            return f"its channels are coupled with others by {_call_name(node)}"
        if node.op == "call_module":
            module = modules[str(node.target)]
            kind = _type(module)
            pattern.append(kind)
            if kind in _LAYERS:
                if calls[node.target] > 1:
                    return f"{node.target!r}, which reads it, is called {calls[node.target]} times"
                if not _reads(module, width, spatial, flat):
                    return f"{node.target!r}, which reads it, does not read its channels one by one"
                if reason := bound(str(node.target), bias=False):
                    return f"{node.target!r} reads it, and {reason}"
                return _Chain(tuple(norms), str(node.target), tuple(pattern))
            if kind is (nn.BatchNorm2d if spatial else nn.BatchNorm1d) and not flat:
                if calls[node.target] > 1:
                    return f"batch norm {node.target!r} is called {calls[node.target]} times"
                if not module.affine:
                    return f"batch norm {node.target!r} has no scale and shift, and makes constants of zeros"
                if module.num_features != width:
                    return f"batch norm {node.target!r} is over another dimension"
                if reason := bound(str(node.target)):
                    return f"batch norm {node.target!r} is behind it, and {reason}"
                norms.append(str(node.target))
                continue
        else:
            pattern.append(node.target)
        step = _keeps_channels(node, modules)
        if step == "flat" and spatial and not flat:
            flat = True
        elif step != "elementwise" and not (step == "map" and spatial and not flat):
            return f"{_call_name(node, modules)} does not keep its channels apart, or zeros zero"


def _keeps_channels(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """What a call is to channels: elementwise, on a map, the end of the map (flat), or None: anything else."""
    target: Any = node.target
    if node.op == "call_module":
        module = modules[target]
        kind = _type(module)
        if kind is nn.Flatten:
            return "flat" if (module.start_dim, module.end_dim) == (1, -1) else None
        if kind is nn.Hardtanh:
            return "elementwise" if module.min_val <= 0 <= module.max_val else None  # type: ignore[operator]
        return "elementwise" if kind in _ELEMENTWISE else "map" if kind in _POOLINGS else None
    if node.op == "call_function":
        if target in _ELEMENTWISE_FUNCTIONS:
            return "elementwise"
        if target in _POOLING_FUNCTIONS:
            return "map"
    elif target in _ELEMENTWISE_METHODS:
        return "elementwise"
    arguments = dict(zip(("first", "second"), node.args[1:], strict=False)) | node.kwargs
    if target in (torch.flatten, "flatten"):
        start = arguments.get("first", arguments.get("start_dim", 0))
        return "flat" if start == 1 and arguments.get("second", arguments.get("end_dim", -1)) == -1 else None
    if target in (torch.mean, "mean"):
        dims = arguments.get("first", arguments.get("dim"))
        whole = isinstance(dims, (tuple, list)) and {int(d) % 4 for d in dims} == {2, 3}  # type: ignore[arg-type, call-overload]
        kept = arguments.get("second", arguments.get("keepdim", False))
        return None if not whole else "map" if kept else "flat"
    return None


def _reads(module: nn.Module, width: int, spatial: bool, flat: bool) -> bool:
    if isinstance(module, nn.Conv2d):
        return spatial and not flat and module.groups == 1 and module.in_channels == width
    assert isinstance(module, nn.Linear)
    return module.in_features % width == 0 if flat else not spatial and module.in_features == width


def _type(module: nn.Module) -> type:
    return parametrize.type_before_parametrizations(module)


def _call_name(node: fx.Node, modules: Mapping[str, nn.Module] | None = None) -> str:
    if node.op == "call_module":
        kind = f" ({_type(modules[str(node.target)]).__name__})" if modules else ""
        return f"{node.target!r}{kind}"
    return str(getattr(node.target, "__name__", node.target))


# ------------------------------------------------------------------------------------------------
# The conversion
# ------------------------------------------------------------------------------------------------


def _remove_channels(layer: nn.Module, *rest: Any) -> None:
    """Cut the masked channels out of a layer, the batch norms behind it and the layer that reads them."""
    mask = _mask_of(layer).clone()
    if isinstance(layer, nn.Conv2d):
        prune_conv2d(layer)
    else:
        assert isinstance(layer, nn.Linear)
        prune_linear(layer)
    *between, reader = rest
    with torch.no_grad():
        for module in between:
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                _cut_norm(module, mask)
        weight = (
            reader.parametrizations.weight.original if parametrize.is_parametrized(reader) else reader.weight
        )
        # After a flatten every channel has as many columns as the map had positions.
        columns = mask.repeat_interleave(weight.shape[1] // len(mask))
        cut = nn.Parameter(weight[:, columns], requires_grad=weight.requires_grad)
        if parametrize.is_parametrized(reader):
            reader.parametrizations.weight.original = cut
        else:
            reader.weight = cut
        setattr(reader, "in_channels" if isinstance(reader, nn.Conv2d) else "in_features", cut.shape[1])


def _cut_norm(norm: nn.BatchNorm1d | nn.BatchNorm2d, mask: Tensor) -> None:
    _remove_token_checks(norm)
    for name in ("weight", "bias"):
        parametrize.remove_parametrizations(norm, name, leave_parametrized=True)
        old = getattr(norm, name)
        setattr(norm, name, nn.Parameter(old[mask], requires_grad=old.requires_grad))
    for name in ("running_mean", "running_var"):
        if getattr(norm, name) is not None:
            setattr(norm, name, getattr(norm, name)[mask])
    norm.num_features = int(mask.sum())


__all__ = ["ChannelScoreSparsifier"]
