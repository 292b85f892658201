"""Exported files: they give what the module gives, at other batch sizes too, and refuse what they cannot hold."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from pruning_networks import Chain, Gpt, Residual, SmallViT, scores_of
from torch import Tensor, nn
from torch.nn import functional as F

import idap
from idap import export
from idap.errors import ExportError, InvalidInputError
from idap.export import export_onnx, export_program
from idap.groups import find_groups, is_head_group
from idap.plan import BlockRemoval, BlockStep, Projection, PruningPlan, channel_step
from idap.quickstart import DigitsResNet

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

EXPORTERS = [export_onnx, export_program]


class Layer(nn.Module):
    """A transformer block that takes a keyword argument and returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor, *, mask: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(x), mask


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(16, 4)

    def forward(self, ids: Tensor, mask: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.embed(ids) * scale
        for block in self.blocks:
            x, mask = block(x, mask=mask)
        return {"logits": self.head(x.mean(1)), "hidden": x}


def pruned_encoder() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    removal = BlockRemoval("blocks.1", "Layer", ["hidden", ["kwarg", "mask"]])
    model = PruningPlan("Encoder", (BlockStep((removal,)),)).apply(Encoder())
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    # Not in the order of the signature, and with an argument that is no tensor.
    return model, {"scale": 0.5, "mask": mask, "ids": torch.randint(20, (2, 6))}


def run_onnx(path: Any, feed: dict[str, Tensor]) -> dict[str, Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    arrays = session.run(None, {name: tensor.numpy() for name, tensor in feed.items()})
    return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}


def test_pruned_network_gives_the_same_at_any_batch_size(tmp_path):
    torch.manual_seed(0)
    model = DigitsResNet()
    example = torch.randn(1, 1, 8, 8)
    model = idap.prune_filters(model, scores_of(model), example, macs=0.5).apply(model).train()
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    modes = [module.training for module in model.modules()]
    onnx_file = export_onnx(model, tmp_path / "new" / "m.onnx", example)
    program_file = export_program(model, str(tmp_path / "m.pt2"), example)
    assert [module.training for module in model.modules()] == modes
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["m.onnx"]
    batch = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        wanted = model.eval()(batch)
    got = run_onnx(onnx_file, {"x": batch})["output"]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    loaded = torch.export.load(program_file).module()
    torch.testing.assert_close(loaded(batch), wanted)


def test_transformer_with_a_removed_block_that_returns_a_tuple(tmp_path):
    model, example = pruned_encoder()
    path = export_onnx(model, tmp_path / "m.onnx", example)
    session = onnxruntime.InferenceSession(str(path))
    assert [(item.name, item.shape) for item in session.get_inputs()] == [
        ("ids", ["batch", 6]),
        ("mask", ["batch", 6]),
    ]
    assert [(item.name, item.shape) for item in session.get_outputs()] == [
        ("logits", ["batch", 4]),
        ("hidden", ["batch", 6, 16]),
    ]
    ids, mask = torch.randint(20, (7, 6)), torch.ones(7, 6, dtype=torch.bool)
    with torch.no_grad():
        wanted = model(ids, mask, scale=0.5)
    got = run_onnx(path, {"ids": ids, "mask": mask})
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-5)

    loaded = torch.export.load(export_program(model, tmp_path / "m.pt2", example)).module()
    torch.testing.assert_close(loaded(ids=ids, mask=mask, scale=0.5), wanted)


def test_torchvision_resnet(tmp_path):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model, example = models.resnet18(), torch.randn(1, 3, 64, 64)
    model = idap.prune_filters(model, scores_of(model), example, macs=0.4).apply(model)
    removal = BlockRemoval("layer3.1", "BasicBlock")
    model = PruningPlan("ResNet", (BlockStep((removal,)),)).apply(model)
    # Both compare with the module.
    assert export_onnx(model, tmp_path / "m.onnx", example).stat().st_size > 10_000
    assert export_program(model, tmp_path / "m.pt2", example).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("factory", "example"), [(SmallViT, torch.randn(1, 3, 16, 16)), (Gpt, torch.randn(2, 6, 24))]
)
def test_pruned_heads(tmp_path, factory, example):
    torch.manual_seed(0)
    model = factory()
    groups = [group for group in find_groups(model, example).groups if is_head_group(group)]
    assert groups
    pruned = PruningPlan(factory.__name__, (channel_step((group, [1]) for group in groups),)).apply(model)
    # Both compare with the module.
    export_onnx(pruned, tmp_path / "m.onnx", example)
    export_program(pruned, tmp_path / "m.pt2", example)


class Stages(nn.Module):
    """A stage that halves the map and widens it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stage, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, 2, 1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stage(self.stem(x)).mean((2, 3)))


def test_projection_in_the_place_of_a_block(tmp_path):
    torch.manual_seed(0)
    removal = BlockRemoval("stage", "Conv2d", projection=Projection("conv2d", 8, 12, (2, 2)))
    model, example = PruningPlan("Stages", (BlockStep((removal,)),)).apply(Stages()), torch.randn(1, 3, 9, 9)
    for parameter in model.stage.parameters():
        nn.init.normal_(parameter)
    batch = torch.randn(3, 3, 9, 9)
    got = run_onnx(export_onnx(model, tmp_path / "m.onnx", example), {"x": batch})["output"]
    with torch.no_grad():
        torch.testing.assert_close(got, model(batch))
    loaded = torch.export.load(export_program(model, tmp_path / "m.pt2", example)).module()
    torch.testing.assert_close(loaded(batch), model(batch))


def test_fixed_batch_and_opset(tmp_path):
    path = export_onnx(
        Chain(), tmp_path / "m.onnx", (torch.randn(3, 3, 8, 8),), dynamic_batch=False, opset=20
    )
    import onnx

    assert [entry.version for entry in onnx.load(path).opset_import if not entry.domain] == [20]
    assert onnxruntime.InferenceSession(str(path)).get_inputs()[0].shape == [3, 3, 8, 8]
    with pytest.raises(ExportError, match="wanted 3"):
        export_onnx(Chain(), tmp_path / "old.onnx", torch.randn(3, 3, 8, 8), opset=3)
    assert not (tmp_path / "old.onnx").exists()


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(3, -1)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize(("model", "match"), [(FixedBatch(), "dynamic_batch=False"), (Branch(), "Branch")])
def test_what_cannot_be_exported_says_why_and_leaves_the_old_file(tmp_path, exporter, model, match):
    path = tmp_path / "model"
    path.write_text("old")
    with pytest.raises(ExportError, match=match):
        exporter(model, path, torch.ones(3, 4))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_fixed_batch_can_be_exported_as_such(tmp_path):
    export_onnx(FixedBatch(), tmp_path / "m.onnx", torch.ones(3, 4), dynamic_batch=False)
    export_program(FixedBatch(), tmp_path / "m.pt2", torch.ones(3, 4), dynamic_batch=False)


class Drifting(nn.Module):
    """Gives something else each time it runs outside of the exporter."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = values

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.0 if torch.compiler.is_compiling() else self.values[0])


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_check_catches_an_export_that_differs(tmp_path, exporter):
    x = torch.ones(2, 3)
    exporter(Drifting([1 + 1e-6]), tmp_path / "close", x)
    with pytest.raises(ExportError, match="the example"):
        exporter(Drifting([1.01]), tmp_path / "far", x)
    with pytest.raises(ExportError, match="the example"):
        exporter(Drifting([float("nan")]), tmp_path / "nan", x)
    exporter(Drifting([1.01]), tmp_path / "unchecked", x, check=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["close", "unchecked"]


def test_check_runs_another_batch_size(tmp_path, monkeypatch):
    sizes = []
    run = export._run
    monkeypatch.setattr(export, "_run", lambda m, x: sizes.append(export.batch_size_of(x)) or run(m, x))
    export_program(Residual(), tmp_path / "m.pt2", torch.randn(1, 3, 8, 8))
    assert set(sizes) == {1, 2}
    sizes.clear()
    export_program(Residual(), tmp_path / "m.pt2", torch.randn(4, 3, 8, 8))
    assert set(sizes) == {4, 1, 5}


def test_relative_difference_of_values_that_are_not_finite():
    inf, nan = float("inf"), float("nan")
    difference = export._relative_difference
    assert difference(torch.tensor([inf, nan, 2.0]), torch.tensor([inf, nan, 3.0])) == 0.5
    assert difference(torch.tensor([inf]), torch.tensor([inf])) == 0
    assert difference(torch.tensor([1.0, inf]), torch.tensor([1.0, 5.0])) != 0
    assert difference(torch.tensor([1.0]), torch.tensor([nan])) != 0


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_wrong_arguments(tmp_path, exporter):
    with pytest.raises(InvalidInputError, match="directory"):
        exporter(Chain(), tmp_path, torch.randn(1, 3, 8, 8))
    with pytest.raises(InvalidInputError, match="Module"):
        exporter("model", tmp_path / "m", torch.randn(1, 3, 8, 8))
    with pytest.raises(InvalidInputError, match="example inputs"):
        exporter(Chain(), tmp_path / "m", 3)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written"):
        exporter(Chain(), tmp_path / "file" / "m", torch.randn(1, 3, 8, 8))


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name.startswith("onnxr") else object())
    with pytest.raises(ExportError, match=r"needs onnxruntime, .*idap\[onnx\]"):
        export_onnx(Chain(), tmp_path / "m.onnx", torch.randn(1, 3, 8, 8))
    export_onnx(Chain(), tmp_path / "m.onnx", torch.randn(1, 3, 8, 8), check=False)
    assert (tmp_path / "m.onnx").exists()


def test_exporting_is_silent(tmp_path):
    code = (
        "import sys, torch, idap.export\n"
        "assert not {'onnx', 'onnxruntime', 'onnxscript'} & set(sys.modules)\n"
        "model = torch.nn.Conv2d(1, 2, 3)\n"
        f"idap.export.export_onnx(model, {str(tmp_path / 'm.onnx')!r}, torch.ones(1, 1, 4, 4))\n"
        f"idap.export.export_program(model, {str(tmp_path / 'm.pt2')!r}, torch.ones(1, 1, 4, 4))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")
