"""YOLOv4 on a ShuffleNetV2, composed from its published parts, in plain PyTorch.

The detector is that of Bochkovskiy, Wang & Liao (YOLOv4, arXiv 2004.10934) with the cross-stage partial neck of
Wang, Bochkovskiy & Liao (Scaled-YOLOv4, arXiv 2011.08036): spatial pyramid pooling, a path aggregation network
of CSP blocks, and a head each for strides 8, 16 and 32. Boxes are corners ``(x1, y1, x2, y2)`` in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InvalidInputError
from .resolve import _library

# Width and height in pixels of the three anchors of each head, for objects of up to 512 pixels.
ANCHORS = (
    ((12.0, 16.0), (19.0, 36.0), (40.0, 28.0)),
    ((36.0, 75.0), (76.0, 55.0), (72.0, 146.0)),
    ((142.0, 110.0), (192.0, 243.0), (459.0, 401.0)),
)
STRIDES = (8, 16, 32)
# How far a centre may lie outside its cell: sigmoid(t) * s - (s - 1) / 2, so that borders are reached.
_REACH = (1.2, 1.1, 1.05)
# An anchor answers for a box whose width and height it covers to this intersection over union.
_ASSIGNED = 0.213
# A prediction that overlaps a box so well is no example of "nothing here", whichever anchor answers.
_IGNORED = 0.7
_WEIGHTS = {"box": 0.05, "objectness": 1.0, "classes": 0.5}


def _unit(inputs: int, outputs: int, size: int = 1, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.LeakyReLU(0.1),
    )


class CSPBlock(nn.Module):
    """Cross-stage partial block (B, inputs, H, W) to (B, outputs, H, W).

    The input is split over two paths by a 1x1 convolution each; ``depth`` pairs of a 1x1 and a 3x3 convolution
    work on one of them, and both come together in a last 1x1 convolution.
    """

    def __init__(self, inputs: int, outputs: int, depth: int = 3) -> None:
        super().__init__()
        self.worked = _unit(inputs, outputs)
        self.pairs = nn.Sequential(
            *(nn.Sequential(_unit(outputs, outputs), _unit(outputs, outputs, 3)) for _ in range(depth))
        )
        self.passed = _unit(inputs, outputs)
        self.joined = _unit(2 * outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.joined(torch.cat((self.pairs(self.worked(x)), self.passed(x)), 1))  # type: ignore[no-any-return]


class PyramidPooling(nn.Module):
    """Spatial pyramid pooling inside a CSP block: maxima over 5, 9 and 13 positions beside the map itself."""

    def __init__(self, inputs: int, outputs: int, sizes: Sequence[int] = (5, 9, 13)) -> None:
        super().__init__()
        self.before = nn.Sequential(
            _unit(inputs, outputs), _unit(outputs, outputs, 3), _unit(outputs, outputs)
        )
        self.pools = nn.ModuleList(nn.MaxPool2d(size, 1, size // 2) for size in sizes)
        self.after = nn.Sequential(_unit((1 + len(sizes)) * outputs, outputs), _unit(outputs, outputs, 3))
        self.passed = _unit(inputs, outputs)
        self.joined = _unit(2 * outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        y = self.after(torch.cat([y, *(pool(y) for pool in self.pools)], 1))
        return self.joined(torch.cat((y, self.passed(x)), 1))  # type: ignore[no-any-return]


class ShuffleNetStages(nn.Module):
    """torchvision's ShuffleNetV2 without its classifier: maps of strides 8, 16 and 32.

    The names of its modules are those of torchvision, whose state dictionaries fit but for the classifier's keys.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        whole: Any = network
        self.conv1, self.maxpool = whole.conv1, whole.maxpool
        self.stage2, self.stage3, self.stage4 = whole.stage2, whole.stage3, whole.stage4
        self.conv5 = whole.conv5
        widths: list[int] = whole._stage_out_channels
        self.widths = (widths[1], widths[2], widths[4])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine = self.stage2(self.maxpool(self.conv1(x)))
        middle = self.stage3(fine)
        return fine, middle, self.conv5(self.stage4(middle))


class YOLOv4(nn.Module):
    """YOLOv4: images (B, 3, H, W) to the raw maps of its three heads.

    ``forward`` gives, for strides 8, 16 and 32, a tensor (B, 3 * (5 + classes), H / stride, W / stride): for each
    anchor four box numbers, the objectness and the classes, all before their sigmoid. :meth:`decode` turns them
    into boxes and scores, :meth:`detect` keeps the best ones, :meth:`loss` compares them with the truth. Sides
    that are not divisible by 32 raise :class:`InvalidInputError`.

    Args:
        backbone: gives maps of strides 8, 16 and 32, and says their ``widths``.
        classes: number of classes.
        widths: channels of the neck at strides 8, 16 and 32.
        depth: pairs of convolutions in each CSP block of the neck.
    """

    def __init__(
        self,
        backbone: ShuffleNetStages,
        classes: int = 80,
        widths: tuple[int, int, int] = (128, 256, 512),
        depth: int = 3,
    ) -> None:
        super().__init__()
        self.classes = classes
        self.backbone = backbone
        fine, middle, coarse = backbone.widths
        w8, w16, w32 = widths
        self.pooling = PyramidPooling(coarse, w32)
        self.lateral16, self.reduce32 = _unit(middle, w16), _unit(w32, w16)
        self.up16 = CSPBlock(2 * w16, w16, depth)
        self.lateral8, self.reduce16 = _unit(fine, w8), _unit(w16, w8)
        self.up8 = CSPBlock(2 * w8, w8, depth)
        self.down8, self.down16 = _unit(w8, w16, 3, 2), _unit(w16, w32, 3, 2)
        self.down_block16, self.down_block32 = CSPBlock(2 * w16, w16, depth), CSPBlock(2 * w32, w32, depth)
        self.heads = nn.ModuleList(
            nn.Sequential(_unit(width, 2 * width, 3), nn.Conv2d(2 * width, 3 * (5 + classes), 1))
            for width in widths
        )
        self.register_buffer("anchors", torch.tensor(ANCHORS), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if images.dim() != 4 or images.shape[2] % 32 or images.shape[3] % 32:
            raise InvalidInputError(
                f"images: got {tuple(images.shape)}, wanted (B, 3, H, W) with H and W divisible by 32"
            )
        fine, middle, coarse = self.backbone(images)
        p32 = self.pooling(coarse)
        p16 = self.up16(torch.cat((self.lateral16(middle), self._doubled(self.reduce32(p32))), 1))
        p8 = self.up8(torch.cat((self.lateral8(fine), self._doubled(self.reduce16(p16))), 1))
        n16 = self.down_block16(torch.cat((self.down8(p8), p16), 1))
        n32 = self.down_block32(torch.cat((self.down16(n16), p32), 1))
        return self.heads[0](p8), self.heads[1](n16), self.heads[2](n32)

    @staticmethod
    def _doubled(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")

    def _boxes(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Boxes (B, N, 4) and what else the heads say (B, N, 1 + classes), anchors of stride 8 first."""
        boxes, others = [], []
        for level, (raw, stride, reach) in enumerate(zip(maps, STRIDES, _REACH, strict=True)):
            height, width = raw.shape[-2:]
            # (B, anchors, H, W, 5 + classes)
            split = raw.unflatten(1, (3, 5 + self.classes)).permute(0, 1, 3, 4, 2)
            y, x = torch.meshgrid(
                torch.arange(height, device=raw.device, dtype=raw.dtype),
                torch.arange(width, device=raw.device, dtype=raw.dtype),
                indexing="ij",
            )
            offset = split[..., :2].sigmoid() * reach - (reach - 1) / 2
            centre = (torch.stack((x, y), -1) + offset) * stride
            # exp overflows in half precision from 11 on; a box of 400 times its anchor is none.
            size = split[..., 2:4].clamp(max=6.0).exp() * self.anchors[level].to(raw)[:, None, None]  # type: ignore[index]
            boxes.append(torch.cat((centre - size / 2, centre + size / 2), -1).flatten(1, 3))
            others.append(split[..., 4:].flatten(1, 3))
        return torch.cat(boxes, 1), torch.cat(others, 1)

    def decode(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Boxes (B, N, 4) and scores (B, N, classes) of every anchor of every cell.

        A score is the probability of an object times that of the class.

        Args:
            maps: what ``forward`` gave.
        """
        boxes, others = self._boxes(maps)
        probabilities = others.sigmoid()
        return boxes, probabilities[..., :1] * probabilities[..., 1:]

    def detect(
        self,
        images: Tensor,
        *,
        score_threshold: float = 0.05,
        overlap: float = 0.5,
        most: int = 100,
    ) -> list[dict[str, Tensor]]:
        """Detections in each image: ``boxes`` (n, 4) within the image, ``scores`` (n,), ``labels`` (n,), best first.

        Args:
            images: (B, 3, H, W), sides divisible by 32.
            score_threshold: of a class; lower scores count as nothing.
            overlap: intersection over union above which the lower of two boxes of one class goes.
            most: detections an image keeps.
        """
        ops = _library("torchvision").ops
        height, width = images.shape[-2:]
        found = []
        for boxes, scores in zip(*self.decode(self(images)), strict=True):
            rows, labels = (scores > score_threshold).nonzero(as_tuple=True)
            own, values = ops.clip_boxes_to_image(boxes[rows], (height, width)), scores[rows, labels]
            kept = ops.batched_nms(own, values, labels, overlap)[:most]
            found.append({"boxes": own[kept], "scores": values[kept], "labels": labels[kept]})
        return found

    def loss(self, maps: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The parts of the training loss, weighted; their sum is to be minimised.

        ``box``: 1 − CIoU of every anchor that answers for a box (Zheng et al., arXiv 1911.08287). ``classes``:
        binary cross-entropy of its classes. ``objectness``: binary cross-entropy of all anchors, without those
        that answer for no box but predict one with an intersection over union above 0.7. An anchor answers for
        a box whose centre is in its cell and whose size it matches to 0.213, or better than any other anchor.

        Args:
            maps: what ``forward`` gave.
            targets: for each image ``boxes`` (n, 4) in pixels and ``labels`` (n,), n may be 0.

        Raises:
            InvalidInputError: for another number of targets than images, or a label out of range.
        """
        ops = _library("torchvision").ops
        boxes, others = self._boxes(maps)
        if len(targets) != len(boxes):
            raise InvalidInputError(f"targets: got {len(targets)}, wanted one an image, {len(boxes)}")
        shapes = [tuple(raw.shape[-2:]) for raw in maps]
        wanted = torch.zeros_like(others[..., 0])
        counted = torch.ones_like(wanted)
        located, classified = boxes.new_zeros(()), boxes.new_zeros(())
        answers = 0
        for image, target in enumerate(targets):
            truth, labels = target["boxes"].to(boxes), target["labels"].to(boxes.device)
            if not len(truth):
                continue
            if int(labels.min()) < 0 or int(labels.max()) >= self.classes:
                raise InvalidInputError(f"targets[{image}]: wanted labels from 0 to {self.classes - 1}")
            best = ops.box_iou(boxes[image].detach(), truth).amax(1)
            counted[image] = (best <= _IGNORED).to(counted)
            which, places = self._assigned(truth, shapes)
            located = located + ops.complete_box_iou_loss(boxes[image, places], truth[which]).sum()
            hot = F.one_hot(labels[which], self.classes).to(others)
            classified = classified + F.binary_cross_entropy_with_logits(
                others[image, places, 1:], hot, reduction="sum"
            )
            wanted[image, places] = 1.0
            counted[image, places] = 1.0
            answers += len(places)
        objectness = F.binary_cross_entropy_with_logits(others[..., 0], wanted, counted, reduction="sum")
        return {
            "box": _WEIGHTS["box"] * located / max(answers, 1),
            "objectness": _WEIGHTS["objectness"] * objectness / counted.sum(),
            "classes": _WEIGHTS["classes"] * classified / max(answers * self.classes, 1),
        }

    def _assigned(self, truth: Tensor, shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """Numbers of the boxes and of the anchors (in the order of :meth:`decode`) that answer for them."""
        sizes = (truth[:, 2:] - truth[:, :2]).clamp(min=1e-6)  # (n, 2)
        anchors = self.anchors.to(truth).flatten(0, 1)  # type: ignore[operator, union-attr]  # (9, 2)
        inner = torch.minimum(sizes[:, None], anchors).prod(-1)
        overlap = inner / (sizes.prod(-1)[:, None] + anchors.prod(-1) - inner)
        chosen = (overlap > _ASSIGNED) | (overlap == overlap.amax(1, keepdim=True))
        which, anchor = chosen.nonzero(as_tuple=True)
        centre = (truth[:, :2] + truth[:, 2:])[which] / 2
        places = torch.zeros_like(which)
        start = 0
        for level, ((height, width), stride) in enumerate(zip(shapes, STRIDES, strict=True)):
            own = anchor // 3 == level
            x = (centre[own, 0] / stride).long().clamp(0, width - 1)
            y = (centre[own, 1] / stride).long().clamp(0, height - 1)
            places[own] = start + ((anchor[own] % 3) * height + y) * width + x
            start += 3 * height * width
        return which, places
