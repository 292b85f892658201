"""How far a block moves its input: products of two tensors, read together once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .dispatch import check_backend_name, check_tensor, is_plain, materialized, select
from .errors import InvalidInputError

if TYPE_CHECKING:
    import torch.distributed as dist

ROWS = ("xx", "yy", "xy", "dd")
EPSILON = 1e-12


@dataclass(eq=False)
class PairStats:
    """Products of the rows of two tensors; a row is a sample or a token.

    All of it is derived from ``state``, a float64 tensor (4, R) on the device of the data.
    """

    state: Tensor  # (4, R), float64

    @property
    def rows(self) -> int:
        """The number of rows R."""
        return self.state.shape[1]

    @property
    def xx(self) -> Tensor:
        """``x·x`` (R,)."""
        return self.state[0]

    @property
    def yy(self) -> Tensor:
        """``y·y`` (R,)."""
        return self.state[1]

    @property
    def xy(self) -> Tensor:
        """``x·y`` (R,)."""
        return self.state[2]

    @property
    def dd(self) -> Tensor:
        """``‖y − x‖²`` (R,), from the differences themselves."""
        return self.state[3]

    @property
    def relative_change(self) -> Tensor:
        """``‖y − x‖₂ / (‖x‖₂ + ε)`` (R,), ε = 1e-12: its mean is the divergence of a block."""
        return self.dd.sqrt() / (self.xx.sqrt() + EPSILON)

    @property
    def cosine(self) -> Tensor:
        """``x·y / (‖x‖₂ ‖y‖₂)`` (R,); 0 where one of them is zero."""
        norms = self.xx.sqrt() * self.yy.sqrt()
        return torch.where(norms == 0, 0.0, self.xy / norms)

    @property
    def block_influence(self) -> Tensor:
        """``1 − cosine`` (R,) (Men et al., ShortGPT, 2024)."""
        return 1.0 - self.cosine

    def merge(self, other: PairStats) -> PairStats:
        """The rows of both, one after the other, as a new object.

        Raises:
            InvalidInputError: ``other`` is not PairStats.
        """
        if not isinstance(other, PairStats):
            raise InvalidInputError(f"merge needs PairStats, got {type(other).__name__}")
        return PairStats(torch.cat([self.state, other.state.to(self.state.device)], dim=1))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> PairStats:
        """The rows of all processes of ``group``, in rank order; their numbers may differ.

        Raises:
            InvalidInputError: torch.distributed is not initialised.
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise InvalidInputError("all_reduce needs torch.distributed.init_process_group() first")
        size = dist.get_world_size(group)
        mine = torch.tensor([self.rows], device=self.state.device)
        rows = [torch.zeros_like(mine) for _ in range(size)]
        dist.all_gather(rows, mine, group=group)
        counts = [int(r) for r in rows]
        padded = self.state.new_zeros(len(ROWS), max(counts))
        padded[:, : self.rows] = self.state
        parts = [torch.empty_like(padded) for _ in range(size)]
        dist.all_gather(parts, padded, group=group)
        return PairStats(torch.cat([part[:, :n] for part, n in zip(parts, counts, strict=True)], dim=1))

    def state_dict(self) -> dict[str, Any]:
        """The statistics as data: ``{"state": (4, R) float64}``."""
        return {"state": self.state.detach().clone()}

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> PairStats:
        """The inverse of :meth:`state_dict`.

        Raises:
            InvalidInputError: the entry is missing or has the wrong shape.
        """
        state = state_dict.get("state")
        if not isinstance(state, Tensor) or state.dim() != 2 or state.shape[0] != len(ROWS):
            got = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
            raise InvalidInputError(f"'state' must be a tensor ({len(ROWS)}, R), got {got}")
        return cls(state.to(torch.float64))

    def __repr__(self) -> str:
        return f"PairStats(rows={self.rows}, device={str(self.state.device)!r})"


def pair_stats(x: Tensor, y: Tensor, *, per: str = "sample", backend: str = "auto") -> PairStats:
    """Read two tensors of one shape together and give the products of their rows.

    Args:
        x: ``(B, *)``, the input of a block; float32, float64, float16 or bfloat16, any strides.
        y: the output of the block; the same shape, dtype and device. Gradients are not followed.
        per: ``sample``: a row is ``x[b]``, so R = B. ``token``: a row is a vector along the last
            dimension, so R = numel / last size.
        backend: ``auto``, or a name from :func:`available_backends`, which then never falls back.

    Returns:
        The products, on the device of ``x``. Nothing is sent to the host.

    Raises:
        InvalidInputError: shapes, dtypes or devices that differ, an empty tensor, a wrong rank or ``per``.
        BackendUnavailable: the backend asked for cannot run this call.
    """
    check_tensor(x, "x")
    check_tensor(y, "y")
    if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
        raise InvalidInputError(
            f"x is {tuple(x.shape)} {x.dtype} on {x.device}, y is {tuple(y.shape)} {y.dtype} on "
            f"{y.device}: shape, dtype and device must be the same"
        )
    if per not in ("sample", "token"):
        raise InvalidInputError(f"per is {per!r}; it must be 'sample' or 'token'")
    if x.dim() < 2:
        raise InvalidInputError(f"x has shape {tuple(x.shape)}; at least two dimensions are needed")
    row_dims = 1 if per == "sample" else x.dim() - 1
    if is_plain(x, y):
        module = select(x, backend)
        x, y = materialized(x), materialized(y)
        out = torch.empty(len(ROWS), _rows(x, row_dims), dtype=torch.float64, device=x.device)
        module.pair_stats(x, y, row_dims, out)
        return PairStats(out)
    check_backend_name(backend)
    return PairStats(torch.ops.idap.pair_stats(x.detach(), y.detach(), row_dims, backend))


def _rows(x: Tensor, row_dims: int) -> int:
    rows = 1
    for size in x.shape[:row_dims]:
        rows *= size
    return rows


@torch.library.custom_op("idap::pair_stats", mutates_args=())
def _pair_stats_op(x: Tensor, y: Tensor, row_dims: int, backend: str) -> Tensor:
    out = torch.empty(len(ROWS), _rows(x, row_dims), dtype=torch.float64, device=x.device)
    x, y = materialized(x), materialized(y)
    select(x, backend).pair_stats(x, y, row_dims, out)
    return out


@_pair_stats_op.register_fake
def _(x: Tensor, y: Tensor, row_dims: int, backend: str) -> Tensor:
    return x.new_empty((len(ROWS), _rows(x, row_dims)), dtype=torch.float64)
