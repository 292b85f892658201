"""Scores of filters and blocks: flow divergence, and its rivals from the same profile.

Every criterion of filters is a function ``(model, profile)`` and gives ``{layer name: (out_channels,)}`` in
float64; higher is kept. Layers come in the order of the profile.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from idap_kernels import filter_norms

from . import inputs as _inputs
from .errors import InvalidInputError
from .profile import ActivationProfile, is_scored, is_transposed_linear

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def flow_divergence(model: nn.Module, profile: ActivationProfile) -> dict[str, Tensor]:
    """The flow divergence of every filter and neuron of the profiled layers.

    ``d_k = (1 / (C·S)) · mean_b ‖σ(Y[b, k, :])‖₂ · ‖W_k‖₂`` with ``Y`` (B, C, S) the output of the layer, ``σ``
    the activation of the profile, ``W_k`` the weights that make channel ``k`` (IDAP++, arXiv 2511.20141). The
    root is taken per sample; where the number of positions ``S`` differed between batches it is the mean.

    Raises:
        InvalidInputError: the profile does not fit the model.
    """
    norms = weight_l2(model, profile)
    scores = {}
    for name, stats in profile.layers.items():
        positions = stats.count / stats.samples
        scores[name] = stats.flow_norm * norms[name] / (stats.channels * positions)
    return scores


def layer_divergence(model: nn.Module, profile: ActivationProfile) -> dict[str, float]:
    """The divergence of every profiled block: ``E_x[‖T_{l+1} − T_l‖₂ / (‖T_l‖₂ + ε)]``, over samples.

    Raises:
        InvalidInputError: the profile does not fit the model.
    """
    _check(profile)
    modules = dict(model.named_modules())
    for name in profile.blocks:
        if name not in modules:
            raise InvalidInputError(
                f"the profile has a block {name!r}, which the model has not: profile it again"
            )
    values = {}
    for name, stats in profile.blocks.items():
        values[name] = float(stats.relative_change.mean())
        if not math.isfinite(values[name]):
            raise InvalidInputError(
                f"the divergence of block {name!r} is {values[name]}: its output is not finite"
            )
    return values


def weight_l2(model: nn.Module, profile: ActivationProfile) -> dict[str, Tensor]:
    """``‖W_k‖₂`` (Li et al., Pruning Filters for Efficient ConvNets, 2017, with the L2 norm)."""
    names, weights = _weights(model, profile)
    return dict(zip(names, filter_norms(weights), strict=True))


def weight_l1(model: nn.Module, profile: ActivationProfile) -> dict[str, Tensor]:
    """``‖W_k‖₁`` (Li et al., Pruning Filters for Efficient ConvNets, 2017)."""
    names, weights = _weights(model, profile)
    sums = (w.detach().double().abs().flatten(1).sum(1) for w in weights)
    return dict(zip(names, sums, strict=True))


def activation_mean(model: nn.Module, profile: ActivationProfile) -> dict[str, Tensor]:
    """Mean ``|y|`` of each channel."""
    return {name: stats.abs_mean for name, stats in profile.layers.items()}


def activation_variance(model: nn.Module, profile: ActivationProfile) -> dict[str, Tensor]:
    """Variance of each channel over samples and positions."""
    return {name: stats.var for name, stats in profile.layers.items()}


def positive_fraction(model: nn.Module, profile: ActivationProfile) -> dict[str, Tensor]:
    """Share of positive outputs: 1 − APoZ (Hu et al., Network Trimming, 2016)."""
    return {name: stats.positive_fraction for name, stats in profile.layers.items()}


def _check(profile: ActivationProfile) -> None:
    if not isinstance(profile, ActivationProfile):
        raise InvalidInputError(
            f"profile is a {type(profile).__name__}; pass what idap.profile(model, batches) returned"
        )


def _weights(model: nn.Module, profile: ActivationProfile) -> tuple[list[str], list[Tensor]]:
    """The profiled layers and their weights with one filter per row of the first dimension."""
    _check(profile)
    modules = dict(model.named_modules())
    weights = []
    for name, stats in profile.layers.items():
        module = modules.get(name)
        if module is None or not is_scored(module):
            what = "not there" if module is None else f"a {type(module).__name__}"
            raise InvalidInputError(
                f"the profile has a layer {name!r}, which in this model is {what}: profile the model again"
            )
        with (
            _inputs.evaluating(module),
            torch.no_grad(),
        ):  # a parametrisation may change its state in training
            weight = _filters_first(module)
        if weight.shape[0] != stats.channels:
            raise InvalidInputError(
                f"layer {name!r} has {weight.shape[0]} filters, the profile {stats.channels}: profile it again"
            )
        weights.append(weight)
    return list(profile.layers), weights


def _filters_first(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, _TRANSPOSED):  # (in, out / groups, *)
        by_group = weight.unflatten(0, (module.groups, -1)).transpose(1, 2)
        return by_group.flatten(0, 1)
    if is_transposed_linear(module):  # (in, out)
        return weight.t()
    return weight


RIVALS = {
    "weight_l1": weight_l1,
    "weight_l2": weight_l2,
    "activation_mean": activation_mean,
    "activation_variance": activation_variance,
    "positive_fraction": positive_fraction,
}

__all__ = ["RIVALS", "flow_divergence", "layer_divergence", *RIVALS]
