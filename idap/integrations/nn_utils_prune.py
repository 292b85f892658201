"""Channel scores inside ``torch.nn.utils.prune``: which channels are masked is decided by a criterion of idap.

Three ways in, from the most to the least of torch's own code:

- :func:`ln_structured_arguments` gives ``prune.ln_structured`` the ``importance_scores`` with which it removes
  exactly the lowest-scored channels;
- :class:`ChannelPruning` is a pruning method that takes scores of channels as they are;
- :func:`prune_channels` masks a whole model in one call, each layer by itself or all in one ranking.

Masks make nothing faster or smaller: a masked layer multiplies by zeros and keeps both weight and mask. When the
masks are settled, cut the channels out::

    removed = remove_masks(model)  # the zeros become permanent
    plan = idap.filters.plan_channels(model, removed, example_inputs)
    smaller = plan.apply(model)

What adds a constant behind the mask goes with the channel too, and the cut model then differs from the masked one,
in which the constant still reaches the next layers: a parameter that is added, the bias of a depthwise layer behind
the layer (or of its norm), an activation with ``f(0) ≠ 0``. Without these, with the biases masked, and the norms by
``example_inputs``, the two compute the same.

Training leaves the masked weights with a history of gradients, and ``copy.deepcopy`` refuses those (of any pruning
method of torch): profile such a model with ``idap.profile(model, batches, blocks=(), heads=())``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from ..adapters.attention import count_heads
from ..calibration import following_norms
from ..criteria import filters_first, groups_of, is_transposed, out_width, places
from ..errors import InvalidInputError, NonFiniteError
from ..filters import Floats, check_scores, rank_units
from ..inputs import Inputs
from ..profile import is_scored, is_transposed_linear


class LnStructuredArguments(TypedDict):
    """Keyword arguments of ``prune.ln_structured`` for one layer."""

    name: str
    dim: int
    importance_scores: Tensor


def ln_structured_arguments(
    model: nn.Module, scores: Mapping[str, Tensor]
) -> dict[str, LnStructuredArguments]:
    """What makes ``prune.ln_structured`` remove the channels with the lowest scores, and no others.

    ::

        for layer, own in ln_structured_arguments(model, scores).items():
            prune.ln_structured(model.get_submodule(layer), amount=0.3, n=2, **own)

    ``ln_structured`` ranks slices of ``importance_scores`` along ``dim`` by their norm of order ``n``. The slice of
    the channel that is number ``r`` of ``C`` in ascending order is therefore filled with ``1 + r/C``, in float64:
    every norm keeps that order, whatever the scores' own range, and equal scores stay apart (the lower index goes
    first). This holds for ``n`` a number with 0.1 ≤ abs(n) ≤ 1000, ``±inf``, ``"fro"``, and for ``"nuc"`` where torch
    has it as a norm of a slice (weights of three dimensions). ``n = 0`` counts entries, and no tensor can rank
    more channels than a slice has entries by it.

    The tensor is a view without memory of its own. torch gives the mask its dtype, float64;
    :class:`ChannelPruning` keeps the mask in the dtype of the weight.

    Args:
        scores: per layer name (out_channels,), higher is kept. Convolutions, transposed convolutions, linear layers
            and GPT-2's ``Conv1D``; heads' scores of attention modules are passed over.

    Raises:
        InvalidInputError: unknown layers, wrong lengths; or a transposed convolution with groups, whose slice along
            ``dim=1`` holds one channel of every group, so that ``ln_structured`` cannot remove one alone
            (:class:`ChannelPruning` and :func:`prune_channels` can).
        NonFiniteError: a score is NaN or infinite; names the layer.
    """
    arguments: dict[str, LnStructuredArguments] = {}
    modules = dict(model.named_modules())
    for name, values in _layer_scores(model, scores).items():
        module = modules[name]
        if _is_grouped_transposed(module):
            raise InvalidInputError(
                f"layer {name!r} is a {type(module).__name__} with groups={module.groups}: along dim=1 "
                "ln_structured removes one channel of every group at once; use ChannelPruning or prune_channels"
            )
        ranked = 1.0 + places(torch.from_numpy(values)).double() / len(values)
        arguments[name] = {
            "name": "weight",
            "dim": _channel_dim(module),
            "importance_scores": _spread(module, ranked.to(_parameter(module, "weight", name).device)),
        }
    return arguments


class ChannelPruning(prune.BasePruningMethod):
    """Masks the channels with the lowest scores; what ``LnStructured`` is for norms of the weights.

    Use :meth:`apply`, which takes the scores. By itself (``ChannelPruning(0.5).prune(t, mask, importance_scores)``,
    or in a ``PruningContainer``) it takes for the score of a channel the largest entry of its slice of the
    importance scores. Among equal scores the lower index goes first.

    Args:
        amount: how many of the channels not yet masked: a count, or a share in [0, 1] (rounded as Python's
            ``round``).
        dim: along which the tensor has its channels; None for a vector such as a bias.
        groups: of a transposed convolution, whose weight (in, out / groups, *) has the channels of group ``g`` in
            the ``g``-th part of its rows; then ``dim`` is 1.
    """

    PRUNING_TYPE = "structured"

    def __init__(self, amount: int | float, dim: int | None = 0, groups: int = 1) -> None:
        _check_amount(amount)
        self.amount, self.dim, self.groups = amount, dim, groups
        if dim is None:
            # A container slices channels by a sum over the other dimensions; over none, torch sums all.
            self.PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """``default_mask`` with the lowest-scored channels at zero besides; shapes as that of ``t``.

        Raises:
            InvalidInputError: fewer channels are left than are to go.
            NonFiniteError: a score is NaN or infinite.
        """
        scores = self._by_channel(t).amax(1)
        if not scores.isfinite().all():
            raise NonFiniteError("importance scores: some are NaN or infinite, wanted numbers")
        left = self._by_channel(default_mask != 0).any(1).nonzero().flatten()
        order = left[scores[left].argsort(stable=True)]
        keep = torch.ones(len(scores), dtype=torch.bool, device=t.device)
        keep[order[: _count(self.amount, len(left))]] = False
        return default_mask * self._to_shape(keep, t).to(default_mask.dtype)

    @classmethod
    def apply(  # type: ignore[override]
        cls,
        module: nn.Module,
        name: str,
        amount: int | float,
        scores: Tensor | Sequence[float],
        dim: int | None = None,
    ) -> prune.BasePruningMethod:
        """Mask the lowest-scored channels of ``module.<name>``, on top of what is masked already.

        As with every method of ``torch.nn.utils.prune`` the parameter becomes ``<name>_orig``, the mask the buffer
        ``<name>_mask``, and ``prune.remove`` makes it permanent.

        Args:
            module: any module; for a convolution, linear layer or ``Conv1D`` the channels are its outputs, in
                transposed convolutions with groups too.
            name: of the parameter: ``"weight"``, ``"bias"``, ...
            amount: how many of the channels not yet masked: a count, or a share in [0, 1].
            scores: (channels,), higher is kept; also of masked channels, where they do not matter.
            dim: of the channels, if not that of the module's outputs.

        Returns:
            The method, or the ``PruningContainer`` that now holds it after the earlier ones.

        Raises:
            InvalidInputError: no such parameter, scores of the wrong length, an amount that is none or too large.
            NonFiniteError: a score is NaN or infinite.
        """
        _check_amount(amount)
        where = f"{type(module).__name__}.{name}"
        parameter = _parameter(module, name, where)
        values = _numbers(scores, where)
        groups = 1
        if parameter.dim() < 2:
            dim = None
        elif dim is None:
            dim = _channel_dim(module) if is_scored(module) else 0
            groups = groups_of(module) if is_transposed(module) else 1
        elif not -parameter.dim() <= dim < parameter.dim():
            raise InvalidInputError(
                f"dim: got {dim} for {where}, which has {parameter.dim()} dimensions; wanted one of them"
            )
        shape = cls(amount, dim, groups)
        wanted = shape._by_channel(parameter).shape[0]
        if len(values) != wanted:
            raise InvalidInputError(f"scores: got {len(values)}, wanted {wanted}, one a channel of {where}")
        mask = getattr(module, f"{name}_mask", None)
        # Here, because torch drops the earlier method's hook when compute_mask raises.
        _count(amount, wanted if mask is None else int(shape._by_channel(mask != 0).any(1).sum()))
        ranks = places(torch.from_numpy(values)).to(parameter.device, torch.float32)
        method: prune.BasePruningMethod = super().apply(  # type: ignore[assignment]
            module, name, amount, dim, groups, importance_scores=shape._to_shape(ranks, parameter)
        )
        setattr(module, f"{name}_mask", getattr(module, f"{name}_mask").to(parameter.dtype))
        return method

    def _by_channel(self, t: Tensor) -> Tensor:
        """(channels, all entries of each)"""
        if self.groups > 1:
            return t.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
        return t.reshape(-1, 1) if self.dim is None else t.movedim(self.dim, 0).flatten(1)

    def _to_shape(self, values: Tensor, like: Tensor) -> Tensor:
        """``values`` (channels,), spread over the shape of ``like``."""
        if self.dim is None:
            return values.view(like.shape)
        if self.groups > 1:
            rows = values.view(self.groups, -1).repeat_interleave(like.shape[0] // self.groups, 0)
            return rows.view(*rows.shape, *[1] * (like.dim() - 2)).expand(like.shape)
        shape = [1] * like.dim()
        shape[self.dim] = -1
        return values.view(shape).expand(like.shape)


def prune_channels(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    amount: int | float,
    *,
    scope: str = "local",
    normalize: str | None = "mean",
    include_bias: bool = True,
    example_inputs: Inputs | None = None,
    min_width: int = 1,
) -> dict[str, tuple[int, ...]]:
    """Mask the lowest-scored channels of all scored layers, on top of what is masked already.

    Channels that are masked do not count and are not chosen again, so that calls can follow each other, each with
    fresh scores. Ties: the layer that comes first in ``scores`` goes first, and within a layer the lower index.
    Layers that feed one sum are masked independently; :func:`idap.filters.plan_channels` can cut only what all of
    them mask.

    A cut takes along what adds a constant behind the mask: a parameter that is added, the bias of a depthwise layer
    behind the layer (or of its norm), an activation with ``f(0) ≠ 0``. Where there is any, the cut model differs from
    the masked one.

    Args:
        scores: per layer name (out_channels,), higher is kept; layers without scores are left alone, and so are
            heads' scores of attention modules.
        amount: with ``scope="local"`` of every layer, with ``"global"`` of all layers together: a count, exact; or a
            share in [0, 1] of the channels not yet masked, rounded. A local share takes less where ``min_width``
            demands it.
        normalize: for the global ranking: ``"mean"`` divides the scores of a layer by their mean over the channels
            not yet masked, None compares them as they are.
        include_bias: mask the biases too: a channel with a bias still passes on a constant.
        example_inputs: one input of the model; if given, scale and shift of the batch norm that takes a masked
            layer's output are masked with it, which would make a constant of its zeros.
        min_width: channels that every layer keeps; 0 allows whole layers to go.

    Returns:
        Per layer the channels that were masked by this call, ascending; layers that lost none are missing.

    Raises:
        InvalidInputError: unknown layers, wrong lengths, arguments out of range, a weight that is parametrised, a
            count that ``min_width`` does not allow. No layer is masked then.
        NonFiniteError: a score is NaN or infinite; names the layer.
    """
    _check_amount(amount)
    for option, value, known in (
        ("scope", scope, ("local", "global")),
        ("normalize", normalize, ("mean", None)),
    ):
        if value not in known:
            raise InvalidInputError(f"{option}: got {value!r}, wanted one of {known}")
    if not isinstance(min_width, int) or isinstance(min_width, bool) or min_width < 0:
        raise InvalidInputError(f"min_width: got {min_width!r}, wanted a number of channels, 0 or more")
    checked = _layer_scores(model, scores)
    modules = dict(model.named_modules())
    left: dict[str, Any] = {}
    for name in checked:
        module = modules[name]
        _parameter(module, "weight", name)
        if include_bias and getattr(module, "bias", None) is not None:
            _parameter(module, "bias", name)
        left[name] = np.flatnonzero(~_masked(module))
    norms = following_norms(model, example_inputs) if example_inputs is not None else {}
    room = [max(0, len(channels) - min_width) for channels in left.values()]
    values = [checked[name][channels] for name, channels in left.items()]
    if scope == "global":
        count = _count(amount, sum(map(len, values)), "all layers")
        ranking = rank_units(values, room, scope="global", normalize=normalize)
        if count > len(ranking):
            raise InvalidInputError(
                f"amount={amount!r} asks for {count} channels, {len(ranking)} can go with min_width={min_width}"
            )
        counts = np.bincount(ranking.groups[:count], minlength=len(values)).tolist()
    else:
        counts = [_count(amount, len(own), name) for name, own in zip(left, values, strict=True)]
        for position, (name, most) in enumerate(zip(left, room, strict=True)):
            if counts[position] > most and isinstance(amount, Integral):
                raise InvalidInputError(
                    f"amount={amount} channels of layer {name!r}: {most} can go with min_width={min_width}; "
                    "give a share, or leave the layer out of the scores"
                )
            counts[position] = min(counts[position], most)
    removed: dict[str, tuple[int, ...]] = {}
    for (name, channels), own, lost in zip(left.items(), values, counts, strict=True):
        if lost:
            order = np.argsort(own, kind="stable")[:lost]
            removed[name] = tuple(sorted(int(channel) for channel in channels[order]))
    # Without gradients: the masked weight has no history then, and the model can be copied.
    with torch.no_grad():
        for name, gone in removed.items():
            _mask(modules[name], gone, include_bias)
            if name in norms:
                _mask(modules[norms[name]], gone, True)
    return removed


def masked_channels(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Per layer the output channels whose weights are all masked, ascending, by whichever pruning method.

    Layers without such channels are missing. ``prune.remove`` drops the masks: ask before, or use
    :func:`remove_masks`.
    """
    found = {}
    for name, module in model.named_modules():
        if is_scored(module) and (gone := np.flatnonzero(_masked(module)).tolist()):
            found[name] = tuple(gone)
    return found


def remove_masks(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Make every mask of the model permanent (``prune.remove``), and return :func:`masked_channels` of before."""
    found = masked_channels(model)
    for module in model.modules():
        hooks = [h for h in module._forward_pre_hooks.values() if isinstance(h, prune.BasePruningMethod)]
        for hook in hooks:
            prune.remove(module, hook._tensor_name)
    return found


# ------------------------------------------------------------------------------------------------


def _layer_scores(model: nn.Module, scores: Mapping[str, Tensor]) -> dict[str, Floats]:
    """The checked scores of layers; those of heads are left out."""
    modules = dict(model.named_modules())
    found = {}
    for name, values in check_scores(model, scores).items():
        module = modules[name]
        if not is_scored(module):
            if count_heads(module) is not None:
                continue
            raise InvalidInputError(
                f"scores: {name!r} is a {type(module).__name__}; wanted convolutions and linear layers"
            )
        found[name] = values
    if not found:
        raise InvalidInputError(
            "scores: got none of a layer; pass what flow_divergence(model, profile) gives"
        )
    return found


def _numbers(scores: Tensor | Sequence[float], where: str) -> Floats:
    try:
        values = torch.as_tensor(scores).detach().to("cpu", torch.float64).numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(
            f"scores of {where}: got {type(scores).__name__}, wanted (channels,)"
        ) from error
    if values.ndim != 1:
        raise InvalidInputError(f"scores of {where}: got shape {values.shape}, wanted (channels,)")
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise NonFiniteError(f"scores of {where}: channel {bad[0]} has {values[bad[0]]}, wanted numbers")
    return values


def _check_amount(amount: int | float) -> None:
    whole = isinstance(amount, Integral)
    if isinstance(amount, bool) or not isinstance(amount, Real) or math.isnan(amount):
        raise InvalidInputError(f"amount: got {amount!r}, wanted a count (int) or a share in [0, 1] (float)")
    if amount < 0 or (not whole and amount > 1):
        raise InvalidInputError(f"amount: got {amount!r}, wanted a count from 0 or a share in [0, 1]")


def _count(amount: int | float, channels: int, where: str = "the parameter") -> int:
    count = int(amount) if isinstance(amount, Integral) else round(amount * channels)
    if count > channels:
        raise InvalidInputError(
            f"amount: got {amount}, but {channels} channels of {where} are left to be masked"
        )
    return count


def _parameter(module: nn.Module, name: str, where: str) -> Tensor:
    """The parameter as it is used, if it can be masked."""
    own = module._parameters
    if own.get(name) is None and own.get(f"{name}_orig") is None:
        raise InvalidInputError(
            f"{where}: {type(module).__name__} has no parameter {name!r} to mask; if it is parametrised, "
            "remove the parametrisation first"
        )
    value = getattr(module, name)
    assert isinstance(value, Tensor)
    return value


def _is_grouped_transposed(module: nn.Module) -> bool:
    return is_transposed(module) and groups_of(module) > 1


def _channel_dim(module: nn.Module) -> int:
    return 1 if is_transposed(module) or is_transposed_linear(module) else 0


def _spread(module: nn.Module, values: Tensor) -> Tensor:
    """``values`` (out_channels,), in the shape of the weight."""
    groups = groups_of(module) if is_transposed(module) else 1
    weight = module.weight
    assert isinstance(weight, Tensor)
    return ChannelPruning(0, _channel_dim(module), groups)._to_shape(values, weight)


def _masked(module: nn.Module) -> Any:
    """(out_channels,) bool array: all weights of the channel are masked."""
    mask = module._buffers.get("weight_mask")
    if mask is None:
        return np.zeros(out_width(module), dtype=bool)
    return ~(filters_first(module, mask != 0).flatten(1).any(1).cpu().numpy())


def _mask(module: nn.Module, channels: Sequence[int], include_bias: bool) -> None:
    for name in ("weight", "bias") if include_bias else ("weight",):
        parameter = getattr(module, name, None)
        if parameter is None:
            continue
        width = len(parameter) if parameter.dim() == 1 else out_width(module)
        keep = torch.ones(width, dtype=parameter.dtype, device=parameter.device)
        keep[list(channels)] = 0
        prune.custom_from_mask(module, name, keep if parameter.dim() == 1 else _spread(module, keep))


__all__ = [
    "ChannelPruning",
    "LnStructuredArguments",
    "ln_structured_arguments",
    "masked_channels",
    "prune_channels",
    "remove_masks",
]
