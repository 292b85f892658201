"""Fine-tuning after surgery, on one device or many: cross-entropy, distillation, a cosine schedule."""

from __future__ import annotations

import copy
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from .distributed import same_weights
from .errors import InvalidInputError, TrainingError
from .inputs import call, device_of, first_tensor, map_tensors

if TYPE_CHECKING:
    from accelerate import Accelerator

Loss = Callable[[Any, Any], Tensor]
OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]

PRECISIONS = ("no", "fp16", "bf16")


@dataclass(frozen=True)
class TrainingResult:
    """What one call of :func:`finetune` did: mean loss of every epoch, and the number of optimiser steps."""

    losses: tuple[float, ...]
    steps: int


@dataclass(frozen=True)
class EpochReport:
    """Handed to the ``progress`` callback after every epoch; ``epoch`` counts from 1.

    ``lr`` is the rate of the epoch's last step, in the optimiser's first group of parameters.
    """

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
    distillation_loss: Loss | None = None,
    loss: Loss | None = None,
    label_smoothing: float = 0.0,
    optimizer: OptimizerFactory | None = None,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    warmup: float = 0.0,
    batch_size: int = 64,
    gradient_accumulation: int = 1,
    max_grad_norm: float | None = None,
    mixed_precision: str | None = None,
    device: torch.device | str | None = None,
    sync_batchnorm: bool = False,
    find_unused_parameters: bool = False,
    accelerator: Accelerator | None = None,
    seed: int = 0,
    progress: Callable[[EpochReport], None] | None = None,
) -> TrainingResult:
    """Train ``model`` in place with SGD (Nesterov) under a cosine schedule from ``lr`` to 0.

    Runs on Hugging Face Accelerate, so the same call works on a CPU, on one GPU, and on several processes
    under ``torchrun`` or ``accelerate launch``; there every process makes the call, with the same data. Each
    then trains on its own share with batches of ``batch_size``, the gradients are averaged, and all end with
    the weights and batch-norm statistics of process 0. Where the data does not divide evenly, the last
    batches are filled up from the front of the epoch, so that no process waits for another.

    The optimiser is made anew in every call, so it always holds the parameters that are left after surgery.

    With a teacher, the loss is ``(1 - d) * loss + d * T^2 * KL(teacher / T || student / T)`` (Hinton, Vinyals
    and Dean, 2015, arXiv 1503.02531), where ``d`` is ``distillation`` and ``T`` the temperature; the outputs
    are taken as logits ``(B, classes)`` or ``(B, classes, *)``, and the divergence is computed in float32.

    Args:
        data: a pair of tensors ``(inputs, targets)``, from which shuffled batches are drawn, or any iterable
            that gives pairs ``(inputs, target)`` afresh for every epoch; the inputs of a pair are a tensor, a
            tuple or list (positional arguments) or a dict (keyword arguments). Of several processes, each
            reads its share of a pair of tensors or a ``DataLoader``, and every n-th batch of another iterable.
            A ``DataLoader`` that is shared out already (a ``DistributedSampler``, or prepared by accelerate)
            is read as it is.
        teacher: the original or any other model with outputs of the same form; a copy of it is used.
        distillation_loss: function of ``(student outputs, teacher outputs)`` returning a scalar, in place of
            ``T^2 * KL`` where outputs are not logits, such as those of a detector.
        loss: function of ``(outputs, target)`` returning a scalar; cross-entropy if not given.
        label_smoothing: of the cross-entropy, between 0 and 1.
        optimizer: function that makes the optimiser of an iterable of parameters, such as
            ``lambda parameters: torch.optim.AdamW(parameters, lr=3e-4)``; ``lr``, ``momentum`` and
            ``weight_decay`` are then not used, and the schedule scales the optimiser's own rates.
        warmup: share of the steps, between 0 and 1, in which the rate rises linearly before the cosine.
        gradient_accumulation: batches a step; the last step of an epoch takes those that are left.
        max_grad_norm: gradients of a larger norm, all parameters taken together, are scaled down to it.
        mixed_precision: ``"no"``, ``"fp16"`` (GPU only) or ``"bf16"``; if not given, what accelerate's launcher,
            environment or an earlier ``Accelerator`` says.
        device: where to train; if not given the model's own device, or on several processes the one that
            accelerate gives to each. The model stays there.
        sync_batchnorm: on several GPUs, take the batch statistics over all of them.
        find_unused_parameters: on several processes, allow steps in which some parameters get no gradient.
        accelerator: run on this one, with its device, precision and settings; it is left as it was. Without
            it the call makes its own and leaves every other untouched.
        seed: fixes order and dropout without touching the caller's random state. The order of a pair of
            tensors does not depend on the number of processes, apart from how it is cut into batches.
        progress: called after every epoch; on several processes, on the main one only.

    Returns:
        The mean loss of every epoch, over all processes. The mode of every sub-module is left as it was.

    Raises:
        InvalidInputError: an argument is out of range, the data holds no batch or something else than pairs,
            the processes hold different amounts of data, or the setting of accelerate cannot be used here.
        TrainingError: a loss is not finite; the model's weights are put back as they were, as they are
            whenever the training does not come to its end. On a GPU or several processes losses are read only
            every few steps, so that the error may come some steps later.
    """
    _check_data(data)
    _check_numbers(
        positive={"lr": lr, "temperature": temperature, "max_grad_norm": max_grad_norm},
        shares={"distillation": distillation, "label_smoothing": label_smoothing, "warmup": warmup},
        counts={
            "epochs": epochs,
            "batch_size": batch_size,
            "gradient_accumulation": gradient_accumulation,
        },
    )
    if mixed_precision not in (None, *PRECISIONS):
        raise InvalidInputError(
            f"mixed_precision must be None or one of {PRECISIONS}, got {mixed_precision!r}"
        )
    if loss is not None and label_smoothing:
        raise InvalidInputError("label_smoothing belongs to the cross-entropy: leave it out beside a loss")
    if teacher is None and distillation_loss is not None:
        raise InvalidInputError("distillation_loss compares with a teacher: pass teacher=, or leave it out")
    if not any(p.requires_grad for p in model.parameters()):
        raise InvalidInputError("the model has no parameter that requires a gradient: nothing to train")

    with ExitStack() as stack:
        runtime = stack.enter_context(
            _accelerating(accelerator, model, device, mixed_precision, find_unused_parameters)
        )
        model.to(runtime.device)
        parameters = [p for p in model.parameters() if p.requires_grad]
        if optimizer is None:
            made: Any = SGD(
                parameters, lr=lr, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay
            )
        else:
            made = optimizer(parameters)
            if not isinstance(made, Optimizer):
                raise InvalidInputError(
                    f"optimizer: got a function that returns {type(made).__name__}, wanted one that makes a "
                    "torch.optim.Optimizer of the parameters it gets"
                )
        cuda = [runtime.device] if runtime.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.enter_context(torch.enable_grad())
        torch.manual_seed(seed)
        orders = torch.randint(2**62, (epochs,)).tolist()
        batches = stack.enter_context(_shared(data, runtime, batch_size))
        length = _length(batches, runtime)
        # All processes draw the same order of the data, but each its own dropout.
        torch.manual_seed(seed + runtime.process_index)

        stack.enter_context(_undone_on_error(model))
        model.train()
        student: nn.Module = _Wrapped(model)
        if sync_batchnorm and runtime.num_processes > 1:
            stack.enter_context(_synchronised(student, runtime))
        student = runtime.prepare_model(student)
        objective = _Objective(
            loss=partial(_cross_entropy, label_smoothing=label_smoothing)
            if loss is None or loss is F.cross_entropy
            else loss,
            teacher=_frozen(teacher, runtime) if teacher is not None and distillation else None,
            temperature=temperature,
            distillation=distillation,
            distance=distillation_loss,
        )
        # Without a length the schedule moves once an epoch.
        total = epochs * max(1, math.ceil(length / gradient_accumulation))
        highest = made.param_groups[0]["lr"]
        schedule = LambdaLR(made, partial(_rate, total=total, warm=int(warmup * total)))
        # Around an optimiser accelerate does nothing but scale, at the price of two searches for a package a step.
        scaled = runtime.prepare_optimizer(made, device_placement=False) if runtime.scaler else None

        stack.enter_context(_unused_explained())
        losses: list[float] = []
        steps = 0
        for epoch in range(epochs):
            meter = _Meter(runtime, epoch, highest)
            pairs = _pairs(_drawn(batches, orders[epoch], runtime, length), runtime.device)
            while group := list(islice(pairs, gradient_accumulation)):
                runtime.gradient_accumulation_steps = len(group)
                for i, (inputs, target) in enumerate(group, 1):
                    with nullcontext() if i == len(group) else runtime.no_sync(student):
                        value = objective(student, inputs, target)
                        meter.add(value)
                        runtime.backward(value)
                if max_grad_norm is not None:
                    runtime.unscale_gradients(scaled)
                    nn.utils.clip_grad_norm_(parameters, max_grad_norm)
                rate = made.param_groups[0]["lr"]
                (scaled or made).step()
                made.zero_grad()
                steps += 1
                # fp16 leaves a step out when its gradients overflow; it does not count for the schedule.
                if length and not (scaled and scaled.step_was_skipped):
                    schedule.step()
            losses.append(meter.mean())
            if not length:
                schedule.step()
            if progress is not None and runtime.is_main_process:
                progress(EpochReport(epoch + 1, epochs, losses[-1], rate))
        if runtime.num_processes > 1:
            same_weights(model)
    return TrainingResult(tuple(losses), steps)


class _Wrapped(nn.Module):
    """Takes a batch's inputs as one argument.

    What accelerate does to a module, a new forward and attributes, happens to this one and not to the user's.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Any:
        return call(self.model, inputs)


@dataclass(frozen=True)
class _Objective:
    loss: Loss
    teacher: nn.Module | None
    temperature: float
    distillation: float
    distance: Loss | None

    def __call__(self, student: nn.Module, inputs: Any, target: Any) -> Tensor:
        outputs = student(inputs)
        value = _scalar(self.loss(outputs, target), "loss")
        if self.teacher is None:
            return value
        with torch.no_grad():
            wanted = self.teacher(inputs)
        if self.distance is None:
            divergence = self.temperature**2 * _divergence(outputs, wanted, self.temperature)
        else:
            divergence = _scalar(self.distance(outputs, wanted), "distillation_loss")
        return (1 - self.distillation) * value + self.distillation * divergence


def _scalar(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InvalidInputError(f"{name}: got a function that returns {got}, wanted a tensor of one number")
    return value.reshape(())


def _cross_entropy(outputs: Any, target: Any, label_smoothing: float) -> Tensor:
    return F.cross_entropy(_logits(outputs), target, label_smoothing=label_smoothing)


def _divergence(outputs: Any, wanted: Any, temperature: float) -> Tensor:
    student, teacher = _logits(outputs), _logits(wanted)
    if student.shape != teacher.shape or student.dim() < 2:
        raise InvalidInputError(
            f"the student gives {tuple(student.shape)} and the teacher {tuple(teacher.shape)}, where logits "
            "(B, classes) or (B, classes, *) of both are compared: pass distillation_loss= for other outputs"
        )
    log_student = F.log_softmax(student.float() / temperature, dim=1)
    soft = F.softmax(teacher.float() / temperature, dim=1)
    # Summed over classes, averaged over all else: "batchmean" would grow with the positions.
    return F.kl_div(log_student, soft, reduction="none").sum(dim=1).mean()


def _logits(outputs: Any) -> Tensor:
    """The tensor in a model's output: its ``logits`` if it has such, else the first tensor found in it."""
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    tensor = logits if isinstance(logits, Tensor) else first_tensor(outputs)
    if tensor is None:
        raise InvalidInputError(f"the model's output is a {type(outputs).__name__} without a tensor in it")
    return tensor


def _frozen(teacher: nn.Module, runtime: Accelerator) -> nn.Module:
    teacher = _Wrapped(copy.deepcopy(teacher).to(runtime.device)).eval()
    prepared: nn.Module = runtime.prepare_model(teacher, evaluation_mode=True)
    return prepared


def _rate(step: int, *, total: int, warm: int) -> float:
    """Share of the highest rate in a step, counted from 0: rising for ``warm`` steps, then a half cosine."""
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * min((step - warm) / max(1, total - warm), 1.0)))


class _Meter:
    """The losses of one epoch, checked and averaged.

    Reading a loss waits for the device, and averaging it over processes for all of them, so both happen only
    every few steps, except on a lone CPU.
    """

    def __init__(self, runtime: Accelerator, epoch: int, lr: float) -> None:
        self.runtime = runtime
        self.epoch = epoch
        self.lr = lr
        self.every = 1 if runtime.device.type == "cpu" and runtime.num_processes == 1 else 32
        self.pending: list[Tensor] = []
        self.sum = 0.0
        self.count = 0

    def add(self, value: Tensor) -> None:
        self.pending.append(value.detach())
        if len(self.pending) == self.every:
            self.read()

    def read(self) -> None:
        values = torch.stack(self.pending)
        self.pending.clear()
        if self.runtime.num_processes > 1:
            # One process's NaN makes the mean NaN, so all of them stop at the same step.
            values = self.runtime.reduce(values, "mean")
        for number in values.tolist():
            self.count += 1
            if not math.isfinite(number):
                raise TrainingError(
                    f"the loss is {number} in epoch {self.epoch + 1}, batch {self.count}; the weights are back "
                    f"as they were: use a smaller lr (it was {self.lr:g}) or look for bad values in the data"
                )
            self.sum += number

    def mean(self) -> float:
        if self.pending:
            self.read()
        if not self.count:
            raise InvalidInputError(
                f"the data gave no batch in epoch {self.epoch + 1}: pass a DataLoader or a list of pairs, "
                "not an iterator that is used up after one pass"
            )
        return self.sum / self.count


@contextmanager
def _undone_on_error(model: nn.Module) -> Iterator[None]:
    """Puts modes back at the end, and the weights too if there is an error; leaves no gradient."""
    modes = {module: module.training for module in model.modules()}
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = None
    try:
        yield
    except BaseException:
        model.load_state_dict(before)
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter in model.parameters():
            parameter.grad = None


@contextmanager
def _synchronised(student: nn.Module, runtime: Accelerator) -> Iterator[None]:
    """Batch norms over all processes inside; the user's own modules are put back after."""
    if runtime.device.type == "cpu":
        raise InvalidInputError("sync_batchnorm: torch has it on GPUs only; leave it out on the CPU")
    norms = [
        (parent, name, child)
        for parent in student.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.modules.batchnorm._BatchNorm)
    ]
    nn.SyncBatchNorm.convert_sync_batchnorm(student)
    try:
        yield
    finally:
        # Weights and statistics are the same tensors in both.
        for parent, name, child in norms:
            setattr(parent, name, child)


@contextmanager
def _unused_explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "Expected to have finished reduction" not in str(error):
            raise
        raise InvalidInputError(
            "some parameters got no gradient in a step, which several processes must know beforehand: pass "
            "find_unused_parameters=True, or freeze those that are never used"
        ) from error


@contextmanager
def _accelerating(
    given: Accelerator | None,
    model: nn.Module,
    device: torch.device | str | None,
    mixed_precision: str | None,
    find_unused_parameters: bool,
) -> Iterator[Accelerator]:
    """The accelerator to run on; the process-wide state of accelerate is put back at the end.

    That state is one for all accelerators and cannot be changed once it is made, so a call with a device and
    a precision of its own works on an empty one.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    if given is not None:
        if not isinstance(given, Accelerator):
            raise InvalidInputError(
                f"accelerator: got {type(given).__name__}, wanted an accelerate.Accelerator"
            )
        if find_unused_parameters or mixed_precision not in (None, given.mixed_precision):
            raise InvalidInputError(
                "mixed_precision and find_unused_parameters are settings of the accelerator that was passed: "
                "make it with them (the latter in accelerate.DistributedDataParallelKwargs), or leave it out"
            )
    elif mixed_precision is None:
        mixed_precision = AcceleratorState._shared_state.get("_mixed_precision")
    shared = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    before = [
        {key: dict(value) if isinstance(value, dict) else value for key, value in state.items()}
        for state in shared
    ]
    kept: list[tuple[list[Any], list[Any]]] = []
    try:
        if given is None:
            for state in shared:
                state.clear()
            runtime = _new_accelerator(model, device, mixed_precision, find_unused_parameters)
        else:
            runtime = given
            kept = [(x, list(x)) for x in (given._models, given._optimizers, given._dataloaders)]
        even_batches = runtime.even_batches
        _check_runtime(runtime, model, device, mixed_precision)
        runtime.even_batches = True
        runtime.sync_gradients = True
        try:
            yield runtime
        finally:
            runtime.even_batches = even_batches
    finally:
        for registered, items in kept:
            registered[:] = items
        for state, values in zip(shared, before):
            state.clear()
            state.update(values)


def _new_accelerator(
    model: nn.Module,
    device: torch.device | str | None,
    mixed_precision: str | None,
    find_unused_parameters: bool,
) -> Accelerator:
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import PartialState

    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    own = device_of(model) or torch.device("cpu")
    wanted = own if device is None else torch.device(device)
    on_cpu = wanted.type == "cpu"
    if device is None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # The launcher gave every process its GPU, unless there is none or the processes talk over the CPU.
        gloo = group and torch.distributed.get_backend() == "gloo"
        on_cpu = on_cpu and (gloo or not torch.accelerator.is_available())
    logger = logging.getLogger("accelerate")
    level, threads = logger.level, torch.get_num_threads()
    try:
        # Old kernels and unset OMP_NUM_THREADS make accelerate speak, at every call.
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = PartialState(cpu=on_cpu)
            if state.num_processes == 1:
                state.device = wanted
            return Accelerator(
                cpu=on_cpu,
                mixed_precision=mixed_precision,
                kwargs_handlers=[
                    DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)
                ],
            )
    except ValueError as error:
        raise InvalidInputError(f"accelerate cannot work with these settings: {error}") from error
    finally:
        logger.setLevel(level)
        torch.set_num_threads(threads)


def _check_runtime(
    runtime: Accelerator,
    model: nn.Module,
    device: torch.device | str | None,
    mixed_precision: str | None,
) -> None:
    if runtime.mixed_precision not in PRECISIONS:
        raise InvalidInputError(
            f"mixed precision {runtime.mixed_precision} of accelerate, wanted {PRECISIONS}"
        )
    kind = str(runtime.distributed_type.value)
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise InvalidInputError(
            f"accelerate is set up for {kind}; fine-tuning needs the whole model on every process: launch "
            "with data parallelism (MULTI_GPU or MULTI_CPU)"
        )
    if mixed_precision == "fp16" and runtime.device.type == "cpu":
        raise InvalidInputError('mixed_precision "fp16" needs a GPU, and this is the CPU: use "bf16" or "no"')
    if device is not None:
        wanted = torch.device(device)
        if wanted.type != runtime.device.type or wanted.index not in (None, runtime.device.index or 0):
            raise InvalidInputError(
                f"device: got {wanted}, but accelerate gives this process {runtime.device}: leave device out"
            )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
        if processes != runtime.num_processes:
            raise InvalidInputError(
                f"torch.distributed runs {processes} processes and accelerate sees {runtime.num_processes}: "
                "start them with torchrun or accelerate launch, or set RANK, LOCAL_RANK and WORLD_SIZE"
            )
    if runtime.num_processes > 1 and isinstance(model, nn.parallel.DistributedDataParallel):
        raise InvalidInputError("the model is wrapped in DistributedDataParallel already: pass model.module")


@contextmanager
def _shared(data: Any, runtime: Accelerator, batch_size: int) -> Iterator[Iterable[Any]]:
    """The batches of this process: as many as any other's, so that none waits at the end of an epoch."""
    rank, world = runtime.process_index, runtime.num_processes
    if _is_tensor_pair(data):
        inputs, targets = data
        yield _TensorBatches(inputs, targets, batch_size, rank, world)
    elif world == 1:
        yield data
    elif isinstance(data, DataLoader) and data.batch_sampler is not None:
        from accelerate.data_loader import DataLoaderStateMixin, get_sampler

        sampler = get_sampler(data)
        if isinstance(data, DataLoaderStateMixin) or isinstance(sampler, DistributedSampler):
            yield data
            return
        # Preparing puts a generator into the user's own sampler.
        generator = getattr(sampler, "generator", None)
        try:
            yield runtime.prepare_data_loader(data, device_placement=False)
        finally:
            if hasattr(sampler, "generator"):
                sampler.generator = generator
    else:
        yield _EveryNth(data, rank, world)


class _TensorBatches:
    """Shuffled batches of a pair of tensors; process ``rank`` of ``world`` gets its part of each."""

    def __init__(self, inputs: Tensor, targets: Tensor, batch_size: int, rank: int, world: int) -> None:
        self.inputs, self.targets = inputs, targets
        self.batch_size, self.rank, self.world = batch_size, rank, world

    def __len__(self) -> int:
        full, rest = divmod(len(self.inputs), self.batch_size * self.world)
        share = math.ceil(rest / self.world)
        # Batch norm cannot train on one value a channel, so a lone last sample waits for the next epoch.
        return full + (share > 1 or (share == 1 and not full))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.inputs))
        short = -len(order) % self.world
        if len(order):
            order = torch.cat([order, order.repeat(math.ceil(short / len(order)))[:short]])
        order = order.to(self.inputs.device)
        for chunk in order.split(self.batch_size * self.world)[: len(self)]:
            share = chunk[self.rank :: self.world]
            yield self.inputs[share], self.targets[share.to(self.targets.device)]


class _EveryNth:
    """Every ``world``-th batch from ``rank`` on; the last ones are filled up from the front."""

    def __init__(self, batches: Iterable[Any], rank: int, world: int) -> None:
        self.batches, self.rank, self.world = batches, rank, world

    def __len__(self) -> int:
        return math.ceil(len(self.batches) / self.world)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.batches)
        front: list[Any] = []
        while group := list(islice(batches, self.world)):
            front = front or group
            yield [*group, *islice(cycle(front), self.world - len(group))][self.rank]


def _length(batches: Iterable[Any], runtime: Accelerator) -> int:
    """Batches an epoch, 0 if that is not known; the same on all processes."""
    try:
        length = len(batches)  # type: ignore[arg-type]
    except TypeError:
        length = 0
    lengths = runtime.gather(torch.tensor([length], device=runtime.device)).tolist()
    if len(set(lengths)) > 1:
        raise InvalidInputError(
            f"the processes have {lengths} batches an epoch; every process must be given the same data"
        )
    return length


def _drawn(batches: Iterable[Any], seed: int, runtime: Accelerator, length: int) -> Iterator[Any]:
    """One epoch's batches, drawn from a random state of their own that the model's draws do not move."""
    iterator: Iterator[Any] | None = None
    state = torch.Generator().manual_seed(seed).get_state()
    while True:
        outside = torch.get_rng_state()
        torch.set_rng_state(state)
        try:
            iterator = iter(batches) if iterator is None else iterator
            batch = list(islice(iterator, 1))
        finally:
            state = torch.get_rng_state()
            torch.set_rng_state(outside)
        if runtime.num_processes > 1 and not length:
            # Nobody knows who has how many, so they ask each other: the first to end ends it for all.
            batch *= int(runtime.gather(torch.tensor([len(batch)], device=runtime.device)).min())
        if not batch:
            return
        yield batch[0]


def _pairs(batches: Iterator[Any], device: torch.device) -> Iterator[tuple[Any, Any]]:
    """The batches' inputs and targets, on the device."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=tensor.device.type == "cpu" and tensor.is_pinned())

    for batch in batches:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise InvalidInputError(
                f"a batch must be a pair (inputs, target), got {type(batch).__name__}"
                + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
            )
        yield map_tensors(batch[0], move), map_tensors(batch[1], move)


def _is_tensor_pair(data: Any) -> bool:
    return isinstance(data, tuple) and len(data) == 2 and all(isinstance(item, Tensor) for item in data)


def _check_data(data: Any) -> None:
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


def _check_numbers(
    positive: Mapping[str, float | None], shares: Mapping[str, float], counts: Mapping[str, int]
) -> None:
    for name, value in positive.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InvalidInputError(f"{name} must be finite and above 0, got {value!r}")
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise InvalidInputError(f"{name} must lie between 0 and 1, got {value!r}")
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise InvalidInputError(f"{name} must be an integer of at least 1, got {count!r}")
