"""Everything about the channels of a feature map, in one read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .backends.reference import merge_states
from .dispatch import (
    ACTIVATION_CODES,
    check_backend_name,
    check_dim,
    check_tensor,
    is_plain,
    materialized,
    select,
)
from .errors import InvalidInputError

if TYPE_CHECKING:
    import torch.distributed as dist

# Rows of ChannelStats.state; csrc/common/accumulator.h has the same list.
ROWS = (
    "count",
    "samples",
    "mean",
    "m2",
    "abs_sum",
    "act_sq_sum",
    "act_norm_sum",
    "abs_mean_sq_sum",
    "positive",
    "min",
    "max",
)
_COUNT, _SAMPLES, _MEAN, _M2, _ABS, _ACT_SQ, _ACT_NORM, _ABS_MEAN_SQ, _POSITIVE, _MIN, _MAX = range(len(ROWS))


@dataclass(eq=False)
class ChannelStats:
    """Statistics of the channels of one or many feature maps ``y`` (B, C, S).

    All of it is derived from ``state``, a float64 tensor (11, C) on the device of the data, whose rows
    are named by ``idap_kernels.channel_stats.ROWS``. Statistics merge: over batches, processes and
    machines. ``S`` is the number of positions, ``b`` runs over samples, ``σ`` is ``activation``.
    """

    state: Tensor  # (11, C), float64
    activation: str = "relu"

    @classmethod
    def empty(
        cls, channels: int, *, activation: str = "relu", device: torch.device | str | None = None
    ) -> ChannelStats:
        """Statistics of no data, to accumulate into with ``channel_stats(..., out=stats)``.

        Raises:
            InvalidInputError: fewer than one channel, or an unknown activation.
        """
        if channels < 1:
            raise InvalidInputError(f"channels is {channels}; at least one is needed")
        if activation not in ACTIVATION_CODES:
            raise InvalidInputError(f"activation is {activation!r}; known are {', '.join(ACTIVATION_CODES)}")
        state = torch.zeros(len(ROWS), channels, dtype=torch.float64, device=device)
        return cls(state, activation)

    @property
    def channels(self) -> int:
        """The number of channels C."""
        return self.state.shape[1]

    @property
    def count(self) -> Tensor:
        """Elements per channel, B·S, as an int64 scalar."""
        return self.state[_COUNT, 0].to(torch.int64)

    @property
    def samples(self) -> Tensor:
        """Samples B, as an int64 scalar."""
        return self.state[_SAMPLES, 0].to(torch.int64)

    @property
    def mean(self) -> Tensor:
        """Mean of ``y`` (C,)."""
        return self.state[_MEAN]

    @property
    def var(self) -> Tensor:
        """Population variance of ``y`` (C,): M2 / count."""
        return self.state[_M2] / self.state[_COUNT]

    @property
    def std(self) -> Tensor:
        """Population standard deviation of ``y`` (C,)."""
        return self.var.sqrt()

    @property
    def rms(self) -> Tensor:
        """Root mean square of ``y`` (C,)."""
        return (self.mean.square() + self.var).sqrt()

    @property
    def abs_mean(self) -> Tensor:
        """Mean of ``|y|`` (C,)."""
        return self.state[_ABS] / self.state[_COUNT]

    @property
    def min(self) -> Tensor:
        """Smallest ``y`` (C,); NaN where the channel holds a NaN."""
        return self.state[_MIN]

    @property
    def max(self) -> Tensor:
        """Largest ``y`` (C,); NaN where the channel holds a NaN."""
        return self.state[_MAX]

    @property
    def positive_fraction(self) -> Tensor:
        """Share of ``y > 0`` (C,), in [0, 1]."""
        return self.state[_POSITIVE] / self.state[_COUNT]

    @property
    def apoz(self) -> Tensor:
        """Average percentage of zeros after a ReLU (C,), as a share in [0, 1] (Hu et al., 2016)."""
        return 1.0 - self.positive_fraction

    @property
    def flow_norm(self) -> Tensor:
        """``mean_b ‖σ(y_b)‖₂`` (C,): the activation term of a filter's flow divergence."""
        return self.state[_ACT_NORM] / self.state[_SAMPLES]

    @property
    def flow_energy(self) -> Tensor:
        """``mean_b ‖σ(y_b)‖₂²`` (C,): its sum over channels is the mean squared Frobenius norm."""
        return self.state[_ACT_SQ] / self.state[_SAMPLES]

    @property
    def sample_abs_rms(self) -> Tensor:
        """``sqrt(mean_b (mean_s |y_b|)²)`` (C,): absolute means of samples, joined by their RMS."""
        return (self.state[_ABS_MEAN_SQ] / self.state[_SAMPLES]).sqrt()

    def merge(self, other: ChannelStats) -> ChannelStats:
        """The statistics of both parts of the data, as a new object.

        Raises:
            InvalidInputError: the numbers of channels or the activations differ.
        """
        if not isinstance(other, ChannelStats):
            raise InvalidInputError(f"merge needs ChannelStats, got {type(other).__name__}")
        if other.state.shape != self.state.shape or other.activation != self.activation:
            raise InvalidInputError(
                f"cannot merge {self.channels} channels under {self.activation!r} with "
                f"{other.channels} channels under {other.activation!r}"
            )
        return ChannelStats(merge_states(self.state, other.state.to(self.state.device)), self.activation)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> ChannelStats:
        """The statistics of all processes of ``group``, merged in rank order: the same bits on each.

        Raises:
            InvalidInputError: torch.distributed is not initialised.
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise InvalidInputError("all_reduce needs torch.distributed.init_process_group() first")
        states = [torch.empty_like(self.state) for _ in range(dist.get_world_size(group))]
        dist.all_gather(states, self.state.contiguous(), group=group)
        merged = states[0]
        for state in states[1:]:
            merged = merge_states(merged, state)
        return ChannelStats(merged, self.activation)

    def state_dict(self) -> dict[str, Any]:
        """The statistics as data: ``{"state": (11, C) float64, "activation": str}``."""
        return {"state": self.state.detach().clone(), "activation": self.activation}

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> ChannelStats:
        """The inverse of :meth:`state_dict`.

        Raises:
            InvalidInputError: an entry is missing or has the wrong shape.
        """
        state, activation = state_dict.get("state"), state_dict.get("activation")
        if not isinstance(state, Tensor) or state.dim() != 2 or state.shape[0] != len(ROWS):
            got = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
            raise InvalidInputError(f"'state' must be a tensor ({len(ROWS)}, C), got {got}")
        if activation not in ACTIVATION_CODES:
            raise InvalidInputError(
                f"'activation' is {activation!r}; known are {', '.join(ACTIVATION_CODES)}"
            )
        return cls(state.to(torch.float64), activation)

    def __repr__(self) -> str:
        return (
            f"ChannelStats(channels={self.channels}, activation={self.activation!r}, "
            f"device={str(self.state.device)!r})"
        )


def channel_stats(
    x: Tensor,
    *,
    channel_dim: int = 1,
    sample_dim: int = 0,
    activation: str = "relu",
    out: ChannelStats | None = None,
    backend: str = "auto",
) -> ChannelStats:
    """Read a feature map once and give the statistics of its channels.

    Args:
        x: feature map of two or more dimensions; every dimension that is neither the channel's nor the
            sample's is a position. ``(B, C, *)`` as it is, ``(B, T, C)`` with ``channel_dim=2``,
            ``(T, B, C)`` with ``channel_dim=2, sample_dim=1``. float32, float64, float16 or bfloat16,
            any strides: nothing is copied. Gradients are not followed. Squares of all but float64 are
            taken in float32, so magnitudes should lie between 1e-18 and 1e18; else convert to float64.
        channel_dim: dimension of the channels; may be negative.
        sample_dim: dimension of the samples; may be negative.
        activation: ``σ`` of the flow norm: ``relu``, ``identity``, ``gelu`` (by erf) or ``silu``.
        out: statistics to accumulate into; they are changed in place and returned.
        backend: ``auto``, or a name from :func:`available_backends`, which then never falls back.

    Returns:
        The statistics, on the device of ``x``. Nothing is sent to the host.

    Raises:
        InvalidInputError: wrong type, rank, dtype or dimension, an empty ``x``, an ``out`` that does
            not fit.
        BackendUnavailable: the backend asked for cannot run this call.
    """
    channel_dim, sample_dim = check_map(x, channel_dim, sample_dim, activation, out)
    if is_plain(x):
        module = select(x, backend)
        x = materialized(x)
        if out is not None:
            module.channel_stats(x, channel_dim, sample_dim, activation, out.state, True)
            return out
        state = torch.empty(len(ROWS), x.shape[channel_dim], dtype=torch.float64, device=x.device)
        module.channel_stats(x, channel_dim, sample_dim, activation, state, False)
        return ChannelStats(state, activation)
    check_backend_name(backend)
    if out is not None:
        torch.ops.idap.channel_stats_(out.state, x.detach(), channel_dim, sample_dim, activation, backend)
        return out
    return ChannelStats(
        torch.ops.idap.channel_stats(x.detach(), channel_dim, sample_dim, activation, backend), activation
    )


def check_map(
    x: Tensor, channel_dim: int, sample_dim: int, activation: str, out: ChannelStats | None
) -> tuple[int, int]:
    """The dimensions of the channels and the samples, counted from the front, of arguments that are right.

    Raises:
        InvalidInputError: they are not; see :func:`channel_stats`.
    """
    check_tensor(x, "x")
    ndim = x.dim()
    if ndim < 2:
        raise InvalidInputError(
            f"x has shape {tuple(x.shape)}; a sample and a channel dimension are needed: use x[None]"
        )
    channel_dim = check_dim(channel_dim, ndim, "channel_dim")
    sample_dim = check_dim(sample_dim, ndim, "sample_dim")
    if channel_dim == sample_dim:
        raise InvalidInputError(f"channel_dim and sample_dim are both dimension {channel_dim}")
    if activation not in ACTIVATION_CODES:
        raise InvalidInputError(f"activation is {activation!r}; known are {', '.join(ACTIVATION_CODES)}")
    if out is not None:
        _check_out(out, x, x.shape[channel_dim], activation)
    return channel_dim, sample_dim


def _check_out(out: ChannelStats, x: Tensor, channels: int, activation: str) -> None:
    if not isinstance(out, ChannelStats):
        raise InvalidInputError(f"out is a {type(out).__name__}; it must be ChannelStats")
    state = out.state
    if state.shape != (len(ROWS), channels) or state.dtype != torch.float64 or not state.is_contiguous():
        raise InvalidInputError(
            f"out holds a {state.dtype} state of shape {tuple(state.shape)} for {out.channels} channels; "
            f"x has {channels}: use ChannelStats.empty({channels}, device=x.device)"
        )
    if state.device != x.device:
        raise InvalidInputError(f"out is on {state.device}, x on {x.device}: they must be on one device")
    if out.activation != activation:
        raise InvalidInputError(
            f"out was accumulated under activation {out.activation!r}, not {activation!r}: they do not mix"
        )


@torch.library.custom_op("idap::channel_stats", mutates_args=())
def _channel_stats_op(x: Tensor, channel_dim: int, sample_dim: int, activation: str, backend: str) -> Tensor:
    state = torch.empty(len(ROWS), x.shape[channel_dim], dtype=torch.float64, device=x.device)
    x = materialized(x)
    select(x, backend).channel_stats(x, channel_dim, sample_dim, activation, state, False)
    return state


@_channel_stats_op.register_fake
def _(x: Tensor, channel_dim: int, sample_dim: int, activation: str, backend: str) -> Tensor:
    return x.new_empty((len(ROWS), x.shape[channel_dim]), dtype=torch.float64)


@torch.library.custom_op("idap::channel_stats_", mutates_args=("state",))
def _channel_stats_update_op(
    state: Tensor, x: Tensor, channel_dim: int, sample_dim: int, activation: str, backend: str
) -> None:
    x = materialized(x)
    select(x, backend).channel_stats(x, channel_dim, sample_dim, activation, state, True)


@_channel_stats_update_op.register_fake
def _(state: Tensor, x: Tensor, channel_dim: int, sample_dim: int, activation: str, backend: str) -> None:
    return None
