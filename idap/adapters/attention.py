"""Which attributes of an attention module speak of its heads, and how they change when heads go.

The layers of an attention are cut like any others; but most modules also keep the number of their heads, and
widths that follow from it, as plain numbers that their forward pass reads. The names below are those of torch,
torchvision, timm, transformers and diffusers. The width of the embedding (``embed_dim``, ``hidden_size``,
``dim``) is not among them: it belongs to what is around the attention. Whether a module works after the change
is not known here; the forward check of the pruned model tells.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from ..errors import PlanMismatchError, SurgeryError
from . import position_bias as _position_bias
from .multihead import remove_heads as _remove_from_multihead

# Heads of the queries; the first name that a module has counts.
COUNTS = (
    "num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "num_head", "nheads",
)  # fmt: skip
# Heads of keys and values, where several query heads share one.
SHARED_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
# Heads times the width of a head.
WIDTHS = ("all_head_size", "all_head_dim", "attn_dim", "inner_dim", "inner_kv_dim", "split_size")
# Shapes that end with the number of heads: tables of position biases in timm.
SHAPES = ("bias_shape",)
# Width of a head, in modules that keep no number of heads; their output projection is one of these children.
_HEAD_WIDTHS = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
_OUTPUTS = ("o_proj", "out_proj", "proj", "dense", "o", "wo", "out_lin")
_QUERIES = ("q_proj", "query", "q", "to_q", "q_lin", "wq", "query_proj")
_FUSED = ("qkv", "to_qkv", "c_attn", "in_proj", "Wqkv", "qkv_proj", "query_key_value")
_HINTS = ("attention", "attn", "mhsa", "mha")


def _number(module: nn.Module, name: str) -> int | None:
    value = vars(module).get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def count_heads(module: nn.Module) -> int | None:
    """Heads that a module says it has, or None if it says nothing of the kind."""
    found = (_number(module, name) for name in COUNTS)
    count = next((number for number in found if number is not None), None)
    if count is not None:
        return count
    width = next((n for name in _HEAD_WIDTHS if (n := _number(module, name)) is not None), None)
    children = dict(module.named_children())
    output = next((children[name] for name in _OUTPUTS if name in children), None)
    if width is None or not isinstance(output, nn.Linear) or output.in_features % width:
        return None
    return output.in_features // width


def attention_modules(model: nn.Module) -> dict[str, int]:
    """Names of the modules that split their channels over heads, with the number of heads."""
    found = {}
    for name, module in model.named_modules():
        heads = count_heads(module)
        if heads is None:
            continue
        children = {child for child, _ in module.named_children()}
        named = any(hint in type(module).__name__.lower() for hint in _HINTS)
        if isinstance(module, nn.MultiheadAttention) or named or children & {*_QUERIES, *_FUSED}:
            found[name] = heads
    modules = dict(model.named_modules())
    return {name: heads for name, heads in found.items() if not _only_holds(modules[name], name, found)}


def _only_holds(module: nn.Module, name: str, found: Collection[str]) -> bool:
    """Whether a module that knows a number of heads only holds the attention modules that have them."""
    projects = any(child in (*_QUERIES, *_FUSED) for child, _ in module.named_children())
    return not projects and any(other != name and other.startswith(f"{name}.") for other in found)


def remove_heads(module: nn.Module, name: str, removed: list[int]) -> None:
    """Make the attributes of an attention module fit after the channels of some of its heads are gone.

    Args:
        name: of the module, for messages.
        removed: numbers of the heads, as they were before.

    Raises:
        PlanMismatchError: if the module says nothing about heads.
        SurgeryError: if heads that share keys and values do not go together.
    """
    if isinstance(module, nn.MultiheadAttention):
        _remove_from_multihead(module, name, removed)
        return
    heads = count_heads(module)
    if heads is None:
        raise PlanMismatchError(f"{name}: the plan removes heads, this {type(module).__name__} has none")
    left = heads - len(removed)
    # What it holds, such as a table of position biases, may keep the number as well.
    for part in module.modules():
        for key in (*COUNTS, *SHARED_COUNTS, *WIDTHS):
            value = _number(part, key)
            if value is None or (value != heads and (key in COUNTS or part is not module)):
                continue  # a number of something else
            if (value * left) % heads:
                raise SurgeryError(
                    f"{name}: {len(removed)} of {heads} heads go, which does not fit {key}={value}: heads that "
                    "share keys and values go together"
                )
            setattr(part, key, value * left // heads)
        for key in SHAPES:
            shape = vars(part).get(key)
            if isinstance(shape, tuple) and shape and shape[-1] == heads:
                setattr(part, key, (*shape[:-1], left))
    if _position_bias.supports(module):
        _position_bias.remove_heads(module, heads, removed)
