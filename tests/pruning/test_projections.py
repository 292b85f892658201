"""Blocks that change the shape: found beside the others, replaced by projections, fitted by least squares."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pruning_networks import scores_of
from torch import Tensor, nn
from torch.nn import functional as F

from idap import artifact
from idap.errors import (
    EmptyDataError,
    ForwardError,
    InvalidInputError,
    NonFiniteError,
    PlanMismatchError,
    TargetUnreachableError,
)
from idap.filters import prune_filters
from idap.layers import (
    Projection,
    ProjectionBlock,
    ProjectionFit,
    block_filter_divergence,
    find_blocks,
    fit_projections,
    truncate_layers,
)
from idap.plan import BlockRemoval, BlockStep, ChannelRemoval, ChannelStep, IdentityBlock, PruningPlan

torchvision = pytest.importorskip("torchvision")

# Blocks for a projection: name, inputs, outputs, stride.
CHANGING: dict[str, list[tuple[str, int, int, int]]] = {
    "resnet50": [
        ("layer1.0", 64, 256, 1), ("layer2.0", 256, 512, 2),
        ("layer3.0", 512, 1024, 2), ("layer4.0", 1024, 2048, 2),
    ],
    "mobilenet_v3_large": [
        ("features.2", 16, 24, 2), ("features.4", 24, 40, 2), ("features.7", 40, 80, 2),
        ("features.11", 80, 112, 1), ("features.13", 112, 160, 2),
    ],
    "convnext_tiny": [("features.2", 96, 192, 2), ("features.4", 192, 384, 2), ("features.6", 384, 768, 2)],
    "shufflenet_v2_x1_0": [("stage2.0", 24, 116, 2), ("stage3.0", 116, 232, 2), ("stage4.0", 232, 464, 2)],
    "squeezenet1_1": [],
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGING)
def test_torchvision(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None)
    x = torch.randn(1, 3, 64, 64)
    blocks = find_blocks(model, x, projections=True)
    assert [block for block in blocks if block.projection is None] == find_blocks(model, x)
    found = [(b.name, b.projection.inputs, b.projection.outputs, b.projection.stride) for b in blocks
             if b.projection is not None]  # fmt: skip
    assert found == [(block, ins, outs, (s, s)) for block, ins, outs, s in CHANGING[name]]
    order = [n for n, _ in model.named_modules()]
    assert [order.index(block.name) for block in blocks] == sorted(order.index(b.name) for b in blocks)


class Bottleneck(nn.Module):
    def __init__(self, ins: int, outs: int, stride: int = 1) -> None:
        super().__init__()
        width = outs // 2
        self.conv1, self.bn1 = nn.Conv2d(ins, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outs, 1, bias=False), nn.BatchNorm2d(outs)
        self.downsample = None
        if stride > 1 or ins != outs:
            self.downsample = nn.Sequential(nn.Conv2d(ins, outs, 1, stride, bias=False), nn.BatchNorm2d(outs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Net(nn.Module):
    """A small ResNet of bottlenecks, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.layer1 = nn.Sequential(Bottleneck(16, 32), Bottleneck(32, 32))
        self.layer2 = nn.Sequential(Bottleneck(32, 48, 2), Bottleneck(48, 48))
        self.fc = nn.Linear(48, 5)
        self.double()
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.uniform_(0.6, 1.4)
                    module.bias.normal_(0, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(F.relu(self.stem(x)))).mean((2, 3)))


def images(count: int = 3, size: int = 9) -> list[Tensor]:
    return [torch.randn(4, 3, size, size, dtype=torch.float64) for _ in range(count)]


def plan_for(model: nn.Module, x: Any, *names: str) -> PruningPlan:
    """The plan that removes these blocks, and no more."""
    return truncate_layers(model, dict.fromkeys(names, 0.0), x, count=len(names), projections=True)


def gather(model: nn.Module, name: str, batches: list[Any], stride: int = 1) -> tuple[Tensor, Tensor]:
    """All inputs (N, C) and outputs (N, D) of a convolutional block."""
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])

    def keep(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        rows[0].append(args[0][:, :, ::stride, ::stride].permute(0, 2, 3, 1).reshape(-1, args[0].shape[1]))
        rows[1].append(output.permute(0, 2, 3, 1).reshape(-1, output.shape[1]))

    handle = model.get_submodule(name).register_forward_hook(keep)
    with torch.no_grad():
        for batch in batches:
            model.eval()(batch)
    handle.remove()
    return torch.cat(rows[0]), torch.cat(rows[1])


@pytest.mark.parametrize(("name", "stride"), [("layer1.0", 1), ("layer2.0", 2)])
def test_fit_is_least_squares(name: str, stride: int) -> None:
    model, batches = Net(), images()
    plan = plan_for(model, batches[0], name)
    pruned = plan.apply(model, batches[0])
    residuals = fit_projections(model, pruned, plan, batches, ridge=0.0)
    x, y = gather(model, name, batches, stride)
    design = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    wanted = torch.linalg.lstsq(design, y).solution
    layer = pruned.get_submodule(name).projection
    assert layer.stride == (stride, stride)
    torch.testing.assert_close(layer.weight[:, :, 0, 0], wanted[:-1].T, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(layer.bias, wanted[-1], rtol=1e-7, atol=1e-9)
    assert residuals.keys() == {name}
    assert residuals[name] == pytest.approx(float((design @ wanted - y).norm() / y.norm()), rel=1e-9)
    assert 0.01 < residuals[name] < 1


def test_ridge_damps_the_weights_and_not_the_bias() -> None:
    model, batches = Net(), images()
    plan = plan_for(model, batches[0], "layer1.0")
    x, y = gather(model, "layer1.0", batches)
    ridge = 0.3
    centred = x - x.mean(0)
    # Ridge regression is least squares with rows sqrt(lambda) * I and targets of zero added.
    penalty = (ridge * centred.square().sum() / x.shape[1]).sqrt() * torch.eye(x.shape[1]).double()
    targets = torch.cat([y - y.mean(0), torch.zeros(x.shape[1], y.shape[1]).double()])
    wanted = torch.linalg.lstsq(torch.cat([centred, penalty]), targets).solution
    fit = ProjectionFit(plan)
    for batch in batches:
        fit.update(model, batch)
    weight, bias, residual = fit.solve(ridge=ridge)["layer1.0"]
    torch.testing.assert_close(weight, wanted.T, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(bias, y.mean(0) - x.mean(0) @ wanted, rtol=1e-8, atol=1e-10)
    assert residual > fit.solve(ridge=0.0)["layer1.0"][2]


class Linear(nn.Module):
    """A linear map in two parts, in (B, T, C)."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(ins, 3 * ins), nn.Linear(3 * ins, outs)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return self.second(self.first(hidden)), mask


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.out = nn.Linear(5, 8), Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden, passed = self.block(F.relu(self.embed(x)), mask)
        assert passed is mask
        return self.out(hidden)


def test_a_linear_block_of_tokens_is_replaced_exactly() -> None:
    model = Tokens()
    x, mask = torch.randn(6, 7, 5), torch.ones(6, 7)
    (block,) = find_blocks(model, (x, mask), projections=True)
    assert block.projection == Projection("linear", 8, 12)
    assert block.returns == ["hidden", ["arg", 1]]
    assert find_blocks(model, (x, mask)) == []
    plan = plan_for(model, (x, mask), "block")
    pruned = plan.apply(model, (x, mask))
    assert fit_projections(model, pruned, plan, [(x, mask)])["block"] < 1e-5
    new = torch.randn(3, 2, 5)
    torch.testing.assert_close(pruned(new, mask), model(new), rtol=1e-4, atol=1e-4)


class Strided(nn.Module):
    """A linear map in two convolutions, which read every other or every third position."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(6, 20, 1, (2, 3)), nn.Conv2d(20, 10, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_a_linear_convolutional_block_is_replaced_exactly() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), Strided(), nn.ReLU(), nn.Conv2d(10, 2, 2)).double()
    x = torch.randn(2, 3, 13, 16, dtype=torch.float64)
    plan = plan_for(model, x, "2")
    pruned = plan.apply(model, x)
    assert pruned[2].projection.stride == (2, 3)
    assert fit_projections(model, pruned, plan, [x, x + 1], ridge=0.0)["2"] < 1e-7
    new = torch.randn(1, 3, 10, 10, dtype=torch.float64)
    torch.testing.assert_close(pruned(new), model(new), rtol=1e-9, atol=1e-9)
    assert plan.exactness_error(model, x) == 0.0


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
def test_dead_and_repeated_channels(ridge: float) -> None:
    model, batches = Net(), images()
    with torch.no_grad():
        model.stem.weight[[2, 5]] = 0
        model.stem.bias[[2, 5]] = -1
        model.stem.weight[7], model.stem.bias[7] = model.stem.weight[6], model.stem.bias[6]
    plan = plan_for(model, batches[0], "layer1.0")
    pruned = plan.apply(model)
    residual = fit_projections(model, pruned, plan, batches, ridge=ridge)["layer1.0"]
    weight = pruned.layer1[0].projection.weight[:, :, 0, 0]
    assert torch.isfinite(weight).all()
    assert weight[:, [2, 5]].abs().max() < 1e-12
    torch.testing.assert_close(weight[:, 6], weight[:, 7], rtol=1e-6, atol=1e-9)
    x, y = gather(model, "layer1.0", batches)
    design = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    wanted = torch.linalg.lstsq(design, y, driver="gelsd").solution
    assert residual == pytest.approx(float((design @ wanted - y).norm() / y.norm()), rel=1e-5)


def test_fit_is_deterministic_and_shards_add_up() -> None:
    model, batches = Net().train(), images(4)
    plan = plan_for(model, batches[0], "layer1.0", "layer2.0")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, again = plan.apply(model), plan.apply(model)
    torch.manual_seed(1)
    residuals = fit_projections(model, first, plan, batches)
    torch.manual_seed(2)
    assert fit_projections(model, again, plan, iter(batches)) == residuals
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())

    left, right = ProjectionFit(plan), ProjectionFit(plan)
    left.update(model, batches[0])
    for batch in batches[1:]:
        right.update(model, batch)
    merged = left.merge(right).merge(ProjectionFit(plan)).write(again)
    assert merged == pytest.approx(residuals, rel=1e-10)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    with pytest.raises(InvalidInputError, match="different blocks"):
        left.merge(ProjectionFit(plan_for(model, batches[0], "layer2.0")))


def test_slices_of_a_large_batch_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = Net(), images(1)
    plan = plan_for(model, batches[0], "layer1.0")
    whole, sliced = ProjectionFit(plan), ProjectionFit(plan)
    whole.update(model, batches[0])
    monkeypatch.setattr("idap.layers._SLICE", 48 * 50)
    sliced.update(model, batches[0])
    for a, b in zip(whole.solve()["layer1.0"], sliced.solve()["layer1.0"], strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-9, atol=1e-11)


def test_all_reduce_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three workers, one of them without data; their sums are taken as a process group would."""
    model, batches = Net(), images(3)
    plan = plan_for(model, batches[0], "layer1.0")
    fits = [ProjectionFit(plan) for _ in range(3)]
    fits[0].update(model, batches[0])
    fits[2].update(model, batches[1])
    fits[2].update(model, batches[2])
    with pytest.raises(InvalidInputError, match="init_process_group"):
        fits[0].all_reduce()
    barrier, slots = threading.Barrier(3), {}

    def all_reduce(tensor: Tensor, group: Any = None) -> None:
        slots[threading.current_thread().name] = tensor.clone()
        barrier.wait(timeout=20)
        total = sum(slots[str(rank)] for rank in range(3))
        barrier.wait(timeout=20)
        tensor.copy_(total)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda group=None: "gloo")
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    reduced: dict[str, ProjectionFit] = {}
    workers = [
        threading.Thread(target=lambda r=r: reduced.update({str(r): fits[r].all_reduce()}), name=str(r))
        for r in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=30)
    alone = ProjectionFit(plan)
    for batch in batches:
        alone.update(model, batch)
    solutions = [reduced[str(rank)].solve()["layer1.0"] for rank in range(3)]
    for mine, other, wanted in zip(solutions[0], solutions[1], alone.solve()["layer1.0"], strict=True):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(other))
        torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(wanted), rtol=1e-9, atol=1e-11)


class Writer(nn.Module):
    """Writes into its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.first, self.second = nn.ReLU(inplace=True), nn.Conv2d(6, 20, 1), nn.Conv2d(20, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.act(x)))


def test_a_block_that_writes_into_its_input() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), Writer(), nn.Conv2d(10, 2, 1)).double()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    plan = plan_for(model, x, "1")
    pruned = plan.apply(model)
    fit_projections(model, pruned, plan, [x], ridge=0.0)
    with torch.no_grad():
        rows = model[0](x).movedim(1, -1).reshape(-1, 6)
        y = model[:2](x).movedim(1, -1).reshape(-1, 10)
    design = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], 1)
    wanted = torch.linalg.lstsq(design, y).solution
    torch.testing.assert_close(pruned[1].projection.weight[:, :, 0, 0], wanted[:-1].T, rtol=1e-7, atol=1e-9)


def test_projection_blocks_come_out_like_their_blocks() -> None:
    model = Net().float().to(memory_format=torch.channels_last).train()
    model.layer2.eval()
    model.layer1.requires_grad_(False)
    x = torch.randn(1, 3, 16, 16)
    plan = plan_for(model, x, "layer1.0", "layer2.0")
    state = torch.get_rng_state()
    pruned = plan.apply(model)
    assert torch.equal(torch.get_rng_state(), state)
    one, two = pruned.layer1[0], pruned.layer2[0]
    assert isinstance(one, ProjectionBlock)
    assert isinstance(one, IdentityBlock)
    assert one.training
    assert not two.training
    assert not two.projection.training
    assert not one.projection.weight.requires_grad
    assert two.projection.weight.requires_grad
    assert two.projection.bias.requires_grad
    assert two.projection.weight.stride() == (32, 1, 32, 32)
    assert two.projection.weight.dtype == torch.float32
    assert not two.projection.weight.any()
    assert {n for n, _ in two.named_modules()} == {"", "projection"}
    half = plan.apply(model.to(torch.bfloat16, memory_format=torch.contiguous_format))
    assert half.layer2[0].projection.bias.dtype == torch.bfloat16
    assert half.layer2[0].projection.weight.stride() == (32, 1, 1, 1)
    fit_projections(model.float(), half, plan, [x])
    assert half.layer2[0].projection.weight.any()
    with torch.device("meta"):
        empty = Net()
    assert plan.apply(empty).layer1[0].projection.weight.is_meta


def test_plans_with_projections_as_data(tmp_path: Path) -> None:
    model, x = Net(), images(1)[0]
    plan = plan_for(model, x, "layer2.0", "layer1.1")
    assert plan.removed_blocks == ("layer1.1", "layer2.0")
    text = plan.to_json()
    assert PruningPlan.from_json(text) == plan
    same, changed = json.loads(text)["steps"][0]["removals"]
    # The identity is written as before there were projections.
    assert same == {"name": "layer1.1", "type": "Bottleneck", "returns": "tensor"}
    assert changed["projection"] == {"kind": "conv2d", "inputs": 32, "outputs": 48, "stride": [2, 2]}
    assert PruningPlan.from_json(text).apply(model, x)(x).shape == (4, 5)
    for damage in ({"kind": "conv9d"}, {"inputs": 0}, {"outputs": "48"}, {"stride": [2]}, {"stride": 2}):
        data = json.loads(text)
        data["steps"][0]["removals"][1]["projection"] |= damage
        with pytest.raises(InvalidInputError):
            PruningPlan.from_dict(data)


def test_channels_blocks_and_channels_again(tmp_path: Path) -> None:
    model, batches = Net(), images()
    x = batches[0]
    first = prune_filters(model, scores_of(model), x, ratio=0.3, round_to=1)
    narrow = first.apply(model)
    second = plan_for(narrow, x, "layer1.0", "layer2.0", "layer2.1")
    projection = second.steps[0].removals[-1].projection
    assert projection == Projection("conv2d", narrow.layer1[0].conv3.out_channels,
                                    narrow.layer2[0].conv3.out_channels, (2, 2))  # fmt: skip
    assert projection.outputs < 48
    short = second.apply(narrow, x)
    fit_projections(narrow, short, second, batches)
    third = prune_filters(short, scores_of(short, 1), x, ratio=0.3, round_to=1)
    cut = {(r.layer, r.kind) for r in third.steps[0].removals}
    assert cut >= {("layer1.0.projection", "conv_in"), ("layer1.0.projection", "conv_out"),
                   ("layer2.0.projection", "conv_in"), ("layer2.0.projection", "conv_out")}  # fmt: skip
    assert third.exactness_error(short, x) < 1e-12
    small = third.apply(short, x)
    plan = PruningPlan.from_json((first + second + third).to_json())
    replayed = plan.apply(Net(), x)
    wanted = {name: t.shape for name, t in small.state_dict().items()}
    assert {name: t.shape for name, t in replayed.state_dict().items()} == wanted
    assert plan.exactness_error(model, x) < 1e-12
    assert plan.after.params == sum(p.numel() for p in replayed.parameters())

    artifact.save(model=small, plan=plan, directory=tmp_path / "model")
    again = artifact.load(tmp_path / "model", Net)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in small.state_dict().items())
    assert torch.equal(again.eval()(x), small.eval()(x))
    with pytest.raises(PlanMismatchError):
        artifact.save(model=Net(), plan=second, directory=tmp_path / "other")


def test_what_stands_in_is_no_block_itself() -> None:
    model, x = Net(), images(1)[0]
    pruned = plan_for(model, x, "layer1.0", "layer2.0").apply(model)
    assert [block.name for block in find_blocks(pruned, x, projections=True)] == ["layer1.1", "layer2.1"]


@pytest.mark.parametrize(
    ("removal", "message"),
    [
        (("layer2.0.projection", "conv_out", 48), None),
        (("layer2.0.projection", "conv_in", 32), None),
        (("layer2.0.projection", "conv_out", 32), "made for 32 channels .conv_out., the model has 48"),
        (("layer2.0.projection", "linear_in", 32), "cuts it as linear_in, but puts a conv2d there"),
        (("layer2.0.conv1", "conv_out", 24), "after removing the block it is in"),
        (("layer1.1.projection", "conv_in", 32), "after removing the block it is in"),
    ],
)
def test_steps_after_a_projection_are_checked(removal: tuple[str, str, int], message: str | None) -> None:
    model, x = Net(), images(1)[0]
    plan = plan_for(model, x, "layer1.1", "layer2.0")
    plan = replace(plan, steps=(*plan.steps, ChannelStep((ChannelRemoval(*removal, (0, 3)),))))
    if message is None:
        plan.check(model)
    else:
        with pytest.raises(PlanMismatchError, match=message):
            plan.apply(model)


def test_blocks_that_change_the_shape_are_ranked_apart() -> None:
    model, x = Net(), images(1)[0]
    blocks = find_blocks(model, x, projections=True)
    scores = scores_of(model)
    means = block_filter_divergence(model, scores, [b for b in blocks if b.projection])
    assert list(means) == ["layer1.0", "layer2.0"]
    layers = ("conv1", "conv2", "conv3", "downsample.0")
    every = torch.cat([scores[f"layer2.0.{layer}"] for layer in layers])
    assert means["layer2.0"] == pytest.approx(float(every.double().mean()))
    divergences = {"layer1.1": 5.0, "layer2.1": 9.0, "layer1.0": 0.2, "layer2.0": 0.1}
    plan = truncate_layers(model, divergences, x, count=4, projections=True)
    assert plan.removed_blocks == ("layer1.1", "layer2.1", "layer2.0", "layer1.0")
    assert plan.after.params < plan.before.params
    assert (
        truncate_layers(model, divergences, x, macs=0.2, projections=True).after.macs < 0.2 * plan.before.macs
    )
    plan = truncate_layers(model, divergences, x, count=2)
    assert plan.removed_blocks == ("layer1.1", "layer2.1")
    assert {s.root for s in plan.skipped} == {"layer1.0", "layer2.0"}
    with pytest.raises(TargetUnreachableError, match="2 of Net can go"):
        truncate_layers(model, divergences, x, count=3)
    assert block_filter_divergence(model, {}, ["layer1.0"]) == {}
    with pytest.raises(InvalidInputError, match="layer9"):
        block_filter_divergence(model, scores, ["layer9"])


def test_no_projection_where_none_can_stand_in() -> None:
    class Odd(nn.Module):
        """Gives other shapes: upsampled, cropped, of another rank, of another batch, out of a list."""

        def __init__(self, form: str) -> None:
            super().__init__()
            self.form, self.a, self.b = form, nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: Any) -> Tensor:
            y = self.b(F.relu(self.a(x[0] if self.form == "list" else x)))
            if self.form == "up":
                return F.interpolate(y, scale_factor=2)
            return {"crop": y[:, :, 1:-1, 1:-1], "rank": y.flatten(2), "batch": y[:1]}.get(self.form, y)

    class Around(nn.Module):
        def __init__(self, form: str) -> None:
            super().__init__()
            self.form, self.stem, self.block = form, nn.Conv2d(3, 8, 3, padding=1), Odd(form)
            self.out = nn.LazyConv1d(2, 1) if form == "rank" else nn.Conv2d(16, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return self.out(self.block([y] if self.form == "list" else y))

    x = torch.randn(2, 3, 8, 8)
    for form in ("up", "crop", "rank", "batch", "list"):
        model = Around(form)
        model(x)
        assert find_blocks(model, x, projections=True) == [], form
    assert [b.name for b in find_blocks(Around("same"), x, projections=True)] == ["block"]
    # One convolution with a kernel of one position saves nothing; a stem and a head are no blocks.
    unit = nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16))
    assert (
        find_blocks(nn.Sequential(nn.Conv2d(3, 8, 1), unit, nn.Conv2d(16, 2, 1)), x, projections=True) == []
    )
    wide = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, padding=2))
    assert find_blocks(nn.Sequential(wide, nn.Conv2d(16, 2, 1)), x, projections=True) == []
    head = nn.Sequential(nn.Conv2d(8, 9, 3), nn.Conv2d(9, 2, 3, padding=2))
    assert find_blocks(nn.Sequential(nn.Conv2d(3, 8, 1), head), x, projections=True) == []


def test_bad_data() -> None:
    model, batches = Net(), images(2)
    x = batches[0]
    plan = plan_for(model, x, "layer1.0", "layer2.0")
    pruned = plan.apply(model)

    def fit(data: Any, **kwargs: Any) -> Any:
        return fit_projections(model, pruned, plan, data, **kwargs)

    with pytest.raises(EmptyDataError, match="no batch"):
        fit([])
    with pytest.raises(InvalidInputError, match=r"pass \[batch\]"):
        fit(x)
    for ridge in (-1.0, float("nan"), "much"):
        with pytest.raises(InvalidInputError, match="ridge"):
            fit(batches, ridge=ridge)
    for bad in (float("nan"), float("inf")):
        broken = x.clone()
        broken[1, 0, 2, 2] = bad
        with pytest.raises(NonFiniteError, match=r"layer1\.0"):
            fit([x, broken])
    with pytest.raises(ForwardError, match="Net raised"):
        fit([x[:, :2]])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(PlanMismatchError, match=r"layer1\.0"):
        fit_projections(pruned, pruned, plan, batches)
    with pytest.raises(PlanMismatchError, match=r"layer1\.0: wanted the ProjectionBlock"):
        fit_projections(model, model, plan, batches)
    other = prune_filters(pruned, scores_of(pruned), x, ratio=0.3, round_to=1).apply(pruned)
    with pytest.raises(PlanMismatchError, match=r"layer1\.0: the plan puts a projection of"):
        fit_projections(model, other, plan, batches)
    assert not pruned.layer1[0].projection.weight.any()

    narrowed = prune_filters(model, scores_of(model), x, ratio=0.3, round_to=1)
    with pytest.raises(InvalidInputError, match="the plan of the blocks alone"):
        fit_projections(model, pruned, narrowed + plan, batches)
    with pytest.raises(InvalidInputError, match="pass the model that the plan was made on"):
        fit_projections(narrowed.apply(model), pruned, replace(plan, steps=plan.steps[:1]), batches)

    def never() -> Iterator[Tensor]:
        raise AssertionError("a batch was asked for")
        yield

    identity = PruningPlan("Net", (BlockStep((BlockRemoval("layer1.1", "Bottleneck"),)),))
    assert fit_projections(model, identity.apply(model), identity, never()) == {}
