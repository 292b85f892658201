"""Scores inside torch.ao.pruning: the channels of the plain formula go, and nothing else changes."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.pruning import LambdaSL
from torch.ao.pruning._experimental.pruner import SaliencyPruner
from torch.ao.pruning._experimental.pruner.base_structured_sparsifier import (
    _get_default_structured_pruning_patterns as default_patterns,
)
from torch.nn import functional as F
from torch.nn.utils import parametrize

import idap
from idap.errors import InvalidInputError, NonFiniteError, SurgeryError
from idap.integrations.torch_ao import ChannelScoreSparsifier


class Network(nn.Module):
    """Modules and functions, batch norms, biases before padding, dropout, a flatten; names with dots."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 11, 3, padding=1), nn.BatchNorm2d(11), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.conv2, self.bn2 = nn.Conv2d(11, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 9, 3, padding=1)
        self.fc1, self.norm, self.drop = nn.Linear(9 * 4, 13), nn.BatchNorm1d(13), nn.Dropout(0.2)
        self.fc2, self.fc3 = nn.Linear(13, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn2(self.conv2(self.stem(x))))
        x = torch.flatten(F.adaptive_avg_pool2d(F.leaky_relu(self.conv3(x)), 2), 1)
        return self.fc3(self.fc2(self.drop(F.gelu(self.norm(self.fc1(x))))).relu())


# Where each layer's channels are zero when they are gone: behind its batch norm.
BEHIND = {"stem.0": "stem.1", "conv2": "bn2", "conv3": "conv3", "fc1": "norm", "fc2": "fc2"}


def randomised(model: nn.Module) -> nn.Module:
    model.double().eval()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


def plain_scores(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """``(1 / (C·S)) · mean_b ‖relu(Y[b, k])‖₂ · ‖W_k‖₂`` in float64, by hooks that keep the outputs."""
    model = copy.deepcopy(model).double().eval()
    outputs: dict[str, list[Tensor]] = {}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    for name, module in layers.items():
        module.register_forward_hook(
            lambda _, args, y, name=name: outputs.setdefault(name, []).append(y.clone())
        )
    with torch.no_grad():
        for batch in batches:
            model(batch.double())
    scores = {}
    for name, module in layers.items():
        y = torch.cat(outputs[name])
        y = y.reshape(y.shape[0], y.shape[1], -1)
        norms = torch.stack(
            [torch.stack([sample.relu().norm() for sample in own]).mean() for own in y.unbind(1)]
        )
        scores[name] = norms * module.weight.detach().flatten(1).norm(dim=1) / (y.shape[1] * y.shape[2])
    return scores


def lowest(scores: Tensor, count: int, among: set[int] | None = None) -> tuple[int, ...]:
    order = sorted(among or range(len(scores)), key=lambda k: (scores[k].item(), k))
    return tuple(sorted(order[:count]))


def zeroed(model: nn.Module, removed: dict[str, tuple[int, ...]], behind: dict[str, str]) -> nn.Module:
    """A copy whose removed channels are set to zero by hooks."""
    model = copy.deepcopy(model).eval()
    for name, channels in removed.items():

        def hook(
            module: nn.Module, args: Any, output: Tensor, channels: tuple[int, ...] = channels
        ) -> Tensor:
            output = output.clone()
            output[:, list(channels)] = 0
            return output

        model.get_submodule(behind[name]).register_forward_hook(hook)
    return model


def images(batch: int = 4, size: int = 8) -> Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------- end to end


def test_the_channels_of_the_plain_formula_go_and_nothing_else_changes():
    model, batches = randomised(Network()), [images(), images()]
    original = copy.deepcopy(model)
    wanted = {name: own for name, own in plain_scores(model, batches).items() if name != "fc3"}
    scores = idap.flow_divergence(model, idap.profile(model, batches, progress=False))
    sparsifier = ChannelScoreSparsifier(scores, sparsity_level=0.4)
    sparsifier.prepare(model)
    assert sparsifier.skipped == {"fc3": "its channels are outputs of the model"}
    x = images()
    same(model(x), original(x))
    sparsifier.step()
    expected = {name: lowest(own, round(0.4 * len(own))) for name, own in wanted.items()}
    assert sparsifier.masked_channels() == expected
    outputs = zeroed(original, expected, BEHIND)(x)
    same(model(x), outputs)  # masked
    pruned = sparsifier.prune()
    same(pruned(x), outputs)  # removed
    assert sparsifier.masked_channels() == expected
    widths = {name: len(own) - len(expected[name]) for name, own in wanted.items()}
    for name, width in widths.items():
        module = pruned.get_submodule(name)
        assert (
            module.weight.shape[0]
            == width
            == getattr(module, "out_channels", getattr(module, "out_features", 0))
        )
        assert type(module) in (nn.Conv2d, nn.Linear)
    assert pruned.fc1.in_features == pruned.fc1.weight.shape[1] == 4 * widths["conv3"]
    assert pruned.bn2.num_features == widths["conv2"]
    kept = [k for k in range(8) if k not in expected["conv2"]]
    assert torch.equal(
        pruned.conv2.weight,
        original.conv2.weight[kept][:, [k for k in range(11) if k not in expected["stem.0"]]],
    )
    assert torch.equal(pruned.bn2.running_var, original.bn2.running_var[kept])
    assert not any(parametrize.is_parametrized(module) for module in pruned.modules())
    assert not [name for name, _ in pruned.named_parameters() if "_bias" in name or "original" in name]
    assert idap.count_params(pruned) < 0.6 * idap.count_params(original)


def test_a_profile_made_before_and_one_made_after_prepare_agree():
    model, batches = randomised(Network()), [images()]
    before = idap.profile(model, batches, progress=False)
    scores = idap.flow_divergence(model, before)
    prepared = copy.deepcopy(model)
    ChannelScoreSparsifier(scores).prepare(prepared)
    after = idap.profile(prepared, batches, progress=False)
    assert set(after.layers) == set(before.layers)
    for given in (before, after):
        again = idap.flow_divergence(prepared, given)
        for name in scores:
            torch.testing.assert_close(again[name], scores[name])


def test_fresh_scores_at_every_step_and_a_rising_level():
    model, batches = randomised(Network()), [images()]
    calls = []

    def fresh(current: nn.Module) -> dict[str, Tensor]:
        calls.append(current)
        return idap.flow_divergence(current, idap.profile(current, batches, progress=False))

    sparsifier = ChannelScoreSparsifier(fresh, sparsity_level=0.6)
    sparsifier.prepare(model)
    assert not calls
    original = copy.deepcopy(model)
    masked: dict[str, tuple[int, ...]] = {}
    scheduler = LambdaSL(sparsifier, [lambda epoch: (epoch + 1) / 3] * 5)
    for step in range(3):
        now = plain_scores(model, batches)
        if step:
            assert all(now[name][k] == 0 for name, own in masked.items() for k in own)
        sparsifier.step()
        for name, own in sparsifier.masked_channels().items():
            gone = set(masked.get(name, ()))
            total = round(0.6 * (step + 1) / 3 * len(now[name]))
            more = lowest(now[name], total - len(gone), set(range(len(now[name]))) - gone)
            assert set(own) == gone | set(more)
            masked[name] = own
        scheduler.step()
    assert calls == [model] * 3
    x = images()
    outputs = zeroed(original, masked, BEHIND)(x)
    same(sparsifier.prune()(x), outputs)


def test_a_second_round_on_the_pruned_model():
    model, batches, x = randomised(Network()), [images()], images()
    for _ in range(2):
        names = [name for name in BEHIND if name != "fc2"]
        scores = plain_scores(model, batches)
        original = copy.deepcopy(model)
        sparsifier = ChannelScoreSparsifier({name: scores[name] for name in names}, sparsity_level=0.3)
        sparsifier.prepare(model)
        sparsifier.step()
        model = sparsifier.prune()
        removed = sparsifier.masked_channels()
        assert removed == {name: lowest(scores[name], round(0.3 * len(scores[name]))) for name in names}
        same(model(x), zeroed(original, removed, BEHIND)(x))
    assert model.fc2.out_features == 7


def test_training_between_steps_keeps_masks_and_moves_biases():
    model, x = randomised(Network()), images(8)
    sparsifier = ChannelScoreSparsifier(plain_scores(model, [x]), sparsity_level=0.5)
    sparsifier.prepare(model)
    sparsifier.step()
    bias = model.conv3._bias.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(x).square().mean().backward()
        optimizer.step()
    model.eval()
    gone = list(sparsifier.masked_channels()["conv3"])
    left = [k for k in range(9) if k not in gone]
    assert (model.conv3._bias[left] != bias[left]).all()
    with torch.no_grad():
        outputs = model(x)
    same(sparsifier.prune()(x), outputs)


def test_squashed_masks_leave_a_plain_model():
    model, x = randomised(Network()), images()
    original = copy.deepcopy(model)
    sparsifier = ChannelScoreSparsifier(plain_scores(model, [x]))
    sparsifier.prepare(model)
    sparsifier.step()
    sparsifier.squash_mask()
    same(model(x), zeroed(original, sparsifier.masked_channels(), BEHIND)(x))
    assert model.state_dict().keys() == original.state_dict().keys()
    assert not model.conv3._forward_hooks


def test_masks_that_moved_apart():
    model, x = randomised(Network()), images()
    original = copy.deepcopy(model)
    sparsifier = ChannelScoreSparsifier(plain_scores(model, [x]))
    sparsifier.prepare(model)
    model._apply(torch.clone)  # as when a prepared model goes to another device: no two modules share a mask
    sparsifier.step()
    outputs = zeroed(original, sparsifier.masked_channels(), BEHIND)(x)
    same(model(x), outputs)
    same(sparsifier.prune()(x), outputs)


def test_the_inner_convolutions_of_a_resnet():
    resnet18 = pytest.importorskip("torchvision.models").resnet18
    model, x = randomised(resnet18()), images(2, 32)
    original = copy.deepcopy(model)
    scores = idap.flow_divergence(model, idap.profile(model, [x], blocks=(), progress=False))
    sparsifier = ChannelScoreSparsifier(scores)
    sparsifier.prepare(model)
    inner = [f"layer{i}.{j}.conv1" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert list(sparsifier.masked_channels()) == inner
    assert len(sparsifier.skipped) == 21 - 8
    sparsifier.step()
    removed = sparsifier.masked_channels()
    wanted = plain_scores(original, [x])
    assert removed == {name: lowest(wanted[name], len(wanted[name]) // 2) for name in inner}
    outputs = zeroed(original, removed, {name: name.replace("conv", "bn") for name in inner})(x)
    same(sparsifier.prune()(x), outputs)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 10), nn.Linear(10, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.silu(self.fc2(torch.tanh(self.fc1(x)))))


def test_tokens():
    model, x = Tokens().double(), torch.randn(2, 10, 6, dtype=torch.float64)  # as many tokens as channels
    original = copy.deepcopy(model)
    scores = idap.flow_divergence(model, idap.profile(model, [x], progress=False))
    sparsifier = ChannelScoreSparsifier(scores)
    sparsifier.prepare(model)
    same(model(x), original(x))
    sparsifier.step()
    wanted = original.fc1(x).tanh()
    wanted[..., list(lowest(scores["fc1"], 5))] = 0
    wanted = F.silu(original.fc2(wanted))
    wanted[..., list(lowest(scores["fc2"], 2))] = 0
    same(sparsifier.prune()(x), original.fc3(wanted))


class Between(nn.Module):
    def __init__(self, *between: nn.Module, reader: nn.Module, method: Any = None) -> None:
        super().__init__()
        self.first, self.between, self.reader, self.method = (
            nn.Conv2d(3, 8, 3),
            nn.Sequential(*between),
            reader,
            method,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.first(x))
        return self.reader(x if self.method is None else self.method(x))


@pytest.mark.parametrize(
    ("between", "reader", "method"),
    [
        ([], nn.Conv2d(8, 4, 3, padding="same"), None),
        ([nn.ReLU(), nn.AvgPool2d(2)], nn.Conv2d(8, 4, 1), None),
        ([nn.AvgPool2d(2), nn.Hardtanh()], nn.Conv2d(8, 4, 2, stride=2, bias=False), None),
        ([nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Mish()], nn.Conv2d(8, 4, 3, padding=1), None),
        ([nn.BatchNorm2d(8, track_running_stats=False), nn.SiLU()], nn.Conv2d(8, 4, 3), None),
        ([nn.Hardswish(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Dropout()], nn.Linear(8, 4), None),
        ([nn.ReLU(), nn.Flatten()], nn.Linear(8 * 36, 4, bias=False), None),
        ([nn.Tanh()], nn.Linear(8, 4), lambda x: x.mean((2, 3))),
        ([nn.Tanh()], nn.Linear(8, 4), lambda x: torch.mean(x, dim=[-1, -2]).tanh()),
        ([nn.Tanh()], nn.Conv2d(8, 4, 1), lambda x: F.dropout2d(x.mean((-1, -2), keepdim=True), 0.5, False)),
        ([nn.ELU()], nn.Linear(8 * 9, 4), lambda x: F.max_pool2d(x, 2).flatten(1)),
        ([nn.ELU()], nn.Linear(8 * 9, 4), lambda x: F.avg_pool2d(x, 2).flatten(start_dim=1)),
    ],
)
def test_chains_that_are_converted_exactly(between, reader, method):
    model = (
        randomised(Between(*between, reader=reader, method=method))
        if not any(getattr(m, "running_mean", 0) is None for m in between)
        else Between(*between, reader=reader, method=method).double().eval()
    )
    original, x = copy.deepcopy(model), images()
    sparsifier = ChannelScoreSparsifier({"first": torch.tensor([3.0, 1, 1, 0, 5, 1, 4, 2])})
    sparsifier.prepare(model)
    sparsifier.step()
    assert sparsifier.masked_channels() == {"first": (1, 2, 3, 5)}
    norms = [f"between.{i}" for i, m in enumerate(between) if isinstance(m, nn.BatchNorm2d)]
    outputs = zeroed(original, {"first": (1, 2, 3, 5)}, {"first": norms[-1] if norms else "first"})(x)
    pruned = sparsifier.prune()
    same(pruned(x), outputs)
    assert pruned.first.out_channels == 4


@pytest.mark.parametrize(
    ("between", "reader", "method", "reason"),
    [
        ([nn.Sigmoid()], nn.Conv2d(8, 4, 1), None, "Sigmoid"),
        ([nn.Hardtanh(0.5, 1.0)], nn.Conv2d(8, 4, 1), None, "Hardtanh"),
        ([nn.PReLU(8)], nn.Conv2d(8, 4, 1), None, "PReLU"),
        ([nn.GroupNorm(2, 8)], nn.Conv2d(8, 4, 1), None, "GroupNorm"),
        ([nn.BatchNorm2d(8, affine=False)], nn.Conv2d(8, 4, 1), None, "no scale"),
        ([], nn.Conv2d(8, 8, 1, groups=8), None, "one by one"),
        ([nn.Flatten(0)], nn.Linear(4 * 8 * 36, 4), None, "Flatten"),
        ([], nn.Linear(6, 4), None, "one by one"),
        ([], nn.Conv2d(8, 4, 1), lambda x: x + x.tanh(), "read in 2 places"),
        ([], nn.Conv2d(8, 4, 1), lambda x: x.softmax(1), "softmax"),
        ([], nn.Linear(8, 4), lambda x: x.mean((1, 2)), "mean"),
        ([], nn.Conv2d(16, 4, 1), lambda x: torch.cat([x, x], 1), "cat"),
    ],
)
def test_what_cannot_be_removed_is_said_and_left_alone(between, reader, method, reason):
    model = Between(*between, reader=reader, method=method)
    state = copy.deepcopy(model.state_dict())
    scores = {"first": torch.rand(8)}
    with pytest.raises(InvalidInputError, match=reason):
        ChannelScoreSparsifier(scores).prepare(model)
    assert model.state_dict().keys() == state.keys()
    # Masked all the same when asked for, but not removed.
    sparsifier = ChannelScoreSparsifier(scores)
    sparsifier.prepare(model, [{"tensor_fqn": "first.weight", "sparsity_level": 0.25}])
    sparsifier.step()
    assert len(sparsifier.masked_channels()["first"]) == 2
    assert reason in sparsifier.skipped["first"]
    with pytest.raises(SurgeryError, match=reason):
        sparsifier.prune()
    assert model.first.weight.shape[0] == 8
    sparsifier.squash_mask()
    assert not model.first.weight[list(sparsifier.masked_channels()["first"])].any()


def test_layers_called_twice_grouped_or_not_traceable():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.grouped, self.unused = nn.Conv2d(6, 6, 1, groups=2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.a(self.grouped(x).mean((2, 3)))))

    sparsifier = ChannelScoreSparsifier(lambda model: {})
    with pytest.raises(InvalidInputError, match="no layer with scores can be pruned"):
        sparsifier.prepare(Twice())
    sparsifier.prepare(model := Twice(), [{"tensor_fqn": "b.weight"}])
    assert "called 2 times" in sparsifier.skipped["a"]
    assert "groups=2" in sparsifier.skipped["grouped"]
    assert "no call" in sparsifier.skipped["unused"]
    with pytest.raises(InvalidInputError, match="none of layer 'b'"):
        sparsifier.step()
    assert sparsifier.masked_channels() == {"b": ()}

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) if x.sum() > 0 else x

    model = Branching()
    with pytest.raises(SurgeryError, match="cannot trace"):
        ChannelScoreSparsifier({"a": torch.rand(6)}).prepare(model)
    sparsifier = ChannelScoreSparsifier({"a": torch.rand(6)})
    sparsifier.prepare(model, [{"tensor_fqn": "a.weight"}])
    sparsifier.step()
    with pytest.raises(SurgeryError, match="cannot trace"):
        sparsifier.prune()


class Bound(nn.Module):
    """a, norm, b, c; ``tie`` changes them, ``reads`` gives a factor of the output."""

    def __init__(self, tie: Any = None, reads: Any = None, width: int = 6) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(6, width), nn.BatchNorm1d(width)
        self.b, self.c = nn.Linear(width, 6), nn.Linear(6, 6)
        self.other, self.reads = nn.BatchNorm1d(width), reads
        if tie is not None:
            tie(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.b(self.norm(self.a(x)).relu()).relu())
        return self.other(y if self.reads is None else y * self.reads(self))


def tie(one: str, other: str) -> Any:
    def do(model: nn.Module) -> None:
        owner, _, key = one.rpartition(".")
        setattr(model.get_submodule(owner), key, model.get_parameter(other))

    return do


@pytest.mark.parametrize(
    ("model", "reasons"),
    [
        (Bound(tie("b.weight", "a.weight")), {"a": "its weight is shared", "b": "its weight is shared"}),
        (
            Bound(tie("c.weight", "a.weight")),
            {"a": "its weight is shared", "b": "'c' reads it, and its weight is"},
        ),
        (Bound(tie("c.bias", "a.bias")), {"a": "its bias is shared"}),
        (Bound(tie("other.weight", "norm.weight")), {"a": "'norm' is behind it, and its weight is shared"}),
        (Bound(reads=lambda m: m.a.weight.sum()), {"a": "its weight is read elsewhere"}),
        (Bound(reads=lambda m: m.norm.weight.sum()), {"a": "'norm' is behind it, and its weight is read"}),
        (
            Bound(reads=lambda m: m.b.weight.sum()),
            {"a": "'b' reads it, and its weight is read", "b": "is read"},
        ),
    ],
)
def test_what_is_shared_or_read_elsewhere_is_left_alone(model, reasons):
    model = randomised(model)
    original, x = copy.deepcopy(model), torch.randn(5, 6, dtype=torch.float64)
    scores = {"a": torch.arange(6.0), "b": torch.arange(6.0)}
    sparsifier = ChannelScoreSparsifier(scores)
    if len(reasons) == 2:
        with pytest.raises(InvalidInputError, match=reasons["a"]):
            sparsifier.prepare(model)
    else:
        sparsifier.prepare(model)
        sparsifier.step()
        assert reasons["a"] in sparsifier.skipped["a"]
        assert sparsifier.masked_channels() == {"b": (0, 1, 2)}
        outputs = zeroed(original, {"b": (0, 1, 2)}, {"b": "b"})(x)
        same(model(x), outputs)
        same(sparsifier.prune()(x), outputs)
    for name, reason in reasons.items():
        model, sparsifier = copy.deepcopy(original), ChannelScoreSparsifier(scores)
        if reason in ("its weight is shared", "its bias is shared"):  # its mask would change the other
            with pytest.raises(InvalidInputError, match=f"{reason.split()[1]} of layer '{name}' is shared"):
                sparsifier.prepare(model, [{"tensor_fqn": f"{name}.weight"}])
            same(model(x), original(x))
            continue
        sparsifier.prepare(model, [{"tensor_fqn": f"{name}.weight"}])
        assert reason in sparsifier.skipped[name]
        sparsifier.step()
        with pytest.raises(SurgeryError, match=reason):
            sparsifier.prune()
        assert model.get_submodule(name).weight.shape == (6, 6)


def test_batch_norms_over_tokens():
    class Tokens(nn.Module):
        def __init__(self, tokens: int) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(6, 8), nn.BatchNorm1d(tokens), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.norm(self.a(x)))

    scores = {"a": torch.arange(8.0)}
    with pytest.raises(InvalidInputError, match="batch norm 'norm' is over another dimension"):
        ChannelScoreSparsifier(scores).prepare(Tokens(5))
    # As many tokens as channels: only the input tells.
    for end in ("prune", "squash_mask"):
        model = randomised(Tokens(8))
        original = copy.deepcopy(model)
        sparsifier = ChannelScoreSparsifier(scores)
        sparsifier.prepare(model)
        sparsifier.step()
        for own in (model, copy.deepcopy(model)):
            with pytest.raises(SurgeryError, match=r"'norm' got \(2, 8, 8\).*'a' left out"):
                own(torch.randn(2, 8, 6, dtype=torch.float64))
        x = torch.randn(2, 6, dtype=torch.float64)
        outputs = zeroed(original, {"a": (0, 1, 2, 3)}, {"a": "norm"})(x)
        same(model(x), outputs)
        model = sparsifier.prune() if end == "prune" else (sparsifier.squash_mask(), model)[1]
        same(model(x), outputs)
        assert not model.norm._forward_pre_hooks


# ------------------------------------------------------------------- the library's own conversion


def chain(bias: bool, padding: int, activation: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=bias),
        activation,
        nn.Conv2d(8, 6, 3, padding=padding),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1),
    ).double()


@pytest.mark.parametrize(
    ("bias", "padding", "activation", "width", "exact"),
    [
        (True, 0, nn.ReLU(), 4, True),
        (False, 1, nn.ReLU(), 4, True),
        (True, 1, nn.ReLU(), 8, True),  # keeps its width
        (True, 0, nn.Sigmoid(), 4, False),  # drops f(0)
    ],
)
def test_the_librarys_patterns_run_with_the_librarys_limits(bias, padding, activation, width, exact):
    model, x = chain(bias, padding, activation), images()
    original = copy.deepcopy(model)
    scores = plain_scores(model, [x])
    sparsifier = ChannelScoreSparsifier(scores, patterns=default_patterns())
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    pruned = sparsifier.prune()
    removed = {"0": lowest(scores["0"], 4)}
    assert sparsifier.masked_channels() == removed
    assert pruned.get_submodule("0").weight.shape[0] == width
    outputs = zeroed(original, removed, {"0": "0"})(x)
    assert torch.allclose(pruned(x), outputs, rtol=1e-10, atol=1e-10) is exact
    if not isinstance(activation, nn.Sigmoid):
        model = copy.deepcopy(original)
        sparsifier = ChannelScoreSparsifier({"0": scores["0"]})
        sparsifier.prepare(model)
        sparsifier.step()
        pruned = sparsifier.prune()
        assert pruned.get_submodule("0").out_channels == 4
        same(pruned(x), outputs)


def test_with_norms_of_weights_it_masks_what_the_librarys_pruner_masks():
    model = chain(True, 0, nn.ReLU())
    ours = copy.deepcopy(model)
    theirs = SaliencyPruner({"sparsity_level": 0.5})
    config = [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}]
    theirs.prepare(model, copy.deepcopy(config))
    theirs.step()
    sparsifier = ChannelScoreSparsifier(
        lambda m: idap.criteria.weight_l1(m, idap.profile(m, [images()], progress=False))
    )
    sparsifier.prepare(ours, config)
    sparsifier.step()
    for name in ("0", "2"):
        wanted = (~theirs.state[f"{name}.weight"]["mask"]).nonzero().flatten().tolist()
        assert sparsifier.masked_channels()[name] == tuple(wanted)


# ------------------------------------------------------------------------------- wrong input


def test_levels_ties_and_the_last_channel():
    model = chain(True, 0, nn.ReLU())
    sparsifier = ChannelScoreSparsifier({"0": torch.zeros(8), "2": torch.ones(6)}, sparsity_level=1.0)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight", "sparsity_level": 0.5}])
    sparsifier.enable_mask_update = False
    sparsifier.step()
    assert sparsifier.masked_channels() == {"0": (), "2": ()}
    sparsifier.enable_mask_update = True
    sparsifier.step()
    assert sparsifier.masked_channels() == {"0": tuple(range(7)), "2": (0, 1, 2)}
    sparsifier.groups[0]["sparsity_level"] = 0.1  # a lower level gives nothing back
    sparsifier.step()
    assert len(sparsifier.masked_channels()["0"]) == 7


def test_wrong_arguments():
    def model() -> nn.Module:
        return chain(True, 0, nn.ReLU())

    good = {"0": torch.rand(8), "2": torch.rand(6)}
    with pytest.raises(InvalidInputError, match="scores"):
        ChannelScoreSparsifier(torch.rand(8))
    for level in (-0.1, 1.1, math.nan, True, "half"):
        with pytest.raises(InvalidInputError, match="sparsity_level"):
            ChannelScoreSparsifier(good, sparsity_level=level)
    for error, match, scores, config in [
        (InvalidInputError, "wanted \\(8,\\)", {"0": torch.rand(7)}, None),
        (InvalidInputError, "no layer", {"conv": torch.rand(7)}, None),
        (NonFiniteError, "'0'", {"0": torch.full((8,), math.nan)}, None),
        (InvalidInputError, "'4': its channels are outputs.*can be: '0', '2'", {"4": torch.rand(4)}, None),
        (InvalidInputError, "none of layer '2'", {"0": torch.rand(8)}, [{"tensor_fqn": "2.weight"}]),
        (InvalidInputError, "of a ReLU", good, [{"tensor_fqn": "1.weight"}]),
        (InvalidInputError, "of a Conv2d", good, [{"tensor_fqn": "0.bias"}]),
        (InvalidInputError, "of no layer", good, [{"tensor_fqn": "9.weight"}]),
        (InvalidInputError, "tensor_fqn", good, [{"name": "0"}]),
        (InvalidInputError, "2 times", good, [{"tensor_fqn": "0.weight"}] * 2),
        (InvalidInputError, "prune_bias", good, [{"tensor_fqn": "0.weight", "prune_bias": False}]),
        (InvalidInputError, "sparsity_level", good, [{"tensor_fqn": "0.weight", "sparsity_level": 2}]),
    ]:
        own = model()
        with pytest.raises(error, match=match):
            ChannelScoreSparsifier(scores).prepare(own, config)
        assert not any(parametrize.is_parametrized(module) for module in own.modules())
    answers: list[Any] = [good, good | {"2": torch.full((6,), math.inf)}]
    own = model()
    sparsifier = ChannelScoreSparsifier(lambda m: answers.pop(0), sparsity_level=0.25)
    sparsifier.prepare(own)
    with pytest.raises(InvalidInputError, match="has a model already"):
        sparsifier.prepare(model())
    sparsifier.step()
    before = sparsifier.masked_channels()
    sparsifier.groups[0]["sparsity_level"] = 0.75
    with pytest.raises(NonFiniteError, match="'2'"):
        sparsifier.step()
    assert sparsifier.masked_channels() == before
