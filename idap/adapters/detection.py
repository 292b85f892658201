"""Detectors whose outputs depend on data: the regions that they look into, and how many boxes they find.

A two-stage detector proposes regions, keeps the best of them and suppresses overlapping ones, and looks into what
is left; then it selects detections in the same way. Its arithmetic, and the number of its detections, depend on
the image. Known here are the classes of torchvision, by name, so that torchvision need not be there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .. import inputs as _inputs

# Operators (as parts of the names of their autograd nodes) that read regions out of maps: (N, C, H, W) to
# (regions, C, h, w). Those that spread channels over positions (ps_roi_align) are none.
REGION_POOLING = ("torchvision_roi_align", "torchvision_roi_pool")
# What a model says before it selects, by the class of the module that selects and the name of its child.
_PREDICTORS = {
    "RegionProposalNetwork": ("head",),
    "RoIHeads": ("box_predictor", "mask_predictor", "keypoint_predictor"),
    "RetinaNet": ("head",),
    "FCOS": ("head",),
    "SSD": ("head",),
}
_PREDICTED, _REGIONS = " (predictions of ", " (regions of "


def _classes(module: nn.Module) -> set[str]:
    return {base.__name__ for base in type(module).__mro__}


def _proposing(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in model.named_modules() if "RegionProposalNetwork" in _classes(m)]


@contextmanager
def most_proposals(model: nn.Module) -> Iterator[None]:
    """Let region proposal networks pass on as many regions as they may, whatever is on the image.

    Inside, proposals neither suppress one another nor are dropped for being small or unlikely, so that their number
    is the network's own limit (1000 in torchvision, or all anchors of a small image), and the work done on them a
    property of the model and of the size of the image. It is what the published figures count.
    """
    every = {"nms_thresh": 1.0, "min_size": 0.0, "score_thresh": 0.0}
    changed = [
        (network, {name: getattr(network, name) for name in every}) for _, network in _proposing(model)
    ]
    try:
        for network, _ in changed:
            vars(network).update(every)
        yield
    finally:
        for network, before in changed:
            vars(network).update(before)


@contextmanager
def predictions(model: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """What the heads of a detector say before boxes are selected, and the regions that it then looks into.

    A list of names and tensors, filled when the model runs inside. Detections alone tell little: a network that
    is not sure of anything finds nothing, pruned or not. Empty for models that select nothing.
    """
    said: list[tuple[str, Tensor]] = []
    handles: list[Any] = []

    def watch(path: str, module: nn.Module, first: bool = False) -> None:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            outputs = _inputs.outputs_of(output[0] if first else output)
            said.extend((path + own, tensor) for own, tensor in outputs)

        handles.append(module.register_forward_hook(after))

    try:
        for name, module in model.named_modules():
            for kind in _classes(module) & _PREDICTORS.keys():
                for child in _PREDICTORS[kind]:
                    part = getattr(module, child, None)
                    if isinstance(part, nn.Module):
                        watch(f"{_PREDICTED}{name}.{child})" if name else f"{_PREDICTED}{child})", part)
        for name, network in _proposing(model):
            watch(f"{_REGIONS}{name})", network, first=True)
        yield said
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def same_regions(model: nn.Module, outputs: Sequence[tuple[str, Tensor]]) -> Iterator[None]:
    """Let region proposal networks give the regions that :func:`predictions` found in another model's pass."""
    handles: list[Any] = []

    def give(network: Any, regions: list[Tensor]) -> None:
        handles.append(network.register_forward_hook(lambda module, args, output: (regions, *output[1:])))

    try:
        for name, network in _proposing(model):
            regions = [tensor for path, tensor in outputs if path.startswith(f"{_REGIONS}{name})")]
            give(network, regions)
        yield
    finally:
        for handle in handles:
            handle.remove()


def selections(outputs: Sequence[tuple[str, Tensor]]) -> frozenset[str]:
    """Paths of the selected outputs that what :func:`predictions` found stands for; none if it found nothing."""
    known = any(path.startswith(_PREDICTED) for path, _ in outputs)
    return _selected(outputs) if known else frozenset()


def _selected(outputs: Sequence[tuple[str, Tensor]]) -> frozenset[str]:
    """Paths of the outputs that were selected by their scores, so that their number depends on the data.

    The rule: a sequence holds a mapping for each image, in it ``boxes`` (n, 4) and at least one more tensor, and
    all of them have n as their first dimension. The regions of :func:`predictions` are selected too.
    """
    free = {path for path, _ in outputs if path.startswith(_REGIONS)}
    lengths = {path: tensor.shape[0] if tensor.dim() else None for path, tensor in outputs}
    for path, tensor in outputs:
        owner = path.removesuffix("['boxes']")
        if owner == path or not owner.endswith("]") or owner.endswith("']"):
            continue
        own = {other for other in lengths if other.startswith(owner + "[")}
        boxes = tensor.dim() == 2 and tensor.shape[1] == 4
        if boxes and len(own) > 1 and {lengths[other] for other in own} == {tensor.shape[0]}:
            free |= own
    return frozenset(free)


def free_lengths(outputs: Sequence[tuple[str, Tensor]]) -> frozenset[str]:
    """Paths of the outputs whose first dimension counts what was selected, and so is no form of the model.

    Selected boxes and what goes with them, of any detector, and what :func:`predictions` finds that heads say of the
    selected regions.
    """
    return _selected(outputs) | {path for path, _ in outputs if path.startswith(_PREDICTED)}
