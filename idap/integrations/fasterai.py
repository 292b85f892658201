"""IDAP's scores as a criterion of fasterai, for its Sparsifier, its Pruner and their callbacks.

fasterai's ``Criteria`` scores the weights of one layer and reduces them over a granularity; ``calibrate`` runs
data through the model and leaves a vector for each layer in ``scale``. Its own criteria keep there the norms of
the *input* channels. Here ``scale`` holds a score for each *output* channel, from any criterion of one profile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

try:
    from fasterai.core.criteria import Criteria
    from fasterai.core.granularity import Granularities
    from fasterai.core.parametrize import _master
except ImportError as error:
    raise ImportError("idap.integrations.fasterai needs fasterai >= 0.4: pip install fasterai") from error

from ..criteria import Criterion, filters_first, flow_divergence, groups_of, is_transposed, out_width
from ..errors import InvalidInputError
from ..filters import check_scores
from ..profile import is_scored, is_transposed_linear
from ..profile import profile as _profile

_OUTPUTS = ("filter", "row")  # what fasterai's Pruner asks of the layers that make the channels of a group
_INPUTS = ("shared_kernel", "column")  # and of those that read them
_TIE = 1e-12  # steps between tied channels, relative to the layer's highest score


class ProfileCriteria(Criteria):
    """A fasterai ``Criteria`` whose scores come from :func:`idap.profile`.

    ``scale[layer]`` is the criterion's score of each output channel, ``s_k``, (out_channels,) in float64. A
    weight is given its share of it, ``s_k · |w| / ‖W_k‖₂`` with the norm at calibration, and the shares of a
    granularity are joined by their root sum of squares: a whole filter scores ``s_k``, scaled by how its norm
    has changed since. For flow divergence a weight's score is ``mean_b ‖σ(Y_k)‖₂ / (C·S) · |w|``.

    *Sparsifier*: pass ``data=``; it calibrates by itself. Every granularity works.

    *Pruner*: it does not calibrate; call :meth:`calibrate` before. A group's channel is scored by the filters
    that make it; the layers that read it score it 0. The library divides the sum by the number of
    both, the same for all channels of a group, so it matters under ``context="global"`` alone. After a step
    that changed widths, all layers are profiled anew on the same data, as many batches, at the next one.

    Channels with equal scores are told apart by order, the lower index being removed first (by steps of 1e-12
    of the layer's highest score). What the Sparsifier has masked stays below all else. Scores below zero are
    moved up by the layer's lowest, as fasterai does.

    Args:
        criterion: of ``(model, profile)``, such as :func:`idap.flow_divergence` or one of :mod:`idap.criteria`.
        activation: the ``σ`` of the profile.
        n_batches: how many batches to read when :meth:`calibrate` is not told; ``None`` for all. The default is
            the library's.
        normalizer: of the library's ``Normalizer``, applied to the scores of each layer; for comparing layers
            under ``context="global"``.
        backend: passed to the kernels.
        forward: called as ``forward(model, batch)`` with each batch as it comes, in place of
            ``model(inputs)`` with the inputs of a pair ``(inputs, targets)``.

    Raises:
        InvalidInputError: the criterion is no function, or ``n_batches`` no number of batches.

    Calling it raises:
        InvalidInputError: it was not calibrated on the layer asked about, the granularity is not of this kind
            of layer, or widths changed and the data was an iterator, which cannot be read again.
    """

    def __init__(
        self,
        criterion: Criterion = flow_divergence,
        *,
        activation: str = "relu",
        n_batches: int | None = 5,
        normalizer: Callable[[Tensor], Tensor] | None = None,
        backend: str = "auto",
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ):
        if not callable(criterion):
            raise InvalidInputError(
                f"criterion: got {type(criterion).__name__}, wanted a function of (model, profile), such as "
                "idap.flow_divergence; for scores that you have, lambda model, profile: scores"
            )
        _check_n_batches(n_batches)
        super().__init__(torch.abs, reducer=_root_sum_of_squares, normalizer=normalizer, needs_data=True)
        self.scale: dict[nn.Module, Tensor] = {}
        self.criterion = criterion
        self.activation = activation
        self.n_batches = n_batches
        self.backend = backend
        self.forward = forward
        self._norms: dict[nn.Module, Tensor] = {}
        self._names: dict[nn.Module, str] = {}
        self._source: tuple[Any, ...] | None = None

    def calibrate(
        self,
        model: nn.Module,
        data: Any,
        layer_type: type[nn.Module] | tuple[type[nn.Module], ...] | None = None,
        n_batches: int | None = None,
    ) -> None:
        """Profile the model once and fill ``scale``, and nothing else: mode, gradients and hooks stay.

        Args:
            model: the network to prune.
            data: a tensor, one batch; or batches, as a list or a ``DataLoader``: tensors, mappings, or pairs
                whose first item is the input.
            layer_type: the kind of layer to score; ``None`` for every convolution and linear layer.
            n_batches: how many batches to read; ``None`` for what the constructor was told.

        Raises:
            EmptyDataError: there is no batch.
            InvalidInputError: the model has no layer of ``layer_type`` with filters, ``n_batches`` is no number
                of batches, or the criterion gave no mapping, a layer the model has not, or a score of the wrong
                length.
            NonFiniteError: an activation or a score is NaN or infinite; names the layer.
            What :func:`idap.profile` raises besides.
        """
        _check_n_batches(n_batches)
        try:
            isinstance(model, layer_type or nn.Module)
        except TypeError as error:
            raise InvalidInputError(
                f"layer_type: got {layer_type!r}, wanted a type of layer such as nn.Conv2d, a tuple of them, or None"
            ) from error
        names = {
            name: module
            for name, module in model.named_modules()
            if is_scored(module)
            and not is_transposed_linear(module)  # fasterai has no granularities for these
            and (layer_type is None or isinstance(module, layer_type))
        }
        if not names:
            raise InvalidInputError(
                f"{type(model).__name__} has no {_type_names(layer_type)} with filters; wanted a type of its "
                "convolutions or linear layers as layer_type, or None for all of them"
            )
        limit = self.n_batches if n_batches is None else n_batches
        seen = _profile(
            model,
            self._batches(data, limit),
            layers=list(names),
            blocks=(),
            heads=(),
            activation=self.activation,
            backend=self.backend,
            progress=False,
            forward=self.forward,
        )
        given = check_scores(model, self.criterion(model, seen))
        scale, norms = {}, {}
        for name, values in given.items():
            module = names.get(name)
            if module is None:
                continue
            scores = torch.from_numpy(values)
            scale[module] = (scores - scores.min().clamp(max=0)).to(_master(module).device)
            norms[module] = _filters(module, _master(module).detach().double()).norm(dim=1)
        self.scale, self._norms = scale, norms
        self._names = {module: name for name, module in names.items()}
        self._source = None if isinstance(data, Iterator) else (model, data, layer_type, n_batches)

    @torch.no_grad()
    def __call__(self, m: nn.Module, g: str, squeeze: bool = False) -> Tensor:
        """The scores of one layer at a granularity of fasterai, higher = keep, in float64.

        Args:
            m: a layer of the calibrated model.
            g: name of the granularity.
            squeeze: whole channels of a layer, without dimensions of one: how fasterai's Pruner asks. Then
                ``filter`` and ``row`` are (out_channels,), ``shared_kernel`` and ``column`` (in_channels,).

        Returns:
            The shape of the weight, with one for the dimensions that ``g`` joins; or one dimension.
        """
        self._follow_widths()
        if squeeze and g in _INPUTS:
            return torch.zeros(
                filters_first(m, _master(m)).shape[1] * groups_of(m),
                dtype=torch.float64,
                device=_master(m).device,
            )
        values = self._weight_scores(m)
        mask = getattr(m, "_mask", None)
        alive = torch.ones_like(values) if mask is None else mask.to(values).expand_as(values)
        values = values * alive
        if squeeze and g in _OUTPUTS:
            rows = _filters(m, values).norm(dim=1)
            return self._normalized(_apart(rows, _filters(m, alive).amax(1) > 0))
        dim = self._dimensions(m, g)
        scores: Tensor = self._reduce(values, dim)
        joined = _axes(dim)
        if joined == _axes(range(1, values.dim() + 1)) - {1 if is_transposed(m) else 0}:
            some = alive.amax(sorted(joined), keepdim=True) > 0
            scores = _apart(scores.flatten(), some.flatten()).view_as(scores)
        scores = self._normalized(scores)
        return scores.squeeze(sorted(joined)) if squeeze else scores

    def _normalized(self, scores: Tensor) -> Tensor:
        normalized: Tensor = self._normalize(scores)
        return normalized

    def _weight_scores(self, m: nn.Module) -> Tensor:
        """The share of each weight, in the shape of the weight."""
        if m not in self.scale:
            name = self._names.get(m)
            which = f"a {type(m).__name__}" if name is None else f"layer {name!r}"
            raise InvalidInputError(
                f"there are no scores of {which}: call calibrate(model, data) with the model, a layer_type that "
                "takes it in, and a criterion that scores it; a layer that the data does not reach has none"
            )
        weight = _master(m).detach()
        norms, scale = (_per_weight(m, of[m].to(weight.device), weight) for of in (self._norms, self.scale))
        even = _filters(m, weight).shape[1] ** -0.5
        share = torch.where(norms > 0, self.f(weight.double()) / norms, even)
        return share * scale

    def _dimensions(self, m: nn.Module, g: str) -> list[int]:
        try:
            return list(Granularities.get_dim(m, g))
        except (KeyError, ValueError) as error:
            raise InvalidInputError(f"fasterai has no granularity {g!r} for {type(m).__name__}") from error

    def _follow_widths(self) -> None:
        changed = next((m for m, scale in self.scale.items() if len(scale) != out_width(m)), None)
        if changed is None:
            return
        if self._source is None:
            raise InvalidInputError(
                f"layer {self._names[changed]!r} has {out_width(changed)} channels, the scores are "
                f"of {len(self.scale[changed])}: call calibrate again, or give it a list or a DataLoader to read again"
            )
        self.calibrate(*self._source)

    def _batches(self, data: Any, limit: int | None) -> Iterable[Any]:
        if isinstance(data, Tensor):
            data = [data]
        if not isinstance(data, Iterable) or isinstance(data, Mapping):
            raise InvalidInputError(
                f"data is a {type(data).__name__}; wanted a tensor, or batches as a list or a DataLoader"
            )
        return (batch if self.forward is not None else _inputs_of(batch) for batch in islice(data, limit))


def _inputs_of(batch: Any) -> Any:
    if isinstance(batch, (tuple, list)) and len(batch) > 0:
        batch = batch[0]
    # fastai's tensors carry functions of their own through the network
    return batch.as_subclass(Tensor) if isinstance(batch, Tensor) else batch


def _root_sum_of_squares(scores: Tensor, dim: list[int]) -> Tensor:
    """A reducer as fasterai's: ``dim`` counts from a leading dimension of one."""
    return scores[None].square().sum(dim=dim, keepdim=True).sqrt().squeeze(0)


def _axes(dim: Iterable[int]) -> set[int]:
    """Dimensions of the weight, from fasterai's, which counts from a leading dimension of one."""
    return {d - 1 for d in dim if d > 0}


def _check_n_batches(n_batches: int | None) -> None:
    if n_batches is not None and (
        not isinstance(n_batches, Integral) or isinstance(n_batches, bool) or n_batches < 1
    ):
        raise InvalidInputError(f"n_batches: got {n_batches!r}, wanted a number of batches, or None for all")


def _type_names(layer_type: Any) -> str:
    types = layer_type if isinstance(layer_type, tuple) and layer_type else (layer_type or None,)
    return " or ".join("layer" if each is None else getattr(each, "__name__", repr(each)) for each in types)


def _apart(values: Tensor, alive: Tensor) -> Tensor:
    """The values (n,) above zero and all different, equal ones rising by index; those not alive 0."""
    order = torch.where(alive, values, -1).argsort(stable=True)
    ranked = values[order]
    step = _TIE * ranked[-1:].clamp(min=1e-18)
    rank = torch.arange(len(values), dtype=values.dtype, device=values.device)
    rising = (ranked - rank * step).cummax(0).values + (rank + 1) * step
    return torch.empty_like(values).scatter_(0, order, rising) * alive


def _filters(module: nn.Module, values: Tensor) -> Tensor:
    """Something of the shape of the weight as (out_channels, weights of a filter)."""
    return filters_first(module, values).flatten(1)


def _per_weight(module: nn.Module, values: Tensor, weight: Tensor) -> Tensor:
    """Values of output channels (out_channels,) so that they broadcast over the weight."""
    if is_transposed(module):  # (in, out / groups, *)
        by_input = values.view(groups_of(module), -1).repeat_interleave(len(weight) // groups_of(module), 0)
        return by_input.view(*by_input.shape, *[1] * (weight.dim() - 2))
    return values.view(-1, *[1] * (weight.dim() - 1))


__all__ = ["ProfileCriteria"]
