"""Convolution, batch norm and activation, run as one pass with the statistics of the convolution.

While a profile runs, :class:`NormFusion` stands between the model and torch. The output of a measured layer waits: if
the next thing that happens to it is a batch norm in evaluation mode, :func:`idap_kernels.bn_act_stats` takes its
statistics in the pass that normalizes it. If anything else happens to it, it is measured before that.

The first batch shows which layers have such a norm, and what uses the normalized map first. If that is an activation
that the kernel knows, later batches have it applied in the same pass, ahead of time, and every use of the map is
watched: an activation that then comes finds its work done, anything else finds the values before the activation, put
back for it. Code that torch functions do not see (TorchScript) is watched in the first batch; other threads are not.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from .errors import InvalidInputError

# What reads no values of a tensor.
_METADATA: frozenset[Any] = frozenset(
    {
        Tensor.shape.__get__,  # type: ignore[attr-defined]
        Tensor.ndim.__get__,  # type: ignore[attr-defined]
        Tensor.dtype.__get__,  # type: ignore[attr-defined]
        Tensor.device.__get__,  # type: ignore[attr-defined]
        Tensor.layout.__get__,  # type: ignore[attr-defined]
        Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
        Tensor.is_leaf.__get__,  # type: ignore[attr-defined]
        Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
        Tensor._version.__get__,  # type: ignore[attr-defined]
        Tensor.dim,
        Tensor.size,
        Tensor.stride,
        Tensor.numel,
        Tensor.is_contiguous,
        Tensor.is_floating_point,
        Tensor.is_complex,
        Tensor.is_inference,
        Tensor.element_size,
        torch.is_floating_point,
        torch.is_complex,
    }
)

_ACTIVATIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    Tensor.relu: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.gelu: "gelu",
    F.hardswish: "hardswish",
}
_IN_PLACE: dict[Any, str] = {torch.relu_: "relu", Tensor.relu_: "relu"}
_KEYWORDS = {"inplace", "approximate", "min_val", "max_val"}


class Stop(Exception):
    """Carries an error of ours through the model's forward pass, so that it is not taken for the model's."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


def _activation(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, bool]:
    """What ``bn_act_stats`` calls the activation that a call computes, if any, and whether it works in place."""
    if kwargs.keys() - _KEYWORDS:
        return "", False
    if func in _IN_PLACE:
        return _IN_PLACE[func], True
    if func is F.hardtanh:
        low, high, in_place = _arguments(
            ("min_val", -1.0), ("max_val", 1.0), ("inplace", False), args, kwargs
        )
        return ("relu6" if (low, high) == (0.0, 6.0) else ""), in_place
    name = _ACTIVATIONS.get(func, "")
    if name == "gelu":
        return ("gelu" if kwargs.get("approximate", "none") == "none" else ""), False
    return name, bool(name) and bool(_arguments(("inplace", False), args, kwargs)[0])


def _arguments(*signature_and_call: Any) -> list[Any]:
    """The values of the parameters (name, default) behind the first of a call."""
    *signature, args, kwargs = signature_and_call
    given = dict(zip((name for name, _ in signature), args[1:]))
    return [given.get(name, kwargs.get(name, default)) for name, default in signature]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


@dataclass(eq=False)
class _Waiting:
    """The output of a layer that is not measured yet."""

    name: str
    y: Tensor
    version: int
    measure: Callable[[Tensor], None]
    fuse: Callable[[Tensor, dict[str, Any]], Tensor]


@dataclass(eq=False)
class _Normalized:
    """What a fused pass gave: the map behind the norm, or already behind its activation."""

    name: str
    ref: weakref.ref[Tensor]
    act: str
    again: Callable[[], Tensor] | None  # computes the values before the activation
    source: Tensor | None  # from this map, which has to stay as it is
    version: int  # of the source
    met: bool = False  # the activation has come, or, in the first batch, whatever was first


class NormFusion(TorchFunctionMode):
    """A torch function mode that runs batch norms behind measured layers together with their statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[int, _Waiting] = {}  # by the identity of the map, which is kept alive
        self.normalized: dict[int, _Normalized] = {}  # by the identity of the map, gone when that is
        self.layers: set[str] = set()  # those with a batch norm
        self.acts: dict[str, str] = {}  # by layer: the activation that joins the pass
        self.learning = True
        self.below = _Below(self)
        self.visible = 0  # calls in progress that were seen as they were made
        self.thread = threading.get_ident()

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Run one batch within this. What still waits at its end is measured."""
        self.thread = threading.get_ident()
        try:
            with _eagerly(), self.below if self.learning else nullcontext(), self:
                yield
            for waiting in list(self.waiting.values()):
                self._measure(waiting)
            for normalized in list(self.normalized.values()):
                self._put_back(normalized)  # somebody holds it still
        finally:
            self.waiting.clear()
            self.normalized.clear()
            self.learning = False

    def wait(
        self,
        name: str,
        y: Tensor,
        measure: Callable[[Tensor], None],
        fuse: Callable[[Tensor, dict[str, Any]], Tensor],
    ) -> None:
        """Let the output (B, C, *) of a layer wait for a batch norm.

        Args:
            name: of the layer.
            y: its output, in its values as they are now.
            measure: takes the statistics of ``y``; called unless a batch norm comes next.
            fuse: called instead with ``y`` and keyword arguments of :func:`idap_kernels.bn_act_stats`; gives
                its map.
        """
        if (other := self.waiting.get(id(y))) is not None:
            self._measure(other)  # a layer that hands on what another gave
        here = self.thread == threading.get_ident()
        if here and (self.learning or name in self.layers):
            self.waiting[id(y)] = _Waiting(name, y, version(y), measure, fuse)
        else:
            measure(y)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (self.waiting or self.normalized) and func not in _METADATA:
            if func is F.batch_norm and args and (entry := self.waiting.get(id(args[0]))) is not None:
                result = self._batch_norm(entry, args, kwargs)
            else:
                result = self._use(func, args, kwargs)
            if result is not None:
                return result
        self.visible += 1
        try:
            return func(*args, **kwargs)
        finally:
            self.visible -= 1

    def _batch_norm(self, entry: _Waiting, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The result of a batch norm of a map that waits; ``None`` if torch is to compute it."""
        mean, var, weight, bias, training, _, eps = _arguments(
            ("running_mean", None),
            ("running_var", None),
            ("weight", None),
            ("bias", None),
            ("training", False),
            ("momentum", 0.1),
            ("eps", 1e-5),
            args,
            kwargs,
        )
        y = entry.y
        odd = (
            training
            or mean is None
            or var is None
            or any(
                t is not None and (t.shape != y.shape[1:2] or t.device != y.device)
                for t in (mean, var, weight, bias)
            )
        )
        if odd or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            self._measure(entry)
            return None
        _check_unchanged(entry.name, entry.y, entry.version)
        del self.waiting[id(y)]
        self.layers.add(entry.name)
        act = "identity" if self.learning else self.acts.get(entry.name, "identity")
        norm = {
            "running_mean": mean,
            "running_var": var,
            "weight": weight,
            "bias": bias,
            "eps": eps,
            "act": act,
        }
        with self.below.aside():
            z = entry.fuse(y, norm)
        if self.learning or act != "identity":
            key = id(z)
            ref = weakref.ref(z, lambda _: self.normalized.pop(key, None))
            again = None if act == "identity" else lambda: F.batch_norm(*args, **kwargs)
            source = None if act == "identity" else y
            self.normalized[key] = _Normalized(entry.name, ref, act, again, source, entry.version)
        return z

    def _use(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Prepare the tensors that a call uses; its result, where that is there already."""
        for t in _tensors((args, kwargs)):
            if (waiting := self.waiting.get(id(t))) is not None:
                self._measure(waiting)
            for other in [n for n in list(self.normalized.values()) if n.source is t]:
                self._put_back(other)  # its source may be about to change
            entry = self.normalized.get(id(t))
            if entry is None:
                continue
            act, in_place = _activation(func, args, kwargs) if args and args[0] is t else ("", False)
            if entry.act == "identity":
                if not entry.met:
                    entry.met = True
                    self._learn(entry.name, act)
            elif entry.met or act != entry.act:
                self._put_back(entry)
            elif in_place:
                del self.normalized[id(t)]
                return t
            else:
                entry.met = True
                return t.detach()  # another tensor: whatever uses t itself again means the values before
        return None

    def _learn(self, name: str, act: str) -> None:
        self.acts[name] = act if act and self.acts.get(name, act) == act else "identity"

    def _put_back(self, entry: _Normalized) -> None:
        """Give a map its values before the activation, and expect none from now on."""
        z = entry.ref()
        if z is None or entry.again is None or entry.source is None:
            return
        _check_unchanged(entry.name, entry.source, entry.version)
        self.normalized.pop(id(z), None)
        self.acts[entry.name] = "identity"
        z.data = entry.again()

    def _measure(self, entry: _Waiting) -> None:
        _check_unchanged(entry.name, entry.y, entry.version)
        del self.waiting[id(entry.y)]
        with self.below.aside():
            entry.measure(entry.y)


def _check_unchanged(name: str, y: Tensor, before: int) -> None:
    if version(y) != before:
        raise Stop(
            InvalidInputError(
                f"the output of layer {name!r} was changed in place where torch functions cannot be watched, as by "
                "TorchScript: profile with fuse=False, or set IDAP_FUSE=0"
            )
        )


@contextmanager
def _eagerly() -> Iterator[None]:
    """Compiled functions run as they were written: their compiler would trace the mode, and nothing would be seen."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


class _Below(TorchDispatchMode):
    """Sees what Python does not, such as TorchScript: in the first batch, what it uses is not fused later on."""

    supports_higher_order_operators = True

    def __init__(self, fusion: NormFusion) -> None:
        super().__init__()
        self.fusion = fusion

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Out of the way of our own kernels, which take a longer path where calls are dispatched to Python."""
        if _get_current_dispatch_mode() is not self:
            yield
            return
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        fusion = self.fusion
        if fusion.waiting or fusion.normalized:
            for t in _tensors((args, kwargs)):
                if (waiting := fusion.waiting.get(id(t))) is not None:
                    fusion._measure(waiting)
                if not fusion.visible and (entry := fusion.normalized.get(id(t))) is not None:
                    fusion.acts[entry.name] = "identity"  # for good: see _learn
        return func(*args, **kwargs)


def version(y: Tensor) -> int:
    """How often a tensor was changed in place; -1 where torch does not count."""
    return -1 if y.is_inference() else y._version
