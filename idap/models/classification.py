"""The ten image classifiers of the paper, from torchvision and timm.

The base figures of the paper are those of its table of classifiers; ``pruned_gmacs`` and ``share`` are of the data
set on which it prunes most, ``speedup`` of its table of latencies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..inputs import Inputs
from .architectures import Architecture, PaperFigures, images
from .resolve import ModelFactory, _library


def _loss(model: nn.Module, inputs: Inputs) -> Tensor:
    """Cross-entropy of the logits (B, classes) against the classes in turn."""
    assert isinstance(inputs, Tensor)
    logits: Tensor = model(inputs)
    target = torch.arange(len(logits), device=logits.device) % logits.shape[1]
    return nn.functional.cross_entropy(logits, target)


# ------------------------------------------------------------------------------------------------
# Small networks of torchvision's classes, 10 outputs each
# ------------------------------------------------------------------------------------------------


def _part(module: str) -> Any:
    return getattr(_library("torchvision").models, module)


def small_resnet() -> nn.Module:
    """Bottlenecks with and without a projection in the shortcut; for images from 32 pixels."""
    resnet = _part("resnet")
    model: nn.Module = resnet.ResNet(resnet.Bottleneck, [1, 2, 1, 1], num_classes=10, width_per_group=16)
    return model.eval()


def small_efficientnet() -> nn.Module:
    """Inverted residuals with squeeze-and-excitation, one of them without an expansion."""
    parts = _part("efficientnet")
    stages = [
        parts.MBConvConfig(1, 3, 1, 16, 16, 1),
        parts.MBConvConfig(4, 3, 2, 16, 24, 2),
        parts.MBConvConfig(4, 5, 2, 24, 32, 2),
    ]
    model: nn.Module = parts.EfficientNet(stages, dropout=0.1, last_channel=64, num_classes=10)
    return model.eval()


def small_efficientnet_v2() -> nn.Module:
    """Inverted residuals whose expansion is fused with the depthwise convolution, and others."""
    parts = _part("efficientnet")
    stages = [
        parts.FusedMBConvConfig(1, 3, 1, 16, 16, 2),
        parts.FusedMBConvConfig(4, 3, 2, 16, 24, 2),
        parts.MBConvConfig(4, 3, 2, 24, 32, 2),
    ]
    model: nn.Module = parts.EfficientNet(stages, dropout=0.1, last_channel=64, num_classes=10)
    return model.eval()


def small_vit() -> nn.Module:
    """Three transformer layers of four heads on 48 channels; for images of 32 pixels."""
    model: nn.Module = _part("vision_transformer").VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=48, mlp_dim=96, num_classes=10
    )
    return model.eval()


def small_mobilenet_v3() -> nn.Module:
    """Inverted residuals with and without squeeze-and-excitation and expansion, and a hidden classifier layer."""
    parts = _part("mobilenetv3")
    stages = [
        parts.InvertedResidualConfig(16, 3, 16, 16, False, "RE", 1, 1, 1.0),
        parts.InvertedResidualConfig(16, 3, 48, 24, False, "RE", 2, 1, 1.0),
        parts.InvertedResidualConfig(24, 5, 64, 24, True, "HS", 1, 1, 1.0),
        parts.InvertedResidualConfig(24, 5, 64, 32, True, "HS", 2, 1, 1.0),
    ]
    model: nn.Module = parts.MobileNetV3(stages, 64, num_classes=10)
    return model.eval()


def small_densenet() -> nn.Module:
    """Two dense blocks with a transition between."""
    model: nn.Module = _part("densenet").DenseNet(
        growth_rate=8, block_config=(2, 3), num_init_features=16, bn_size=2, num_classes=10
    )
    return model.eval()


def small_convnext() -> nn.Module:
    """Two stages of two blocks, a downsampling between; layer scales of 0.1."""
    parts = _part("convnext")
    model: nn.Module = parts.ConvNeXt(
        [parts.CNBlockConfig(16, 32, 2), parts.CNBlockConfig(32, None, 2)], layer_scale=0.1, num_classes=10
    )
    return model.eval()


def small_vgg() -> nn.Module:
    """Five convolutions with batch norms, three linear layers behind the flattened maps; for images of 32 pixels."""
    parts = _part("vgg")
    with torch.device("meta"):  # its classifier has 120 million weights, whatever the convolutions
        model: nn.Module = parts.VGG(nn.Identity(), init_weights=False)
    model.features = parts.make_layers([16, "M", 24, 24, "M", 32, 32, "M"], batch_norm=True)
    model.avgpool = nn.AdaptiveAvgPool2d((4, 4))
    model.classifier = nn.Sequential(
        nn.Linear(32 * 4 * 4, 48), nn.ReLU(True), nn.Dropout(0.1),
        nn.Linear(48, 40), nn.ReLU(True), nn.Dropout(0.1), nn.Linear(40, 10),
    )  # fmt: skip
    return model.eval()


def small_shufflenet_v2() -> nn.Module:
    """Three stages of two, four and two units, the middle one with three units that can go."""
    model: nn.Module = _part("shufflenetv2").ShuffleNetV2([2, 4, 2], [16, 32, 48, 64, 96], num_classes=10)
    return model.eval()


def small_inception_v3() -> nn.Module:
    """All modules of Inception-v3, an eighth as wide; for images from 75 pixels."""
    parts = _part("inception")

    def convolution(inputs: int, outputs: int, **options: Any) -> nn.Module:
        block: nn.Module = parts.BasicConv2d(max(inputs // 8, 3), outputs // 8, **options)
        return block

    letters = "ABCDE"
    modules = [partial(getattr(parts, f"Inception{letter}"), conv_block=convolution) for letter in letters]
    model: nn.Module = parts.Inception3(
        num_classes=10,
        aux_logits=False,
        init_weights=False,
        inception_blocks=[convolution, *modules, parts.InceptionAux],
    )
    model.fc = nn.Linear(2048 // 8, 10)
    return model.eval()


# ------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------


def _entry(
    name: str,
    title: str,
    timm: str | None,
    size: int,
    paper: PaperFigures,
    small: Callable[[], nn.Module],
    small_size: int,
    *notes: str,
) -> Architecture:
    builders: dict[str, Callable[[], nn.Module]] = {"torchvision": ModelFactory(f"torchvision/{name}").build}
    if timm is not None:
        builders["timm"] = ModelFactory(f"timm/{timm}").build
    return Architecture(
        name=name,
        title=title,
        task="classification",
        builders=builders,
        inputs=images(size),
        paper=paper,
        small=small,
        small_inputs=images(small_size),
        loss=_loss,
        notes=notes,
    )


ARCHITECTURES: tuple[Architecture, ...] = (
    _entry(
        "resnet50", "ResNet-50", "resnet50", 224, PaperFigures(4.1, 1.1, 0.27, 1.98), small_resnet, 64,
    ),
    _entry(
        "efficientnet_b4", "EfficientNet-B4", "efficientnet_b4", 380,
        PaperFigures(4.2, 1.5, 0.36, 1.91), small_efficientnet, 64,
        "It has 4.39 GMACs at 380 pixels in both libraries, as torchvision's own table says; 4.2, in the tables of "
        "IDAP++, is the figure of the EfficientNet paper.",
        "Reductions of squeeze-and-excitation with fewer than 16 channels keep them: what is left is a multiple of 8.",
    ),
    _entry(
        "vit_b_16", "ViT-Base/16", "vit_base_patch16_224", 224,
        PaperFigures(17.5, 5.1, 0.29, 1.64), small_vit, 32,
        "Whole heads and channels of the MLPs go, which is exact; the width of the trunk stays, as layer norms span "
        "it.",
    ),
    _entry(
        "mobilenet_v3_large", "MobileNetV3-L", "mobilenetv3_large_100", 224,
        PaperFigures(0.2, 0.1, 0.45, 2.16), small_mobilenet_v3, 64,
        "It has 0.217 GMACs; the tables of IDAP++ give one digit.",
    ),
    _entry(
        "densenet121", "DenseNet-121", "densenet121", 224,
        PaperFigures(2.8, 0.8, 0.29, 1.88), small_densenet, 64,
    ),
    _entry(
        "convnext_small", "ConvNeXt-Small", "convnext_small", 224,
        PaperFigures(8.6, 2.3, 0.27, 1.67), small_convnext, 64,
        "Channels of the MLPs go, which is exact; the width of the trunk stays, as layer norms span it.",
    ),
    _entry(
        "vgg19_bn", "VGG19 (BN)", "vgg19_bn", 224, PaperFigures(19.6, 5.4, 0.28, 2.12), small_vgg, 32,
    ),
    _entry(
        "shufflenet_v2_x2_0", "ShuffleNetV2 x2.0", None, 224,
        PaperFigures(0.5, 0.1, 0.19, 1.94), small_shufflenet_v2, 64,
        "It has 0.583 GMACs; the tables of IDAP++ give one digit, cut off.",
        "timm has no ShuffleNetV2.",
        "All units of a stage keep the same channels of the trunk, so that each of the 13 that do not change the "
        "resolution can go, before and after the channels.",
    ),
    _entry(
        "inception_v3", "Inception-v3", "inception_v3", 299,
        PaperFigures(5.7, 1.6, 0.28, 2.11), small_inception_v3, 75,
        "Built without the auxiliary classifier, which only training runs.",
        "Six of its modules can go from it as it is; fewer once channels are gone, as modules that concatenate "
        "branches then give other widths than they get.",
    ),
    _entry(
        "efficientnet_v2_s", "EfficientNet V2-S", "efficientnetv2_s", 384,
        PaperFigures(8.8, 2.8, 0.32, 1.57), small_efficientnet_v2, 64,
        "It has 8.37 GMACs at 384 pixels in both libraries, as torchvision's own table says; 8.8, in the tables of "
        "IDAP++, is the figure of the EfficientNetV2 paper.",
    ),
)  # fmt: skip
