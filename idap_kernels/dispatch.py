"""Which backend runs a call; where one cannot, the reason in words.

``auto`` takes the first backend of its device's list that can run the call. A backend asked for by
name runs or raises :class:`BackendUnavailable`: it never falls back.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from .errors import BackendUnavailable, InvalidInputError

BACKENDS = ("reference", "cpu", "cuda", "triton")
AUTO_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
ACTIVATION_CODES = {"relu": 0, "identity": 1, "gelu": 2, "silu": 3}
OUTPUT_ACTIVATION_CODES = {**ACTIVATION_CODES, "relu6": 4, "hardswish": 5}


class BatchNorm(NamedTuple):
    """A batch norm in evaluation mode: ``(x - mean) * weight / sqrt(var + eps) + bias`` by channel.

    Tensors are contiguous (C,), of one floating-point dtype, on the device of ``x``.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor | None  # None: ones
    bias: Tensor | None  # None: zeros
    eps: float


class Backend(Protocol):
    """What a module of ``idap_kernels.backends`` offers. Results are written into float64 tensors."""

    def unavailable(self) -> str | None:
        """Why the backend works for no call at all on this machine; ``None`` if it works."""

    def refuses(self, x: Tensor) -> str | None:
        """Why the backend cannot run on this tensor; ``None`` if it can."""

    def channel_stats(
        self, x: Tensor, channel_dim: int, sample_dim: int, activation: str, state: Tensor, accumulate: bool
    ) -> None:
        """Write, or merge, the statistics of ``x`` into ``state`` (11, C)."""

    def bn_act_stats(
        self,
        x: Tensor,
        norm: BatchNorm,
        act: str,
        y: Tensor,
        channel_dim: int,
        sample_dim: int,
        activation: str,
        state: Tensor,
        accumulate: bool,
    ) -> None:
        """Write ``act(norm(x))`` into ``y``, and as :meth:`channel_stats` the statistics of ``x``.

        ``x`` is dense without overlap; ``y`` has its dtype and its strides, and none of its memory.
        """

    def pair_stats(self, x: Tensor, y: Tensor, row_dims: int, out: Tensor) -> None:
        """Write the products of each row into ``out`` (4, R); the first ``row_dims`` dims are rows."""

    def filter_norms(self, weights: list[Tensor], dim: int, out: Tensor) -> None:
        """Write the norms of all filters, layer after layer, into the flat tensor ``out``."""


@cache
def backend_module(name: str) -> Backend:
    """The module of a backend; importing one never fails, its ``unavailable()`` tells."""
    return cast(Backend, importlib.import_module(f".backends.{name}", __package__))


def available_backends() -> dict[str, str | None]:
    """Every backend by name: ``None`` if it works on this machine, else why it does not."""
    return {name: backend_module(name).unavailable() for name in BACKENDS}


def why_not(name: str, x: Tensor) -> str | None:
    """Why backend ``name`` cannot run on ``x``; ``None`` if it can."""
    module = backend_module(name)
    return module.unavailable() or module.refuses(x)


def select(x: Tensor, backend: str) -> Backend:
    """The backend for a call on ``x``.

    Raises:
        InvalidInputError: ``backend`` is not a known name.
        BackendUnavailable: the backend asked for, or every backend of the device, cannot run.
    """
    if backend == "auto":
        reasons = []
        for name in AUTO_ORDER.get(x.device.type, ("reference",)):
            reason = why_not(name, x)
            if reason is None:
                return _OrNext(backend_module(name), x) if name == "triton" else backend_module(name)
            reasons.append(f"{name}: {reason}")
        raise BackendUnavailable(
            f"no backend can run on a {x.dtype} tensor on {x.device}: " + "; ".join(reasons)
        )
    check_backend_name(backend)
    reason = why_not(backend, x)
    if reason is not None:
        raise BackendUnavailable(
            f"backend {backend!r} cannot run this call: {reason}. Use backend='auto' to let another one run."
        )
    return backend_module(backend)


class _OrNext:
    """A backend that compiles its kernels as they are needed. One that does not compile takes the backend out of
    service, with its reason, and the call goes to the next of ``auto``; nothing was written by then."""

    def __init__(self, module: Backend, x: Tensor) -> None:
        self.module, self.x = module, x

    def unavailable(self) -> str | None:
        return self.module.unavailable()

    def refuses(self, x: Tensor) -> str | None:
        return self.module.refuses(x)

    def channel_stats(
        self, x: Tensor, channel_dim: int, sample_dim: int, activation: str, state: Tensor, accumulate: bool
    ) -> None:
        try:
            self.module.channel_stats(x, channel_dim, sample_dim, activation, state, accumulate)
        except BackendUnavailable:
            following = select(self.x, "auto")
            following.channel_stats(x, channel_dim, sample_dim, activation, state, accumulate)

    def bn_act_stats(
        self,
        x: Tensor,
        norm: BatchNorm,
        act: str,
        y: Tensor,
        channel_dim: int,
        sample_dim: int,
        activation: str,
        state: Tensor,
        accumulate: bool,
    ) -> None:
        rest = x, norm, act, y, channel_dim, sample_dim, activation, state, accumulate
        try:
            self.module.bn_act_stats(*rest)
        except BackendUnavailable:
            select(self.x, "auto").bn_act_stats(*rest)

    def pair_stats(self, x: Tensor, y: Tensor, row_dims: int, out: Tensor) -> None:
        try:
            self.module.pair_stats(x, y, row_dims, out)
        except BackendUnavailable:
            select(self.x, "auto").pair_stats(x, y, row_dims, out)

    def filter_norms(self, weights: list[Tensor], dim: int, out: Tensor) -> None:
        try:
            self.module.filter_norms(weights, dim, out)
        except BackendUnavailable:
            select(self.x, "auto").filter_norms(weights, dim, out)


def check_backend_name(backend: str) -> None:
    """Raise :class:`InvalidInputError` unless ``backend`` is ``auto`` or a known name."""
    if backend != "auto" and backend not in BACKENDS:
        raise InvalidInputError(f"backend is {backend!r}; it must be 'auto' or one of {', '.join(BACKENDS)}")


def check_tensor(x: Tensor, name: str) -> None:
    """Raise :class:`InvalidInputError` unless ``x`` is a dense, non-empty floating-point tensor."""
    if not isinstance(x, Tensor):
        raise InvalidInputError(f"{name} is a {type(x).__name__}; it must be a torch.Tensor")
    if x.dtype not in DTYPE_CODES:
        raise InvalidInputError(
            f"{name} has dtype {x.dtype}; it must be float32, float64, float16 or bfloat16: convert it first"
        )
    if x.is_nested:
        raise InvalidInputError(f"{name} is a nested tensor; pass its parts, or pad it")
    if x.layout is not torch.strided:
        raise InvalidInputError(f"{name} has layout {x.layout}; call .to_dense() first")
    if x.numel() == 0:
        raise InvalidInputError(f"{name} is empty, with shape {tuple(x.shape)}; there is nothing to measure")


def check_dim(dim: int, ndim: int, name: str) -> int:
    """``dim`` counted from the front; :class:`InvalidInputError` if it is out of range."""
    if not isinstance(dim, (int, torch.SymInt)) or isinstance(dim, bool):
        raise InvalidInputError(f"{name} is a {type(dim).__name__}; it must be an int")
    if not -ndim <= dim < ndim:
        raise InvalidInputError(
            f"{name} is {dim}, but the tensor has {ndim} dimensions: it must lie in [{-ndim}, {ndim - 1}]"
        )
    return dim % ndim


def is_plain(*tensors: Tensor) -> bool:
    """Whether a call may go to its backend directly, past torch's dispatcher.

    Tracing (``torch.compile``, ``torch.export``, ``torch.jit.trace``, fake tensors, ``make_fx``), function transforms
    (``torch.func``) and tensor subclasses go through the registered operator.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._get_tracing_state() is not None:
        return False
    return all(
        (type(t) is Tensor or type(t) is torch.nn.Parameter) and not torch._is_functional_tensor(t)
        for t in tensors
    )


def materialized(x: Tensor) -> Tensor:
    """``x`` itself, or a copy where its memory does not hold its values: lazy negation, lazy zeros."""
    if x._is_zerotensor():
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    return x.resolve_neg() if x.is_neg() else x
