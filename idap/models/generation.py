"""The three generators of the paper: DCGAN in plain PyTorch, VQGAN and Stable Diffusion's U-Net from diffusers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .architectures import Architecture, PaperFigures, images
from .resolve import _library

# ------------------------------------------------------------------------------------------------
# DCGAN
# ------------------------------------------------------------------------------------------------


class DCGANGenerator(nn.Module):
    """The generator of DCGAN (Radford et al., 2016): noise to images of 64 x 64 through transposed convolutions.

    Kernels of 4 x 4, as in the usual PyTorch version, in place of 5 x 5. Weights begin as normal noise of
    deviation 0.02, those of batch norms around one.

    Args:
        latent: channels of the noise.
        width: channels of the last hidden layer; those before it have 8, 4 and 2 times as many.
        channels: of the images.
    """

    def __init__(self, latent: int = 100, width: int = 128, channels: int = 3) -> None:
        super().__init__()
        widths = (latent, 8 * width, 4 * width, 2 * width, width)
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(pairwise(widths)):
            stride, padding = (2, 1) if number else (1, 0)
            layers += [
                nn.ConvTranspose2d(before, after, 4, stride, padding, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            ]
        self.layers = nn.Sequential(
            *layers, nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False), nn.Tanh()
        )
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, z: Tensor) -> Tensor:
        """Images (B, channels, 64, 64) in [-1, 1] of noise (B, latent, 1, 1)."""
        result: Tensor = self.layers(z)
        return result


def dcgan(width: int = 128) -> nn.Module:
    """The generator of DCGAN with the published widths, 1024, 512, 256 and 128."""
    return DCGANGenerator(width=width).eval()


def small_dcgan() -> nn.Module:
    """The same with 64, 32, 16 and 8 channels."""
    return DCGANGenerator(latent=12, width=8).eval()


# ------------------------------------------------------------------------------------------------
# VQGAN
# ------------------------------------------------------------------------------------------------


def _vqgan(widths: tuple[int, ...], latent: int, codes: int, groups: int) -> nn.Module:
    network: nn.Module = _library("diffusers").VQModel(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=latent,
        num_vq_embeddings=codes,
        norm_num_groups=groups,
    )
    return network.eval()


def vqgan() -> nn.Module:
    """diffusers' VQModel with the widths of the VQGAN that divides images by 16 and has 8192 codes of 256.

    Raises:
        InvalidInputError: if diffusers is not installed.
    """
    return _vqgan((128, 128, 256, 256, 512), 256, 8192, 32)


def small_vqgan() -> nn.Module:
    """The same class with two resolutions, groups of four and six channels, and 64 codes of four."""
    return _vqgan((32, 48), 4, 64, 8)


# ------------------------------------------------------------------------------------------------
# Stable Diffusion
# ------------------------------------------------------------------------------------------------


def _unet(widths: tuple[int, ...], attending: int, text: int, **options: Any) -> nn.Module:
    """A denoising U-Net with cross-attention in the first resolutions, so many as ``attending`` says."""
    rest = len(widths) - attending
    network: nn.Module = _library("diffusers").UNet2DConditionModel(
        block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D",) * attending + ("DownBlock2D",) * rest,
        up_block_types=("UpBlock2D",) * rest + ("CrossAttnUpBlock2D",) * attending,
        layers_per_block=2,
        cross_attention_dim=text,
        **options,
    )
    return network.eval()


def stable_diffusion_v1_5() -> nn.Module:
    """diffusers' UNet2DConditionModel with the configuration of Stable Diffusion v1.5 (860 M parameters).

    Raises:
        InvalidInputError: if diffusers is not installed.
    """
    return _unet((320, 640, 1280, 1280), 3, 768, sample_size=64, attention_head_dim=8)


def small_diffusion() -> nn.Module:
    """The same class with three resolutions, cross-attention in two of them, and groups of four channels and more."""
    return _unet((32, 64, 64), 2, 24, sample_size=16, attention_head_dim=4, norm_num_groups=8)


def _denoising(size: int, text: tuple[int, int]) -> Any:
    """A function of a batch size giving noisy latents (B, 4, size, size), steps (B,) and a text (B, *text)."""
    return lambda batch: {
        "sample": torch.randn(batch, 4, size, size),
        "timestep": torch.arange(1, batch + 1) * 999 // batch,
        "encoder_hidden_states": torch.randn(batch, *text),
    }


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        name="dcgan",
        title="DCGAN",
        task="generation",
        builders={"torch": dcgan},
        inputs=images(1, channels=100),
        paper=PaperFigures(gmacs=12.2, pruned_gmacs=4.8, share=0.39),
        small=small_dcgan,
        small_inputs=images(1, channels=12),
        notes=(
            "The published generator takes 0.41 G an image. The paper has 12.2 G and does not say of what: of 30 "
            "images, or of a width of 704 in place of 128.",
            "Nothing to remove in stage 2: every layer changes the resolution.",
        ),
    ),
    Architecture(
        name="vqgan",
        title="VQGAN",
        task="generation",
        builders={"diffusers": vqgan},
        inputs=images(64, 96),
        paper=PaperFigures(gmacs=18.3, pruned_gmacs=7.5, share=0.41),
        small=small_vqgan,
        small_inputs=images(16),
        trace_inputs=lambda: images(32)(1),
        notes=(
            "64 x 96 pixels (18.2 G) come nearest to the paper's 18.3 G; 256 x 256 take 193.9 G.",
            "Whole groups of the GroupNorms go, which is exact. What enters the codebook keeps its width, and so "
            "do the attentions, which have one head as wide as the network.",
            "In single precision, rounding can choose another code for a latent that lies between two; in double "
            "precision, original and pruned network choose the same.",
            "torch.export and ONNX want dynamic_batch=False: a sampler asks whether there are 64 images or more.",
        ),
    ),
    Architecture(
        name="stable_diffusion_v1_5",
        title="Stable Diffusion v1.5",
        task="generation",
        builders={"diffusers": stable_diffusion_v1_5},
        inputs=_denoising(32, (77, 768)),
        paper=PaperFigures(gmacs=85.7, pruned_gmacs=34.3, share=0.40),
        small=small_diffusion,
        small_inputs=_denoising(8, (5, 24)),
        trace_inputs=lambda: _denoising(16, (8, 768))(1),
        notes=(
            "Latents of 32 x 32, images of 256 x 256: 85.8 G in convolutions and linear layers, which is the paper's "
            "figure, and 4.3 G in the products of the attentions. Latents of 64 x 64 take 401.6 G.",
            "Whole groups of the GroupNorms go, attention heads, and hidden units with their gates, all of it exact; "
            "channels inside the transformers stay, since LayerNorms span them.",
            "torch.export and ONNX want dynamic_batch=False: a sampler asks whether there are 64 images or more.",
        ),
    ),
)
