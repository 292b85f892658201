"""Faster R-CNN, YOLOv4 and DETR: exact surgery, regions and detections, boxes, losses, files, sizes."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_networks import randomise, relative_error, scores_of, zeroed_outputs
from torch import Tensor, nn

import idap
from idap import plan as plans
from idap.adapters import detection as adapter
from idap.errors import ExportError, InvalidInputError, SurgeryError
from idap.groups import find_groups
from idap.models.detection import ARCHITECTURES, small_faster_rcnn, small_yolov4
from idap.models.yolov4 import ANCHORS, STRIDES, YOLOv4

from . import network_checks as checks

pytest.importorskip("torchvision")
pytest.importorskip("transformers")
pytest.importorskip("timm")

FASTER, YOLO, DETR = NAMES = [architecture.name for architecture in ARCHITECTURES]


def photographs(count: int) -> list[list[Tensor]]:
    """Images of two sizes, in the list that torchvision's detectors take."""
    return [[torch.rand(3, 64, 96 if number % 2 else 80) for number in range(count)]]


@pytest.fixture(scope="module")
def networks() -> dict[str, checks.Pruned]:
    return {
        own.name: checks.pruned(replace(own, small_inputs=photographs) if own.name == FASTER else own)
        for own in ARCHITECTURES
    }


@pytest.mark.parametrize("name", NAMES)
def test_stage_1(networks: dict[str, checks.Pruned], name: str) -> None:
    checks.check_stage_1(networks[name])


@pytest.mark.parametrize(("name", "least"), [(FASTER, 2), (YOLO, 3), (DETR, 6)])
def test_stage_2(networks: dict[str, checks.Pruned], name: str, least: int) -> None:
    checks.check_stage_2(networks[name], least, 2)


@pytest.mark.parametrize("name", NAMES)
def test_trains(networks: dict[str, checks.Pruned], name: str) -> None:
    own = networks[name]
    if name == DETR:  # whose loss matches with SciPy, and has weights in single precision
        pytest.importorskip("scipy")
        narrow = copy.deepcopy(own.network).float()
        own = replace(own, network=narrow, example={key: x.float() for key, x in own.example.items()})
    checks.check_training(own)


@pytest.mark.slow
def test_reload(networks: dict[str, checks.Pruned], tmp_path: Path) -> None:
    checks.check_reload(networks.values(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [YOLO, DETR])
def test_export(networks: dict[str, checks.Pruned], name: str, tmp_path: Path) -> None:
    own = networks[name]
    network = own.plan.apply(own.model).float()
    example = own.architecture.small_inputs(1)
    idap.export_program(network, tmp_path / "network.pt2", example)
    idap.export_onnx(network, tmp_path / "network.onnx", example)


@pytest.mark.slow
def test_faster_rcnn_cannot_be_exported_pruned_or_not(
    networks: dict[str, checks.Pruned], tmp_path: Path
) -> None:
    own = networks[FASTER]
    for network in (own.model, own.plan.apply(own.model)):
        with pytest.raises(ExportError, match="data-dependent"):
            idap.export_program(
                network.float(), tmp_path / "network.pt2", torch.rand(1, 3, 64, 96), dynamic_batch=False
            )
        own.model.double()


@pytest.mark.parametrize(
    "name", [pytest.param(FASTER, marks=pytest.mark.slow), YOLO, pytest.param(DETR, marks=pytest.mark.slow)]
)
def test_size_of_the_full_network(name: str) -> None:
    own = next(own for own in ARCHITECTURES if own.name == name)
    assert own.paper.gmacs is not None
    if name == YOLO:
        found = checks.meta_macs(own)
    else:  # whose forward passes look at values
        found = idap.count_macs(next(iter(own.builders.values()))(), own.inputs(1)) / 1e9
    assert found == pytest.approx(own.paper.gmacs, rel=0.02)


def test_all_that_is_left_alone_has_its_reason() -> None:
    reasons = {
        own.name: {s.root: s.reason for s in find_groups(own.small(), own.small_inputs(1)).skipped}
        for own in ARCHITECTURES
    }
    assert reasons[FASTER].keys() == {
        "rpn.head.cls_logits",
        "rpn.head.bbox_pred",
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
    }
    assert reasons[YOLO].keys() == {"heads.0.1", "heads.1.1", "heads.2.1"}
    for root, reason in reasons[DETR].items():
        assert "an output of the model" in reason or "LayerNorm" in reason, root


# ------------------------------------------------------------------------------------------------
# Faster R-CNN
# ------------------------------------------------------------------------------------------------


def test_channels_are_followed_through_levels_and_regions(networks: dict[str, checks.Pruned]) -> None:
    scan = find_groups(networks[FASTER].model, networks[FASTER].example)
    levels = {(f"backbone.fpn.layer_blocks.{level}.0", "conv_out") for level in range(3)}
    sides = [{(m.layer, m.kind): m for m in group.members} for group in scan.groups]
    members = next(own for own in sides if levels & own.keys())
    assert members.keys() == levels | {
        ("rpn.head.conv.0.0", "conv_in"),
        ("roi_heads.box_head.fc6", "linear_in"),
    }
    # Regions of 5 x 5 positions are flattened channel by channel.
    assert members["roi_heads.box_head.fc6", "linear_in"].units[2] == tuple(range(50, 75))
    roots = {member.layer for group in scan.groups for member in group.members if member.kind == "conv_out"}
    assert {"rpn.head.conv.0.0", "backbone.body.layer3.0.conv2", "backbone.fpn.inner_blocks.0.0"} <= roots


def test_frozen_batch_norms() -> None:
    ops = pytest.importorskip("torchvision").ops
    torch.manual_seed(0)
    model = randomise(small_faster_rcnn(norm_layer=ops.FrozenBatchNorm2d))
    for module in model.modules():
        if isinstance(module, ops.FrozenBatchNorm2d):
            module.weight.uniform_(0.6, 1.4)
            module.bias.normal_(0, 0.2)
    example = checks.wide(photographs(2))
    plan = idap.prune_filters(model, scores_of(model), example, ratio=0.4, round_to=2)
    (step,) = plan.steps
    assert sum(removal.kind == "frozen_bn" for removal in step.removals) > 10
    wanted, got = zeroed_outputs(model, plan, example), checks.outputs(plan.apply(model), example)
    assert len(got[0]) > 0, "nothing is detected, so that nothing is compared"
    assert relative_error(wanted, got) <= 1e-10


def test_macs_are_those_of_all_the_regions_that_may_be_proposed(networks: dict[str, checks.Pruned]) -> None:
    model = copy.deepcopy(networks[FASTER].model)
    noise = torch.rand(1, 3, 64, 96, dtype=torch.float64)
    model.rpn.nms_thresh, model.rpn.min_size, model.rpn.score_thresh = 0.1, 40, 0.6
    found: list[int] = []
    model.roi_heads.box_head.register_forward_hook(lambda module, args, output: found.append(len(output)))
    counts = {idap.count_macs(model, image) for image in (noise, torch.zeros_like(noise), noise.square())}
    assert found == [50] * 3, "not as many regions as rpn_post_nms_top_n_test"
    assert len(counts) == 1
    checks.outputs(model, noise)
    assert (model.rpn.nms_thresh, model.rpn.min_size, model.rpn.score_thresh) == (0.1, 40, 0.6)
    assert found[-1] < 50, "the count changed the network"


def test_no_detection_is_no_excuse(networks: dict[str, checks.Pruned]) -> None:
    """A network that finds nothing is compared by what it says before it selects."""
    own = networks[FASTER]
    model = copy.deepcopy(own.model)
    model.roi_heads.score_thresh = 1.0
    assert not any(tensor.numel() for tensor in checks.outputs(model, own.example))
    assert own.plan.exactness_error(model, own.example) <= 1e-10
    broken = own.plan.apply(model)
    with torch.no_grad():
        broken.roi_heads.box_head.fc7.weight[:4] += 1.0
    got = plans._outputs(broken, own.example)
    assert plans._inexactness(model, own.plan, got, own.example) > 1e-3


def test_equal_scores_do_not_matter(networks: dict[str, checks.Pruned]) -> None:
    """On an even image most anchors score alike, and rounding decides which of them are proposed."""
    own = networks[FASTER]
    even = torch.full((1, 3, 64, 96), 0.5, dtype=torch.float64)
    assert own.plan.exactness_error(own.model, even) <= 1e-10


def test_regions_can_be_given(networks: dict[str, checks.Pruned]) -> None:
    own = networks[FASTER]
    ours, theirs = plans._outputs(own.model, own.example), plans._outputs(own.network, own.example)
    regions = [tensor for path, tensor in theirs if path.startswith(" (regions of rpn)")]
    assert [tensor.shape[1] for tensor in regions] == [4, 4]
    with adapter.same_regions(own.model, theirs):
        again = plans._outputs(own.model, own.example)
    for path, tensor in again:
        if path.startswith(" (regions"):
            assert torch.equal(tensor, dict(theirs)[path])
            assert not torch.equal(tensor, dict(ours)[path])


class Scattered(nn.Module):
    """Writes rows, or columns, of what one layer makes into a table that another reads."""

    def __init__(self, columns: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.columns = columns

    def forward(self, x: Tensor) -> Tensor:
        made = self.first(x)
        table = made.new_zeros(5, made.shape[1])
        if self.columns:
            table[:4, torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])] = made
        else:
            table[torch.tensor([4, 1])] = made[:2]
            table[torch.tensor([2])] = made[3]
        return self.second(table)


def test_rows_that_are_put_into_a_table_are_followed() -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    model = Scattered(columns=False).double()
    plan = idap.prune_filters(model, scores_of(model), x, ratio=0.5, round_to=1)
    network = plan.apply(model)
    assert network.second.in_features == 4
    assert relative_error(zeroed_outputs(model, plan, x), checks.outputs(network, x)) <= 1e-10
    scan = find_groups(Scattered(columns=True), x.float())
    assert not scan.groups
    assert "not followed" in next(skipped.reason for skipped in scan.skipped if skipped.root == "first")


class Finder(nn.Module):
    """Gives a box for each channel that is above a threshold, in the form ``form``."""

    def __init__(self, threshold: float, form: str = "detections") -> None:
        super().__init__()
        self.layer = nn.Linear(8, 6)
        self.threshold, self.form = threshold, form

    def forward(self, x: Tensor) -> Any:
        scores = self.layer(x)[0]
        kept = (scores > self.threshold).nonzero()[:, 0]
        boxes = scores[kept][:, None].expand(-1, 4)
        if self.form == "tensor":
            return boxes
        if self.form == "unequal":
            return [{"boxes": boxes, "scores": scores}]
        return [{"boxes": boxes if self.form == "detections" else boxes[:, :3], "scores": scores[kept]}]


def test_the_number_of_detections_is_left_free() -> None:
    model = Finder(0.0)
    x = torch.randn(1, 8)
    with torch.no_grad():
        model.layer.weight.copy_(torch.arange(-2.0, 4.0)[:, None] * x / x.square().sum())
        model.layer.bias.zero_()
    other = copy.deepcopy(model)
    other.threshold = 1.5
    assert [len(tensor) for tensor in checks.outputs(model, x)] == [3, 3]
    assert [len(tensor) for _, tensor in plans.check_forward(model, other, x)] == [2, 2]
    for form in ("tensor", "unequal", "triples"):
        model.form = other.form = form
        with pytest.raises(SurgeryError, match="output"):
            plans.check_forward(model, other, x)


def test_boxes_of_a_detector_that_is_not_known_are_compared() -> None:
    """Nothing else stands for them, so that they must not be left out of a proof or a drift."""

    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 20)

        def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
            rows = self.second(self.first(x).softmax(-1)).view(-1, 4, 5)
            return [{"boxes": own[:, :4], "scores": own[:, 4]} for own in rows]

    model, x = Queries().double(), torch.randn(2, 8, dtype=torch.float64)
    plan = idap.prune_filters(model, scores_of(model), x, ratio=0.5, round_to=1, exact=False)
    assert plan.exactness_error(model, x) > 1e-3
    assert idap.drift(model, Queries().double(), [x]) > 1e-3


def test_drift_of_a_detector(networks: dict[str, checks.Pruned]) -> None:
    """It is that of what the heads say, however many boxes each network selects."""
    own = networks[FASTER]
    assert idap.drift(own.model, own.model, [own.example]) == 0.0
    sure = copy.deepcopy(own.model)
    sure.roi_heads.score_thresh = 0.3
    assert len(checks.outputs(sure, own.example)[0]) != len(checks.outputs(own.model, own.example)[0])
    assert idap.drift(own.model, sure, [own.example]) == 0.0
    far = idap.drift(own.model, own.network, [own.example])
    assert 1e-4 < far < 10


def test_a_list_of_images_is_a_batch() -> None:
    model = small_faster_rcnn()
    record = idap.profile(model, [photographs(2), photographs(3)])
    assert record.samples == 5
    assert {int(stats.samples) for name, stats in record.layers.items() if "body" in name} == {5}
    assert len(record.blocks) == 2
    # Once a level of the pyramid.
    assert record.layers["rpn.head.conv.0.0"].samples == 4 * 5


# ------------------------------------------------------------------------------------------------
# YOLOv4
# ------------------------------------------------------------------------------------------------


def maps_of(model: YOLOv4, height: int, width: int, value: float = -20.0) -> list[Tensor]:
    sizes = [(height // stride, width // stride) for stride in STRIDES]
    return [torch.full((1, 3 * (5 + model.classes), *size), value) for size in sizes]


def test_decoding_of_one_cell() -> None:
    model = small_yolov4()
    maps = maps_of(model, 64, 96)
    # Second anchor of stride 16, at row 1 and column 4: two places right of its centre, twice as wide.
    own = maps[1].view(1, 3, 8, 4, 6)[0, 1, :, 1, 4]
    own[:] = torch.tensor([2.0, 0.0, math.log(2.0), 0.0, 3.0, -1.0, 4.0, 0.0])
    boxes, scores = model.decode(maps)
    assert boxes.shape == (1, 3 * (8 * 12 + 4 * 6 + 2 * 3), 4)
    place = int(scores.amax(2).argmax())
    assert place == 3 * 8 * 12 + 1 * 4 * 6 + 1 * 6 + 4
    x = (4 + torch.tensor(2.0).sigmoid().item() * 1.1 - 0.05) * 16
    wide, high = 2 * ANCHORS[1][1][0], ANCHORS[1][1][1]
    wanted = torch.tensor([x - wide / 2, 24 - high / 2, x + wide / 2, 24 + high / 2])
    torch.testing.assert_close(boxes[0, place], wanted)
    objectness, classes = torch.tensor(3.0).sigmoid(), torch.tensor([-1.0, 4.0, 0.0]).sigmoid()
    torch.testing.assert_close(scores[0, place], objectness * classes)


def test_detections_are_the_best_of_overlapping_boxes() -> None:
    model = small_yolov4().double()
    images = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        all_boxes, all_scores = model.decode(model(images))
        found = model.detect(images, score_threshold=0.2, overlap=0.4, most=20)
    assert len(found) == 2
    for number, own in enumerate(found):
        boxes, scores, labels = own["boxes"], own["scores"], own["labels"]
        assert 0 < len(boxes) <= 20
        assert bool((scores[:-1] >= scores[1:]).all())
        assert bool((scores > 0.2).all())
        assert float(boxes.min()) >= 0
        assert float(boxes[:, 2].max()) <= 96
        assert float(boxes[:, 3].max()) <= 64
        torch.testing.assert_close(scores[0], all_scores[number].max())
        for i in range(len(boxes)):
            for j in range(i):
                inner = (
                    torch.minimum(boxes[i, 2:], boxes[j, 2:]) - torch.maximum(boxes[i, :2], boxes[j, :2])
                ).clamp(0)
                areas = [float((b[2:] - b[:2]).prod()) for b in (boxes[i], boxes[j])]
                assert (
                    labels[i] != labels[j]
                    or float(inner.prod()) <= 0.4 * (sum(areas) - float(inner.prod())) + 1e-6
                )
    assert all_boxes.shape[1] > 20


def test_loss_is_least_at_the_truth() -> None:
    model = small_yolov4()
    # A box of the size of one anchor, its centre in the middle of a cell.
    wide, high = ANCHORS[0][1]
    truth = torch.tensor([44 - wide / 2, 28 - high / 2, 44 + wide / 2, 28 + high / 2])
    target = [{"boxes": truth[None], "labels": torch.tensor([2])}]
    which, places = model._assigned(truth[None], [(8, 12), (4, 6), (2, 3)])
    assert set(which.tolist()) == {0}
    best = 1 * 8 * 12 + 3 * 12 + 5
    assert best in places.tolist()
    maps = maps_of(model, 64, 96)
    for place in places.tolist():
        level = 0 if place < 288 else 1
        rest, (height, width) = (place, (8, 12)) if level == 0 else (place - 288, (4, 6))
        anchor, cell = divmod(rest, height * width)
        row, column = divmod(cell, width)
        own = maps[level].view(1, 3, 8, height, width)[0, anchor, :, row, column]
        offset = torch.tensor([44.0, 28.0]) / STRIDES[level] - torch.tensor([column, row])
        reach = (1.2, 1.1)[level]
        own[:2] = ((offset + (reach - 1) / 2) / reach).logit()
        own[2:4] = (torch.tensor([wide, high]) / torch.tensor(ANCHORS[level][anchor])).log()
        own[4:] = torch.tensor([20.0, -20.0, -20.0, 20.0])
    parts = model.loss(maps, target)
    assert all(float(part) < 1e-5 for part in parts.values()), parts
    worse = [raw.clone() for raw in maps]
    worse[0].view(1, 3, 8, 8, 12)[0, 1, :, 3, 5] += torch.tensor(
        [1.0, 1.0, 1.0, 1.0, -30.0, 30.0, 30.0, -30.0]
    )
    for name, part in model.loss(worse, target).items():
        assert float(part) > float(parts[name]) + 1e-3


def test_training_brings_the_boxes_nearer() -> None:
    torch.manual_seed(0)
    model = small_yolov4().train()
    images = torch.rand(2, 3, 64, 64)
    targets = [
        {"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},
    ]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    course = []
    for _ in range(20):
        loss = torch.stack(list(model.loss(model(images), targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        course.append(loss.item())
    assert course[-1] < 0.6 * course[0]


def test_wrong_images_and_targets_are_refused() -> None:
    model = small_yolov4(classes=3)
    for shape in ((3, 64, 64), (1, 3, 64, 80)):
        with pytest.raises(InvalidInputError, match="divisible by 32"):
            model(torch.rand(shape))
    maps = maps_of(model, 64, 64)
    box = torch.tensor([[1.0, 1.0, 9.0, 9.0]])
    with pytest.raises(InvalidInputError, match="got 0, wanted one an image"):
        model.loss(maps, [])
    with pytest.raises(InvalidInputError, match="labels from 0 to 2"):
        model.loss(maps, [{"boxes": box, "labels": torch.tensor([3])}])


def test_torchvisions_weights_fit_the_backbone() -> None:
    models = pytest.importorskip("torchvision").models
    network = models.ShuffleNetV2([2, 2, 2], [24, 32, 48, 64, 96])
    backbone = small_yolov4().backbone
    missing, unexpected = backbone.load_state_dict(network.state_dict(), strict=False)
    assert not missing
    assert {key.split(".")[0] for key in unexpected} == {"fc"}


# ------------------------------------------------------------------------------------------------
# DETR
# ------------------------------------------------------------------------------------------------


def test_heads_of_the_backbone_and_of_both_transformers(networks: dict[str, checks.Pruned]) -> None:
    scan = find_groups(networks[DETR].model, networks[DETR].example)
    heads = {m.layer: m.size for group in scan.groups for m in group.members if m.kind == "heads"}
    backbone = "model.backbone.model.model.blocks"
    assert heads == {
        **{f"{backbone}.{layer}.attn": 3 for layer in range(2)},
        **{f"model.encoder.layers.{layer}.self_attn": 4 for layer in range(2)},
        **{
            f"model.decoder.layers.{layer}.{kind}": 4
            for layer in range(2)
            for kind in ("self_attn", "encoder_attn")
        },
    }


def test_frozen_parts_stay_frozen(networks: dict[str, checks.Pruned]) -> None:
    own = networks[DETR]
    model = copy.deepcopy(own.model)
    model.model.freeze_backbone()
    frozen = {
        name for name, parameter in own.plan.apply(model).named_parameters() if not parameter.requires_grad
    }
    assert frozen == {
        name for name, p in model.named_parameters() if "backbone" in name and not p.requires_grad
    }
    assert frozen
