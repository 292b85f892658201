"""Scores of filters and blocks: flow divergence, and its rivals.

Every criterion of filters is a function ``(model, profile)`` and gives ``{layer name: (out_channels,)}`` in
float64; higher is kept. Layers come in the order of the profile. Those that need more than weights and
statistics are made by a function that takes what they need: ``taylor(pairs)``, ``bn_scale(example_inputs)``.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from idap_kernels import filter_norms

from . import inputs as _inputs
from .calibration import following_norms
from .errors import EmptyDataError, InvalidInputError, NonFiniteError
from .heads import head_divergence
from .inputs import Inputs
from .profile import CONVOLUTIONS, ActivationProfile, is_scored, is_transposed_linear

Criterion = Callable[[nn.Module, ActivationProfile], dict[str, Tensor]]


def flow_divergence(model: nn.Module, profile: ActivationProfile) -> dict[str, Tensor]:
    """The flow divergence of every filter and neuron of the profiled layers.

    ``d_k = (1 / (C·S)) · mean_b ‖σ(Y[b, k, :])‖₂ · ‖W_k‖₂`` with ``Y`` (B, C, S) the output of the layer, ``σ``
    the activation of the profile, ``W_k`` the weights that make channel ``k`` (IDAP++, arXiv 2511.20141). The
    root is taken per sample; where the number of positions ``S`` differed between batches it is the mean. The
    heads of the profile are scored too, under the name of their attention module: see
    :func:`idap.heads.head_divergence`.

    Raises:
        InvalidInputError: the profile does not fit the model.
    """
    norms = weight_l2(model, profile)
    scores = {}
    for name, stats in profile.layers.items():
        positions = stats.count / stats.samples
        scores[name] = stats.flow_norm * norms[name] / (stats.channels * positions)
    return scores | head_divergence(model, profile)


def layer_divergence(model: nn.Module, profile: ActivationProfile) -> dict[str, float]:
    """The divergence of every profiled block: ``E_x[‖T_{l+1} − T_l‖₂ / (‖T_l‖₂ + ε)]``, over samples.

    ``T_l`` is what a block is given and ``T_{l+1}`` what it gives. A block that is cut out adds channels to a
    state that goes on beside them: ``T_l`` is that state with zeros in their places and ``T_{l+1}`` the same with
    them, so that its divergence is the norm of what it makes over the norm of what it is given.

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


def fpgm(model: nn.Module, profile: ActivationProfile) -> dict[str, Tensor]:
    """``Σ_j ‖W_k − W_j‖₂`` over the filters ``j`` of the same layer: a filter near the geometric median of its
    layer is the one that the others can stand in for (He et al., Filter Pruning via Geometric Median, 2019).
    """
    names, weights = _weights(model, profile)
    rows = (w.detach().double().flatten(1) for w in weights)
    return {name: torch.cdist(w, w).sum(1) for name, w in zip(names, rows, strict=True)}


def random_scores(model: nn.Module, profile: ActivationProfile, *, seed: int = 0) -> dict[str, Tensor]:
    """Uniform numbers, fixed by the seed, the layer's name and its width alone: what any criterion must beat."""
    _check(profile)
    scores = {}
    for name, stats in profile.layers.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed & 0xFFFFFFFF))
        scores[name] = torch.rand(stats.channels, dtype=torch.float64, generator=generator)
    return scores


def taylor(pairs: Iterable[Any], loss: Callable[[Any, Any], Tensor] = F.cross_entropy) -> Criterion:
    """A criterion that reads gradients: ``Σ_w (w · ∂L/∂w)²`` over the weights of a filter, mean over batches
    (Molchanov et al., Importance Estimation for Neural Network Pruning, 2019, equation 8).

    The gradients are taken in evaluation mode on a copy of the model.

    Args:
        pairs: ``(inputs, target)``, a re-iterable; inputs as :func:`idap.profile` takes them.
        loss: of ``(outputs, target)``, a scalar.

    The criterion raises:
        InvalidInputError: a batch is no pair, or the loss is no scalar that depends on the weights.
        EmptyDataError: there is no batch.
        NonFiniteError: a gradient is NaN or infinite; names the layer.
    """

    def criterion(model: nn.Module, profile: ActivationProfile) -> dict[str, Tensor]:
        names, rows = _weights(model, profile)
        sums = [torch.zeros(len(w), dtype=torch.float64, device=w.device) for w in rows]
        work = copy.deepcopy(model).eval().requires_grad_(True)
        modules = dict(work.named_modules())
        batches = 0
        for pair in pairs:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise InvalidInputError(
                    f"taylor: a batch is a {type(pair).__name__}, wanted a pair (inputs, target)"
                )
            inputs, target = (_inputs.to_model(_inputs.without_inference(part), work) for part in pair)
            # Cached: a parametrised weight is computed anew at each reading, and the gradient is that of one.
            with torch.inference_mode(False), torch.enable_grad(), parametrize.cached():
                weights = [modules[name].weight for name in names]
                value = loss(_inputs.call(work, inputs), target)
                if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                    raise InvalidInputError(
                        "taylor: the loss must be a tensor of one number that depends on the weights, got "
                        f"{tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}"
                    )
                gradients = torch.autograd.grad(value.sum(), weights, allow_unused=True)  # type: ignore[arg-type]
            for i, (name, gradient) in enumerate(zip(names, gradients, strict=True)):
                if gradient is not None:
                    product = filters_first(modules[name], weights[i].detach() * gradient)  # type: ignore[operator]
                    sums[i] += product.double().square().flatten(1).sum(1)
            batches += 1
        if not batches:
            raise EmptyDataError("taylor: no batches; pass a list of pairs (inputs, target), not an iterator")
        for name, total in zip(names, sums, strict=True):
            if not total.isfinite().all():
                raise NonFiniteError(f"taylor: a gradient of layer {name!r} is NaN or infinite")
        return {name: total / batches for name, total in zip(names, sums, strict=True)}

    return criterion


def bn_scale(example_inputs: Inputs) -> Criterion:
    """A criterion that reads ``|γ|`` of the batch norm that takes a layer's output as it is (Liu et al.,
    Learning Efficient Convolutional Networks through Network Slimming, 2017).

    Layers without such a norm get no score. The criterion raises InvalidInputError if no layer has one.

    Args:
        example_inputs: one input of the model, run once to see which norm follows which layer.
    """

    def criterion(model: nn.Module, profile: ActivationProfile) -> dict[str, Tensor]:
        names, _ = _weights(model, profile)
        modules = dict(model.named_modules())
        norms = following_norms(model, example_inputs)
        scores = {}
        for name in names:
            scale = modules[norms[name]].weight if name in norms else None
            if isinstance(scale, Tensor):
                scores[name] = scale.detach().double().abs()
        if not scores:
            raise InvalidInputError(
                f"bn_scale: no layer of {type(model).__name__} has a batch norm with scales right behind it; "
                "take another criterion"
            )
        return scores

    return criterion


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
            weight = filters_first(module, module.weight)  # type: ignore[arg-type]
        if weight.shape[0] != stats.channels:
            raise InvalidInputError(
                f"layer {name!r} has {weight.shape[0]} filters, the profile {stats.channels}: profile it again"
            )
        weights.append(weight)
    return list(profile.layers), weights


def filters_first(module: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight, or a tensor of its shape, as (out_channels, ...): what makes each channel."""
    if is_transposed(module):  # (in, out / groups, *)
        by_group = weight.unflatten(0, (groups_of(module), -1)).transpose(1, 2)
        return by_group.flatten(0, 1)
    if is_transposed_linear(module):  # (in, out)
        return weight.t()
    return weight


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is a transposed convolution, with its weight as (in, out / groups, *)."""
    return isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))


def groups_of(module: nn.Module) -> int:
    """The groups of a convolution; 1 for any other layer."""
    return module.groups if isinstance(module, CONVOLUTIONS) else 1


def out_width(module: nn.Module) -> int:
    """The number of output channels of a convolution or linear layer, by the shape of its weight."""
    shape: torch.Size = module.weight.shape  # type: ignore[assignment, union-attr]
    if is_transposed(module):
        return shape[1] * groups_of(module)
    return shape[1] if is_transposed_linear(module) else shape[0]


def in_width(module: nn.Module) -> int:
    """The number of input channels of a convolution or linear layer, by the shape of its weight."""
    shape: torch.Size = module.weight.shape  # type: ignore[assignment, union-attr]
    if is_transposed(module) or is_transposed_linear(module):
        return shape[0]
    return shape[1] * groups_of(module)


def places(values: Tensor) -> Tensor:
    """The place of each value (C,) in ascending order, 0 … C − 1 in int64; of equals the lower index first."""
    return values.argsort(stable=True).argsort()


RIVALS: dict[str, Criterion] = {
    "random": random_scores,
    "weight_l1": weight_l1,
    "weight_l2": weight_l2,
    "fpgm": fpgm,
    "activation_mean": activation_mean,
    "activation_variance": activation_variance,
    "positive_fraction": positive_fraction,
}

__all__ = [
    "RIVALS",
    "activation_mean",
    "activation_variance",
    "bn_scale",
    "flow_divergence",
    "fpgm",
    "layer_divergence",
    "positive_fraction",
    "random_scores",
    "taylor",
    "weight_l1",
    "weight_l2",
]
