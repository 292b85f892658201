"""Fine-tuning after surgery: cross-entropy, distillation from a teacher, a cosine schedule."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import InvalidInputError, TrainingError
from .inputs import call, first_tensor, to_device

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class TrainingResult:
    """What one call of :func:`finetune` did: mean loss of every epoch, and the number of optimiser steps."""

    losses: tuple[float, ...]
    steps: int


@dataclass(frozen=True)
class EpochReport:
    """Handed to the ``progress`` callback after every epoch; ``epoch`` counts from 1."""

    epoch: int
    epochs: int
    loss: float
    lr: float


def finetune(
    model: nn.Module,
    data: Iterable[Any] | tuple[Tensor, Tensor],
    *,
    epochs: int = 1,
    lr: float = 0.01,
    teacher: nn.Module | None = None,
    temperature: float = 4.0,
    distillation: float = 0.5,
    loss: Loss | None = None,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: Callable[[EpochReport], None] | None = None,
) -> TrainingResult:
    """Train ``model`` in place with SGD (Nesterov) under a cosine schedule from ``lr`` to 0.

    The optimiser is made anew in every call, so it always holds the parameters that are left after surgery.

    With a teacher, the loss is ``(1 - d) * loss + d * T^2 * KL(teacher / T || student / T)`` (Hinton, Vinyals
    and Dean, 2015, arXiv 1503.02531), where ``d`` is ``distillation`` and ``T`` the temperature; the outputs
    are taken as logits ``(B, classes)`` or ``(B, classes, *)``.

    Args:
        data: a pair of tensors ``(inputs, targets)``, from which shuffled batches are drawn, or any iterable
            that gives pairs ``(inputs, target)`` afresh for every epoch; the inputs of a pair are a tensor, a
            tuple or list (positional arguments) or a dict (keyword arguments).
        loss: function of ``(outputs, target)`` returning a scalar; cross-entropy if not given.
        device: where to train; the model's own device if not given. The model stays there.
        seed: fixes order and dropout without touching the caller's random state.

    Returns:
        The mean loss of every epoch. The mode of every sub-module is left as it was.

    Raises:
        InvalidInputError: an argument is out of range, or the data holds no batch or something else than
            pairs.
        TrainingError: a loss is not finite; the model's weights are put back as they were.
    """
    _check(data, epochs, lr, temperature, distillation, batch_size)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise InvalidInputError("the model has no parameter that requires a gradient: nothing to train")
    if device is not None:
        model.to(device)
    target_device = next(model.parameters()).device
    if teacher is not None:
        teacher = copy.deepcopy(teacher).to(target_device).eval()
    criterion = loss or F.cross_entropy
    modes = {module: module.training for module in model.modules()}
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.SGD(
        parameters, lr=lr, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay
    )
    cuda = [target_device] if target_device.type == "cuda" else []
    losses: list[float] = []
    steps = 0
    finished = False
    try:
        with torch.random.fork_rng(devices=cuda), torch.enable_grad():
            torch.manual_seed(seed)
            model.train()
            for epoch in range(epochs):
                total, batches = 0.0, 0
                length = _length(data, batch_size)
                for i, (inputs, target) in enumerate(_pairs(data, batch_size)):
                    # Without a length the schedule moves once an epoch.
                    position = epoch + (i / length if length else 0.0)
                    for group in optimiser.param_groups:
                        group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * min(position / epochs, 1.0)))
                    value = _loss(
                        model,
                        teacher,
                        to_device(inputs, target_device),
                        to_device(target, target_device),
                        criterion,
                        temperature,
                        distillation,
                    )
                    number = _finite(float(value.detach()), epoch, i, lr)
                    optimiser.zero_grad(set_to_none=True)
                    value.backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
                    total, batches, steps = total + number, batches + 1, steps + 1
                if not batches:
                    raise InvalidInputError(
                        f"the data gave no batch in epoch {epoch + 1}: pass a DataLoader or a list of pairs, "
                        "not an iterator that is used up after one pass"
                    )
                losses.append(total / batches)
                if progress is not None:
                    progress(EpochReport(epoch + 1, epochs, losses[-1], optimiser.param_groups[0]["lr"]))
        finished = True
    finally:
        if not finished:
            model.load_state_dict(before)
        for module, mode in modes.items():
            module.training = mode
        for parameter in parameters:
            parameter.grad = None
    return TrainingResult(tuple(losses), steps)


def _check(
    data: Any, epochs: int, lr: float, temperature: float, distillation: float, batch_size: int
) -> None:
    if not isinstance(epochs, int) or epochs < 1:
        raise InvalidInputError(f"epochs must be an integer of at least 1, got {epochs!r}")
    if not (math.isfinite(lr) and lr > 0):
        raise InvalidInputError(f"lr must be finite and above 0, got {lr!r}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise InvalidInputError(f"temperature must be finite and above 0, got {temperature!r}")
    if not 0 <= distillation <= 1:
        raise InvalidInputError(f"distillation must lie between 0 and 1, got {distillation!r}")
    if batch_size < 1:
        raise InvalidInputError(f"batch_size must be at least 1, got {batch_size!r}")
    if isinstance(data, Iterator):
        raise InvalidInputError(
            f"the data is a {type(data).__name__}, which can be read only once; training reads it once an "
            "epoch: pass a DataLoader, or list(...) of it"
        )
    if _is_tensor_pair(data) and len(data[0]) != len(data[1]):
        raise InvalidInputError(f"got {len(data[0])} inputs but {len(data[1])} targets")
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise InvalidInputError(
            "data must be a pair of tensors (inputs, targets) or an iterable of such pairs, got "
            f"{type(data).__name__}"
        )


def _is_tensor_pair(data: Any) -> bool:
    return isinstance(data, tuple) and len(data) == 2 and all(isinstance(item, Tensor) for item in data)


def _length(data: Any, batch_size: int) -> int:
    if _is_tensor_pair(data):
        return math.ceil(len(data[0]) / batch_size)
    try:
        return len(data)
    except TypeError:
        return 0


def _pairs(data: Any, batch_size: int) -> Iterator[tuple[Any, Any]]:
    if _is_tensor_pair(data):
        inputs, targets = data
        for chunk in torch.randperm(len(inputs)).to(inputs.device).split(batch_size):
            # Batch norm cannot train on one value a channel, so a lone last sample waits for the next epoch.
            if len(chunk) > 1 or len(inputs) == 1:
                yield inputs[chunk], targets[chunk.to(targets.device)]
        return
    for item in data:
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise InvalidInputError(
                f"a batch must be a pair (inputs, target), got {type(item).__name__}"
                + (f" of {len(item)}" if isinstance(item, (tuple, list)) else "")
            )
        yield item[0], item[1]


def _finite(value: float, epoch: int, batch: int, lr: float) -> float:
    if math.isfinite(value):
        return value
    raise TrainingError(
        f"the loss is {value} in epoch {epoch + 1}, batch {batch + 1}; the weights are back as they were: "
        f"use a smaller lr (it was {lr:g}) or look for bad values in the data"
    )


def _loss(
    model: nn.Module,
    teacher: nn.Module | None,
    inputs: Any,
    target: Any,
    criterion: Loss,
    temperature: float,
    distillation: float,
) -> Tensor:
    outputs = call(model, inputs)
    value = criterion(_logits(outputs) if criterion is F.cross_entropy else outputs, target)
    if teacher is None or distillation == 0:
        return value
    with torch.no_grad():
        wanted = _logits(call(teacher, inputs))
    student = F.log_softmax(_logits(outputs).float() / temperature, dim=1)
    soft = F.softmax(wanted.float() / temperature, dim=1)
    # Summed over classes, averaged over all else: "batchmean" would grow with the positions.
    divergence = F.kl_div(student, soft, reduction="none").sum(dim=1).mean()
    return (1 - distillation) * value + distillation * temperature**2 * divergence


def _logits(outputs: Any) -> Tensor:
    """The tensor in a model's output: its ``logits`` if it has such, else the first tensor found in it."""
    logits = getattr(outputs, "logits", None)
    tensor = logits if isinstance(logits, Tensor) else first_tensor(outputs)
    if tensor is None:
        raise InvalidInputError(f"the model's output is a {type(outputs).__name__} without a tensor in it")
    return tensor
