"""Time a model honestly: warmed up, synchronised, quantiles instead of one mean, models compared in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .errors import InvalidInputError
from .inputs import call, device_of, evaluating, to_device


@dataclass(frozen=True)
class LatencyStats:
    """Quantiles of the time of one forward pass in milliseconds, and what they were measured on."""

    median: float
    p10: float
    p90: float
    runs: int
    device: str
    dtype: str
    threads: int
    torch_version: str

    def to_dict(self) -> dict[str, float | int | str]:
        return asdict(self)


@dataclass(frozen=True)
class LatencyComparison:
    """Times of several models measured in turns, so that a slow moment of the machine hits all alike."""

    stats: dict[str, LatencyStats]
    times: dict[str, tuple[float, ...]]  # milliseconds, one a round, the same rounds for every model

    def speedup(self, name: str, over: str) -> float:
        """Median over the rounds of ``time of over / time of name``; above 1 where ``name`` is faster."""
        for key in (name, over):
            if key not in self.times:
                raise InvalidInputError(
                    f"no model called {key!r} was measured; there are {sorted(self.times)}"
                )
        ratios = [b / a for a, b in zip(self.times[name], self.times[over], strict=True)]
        return _quantile(ratios, 0.5)


def measure_latency(
    model: nn.Module, example_inputs: Any, *, warmup: int = 10, runs: int = 100, threads: int | None = None
) -> LatencyStats:
    """Time ``runs`` forward passes of one model on ``example_inputs``, after ``warmup`` that are not counted.

    The model runs in eval mode under ``torch.inference_mode`` on its own device, where the inputs are moved
    first; the time of that copy is not included. On CUDA the times come from events on the current stream.

    Args:
        example_inputs: tensor, tuple or list (positional arguments) or dict (keyword arguments).
        threads: CPU threads of torch during the measurement; left as they are if not given.

    Raises:
        InvalidInputError: ``warmup``, ``runs`` or ``threads`` is out of range.
    """
    return compare_latency({"model": model}, example_inputs, warmup=warmup, runs=runs, threads=threads).stats[
        "model"
    ]


def compare_latency(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    *,
    warmup: int = 10,
    runs: int = 100,
    threads: int | None = None,
) -> LatencyComparison:
    """Time several models on the same inputs in ``runs`` rounds; every round times each model once.

    The order turns by one from round to round, and with several models each timed pass follows an untimed one
    of the same model, so that no model is charged for the caches its neighbour left behind. Ratios are taken
    inside a round (:meth:`LatencyComparison.speedup`). Otherwise as :func:`measure_latency`.

    Raises:
        InvalidInputError: no model was given, or ``warmup``, ``runs`` or ``threads`` is out of range.
    """
    if not models:
        raise InvalidInputError("got no model to time; pass {'name': model, ...}")
    _check_counts(warmup, runs, threads)
    names = list(models)
    times: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        stack.enter_context(torch_threads(threads))
        stack.enter_context(torch.inference_mode())
        for model in models.values():
            stack.enter_context(evaluating(model))
        stopwatches = {name: _stopwatch(models[name], example_inputs) for name in names}
        for name in names:
            for _ in range(warmup):
                stopwatches[name]()
        for i in range(runs):
            turn = i % len(names)
            for name in names[turn:] + names[:turn]:
                if len(names) > 1:
                    stopwatches[name]()
                times[name].append(stopwatches[name]())
        used_threads = torch.get_num_threads()
    stats = {}
    for name in names:
        parameter = next(models[name].parameters(), None)
        stats[name] = LatencyStats(
            median=_quantile(times[name], 0.5),
            p10=_quantile(times[name], 0.1),
            p90=_quantile(times[name], 0.9),
            runs=runs,
            device=_device_name(_device(models[name])),
            dtype=str(parameter.dtype if parameter is not None else torch.get_default_dtype()).removeprefix(
                "torch."
            ),
            threads=used_threads,
            torch_version=torch.__version__,
        )
    return LatencyComparison(stats, {name: tuple(values) for name, values in times.items()})


def layer_times(
    model: nn.Module,
    example_inputs: Any,
    *,
    warmup: int = 3,
    runs: int = 10,
    threads: int | None = None,
) -> dict[str, float]:
    """Milliseconds that each module takes by itself in one forward pass: its own time less that of its children.

    The median of ``runs`` passes, after ``warmup`` that are not counted; a module that runs several times in a
    pass counts all of them. On CUDA the device is waited for before and after every module, so that a module's
    launches count and nothing overlaps: the sum is longer than an undisturbed pass. Otherwise as
    :func:`measure_latency`.

    Returns:
        A number, 0 or more, for every module that ran, by its name; ``""`` is the model itself.

    Raises:
        InvalidInputError: ``warmup``, ``runs`` or ``threads`` is out of range.
    """
    _check_counts(warmup, runs, threads)
    device = _device(model)
    inputs = to_device(example_inputs, device)
    names = {module: name for name, module in model.named_modules()}
    open_: list[list[float]] = []  # of each module that runs now: when it began, what its children took
    spent: dict[str, float] = {}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() * 1e3

    def before(module: nn.Module, args: Any) -> None:
        open_.append([now(), 0.0])

    def after(module: nn.Module, args: Any, output: Any) -> None:
        begin, inside = open_.pop()
        total = now() - begin
        spent[names[module]] = spent.get(names[module], 0.0) + total - inside
        if open_:
            open_[-1][1] += total

    rounds: list[dict[str, float]] = []
    handles: list[Any] = []
    with ExitStack() as stack:
        stack.enter_context(torch_threads(threads))
        stack.enter_context(torch.inference_mode())
        stack.enter_context(evaluating(model))
        try:
            for module in names:
                handles.append(module.register_forward_pre_hook(before))
                handles.append(module.register_forward_hook(after))
            for _ in range(warmup + runs):
                spent, open_[:] = {}, []
                call(model, inputs)
                rounds.append(spent)
        finally:
            for handle in handles:
                handle.remove()
    rounds = rounds[warmup:]
    return {name: max(0.0, _quantile([own.get(name, 0.0) for own in rounds], 0.5)) for name in rounds[0]}


def _check_counts(warmup: int, runs: int, threads: int | None) -> None:
    if warmup < 0:
        raise InvalidInputError(f"warmup must be at least 0, got {warmup}")
    if runs < 1:
        raise InvalidInputError(f"runs must be at least 1, got {runs}")
    if threads is not None and threads < 1:
        raise InvalidInputError(f"threads must be at least 1, got {threads}")


def _stopwatch(model: nn.Module, example_inputs: Any) -> Callable[[], float]:
    device = _device(model)
    inputs = to_device(example_inputs, device)
    if device.type == "cuda":

        def timed() -> float:
            with torch.cuda.device(device):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                # From an idle device, so that launching counts just as it does for a single request.
                torch.cuda.synchronize(device)
                start.record()
                call(model, inputs)
                end.record()
                end.synchronize()
                return float(start.elapsed_time(end))
    else:

        def timed() -> float:
            start = time.perf_counter()
            call(model, inputs)
            return (time.perf_counter() - start) * 1e3

    return timed


def _device(model: nn.Module) -> torch.device:
    return device_of(model) or torch.device("cpu")


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _quantile(values: list[float], q: float) -> float:
    """Quantile with linear interpolation between the two nearest values."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """``threads`` CPU threads of torch inside, where given; as before afterwards."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if threads is not None:
            torch.set_num_threads(before)
