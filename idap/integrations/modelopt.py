"""Scores of a profile in NVIDIA ModelOpt (>= 0.44): FastNAS pruning by any criterion, and a forward hook.

FastNAS sorts the channels of every layer once, then searches how many of them each layer keeps: always the
first ones. What decides *which* channels stay is therefore the importance of each hyperparameter (``hparam``)
at the time of that sort, and this is what :func:`register_importance` puts in place.

::

    pruned, state = prune(model, "fastnas", {"flops": "60%"}, dummy_input, config, batches=batches)

takes the arguments of ``modelopt.torch.prune.prune``. It is made of these three steps, for those who want more
between them (``"autonas"``, which trains the converted model first, say)::

    model = mtn.convert(model, "fastnas")
    register_importance(model, lambda m: idap.flow_divergence(m, idap.profile(m, batches)))
    pruned, state = mtn.search(model, {"flops": "60%"}, dummy_input, config)

``mtp.prune`` itself converts and sorts in one call and leaves no room in between: its ``score_func`` is called
after the sort only, and its ``forward_loop`` before it, but with the statistics of the batch norms reset, and
not at all in a model without batch norms.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

try:
    import modelopt.torch.nas as mtn
    from modelopt.torch.nas.hparams import ConcatTracedHp
    from modelopt.torch.nas.search_space import SearchSpace
    from modelopt.torch.opt.dynamic import DynamicModule
    from modelopt.torch.prune.importance_hooks import ForwardHook
    from modelopt.torch.utils import unwrap_model
except ImportError as error:
    raise ImportError(
        "idap.integrations.modelopt needs NVIDIA ModelOpt >= 0.44: pip install 'nvidia-modelopt>=0.44' "
        "'torchprofile==0.0.4'"
    ) from error

from idap_kernels import ChannelStats, channel_stats, filter_norms

from .. import inputs as _inputs
from ..criteria import Criterion, filters_first, flow_divergence, groups_of, is_transposed, places
from ..errors import EmptyDataError, InvalidInputError, NonFiniteError
from ..filters import REDUCTIONS, Floats, check_scores, group_scores
from ..groups import Group, Member
from ..profile import CONVOLUTIONS, is_scored, is_transposed_linear, profile

Scores = Mapping[str, Tensor]

_WIDTHS = ("out_channels", "out_features")  # hparams of what a layer's scores are about
_CHANNELS = (*_WIDTHS, "in_channels", "in_features", "num_features", "num_channels")


class Registered(NamedTuple):
    """What :func:`register_importance` did.

    Attributes:
        hparams: names of the hparams that are now sorted by the scores.
        skipped: why another configurable hparam is not; or a part of one, if it is a concatenation.
    """

    hparams: list[str]
    skipped: dict[str, str]


# ------------------------------------------------------------------------------------------------
# FastNAS
# ------------------------------------------------------------------------------------------------


def register_importance(
    model: nn.Module, scores: Scores | Callable[[nn.Module], Scores], *, reduction: str = "mean"
) -> Registered:
    """Make scores the only importance of every configurable hparam of a converted model.

    An hparam stands for all layers whose widths can only change together. The scores of those that *make* the
    channels count: convolutions (depthwise and transposed ones too) and linear layers, reduced over both sides
    of a residual sum. ModelOpt's own importance of these hparams, the norm of the weights that read the channels,
    is dropped, not added to. How many channels a layer keeps is for the search to find, so only the order
    within an hparam matters, and scores of different hparams need no common scale.

    What is registered are the places in the order of the scores, 1 for the lowest, since ModelOpt's sort is not
    stable: of equal scores the channel with the lower index at the time of conversion goes first. The channels
    before a concatenation are put in order at once, without a change of the model's outputs: ModelOpt's sort
    passes over them, because only the concatenation as a whole is configurable.

    Args:
        model: a model after ``mtn.convert``; a wrapper such as DistributedDataParallel is seen through.
        scores: ``{layer name: (out_channels,)}``, higher is kept, as any criterion gives them for the model
            before or after conversion: names and order are the same. Once the model has been sorted, its
            layers give their channels in the new order, and so must the scores. Or a function that is
            called, once and now, with the model at its largest subnet, and returns such scores.
        reduction: ``"mean"``, ``"sum"`` or ``"max"`` over the layers of an hparam.

    Returns:
        The names of the hparams, and why others were left alone: they stand for no channels; ModelOpt cannot
        sort them (group norm, grouped but not depthwise convolutions); no layer has scores, which leaves
        ModelOpt's importance as it was.

    Raises:
        InvalidInputError: the model is not converted, an unknown reduction, scores that do not fit the model
            or reach no hparam.
        NonFiniteError: a score is NaN or infinite; names the layer.
    """
    if reduction not in REDUCTIONS:
        raise InvalidInputError(f"reduction is {reduction!r}; known are {', '.join(REDUCTIONS)}")
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"model: got {type(model).__name__}, wanted a module after mtn.convert")
    model = unwrap_model(model)
    if not _is_converted(model):
        raise InvalidInputError(
            f"{type(model).__name__} is a plain model, wanted one after mtn.convert(model, 'fastnas'); or call "
            "idap.integrations.modelopt.prune, which converts it"
        )
    chosen: dict[str, tuple[Any, list[tuple[Any, Tensor | None]]]] = {}
    skipped: dict[str, str] = {}
    with _largest_subnet(model) as space:
        checked = check_scores(model, scores(model) if callable(scores) else scores)
        makers = _makers(model)
        for name, hparam in space.named_hparams(configurable=True):
            if name.rpartition(".")[2] not in _CHANNELS:
                skipped[name] = "it does not stand for channels"
            elif not hparam.is_sortable:
                skipped[name] = "ModelOpt cannot sort it, and keeps the first channels"
            else:
                ranked = []
                for part in _parts(hparam):
                    group = _group(name, hparam, part, makers)
                    order = _places(part, group, checked, reduction) if part.is_sortable else None
                    ranked.append((part, order))
                    if part.is_sortable and order is None:
                        layers = ", ".join(member.layer for member in group.members)
                        skipped[name] = f"no scores for {layers or 'what makes its channels'}"
                if any(order is not None for _, order in ranked):
                    chosen[name] = hparam, ranked
    if not chosen:
        raise InvalidInputError(
            f"the {len(checked)} layers with scores reach none of the configurable hparams: {skipped}"
            if skipped
            else f"{type(model).__name__} has no configurable hparam: convert it with another channel_divisor, "
            "feature_divisor or ratio"
        )
    for hparam, ranked in chosen.values():
        if isinstance(hparam, ConcatTracedHp):
            for part, order in ranked:
                if order is not None:
                    part.enforce_order(order.argsort(descending=True))
        by_part = {id(part): torch.ones(part.max).double() if p is None else p for part, p in ranked}
        inputs = hparam._inputs if isinstance(hparam, ConcatTracedHp) else [hparam]
        hparam._importance_estimators.clear()  # there is no public way to take an importance back
        hparam.register_importance(_Constant(torch.cat([by_part[id(part)] for part in inputs])))
    return Registered(list(chosen), skipped)


def prune(
    model: nn.Module,
    mode: Any,
    constraints: dict[str, Any],
    dummy_input: Any,
    config: dict[str, Any] | None = None,
    *,
    batches: Iterable[Any],
    criterion: Criterion = flow_divergence,
    reduction: str = "mean",
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """``modelopt.torch.prune.prune`` with channels ranked by a profile of the model.

    The model is profiled and scored as it is, then converted, given the scores and searched. As with
    ``mtp.prune`` the model is changed in place; also when the search fails, so pass a copy if you need it.

    Args:
        model: a plain model.
        mode: ``"fastnas"``, or ``[("fastnas", {...})]`` with its rules. Those of FastNAS by default only give
            layers widths that are multiples of 32.
        constraints: ``{"flops": "60%"}`` or ``{"params": ...}``; one of the two.
        dummy_input: one input, to count operations with.
        config: of the search; ``score_func`` is required there: a function from the model to a number, higher
            is better, which decides how many channels each layer keeps.
        batches: what :func:`idap.profile` reads.
        criterion: how the profile becomes scores: :func:`idap.flow_divergence`, or any of :mod:`idap.criteria`.
        reduction: see :func:`register_importance`.
        forward: see :func:`idap.profile`.

    Returns:
        The pruned model, the same object, and the state of the search. Its batch norms still have the statistics
        of wider layers: train it, or give it to :func:`idap.recalibrate`.

    Warns:
        UserWarning: channels that are not ranked by the scores; says which and why.

    Raises:
        ImportError: ``torchprofile``, with which ModelOpt counts operations, is missing or too new for it.
        InvalidInputError: the model is converted already, or one of the causes named by :func:`idap.profile`,
            the criterion and :func:`register_importance`.
        NonFiniteError: an activation or a score is NaN or infinite; names the layer.
    """
    if reduction not in REDUCTIONS:
        raise InvalidInputError(f"reduction is {reduction!r}; known are {', '.join(REDUCTIONS)}")
    if isinstance(model, nn.Module) and _is_converted(model):
        raise InvalidInputError(
            f"{type(model).__name__} has been converted already: call register_importance(model, ...) and "
            "modelopt.torch.nas.search"
        )
    _check_torchprofile()
    scores = criterion(model, profile(model, batches, blocks=(), heads=(), forward=forward))
    check_scores(model, scores)
    converted = mtn.convert(model, mode)
    _, skipped = register_importance(converted, scores, reduction=reduction)
    left = {name: reason for name, reason in skipped.items() if name.rpartition(".")[2] in _CHANNELS}
    if left:
        what = "; ".join(f"{name}: {reason}" for name, reason in left.items())
        warnings.warn(f"not ranked by the scores: {what}", UserWarning, stacklevel=2)
    return mtn.search(converted, constraints, dummy_input, config=config)


class _Constant:
    """An importance that has been computed; not a lambda, since ModelOpt wants hparams that can be pickled."""

    def __init__(self, values: Tensor):
        self.values = values

    def __call__(self) -> Tensor:
        return self.values


def _is_converted(model: nn.Module) -> bool:
    return any(isinstance(module, DynamicModule) for module in model.modules())


@contextmanager
def _largest_subnet(model: nn.Module) -> Iterator[Any]:
    """The model with every hparam at its largest; the subnet that was active is selected again at the end."""
    space = SearchSpace(model)
    active = space.config()
    space.sample(max)  # not mtn.sample: it would declare the statistics of the batch norms stale
    try:
        yield space
    finally:
        space.select(active)


def _makers(model: nn.Module) -> dict[int, list[str]]:
    """The layers that make the channels of each hparam, by its id; coupled layers share one object."""
    makers: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, DynamicModule) and is_scored(module):
            for key, hparam in module.named_hparams():
                if key in _WIDTHS:
                    makers.setdefault(id(hparam), []).append(name)
    return makers


def _parts(hparam: Any) -> list[Any]:
    """The hparam itself; for a concatenation its different inputs, in order."""
    if not isinstance(hparam, ConcatTracedHp):
        return [hparam]
    return list({id(part): part for part in hparam._inputs}.values())


def _group(name: str, hparam: Any, part: Any, makers: Mapping[int, list[str]]) -> Group:
    """The layers that make the channels of a part, with the channels of each that belong to it."""
    own = tuple((channel,) for channel in range(part.max))
    members = [Member(layer, "conv_out", part.max, own) for layer in makers.get(id(part), ())]
    if hparam is not part:  # depthwise convolutions behind the concatenation hold all of it
        starts = np.cumsum([0, *(each.max for each in hparam._inputs)])
        here = [int(start) for start, each in zip(starts, hparam._inputs) if each is part]
        units = tuple(tuple(start + channel for start in here) for channel in range(part.max))
        members += [Member(layer, "conv_out", int(starts[-1]), units) for layer in makers.get(id(hparam), ())]
    return Group(name, part.max, tuple(members))


def _places(part: Any, group: Group, scores: Mapping[str, Floats], reduction: str) -> Tensor | None:
    """Places 1 … C in ascending order of the scores, (C,) float64, of the channels as converted."""
    values = group_scores(group, scores, reduction)
    if values is None:
        return None
    stored = np.empty_like(values)
    stored[part.active_slice] = values  # the order in which the layers now give their channels
    return 1.0 + places(torch.from_numpy(stored)).double()


def _check_torchprofile() -> None:
    try:
        import torchprofile.profile as flops
    except ImportError as error:
        raise ImportError(
            "ModelOpt counts operations with torchprofile, which it does not install: pip install torchprofile==0.0.4"
        ) from error
    if not hasattr(flops, "handlers"):
        raise ImportError(
            "this torchprofile has no profile.handlers, which ModelOpt reads: pip install torchprofile==0.0.4"
        )


# ------------------------------------------------------------------------------------------------
# The hook
# ------------------------------------------------------------------------------------------------

_STATISTICS = (
    "flow_norm",
    "flow_energy",
    "abs_mean",
    "sample_abs_rms",
    "rms",
    "var",
    "std",
    "mean",
    "positive_fraction",
    "min",
    "max",
)
_OPTIONS = ("statistic", "side", "activation", "sample_dim", "channel_dim", "backend")
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)
_BATCHED_RANKS = {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}


class ChannelStatsHook(ForwardHook):
    """A ModelOpt ``ForwardHook`` that keeps one small buffer of channel statistics, and never an activation.

    ::

        hook = ChannelStatsHook(layer)
        layer.register_forward_hook(hook)
        ...                        # run the model
        hook.accumulate()          # (channels,), higher is kept

    With ``statistic="flow_divergence"`` the score of channel ``k`` is
    ``(1 / (C·S)) · mean_b ‖σ(Y[b, k, :])‖₂ · ‖W_k‖₂`` (IDAP++, arXiv 2511.20141). For ``side="output"`` ``W_k``
    is what makes the channel; for ``side="input"``, where ModelOpt's own hooks look, ``Y`` is what enters the
    layer and ``W_k`` what reads the channel. A layer without such weights counts as ``‖W_k‖₂ = 1``, and so does
    ``nn.Embedding``, whose every token reads another row.

    Args:
        layer: the module whose channels are scored.
            A 2-dimensional ``weight`` is (out, in), that of GPT-2's ``Conv1D`` (in, out).
        activation_hooks_kwargs: where ModelOpt makes the hooks itself it passes one mapping of options here;
            the entries that are named as an argument below count in its place, others are ignored.
        statistic: ``"flow_divergence"``, or a property of :class:`idap_kernels.ChannelStats`, such as
            ``"abs_mean"`` or ``"var"``, without weights; ``"positive_fraction"`` is 1 − APoZ.
        side: ``"output"`` or ``"input"``: the tensor that is read; of several the first.
        activation: the ``σ`` of the flow norm: ``relu``, ``identity``, ``gelu`` or ``silu``.
        sample_dim: dimension of the samples; 1 for Megatron's (sequence, batch, hidden).
        channel_dim: dimension of the channels, from either end; None for 1 in convolutions and in batch, instance
            and group norms, and the last in all others. Give 1 for others that work on maps, such as ``nn.ReLU``
            or ``nn.MaxPool2d``.
        backend: passed to the kernels; see :func:`idap_kernels.available_backends`.

    Attributes:
        stats: the :class:`idap_kernels.ChannelStats` so far, which can be merged over processes with
            ``hook.stats = hook.stats.all_reduce()``; None before the first call.

    Raises:
        InvalidInputError: an unknown statistic or side, a dimension that is no whole number. In a call: no tensor,
            or one that does not fit.
    """

    def __init__(
        self,
        layer: nn.Module,
        activation_hooks_kwargs: Mapping[str, Any] | None = None,
        *,
        statistic: str = "flow_divergence",
        side: str = "output",
        activation: str = "relu",
        sample_dim: int = 0,
        channel_dim: int | None = None,
        backend: str = "auto",
    ) -> None:
        if not isinstance(layer, nn.Module):
            raise InvalidInputError(f"layer: got {type(layer).__name__}, wanted the module to be hooked")
        options: dict[str, Any] = {
            "statistic": statistic,
            "side": side,
            "activation": activation,
            "sample_dim": sample_dim,
            "channel_dim": channel_dim,
            "backend": backend,
        }
        options |= {key: value for key, value in (activation_hooks_kwargs or {}).items() if key in _OPTIONS}
        if options["statistic"] not in ("flow_divergence", *_STATISTICS):
            raise InvalidInputError(
                f"statistic is {options['statistic']!r}; known are flow_divergence, {', '.join(_STATISTICS)}"
            )
        if options["side"] not in ("output", "input"):
            raise InvalidInputError(f"side is {options['side']!r}; known are output, input")
        for key in ("sample_dim", "channel_dim"):
            if type(options[key]) is not int and not (options[key] is None and key == "channel_dim"):
                raise InvalidInputError(f"{key}: got {options[key]!r}, wanted the number of a dimension")
        ChannelStats.empty(1, activation=options["activation"])  # raises where the activation is unknown
        self.layer = layer
        self.statistic: str = options["statistic"]
        self.side: str = options["side"]
        self.activation: str = options["activation"]
        self.sample_dim: int = options["sample_dim"]
        self.channel_dim: int | None = options["channel_dim"]
        self.backend: str = options["backend"]
        self.stats: ChannelStats | None = None
        self.batches = 0

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Add the tensor of one forward pass to the statistics; called by PyTorch."""
        x = _inputs.first_tensor(args if self.side == "input" else output)
        if x is None:
            what = "positional argument" if self.side == "input" else "output"
            raise InvalidInputError(f"{type(module).__name__} has no tensor as {what}: hook another module")
        if x.numel() == 0:  # an expert to which no token was sent
            return
        if x.dim() < _batched_rank(self.layer):
            x = x[None]  # an unbatched call is one sample
        channel_dim = self.channel_dim
        if channel_dim is None:
            channel_dim = 1 if isinstance(self.layer, (*CONVOLUTIONS, *_NORMS)) else -1
        self.stats = channel_stats(
            x,
            channel_dim=channel_dim,
            sample_dim=self.sample_dim if x.dim() > 2 else 0,
            activation=self.activation,
            out=self.stats,
            backend=self.backend,
        )
        self.batches += 1

    def accumulate(self) -> Tensor:
        """The scores, (channels,) float64, on the device of the data; higher is kept.

        Raises:
            EmptyDataError: the layer has not been called yet.
            InvalidInputError: its weights do not fit the channels seen.
            NonFiniteError: a score is NaN or infinite.
        """
        if self.stats is None:
            raise EmptyDataError(
                f"{self._name()} has not been called since it was hooked: run the model first"
            )
        scores: Tensor
        if self.statistic == "flow_divergence":
            positions = self.stats.count / self.stats.samples
            scores = self.stats.flow_norm / (self.stats.channels * positions) * self.weight_norm()
        else:
            scores = getattr(self.stats, self.statistic)
        if not scores.isfinite().all():
            bad = int((~scores.isfinite()).nonzero()[0])
            raise NonFiniteError(
                f"channel {bad} of the {self.side} of {self._name()} has the {self.statistic} "
                f"{float(scores[bad])}: look at the inputs and weights; in float16, try bfloat16 or float32"
            )
        return scores

    def weight_norm(self) -> Tensor:
        """``‖W_k‖₂`` of the weights that make each channel, or read it, (channels,) float64.

        Raises:
            EmptyDataError: the layer has not been called yet.
            InvalidInputError: there are weights for another number of channels.
        """
        if self.stats is None:
            raise EmptyDataError(
                f"{self._name()} has not been called since it was hooked: run the model first"
            )
        weight = _rows(self.layer, self.side)
        if weight is None:
            return torch.ones_like(self.stats.flow_norm)
        if len(weight) != self.stats.channels:
            raise InvalidInputError(
                f"{self._name()} has weights for {len(weight)} channels, its {self.side} has {self.stats.channels}"
            )
        return filter_norms([weight])[0].to(self.stats.flow_norm)

    def to_dict(self) -> dict[str, Tensor]:
        """What ModelOpt writes at the end: ``score`` (channels,), and ``channels_importance_ascending``, the
        channels from the least to the most important, both on the CPU. Of equals the first comes first.
        """
        score = self.accumulate().cpu()
        return {"score": score, "channels_importance_ascending": score.argsort(stable=True)}

    def state_dict(self) -> dict[str, Any]:
        """The statistics so far and how they were taken, as tensors, strings and numbers."""
        return {
            "stats": None if self.stats is None else self.stats.state_dict(),
            "batches": self.batches,
            "side": self.side,
            "activation": self.activation,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, on the device of the layer's weights.

        Raises:
            InvalidInputError: an entry is missing, or the other hook read another side or used another
                activation.
        """
        missing = {"stats", "batches", "side", "activation"} - state_dict.keys()
        if missing:
            raise InvalidInputError(f"the state dictionary lacks {', '.join(sorted(missing))}")
        for key in ("side", "activation"):
            if state_dict[key] != getattr(self, key):
                raise InvalidInputError(
                    f"the state is of {key} {state_dict[key]!r}, not {getattr(self, key)!r}"
                )
        stats = None if state_dict["stats"] is None else ChannelStats.from_state_dict(state_dict["stats"])
        if stats is not None:
            stats = ChannelStats(_inputs.to_model(stats.state.clone(), self.layer), stats.activation)
        self.stats, self.batches = stats, int(state_dict["batches"])

    def get_progress_info(self) -> dict[str, int]:
        """Calls and samples so far."""
        return {"batches": self.batches, "samples": 0 if self.stats is None else int(self.stats.samples)}

    def _name(self) -> str:
        return repr(self.layer).partition("\n")[0]


def _batched_rank(layer: nn.Module) -> int:
    """The least number of dimensions that a batch of the layer has."""
    if isinstance(layer, CONVOLUTIONS):
        return layer.weight.dim()
    return next((rank for kind, rank in _BATCHED_RANKS.items() if isinstance(layer, kind)), 2)


def _rows(layer: nn.Module, side: str) -> Tensor | None:
    """The weights with those of one channel of the side per row, or None if the layer has no such weights."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2 or isinstance(layer, nn.Embedding):
        return None
    weight = weight.detach()
    if side == "output":
        return filters_first(layer, weight)
    if is_transposed(layer) or is_transposed_linear(layer):  # (in, out / groups, *), (in, out)
        return weight
    return weight.unflatten(0, (groups_of(layer), -1)).transpose(1, 2).flatten(0, 1)  # (out, in / groups, *)


__all__ = ["ChannelStatsHook", "Registered", "prune", "register_importance"]
