"""The three segmentation networks of the paper, composed from torchvision, segmentation-models-pytorch, timm
and transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..inputs import Inputs
from .architectures import Architecture, PaperFigures, images
from .resolve import _library


def pixelwise_loss(model: nn.Module, inputs: Inputs) -> Tensor:
    """Cross-entropy of every pixel, against classes that alternate along the rows."""
    assert isinstance(inputs, Tensor)
    output: Any = model(inputs)
    logits: Tensor = output if isinstance(output, Tensor) else output["out"]
    columns = torch.arange(logits.shape[-1], device=logits.device) % logits.shape[1]
    return F.cross_entropy(logits, columns.expand(len(logits), *logits.shape[2:]))


# ------------------------------------------------------------------------------------------------
# FCN on VGG19-BN
# ------------------------------------------------------------------------------------------------


def _fcn(features: nn.Module, width: int, classes: int) -> nn.Module:
    models = _library("torchvision").models
    last = str(len(features._modules) - 1)
    backbone = models._utils.IntermediateLayerGetter(features, {last: "out"})
    fcn = models.segmentation.fcn
    network: nn.Module = fcn.FCN(backbone, fcn.FCNHead(width, classes))
    return network.eval()


def fcn_vgg19_bn(classes: int = 21) -> nn.Module:
    """torchvision's FCN on the features of its VGG19-BN: (B, 3, H, W) to ``{"out": (B, classes, H, W)}``.

    Raises:
        InvalidInputError: if torchvision is not installed.
    """
    return _fcn(_library("torchvision").models.vgg19_bn(weights=None).features, 512, classes)


def small_fcn() -> nn.Module:
    """torchvision's FCN on VGG features of six convolutions."""
    vgg = _library("torchvision").models.vgg
    plan: list[str | int] = [16, 16, "M", 24, 24, "M", 32, 32, "M"]
    return _fcn(vgg.make_layers(plan, batch_norm=True), 32, 5)


# ------------------------------------------------------------------------------------------------
# U-Net on ResNet-50
# ------------------------------------------------------------------------------------------------


def unet_resnet50(classes: int = 21) -> nn.Module:
    """The U-Net of segmentation-models-pytorch on ResNet-50: (B, 3, H, W) to (B, classes, H, W).

    Height and width are multiples of 32.

    Raises:
        InvalidInputError: if segmentation-models-pytorch is not installed.
    """
    smp = _library("segmentation_models_pytorch")
    network: nn.Module = smp.Unet("resnet50", encoder_weights=None, classes=classes)
    return network.eval()


def small_unet() -> nn.Module:
    """The same U-Net on the first two stages of ResNet-50, seven bottlenecks."""
    smp = _library("segmentation_models_pytorch")
    network = smp.Unet(
        "resnet50", encoder_weights=None, encoder_depth=3, decoder_channels=(24, 16, 8), classes=4
    )
    network.encoder.layer3, network.encoder.layer4 = nn.Identity(), nn.Identity()  # not called
    unet: nn.Module = network.eval()
    return unet


# ------------------------------------------------------------------------------------------------
# SegFormer's decode head on ViT-B/16
# ------------------------------------------------------------------------------------------------


class SegFormer(nn.Module):
    """Maps of a backbone, SegFormer's all-MLP head on them, and its logits in the size of the image.

    Args:
        backbone: (B, 3, H, W) to a list of maps (B, C_i, H_i, W_i).
        decode_head: the list to logits (B, classes, H_0, W_0).
    """

    def __init__(self, backbone: nn.Module, decode_head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.decode_head = decode_head

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes, H, W) of images (B, 3, H, W)."""
        logits = self.decode_head(self.backbone(x))
        return F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)


def _segformer(name: str, layers: tuple[int, ...], hidden: int, classes: int, **options: Any) -> nn.Module:
    backbone = _library("timm").create_model(
        name, pretrained=False, features_only=True, out_indices=layers, **options
    )
    segformer = _library("transformers.models.segformer.modeling_segformer")
    config = _library("transformers").SegformerConfig(
        num_encoder_blocks=len(layers),
        hidden_sizes=backbone.feature_info.channels(),
        decoder_hidden_size=hidden,
        num_labels=classes,
    )
    return SegFormer(backbone, segformer.SegformerDecodeHead(config)).eval()


def segformer_vit_b_16(classes: int = 150, size: int = 592) -> nn.Module:
    """SegFormer's all-MLP head, of transformers, on maps after layers 3, 6, 9 and 12 of timm's ViT-B/16.

    All four maps have a 16th of the image's size. The head is as wide (768) as in SegFormer-B2 to B5.

    Args:
        size: height and width of the images, a multiple of 16.

    Raises:
        InvalidInputError: if timm or transformers is not installed.
    """
    return _segformer("vit_base_patch16_224", (2, 5, 8, 11), 768, classes, img_size=size)


def small_segformer() -> nn.Module:
    """The same on a ViT with four layers, 48 channels and six heads."""
    return _segformer(
        "vit_base_patch16_224", (0, 1, 2, 3), 32, 5, img_size=48, embed_dim=48, depth=4, num_heads=6
    )


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        name="fcn_vgg19_bn",
        title="FCN (VGG19-BN)",
        task="segmentation",
        builders={"torchvision": fcn_vgg19_bn},
        inputs=images(720),
        paper=PaperFigures(gmacs=201.8, pruned_gmacs=75.1, share=0.37, speedup=1.96),
        small=small_fcn,
        small_inputs=images(32),
        loss=pixelwise_loss,
        trace_inputs=lambda: images(64)(1),
        notes=(
            "720 x 720 with 21 classes are the paper's Pascal VOC figure (201.8 G).",
            "A plain stack: the identity can stand in for units of convolution, norm and activation that keep the "
            "number of channels, of which stage 1 leaves few.",
        ),
    ),
    Architecture(
        name="unet_resnet50",
        title="U-Net (ResNet-50)",
        task="segmentation",
        builders={"smp": unet_resnet50},
        inputs=images(1024),
        paper=PaperFigures(gmacs=170.2, pruned_gmacs=62.1, share=0.36, speedup=1.81),
        small=small_unet,
        small_inputs=images(32),
        loss=pixelwise_loss,
        trace_inputs=lambda: images(64)(1),
        notes=(
            "1024 x 1024 are the paper's Pascal VOC figure: 173.1 G with 21 classes, 170.1 G with one.",
            "Twelve bottlenecks of the encoder can go exactly. Nothing bypasses the convolutions of the decoder: where "
            "they keep the number of channels, the identity changes what the channels mean.",
        ),
    ),
    Architecture(
        name="segformer_vit_b_16",
        title="SegFormer (ViT-Base/16)",
        task="segmentation",
        builders={"timm+transformers": segformer_vit_b_16},
        inputs=images(592),
        paper=PaperFigures(gmacs=158.4, pruned_gmacs=53.5, share=0.34, speedup=1.59),
        small=small_segformer,
        small_inputs=images(48),
        loss=pixelwise_loss,
        notes=("592 x 592 with 150 classes are the paper's ADE20K figure (158.4 G).",),
    ),
)
