"""``torch.nn.MultiheadAttention`` with fewer heads than its embedding is wide."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InvalidInputError, PlanMismatchError


class HeadwiseAttention(nn.MultiheadAttention):
    """Multi-head attention over ``num_heads * head_dim`` channels, however wide the embedding is.

    Takes the place of a ``torch.nn.MultiheadAttention`` when heads are removed, and keeps its interface, its
    parameter names and its results; the output projection is called as a module, so that hooks see the heads.
    It says that queries, keys and values have different widths, which keeps ``nn.TransformerEncoderLayer`` off
    its fused path; that one reads the projections itself, and takes ``embed_dim`` for the width of all heads.

    Attributes:
        num_heads: heads left.
        kept_heads: their numbers in the module as it was built, or None before any removal.
        built_heads: heads it was built with.
    """

    kept_heads: tuple[int, ...] | None = None
    built_heads: int = 0

    @property
    def _qkv_same_embed_dim(self) -> bool:  # type: ignore[override]
        return False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of queries ``(L, N, E)`` over keys and values ``(S, N, *)``.

        Shapes, masks and results are those of :class:`torch.nn.MultiheadAttention`. Averaged weights are the
        mean over the heads that are left. A mask ``(N * heads, L, S)`` may have an entry for each head left,
        or for each head the module was built with. Nested tensors are taken for self-attention.

        Raises:
            InvalidInputError: for ``is_causal`` without a mask, a mask of another shape, or nested tensors
                with masks, or of different queries, keys and values.
        """
        if query.is_nested:
            if query is not key or key is not value or attn_mask is not None or key_padding_mask is not None:
                raise InvalidInputError(
                    "nested tensors: wanted the same one as query, key and value, and no masks; pad them"
                )
            each = [
                self.forward(one, one, one, need_weights=False, is_causal=False)[0] for one in query.unbind()
            ]
            return torch.nested.as_nested_tensor(each), None
        if is_causal and attn_mask is None:
            raise InvalidInputError("is_causal: got no attn_mask, wanted the causal mask that it hints at")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        samples, length = query.shape[:2]
        q, k, v = self._project(query, key, value)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat((k, self.bias_k.expand(samples, -1, -1)), 1)
            v = torch.cat((v, self.bias_v.expand(samples, -1, -1)), 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        mask = self._mask(attn_mask, key_padding_mask, samples, length, k.shape[1], q.dtype)
        # (N, heads, length, head_dim)
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            products = (q * (1.0 / math.sqrt(self.head_dim))) @ k.transpose(-2, -1)
            weights = (products if mask is None else products + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            heads = weights @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        result: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return result.squeeze(0), None if weights is None else weights.squeeze(0)
        return (result if self.batch_first else result.transpose(0, 1)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self.in_proj_weight is None:
            weights: tuple[Tensor, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
            return q, k, v
        else:
            weights = self.in_proj_weight.chunk(3)
        q, k, v = map(F.linear, (query, key, value), weights, biases)
        return q, k, v

    def _mask(
        self,
        attn_mask: Tensor | None,
        padding: Tensor | None,
        samples: int,
        length: int,
        keys: int,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """Both masks as what is added to the products, (N or 1, heads or 1, length or 1, keys); or None."""

        def additive(mask: Tensor) -> Tensor:
            if mask.dtype == torch.bool:
                return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
            # Keys that the module itself appends are open to all.
            return mask.to(dtype)

        def widened(mask: Tensor) -> Tensor:
            return F.pad(mask, (0, keys - mask.shape[-1]))

        total: Tensor | None = None
        if attn_mask is not None:
            total = widened(additive(attn_mask))
            if total.dim() == 3:
                total = self._head_mask(total, samples)
            if total.dim() not in (2, 4) or total.shape[-2:] != (length, keys):
                raise InvalidInputError(
                    f"attn_mask: got shape {tuple(attn_mask.shape)}, wanted (L, S) or (N * heads, L, S)"
                )
        if padding is not None:
            own = widened(additive(padding))[:, None, None, :]
            total = own if total is None else total + own
        return total

    def _head_mask(self, mask: Tensor, samples: int) -> Tensor:
        for heads, kept in ((self.num_heads, None), (self.built_heads, self.kept_heads)):
            if heads and mask.shape[0] == samples * heads:
                split = mask.unflatten(0, (samples, heads))
                return split if kept is None else split[:, list(kept)]
        return mask


def supports(module: nn.Module) -> bool:
    """Whether heads can be removed from it: a plain ``nn.MultiheadAttention``, no subclass, no reparametrization."""
    if type(module) not in (nn.MultiheadAttention, HeadwiseAttention):
        return False
    assert isinstance(module, nn.MultiheadAttention)
    weights = ("in_proj_weight",) if module.in_proj_weight is not None else _SEPARATE
    plain = all(module._parameters.get(name) is not None for name in weights)
    return plain and module.out_proj._parameters.get("weight") is not None


_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def head_rows(module: nn.MultiheadAttention) -> tuple[dict[str, str], list[list[list[int]]]]:
    """Where the heads of each projection are.

    Returns:
        Name of the parameter of the queries, keys and values, and for each of these three, for each head, its
        rows.
    """
    heads, width = module.num_heads, module.head_dim
    fused = module.in_proj_weight is not None
    rows = [
        [[part * heads * width * fused + head * width + i for i in range(width)] for head in range(heads)]
        for part in range(3)
    ]
    names = ("in_proj_weight",) * 3 if fused else _SEPARATE
    return dict(zip(("query", "key", "value"), names, strict=True)), rows


def remove_heads(module: nn.MultiheadAttention, name: str, removed: list[int]) -> None:
    """Turn a ``nn.MultiheadAttention``, in place, into one without these heads.

    The inputs of its output projection are a layer of their own, and are cut as one.

    Raises:
        PlanMismatchError: if the module is of a class of its own.
    """
    if not supports(module):
        raise PlanMismatchError(
            f"{name}: the plan removes heads of an nn.MultiheadAttention, this is a {type(module).__name__}"
        )
    heads, width = module.num_heads, module.head_dim
    kept = [head for head in range(heads) if head not in set(removed)]
    own = [head * width + i for head in kept for i in range(width)]
    all_three = [part * heads * width + row for part in range(3) for row in own]
    for key, rows, dim in (
        ("in_proj_weight", all_three, 0), ("in_proj_bias", all_three, 0), ("bias_k", own, 2),
        ("bias_v", own, 2), *((key, own, 0) for key in _SEPARATE),
    ):  # fmt: skip
        parameter = module._parameters.get(key)
        if parameter is not None:
            index = torch.tensor(rows, device=parameter.device)
            smaller = parameter.detach().index_select(dim, index).clone()
            setattr(module, key, nn.Parameter(smaller, parameter.requires_grad))
    if not isinstance(module, HeadwiseAttention):
        # In place, so that hooks, names and references to the module stay.
        module.__class__ = HeadwiseAttention
    assert isinstance(module, HeadwiseAttention)
    before = module.kept_heads
    if before is None:
        before, module.built_heads = tuple(range(heads)), heads
    module.kept_heads = tuple(before[head] for head in kept)
    module.num_heads = len(kept)


@contextmanager
def projections_called(model: nn.Module, layers: Collection[str]) -> Iterator[None]:
    """Let the ``nn.MultiheadAttention`` modules whose output projection is among ``layers`` call it.

    ``nn.MultiheadAttention`` multiplies by its weight itself, so that hooks see nothing of its heads. Inside, the
    modules are of the class that stands in for them once heads are removed; the results differ by rounding.
    """
    changed = [
        module
        for name, module in model.named_modules()
        if type(module) is nn.MultiheadAttention and (f"{name}.out_proj" if name else "out_proj") in layers
    ]
    try:
        for module in changed:
            module.__class__ = HeadwiseAttention
        yield
    finally:
        for module in changed:
            module.__class__ = nn.MultiheadAttention
