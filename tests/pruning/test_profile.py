from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import idap
from idap.errors import EmptyDataError, ForwardError, InvalidInputError, NonFiniteError
from idap.profile import ActivationProfile
from idap_kernels import channel_stats


class Residual(nn.Module):
    def __init__(self, channels: int = 6):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn(self.conv(x)).relu()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2)
        self.blocks = nn.Sequential(Residual(), Residual())
        self.head = nn.Linear(6, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def batches(n: int = 3) -> list[Tensor]:
    return [torch.randn(2 + i, 3, 9, 9) for i in range(n)]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_statistics_are_those_of_the_outputs():
    model, data = Net().double(), [b.double() for b in batches()]
    p = idap.profile(model, data)
    model.eval()
    with torch.no_grad():
        stem = [model.stem(b) for b in data]
        first = [model.blocks[0](y) for y in stem]
        logits = torch.cat([model(b) for b in data])
    close = torch.testing.assert_close
    close(p.layers["stem"].state, channel_stats(torch.cat(stem)).state)
    close(p.layers["head"].state, channel_stats(logits).state)
    change = torch.cat(
        [(b - a).flatten(1).norm(dim=1) / a.flatten(1).norm(dim=1) for a, b in zip(stem, first)]
    )
    close(p.blocks["blocks.0"].relative_change, change)
    assert list(p.layers) == ["stem", "blocks.0.conv", "blocks.1.conv", "head"]
    assert list(p.blocks) == ["blocks.0", "blocks.1"]
    assert (p.samples, p.batches) == (9, 3)


def test_one_forward_pass_per_batch_and_nothing_left_behind():
    model = Net().train()
    model.blocks[1].eval()
    model.stem.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    running = model.blocks[0].bn.running_mean.clone()
    modes = [m.training for m in model.modules()]
    idap.profile(model, batches(), progress=False)
    assert model.calls == 3
    assert hooks(model) == 0
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model.blocks[0].bn.running_mean, running)
    assert not model.stem.weight.requires_grad
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert torch.is_grad_enabled()


def test_two_parts_merge_to_the_whole():
    model, data = Net(), batches(4)
    whole = idap.profile(model, data)
    merged = idap.profile(model, data[:1]).merge(idap.profile(model, data[1:]))
    assert (merged.samples, merged.batches) == (whole.samples, whole.batches)
    for name, stats in whole.layers.items():
        torch.testing.assert_close(merged.layers[name].state, stats.state, rtol=1e-9, atol=1e-12)
    for name, pairs in whole.blocks.items():
        assert torch.equal(merged.blocks[name].state, pairs.state)
    again = ActivationProfile.from_state_dict(merged.state_dict())
    assert idap.flow_divergence(model, again).keys() == idap.flow_divergence(model, merged).keys()
    assert idap.layer_divergence(model, again) == idap.layer_divergence(model, merged)


def test_no_activation_is_kept():
    model, seen = Net(), []
    model.stem.register_forward_hook(lambda m, a, y: seen.append(weakref.ref(y)))
    p = idap.profile(model, batches(), blocks=["blocks.0"])  # no copy of the model runs to find blocks
    gc.collect()
    assert len(seen) == 3
    assert all(ref() is None for ref in seen)
    assert sum(s.state.numel() for s in p.layers.values()) == 11 * (6 + 6 + 6 + 4)


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "dict"])
def test_forms_of_a_batch(form):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
            return {"logits": self.fc(x if scale is None else x * scale)}

    x, scale = torch.randn(5, 7, 4), torch.tensor(2.0)
    batch = {"tensor": x, "tuple": (x, scale), "list": [x, scale], "dict": {"scale": scale, "x": x}}[form]
    model = Two()
    p = idap.profile(model, iter([batch]), blocks=())
    y = model.fc(x if form == "tensor" else x * scale).detach()
    torch.testing.assert_close(p.layers["fc"].state, channel_stats(y, channel_dim=-1).state)
    assert p.samples == 5


def test_a_loader_with_labels_is_told_what_to_do():
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 9, 9), torch.zeros(8))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    model = Net()
    with pytest.raises(ForwardError, match=r"forward=lambda model, batch: model\(batch\[0\]\)"):
        idap.profile(model, loader)
    p = idap.profile(model, loader, forward=lambda m, batch: m(batch[0]))
    assert p.samples == 8
    assert hooks(model) == 0


def test_sequence_first_linear_layers():
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.transpose(0, 1)).transpose(0, 1)

    x = torch.randn(5, 7, 4)
    model = SequenceFirst()
    p = idap.profile(model, [x], blocks=())
    torch.testing.assert_close(
        p.layers["fc"].state, channel_stats(model.fc(x).detach(), channel_dim=-1).state, rtol=1e-6, atol=1e-9
    )


def test_a_block_that_writes_into_its_input():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(6)
            self.conv = nn.Conv2d(6, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.norm(x)) + x.relu_()

    model, data = InPlace().eval(), [torch.randn(2, 6, 4, 4) for _ in range(3)]
    wanted = []
    with torch.no_grad():
        for x in data:
            y = model(x.clone())
            wanted.append((y - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1))
    p = idap.profile(model, [x.clone() for x in data], layers=(), blocks=[""])
    torch.testing.assert_close(p.blocks[""].relative_change.float(), torch.cat(wanted))


def test_not_finite_names_the_layer_and_the_batch():
    model, data = Net(), batches(3)
    data[2][1, 0, 4, 4] = float("nan")
    with pytest.raises(NonFiniteError, match=r"'stem'.*batch 2"):
        idap.profile(model, data)
    assert hooks(model) == 0


def test_a_model_that_raises_is_left_unharmed():
    model = Net().train()
    with pytest.raises(ForwardError, match="batch 1") as caught:
        idap.profile(model, [torch.randn(2, 3, 9, 9), torch.randn(2, 5, 9, 9)])
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert hooks(model) == 0
    assert model.training


def test_an_interrupt_leaves_no_hook():
    model = Net().train()

    def forward(m: nn.Module, batch: Tensor) -> None:
        m(batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        idap.profile(model, batches(), forward=forward)
    assert hooks(model) == 0
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batches": []}, EmptyDataError, "empty"),
        ({"batches": iter(())}, EmptyDataError, "empty"),
        ({"batches": [torch.zeros(0, 3, 9, 9)]}, EmptyDataError, "empty batch"),
        ({"batches": torch.zeros(2, 3, 9, 9)}, InvalidInputError, "one tensor"),
        ({"batches": {"x": torch.zeros(2, 3, 9, 9)}}, InvalidInputError, "one mapping"),
        ({"batches": 3}, InvalidInputError, "int"),
        ({"batches": ["text"]}, InvalidInputError, "str"),
        ({"layers": ["nowhere"]}, InvalidInputError, "nowhere"),
        ({"layers": "stem"}, InvalidInputError, r"\['stem'\]"),
        ({"blocks": ["stem"]}, InvalidInputError, "no difference"),
        ({"activation": "tanh"}, InvalidInputError, "tanh"),
        ({"backend": "tpu"}, InvalidInputError, "tpu"),
        ({"backend": "cuda"}, idap.IdapError, "cuda"),
    ],
)
def test_bad_input_raises_our_own_error(arguments, error, message):
    model = Net()
    if arguments.get("backend") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(error, match=message):
        idap.profile(model, **{"batches": batches(1), "progress": False, **arguments})
    assert hooks(model) == 0


def test_a_layer_called_twice_counts_both_calls():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x))

    x = torch.randn(3, 4)
    model = Shared()
    p = idap.profile(model, [x], blocks=())
    once = model.fc(x).detach()
    torch.testing.assert_close(
        p.layers["fc"].state, channel_stats(torch.cat([once, model.fc(once).detach()])).state
    )


def test_windows_of_a_batch_are_not_taken_for_sequences():
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:  # (B, 8, 8, C) -> (B * 4, 16, C)
            b = x.shape[0]
            y = x.view(b, 2, 4, 2, 4, 3).permute(0, 1, 3, 2, 4, 5).reshape(b * 4, 16, 3)
            return self.fc(y)

    model, data = Windows(), torch.randn(16, 8, 8, 3)
    whole = idap.profile(model, [data], blocks=()).layers["fc"]  # as many images as a window has positions
    parts = idap.profile(model, data.split(8), blocks=()).layers["fc"]
    torch.testing.assert_close(whole.state, parts.state)


def test_inside_inference_mode():
    model, x = Net(), torch.randn(2, 3, 9, 9)
    wanted = idap.profile(model, [x])
    with torch.inference_mode():
        got = idap.profile(model, [x.clone()])
        scores = idap.flow_divergence(model, got)
    torch.testing.assert_close(got.layers["head"].state, wanted.layers["head"].state)
    assert list(got.blocks) == list(wanted.blocks)
    assert scores["stem"].shape == (6,)


def test_squares_that_overflow_are_noticed():
    with pytest.raises(NonFiniteError, match="'stem'"):
        idap.profile(Net(), [torch.randn(2, 3, 9, 9) * 1e20])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "NoneType"),
        (lambda x: x, "function"),
        (torch.compile(Net(), backend="eager"), "_orig_mod"),
        (Net().to("meta"), "meta device"),
    ],
)
def test_models_that_cannot_be_profiled(model, message):
    with pytest.raises(InvalidInputError, match=message):
        idap.profile(model, batches(1))


def test_a_layer_without_filters_is_refused():
    with pytest.raises(InvalidInputError, match=r"'blocks\.0\.bn' is a BatchNorm2d"):
        idap.profile(Net(), batches(1), layers=["blocks.0.bn"])
