"""What a pruned model keeps of the original without any training: constant parts, and batch-norm statistics."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from idap_kernels import ChannelStats

from . import distributed
from . import inputs as _inputs
from .errors import EmptyDataError, InvalidInputError, NonFiniteError
from .inputs import Inputs
from .plan import ChannelRemoval, ChannelStep, PruningPlan
from .profile import is_scored, is_transposed_linear

_READERS = ("conv_in", "linear_in")


@dataclass
class _Structure:
    """What one pass tells of the layers: the sizes they work on, and the batch norm right behind them."""

    sizes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)


def following_norms(model: nn.Module, example_inputs: Inputs) -> dict[str, str]:
    """Layer name -> name of the batch norm that takes the layer's output as it is.

    Found by running the model once in evaluation mode. Layers and batch norms that are called more than once
    in a pass are left out.
    """
    return _look(model, example_inputs).norms


def _look(model: nn.Module, example_inputs: Inputs) -> _Structure:
    structure = _Structure()
    # The tensor is held, so that its id stays its own; its version tells what was written into it since.
    makers: dict[int, tuple[str, Tensor, int]] = {}
    calls: dict[str, int] = {}

    def leaving(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            entering, result = _inputs.first_tensor(args), _inputs.first_tensor(output)
            if entering is not None and result is not None:
                structure.sizes[name] = (tuple(entering.shape[2:]), tuple(result.shape[2:]))
                makers[id(result)] = (name, result, result._version)

        return hook

    def entering(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            tensor = _inputs.first_tensor(args)
            maker = None if tensor is None else makers.get(id(tensor))
            if maker is not None and maker[1]._version == maker[2]:
                structure.norms[maker[0]] = name

        return hook

    handles = []
    try:
        for name, module in model.named_modules():
            if is_scored(module):
                handles.append(module.register_forward_hook(leaving(name)))
            elif isinstance(module, _BatchNorm):
                handles.append(module.register_forward_pre_hook(entering(name)))
        with _inputs.evaluating(model), torch.no_grad():
            _inputs.call(model, _inputs.to_model(example_inputs, model))
    finally:
        for handle in handles:
            handle.remove()
    structure.norms = {
        layer: norm for layer, norm in structure.norms.items() if calls[layer] == calls[norm] == 1
    }
    return structure


@torch.no_grad()
def compensate(
    model: nn.Module, plan: PruningPlan, inputs: Mapping[str, ChannelStats], example_inputs: Inputs
) -> nn.Module:
    """A copy of ``model`` that already carries what the channels to be removed give on average.

    ``b += W[:, removed] · mean(x[removed])`` for every layer that reads removed channels (the idea of
    variance-based pruning, Berisha et al., ICCV 2025). Where the layer has no bias but a batch norm right
    behind it, the same goes into that norm's running mean with the opposite sign; where it has neither, or
    several layers share the bias, the layer stays as it is. A convolution's taps that fall into the zero
    padding are counted out, so that the mean over the positions is right and not only that in the middle.

    Args:
        model: at the width that ``plan`` was made for; not changed.
        plan: with one step of channel removal at most; it is not applied here, but on what is returned.
        inputs: statistics of what enters the layers, as ``profile(model, batches, inputs=names).inputs``.
            Layers that are missing in it are left alone.
        example_inputs: one input, to see the sizes of the maps and which norms follow which layers.

    Raises:
        InvalidInputError: the plan has several steps of channel removal, or statistics do not fit the model.
        NonFiniteError: a mean is NaN or infinite; names the layer.
    """
    steps = [step for step in plan.steps if isinstance(step, ChannelStep)]
    if len(steps) > 1:
        raise InvalidInputError(
            f"the plan has {len(steps)} steps of channel removal, and statistics of this model tell about the "
            "first alone: compensate and apply one step after the other"
        )
    result = copy.deepcopy(model)
    readers = [r for step in steps for r in step.removals if r.kind in _READERS and r.layer in inputs]
    if not readers:
        return result
    structure = _look(model, example_inputs)
    owners = Counter(id(parameter) for _, parameter in result.named_parameters(remove_duplicate=False))
    for removal in readers:
        module = result.get_submodule(removal.layer)
        shift = _shift(module, removal, inputs[removal.layer], structure.sizes.get(removal.layer))
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            if owners[id(bias)] <= 1:  # what one reader lacks is not what the others lack
                bias += shift.to(bias)
            continue
        norm = (
            result.get_submodule(structure.norms[removal.layer]) if removal.layer in structure.norms else None
        )
        if norm is not None and isinstance(norm.running_mean, Tensor):
            norm.running_mean -= shift.to(norm.running_mean)
    return result


def _shift(
    module: nn.Module,
    removal: ChannelRemoval,
    stats: ChannelStats,
    sizes: tuple[tuple[int, ...], tuple[int, ...]] | None,
) -> Tensor:  # (output channels,)
    """What the removed inputs of a layer give to each of its outputs on average, in float64."""
    if stats.channels != removal.size:
        raise InvalidInputError(
            f"{removal.layer}: the statistics are of {stats.channels} input channels, the plan of "
            f"{removal.size}; profile the model that the plan was made for"
        )
    weight = module.weight
    assert isinstance(weight, Tensor)
    means = stats.mean.to(weight.device, torch.float64)
    removed = torch.tensor(removal.removed, device=weight.device)
    if not means[removed].isfinite().all():
        raise NonFiniteError(f"{removal.layer}: the mean of an input channel is NaN or infinite")
    kept = torch.zeros_like(means).index_copy_(0, removed, means[removed])
    wide = weight.detach().double()
    if not isinstance(module, _ConvNd):
        return kept @ wide if is_transposed_linear(module) else wide @ kept
    wide = wide * _coverage(module, sizes).to(wide)
    table = wide.flatten(2).sum(2)  # (out, in / groups), of a transposed convolution (in, out / groups)
    parts = module.groups
    if module.transposed:
        return torch.einsum("gio,gi->go", table.unflatten(0, (parts, -1)), kept.view(parts, -1)).flatten()
    return torch.einsum("goi,gi->go", table.unflatten(0, (parts, -1)), kept.view(parts, -1)).flatten()


def _coverage(module: _ConvNd, sizes: tuple[tuple[int, ...], tuple[int, ...]] | None) -> Tensor:
    """Per tap of the kernel, its uses over the number of outputs; (*kernel)."""
    factors = []
    for axis, taps in enumerate(module.kernel_size):
        spread = torch.arange(taps) * module.dilation[axis]
        if sizes is None or (module.padding_mode != "zeros" and not module.transposed):
            factors.append(torch.ones(taps, dtype=torch.float64))
            continue
        size_in, size_out = sizes[0][axis], sizes[1][axis]
        if module.padding == "same":
            before = int(spread[-1]) // 2
        else:
            before = 0 if isinstance(module.padding, str) else module.padding[axis]
        # Of a transposed convolution the inputs are spread over the outputs, else the outputs over the inputs.
        walkers, within = (size_in, size_out) if module.transposed else (size_out, size_in)
        places = torch.arange(walkers)[:, None] * module.stride[axis] - before + spread
        factors.append(((places >= 0) & (places < within)).double().sum(0) / size_out)
    grid = torch.ones((), dtype=torch.float64)
    for factor in factors:
        grid = grid[..., None] * factor
    return grid


def recalibrate(model: nn.Module, batches: Iterable[Any]) -> int:
    """Re-estimate the running statistics of every batch norm on ``batches``, in place.

    The batch norms run in training mode and average mean and variance over the batches with equal weights;
    all else runs in evaluation mode, so that nothing is dropped and nothing trained. With several processes
    every one runs its share of the batches, and all end with the same statistics.

    Args:
        batches: model inputs: tensors, tuples of positional or dicts of keyword arguments.

    Returns:
        The number of batch norms that were re-estimated. Those that no batch reaches keep what they have.

    Raises:
        EmptyDataError: there is no batch.
        InvalidInputError: a batch is too small for batch statistics.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    if not norms:
        return 0
    before = copy.deepcopy([norm.state_dict() for norm in norms])
    calls = [0] * len(norms)
    handles = [
        norm.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))  # type: ignore[misc]
        for i, norm in enumerate(norms)
    ]
    count, problem = 0, None
    try:
        with _averaging(model, norms), torch.no_grad():
            for batch in distributed.shard(batches):
                _inputs.call(model, _inputs.to_model(batch, model))
                count += 1
    except ValueError as error:
        # Every process learns of it, so that none waits for another.
        problem = error
    finally:
        for handle in handles:
            handle.remove()
    everywhere, failures, *totals = distributed.total([count, problem is not None, *calls])
    for norm, state, reached in zip(norms, before, totals, strict=True):
        if failures or not reached:
            norm.load_state_dict(state)
    if failures:
        raise InvalidInputError(
            f"batch norms cannot be re-estimated on these batches: {problem or 'another process failed'}; use "
            "batches of two or more samples, or recalibrate=False"
        ) from problem
    if not everywhere:
        raise EmptyDataError("there is no batch to re-estimate the batch norms on")
    seen = [(norm, own, all_) for norm, own, all_ in zip(norms, calls, totals, strict=True) if all_]
    _average_over_processes(seen)
    return len(seen)


@contextmanager
def _averaging(model: nn.Module, norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Batch norms that start afresh and weigh every batch alike; all as it was afterwards."""
    norms = list(norms)
    momenta = [norm.momentum for norm in norms]
    with _inputs.evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        try:
            yield
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def _average_over_processes(norms: Iterable[tuple[_BatchNorm, int, float]]) -> None:
    """Weigh the averages of every process by the batches in them: (norm, own batches, batches of all)."""
    if distributed.world()[1] == 1:
        return
    for norm, own, everywhere in norms:
        for buffer in (norm.running_mean, norm.running_var):
            assert isinstance(buffer, Tensor)
            sums = distributed.total((buffer.double() * own).tolist())
            buffer.copy_(torch.tensor(sums, dtype=torch.float64) / everywhere)
        if isinstance(norm.num_batches_tracked, Tensor):
            norm.num_batches_tracked.fill_(int(everywhere))


__all__ = ["compensate", "following_norms", "recalibrate"]
