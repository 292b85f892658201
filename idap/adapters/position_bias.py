"""T5's attention, whose position bias is made by the first layer of a stack and used by all: heads a layer each.

One table of biases, a column for each head, serves every layer, so that heads would have to go from all layers at
once. Instead the table keeps its columns, and an attention that lost heads picks the columns of those it kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .standin import StandIn, turn_into


class HeadwiseBias(StandIn):
    """Before the class of such an attention, lets each layer use its own heads of the bias of all.

    What it returns for the layers after it is the bias of all heads, or that of one where it is the same for all.

    Attributes:
        kept_heads: numbers of the heads left, in the module as it was built.
        built_heads: heads it was built with.
    """

    kept_heads: tuple[int, ...]
    built_heads: int
    _whole: Tensor | None = None  # the bias of all heads, while the module runs

    def forward(
        self,
        hidden_states: Tensor,
        mask: Any = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """As the class it stands for; ``position_bias`` (1 or B, heads, queries, keys) of all heads, or of its own."""
        result = super().forward(
            hidden_states,
            mask=mask,
            key_value_states=key_value_states,
            position_bias=None if position_bias is None else self._own(position_bias),
            past_key_values=past_key_values,
            **kwargs,
        )
        whole = position_bias
        if whole is None:
            # Without a table the bias is zero for all heads.
            whole = result[1][:, :1] if self._whole is None else self._whole
            self._whole = None
        return (result[0], whole, *result[2:])

    def compute_bias(self, *args: Any, **kwargs: Any) -> Tensor:
        """The bias of its own heads, (1, heads, queries, keys), read from the table."""
        whole: Tensor = super().compute_bias(*args, **kwargs)  # type: ignore[misc]
        self._whole = whole
        return self._own(whole)

    def _own(self, bias: Tensor) -> Tensor:
        return bias[:, list(self.kept_heads)] if bias.shape[1] == self.built_heads else bias


def supports(module: nn.Module) -> bool:
    """Whether it is such an attention: it computes a position bias, or is given one, and returns it."""
    compute = getattr(module, "compute_bias", None)
    return (
        hasattr(module, "has_relative_attention_bias")
        and compute is not None
        and (isinstance(module, HeadwiseBias) or "key_length" in inspect.signature(compute).parameters)
        and "position_bias" in inspect.signature(module.forward).parameters
    )


def tables(model: nn.Module) -> Iterator[nn.Parameter]:
    """The tables of biases that such attentions share, whose columns all stay."""
    for module in model.modules():
        if supports(module):
            for name, child in module.named_children():
                if name == "relative_attention_bias":
                    yield from child.parameters()


def remove_heads(module: nn.Module, heads: int, removed: list[int]) -> None:
    """Turn such an attention of ``heads`` heads, in place, into one that picks the biases of those it keeps."""
    before = tuple(range(heads))
    if isinstance(module, HeadwiseBias):
        before = module.kept_heads
    else:
        turn_into(module, HeadwiseBias)
        module.built_heads = heads  # type: ignore[assignment]
    gone = set(removed)
    module.kept_heads = tuple(own for i, own in enumerate(before) if i not in gone)  # type: ignore[assignment]
