"""Wanda: weights ranked by ``|W_ij| · ‖X_j‖₂``, with the norms of the inputs from one pass of our kernel.

M. Sun, Z. Liu, A. Bair, J. Z. Kolter, A Simple and Effective Pruning Approach for Large Language Models,
arXiv 2306.11695. Needs nothing but torch: the masks are those of :mod:`torch.nn.utils.prune`.

The pass keeps one small buffer per layer and no activation. All norms are those of the model as it is given;
to take each block's inputs from the already pruned blocks before it, as the paper's code does, call
:func:`prune` block by block with ``layers``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from idap_kernels import ChannelStats
from idap_kernels.channel_stats import ROWS

from ..criteria import filters_first, groups_of, is_transposed
from ..errors import InvalidInputError, NonFiniteError
from ..profile import is_scored, is_transposed_linear
from ..profile import profile as _profile

_SQUARES = ROWS.index("act_sq_sum")


def sum_of_squares(stats: ChannelStats) -> Tensor:
    """``Σx²`` of each channel (C,) in float64, from statistics under the identity; 0 where there was no data.

    Raises:
        InvalidInputError: the statistics are of another activation, whose squares are not those of ``x``.
    """
    if stats.activation != "identity":
        raise InvalidInputError(
            f"the statistics are of {stats.activation}(x); the sum of x² needs activation='identity'"
        )
    return stats.state[_SQUARES]


def input_energy(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    backend: str = "auto",
    progress: bool = True,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, Tensor]:
    """``‖X_j‖₂² = Σx²`` of every input channel ``j``, over all samples and positions: one pass over the data.

    Energies of parts of the data add up to those of all of it.

    Args:
        model: any module; it runs as in :func:`idap.profile`.
        batches: as for :func:`idap.profile`.
        layers: names of the layers; ``None`` for every convolution and linear layer. The packed projection of
            queries, keys and values in ``nn.MultiheadAttention`` is no layer of its own and left out.
        backend: passed to the kernels.
        progress: show a progress bar on a terminal.
        forward: called as ``forward(model, batch)`` in place of ``model(batch)``.

    Returns:
        ``{layer name: (in_channels,) float64}``, in the order of ``layers``. A layer that the data never reached
        is missing.

    Warns:
        UserWarning: the data never reached a layer that ``layers`` names; names it.

    Raises:
        InvalidInputError: an unknown layer, or one that is neither a convolution nor linear.
        NonFiniteError: an input holds a NaN or an infinity, or its square overflows; names the layer.
        What :func:`idap.profile` raises for the data and the model.
    """
    energy = _energy(model, batches, layers, backend, progress, forward)
    _warn_unreached(energy, layers or ())
    return energy


def _energy(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Sequence[str] | None,
    backend: str,
    progress: bool,
    forward: Callable[[nn.Module, Any], Any] | None,
) -> dict[str, Tensor]:
    if layers is None and isinstance(model, nn.Module):
        layers = _scored_names(model)
    seen = _profile(
        model,
        batches,
        layers=(),
        blocks=(),
        inputs=layers or (),
        heads=(),
        backend=backend,
        progress=progress,
        forward=forward,
    ).inputs
    energy = {name: sum_of_squares(seen[name]) for name in layers or () if name in seen}
    for name, values in energy.items():
        if not values.isfinite().all():
            raise NonFiniteError(
                f"the input of layer {name!r}, or its square, is NaN or infinite: look at the inputs and weights; "
                "in float16, try bfloat16 or float32"
            )
    return energy


def _scored_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if is_scored(module)]


def _warn_unreached(energy: Mapping[str, Tensor], wanted: Iterable[str]) -> None:
    if unreached := [name for name in wanted if name not in energy]:
        warnings.warn(
            f"the data never reached {', '.join(map(repr, unreached))}: no energy, no mask; give data or a forward "
            "function that runs them, or leave them out with layers=",
            UserWarning,
            stacklevel=3,
        )


def scores(model: nn.Module, energy: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The Wanda score ``|W_ij| · ‖X_j‖₂`` of every weight.

    For a convolution ``X_j`` is the input channel that the weight reads, with all its positions; the padding
    and what a stride leaves out are not told apart by kernel position.

    Args:
        model: the model that ``energy`` was taken from.
        energy: ``{layer name: (in_channels,)}``, what :func:`input_energy` gives.

    Returns:
        ``{layer name: float64 tensor of the shape of the layer's weight}``.

    Raises:
        InvalidInputError: a layer is not in the model, is of another kind, or has another width; an energy is
            no tensor, or negative.
        NonFiniteError: a weight or an energy is NaN or infinite; names the layer.
    """
    return {
        name: _from_rows(module, _row_scores(name, module, energy[name]))
        for name, module in _modules(model, energy).items()
    }


def masks(
    model: nn.Module,
    energy: Mapping[str, Tensor],
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """Which weights stay, decided for every output (neuron, filter) on its own, as the paper does.

    Exactly one of ``sparsity`` and ``pattern`` is needed. Of equal scores the lower index is removed first.

    Args:
        model: the model that ``energy`` was taken from.
        energy: what :func:`input_energy` gives; its layers are the ones masked.
        sparsity: share of each output's weights to remove, in [0, 1): ``int(sparsity · weights)`` of them.
        pattern: ``(n, m)``: keep the best ``n`` of every ``m`` consecutive input channels, ``(2, 4)`` for the
            hardware's 2:4; in a convolution, at each kernel position.

    Returns:
        ``{layer name: bool tensor of the shape of the layer's weight}``, true where the weight stays.

    Raises:
        InvalidInputError: what :func:`scores` raises it for; ``sparsity`` and ``pattern`` both or neither; a
            value out of range; a layer whose input channels are no multiple of ``m``.
        NonFiniteError: a weight or an energy is NaN or infinite; names the layer.
    """
    _check_amount(sparsity, pattern)
    chosen = {}
    for name, module in _modules(model, energy).items():
        rows = _row_scores(name, module, energy[name])  # (O, I, K)
        keep = _best_of(name, rows, *pattern) if pattern is not None else _best(rows, sparsity or 0.0)
        chosen[name] = _from_rows(module, keep)
    return chosen


def apply_masks(model: nn.Module, chosen: Mapping[str, Tensor]) -> nn.Module:
    """Put the masks on the weights with :func:`torch.nn.utils.prune.custom_from_mask`, in place.

    Masks put on a layer again join those it has. ``torch.nn.utils.prune.remove(module, "weight")`` makes them
    final. Nothing is changed if any mask does not fit.

    Args:
        model: changed in place and returned.
        chosen: ``{layer name: tensor of the shape of the layer's weight}``, as :func:`masks` gives: bool, or
            numbers 0 and 1.

    Raises:
        InvalidInputError: a layer is not in the model, is of another kind, or its weight has another shape; a
            mask is no tensor, or holds something other than 0 and 1.
    """
    modules = _modules(model, chosen)
    for name, module in modules.items():
        _check_tensor(f"the mask of layer {name!r}", chosen[name], "masks")
        if chosen[name].shape != _weight(module).shape:
            raise InvalidInputError(
                f"the mask of layer {name!r} is {tuple(chosen[name].shape)}, its weight "
                f"{tuple(_weight(module).shape)}: make the masks from this model"
            )
        if ((chosen[name] != 0) & (chosen[name] != 1)).any():
            raise InvalidInputError(
                f"the mask of layer {name!r} holds numbers other than 0 and 1; a mask is 1 where the weight stays: "
                "take what masks gives, not scores"
            )
    for name, module in modules.items():
        torch_prune.custom_from_mask(module, "weight", chosen[name].to(_weight(module).device))
    return model


def prune(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    layers: Sequence[str] | None = None,
    backend: str = "auto",
    progress: bool = True,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, Tensor]:
    """:func:`input_energy`, :func:`masks` and :func:`apply_masks` in one call; ``model`` is changed in place.

    Returns:
        The masks.

    Warns:
        UserWarning: the data never reached a layer, which is left without a mask; names it.

    Raises:
        What the three raise; the model is then as it was.
    """
    _check_amount(sparsity, pattern)
    energy = _energy(model, batches, layers, backend, progress, forward)
    _warn_unreached(energy, _scored_names(model) if layers is None else layers)
    chosen = masks(model, energy, sparsity=sparsity, pattern=pattern)
    apply_masks(model, chosen)
    return chosen


def _check_amount(sparsity: float | None, pattern: tuple[int, int] | None) -> None:
    if (sparsity is None) == (pattern is None):
        raise InvalidInputError(
            f"got sparsity={sparsity} and pattern={pattern}: give one of them, as sparsity=0.5 or pattern=(2, 4)"
        )
    if sparsity is not None and not (_is_number(sparsity, Real) and 0 <= sparsity < 1):
        raise InvalidInputError(
            f"sparsity is {sparsity!r}; wanted the share of weights to remove, a number in [0, 1), as 0.5"
        )
    if pattern is not None and not (
        isinstance(pattern, (tuple, list))
        and len(pattern) == 2
        and all(_is_number(count, Integral) for count in pattern)
        and 0 < pattern[0] < pattern[1]
    ):
        raise InvalidInputError(
            f"pattern is {pattern!r}; wanted (n, m), n of m weights kept, two whole numbers 0 < n < m, as (2, 4)"
        )


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_tensor(what: str, value: object, function: str) -> None:
    if not isinstance(value, Tensor):
        raise InvalidInputError(f"{what}: got {type(value).__name__}, wanted a tensor, as {function} gives")


def _modules(model: nn.Module, named: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    for name in named:
        module = modules.get(name)
        if module is None or not is_scored(module):
            what = "not there" if module is None else f"a {type(module).__name__}"
            raise InvalidInputError(
                f"layer {name!r} is {what} in this model; wanted a convolution or a linear layer"
            )
    return {name: modules[name] for name in named}


def _weight(module: nn.Module) -> Tensor:
    """The weight as it works now: under a mask of torch's pruning ``weight`` is that of the last forward pass."""
    original, mask = getattr(module, "weight_orig", None), getattr(module, "weight_mask", None)
    if isinstance(original, Tensor) and isinstance(mask, Tensor):
        return original.detach() * mask
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _to_rows(module: nn.Module, weight: Tensor) -> Tensor:
    """(O, I / groups, K): the weights of each output, by input channel and kernel position."""
    rows = filters_first(module, weight)
    return rows.flatten(2) if rows.dim() > 2 else rows[:, :, None]


def _from_rows(module: nn.Module, rows: Tensor) -> Tensor:
    """The inverse of :func:`_to_rows`."""
    if is_transposed_linear(module):
        return rows.squeeze(2).t()
    shape = _weight(module).shape
    if is_transposed(module):
        by_group = rows.unflatten(0, (groups_of(module), -1))
        return by_group.transpose(1, 2).reshape(shape)
    return rows.reshape(shape)


def _row_scores(name: str, module: nn.Module, energy: Tensor) -> Tensor:
    """``|W| · ‖X‖₂`` (O, I / groups, K) in float64."""
    _check_tensor(f"the energy of layer {name!r}", energy, "input_energy")
    rows = _to_rows(module, _weight(module)).double()
    groups = groups_of(module)
    if energy.shape != (rows.shape[1] * groups,):
        raise InvalidInputError(
            f"layer {name!r} has {rows.shape[1] * groups} input channels, the energies are "
            f"{tuple(energy.shape)}: take them from this model"
        )
    if (energy < 0).any():
        raise InvalidInputError(
            f"the energy of layer {name!r} is negative at channel {int((energy < 0).nonzero()[0])}; it is the sum "
            "of the squares of its inputs: take it from input_energy"
        )
    norms = energy.to(rows).sqrt().view(groups, -1)  # outputs of one group read the same inputs
    values = rows.abs() * norms.repeat_interleave(len(rows) // groups, 0)[:, :, None]
    if not values.isfinite().all():
        raise NonFiniteError(f"a weight of layer {name!r}, or the energy of an input, is NaN or infinite")
    return values


def _best(rows: Tensor, sparsity: float) -> Tensor:
    flat = rows.flatten(1)
    worst = flat.argsort(dim=1, stable=True)[:, : int(flat.shape[1] * sparsity)]
    keep = torch.ones_like(flat, dtype=torch.bool)
    return keep.scatter_(1, worst, False).view_as(rows)


def _best_of(name: str, rows: Tensor, n: int, m: int) -> Tensor:
    if rows.shape[1] % m:
        raise InvalidInputError(
            f"layer {name!r} reads {rows.shape[1]} input channels, no multiple of {m}: leave it out with layers="
        )
    parts = rows.unflatten(1, (-1, m))  # (O, I / groups / m, m, K)
    worst = parts.argsort(dim=2, stable=True)[:, :, : m - n]
    keep = torch.ones_like(parts, dtype=torch.bool)
    return keep.scatter_(2, worst, False).flatten(1, 2)


__all__ = ["apply_masks", "input_energy", "masks", "prune", "scores", "sum_of_squares"]
