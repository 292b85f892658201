"""FastNAS with scores of a profile, and the forward hook, against the formula written out with hooks."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import idap
from idap import criteria
from idap.errors import EmptyDataError, InvalidInputError, NonFiniteError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about versions of other libraries, on import
    pytest.importorskip("modelopt.torch")
    pytest.importorskip("torchprofile")
    import modelopt.torch.nas as mtn
    import modelopt.torch.prune as mtp
    from modelopt.torch.opt.utils import named_hparams
    from modelopt.torch.prune.importance_hooks import ForwardHook
    from modelopt.torch.utils import safe_load

    from idap.integrations.modelopt import ChannelStatsHook, prune, register_importance

# ModelOpt's advice to give it data for batch norms: here nothing depends on them.
pytestmark = pytest.mark.filterwarnings("ignore:modelopt data queue not filled:UserWarning")

CHANNELS = {"*": {"channels_ratio": [0.25, 0.5, 0.75, 1.0], "channel_divisor": 1, "kernel_size": []}}
FEATURES = {"*": {"features_ratio": [0.25, 0.5, 0.75, 1.0], "feature_divisor": 1}}
RULES: dict[str, Any] = {
    "nn.Conv1d": CHANNELS,
    "nn.Conv2d": CHANNELS,
    "nn.ConvTranspose2d": CHANNELS,
    "nn.Linear": FEATURES,
    "nn.BatchNorm2d": FEATURES,
}
MODE = [("fastnas", RULES)]


class Net(nn.Module):
    """A residual sum, a depthwise convolution, a concatenation with another behind it, a transposed one."""

    # What makes the channels of each hparam of the network, and of each part of the concatenation.
    COUPLED = (("stem", "b", "dw"), ("a",), ("c1",), ("c2",), ("d",), ("up",), ("fc",))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.a = nn.Conv2d(16, 24, 3, padding=1)
        self.b = nn.Conv2d(24, 16, 3, padding=1)
        self.dw = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.c1 = nn.Conv2d(16, 12, 1)
        self.c2 = nn.Conv2d(16, 20, 3, padding=1)
        self.d = nn.Conv2d(32, 16, 1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.e = nn.Conv2d(8, 16, 1)
        self.fc = nn.Linear(16, 32)
        self.out = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).relu()
        x = (x + self.b(self.a(x).relu())).relu()
        x = self.dw(x).relu()
        x = torch.cat([self.c1(x).relu(), self.c2(x).relu()], 1)
        x = self.e(self.up(self.d(x).relu()).relu()).relu()
        return self.out(self.fc(x.mean((2, 3))).relu())


def network() -> Net:
    torch.manual_seed(0)
    net = Net().double().eval()
    with torch.no_grad():  # ModelOpt takes the norm of the weights that read a channel: let it disagree
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.mul_(torch.rand_like(module.weight[:, :1]) + 0.1)
    return net


def batches(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 9, 7, dtype=torch.float64, generator=generator) for n in sizes or (3, 2)]


def filters(module: Any) -> Tensor:
    weight = module.weight.detach()
    if isinstance(module, nn.ConvTranspose2d):
        assert module.groups == 1
        weight = weight.transpose(0, 1)
    return weight.double().flatten(1)


def formula(model: nn.Module, data: list[Tensor]) -> dict[str, Tensor]:
    """(1 / (C S)) mean_b ||relu(Y[b, k])|| ||W_k|| of every layer, from outputs kept by hooks, in float64."""
    outputs: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_hook(lambda m, args, y, name=name: outputs.setdefault(name, []).append(y))
        for name, module in model.named_modules()
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
    ]
    with torch.no_grad():
        for batch in data:
            model(batch)
    for hook in hooks:
        hook.remove()
    scores = {}
    for name, parts in outputs.items():
        y = (
            torch.cat(parts).double().flatten(2)
            if parts[0].dim() > 2
            else torch.cat(parts).double()[..., None]
        )
        norm = y.relu().square().sum(2).sqrt().mean(0)
        scores[name] = norm * filters(model.get_submodule(name)).norm(dim=1) / (y.shape[1] * y.shape[2])
    return scores


def scored(model: nn.Module) -> dict[str, Tensor]:
    return idap.flow_divergence(model, idap.profile(model, batches()))


def converted(model: nn.Module) -> nn.Module:
    return mtn.convert(copy.deepcopy(model), MODE)


def hparam_of(model: nn.Module, layer: str) -> Any:
    module: Any = model.get_submodule(layer)
    return module.get_hparam("out_features" if isinstance(module, nn.Linear) else "out_channels")


def order_of(model: nn.Module, layer: str) -> list[int]:
    """The channels of a layer in the order in which ModelOpt now has them."""
    hparam = hparam_of(model, layer)
    now = hparam.active_slice
    return list(range(hparam.max))[now] if isinstance(now, slice) else now.tolist()


def descending(scores: Tensor) -> list[int]:
    """Highest first; of equals the lower index last, as it is the first to be removed."""
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda i: (values[i], i), reverse=True)


REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda table: table.mean(0),
    "sum": lambda table: table.sum(0),
    "max": lambda table: table.amax(0),
}


# ------------------------------------------------------------------------------------------------
# register_importance
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
def test_sorting_follows_the_formula(reduction: str) -> None:
    net, data = network(), batches()
    want = formula(net, data)
    model = converted(net)
    registered, skipped = register_importance(model, scored(net), reduction=reduction)
    assert len(registered) == 6  # the two parts of the concatenation are one
    assert not skipped
    mtn.utils.sort_parameters(model)
    for layers in Net.COUPLED:
        best = descending(REDUCE[reduction](torch.stack([want[layer] for layer in layers])))
        for layer in layers:
            assert order_of(model, layer) == best, layer
            module = model.get_submodule(layer)
            assert torch.equal(module.bias, net.get_submodule(layer).bias[best])
    torch.testing.assert_close(model(data[0]), net(data[0]), rtol=1e-12, atol=1e-14)


def test_own_importance_is_replaced() -> None:
    net = network()
    plain, ours = converted(net), converted(net)
    mtn.utils.sort_parameters(plain)
    register_importance(ours, scored(net))
    mtn.utils.sort_parameters(ours)
    assert order_of(plain, "a") != order_of(ours, "a")
    for name, hparam in named_hparams(ours, configurable=True):
        assert len(hparam._importance_estimators) == 1, name
        if name != "d.in_channels":  # the parts of a concatenation have places of their own
            assert sorted(hparam.importance.tolist()) == pytest.approx(
                [(i + 1) / hparam.max for i in range(hparam.max)]
            )


def test_equal_scores_lose_lower_channels_first() -> None:
    net = network()
    scores = {name: torch.zeros_like(values) for name, values in scored(net).items()}
    scores["a"][5] = 1e-13  # lost beside the 1e-9 that ModelOpt adds to a maximum, were scores handed on
    scores["a"][7] = 2e-13
    model = converted(net)
    register_importance(model, scores)
    mtn.utils.sort_parameters(model)
    assert order_of(model, "a") == [7, 5, *(i for i in reversed(range(24)) if i not in (5, 7))]
    for layer in ("stem", "c1", "c2", "fc"):
        assert order_of(model, layer) == list(reversed(range(hparam_of(model, layer).max)))


def test_sorted_model_is_scored_as_it_is_now() -> None:
    net, data = network(), batches()
    model = converted(net)
    register_importance(model, scored(net))
    mtn.utils.sort_parameters(model)
    before = {layer: order_of(model, layer) for layers in Net.COUPLED for layer in layers}
    register_importance(model, scored)  # of a model whose channels are in another order than stored
    mtn.utils.sort_parameters(model)
    assert {layer: order_of(model, layer) for layer in before} == before
    register_importance(model, lambda m: {name: values.flip(0) for name, values in scored(m).items()})
    mtn.utils.sort_parameters(model)
    values = torch.empty(24, dtype=torch.float64)
    values[before["a"]] = formula(net, data)["a"][before["a"]].flip(0)
    assert order_of(model, "a") == descending(values) != before["a"]
    torch.testing.assert_close(model(data[0]), net(data[0]), rtol=1e-12, atol=1e-14)


def test_function_sees_the_largest_subnet() -> None:
    net = network()
    model = converted(net)
    small = mtn.utils.sample(model, min)
    seen = []

    def score(m: nn.Module) -> dict[str, Tensor]:
        seen.append(m.get_submodule("a").out_channels)
        with warnings.catch_warnings():  # a subnet was chosen, and no data came to calibrate batch norms with
            warnings.simplefilter("ignore", UserWarning)
            return scored(m)

    register_importance(model, score)
    assert seen == [24]
    assert mtn.utils.get_subnet_config(model) == small
    mtn.utils.sample(model, max)
    mtn.utils.sort_parameters(model)
    assert order_of(model, "a") == descending(formula(net, batches())["a"])


def test_subnets_keep_the_channels_with_the_highest_scores() -> None:
    net = network()
    want = formula(net, batches())
    model = converted(net)
    register_importance(model, scored(net))
    mtn.utils.sort_parameters(model)
    mtn.utils.select(model, {"a.out_channels": 6, "d.in_channels": 16}, strict=False)
    pruned: Any = mtn.export(model)
    assert type(pruned.a) is nn.Conv2d
    assert torch.equal(pruned.a.bias, net.a.bias[descending(want["a"])[:6]])
    assert torch.equal(pruned.c1.bias, net.c1.bias[descending(want["c1"])[:6]])
    assert torch.equal(pruned.c2.bias, net.c2.bias[descending(want["c2"])[:10]])


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "googlenet"])
def test_models_of_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    net = getattr(models, name)(weights=None, **options).double().eval()
    data = [torch.randn(2, 3, 48, 40, dtype=torch.float64)]
    want = formula(net, data)
    model = mtn.convert(copy.deepcopy(net), "fastnas")  # with the rules of ModelOpt: multiples of 32
    register_importance(model, idap.flow_divergence(net, idap.profile(net, data)))
    mtn.utils.sort_parameters(model)
    configurable = {id(hparam) for _, hparam in named_hparams(model, configurable=True)}
    configurable |= {
        id(part) for _, h in named_hparams(model, configurable=True) for part in getattr(h, "_inputs", ())
    }
    coupled: dict[int, list[str]] = {}
    for layer in want:
        if hasattr(model.get_submodule(layer), "get_hparam") and id(hparam_of(model, layer)) in configurable:
            coupled.setdefault(id(hparam_of(model, layer)), []).append(layer)
    assert len(coupled) > 5
    for layers in coupled.values():
        best = descending(torch.stack([want[layer] for layer in layers]).mean(0))
        assert order_of(model, layers[0]) == best, layers
    torch.testing.assert_close(model(data[0]), net(data[0]))


class Unsortable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, 8, 3)
        self.norm = nn.GroupNorm(2, 8)
        self.grouped = nn.Conv1d(8, 8, 1, groups=2)
        self.second = nn.Conv1d(8, 12, 1)
        self.third = nn.Conv1d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.grouped(self.norm(self.first(x)).relu()).relu()).relu())


def test_what_is_skipped_is_listed() -> None:
    net = Unsortable().eval()
    rules = {**RULES, "nn.GroupNorm": {"*": {"channels_ratio": [0.5, 1.0], "channel_divisor": 1}}}
    x = torch.randn(2, 2, 9)
    scores = idap.flow_divergence(net, idap.profile(net, [x]))
    model = mtn.convert(copy.deepcopy(net), [("fastnas", rules)])
    registered, skipped = register_importance(model, scores)
    assert registered == ["second.out_channels"]
    assert list(skipped) == ["first.out_channels"]
    assert "cannot sort" in skipped["first.out_channels"]
    mtn.utils.sort_parameters(model)
    assert order_of(model, "first") == list(range(8))
    assert order_of(model, "second") == descending(scores["second"])
    torch.testing.assert_close(model(x), net(x))


def test_autonas_and_a_wrapped_model() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(x).relu()

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.blocks = nn.Sequential(Block(), Block(), Block())
            self.last = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.blocks(self.stem(x)))

    net = Deep().double().eval()
    rules = {**RULES, "nn.Sequential": {"*": {"min_depth": 1}}}
    model = mtn.convert(copy.deepcopy(net), [("autonas", rules)])
    registered, skipped = register_importance(nn.DataParallel(model), scored(net))
    assert skipped == {"blocks.depth": "it does not stand for channels"}
    assert registered == ["stem.out_channels"]
    mtn.utils.sort_parameters(model)
    want = formula(net, batches())
    layers = ("stem", "blocks.0.conv", "blocks.1.conv", "blocks.2.conv")
    assert order_of(model, "stem") == descending(torch.stack([want[layer] for layer in layers]).mean(0))


def test_hparam_without_scores_keeps_its_own_importance() -> None:
    net = network()
    scores = scored(net)
    plain, model = converted(net), converted(net)
    del scores["a"], scores["c1"], scores["b"]
    registered, skipped = register_importance(model, scores)
    assert "a.out_channels" not in registered
    assert skipped["a.out_channels"] == "no scores for a"
    assert skipped["d.in_channels"] == "no scores for c1"
    mtn.utils.sort_parameters(plain)
    mtn.utils.sort_parameters(model)
    assert order_of(model, "a") == order_of(plain, "a")
    assert order_of(model, "c1") == list(range(12))
    assert order_of(model, "c2") == descending(scores["c2"])
    assert order_of(model, "stem") == descending((scores["stem"] + scores["dw"]) / 2)


def test_depthwise_convolution_behind_a_concatenation() -> None:
    class Cat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 12, 1)
            # ModelOpt cannot convert a depthwise convolution that is the first to read a concatenation.
            self.side, self.dw = nn.Conv2d(20, 4, 1), nn.Conv2d(20, 20, 3, padding=1, groups=20)
            self.out = nn.Conv2d(20, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.a(x), self.b(x)], 1).relu()
            return self.side(x) + self.out(self.dw(x).relu())

    net = Cat().double().eval()
    want = formula(net, batches())
    model = converted(net)
    register_importance(model, scored(net))
    mtn.utils.sort_parameters(model)
    for layer, part in (("a", want["dw"][:8]), ("b", want["dw"][8:])):
        assert order_of(model, layer) == descending((want[layer] + part) / 2)
    torch.testing.assert_close(model(batches()[0]), net(batches()[0]), rtol=1e-12, atol=1e-14)


def test_model_can_be_copied_and_its_hparams_pickled() -> None:
    model = converted(network())
    register_importance(model, scored)
    hparam = hparam_of(copy.deepcopy(model), "a")
    assert torch.equal(hparam.importance, hparam_of(model, "a").importance)
    assert torch.equal(pickle.loads(pickle.dumps(hparam)).importance, hparam.importance)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: {**s, "a": s["a"][:5]}, InvalidInputError, "'a'"),
        (lambda s: {**s, "nowhere": s["a"]}, InvalidInputError, "'nowhere'"),
        (lambda s: {**s, "a": s["a"] * torch.nan}, NonFiniteError, "'a'"),
        (lambda s: {}, InvalidInputError, "reach none"),
        (lambda s: [1, 2], InvalidInputError, "list"),
    ],
)
def test_wrong_scores_change_nothing(
    change: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    net = network()
    plain, model = converted(net), converted(net)
    with pytest.raises(error, match=message):
        register_importance(model, change(scored(net)))
    mtn.utils.sort_parameters(plain)
    mtn.utils.sort_parameters(model)
    for layers in Net.COUPLED:
        assert order_of(model, layers[0]) == order_of(plain, layers[0])


def test_wrong_models() -> None:
    net = network()
    with pytest.raises(InvalidInputError, match=r"mtn\.convert"):
        register_importance(net, scored(net))
    with pytest.raises(InvalidInputError, match="wanted a module"):
        register_importance("net", {})  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="reduction"):
        register_importance(converted(net), scored(net), reduction="median")
    fixed = converted(net)
    for _, hparam in named_hparams(fixed, configurable=True):
        hparam.choices = [hparam.original]
    with pytest.raises(InvalidInputError, match="no configurable hparam"):
        register_importance(fixed, scored(net))


# ------------------------------------------------------------------------------------------------
# prune
# ------------------------------------------------------------------------------------------------


def config(net: nn.Module, data: list[Tensor], evaluations: list[int] | None = None) -> dict[str, Any]:
    with torch.no_grad():
        want = [net(batch) for batch in data]

    def score(model: nn.Module) -> float:
        if evaluations is not None:
            evaluations.append(1)
        with torch.no_grad():
            return -float(sum((model(x) - y).square().sum() for x, y in zip(data, want, strict=True)))

    return {"score_func": score, "verbose": False, "num_iters": 20}


def test_prune_end_to_end_and_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    net, data = network(), batches()
    evaluations: list[int] = []
    model: Any = copy.deepcopy(net)
    result, state = prune(
        model, MODE, {"flops": "50%"}, data[0][:1], config(net, data, evaluations), batches=data
    )
    assert result is model
    assert evaluations
    assert state["best"]["is_satisfied"]
    assert idap.count_macs(model, data[0][:1]) <= 0.5 * idap.count_macs(net, data[0][:1])
    want = formula(net, data)
    for layers in Net.COUPLED:
        best = descending(torch.stack([want[layer] for layer in layers]).mean(0))
        for layer in layers:
            module = model.get_submodule(layer)
            assert type(module) is type(net.get_submodule(layer))
            assert torch.equal(module.bias, net.get_submodule(layer).bias[best[: len(module.bias)]])
    assert any(
        len(model.get_submodule(layers[0]).bias) < len(net.get_submodule(layers[0]).bias)
        for layers in Net.COUPLED
    )

    first: Any = copy.deepcopy(model)
    want = formula(first, data)
    again: Any = prune(model, MODE, {"flops": "80%"}, data[0][:1], config(model, data), batches=data)[0]
    assert idap.count_macs(again, data[0][:1]) <= 0.8 * idap.count_macs(first, data[0][:1])
    assert torch.equal(again.a.bias, first.a.bias[descending(want["a"])[: len(again.a.bias)]])
    assert not list(tmp_path.iterdir())


def test_prune_takes_any_criterion_and_labelled_batches() -> None:
    net, data = network(), batches()
    model: Any = copy.deepcopy(net)
    prune(
        model,
        MODE,
        {"params": "50%"},
        data[0][:1],
        config(net, data),
        batches=[(x, torch.zeros(len(x))) for x in data],
        criterion=criteria.weight_l1,
        forward=lambda m, batch: m(batch[0]),
    )
    sums = filters(net.a).abs().sum(1)
    assert len(model.a.bias) < 24
    assert torch.equal(model.a.bias, net.a.bias[descending(sums)[: len(model.a.bias)]])
    assert idap.count_params(model) <= 0.5 * idap.count_params(net)


def test_prune_warns_about_channels_that_are_not_ranked() -> None:
    net = Unsortable().eval()
    x = torch.randn(2, 2, 9)
    rules = {**RULES, "nn.GroupNorm": {"*": {"channels_ratio": [0.5, 1.0], "channel_divisor": 1}}}
    with pytest.warns(UserWarning, match=r"first\.out_channels: ModelOpt cannot sort it"):
        prune(net, [("fastnas", rules)], {"flops": "60%"}, x[:1], config(net, [x]), batches=[x])


def test_prune_leaves_the_model_alone_when_it_cannot_score(monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = network(), batches()
    arguments = (MODE, {"flops": "50%"}, data[0][:1], config(net, data))
    with pytest.raises(NonFiniteError, match="stem"):
        prune(net, *arguments, batches=[data[0] * torch.nan])
    with pytest.raises(EmptyDataError):
        prune(net, *arguments, batches=[])
    with pytest.raises(InvalidInputError, match="reduction"):
        prune(net, *arguments, batches=data, reduction="median")
    monkeypatch.delattr("torchprofile.profile.handlers")
    with pytest.raises(ImportError, match=r"torchprofile==0\.0\.4"):
        prune(net, *arguments, batches=data)
    monkeypatch.setitem(sys.modules, "torchprofile.profile", None)
    with pytest.raises(ImportError, match=r"torchprofile==0\.0\.4"):
        prune(net, *arguments, batches=data)
    assert {type(module) for module in net.modules()} == {type(module) for module in Net().modules()}
    with pytest.raises(InvalidInputError, match="already"):
        prune(converted(net), *arguments, batches=data)


def test_mtp_prune_has_no_place_for_scores() -> None:
    """What the module's text says of ``mtp.prune``: its score function first runs after the sort."""
    net, data = network(), batches()
    states = []
    own = config(net, data)
    score = own["score_func"]

    def watching(model: nn.Module) -> float:
        states.append(isinstance(hparam_of(model, "a").active_slice, slice))
        return score(model)

    mtp.prune(copy.deepcopy(net), MODE, {"flops": "50%"}, data[0][:1], {**own, "score_func": watching})
    assert states[0] is False


# ------------------------------------------------------------------------------------------------
# ChannelStatsHook
# ------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    "conv1d": (lambda: nn.Conv1d(3, 5, 3), [(2, 3, 11), (3, 3, 11)]),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), [(2, 4, 5, 7), (1, 4, 5, 7)]),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), [(2, 4, 5, 7)]),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), [(2, 4, 3, 5)]),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), [(2, 4, 3, 5)]),
    "tokens": (lambda: nn.Linear(6, 7), [(2, 9, 6), (4, 9, 6)]),
    "features": (lambda: nn.Linear(6, 7), [(5, 6)]),
}


def by_channel(layer: nn.Module, x: Tensor) -> Tensor:
    """(B, C, S) in float64."""
    x = x.detach().double()
    if isinstance(layer, nn.modules.conv._ConvNd):
        return x.flatten(2)
    return x[:, None].transpose(1, -1).flatten(2) if x.dim() == 2 else x.flatten(1, -2).transpose(1, 2)


def weights_of(layer: Any, side: str) -> Tensor:
    """``||W_k||`` from the matrix of a layer's Jacobian, which holds each weight as often as it is used."""
    weight, groups = layer.weight.detach().double(), getattr(layer, "groups", 1)
    transposed = isinstance(layer, nn.ConvTranspose2d)
    ins = layer.in_channels if isinstance(layer, nn.modules.conv._ConvNd) else layer.in_features
    outs = layer.out_channels if isinstance(layer, nn.modules.conv._ConvNd) else layer.out_features
    table = torch.zeros(outs, ins, dtype=torch.float64)
    for o in range(outs):
        for i in range(ins):
            if o // (outs // groups) != i // (ins // groups):
                continue
            kernel = weight[i, o % (outs // groups)] if transposed else weight[o, i % (ins // groups)]
            table[o, i] = kernel.square().sum()
    return table.sum(1 if side == "output" else 0).sqrt()


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("kind", LAYERS)
def test_hook_gives_flow_divergence(kind: str, side: str) -> None:
    make, shapes = LAYERS[kind]
    layer = make()
    hook = ChannelStatsHook(layer, side=side)
    assert isinstance(hook, ForwardHook)
    handle = layer.register_forward_hook(hook)
    read = []
    for shape in shapes:
        x = torch.randn(shape)
        y = layer(x)
        read.append(by_channel(layer, y if side == "output" else x))
    handle.remove()
    seen = torch.cat(read)
    flow = seen.relu().square().sum(2).sqrt().mean(0)
    want = flow * weights_of(layer, side) / (seen.shape[1] * seen.shape[2])
    torch.testing.assert_close(hook.accumulate(), want, rtol=1e-5, atol=1e-12)
    assert hook.get_progress_info() == {"batches": len(shapes), "samples": len(seen)}


def test_hook_is_the_criterion_of_the_package() -> None:
    net, data = network(), batches()
    hooks = {name: ChannelStatsHook(net.get_submodule(name)) for name in scored(net)}
    handles = [net.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    for batch in data:
        net(batch)
    for handle in handles:
        handle.remove()
    model = converted(net)
    register_importance(model, {name: hook.accumulate() for name, hook in hooks.items()})
    mtn.utils.sort_parameters(model)
    assert order_of(model, "a") == descending(formula(net, data)["a"])


@pytest.mark.parametrize(
    ("statistic", "want"),
    [
        ("abs_mean", lambda y: y.abs().mean((0, 2))),
        ("var", lambda y: y.transpose(0, 1).flatten(1).var(1, unbiased=False)),
        ("positive_fraction", lambda y: (y > 0).double().mean((0, 2))),
        ("flow_norm", lambda y: nn.functional.silu(y).square().sum(2).sqrt().mean(0)),
        ("sample_abs_rms", lambda y: y.abs().mean(2).square().mean(0).sqrt()),
    ],
)
def test_hook_gives_any_statistic(statistic: str, want: Callable[[Tensor], Tensor]) -> None:
    layer = nn.Conv2d(3, 6, 3)
    hook = ChannelStatsHook(layer, statistic=statistic, activation="silu")
    layer.register_forward_hook(hook)
    y = torch.cat([layer(torch.randn(n, 3, 8, 6)) for n in (2, 3)]).detach().double().flatten(2)
    torch.testing.assert_close(hook.accumulate(), want(y), rtol=1e-5, atol=1e-12)
    score = hook.to_dict()["score"]
    assert hook.to_dict()["channels_importance_ascending"].tolist() == descending(score)[::-1]


def test_hook_reads_what_megatron_gives() -> None:
    """(sequence, batch, hidden), a tuple of output and bias, a weight that is not that of nn.Linear."""

    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 4))

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return x @ self.weight.T, None

    layer = Parallel()
    options = {"model": None, "block_config": None, "sample_dim": 1}
    own, entering = ChannelStatsHook(layer, options), ChannelStatsHook(layer, {**options, "side": "input"})
    layer.register_forward_hook(own)
    layer.register_forward_hook(entering)
    x = torch.randn(7, 3, 4)
    y = layer(x)[0].detach().double()
    layer(torch.empty(0, 3, 4))  # no token for this layer
    weight = layer.weight.detach().double()
    want = y.relu().square().sum(0).sqrt().mean(0) * weight.norm(dim=1) / (5 * 7)
    torch.testing.assert_close(own.accumulate(), want, rtol=1e-5, atol=1e-12)
    want = x.double().relu().square().sum(0).sqrt().mean(0) * weight.norm(dim=0) / (4 * 7)
    torch.testing.assert_close(entering.accumulate(), want, rtol=1e-5, atol=1e-12)


def test_hook_without_weights_and_without_batch() -> None:
    relu = nn.ReLU()
    hook = ChannelStatsHook(relu, activation="identity")
    relu.register_forward_hook(hook)
    x = torch.randn(6)
    relu(x)
    torch.testing.assert_close(hook.accumulate(), x.double().relu() / 6, rtol=1e-5, atol=1e-12)
    layer = nn.Conv1d(2, 3, 1)
    hook = ChannelStatsHook(layer, statistic="abs_mean")
    layer.register_forward_hook(hook)
    y = layer(torch.randn(2, 5))
    torch.testing.assert_close(hook.accumulate(), y.detach().double().abs().mean(1), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(5), (4, 5)),
        (nn.BatchNorm1d(5), (4, 5, 7)),
        (nn.BatchNorm2d(5), (2, 5, 3, 4)),
        (nn.InstanceNorm1d(5), (2, 5, 7)),
        (nn.InstanceNorm1d(5), (5, 7)),
        (nn.InstanceNorm2d(5, affine=True), (5, 3, 4)),
        (nn.InstanceNorm3d(5), (2, 5, 3, 4, 2)),
        (nn.GroupNorm(1, 5), (2, 5, 3, 4)),
    ],
    ids=lambda own: type(own).__name__ if isinstance(own, nn.Module) else "x".join(map(str, own)),
)
def test_hook_reads_channels_of_norms(layer: nn.Module, shape: tuple[int, ...], side: str) -> None:
    hook = ChannelStatsHook(layer, side=side)
    handle = layer.register_forward_hook(hook)
    x = torch.randn(shape)
    y = layer(x) if side == "output" else (layer(x), x)[1]
    handle.remove()
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm) and shape[0] == 5:
        y = y[None]
    y = y.detach().double().flatten(2) if y.dim() > 2 else y.detach().double()[:, :, None]
    want = y.relu().square().sum(2).sqrt().mean(0) / (5 * y.shape[2])
    torch.testing.assert_close(hook.accumulate(), want, rtol=1e-5, atol=1e-12)


def test_hook_takes_another_channel_dim() -> None:
    relu, x = nn.ReLU(), torch.randn(2, 5, 3, 4)
    for hook in (ChannelStatsHook(relu, channel_dim=1), ChannelStatsHook(relu, {"channel_dim": -3})):
        hook(relu, (x,), relu(x))
        want = x.double().relu().flatten(2).norm(dim=2).mean(0) / (5 * 12)
        torch.testing.assert_close(hook.accumulate(), want, rtol=1e-5, atol=1e-12)
    last = ChannelStatsHook(nn.GroupNorm(1, 5), statistic="abs_mean", channel_dim=-1)
    last(last.layer, (), x)
    torch.testing.assert_close(last.accumulate(), x.double().abs().mean((0, 1, 2)), rtol=1e-5, atol=1e-12)
    with pytest.raises(InvalidInputError, match="channel_dim"):
        ChannelStatsHook(relu, channel_dim=7)(relu, (x,), relu(x))


def test_hook_of_an_embedding_has_no_weights_of_channels() -> None:
    layer, ids = nn.Embedding(11, 6), torch.randint(11, (3, 7))
    hook = ChannelStatsHook(layer)
    layer.register_forward_hook(hook)
    y = layer(ids).detach().double()
    want = y.relu().square().sum(1).sqrt().mean(0) / (6 * 7)
    torch.testing.assert_close(hook.accumulate(), want, rtol=1e-5, atol=1e-12)
    assert torch.equal(hook.weight_norm(), torch.ones(6, dtype=torch.float64))


def test_hook_state_goes_through_modelopt_files(tmp_path: Path) -> None:
    layer = nn.Linear(4, 6)
    whole, first, second = (ChannelStatsHook(layer) for _ in range(3))
    parts = [torch.randn(3, 5, 4), torch.randn(2, 5, 4)]
    for hook, data in ((whole, parts), (first, parts[:1])):
        handle = layer.register_forward_hook(hook)
        for x in data:
            layer(x)
        handle.remove()
    ForwardHook.save_hook_states({"layer": first, "idle": second}, tmp_path)
    states = safe_load(tmp_path / "hook_states_rank_0.pth")  # weights only: no pickled code
    second.load_state_dict(states["idle"])
    assert second.stats is None
    second.load_state_dict(states["layer"])
    layer.register_forward_hook(second)
    layer(parts[1])
    torch.testing.assert_close(second.accumulate(), whole.accumulate(), rtol=1e-12, atol=0)
    assert second.get_progress_info() == whole.get_progress_info()
    assert first.get_progress_info() == {"batches": 1, "samples": 3}  # its own buffer, not a shared one


def test_hook_results_are_dumped_by_modelopt(tmp_path: Path) -> None:
    omegaconf = pytest.importorskip("omegaconf")
    layer = nn.Linear(4, 6)
    hook = ChannelStatsHook(layer)
    layer.register_forward_hook(hook)
    layer(torch.randn(3, 4))
    arguments = omegaconf.OmegaConf.create({"activation_hooks_kwargs": None})
    ForwardHook.dump_activations_logs({"layer": hook}, tmp_path, arguments)
    assert torch.equal(safe_load(tmp_path / "rank_0.pth")["layer"]["score"], hook.accumulate())


def test_hook_refuses_wrong_input() -> None:
    layer = nn.Linear(4, 6)
    hook = ChannelStatsHook(layer)
    with pytest.raises(EmptyDataError, match="Linear"):
        hook.accumulate()
    for options in (
        {"statistic": "median"},
        {"side": "left"},
        {"activation": "tanh"},
        {"channel_dim": "1"},
        {"sample_dim": None},
        {"channel_dim": True},
    ):
        with pytest.raises(InvalidInputError, match=next(iter(options))):
            ChannelStatsHook(layer, **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="wanted the module"):
        ChannelStatsHook("fc")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="no tensor"):
        hook(layer, (), None)
    with pytest.raises(InvalidInputError, match="lacks"):
        hook.load_state_dict({"stats": None})
    with pytest.raises(InvalidInputError, match="'input'"):
        hook.load_state_dict(ChannelStatsHook(layer, side="input").state_dict())
    hook(layer, (), torch.randn(3, 5))
    with pytest.raises(InvalidInputError, match="6 channels"):
        hook.accumulate()
    with pytest.raises(InvalidInputError, match="5 channels"):
        hook(layer, (), torch.randn(3, 6))
    hook = ChannelStatsHook(layer)
    hook(layer, (), torch.full((3, 6), torch.nan))
    with pytest.raises(NonFiniteError, match="Linear"):
        hook.accumulate()
