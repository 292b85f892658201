"""One convention for example inputs: a tensor, a tuple or list (positional), or a mapping (keywords)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .errors import EmptyDataError, InvalidInputError

Inputs: TypeAlias = "Tensor | Sequence[Any] | Mapping[str, Any]"


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split example inputs into positional and keyword arguments.

    Raises:
        InvalidInputError: if ``inputs`` is no tensor, tuple, list or mapping with string keys.
    """
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    # Not only dict: transformers' BatchEncoding is a UserDict.
    if isinstance(inputs, Mapping):
        bad = next((key for key in inputs if not isinstance(key, str)), None)
        if bad is not None:
            raise InvalidInputError(
                f"example inputs: got a mapping with the key {bad!r}, wanted argument names as keys"
            )
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    raise InvalidInputError(
        f"example inputs: got {type(inputs).__name__}, wanted a tensor, a tuple or list of positional "
        "arguments, or a mapping of keyword arguments"
    )


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Run ``model`` on ``inputs`` and return whatever it returns."""
    args, kwargs = as_call(inputs)
    return model(*args, **kwargs)


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a nested structure with ``function`` applied to every tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, function) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, function) for item in value)
    return value


def without_inference(inputs: Any) -> Any:
    """``inputs`` with a copy in place of every tensor made under ``torch.inference_mode``."""
    with torch.inference_mode(False):
        return map_tensors(inputs, lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


def to_device(inputs: Any, device: torch.device | str) -> Any:
    """A copy of ``inputs`` with every tensor on ``device``; mappings come back as plain dictionaries."""
    return map_tensors(inputs, lambda tensor: tensor.to(device))


def to_model(inputs: Any, model: nn.Module) -> Any:
    """``inputs`` on the device of the model's first parameter or buffer (unchanged if it has none)."""
    device = device_of(model)
    return inputs if device is None else to_device(inputs, device)


def device_of(model: nn.Module) -> torch.device | None:
    """Device of the first parameter or buffer, or None."""
    tensor = next((t for tensors in (model.parameters(), model.buffers()) for t in tensors), None)
    return None if tensor is None else tensor.device


def named_tensors(value: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a nested structure (tensor, sequence, mapping, dataclass), with its path.

    A cache of keys and values is passed over: it is what a model keeps for its next call, and as wide as its heads.
    """
    if isinstance(value, Tensor):
        yield prefix, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from named_tensors(item, f"{prefix}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from named_tensors(item, f"{prefix}[{index}]")
    elif is_cache(value):
        return
    elif value is not None and hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        for key, item in vars(value).items():
            if not key.startswith("_"):
                yield from named_tensors(item, f"{prefix}.{key}")


def is_cache(value: Any) -> bool:
    """Whether it is a cache of keys and values, as models of transformers fill it when they generate."""
    # Those of transformers, by their interface; older ones are mappings or sequences, and outputs like any other.
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


def outputs_of(value: Any) -> list[tuple[str, Tensor]]:
    """Every tensor a model returned, detached, with its path in the returned structure."""
    return [(path, tensor.detach()) for path, tensor in named_tensors(value)]


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor of a nested structure, or None."""
    return next((tensor for _, tensor in named_tensors(value)), None)


def images_of(inputs: Inputs) -> list[Tensor] | None:
    """The first argument if it is a list of images (C, H, W), as detectors take them: 1, 3 or 4 channels, 16 pixels."""
    args, kwargs = as_call(inputs)
    first = next(iter((*args, *kwargs.values())), None)
    if not isinstance(first, list) or not first:
        return None
    images = all(
        isinstance(item, Tensor)
        and item.dim() == 3
        and item.shape[0] in (1, 3, 4)
        and min(item.shape[1:]) >= 16
        for item in first
    )
    return first if images else None


def batch_size_of(inputs: Inputs) -> int:
    """Length of the first dimension of the first tensor that has one; of a list of images, its own.

    Raises:
        InvalidInputError: if there is no such tensor.
        EmptyDataError: if that length is 0.
    """
    images = images_of(inputs)
    if images is not None:
        return len(images)
    args, kwargs = as_call(inputs)
    for path, tensor in named_tensors((args, kwargs)):
        if tensor.dim() > 0:
            if tensor.shape[0] == 0:
                raise EmptyDataError(f"example inputs{path}: got an empty batch, wanted at least one sample")
            return int(tensor.shape[0])
    raise InvalidInputError("example inputs: got no tensor with a batch dimension, wanted at least one")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode is put back, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def tracing_copy(model: nn.Module, device: torch.device | str | None = None) -> nn.Module:
    """A deep copy of ``model`` in evaluation mode with every floating parameter requiring gradients.

    Frozen parameters leave no trace in the autograd graph, so whole layers would be overlooked.

    Raises:
        InvalidInputError: if the model cannot be copied.
    """
    try:
        with torch.inference_mode(False):
            duplicate = copy.deepcopy(model)
    except Exception as error:
        raise InvalidInputError(
            f"{type(model).__name__} cannot be copied with copy.deepcopy ({error}); remove what it holds "
            "that cannot be copied, such as non-leaf tensors left by torch.nn.utils.weight_norm"
        ) from error
    if device is not None:
        duplicate = duplicate.to(device)
    for parameter in duplicate.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(True)
    return duplicate.eval()
