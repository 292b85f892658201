"""The ten classifiers: exact surgery on small networks of the libraries' own classes, ShuffleNetV2 in depth."""

from __future__ import annotations

import copy
import importlib
import io
import math
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pruning_networks import randomise, relative_error, scores_of
from torch import Tensor, nn

import idap
from idap.adapters import shuffle
from idap.errors import PlanMismatchError, SurgeryError, TargetUnreachableError
from idap.groups import find_groups
from idap.models.architectures import Architecture
from idap.models.classification import ARCHITECTURES, small_shufflenet_v2, small_vgg
from idap.plan import ChannelRemoval, ChannelStep, Cost, PruningPlan

torchvision = pytest.importorskip("torchvision")

LIMIT = 1e-10
BY_NAME = {entry.name: entry for entry in ARCHITECTURES}
# Why a group may stay: its channels are what the model gives, or a LayerNorm spans the trunk.
GOOD_REASONS = (
    "its channels are an output of the model",
    "LayerNorm",
    "the width of an nn.MultiheadAttention",
)


def timm_networks() -> dict[str, Callable[[], nn.Module]]:
    timm = pytest.importorskip("timm")
    models, decode = timm.models, timm.models._efficientnet_builder.decode_arch_def

    def efficientnet(*stages: str, **options: object) -> Callable[[], nn.Module]:
        kind = options.pop("kind", models.efficientnet.EfficientNet)
        return lambda: kind(decode([[stage] for stage in stages]), num_classes=10, stem_size=16, **options)

    return {
        "resnet50": lambda: models.resnet.ResNet(
            models.resnet.Bottleneck, [1, 2, 1, 1], channels=(16, 24, 32, 40), num_classes=10
        ),
        "efficientnet_b4": efficientnet(
            "ds_r1_k3_s1_e1_c16_se0.25", "ir_r2_k3_s2_e4_c24_se0.25", "ir_r2_k5_s2_e4_c32_se0.25", num_features=64
        ),
        "vit_b_16": lambda: models.vision_transformer.VisionTransformer(
            32, 8, num_classes=10, embed_dim=48, depth=3, num_heads=4, mlp_ratio=2.0
        ),
        "mobilenet_v3_large": efficientnet(
            "ds_r1_k3_s1_e1_c16_nre", "ir_r1_k3_s2_e3_c24_nre", "ir_r2_k5_s2_e3_c32_se0.25", "cn_r1_k1_s1_c48",
            kind=models.mobilenetv3.MobileNetV3, num_features=64,
        ),
        "densenet121": lambda: models.densenet.DenseNet(8, (2, 3), num_classes=10, bn_size=2),
        "convnext_small": lambda: models.convnext.ConvNeXt(
            num_classes=10, depths=(1, 2, 1, 1), dims=(16, 24, 32, 40)
        ),
        "vgg19_bn": lambda: models.vgg.VGG(
            [16, "M", 24, 24, "M", 32, 32, "M"], num_classes=10, mlp_ratio=0.01, norm_layer=nn.BatchNorm2d
        ),
        # Its module has the name of a function in the package.
        "inception_v3": lambda: importlib.import_module("timm.models.inception_v3").InceptionV3(num_classes=10),
        "efficientnet_v2_s": efficientnet(
            "cn_r2_k3_s1_e1_c16_skip", "er_r2_k3_s2_e4_c24", "ir_r2_k3_s2_e4_c32_se0.25", num_features=64
        ),
    }  # fmt: skip


def silent(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """The full-width model in which every layer has zeros where it reads what the plan removes."""
    model = copy.deepcopy(model).eval()
    (step,) = plan.steps
    assert isinstance(step, ChannelStep)
    with torch.no_grad():
        for removal in step.removals:
            if removal.kind in ("conv_in", "linear_in"):
                weight = model.get_parameter(f"{removal.layer}.weight")
                assert weight.shape[1] == removal.size
                weight[:, list(removal.removed)] = 0.0
    return model


def error_of(model: nn.Module, plan: PruningPlan, pruned: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        wanted, got, full = silent(model, plan)(x), pruned(x), model(x)
    assert relative_error([full], [got]) > 1e-3, "nothing that the outputs show was removed"
    return relative_error([wanted], [got])


def pruned_small(seed: int = 0, **options: object) -> tuple[nn.Module, PruningPlan, nn.Module, Tensor]:
    """A small ShuffleNetV2 in float64, a plan for it, what comes out, and an input."""
    torch.manual_seed(seed)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model = randomise(small_shufflenet_v2(), x).eval()
    options = options or {"ratio": 0.4, "round_to": 1}
    plan = idap.prune_filters(model, scores_of(model, seed), x, **options)  # type: ignore[arg-type]
    return model, plan, plan.apply(model, x), x


def units_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: model.get_submodule(name) for name in shuffle.find_units(model)}


# ------------------------------------------------------------------------------------------------
# All ten
# ------------------------------------------------------------------------------------------------


def check_surgery(model: nn.Module, x: Tensor, ratio: float) -> None:
    model = randomise(model, x).eval()
    scan = find_groups(model, x)
    assert [own.reason for own in scan.skipped if not any(good in own.reason for good in GOOD_REASONS)] == []
    scores = scores_of(model)
    scores |= {
        name: torch.rand(module.num_heads)
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    plan = idap.prune_filters(
        model, scores, x, ratio=ratio, round_to=1, scope="local", max_ratio=1.0, verify=False
    )
    cut = {removal.layer for step in plan.steps for removal in step.removals}
    assert all(any(member.layer in cut for member in group.members) for group in scan.groups)
    pruned = plan.apply(model, x)
    assert error_of(model, plan, pruned, x) <= LIMIT
    assert plan.exactness_error(model, x) <= LIMIT
    assert plan.after == Cost(idap.count_params(pruned), idap.count_macs(pruned, x))
    assert plan.after.macs < plan.before.macs


@pytest.mark.parametrize("ratio", [0.3, 0.7])
@pytest.mark.parametrize("name", BY_NAME)
def test_torchvision(name: str, ratio: float) -> None:
    torch.manual_seed(0)
    entry = BY_NAME[name]
    x = entry.small_inputs(2)
    assert isinstance(x, Tensor)
    check_surgery(entry.small(), x.double(), ratio)


@pytest.mark.parametrize("ratio", [0.3, 0.7])
@pytest.mark.parametrize("name", [name for name, entry in BY_NAME.items() if "timm" in entry.builders])
def test_timm(name: str, ratio: float) -> None:
    torch.manual_seed(0)
    x = BY_NAME[name].small_inputs(2)
    assert isinstance(x, Tensor)
    check_surgery(timm_networks()[name](), x.double(), ratio)


@pytest.mark.parametrize("name", BY_NAME)
def test_from_profile_to_training(name: str) -> None:
    torch.manual_seed(0)
    entry = BY_NAME[name]
    model, x = entry.small(), entry.small_inputs(2)
    assert not model.training
    for parameter in model.parameters():
        if not parameter.any():  # the classifier of a vision transformer, which would stop all gradients
            nn.init.normal_(parameter, std=0.1)
    scores = idap.flow_divergence(model, idap.profile(model, [entry.small_inputs(4)]))
    plan = idap.prune_filters(model, scores, x, macs=0.6, round_to=1)
    pruned = plan.apply(model, x).train()
    before = [parameter.detach().clone() for parameter in pruned.parameters()]
    loss = entry.loss(pruned, entry.small_inputs(8))
    loss.backward()
    torch.optim.SGD(pruned.parameters(), 0.01).step()
    assert math.isfinite(loss.item())
    assert all(torch.isfinite(parameter).all() for parameter in pruned.parameters())
    moved = [not torch.equal(a, b) for a, b in zip(before, pruned.parameters(), strict=True)]
    assert sum(moved) > 0.5 * len(moved)


@pytest.mark.parametrize("name", ["vit_b_16", "densenet121", "shufflenet_v2_x2_0"])
def test_exported(name: str, tmp_path: Path) -> None:
    # The exporter compares the file's outputs with the model's.
    torch.manual_seed(0)
    entry = BY_NAME[name]
    model, x = entry.small(), entry.small_inputs(2)
    pruned = idap.prune_filters(model, scores_of(model), x, ratio=0.4, round_to=1).apply(model)
    assert idap.export_program(pruned, tmp_path / "net.pt2", x).is_file()


def test_new_process(tmp_path: Path) -> None:
    outputs = {}
    for name, entry in BY_NAME.items():
        torch.manual_seed(0)
        model, x = entry.small(), entry.small_inputs(2)
        plan = idap.prune_filters(model, scores_of(model), x, ratio=0.4, round_to=1, verify=False)
        pruned = plan.apply(model)
        idap.save(pruned, tmp_path / name, plan=plan)
        with torch.no_grad():
            outputs[name] = (x, pruned(x))
    torch.save(outputs, tmp_path / "outputs.pt")
    script = f"""
        import torch, idap
        from idap.models.classification import ARCHITECTURES
        torch.set_num_threads({torch.get_num_threads()})  # sums are split among threads
        wanted = torch.load({str(tmp_path / "outputs.pt")!r})
        for entry in ARCHITECTURES:
            model = idap.load({str(tmp_path)!r} + "/" + entry.name, entry.small)
            x, y = wanted[entry.name]
            with torch.no_grad():
                assert torch.equal(model(x), y), entry.name
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=120).returncode == 0


@pytest.mark.parametrize("entry", ARCHITECTURES, ids=list(BY_NAME))
def test_full_size(entry: Architecture) -> None:
    macs, params = {}, {}
    for library, build in entry.builders.items():
        pickle.loads(pickle.dumps(build))
        with torch.device("meta"):
            model = build()
            macs[library] = idap.count_macs(model, entry.inputs(1))
        assert not model.training
        params[library] = idap.count_params(model)
    assert len(set(macs.values())) == 1
    assert len(set(params.values())) == 1
    assert entry.paper.gmacs is not None
    close = abs(macs["torchvision"] / 1e9 - entry.paper.gmacs) <= 0.02 * entry.paper.gmacs
    assert close or any("GMACs" in note for note in entry.notes)


def test_the_groups_at_their_minimum_are_named() -> None:
    torch.manual_seed(0)
    model, x = small_vgg(), torch.randn(1, 3, 32, 32)
    with pytest.raises(TargetUnreachableError, match=r"7 groups are at the minimum.*features\.0 \(8 of 16\)"):
        idap.prune_filters(model, scores_of(model), x, macs=0.001)
    first = idap.prune_filters(model, scores_of(model), x, ratio=0.7, max_ratio=1.0)
    narrow = first.apply(model)
    assert {m.out_channels for m in narrow.modules() if isinstance(m, nn.Conv2d)} == {8}
    with pytest.raises(TargetUnreachableError, match=r"features\.0 \(8\), features\.4 \(8\).* more$"):
        idap.prune_filters(narrow, scores_of(narrow), x, macs=0.5)
    second = idap.prune_filters(narrow, scores_of(narrow), x, ratio=0.7, round_to=1, max_ratio=1.0)
    assert second.after.macs < second.before.macs


# ------------------------------------------------------------------------------------------------
# ShuffleNetV2
# ------------------------------------------------------------------------------------------------


def test_units_are_found_and_left_alone() -> None:
    model = small_shufflenet_v2()
    assert list(units_of(model)) == [
        f"stage{stage}.{unit}" for stage, units in ((2, 2), (3, 4), (4, 2)) for unit in range(units)
    ]
    find_groups(model, torch.randn(1, 3, 64, 64))
    kind = torchvision.models.shufflenetv2.InvertedResidual
    assert {type(unit) for unit in units_of(model).values()} == {kind}
    assert units_of(torchvision.models.googlenet(weights=None, aux_logits=False, init_weights=False)) == {}


class Reversed(nn.Module):
    """Looks like a unit, and gives the channels in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.stride, self.branch1, self.branch2 = 1, nn.Sequential(), nn.Sequential(nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        return torch.cat((first, self.branch2(second)), 1).flip(1)


class Own(Reversed):
    """A unit that nobody knows."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x[:, :4], x[:, 4:]
        return torch.stack((first, self.branch2(second)), 2).flatten(1, 2)


def test_zeros_do_not_make_a_unit_of_two_branches() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stride = 2
            self.branch1, self.branch2 = (nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in "12")
            for branch in (self.branch1, self.branch2):
                nn.init.zeros_(branch[1].weight)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((self.branch1(x), self.branch2(x)), 1)

    assert shuffle.find_units(nn.Sequential(Two())) == []


def test_a_unit_is_what_computes_the_same() -> None:
    assert shuffle.find_units(nn.Sequential(Reversed(), Own())) == ["1"]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Own(), nn.ReLU(), Own(), nn.Conv2d(8, 4, 1)).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    plan = idap.prune_filters(model, scores_of(model), x, ratio=0.5, round_to=1, verify=False)
    pruned = plan.apply(model, x)
    assert pruned[1].branch2[0].weight.shape[:2] == (2, 2)
    assert error_of(model, plan, pruned, x) <= LIMIT


@pytest.mark.parametrize("half", [1, 2, 3, 8, 29, 61])
def test_conversion_keeps_the_results(half: int) -> None:
    torch.manual_seed(half)
    kind = torchvision.models.shufflenetv2.InvertedResidual
    for unit in (kind(2 * half, 2 * half, 1), kind(5, 2 * half, 2)):
        model = nn.Sequential(unit).eval()
        x = torch.randn(2, 5 if unit.stride == 2 else 2 * half, 6, 6)
        with torch.no_grad():
            wanted = model(x)
            shuffle.convert_all(model, units_of(model))
            assert torch.equal(model(x), wanted)
        assert isinstance(model[0], kind)
        assert type(model[0]).__name__ == "InvertedResidual"


def test_a_unit_of_a_stage_makes_one_channel_and_reads_one() -> None:
    groups = find_groups(small_shufflenet_v2(), torch.randn(1, 3, 64, 64)).groups
    stages = [group for group in groups if any(m.kind == "shuffle" for m in group.members)]
    assert [group.size for group in stages] == [16, 24, 32]
    for group in stages:
        for member in group.members:
            if ".branch2." in member.layer and member.size == group.size:
                assert {len(unit) for unit in member.units} == {1}
        trunk = [m.units for m in group.members if m.kind == "shuffle"]
        assert len(set(trunk)) == 1
        assert sorted(channel for unit in trunk[0] for channel in unit) == list(range(2 * group.size))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.85])
def test_shufflenet_is_exact(ratio: float, seed: int) -> None:
    model, plan, pruned, x = pruned_small(seed, ratio=ratio, round_to=1, verify=False)
    assert error_of(model, plan, pruned, x) <= LIMIT


def test_every_unit_can_go_after_pruning() -> None:
    model, plan, pruned, x = pruned_small()
    stays = ["stage2.1", "stage3.1", "stage3.2", "stage3.3", "stage4.1"]
    assert [block.name for block in idap.find_blocks(model, x)] == stays
    assert [block.name for block in idap.find_blocks(pruned, x)] == stays
    reference = silent(model, plan)
    for names in ([name] for name in stays), [stays]:
        for chosen in names:
            scores = {name: float(name not in chosen) for name in stays}
            cut = idap.truncate_layers(pruned, scores, x, count=len(chosen))
            assert sorted(cut.removed_blocks) == sorted(chosen)
            whole = plan + cut
            shorter = copy.deepcopy(reference)
            for name in chosen:
                owner, _, child = name.rpartition(".")
                setattr(shorter.get_submodule(owner), child, nn.Identity())
            with torch.no_grad():
                assert relative_error([shorter(x)], [whole.apply(model)(x)]) <= LIMIT
            assert whole.exactness_error(model, x) <= LIMIT
    # The other way round: channels out of a network that lacks units.
    cut = idap.truncate_layers(model, {name: float(name > "stage3.2") for name in stays}, x, count=2)
    shorter = cut.apply(model)
    after = idap.prune_filters(shorter, scores_of(shorter), x, ratio=0.5, round_to=1, verify=False)
    assert error_of(shorter, after, after.apply(shorter), x) <= LIMIT


def test_widths_of_the_branches_are_multiples_of_eight() -> None:
    _, _, pruned, _ = pruned_small(ratio=0.45, round_to=8)
    widths = [
        getattr(layer, key)
        for name, layer in pruned.named_modules()
        if isinstance(layer, nn.Conv2d) and ".branch2." in name
        for key in ("in_channels", "out_channels")
        if not (name.endswith("0.branch2.0") and key == "in_channels")  # it reads the trunk
    ]
    assert {width % 8 for width in widths} == {0}


def test_a_second_round() -> None:
    model, first, once, x = pruned_small()
    second = idap.prune_filters(once, scores_of(once, 1), x, ratio=0.4, round_to=1, verify=False)
    twice = second.apply(once, x)
    assert error_of(once, second, twice, x) <= LIMIT
    assert len(idap.find_blocks(twice, x)) == 5
    with torch.no_grad():
        assert torch.equal((first + second).apply(model)(x), twice(x))
    assert (first + second).exactness_error(model, x) <= LIMIT
    while True:  # until nothing is left to remove
        plan = idap.prune_filters(twice, scores_of(twice), x, ratio=0.5, round_to=1, max_ratio=1.0)
        if not plan.removed_units:
            break
        twice = plan.apply(twice, x)
    assert {len(unit.order) for unit in units_of(twice).values()} <= set(range(1, 7))


def test_pruned_units_are_copied_and_pickled() -> None:
    model, plan, pruned, x = pruned_small()
    assert list(pruned.state_dict()) == list(model.state_dict())
    stream = io.BytesIO()
    torch.save(pruned, stream)
    stream.seek(0)
    copies = [copy.deepcopy(pruned), torch.load(stream, weights_only=False)]
    copies.append(PruningPlan.from_json(plan.to_json()).apply(model))
    with torch.no_grad():
        wanted = pruned(x)
        for other in copies:
            assert torch.equal(other(x), wanted)
            assert [type(m) for m in other.modules()] == [type(m) for m in pruned.modules()]
    fresh = plan.apply(small_shufflenet_v2().double())
    fresh.load_state_dict(pruned.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(x), wanted)


def test_shufflenet_as_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, x = small_shufflenet_v2(), torch.randn(2, 3, 64, 64)
    pruned = idap.prune_filters(model, scores_of(model), x, ratio=0.4, round_to=1).apply(model)
    # The exporter runs the file and compares.
    assert idap.export_onnx(pruned, tmp_path / "net.onnx", x).is_file()


def test_channels_last() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model = randomise(small_shufflenet_v2(), x).eval()
    plan = idap.prune_filters(model, scores_of(model), x, ratio=0.4, round_to=1)
    last = plan.apply(copy.deepcopy(model).to(memory_format=torch.channels_last))
    with torch.no_grad():
        got = last(x.to(memory_format=torch.channels_last))
        assert relative_error([plan.apply(model)(x)], [got]) <= LIMIT


def test_training_reaches_every_layer() -> None:
    _, _, pruned, x = pruned_small()
    torch.nn.functional.cross_entropy(pruned.train()(x), torch.tensor([1, 2])).backward()
    for name, parameter in pruned.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.any(), name


def test_meta_models() -> None:
    _, plan, pruned, _ = pruned_small()
    with torch.device("meta"):
        empty = plan.apply(small_shufflenet_v2())
        assert empty(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    assert {n: b.shape for n, b in empty.named_buffers()} == {n: b.shape for n, b in pruned.named_buffers()}


def test_blocks_where_only_one_stage_is_pruned() -> None:
    model, x = small_shufflenet_v2(), torch.randn(2, 3, 64, 64)
    ignore = ["stage2.*.branch2.5", "stage4.*.branch2.5"]
    pruned = idap.prune_filters(model, scores_of(model), x, ratio=0.4, round_to=1, ignore=ignore).apply(model)
    changed = [name for name, unit in units_of(pruned).items() if isinstance(unit, shuffle.ShuffleUnit)]
    assert changed == ["stage3.0", "stage3.1", "stage3.2", "stage3.3"]
    names = [block.name for block in idap.find_blocks(model, x)]
    assert [block.name for block in idap.find_blocks(pruned, x)] == names


def test_what_a_unit_refuses() -> None:
    model = small_shufflenet_v2().eval()
    unit = "stage3.1"
    torn = PruningPlan("ShuffleNetV2", (ChannelStep((ChannelRemoval(unit, "shuffle", 48, (2,)),)),))
    with pytest.raises(SurgeryError, match=r"stage3\.1: the channels that stay.*whole chains"):
        torn.apply(model)
    for layer, size, reason in (
        (unit, 46, "made for 46 channels"),
        ("conv1", 16, "shuffles channels"),
        ("nowhere", 16, "none of that name"),
    ):
        plan = PruningPlan("ShuffleNetV2", (ChannelStep((ChannelRemoval(layer, "shuffle", size, (2,)),)),))
        with pytest.raises(PlanMismatchError, match=reason):
            plan.apply(model)
