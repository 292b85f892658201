"""Attention heads: where they are in the layers of a model, and their divergence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .adapters import multihead as _multihead
from .errors import InvalidInputError
from .groups import Group, GroupScan, Member
from .profile import is_transposed_linear

if TYPE_CHECKING:
    from .profile import ActivationProfile

_NAMES = {
    "query": ("q", "query", "q_proj", "to_q", "q_lin", "wq", "query_proj"),
    "key": ("k", "key", "k_proj", "to_k", "k_lin", "wk", "key_proj"),
    "value": ("v", "value", "v_proj", "to_v", "v_lin", "wv", "value_proj"),
}
_KEYS_AND_VALUES = ("kv", "to_kv", "kv_proj", "key_value")


@dataclass(frozen=True)
class HeadChannels:
    """The channels of every head in one layer.

    Attributes:
        layer: qualified name of the layer, or of the parameter that holds the weights.
        channels: for each head its rows of the weight (its columns, for the output projection). Heads that
            share keys and values have the same rows there.
    """

    layer: str
    channels: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class AttentionHeads:
    """The heads of one attention module.

    Attributes:
        name: qualified name of the attention module.
        heads: number of query heads.
        query, key, value: what makes the queries, keys and values; one layer in three roles if they are fused.
        output: the output projection, which reads the heads.
    """

    name: str
    heads: int
    query: HeadChannels
    key: HeadChannels
    value: HeadChannels
    output: HeadChannels

    def to_dict(self) -> dict[str, Any]:
        """The same as strings, numbers and lists."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AttentionHeads:
        """The inverse of :meth:`to_dict`.

        Raises:
            InvalidInputError: if an entry is missing or malformed.
        """
        try:
            sides = [
                HeadChannels(
                    str(data[side]["layer"]), tuple(tuple(map(int, own)) for own in data[side]["channels"])
                )
                for side in ("query", "key", "value", "output")
            ]
            return cls(str(data["name"]), int(data["heads"]), *sides)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInputError(
                f"attention heads: an entry is missing or malformed ({error!r})"
            ) from error


def find_heads(model: nn.Module, scan: GroupScan) -> dict[str, AttentionHeads]:
    """The attention modules of ``model`` whose heads are units of ``scan``, by module name.

    An attention is left out if it does not tell which of its rows are queries, keys and values: by the names of
    three layers, or by one layer that makes them all. Its heads can be pruned all the same; they are then
    scored by their channels.

    Args:
        scan: of this model, by :func:`idap.groups.find_groups`.

    Raises:
        InvalidInputError: if the scan is of another model.
    """
    found: dict[str, AttentionHeads] = {}
    for group in scan.groups:
        for member in group.members:
            if member.kind not in ("heads", "mha"):
                continue
            try:
                module = model.get_submodule(member.layer)
            except AttributeError:
                raise InvalidInputError(
                    f"scan: has an attention {member.layer!r}, which the model has not; scan this model"
                ) from None
            multihead = isinstance(module, nn.MultiheadAttention)
            own = _of_multihead(member, module) if multihead else _of_layers(group, member)
            if own is not None:
                found[member.layer] = own
    return found


def _of_multihead(member: Member, module: nn.Module) -> AttentionHeads | None:
    assert isinstance(module, nn.MultiheadAttention)
    prefix = f"{member.layer}." if member.layer else ""
    names, rows = _multihead.head_rows(module)
    query, key, value = [
        HeadChannels(prefix + name, tuple(map(tuple, own)))
        for name, own in zip(names.values(), rows, strict=True)
    ]
    width = module.head_dim
    columns = tuple(tuple(range(head * width, (head + 1) * width)) for head in range(module.num_heads))
    output = HeadChannels(f"{prefix}out_proj", columns)
    return AttentionHeads(member.layer, module.num_heads, query, key, value, output)


def _of_layers(group: Group, attention: Member) -> AttentionHeads | None:
    inside = f"{attention.layer}." if attention.layer else ""
    makers = [
        member
        for member in group.members
        if member.kind in ("linear_out", "conv_out") and member.layer.startswith(inside)
    ]
    # The projection that reads them lies in the module, or right after it.
    readers = [
        member
        for member in group.members
        if member.kind in ("linear_in", "conv_in") and member.size % attention.size == 0
    ]
    near = [member for member in readers if member.layer.startswith(inside)] or readers
    if len(near) != 1:
        return None
    # Narrower than a head: what makes position biases, a number a head.
    width = near[0].size // attention.size
    parts = _parts([maker for maker in makers if min(map(len, maker.units)) >= width], attention)
    if parts is None:
        return None
    output = HeadChannels(near[0].layer, _split(near[0].units, attention))
    query, key, value = parts
    return AttentionHeads(attention.layer, attention.size, query, key, value, output)


def _split(units: Sequence[Sequence[int]], attention: Member) -> tuple[tuple[int, ...], ...]:
    """Channels of each head, from those of each unit: as many, in their order, for every head of a unit."""
    heads: dict[int, tuple[int, ...]] = {}
    for unit, own in zip(units, attention.units, strict=True):
        width = len(unit) // len(own)
        for position, head in enumerate(own):
            heads[head] = tuple(sorted(unit)[position * width : (position + 1) * width])
    return tuple(heads[head] for head in range(attention.size))


def _shared(units: Sequence[Sequence[int]], attention: Member) -> tuple[tuple[int, ...], ...]:
    """Channels of each head where all heads of a unit have the same ones."""
    heads = {head: tuple(unit) for unit, own in zip(units, attention.units, strict=True) for head in own}
    return tuple(heads[head] for head in range(attention.size))


def _parts(makers: Sequence[Member], attention: Member) -> list[HeadChannels] | None:
    """What makes queries, keys and values, in this order."""
    sharing = len(attention.units[0])
    if len(makers) == 1:
        # Fused: the rows of a unit are its queries, then as many keys and values as one head has queries.
        (maker,) = makers
        width, rest = divmod(len(maker.units[0]), sharing + 2)
        if rest or any(len(unit) != len(maker.units[0]) for unit in maker.units):
            return None
        rows = [sorted(unit) for unit in maker.units]
        query = _split([unit[: width * sharing] for unit in rows], attention)
        key = _shared([unit[width * sharing : width * (sharing + 1)] for unit in rows], attention)
        value = _shared([unit[width * (sharing + 1) :] for unit in rows], attention)
        return [HeadChannels(maker.layer, side) for side in (query, key, value)]
    named: list[HeadChannels] = []
    both = [maker for maker in makers if maker.layer.rpartition(".")[2] in _KEYS_AND_VALUES]
    if len(both) == 1 and len(makers) == 2:
        maker = next(maker for maker in makers if maker is not both[0])
        halves = [(sorted(unit), len(unit) // 2) for unit in both[0].units]
        key = _shared([unit[:half] for unit, half in halves], attention)
        value = _shared([unit[half:] for unit, half in halves], attention)
        sides = [HeadChannels(maker.layer, _split(maker.units, attention))]
        return sides + [HeadChannels(both[0].layer, side) for side in (key, value)]
    for role, names in _NAMES.items():
        own = [maker for maker in makers if maker.layer.rpartition(".")[2] in names]
        if len(own) != 1:
            return None
        units = own[0].units
        fill = _shared if role != "query" and sharing > 1 else _split
        named.append(HeadChannels(own[0].layer, fill(units, attention)))
    return named


def head_divergence(model: nn.Module, profile: ActivationProfile) -> dict[str, Tensor]:
    """The divergence of every attention head of the profile, by the name of the attention module.

    ``D_h = (1/n) · ‖A^h‖_F · (‖W_Q^h‖_F + ‖W_K^h‖_F + ‖W_V^h‖_F)``, with ``A^h`` (tokens, head width) the output
    of the head before the output projection, ``n`` its tokens (the mean, where it differed) and ``W^h`` the rows
    of the head (IDAP++, arXiv 2511.20141). Over ``B`` samples, ``‖A^h‖_F`` is the root mean square,
    ``sqrt((1/B) · Σ_b ‖A_b^h‖_F²)``: it comes from sums over channels, and seeing the data twice leaves it as it
    is. Biases have no part in it. Heads that share keys and values have the same ``W_K^h`` and ``W_V^h``.

    Returns:
        Per attention module a float64 tensor (heads,); the divergence of the module is its sum.

    Raises:
        InvalidInputError: if the profile lacks the inputs of an output projection, or is of another model.
    """
    scores: dict[str, Tensor] = {}
    for name, own in profile.heads.items():
        stats = profile.inputs.get(own.output.layer)
        if stats is None:
            raise InvalidInputError(
                f"profile: has the heads of {name!r} but no statistics of what enters {own.output.layer!r}; "
                "make it with idap.profile(model, batches), on data that runs through this attention"
            )
        tokens = stats.count / stats.samples
        energy = stats.flow_energy
        if max(map(max, own.output.channels)) >= len(energy):
            raise InvalidInputError(
                f"the profile has {len(energy)} channels before {own.output.layer!r}, fewer than the heads "
                "of the scan need: profile the model again"
            )
        per_head = torch.stack([energy[list(columns)].sum() for columns in own.output.channels]).sqrt()
        weights = sum(
            (_norms(model, part) for part in (own.query, own.key, own.value)), torch.zeros(own.heads)
        )
        scores[name] = per_head / tokens.mean() * weights.to(per_head.device)
    return scores


def attention_divergence(model: nn.Module, profile: ActivationProfile) -> dict[str, float]:
    """The divergence of every attention module of the profile: the sum over its heads.

    Raises:
        InvalidInputError: as :func:`head_divergence`.
    """
    return {name: float(scores.sum()) for name, scores in head_divergence(model, profile).items()}


def _norms(model: nn.Module, part: HeadChannels) -> Tensor:
    """Frobenius norm of the rows of each head, (heads,), float64."""
    owner, _, key = part.layer.rpartition(".")
    weight: Any = None
    try:
        layer = model.get_submodule(part.layer)
        weight = layer.weight.t() if is_transposed_linear(layer) else layer.weight  # type: ignore[operator]
    except AttributeError:
        with suppress(AttributeError):
            weight = getattr(model.get_submodule(owner), key)
    if not isinstance(weight, Tensor) or max(map(max, part.channels)) >= len(weight):
        raise InvalidInputError(
            f"the profile has heads made by {part.layer!r}, which the model has not, or narrower: profile it again"
        )
    rows = weight.detach().to(torch.float64).flatten(1).square().sum(1)
    return torch.stack([rows[list(own)].sum() for own in part.channels]).sqrt()


__all__ = ["AttentionHeads", "HeadChannels", "attention_divergence", "find_heads", "head_divergence"]
