"""Forms of blocks that are no module of one shape: units of plain stacks, layers that are concatenated, tuples."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_networks import randomise, scores_of
from torch import Tensor, nn
from torch.nn import functional as F

import idap
from idap import artifact
from idap.errors import InvalidInputError, PlanMismatchError, TargetUnreachableError
from idap.layers import (
    Block,
    IdentityBlock,
    ProjectionBlock,
    block_filter_divergence,
    find_blocks,
    fit_projections,
    truncate_layers,
)
from idap.plan import BlockRemoval, BlockStep, ChannelRemoval, ChannelStep, PruningPlan

torchvision = pytest.importorskip("torchvision")


# ---------------------------------------------------------------------------- units of plain stacks


def conv(ins: int, outs: int, norm: bool = True) -> list[nn.Module]:
    norms = [nn.BatchNorm2d(outs)] if norm else []
    return [nn.Conv2d(ins, outs, 3, padding=1), *norms, nn.ReLU(inplace=True)]


class Stack(nn.Module):
    """A small VGG: children 3, 7, 10 and 14 begin units; 3 and 14 keep their shape, and so does 10 without norm."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *conv(3, 8), *conv(8, 8), nn.MaxPool2d(2), *conv(8, 16), *conv(16, 16, norm=False),
            nn.Dropout(), nn.AvgPool2d(2), *conv(16, 16),
        )  # fmt: skip
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def stack() -> Stack:
    """The same network each time, in float64 and evaluation mode."""
    torch.manual_seed(5)
    model = randomise(Stack(), torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    assert isinstance(model, Stack)
    return model.eval()


def images(count: int = 2) -> list[Tensor]:
    return [torch.randn(3, 3, 8, 8, dtype=torch.float64) for _ in range(count)]


def test_units_of_a_plain_stack() -> None:
    model, x = stack(), images()[0]
    blocks = find_blocks(model, x)
    assert [(b.name, b.type, b.shape, b.residual) for b in blocks] == [
        ("features.3", "Conv2d", (3, 8, 8, 8), False),
        ("features.10", "Conv2d", (3, 16, 4, 4), False),
        ("features.14", "Conv2d", (3, 16, 2, 2), False),
    ]
    assert blocks[0].followers == (("features.4", "BatchNorm2d"), ("features.5", "ReLU"))
    assert blocks[1].followers == (("features.11", "ReLU"), ("features.12", "Dropout"))
    assert blocks[0].last == "features.5"
    assert blocks[0].params == 8 * 8 * 9 + 8 + 16
    assert blocks[0].projection is None
    assert blocks[0].holds("features.4")
    assert not blocks[0].holds("features.40")
    # The stem has no layer before it; the channels of a unit are tied to nothing, so that all get projections.
    changing = find_blocks(model, x, projections=True)
    assert [b.name for b in changing] == ["features.3", "features.7", "features.10", "features.14"]
    assert [(b.projection.inputs, b.projection.outputs, b.projection.stride) for b in changing] == [
        (8, 8, (1, 1)), (8, 16, (1, 1)), (16, 16, (1, 1)), (16, 16, (1, 1)),
    ]  # fmt: skip


def test_vgg() -> None:
    from torchvision.models.vgg import VGG, cfgs, make_layers

    model = VGG(make_layers(cfgs["E"], batch_norm=True), init_weights=False)
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 5)
    x = torch.randn(1, 3, 32, 32)
    blocks = find_blocks(model, x)
    assert [b.type for b in blocks] == ["Conv2d"] * 12
    convolutions = [model.get_submodule(b.name) for b in blocks]
    assert all(c.in_channels == c.out_channels for c in convolutions)
    assert len(find_blocks(model, x, projections=True)) == 15


def test_vgg_of_timm() -> None:
    vgg = pytest.importorskip("timm").models.vgg
    widths = [8, 8, "M", 16, 16, "M", 24, "M", 24, 24, "M", 24]
    model = vgg.VGG(cfg=widths, num_classes=5, mlp_ratio=0.01, norm_layer=nn.BatchNorm2d).eval()
    x = torch.randn(1, 3, 112, 112)
    names = [b.name for b in find_blocks(model, x)]
    assert names == ["features.3", "features.10", "features.18", "features.21", "features.25"]
    short = truncate_layers(model, {"features.10": 0.0}, x, count=1).apply(model, x)
    for child in (10, 11, 12):
        model.features[child] = nn.Identity()
    with torch.no_grad():
        assert torch.equal(short(x), model(x))


def test_units_of_a_backbone_that_is_a_dictionary() -> None:
    """FCN takes the maps of VGG's children out of a dictionary of them."""
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    features = torchvision.models.vgg11_bn(weights=None).features
    model = FCN(IntermediateLayerGetter(features, {"27": "out"}), FCNHead(512, 5)).eval()
    x = torch.randn(1, 3, 64, 64)
    blocks = find_blocks(model, x)
    assert [b.name for b in blocks] == ["backbone.11", "backbone.18", "backbone.22", "backbone.25"]
    plan = truncate_layers(model, {b.name: 0.0 for b in blocks}, x, count=2)
    short = plan.apply(model, x)
    for name in ("11", "12", "13", "18", "19", "20"):
        model.backbone[name] = nn.Identity()
    with torch.no_grad():
        assert torch.equal(short(x)["out"], model(x)["out"])


def test_what_is_no_unit() -> None:
    class Plus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*conv(8, 8), *conv(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.body(x)

    x = torch.randn(1, 3, 8, 8)
    stem, head = conv(3, 8), nn.Conv2d(8, 2, 1)
    assert [b.name for b in find_blocks(nn.Sequential(*stem, Plus(), head), x)] == ["3"]

    class Beside(nn.Module):
        """Two stacks next to each other: neither of them is the way that everything goes."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            self.left, self.right = (nn.Sequential(*conv(8, 8), *conv(8, 4)) for _ in range(2))
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(torch.cat([self.left(x), self.right(x)], 1))

    assert find_blocks(Beside(), x) == []
    # A pool that changes the size ends a unit, and so does a layer; a bare convolution is none.
    bare = nn.Sequential(*stem, nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.MaxPool2d(2), head)
    assert find_blocks(bare, x) == []

    class Named(nn.Module):
        """Children that the code calls by name are not looked at."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.act, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.ReLU(), head

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.act(self.b(self.a(x))))

    assert find_blocks(Named(), x) == []
    # One that saves nothing as a projection goes by the identity with projections, too.
    narrow = nn.Sequential(*stem, nn.Conv2d(8, 8, 1), nn.ReLU(), head)
    assert [(b.name, b.projection) for b in find_blocks(narrow, x, projections=True)] == [("3", None)]


def test_a_sequence_of_units_is_only_a_container() -> None:
    body = nn.Sequential(*conv(8, 8), *conv(8, 8))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), body, nn.Conv2d(8, 2, 1))
    assert [b.name for b in find_blocks(model, torch.randn(1, 3, 8, 8))] == ["1.0", "1.3"]


def test_removed_units_leave_the_stack_without_them() -> None:
    model, x = stack(), images()[0]
    plan = truncate_layers(model, {"features.10": 0.1, "features.3": 0.2, "features.14": 0.3}, x, count=2)
    assert plan.removed_blocks == ("features.10", "features.3")
    short = plan.apply(model, x)
    assert all(isinstance(short.features[i], IdentityBlock) for i in (3, 4, 5, 10, 11, 12))
    wanted = nn.Sequential(
        *(child for i, child in enumerate(model.features) if i not in (3, 4, 5, 10, 11, 12))
    )
    with torch.no_grad():
        assert torch.equal(short(x), model.head(wanted(x).mean((2, 3))))
    assert plan.exactness_error(model, x) == 0
    assert plan.after.params == sum(p.numel() for p in short.parameters())
    # What is left is found again, and goes in a second plan.
    assert [b.name for b in find_blocks(short, x)] == ["features.14"]
    both = plan + truncate_layers(short, {"features.14": 0.0}, x, count=1)
    assert both.apply(model, x)(x).shape == (3, 5)
    reasons = truncate_layers(model, {"features.3": 0.0, "features.10": 0.0}, x, count=1,
                              ignore=["features.4"]).skipped  # fmt: skip
    assert ("features.3", "ignored on request") in {(s.root, s.reason) for s in reasons}


def test_a_narrow_unit_takes_its_inputs_to_the_channels_it_kept() -> None:
    """After width pruning the identity stands between channels of different numbers."""
    model, x = stack(), images()[0]
    cuts = {0: (1, 4), 3: (0, 7), 7: (2, 3, 9), 10: (5,), 14: (0, 1, 15)}
    after: dict[int, int] = {0: 3, 3: 7, 7: 10, 10: 14}
    removals = []
    for layer, lost in cuts.items():
        width = model.features[layer].out_channels
        removals.append(ChannelRemoval(f"features.{layer}", "conv_out", width, lost))
        if isinstance(model.features[layer + 1], nn.BatchNorm2d):
            removals.append(ChannelRemoval(f"features.{layer + 1}", "bn", width, lost))
        reader = f"features.{after[layer]}" if layer in after else "head"
        removals.append(ChannelRemoval(reader, "conv_in" if layer in after else "linear_in", width, lost))
    first = PruningPlan("Stack", (ChannelStep(tuple(removals)),))
    narrow = first.apply(model, x)
    # Of the units only the first has as many channels before it as behind it.
    assert [b.name for b in find_blocks(narrow, x)] == ["features.3"]
    plan = first + truncate_layers(narrow, {"features.3": 0.0}, x, count=1)
    assert plan.exactness_error(model, x) < 1e-12

    reference = copy.deepcopy(model)
    inputs, outputs = [0, 2, 3, 5, 6, 7], [1, 2, 3, 4, 5, 6]

    class Moved(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            moved = torch.zeros_like(h)
            for i, o in zip(inputs, outputs, strict=True):
                moved[:, o] = h[:, i]
            return moved

    reference.features[3], reference.features[4], reference.features[5] = (
        Moved(),
        nn.Identity(),
        nn.Identity(),
    )
    with torch.no_grad():
        for layer, lost in cuts.items():
            reader = reference.features[after[layer]] if layer in after else reference.head
            if layer != 0:  # its reader is gone
                reader.weight[:, list(lost)] = 0
        wanted = reference(x)
        got = plan.apply(model)(x)
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-12


def test_projections_of_units_are_the_least_squares_between_their_ends() -> None:
    model, batches = stack(), images(4)
    x = batches[0]
    plan = truncate_layers(model, {"features.7": 0.0, "features.14": 1.0}, x, count=2, projections=True)
    short = plan.apply(model, x)
    assert isinstance(short.features[7], ProjectionBlock)
    assert isinstance(short.features[9], IdentityBlock)
    residuals = fit_projections(model, short, plan, batches, ridge=0.0)
    assert set(residuals) == {"features.7", "features.14"}
    ends: dict[str, list[Tensor]] = {"in": [], "out": []}
    handles = [
        model.features[7].register_forward_pre_hook(lambda _, args: ends["in"].append(args[0].clone())),
        model.features[9].register_forward_hook(lambda _, args, out: ends["out"].append(out.clone())),
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    rows, wanted = (torch.cat(ends[k]).movedim(1, -1).flatten(0, -2) for k in ("in", "out"))
    solution = torch.linalg.lstsq(torch.cat([rows, torch.ones(len(rows), 1)], 1), wanted).solution
    assert torch.allclose(short.features[7].projection.weight.flatten(1), solution[:-1].T, atol=1e-9)
    assert torch.allclose(short.features[7].projection.bias, solution[-1], atol=1e-9)
    # All else is as it was: the stack with the fitted layer in the place of each unit.
    parts = list(model.features)
    parts[7:10], parts[14:17] = [short.features[7].projection, nn.Identity(), nn.Identity()], [
        short.features[14].projection, nn.Identity(), nn.Identity(),
    ]  # fmt: skip
    with torch.no_grad():
        assert torch.equal(short(x), model.head(nn.Sequential(*parts)(x).mean((2, 3))))


def test_the_divergence_of_a_unit_is_between_its_ends() -> None:
    model, batches = stack().float(), [x.float() for x in images(3)]
    blocks = find_blocks(model, batches[0])
    stats = idap.profile(model, batches, layers=(), blocks=blocks, progress=False)
    assert idap.profile(model, batches, layers=(), progress=False).blocks.keys() == stats.blocks.keys()
    got = idap.layer_divergence(model, stats)
    h = torch.cat(batches)
    ratios = {}
    with torch.no_grad():
        for i, child in enumerate(copy.deepcopy(model.features)):
            if i in (3, 10, 14):
                start = h.clone()
            h = child(h)
            if i in (5, 12, 16):
                change = (h - start).flatten(1).norm(dim=1) / start.flatten(1).norm(dim=1)
                ratios[f"features.{ {5: 3, 12: 10, 16: 14}[i] }"] = float(change.mean())
    assert list(got) == list(ratios)
    assert all(got[name] == pytest.approx(ratios[name], rel=1e-5) for name in got)
    means = block_filter_divergence(model, {"features.3": torch.tensor([1.0, 3.0])}, blocks)
    assert means == {"features.3": 2.0}
    with pytest.raises(InvalidInputError, match="wanted a list of blocks"):
        idap.profile(model, batches, blocks=blocks[0])
    with pytest.raises(InvalidInputError, match="no module named"):
        idap.profile(model, batches, blocks=[Block("gone", "Conv2d", (1,), 1, False)])


def test_plans_with_units_and_cut_layers_as_data(tmp_path: Path) -> None:
    model, x = stack(), images()[0]
    plan = truncate_layers(model, {"features.3": 0.0}, x, count=1)
    text = plan.to_json()
    assert PruningPlan.from_json(text) == plan
    (removal,) = json.loads(text)["steps"][0]["removals"]
    assert removal == {
        "name": "features.3", "type": "Conv2d", "returns": "tensor",
        "followers": [["features.4", "BatchNorm2d"], ["features.5", "ReLU"]],
    }  # fmt: skip
    cut = PruningPlan("M", (BlockStep((BlockRemoval("a.b", "Layer", cut=True),)),))
    assert PruningPlan.from_json(cut.to_json()) == cut
    assert "a.b (cut out)" in cut.summary()
    # A plan of a version without these forms.
    old = {"kind": "blocks", "removals": [{"name": "a", "type": "Layer", "returns": "tensor"}]}
    data = json.loads(text) | {"steps": [old]}
    assert PruningPlan.from_dict(data).steps == (BlockStep((BlockRemoval("a", "Layer"),)),)
    for damage in (3, [["features.4"]], [[1, 2, 3]], "ab"):
        data = json.loads(text)
        data["steps"][0]["removals"][0]["followers"] = damage
        with pytest.raises(InvalidInputError):
            PruningPlan.from_dict(data)
    other = stack()
    other.features[5] = nn.SiLU()
    with pytest.raises(PlanMismatchError, match=r"features\.5: the plan removes a ReLU here.*SiLU"):
        plan.apply(other)
    norm = ChannelStep((ChannelRemoval("features.4", "bn", 8, (0,)),))
    with pytest.raises(PlanMismatchError, match=r"features\.4: .*after removing the block it is in"):
        PruningPlan("Stack", (*plan.steps, norm)).apply(model)
    half = plan.apply(model)
    half.features[4] = nn.BatchNorm2d(8)
    with pytest.raises(PlanMismatchError, match=r"features\.4: the plan removes this BatchNorm2d"):
        artifact.save(model=half, plan=plan, directory=tmp_path / "half")


def test_units_and_channels_in_turn_come_back_in_a_new_process(tmp_path: Path) -> None:
    model, x = stack(), images()[0]
    first = truncate_layers(model, {"features.3": 0.0, "features.14": 1.0}, x, count=1)
    short = first.apply(model)
    second = idap.prune_filters(short, scores_of(short), x, ratio=0.3, round_to=1)
    narrow = second.apply(short)
    third = truncate_layers(narrow, {"features.14": 0.0}, x, count=1, projections=True)
    small = third.apply(narrow, x)
    fit_projections(narrow, small, third, [x])
    plan = first + second + third
    assert plan.exactness_error(model, x) < 1e-12
    assert (first + second).exactness_error(model, x) < 1e-12
    assert_comes_back(tmp_path, small, plan, "stack", x)


def assert_comes_back(tmp_path: Path, model: nn.Module, plan: PruningPlan, builder: str, x: Tensor) -> None:
    """A new process builds the network, loads the artifact and gives the same bits."""
    artifact.save(model=model, plan=plan, directory=tmp_path / "saved")
    with torch.no_grad():
        torch.save((x, model.eval()(x)), tmp_path / "wanted.pt")
    code = (
        "import torch, idap, test_block_forms as t\n"
        f"model = idap.load({str(tmp_path / 'saved')!r}, t.{builder}).eval()\n"
        f"x, wanted = torch.load({str(tmp_path / 'wanted.pt')!r})\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(model(x), wanted)\n"
    )
    environment = {"PYTHONPATH": ":".join([str(Path(__file__).parent), *filter(None, sys.path)])}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)


# ---------------------------------------------------------------------------- layers that are cut out

GROWTH, STEM, BLOCKS = 8, 16, (3, 2)


def dense_net() -> nn.Module:
    """torchvision's DenseNet, small, in float64 and evaluation mode; the same one each time."""
    torch.manual_seed(6)
    model = torchvision.models.DenseNet(GROWTH, BLOCKS, STEM, bn_size=2, num_classes=5)
    return randomise(model, torch.zeros(1, 3, 32, 32, dtype=torch.float64)).eval()


def timm_dense_net() -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(7)
    model = timm.models.densenet.DenseNet(
        growth_rate=GROWTH, block_config=BLOCKS, num_classes=5, bn_size=2, stem_type=""
    )
    return randomise(model, torch.zeros(1, 3, 32, 32, dtype=torch.float64)).eval()


DENSE: dict[str, Callable[[], nn.Module]] = {"torchvision": dense_net, "timm": timm_dense_net}
NAMES = [
    f"features.denseblock{b + 1}.denselayer{i + 1}" for b, count in enumerate(BLOCKS) for i in range(count)
]


def pictures(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32, dtype=torch.float64)


def zeroed_readers(model: nn.Module, removed: list[str]) -> nn.Module:
    """The original in which no convolution or linear layer reads the channels of the removed layers.

    Their places follow from the architecture: growth channels a layer, one layer after the other, and half of
    all after a transition.
    """
    reference = copy.deepcopy(model)
    start = STEM
    with torch.no_grad():
        for b, count in enumerate(BLOCKS, start=1):
            total = start + count * GROWTH
            for i in range(1, count + 1):
                if f"features.denseblock{b}.denselayer{i}" not in removed:
                    continue
                own = slice(start + (i - 1) * GROWTH, start + i * GROWTH)
                for later in range(i + 1, count + 1):
                    name = f"features.denseblock{b}.denselayer{later}.conv1"
                    reference.get_submodule(name).weight[:, own] = 0
                last = b == len(BLOCKS)
                reader = (
                    reference.classifier if last else reference.get_submodule(f"features.transition{b}.conv")
                )
                assert reader.weight.shape[1] == total
                reader.weight[:, own] = 0
            start = total // 2
    return reference


@pytest.mark.parametrize("library", DENSE)
def test_layers_of_a_dense_net_are_cut_out(library: str) -> None:
    build = DENSE[library]
    model, x = build(), pictures()
    blocks = find_blocks(model, x)
    assert [block.name for block in blocks] == NAMES
    assert [sum(group.size for group in block.channels) for block in blocks] == [GROWTH] * 5
    assert find_blocks(model, x, projections=True) == blocks
    removed = [NAMES[1], NAMES[4], NAMES[0]]
    plan = truncate_layers(model, {name: float(removed.index(name)) for name in removed}, x, count=3)
    assert plan.removed_blocks == tuple(removed)
    assert [type(step) for step in plan.steps] == [BlockStep, ChannelStep]
    short = plan.apply(model, x)
    assert not any(name in dict(short.named_modules()) for name in removed)
    assert list(short.features.denseblock1) == ["denselayer3"]
    assert short.features.denseblock1.denselayer3.conv1.in_channels == STEM
    assert short.features.transition1.conv.in_channels == STEM + GROWTH
    assert plan.after.params == sum(p.numel() for p in short.parameters())
    with torch.no_grad():
        wanted, got = zeroed_readers(model, removed)(x), short(x)
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-12
    assert plan.exactness_error(model, x) < 1e-12
    # All of them may go.
    assert truncate_layers(model, dict.fromkeys(NAMES, 0.0), x, count=5).apply(model, x)(x).shape == (2, 5)
    with pytest.raises(
        PlanMismatchError, match=r"denselayer2: the plan removes this block, the model has none"
    ):
        plan.apply(short)


@pytest.mark.parametrize("library", DENSE)
def test_layers_of_a_narrow_dense_net_are_cut_out(library: str, tmp_path: Path) -> None:
    build = DENSE[library]
    model, x = build(), pictures()
    first = idap.prune_filters(model, scores_of(model), x, ratio=0.4, round_to=1)
    narrow = first.apply(model)
    assert [block.name for block in find_blocks(narrow, x)] == NAMES
    second = truncate_layers(narrow, {NAMES[1]: 0.0, NAMES[3]: 1.0}, x, count=2)
    short = second.apply(narrow, x)
    assert second.exactness_error(narrow, x) < 1e-12
    third = idap.prune_filters(short, scores_of(short, 1), x, ratio=0.2, round_to=1)
    small = third.apply(short)
    plan = first + second + third
    assert PruningPlan.from_json(plan.to_json()) == plan
    assert plan.exactness_error(model, x) < 1e-10
    # The same without our plans: weights that read what is gone are zero, by the widths before the first step.
    reference = zeroed_readers(model, [NAMES[1], NAMES[3]])
    kept: dict[tuple[str, str], list[int]] = {}
    with torch.no_grad():
        for step in plan.steps:
            for removal in step.removals if isinstance(step, ChannelStep) else ():
                side = removal.layer, removal.kind
                left = kept.setdefault(side, list(range(removal.size)))
                if removal.kind in ("conv_in", "linear_in"):
                    weight = reference.get_submodule(removal.layer).weight
                    weight[:, [left[i] for i in removal.removed]] = 0
                kept[side] = [c for i, c in enumerate(left) if i not in removal.removed]
        wanted, got = reference(x), small(x)
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-10
    if library == "torchvision":
        assert_comes_back(tmp_path, small, plan, build.__name__, x)
    small.train()
    small(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())
    with pytest.raises(PlanMismatchError, match="the model still has it"):
        artifact.save(model=narrow, plan=first + second, directory=tmp_path / "wrong")


def test_the_divergence_of_a_cut_layer_is_its_output_beside_its_input() -> None:
    model, batches = dense_net().float(), [pictures().float() for _ in range(2)]
    stats = idap.profile(model, batches, layers=(), progress=False)
    got = idap.layer_divergence(model, stats)
    assert list(got) == NAMES
    # Without our hooks: run the features one after the other.
    ratios: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    with torch.no_grad():
        for x in batches:
            h = model.features.pool0(model.features.relu0(model.features.norm0(model.features.conv0(x))))
            for b in (1, 2):
                for name, layer in model.features.get_submodule(f"denseblock{b}").items():
                    made = layer([h])
                    norms = made.flatten(1).norm(dim=1) / h.flatten(1).norm(dim=1)
                    ratios[f"features.denseblock{b}.{name}"].append(norms)
                    h = torch.cat([h, made], 1)
                if b == 1:
                    h = model.features.transition1(h)
    for name in NAMES:
        assert got[name] == pytest.approx(float(torch.cat(ratios[name]).mean()), rel=1e-5)


def test_networks_without_them_are_exported(tmp_path: Path) -> None:
    for model, names, size in (
        (stack().float(), ["features.3", "features.10"], 8), (dense_net().float(), [NAMES[1], NAMES[4]], 32),
    ):  # fmt: skip
        x = torch.randn(2, 3, size, size)
        short = truncate_layers(model, dict.fromkeys(names, 0.0), x, count=2).apply(model)
        # Both compare what they wrote with the module.
        assert idap.export_program(short, tmp_path / "short.pt2", x).exists()
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
        assert idap.export_onnx(short, tmp_path / "short.onnx", x).exists()


class Growing(nn.Module):
    """Layers of a list, each reading all before it; in other forms what must not be cut out."""

    def __init__(self, form: str = "plain") -> None:
        super().__init__()
        self.form = form
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        ins = [6, 4, 4] if form == "chain" else [6, 10, 14]
        outs = [4, 4, 10] if form == "tied" else [4, 4, 4]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())
            for i, o in zip(ins, outs, strict=True)
        )
        self.scales = [1.0, -2.0, 3.0]
        self.head = nn.Conv2d(14 + outs[-1] if form != "chain" else 12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        if self.form == "chain":
            for layer in self.layers:
                features.append(layer(features[-1]))
            return self.head(torch.cat(features[1:], 1))
        for number, layer in enumerate(self.layers):
            made = layer(torch.cat(features, 1))
            if self.form == "paired":
                made = made * self.scales[number]
            if self.form == "tied" and number == 2:
                made = made + torch.cat(features, 1)[:, 4:]
            features.append(made)
        return self.head(torch.cat(features, 1))


def test_layers_of_a_list() -> None:
    model = randomise(Growing(), torch.zeros(1, 3, 8, 8, dtype=torch.float64)).eval()
    x = images()[0]
    blocks = find_blocks(model, x)
    assert [block.name for block in blocks] == ["layers.0", "layers.1", "layers.2"]
    plan = truncate_layers(model, {"layers.1": 0.0}, x, count=1)
    short = plan.apply(model, x)
    with torch.no_grad():
        a = model.stem(x)
        b = model.layers[0](a)
        reader, head = model.layers[2][0], model.head
        weight = torch.cat([reader.weight[:, :10]], 1)
        c = model.layers[2][2](
            model.layers[2][1](F.conv2d(torch.cat([a, b], 1), weight, reader.bias, padding=1))
        )
        wanted = F.conv2d(torch.cat([a, b, c], 1), head.weight[:, [*range(10), *range(14, 18)]], head.bias)
        torch.testing.assert_close(short(x), wanted, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_cut_out() -> None:
    x = torch.randn(1, 3, 8, 8)
    # In a chain a layer alone reads what the one before it makes; a product reads it before the concatenation.
    assert [b.name for b in find_blocks(Growing("chain"), x)] == ["layers.2"]
    assert find_blocks(Growing("paired"), x) == []
    assert all(b.name == "layers.0" for b in find_blocks(Growing("tied"), x))

    class Deep(nn.Module):
        """A U: what the lower path makes is concatenated too, but it is no layer beside what it reads."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(12, 2, 1)
            self.lower = nn.ModuleList([
                nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU()),
                nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.ReLU()),
            ])  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(torch.cat([x, self.lower[1](self.lower[0](x))], 1))

    assert find_blocks(Deep(), x) == []

    class Counted(Growing):
        """What a layer's norm is given is a matter of its place in the list."""

        def forward(self, x: Tensor) -> Tensor:
            features = [self.stem(x)]
            for layer, scale in zip(self.layers, self.scales, strict=False):
                layer[1].eps = abs(scale)
                features.append(layer(torch.cat(features, 1)))
            return self.head(torch.cat(features, 1))

    model = Counted().eval()
    assert [b.name for b in find_blocks(model, x)] == ["layers.0", "layers.1", "layers.2"]
    plan = truncate_layers(model, {"layers.0": 0.0, "layers.1": 0.1, "layers.2": 0.2}, x, count=1)
    assert plan.removed_blocks == ("layers.2",)
    reasons = {s.root: s.reason for s in plan.skipped}
    assert set(reasons) == {"layers.0", "layers.1"}
    assert all("does not compute the same" in reason for reason in reasons.values())

    class Branches(nn.Module):
        """All that is read is made by the layers: one of them has to stay."""

        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()) for _ in range(3))
            self.head = nn.Conv2d(12, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([layer(x) for layer in self.convs], 1))

    model = Branches().eval()
    names = ["convs.0", "convs.1", "convs.2"]
    assert [b.name for b in find_blocks(model, x)] == names
    plan = truncate_layers(model, dict(zip(names, (0.2, 0.3, 0.1), strict=True)), x, count=2)
    assert plan.removed_blocks == ("convs.2", "convs.0")
    assert {s.root: s.reason for s in plan.skipped} == {
        "convs.1": "head would have no channel left to read"
    }  # fmt: skip
    with pytest.raises(TargetUnreachableError, match="2 of Branches can go"):
        truncate_layers(model, dict.fromkeys(names, 0.0), x, count=3)


# ---------------------------------------------------------------------------- both stages


class SmallStack(Stack):
    """In float32, for runs of both stages."""


def small_stack() -> SmallStack:
    torch.manual_seed(8)
    return SmallStack().eval()


def small_dense_net() -> nn.Module:
    return dense_net().float()


@pytest.mark.parametrize(("build", "project"), [
    ("small_stack", True), ("small_stack", False), ("small_dense_net", True),
])  # fmt: skip
def test_a_run_removes_them_puts_one_back_and_goes_on_after_an_interruption(
    build: str, project: bool, tmp_path: Path
) -> None:
    model = globals()[build]()
    size = 8 if build == "small_stack" else 32
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(4, 3, size, size, generator=generator) for _ in range(3)]
    tried: list[set[str]] = []
    stays = "features.14" if build == "small_stack" else NAMES[3]

    names = [b.name for b in find_blocks(model, data[0], projections=project)]

    def gone(pruned: nn.Module) -> set[str]:
        present = dict(pruned.named_modules())
        return {n for n in names if n not in present or isinstance(present[n], IdentityBlock)}

    def evaluate(pruned: nn.Module) -> float:
        tried.append(gone(pruned))
        return 0.5 if stays in tried[-1] else 0.95

    def run(directory: Path, score: Callable[[nn.Module], float], **options: Any) -> Any:
        return idap.compress(
            model, data, evaluate=score, budget=0.1, steps=1, round_to=2, project=project,
            stages=("filters", "layers") if project else ("layers",), directory=directory,
            progress=False, **options,
        )  # fmt: skip

    whole = run(tmp_path / "whole", evaluate)
    assert any(stays in names for names in tried)
    kept = [r for r in whole.history if r.stage == "layers" and r.accepted]
    undone = [r for r in whole.history if r.stage == "layers" and not r.accepted]
    assert len(kept) >= 2
    assert [stays in r.action for r in undone].count(True) >= 1
    assert stays not in gone(whole.model)
    assert len(gone(whole.model)) == len(whole.plan.removed_blocks) == len(kept)
    assert whole.stopped["layers"] == "every block left is essential"
    blocks = [r for s in whole.plan.steps if isinstance(s, BlockStep) for r in s.removals]
    if build == "small_dense_net":
        assert all(r.cut for r in blocks)
    else:
        assert all(r.followers and (r.projection is not None) == project for r in blocks)
    with torch.no_grad():
        again = idap.load(tmp_path / "whole" / "model", globals()[build])
        assert torch.equal(again(data[0]), whole.model(data[0]))

    class Crash(Exception):
        pass

    calls = len(tried)
    limit = calls - 2

    def crashing(pruned: nn.Module) -> float:
        nonlocal limit
        limit -= 1
        if limit < 0:
            raise Crash
        return evaluate(pruned)

    with pytest.raises(Crash):
        run(tmp_path / "broken", crashing)
    resumed = run(tmp_path / "broken", evaluate, resume=True)
    assert resumed.plan == whole.plan
    for (name, wanted), got in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(wanted, got), name


def test_the_biases_take_over_what_a_cut_layer_gave_on_average() -> None:
    model = dense_net().float()
    data = [pictures(8).float() for _ in range(2)]
    outcome = {}
    for compensate in (True, False):
        result = idap.compress(
            model, data, evaluate=lambda _: 1.0, stages=["layers"], max_blocks=1, recalibrate=False,
            compensate=compensate, progress=False,
        )  # fmt: skip
        assert len(result.plan.removed_blocks) == 1
        outcome[compensate] = result.drift
    assert outcome[True] < outcome[False]


# ---------------------------------------------------------------------------- tuples, masks and caches


def of_transformers(factory: str, config: str, **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(9)
    return getattr(transformers, factory)(getattr(transformers, config)(**settings)).eval()


def tokens(count: int = 7) -> Tensor:
    return torch.randint(2, 60, (2, count), generator=torch.Generator().manual_seed(0))


def gpt2() -> tuple[nn.Module, Any]:
    model = of_transformers(
        "GPT2LMHeadModel", "GPT2Config", vocab_size=60, n_embd=16, n_layer=4, n_head=2, n_positions=32,
        bos_token_id=0, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    return model, {"input_ids": tokens(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}


def bert() -> tuple[nn.Module, Any]:
    model = of_transformers(
        "BertForSequenceClassification", "BertConfig", vocab_size=60, hidden_size=16, num_hidden_layers=4,
        num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    return model, {"input_ids": tokens(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}


def t5() -> tuple[nn.Module, Any]:
    # In the proportions of T5 Base, in which the parts of a layer hold as much of it.
    model = of_transformers(
        "T5ForConditionalGeneration", "T5Config", vocab_size=60, d_model=48, d_kv=8, d_ff=192, num_layers=4,
        num_heads=6, decoder_start_token_id=0,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            parameter.data.normal_()
    ids = tokens()
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :4]}


def detr() -> tuple[nn.Module, Any]:
    backbone = {"model_type": "timm_backbone", "backbone": "vit_tiny_patch16_224", "features_only": True,
                "use_pretrained_backbone": False, "out_indices": [11]}  # fmt: skip
    pytest.importorskip("timm")
    model = of_transformers(
        "DetrForObjectDetection", "DetrConfig", backbone_config=backbone, num_labels=5, d_model=32,
        encoder_layers=3, decoder_layers=3, encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=6,
        encoder_attention_heads=4, decoder_attention_heads=4,
    )  # fmt: skip
    return model, {"pixel_values": torch.randn(1, 3, 224, 224)}


def segformer() -> tuple[nn.Module, Any]:
    model = of_transformers(
        "SegformerForSemanticSegmentation", "SegformerConfig", hidden_sizes=[16, 32, 48, 64],
        depths=[2, 2, 2, 2], decoder_hidden_size=32, num_labels=5,
    )  # fmt: skip
    return model, {"pixel_values": torch.randn(1, 3, 64, 64)}


def diffusion_unet() -> tuple[nn.Module, Any]:
    """The parts of Stable Diffusion v1.5, small."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(10)
    cross = ("CrossAttnDownBlock2D",) * 3, ("CrossAttnUpBlock2D",) * 3
    model = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, down_block_types=(*cross[0], "DownBlock2D"),
        up_block_types=("UpBlock2D", *cross[1]), block_out_channels=(16, 32, 64, 64), layers_per_block=2,
        cross_attention_dim=24, attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip
    inputs = {"sample": torch.randn(1, 4, 16, 16), "timestep": torch.tensor([3]),
              "encoder_hidden_states": torch.randn(1, 7, 24)}  # fmt: skip
    return model.eval(), inputs


def vqgan() -> tuple[nn.Module, Any]:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(11)
    model = diffusers.VQModel(
        3, 3, ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3, (16, 32, 48), layers_per_block=2,
        latent_channels=3, num_vq_embeddings=32, norm_num_groups=8, vq_embed_dim=3,
    )  # fmt: skip
    return model.eval(), torch.randn(1, 3, 32, 32)


# The network, how many blocks of each class can go, and two that do.
TUPLES: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], dict[str, int], list[str]]] = {
    "bert": (bert, {"BertLayer": 4}, ["bert.encoder.layer.0", "bert.encoder.layer.3"]),
    "gpt2": (gpt2, {"GPT2Block": 4}, ["transformer.h.0", "transformer.h.2"]),
    # All but the first of each stack, which makes the bias of positions for the others.
    "t5": (t5, {"T5Block": 6}, ["encoder.block.2", "decoder.block.1"]),
    "detr": (
        detr, {"DetrEncoderLayer": 3, "DetrDecoderLayer": 3, "Block": 12},
        ["model.encoder.layers.0", "model.decoder.layers.0"],
    ),
    "segformer": (segformer, {"SegformerLayer": 8}, ["segformer.stages.0.blocks.1", "segformer.stages.3.blocks.0"]),
    "diffusion": (
        diffusion_unet, {"ResnetBlock2D": 8, "Transformer2DModel": 16},
        ["down_blocks.1.attentions.0", "mid_block.resnets.1"],
    ),
    "vqgan": (
        vqgan, {"ResnetBlock2D": 15, "Attention": 2},
        ["encoder.mid_block.resnets.0", "decoder.mid_block.attentions.0"],
    ),
}  # fmt: skip


def outputs(model: nn.Module, inputs: Any) -> Any:
    with torch.no_grad():
        result = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return next(result[k] for k in ("logits", "sample") if k in result)


@pytest.mark.parametrize("name", TUPLES)
def test_blocks_that_pass_more_than_a_tensor(name: str) -> None:
    build, wanted, going = TUPLES[name]
    model, inputs = build()
    blocks = find_blocks(model, inputs)
    assert {kind: sum(b.type == kind for b in blocks) for kind in {b.type for b in blocks}} == wanted
    if name == "segformer":
        going = [next(b.name for b in blocks), blocks[-1].name]
    plan = truncate_layers(model, dict.fromkeys(going, 0.0), inputs, count=2)
    assert set(plan.removed_blocks) == set(going)
    got = outputs(plan.apply(model, inputs), inputs)
    assert plan.exactness_error(model, inputs) == 0
    # The same by hand: the forward pass of each block gives the hidden state back, in the block's own form.
    for block in going:
        module = model.get_submodule(block)
        form = type(module).__name__
        module.forward = {  # type: ignore[method-assign]
            "T5Block": lambda h, mask=None, bias=None, e=None, m=None, cross=None, **_: (h, bias, cross),
            "Transformer2DModel": lambda h, *_, **__: (h,),
        }.get(form, lambda h=None, *_, hidden_states=None, **__: hidden_states if h is None else h)
    assert torch.equal(got, outputs(model, inputs))


@pytest.mark.parametrize("lost", [(0,), (2,), (3,), (0, 1, 3)])
def test_gpt2_generates_with_its_cache_whatever_layer_is_gone(lost: tuple[int, ...]) -> None:
    model, inputs = gpt2()
    names = [f"transformer.h.{i}" for i in lost]
    short = truncate_layers(model, dict.fromkeys(names, 0.0), inputs, count=len(lost)).apply(model, inputs)
    # Not the numbers of the layers, which say where in the cache each one looks, but the layers themselves.
    layers = [layer for i, layer in enumerate(copy.deepcopy(model).transformer.h) if i not in lost]
    for i, layer in enumerate(layers):
        layer.attn.layer_idx = i
    wanted = copy.deepcopy(model)
    wanted.transformer.h = nn.ModuleList(layers)
    wanted.config.n_layer = len(layers)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = wanted.generate(**inputs, **options)
    assert torch.equal(short.generate(**inputs, **options), expected)
    assert torch.equal(short.generate(**inputs, **options, use_cache=False), expected)


def test_t5_generates_without_some_of_its_layers() -> None:
    model, inputs = t5()
    names = ["encoder.block.1", "decoder.block.1", "decoder.block.3"]
    short = truncate_layers(model, dict.fromkeys(names, 0.0), inputs, count=3).apply(model, inputs)
    del inputs["decoder_input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    got = short.generate(**inputs, **options)
    assert torch.equal(got, short.generate(**inputs, **options, use_cache=False))
    del model.encoder.block[1], model.decoder.block[3], model.decoder.block[1]
    assert torch.equal(got, model.generate(**inputs, **options, use_cache=False))
    short.generate(**inputs, num_beams=2, **options)
