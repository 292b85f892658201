"""Scores of a profile as an importance of Torch-Pruning (>= 1.6.1)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

try:
    import torch_pruning as tp
except ImportError as error:  # pragma: no cover - a dependency of the package
    raise ImportError(
        "idap.integrations.torch_pruning needs Torch-Pruning >= 1.6.1: pip install torch-pruning"
    ) from error

from ..criteria import Criterion, flow_divergence, out_width
from ..errors import GraphError, InvalidInputError
from ..filters import check_scores
from ..profile import is_scored, profile

Scores = Mapping[str, Tensor]

_REDUCTIONS = {"mean": "mean", "sum": "sum", "max": "amax"}
_NORMALIZATIONS = ("mean", None)

# A tie is broken by less than what separates two float32 numbers: 2^-51 of the score for each channel that
# comes before it in the model. A score of zero counts as _ZERO there, far below any score of a live channel.
_STEP = 2.0**-51
_ZERO = 1e-280


class ChannelImportance(tp.importance.Importance):
    """What Torch-Pruning's pruners ask for: how much each channel of a group is worth keeping.

    ::

        importance = ChannelImportance(model, batches)
        pruner = tp.pruner.BasePruner(model, example, importance=importance, global_pruning=True)
        pruner.step()

    The model is profiled once, at the first group, in one pass over the batches; and again when a layer has
    another width than at that time, so that each step of an iterative pruner ranks the model as it then is.
    After training without pruning, :meth:`refresh` asks for a new pass. Pruners that regularize ask for scores
    while training: call :meth:`refresh` before their ``step``, which else ranks by those.

    Every layer of a group whose *output* channels the group removes and which has scores counts: convolutions
    (grouped, depthwise and transposed ones too) and linear layers, on both sides of a residual sum, before a
    concatenation, and queries, keys and values. Scores reach the channels of the group's root by the index
    mapping of the dependency graph, so a flatten in between does no harm. Where the graph has no such mapping, as
    for keys and values that are shared by several query heads, a layer does not count; nor does it for the
    library's own importances.

    Equal scores, such as those of dead channels, are told apart by a part in 10^15 for each channel in the
    order of the model, the first being the least: Torch-Pruning's global ranking removes everything at or
    below a threshold and would take all of them, or none.

    Args:
        model: the model that the pruner prunes, the same object.
        batches: what :func:`idap.profile` takes, re-iterable: a list, a data loader.
        scores: in place of batches, ``{layer name: (out_channels,)}``, higher is kept; or a function from the
            model to such a mapping, called again when widths have changed.
        criterion: how a profile becomes scores: :func:`idap.flow_divergence`, or any of :mod:`idap.criteria`.
        reduction: ``"mean"``, ``"sum"`` or ``"max"`` over the layers of a group.
        normalize: ``"mean"`` divides the scores of a group by their mean magnitude, which makes groups
            comparable under global ranking; None does nothing.
        forward: called as ``forward(model, batch)`` in place of ``model(batch)``, for batches such as
            ``(images, labels)``; see :func:`idap.profile`.

    Attributes:
        skipped: why a group got no score, by the name of its root layer. Pruners leave such groups as they are;
            each is warned about once. (``GroupNormPruner`` fails on them while regularizing, as with every
            importance: put the layer among its ``ignored_layers``. It also wants scores above zero.)

    Raises:
        InvalidInputError: neither or both of batches and scores, a batches iterator that can be read only
            once, an unknown reduction or normalization. While pruning: scores that do not fit the model, a
            group of another model, or fixed scores after the model has been pruned.
        NonFiniteError: a score or an activation is NaN or infinite; names the layer.
        GraphError: the dependency graph removes channels that a layer does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any] | None = None,
        *,
        scores: Scores | Callable[[nn.Module], Scores] | None = None,
        criterion: Criterion = flow_divergence,
        reduction: str = "mean",
        normalize: str | None = "mean",
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InvalidInputError(f"model: got {type(model).__name__}, wanted the module to be pruned")
        if (batches is None) == (scores is None):
            raise InvalidInputError(
                f"got {'neither batches nor' if batches is None else 'both batches and'} scores: give one"
            )
        if isinstance(batches, Iterator):
            raise InvalidInputError(
                f"batches is a {type(batches).__name__}, which can be read only once; every step of a pruner "
                "needs a pass: give a list or a data loader"
            )
        if isinstance(batches, Tensor):
            raise InvalidInputError("batches is one tensor; it must be an iterable of batches: pass [tensor]")
        if scores is not None and not isinstance(scores, Mapping) and not callable(scores):
            raise InvalidInputError(
                f"scores: got {type(scores).__name__}, wanted a mapping from layer names to tensors, or a function "
                "of the model that gives one"
            )
        if not callable(criterion):
            raise InvalidInputError(
                f"criterion: got {criterion!r}, wanted a function of (model, profile) such as idap.criteria.fpgm"
            )
        if reduction not in _REDUCTIONS:
            raise InvalidInputError(f"reduction is {reduction!r}; known are {', '.join(_REDUCTIONS)}")
        if normalize not in _NORMALIZATIONS:
            raise InvalidInputError(f"normalize is {normalize!r}; known are 'mean' and None")
        self.model = model
        self.batches = batches
        self.scores = scores
        self.criterion = criterion
        self.reduction = reduction
        self.normalize = normalize
        self.forward = forward
        self.skipped: dict[str, str] = {}
        self._channels: dict[nn.Module, tuple[Tensor, int]] = {}  # a layer's scores, and channels before it
        self._widths: dict[nn.Module, int] = {}

    def refresh(self) -> None:
        """Forget the scores: the next group asks for new ones."""
        self._channels, self._widths = {}, {}

    @torch.no_grad()
    def __call__(self, group: tp.Group) -> Tensor | None:
        """One score for each channel of the group's root, ``(len(group[0].idxs),)``, float64; higher is kept.

        None if no layer of the group has scores: see ``skipped``.
        """
        self._update(group)
        channels, inverse = np.unique(np.array(group[0].idxs, dtype=np.int64), return_inverse=True)
        size = len(channels)
        if not size:
            return torch.empty(0, dtype=torch.float64)
        place = np.full(int(channels[-1]) + 1, -1)  # of each channel of the root, in the result
        place[channels] = np.arange(size)
        members: list[Tensor] = []
        ranks: list[Tensor] = []
        for item in group:
            module = item.dep.target.module
            if module not in self._channels or not group._DG.is_out_channel_pruning_fn(item.dep.handler):
                continue
            scores, before = self._channels[module]
            own, roots = _mapped(item.idxs, item.root_idxs, place)
            if not len(own):
                continue
            if (last := int(own.max())) >= len(scores):
                raise GraphError(
                    f"the group removes channel {last} of {self._name(module)!r}, which has {len(scores)}: either it "
                    "was made before the model was pruned (ask the DependencyGraph anew), or Torch-Pruning's graph "
                    "does not follow this model (idap.prune_filters has a graph of its own)"
                )
            members.append(_scattered(scores[own], roots, size, _REDUCTIONS[self.reduction]))
            ranks.append(_scattered((own + before).double(), roots, size, "amin"))
        if not members:
            self._skip(group)
            return None
        rows = torch.stack(members)
        largest = rows.nan_to_num(nan=0.0).abs().max()
        if self.normalize and largest > 0:
            rows = rows / largest  # their sum stays finite, whatever they are
        total = self._reduce(rows)
        if self.normalize and (mean := total.abs().mean()) > 0:
            total = total / mean
        rank = torch.stack(ranks).nan_to_num(nan=torch.inf).amin(0).nan_to_num(posinf=0.0)
        return _apart(total, rank)[torch.from_numpy(inverse)].to(_device_of(group))

    def _reduce(self, rows: Tensor) -> Tensor:  # (members, size), NaN where a member lacks the channel
        missing = rows.isnan()
        if self.reduction == "max":
            total = rows.nan_to_num(nan=-torch.inf).amax(0)
        else:
            total = rows.nansum(0)
            if self.reduction == "mean":
                total = total / (~missing).sum(0)
        unknown = missing.all(0)
        if unknown.any():  # nothing speaks for removing what nothing is known of
            total = torch.where(unknown, total[~unknown].max(), total)
        return total

    def _update(self, group: tp.Group) -> None:
        """New scores if there are none, or if the model has been pruned since."""
        if self._channels and all(out_width(module) == width for module, width in self._widths.items()):
            return
        modules = dict(self.model.named_modules())
        if not any(item.dep.target.module in modules.values() for item in group):
            raise self._other_model()
        if isinstance(self.scores, Mapping):
            if self._channels:
                raise InvalidInputError(
                    "the model has been pruned since these scores were made: give batches, or a function as "
                    "scores, which are asked again after each step"
                )
            found = self.scores
        elif self.scores is not None:
            found = self.scores(self.model)
        else:
            assert self.batches is not None
            passed = profile(
                self.model, self.batches, blocks=(), heads=(), progress=False, forward=self.forward
            )
            found = self.criterion(self.model, passed)
        before = 0
        channels: dict[nn.Module, tuple[Tensor, int]] = {}
        for name, values in check_scores(self.model, found).items():
            if is_scored(modules[name]):  # attentions have a score a head
                channels[modules[name]] = (torch.from_numpy(values), before)
                before += len(values)
        if not channels:
            raise InvalidInputError("scores: got none of a convolution or linear layer, wanted one a channel")
        self._channels = channels
        self._widths = {module: out_width(module) for module in channels}

    def _skip(self, group: tp.Group) -> None:
        root = group[0].dep.target
        name = self._name(root.module)
        if not name and isinstance(root.module, nn.Module):
            raise self._other_model()
        name = name or root.name
        if name not in self.skipped:
            kind = type(root.module).__name__
            self.skipped[name] = (
                f"no layer whose output channels go with those of {name!r} ({kind}) has scores"
            )
            warnings.warn(f"left unpruned: {self.skipped[name]}", stacklevel=3)

    def _other_model(self) -> InvalidInputError:
        return InvalidInputError(
            f"the group is of another {type(self.model).__name__} than the one of this importance: make both from "
            "the same object, not from a copy"
        )

    def _name(self, layer: nn.Module) -> str:
        return next((name for name, module in self.model.named_modules() if module is layer), "")


def _apart(scores: Tensor, rank: Tensor) -> Tensor:
    """Scores that are all different, equal ones by rank (lower is less); none changes places with another."""
    order = torch.from_numpy(np.lexsort((rank.numpy(), scores.numpy())))
    ascending = scores[order]
    values = ascending + ascending.abs().clamp_min(_ZERO) * (rank[order] * _STEP)
    if (values.diff() <= 0).any():
        steps = values.tolist()
        for i in range(1, len(steps)):
            steps[i] = max(steps[i], math.nextafter(steps[i - 1], math.inf))
        values = torch.tensor(steps, dtype=torch.float64)
    return torch.empty_like(scores).scatter_(0, order, values)


def _mapped(idxs: list[int], root_idxs: list[int | None], place: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Channels of a layer, and the places of the root's channels that they go with; those without one left out."""
    if None in root_idxs:
        known = [(channel, root) for channel, root in zip(idxs, root_idxs) if root is not None]
        channels, roots = np.array(known, dtype=np.int64).reshape(-1, 2).T
    else:
        channels, roots = np.array(idxs, dtype=np.int64), np.array(root_idxs, dtype=np.int64)
    inside = roots < len(place)
    places = place[np.where(inside, roots, 0)]
    inside &= places >= 0
    return torch.from_numpy(channels[inside]), torch.from_numpy(places[inside])


def _scattered(values: Tensor, places: Tensor, size: int, reduction: str) -> Tensor:
    """(size,) with the values of each place reduced, NaN where there is none."""
    row = torch.full((size,), torch.nan, dtype=torch.float64)
    return row.scatter_reduce(0, places, values, reduction, include_self=False)


def _device_of(group: tp.Group) -> torch.device:
    for item in group:
        module = item.dep.target.module
        if isinstance(module, nn.Module):
            for parameter in module.parameters(recurse=False):
                return parameter.device
    return torch.device("cpu")


__all__ = ["ChannelImportance"]
