"""FCN, U-Net and SegFormer: exact surgery, blocks, training, files, the paper's sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import idap
from idap.models.segmentation import ARCHITECTURES, pixelwise_loss

from . import network_checks as checks

pytest.importorskip("torchvision")
pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("segmentation_models_pytorch")

NAMES = [architecture.name for architecture in ARCHITECTURES]
# Residual blocks at full width; FCN has none, its units stand on the trunk.
BLOCKS = {"unet_resnet50": 5, "segformer_vit_b_16": 4}


@pytest.fixture(scope="module")
def networks() -> dict[str, checks.Pruned]:
    return {architecture.name: checks.pruned(architecture) for architecture in ARCHITECTURES}


@pytest.mark.parametrize("name", NAMES)
def test_stage_1(networks: dict[str, checks.Pruned], name: str) -> None:
    checks.check_stage_1(networks[name])


@pytest.mark.parametrize("name", BLOCKS)
def test_stage_2(networks: dict[str, checks.Pruned], name: str) -> None:
    checks.check_stage_2(networks[name], BLOCKS[name], 2 if BLOCKS[name] > 10 else 1)


def test_a_unit_of_the_fcn_goes(networks: dict[str, checks.Pruned]) -> None:
    own = networks["fcn_vgg19_bn"]
    # At full width every second convolution keeps the number of channels.
    names = {block.name for block in idap.find_blocks(own.model, own.example)}
    assert names == {"backbone.3", "backbone.10", "backbone.17"}
    record = idap.profile(own.model, [own.example], blocks=sorted(names))
    divergences = idap.layer_divergence(own.model, record)
    plan = idap.truncate_layers(own.model, divergences, own.example, count=1)
    shorter = plan.apply(own.model, own.example)
    assert idap.count_macs(shorter, own.example) < idap.count_macs(own.model, own.example)
    assert shorter(own.example)["out"].shape == own.model(own.example)["out"].shape


@pytest.mark.parametrize("name", NAMES)
def test_trains(networks: dict[str, checks.Pruned], name: str) -> None:
    checks.check_training(networks[name])


@pytest.mark.slow
def test_reload(networks: dict[str, checks.Pruned], tmp_path: Path) -> None:
    checks.check_reload(networks.values(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_export(networks: dict[str, checks.Pruned], name: str, tmp_path: Path) -> None:
    own = networks[name]
    network = own.plan.apply(own.model).float()
    example = own.architecture.small_inputs(2)
    idap.export_program(network, tmp_path / "network.pt2", example)  # runs the file, and compares


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=NAMES)
def test_macs_are_the_papers(architecture) -> None:
    assert checks.meta_macs(architecture) == pytest.approx(architecture.paper.gmacs, rel=0.02)
    share = architecture.paper.pruned_gmacs / architecture.paper.gmacs
    assert architecture.paper.share == pytest.approx(share, abs=0.006)


def test_the_loss_takes_logits_alone_and_in_a_mapping() -> None:
    logits = torch.randn(2, 3, 4, 5)
    target = torch.tensor([0, 1, 2, 0, 1]).expand(2, 4, 5)
    wanted = torch.nn.functional.cross_entropy(logits, target)
    for result in (logits, {"out": logits}):
        assert pixelwise_loss(lambda x, result=result: result, torch.zeros(2, 3, 4, 5)) == wanted


def test_segformer_gives_logits_in_the_size_of_the_image(networks: dict[str, checks.Pruned]) -> None:
    own = networks["segformer_vit_b_16"]
    assert own.model(own.example).shape == (2, 5, 48, 48)
