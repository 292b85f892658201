"""The three detectors of the paper: torchvision's Faster R-CNN, YOLOv4 on a ShuffleNetV2, transformers' DETR."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import inputs as _inputs
from ..inputs import Inputs
from .architectures import Architecture, PaperFigures
from .resolve import _library
from .yolov4 import ShuffleNetStages, YOLOv4


def _noise(height: int, width: int) -> Any:
    """A function of a batch size giving images (B, 3, height, width) of uniform noise in [0, 1)."""
    return lambda batch: torch.rand(batch, 3, height, width)


def _targets(images: Iterable[Tensor], classes: int, first: int = 0) -> list[dict[str, Tensor]]:
    """Two boxes an image, of a quarter and a half of its sides, of classes from ``first`` on."""
    targets = []
    for number, image in enumerate(images):
        height, width = image.shape[-2:]
        boxes = image.new_tensor([[0.1, 0.2, 0.35, 0.45], [0.3, 0.4, 0.8, 0.9]])
        labels = first + (torch.arange(2, device=image.device) + number) % classes
        targets.append({"boxes": boxes * boxes.new_tensor([width, height, width, height]), "labels": labels})
    return targets


def _sum(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum()


# ------------------------------------------------------------------------------------------------
# Faster R-CNN on a ResNet-50
# ------------------------------------------------------------------------------------------------


def faster_rcnn_resnet50(classes: int = 91) -> nn.Module:
    """torchvision's Faster R-CNN on a ResNet-50 with a feature pyramid, all of it trainable.

    Takes images (B, 3, H, W), or a list of images (3, H, W) of any sizes, in [0, 1], and gives for each a
    dictionary of ``boxes`` (n, 4), ``labels`` (n,) and ``scores`` (n,). In training mode it takes targets too
    and gives its losses.

    Args:
        classes: with the background, which is class 0.

    Raises:
        InvalidInputError: torchvision is not installed.
    """
    detection = _library("torchvision").models.detection
    model: nn.Module = detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=classes
    )
    return model.eval()


def small_faster_rcnn(classes: int = 5, norm_layer: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """A Faster R-CNN of the same modules: three stages of one or two bottlenecks, a pyramid of 32 channels.

    Args:
        classes: with the background.
        norm_layer: of the ResNet, such as ``torchvision.ops.FrozenBatchNorm2d``.
    """
    models = _library("torchvision").models
    faster_rcnn = models.detection.faster_rcnn
    ops = _library("torchvision").ops
    resnet = models.resnet.ResNet(models.resnet.Bottleneck, [2, 2, 1, 1], norm_layer=norm_layer)
    backbone = models.detection.backbone_utils.BackboneWithFPN(
        resnet, {"layer1": "0", "layer2": "1", "layer3": "2"}, [256, 512, 1024], 32
    )
    anchors = models.detection.anchor_utils.AnchorGenerator(
        ((8,), (16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 4
    )
    # The names of the levels tell the pooling which scales there are.
    pooling = ops.MultiScaleRoIAlign(["0", "1", "2"], 5, 2)
    network: nn.Module = faster_rcnn.FasterRCNN(
        backbone,
        min_size=64,
        max_size=96,
        rpn_anchor_generator=anchors,
        rpn_head=faster_rcnn.RPNHead(32, 3),
        rpn_pre_nms_top_n_test=100,
        rpn_post_nms_top_n_test=50,
        box_roi_pool=pooling,
        box_head=faster_rcnn.TwoMLPHead(32 * 5**2, 64),
        box_predictor=faster_rcnn.FastRCNNPredictor(64, classes),
    )
    return network.eval()


def faster_rcnn_loss(model: nn.Module, inputs: Inputs) -> Tensor:
    """The sum of the four losses of a Faster R-CNN in training mode, on two boxes an image."""
    images = _inputs.images_of(inputs)
    if images is None:
        assert isinstance(inputs, Tensor)
        images = list(inputs)
    network: Any = model
    classes = network.roi_heads.box_predictor.cls_score.out_features
    return _sum(model(images, _targets(images, classes - 1, first=1)))


# ------------------------------------------------------------------------------------------------
# YOLOv4 on a ShuffleNetV2
# ------------------------------------------------------------------------------------------------


def yolov4_shufflenet_v2(classes: int = 80) -> nn.Module:
    """YOLOv4 on torchvision's ShuffleNetV2 x2.0, with the neck of YOLOv4-P5; see :class:`~.yolov4.YOLOv4`.

    Raises:
        InvalidInputError: torchvision is not installed.
    """
    network = _library("torchvision").models.shufflenet_v2_x2_0(weights=None)
    return YOLOv4(ShuffleNetStages(network), classes).eval()


def small_yolov4(classes: int = 3) -> nn.Module:
    """A YOLOv4 of the same modules on a ShuffleNetV2 of two units a stage, with a neck of 8 to 32 channels."""
    models = _library("torchvision").models
    network = models.ShuffleNetV2([2, 2, 2], [24, 32, 48, 64, 96])
    return YOLOv4(ShuffleNetStages(network), classes, widths=(8, 16, 32), depth=1).eval()


def yolov4_loss(model: nn.Module, inputs: Inputs) -> Tensor:
    """The sum of YOLOv4's losses on two boxes an image."""
    assert isinstance(inputs, Tensor)
    network: Any = model
    return _sum(network.loss(model(inputs), _targets(inputs, network.classes)))


# ------------------------------------------------------------------------------------------------
# DETR on a ViT
# ------------------------------------------------------------------------------------------------


def _detr(backbone: str, depth: int, size: int, **settings: Any) -> nn.Module:
    transformers = _library("transformers")
    _library("timm")
    config = transformers.DetrConfig(
        backbone_config={
            "model_type": "timm_backbone",
            "backbone": backbone,
            "features_only": True,
            "use_pretrained_backbone": False,
            "out_indices": [depth - 1],
        },
        **settings,
    )
    model: Any = transformers.DetrForObjectDetection(config)
    # The configuration has no place for another size of the images than that of timm's default.
    model.model.backbone.model.model.set_input_size((size, size))
    network: nn.Module = model.eval()
    return network


def detr_vit_b_16(size: int = 432, classes: int = 91) -> nn.Module:
    """transformers' DETR on the features of timm's ViT-Base/16: encoder and decoder of 6 layers, 100 queries.

    Takes ``pixel_values`` (B, 3, size, size) and gives ``logits`` (B, 100, classes + 1) and ``pred_boxes``
    (B, 100, 4), centre and size as shares of the image. Training with ``labels`` needs SciPy, which matches
    queries with boxes.

    Args:
        size: of the images, a multiple of 16.
        classes: without "no object".

    Raises:
        InvalidInputError: transformers or timm is not installed.
    """
    return _detr("vit_base_patch16_224", 12, size, num_labels=classes)


def small_detr(size: int = 64, classes: int = 4) -> nn.Module:
    """A DETR of the same modules: two layers of a ViT-Tiny, two of encoder and decoder each, 32 channels wide."""
    return _detr(
        "vit_tiny_patch16_224",
        2,
        size,
        num_labels=classes,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=10,
    )


def detr_loss(model: nn.Module, inputs: Inputs) -> Tensor:
    """DETR's own loss, with bipartite matching, on two boxes an image."""
    _, arguments = _inputs.as_call(inputs)
    images: Tensor = arguments["pixel_values"]
    network: Any = model
    height, width = images.shape[-2:]
    labels = []
    for target in _targets(images, network.config.num_labels):
        x1, y1, x2, y2 = (target["boxes"] / images.new_tensor([width, height, width, height])).unbind(1)
        boxes = torch.stack(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), 1)
        labels.append({"class_labels": target["labels"], "boxes": boxes})
    loss: Tensor = model(**arguments, labels=labels).loss
    return loss


def _pixel_values(size: int) -> Any:
    return lambda batch: {"pixel_values": torch.randn(batch, 3, size, size)}


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        name="faster_rcnn_resnet50",
        title="Faster R-CNN (ResNet-50)",
        task="detection",
        builders={"torchvision": faster_rcnn_resnet50},
        inputs=_noise(480, 640),
        paper=PaperFigures(gmacs=180.5, pruned_gmacs=61.6, share=0.39, speedup=1.71),
        small=small_faster_rcnn,
        small_inputs=_noise(64, 96),
        loss=faster_rcnn_loss,
        # The network scales the shorter side up to 800, unless the longer one is at its limit of 1333.
        trace_inputs=lambda: torch.rand(1, 3, 64, 1333),
        notes=(
            "177.6 GMACs on a COCO image of 480 x 640, which the network scales to 800 x 1088, with the 1000 regions "
            "that it may propose; the paper has 180.5 on COCO.",
            "Backbone, pyramid, proposal head and box head are pruned, 12 of 16 bottlenecks can go.",
            "MACs count all regions that may be proposed, whatever is on the image.",
            "torch.export cannot follow it, pruned or not: GuardOnDataDependentSymNode, the number of regions.",
        ),
    ),
    Architecture(
        name="yolov4_shufflenet_v2",
        title="YOLOv4 (ShuffleNetV2)",
        task="detection",
        builders={"torchvision": yolov4_shufflenet_v2},
        inputs=_noise(896, 896),
        paper=PaperFigures(gmacs=60.8, pruned_gmacs=22.1, share=0.42, speedup=1.84),
        small=small_yolov4,
        small_inputs=_noise(64, 64),
        loss=yolov4_loss,
        trace_inputs=lambda: torch.rand(1, 3, 128, 128),
        notes=(
            "61.0 GMACs at 896 x 896, the size of YOLOv4-P5, whose neck it has; the paper has 60.8 on COCO and does "
            "not say the size.",
            "The forward pass gives the raw maps; decode, detect and loss are methods.",
            "All 13 units of stride 1 can go.",
        ),
    ),
    Architecture(
        name="detr_vit_b_16",
        title="DETR (ViT-Base/16)",
        task="detection",
        builders={"transformers": detr_vit_b_16},
        inputs=_pixel_values(432),
        paper=PaperFigures(gmacs=80.5, pruned_gmacs=34.3, share=0.41, speedup=1.56),
        small=small_detr,
        small_inputs=_pixel_values(64),
        loss=detr_loss,
        notes=(
            "81.5 GMACs at 432 x 432; the paper has 80.5 on Pascal VOC and does not say the size.",
            "Heads and hidden units of the backbone and of both transformers are pruned; the widths between layers "
            "stay, since the outputs and the position embeddings have them.",
            "All 12 layers of the backbone and 12 of the transformers can go.",
            "Training with labels needs SciPy.",
        ),
    ),
)
