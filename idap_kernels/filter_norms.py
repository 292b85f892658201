"""The L2 norm of every filter of many layers, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import check_backend_name, check_dim, check_tensor, is_plain, materialized, select
from .errors import InvalidInputError


def filter_norms(weights: Sequence[Tensor], *, dim: int = 0, backend: str = "auto") -> list[Tensor]:
    """The L2 norm of each slice along ``dim``, for every weight of a model at once.

    Args:
        weights: tensors of two or more dimensions on one device, ``(F, *)`` for ``dim=0``; float32,
            float64, float16 or bfloat16, mixed as they come, any strides. Gradients are not followed.
        dim: the dimension of the filters: 0 for convolutions and linear layers, 1 for transposed
            convolutions and for layers that store ``(in, out)``; may be negative.
        backend: ``auto``, or a name from :func:`available_backends`, which then never falls back.

    Returns:
        For each weight its norms ``(F,)`` in float64, on the device of the weights.

    Raises:
        InvalidInputError: not a sequence of tensors, a wrong rank, dtype or dimension, an empty weight,
            weights on several devices.
        BackendUnavailable: the backend asked for cannot run this call.
    """
    if isinstance(weights, Tensor):
        raise InvalidInputError("weights is one tensor; it must be a sequence: pass [weight]")
    weights = list(weights)
    for i, w in enumerate(weights):
        check_tensor(w, f"weights[{i}]")
        if w.dim() < 2:
            raise InvalidInputError(
                f"weights[{i}] has shape {tuple(w.shape)}; at least two dimensions are needed"
            )
        check_dim(dim, w.dim(), "dim")
        if w.device != weights[0].device:
            raise InvalidInputError(
                f"weights[{i}] is on {w.device}, weights[0] on {weights[0].device}: move them to one device"
            )
    if not weights:
        return []
    sizes = [w.shape[dim] for w in weights]
    if is_plain(*weights):
        module = _select_for_all(weights, backend)
        weights = [materialized(w) for w in weights]
        out = torch.empty(sum(sizes), dtype=torch.float64, device=weights[0].device)
        module.filter_norms(weights, dim, out)
    else:
        check_backend_name(backend)
        out = torch.ops.idap.filter_norms([w.detach() for w in weights], dim, backend)
    return list(out.split(sizes))


def _select_for_all(weights: list[Tensor], backend: str):  # type: ignore[no-untyped-def]
    # The backend must take every weight: the one of most dimensions decides. A weight has no sample
    # dimension, which the kernels' limit counts.
    widest = max(weights, key=lambda w: w.dim())
    return select(widest if widest.dim() < 6 else widest[None], backend)


@torch.library.custom_op("idap::filter_norms", mutates_args=())
def _filter_norms_op(weights: Sequence[Tensor], dim: int, backend: str) -> Tensor:  # torch 2.6: no list[]
    out = torch.empty(sum(w.shape[dim] for w in weights), dtype=torch.float64, device=weights[0].device)
    plain = [materialized(w) for w in weights]
    _select_for_all(plain, backend).filter_norms(plain, dim, out)
    return out


@_filter_norms_op.register_fake
def _(weights: Sequence[Tensor], dim: int, backend: str) -> Tensor:
    return weights[0].new_empty((sum(w.shape[dim] for w in weights),), dtype=torch.float64)
