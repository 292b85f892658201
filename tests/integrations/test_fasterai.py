"""fasterai's Sparsifier and Pruner choose the channels of the plain formula."""

from __future__ import annotations

import copy
import importlib
import sys

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("fasterai")

from fasterai.core.criteria import Normalizer, large_final
from fasterai.core.schedule import Schedule, sched_agp, sched_oneshot
from fasterai.prune.pruner import Pruner
from fasterai.sparse.sparsifier import Sparsifier

import idap
from idap.criteria import activation_mean, bn_scale, fpgm
from idap.errors import EmptyDataError, InvalidInputError, NonFiniteError
from idap.integrations.fasterai import ProfileCriteria

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # fastai's and torch-pruning's own
]


def filters_of(module: nn.Module) -> Tensor:
    """(out_channels, weights of a filter), written out for each kind of layer."""
    weight = module.weight.detach().double()
    if isinstance(module, (nn.ConvTranspose2d, nn.ConvTranspose1d)):
        g = module.groups
        per_group = weight.chunk(g, 0)  # (in / g, out / g, *) each
        return torch.cat([part.transpose(0, 1).flatten(1) for part in per_group])
    return weight.flatten(1)


def divergences(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """The formula of the method, from outputs kept by plain hooks, in float64."""
    kept: dict[str, list[Tensor]] = {}
    modules = {n: m for n, m in model.named_modules() if hasattr(m, "weight") and m.weight.dim() > 1}
    hooks = [
        m.register_forward_hook(lambda m, i, o, n=n: kept.setdefault(n, []).append(o.detach().double()))
        for n, m in modules.items()
    ]
    mode = model.training
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    model.train(mode)
    for hook in hooks:
        hook.remove()
    scores = {}
    for name, outputs in kept.items():
        y = torch.cat(outputs)
        y = y.flatten(2) if isinstance(modules[name], nn.modules.conv._ConvNd) else y[:, :, None]
        norms = y.relu().square().sum(2).sqrt().mean(0)
        scores[name] = norms * filters_of(modules[name]).norm(dim=1) / (y.shape[1] * y.shape[2])
    return scores


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 10, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.second = nn.Conv2d(10, 12, 3, stride=2)
        self.hidden = nn.Linear(12 * 9, 14)
        self.head = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = self.second(x).relu()
        return self.head(self.hidden(x.flatten(1)).relu())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.branch = nn.Conv2d(8, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.branch(self.depthwise(x).relu())
        return self.head(self.grouped(x.relu()).relu()).mean((2, 3))


def make(kind: type[nn.Module]) -> nn.Module:
    model = kind()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2)
                module.running_mean.normal_()
    return model


@pytest.fixture
def batches() -> list[Tensor]:
    return [torch.randn(4, 3, 8, 8), torch.randn(3, 3, 8, 8)]


def lowest(scores: Tensor, count: int) -> set[int]:
    return set(scores.argsort(stable=True)[:count].tolist())


def rest(width: int, removed: set[int]) -> list[int]:
    return [k for k in range(width) if k not in removed]


def test_scale_is_the_criterion(batches: list[Tensor]) -> None:
    model = make(Plain)
    criteria = ProfileCriteria()
    criteria.calibrate(model, batches)
    want = divergences(model, batches)
    assert {id(m) for m in criteria.scale} == {id(model.get_submodule(n)) for n in want}
    for name, scores in want.items():
        torch.testing.assert_close(criteria.scale[model.get_submodule(name)], scores, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "name", ["conv", "grouped", "depthwise", "transposed", "transposed_grouped", "linear"]
)
def test_scores_of_weights_and_filters(name: str) -> None:
    layers = {
        "conv": nn.Conv2d(6, 9, (3, 2)),
        "grouped": nn.Conv2d(6, 9, 3, groups=3),
        "depthwise": nn.Conv2d(6, 12, 3, groups=6),
        "transposed": nn.ConvTranspose2d(6, 9, 3),
        "transposed_grouped": nn.ConvTranspose2d(6, 9, 3, groups=3),
        "linear": nn.Linear(6, 9),
    }
    layer = layers[name]
    x = torch.randn(5, 6) if name == "linear" else torch.randn(5, 6, 7, 5)
    model = nn.Sequential(layer)
    criteria = ProfileCriteria()
    criteria.calibrate(model, x)
    d = divergences(model, [x])["0"]
    rows = filters_of(layer)
    # A filter's score is spread over its weights: shares in the layout of the weight, row by row.
    unit = d / rows.norm(dim=1)
    got = criteria(layer, "weight")
    assert got.shape == layer.weight.shape
    copied = copy.deepcopy(layer)
    copied.weight.data = got.float()
    torch.testing.assert_close(filters_of(copied), rows.abs() * unit[:, None], rtol=1e-5, atol=1e-12)
    outputs = criteria(layer, "row" if name == "linear" else "filter", squeeze=True)
    torch.testing.assert_close(outputs, d, rtol=1e-5, atol=0)
    inputs = criteria(layer, "column" if name == "linear" else "shared_kernel", squeeze=True)
    assert inputs.shape == (6,)
    assert not inputs.any()
    whole = criteria(layer, "layer")
    torch.testing.assert_close(whole.flatten(), d.square().sum().sqrt()[None], rtol=1e-5, atol=0)


@pytest.mark.parametrize("data", ["tensor", "pairs", "loader"])
def test_sparsifier_masks_the_lowest_filters(batches: list[Tensor], data: str) -> None:
    model = make(Plain).train()
    dataset = [(x, 0) for x in torch.cat(batches)]
    given = {
        "tensor": torch.cat(batches),
        "pairs": [(x, torch.zeros(len(x))) for x in batches],
        "loader": torch.utils.data.DataLoader(dataset, batch_size=4),
    }[data]
    want = divergences(model, batches)
    before = copy.deepcopy(model.state_dict())
    sparsifier = Sparsifier(model, "filter", "local", ProfileCriteria(), data=given)
    assert model.training
    torch.testing.assert_close(model.norm.running_mean, before["norm.running_mean"], rtol=0, atol=0)
    sparsifier.sparsify_model(0.5)
    for name, width in (("first", 10), ("second", 12)):
        removed = lowest(want[name], width // 2 - 1)  # the library keeps the filter at its threshold
        layer = model.get_submodule(name)
        dead = (layer.weight.flatten(1) == 0).all(1)
        assert set(dead.nonzero().flatten().tolist()) == removed
        assert not layer.bias[dead].any()
    sparsifier.sparsify_model(0.75)  # a second step: what was masked stays below
    for name, width in (("first", 10), ("second", 12)):
        dead = (model.get_submodule(name).weight.flatten(1) == 0).all(1)
        assert set(dead.nonzero().flatten().tolist()) == lowest(want[name], int(width * 0.75) - 1)


def test_sparsifier_globally_and_by_weight(batches: list[Tensor]) -> None:
    model = make(Plain)
    want = divergences(model, batches)
    flat = torch.cat([want["first"], want["second"]])
    Sparsifier(model, "filter", "global", ProfileCriteria(), data=batches).sparsify_model(0.5)
    dead = torch.cat([(layer.weight.flatten(1) == 0).all(1) for layer in (model.first, model.second)])
    assert set(dead.nonzero().flatten().tolist()) == lowest(flat, 10)

    model = make(Plain)
    want = divergences(model, batches)
    rows = filters_of(model.hidden)
    shares = rows.abs() * (want["hidden"] / rows.norm(dim=1))[:, None]
    sparsifier = Sparsifier(model, "weight", "local", ProfileCriteria(), layer_type=nn.Linear, data=batches)
    sparsifier.sparsify_model(0.3)
    threshold = shares.flatten().kthvalue(int(0.3 * shares.numel())).values
    assert torch.equal(model.hidden.weight == 0, shares < threshold * (1 - 1e-9))


def test_sparsifier_two_of_four(batches: list[Tensor]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
    sparsifier = Sparsifier(model, "weight", "local", ProfileCriteria(), nm=True, data=batches)
    magnitudes = model[2].weight.detach().abs()
    sparsifier.sparsify_layer(model[2], 0.5)
    # Within a filter the shares are those of magnitudes, and 2:4 compares within a filter alone.
    parts = magnitudes.unflatten(1, (-1, 4))
    want = parts >= parts.topk(2, dim=2).values[:, :, 1:]
    assert torch.equal(model[2].weight != 0, want.flatten(1, 2))


@pytest.mark.parametrize("context", ["local", "global"])
def test_pruner_removes_the_lowest_channels(batches: list[Tensor], context: str) -> None:
    model = make(Plain)
    want = divergences(model, batches)
    before = copy.deepcopy(model)
    criteria = ProfileCriteria()
    criteria.calibrate(model, batches)
    pruner = Pruner(
        model, 0.5, context, criteria, example_inputs=batches[0], ignored_layers=[model.head, model.hidden]
    )
    pruner.prune_model()
    if context == "local":
        gone = {"first": lowest(want["first"], 5), "second": lowest(want["second"], 6)}
    else:
        both = lowest(torch.cat([want["first"], want["second"]]), 11)
        gone = {"first": {k for k in both if k < 10}, "second": {k - 10 for k in both if k >= 10}}
    first, second = rest(10, gone["first"]), rest(12, gone["second"])
    assert torch.equal(model.first.weight, before.first.weight[first])
    assert torch.equal(model.norm.weight, before.norm.weight[first])
    assert torch.equal(model.second.weight, before.second.weight[second][:, first])
    columns = before.hidden.weight.unflatten(1, (12, 9))[:, second].flatten(1)  # across the flatten
    assert torch.equal(model.hidden.weight, columns)
    assert model(batches[0]).shape == (4, 5)


def test_pruner_on_coupled_channels(batches: list[Tensor]) -> None:
    model = make(Residual)
    want = divergences(model, batches)
    before = copy.deepcopy(model)
    criteria = ProfileCriteria()
    criteria.calibrate(model, batches)
    pruner = Pruner(model, 0.5, "local", criteria, example_inputs=batches[0], ignored_layers=[model.head])
    pruner.prune_model()
    # Two groups of the grouped convolution shrink alike: channels are compared by their place in a group.
    trunk = (want["stem"] + want["branch"]).view(2, 4).mean(0)
    kept = [k + 4 * g for g in range(2) for k in rest(4, lowest(trunk, 2))]
    assert torch.equal(model.stem.weight, before.stem.weight[kept])
    assert torch.equal(model.branch.weight, before.branch.weight[kept][:, kept])
    assert torch.equal(model.depthwise.weight, before.depthwise.weight[kept])
    inner = want["grouped"].view(2, 6).mean(0)
    outputs = [k + 6 * g for g in range(2) for k in rest(6, lowest(inner, 3))]
    assert torch.equal(model.head.weight, before.head.weight[:, outputs])
    assert model(batches[0]).shape == (4, 4)


def test_pruner_across_a_concatenation(batches: list[Tensor]) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Conv2d(3, 4, 1)
            self.right = nn.Conv2d(3, 6, 1)
            self.head = nn.Conv2d(10, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.left(x), self.right(x)], 1).relu())

    model = make(Joined)
    want = divergences(model, batches)
    columns = model.head.weight.detach().clone()
    criteria = ProfileCriteria()
    criteria.calibrate(model, batches)
    Pruner(
        model, 0.5, "local", criteria, example_inputs=batches[0], ignored_layers=[model.head]
    ).prune_model()
    kept = rest(4, lowest(want["left"], 2)) + [4 + k for k in rest(6, lowest(want["right"], 3))]
    assert torch.equal(model.head.weight, columns[:, kept])


def test_pruner_step_by_step(batches: list[Tensor]) -> None:
    """After a step that changes widths the scores are those of the pruned model."""
    model = make(Plain)
    criteria = ProfileCriteria()
    criteria.calibrate(model, [(x, None) for x in batches])
    pruner = Pruner(
        model,
        0.6,
        "local",
        criteria,
        example_inputs=batches[0],
        ignored_layers=[model.head, model.hidden],
        iterative_steps=2,
    )
    for width in (7, 4):
        want = divergences(model, batches)["first"]
        rows = model.first.weight.detach().clone()
        pruner.prune_model()
        assert model.first.out_channels == width
        assert torch.equal(model.first.weight, rows[rest(len(rows), lowest(want, len(rows) - width))])


def test_pruner_with_its_own_schedule_and_linear_outputs(batches: list[Tensor]) -> None:
    model = make(Plain)
    want = divergences(model, batches)["hidden"]
    rows = model.hidden.weight.detach().clone()
    criteria = ProfileCriteria(normalizer=Normalizer.max)
    criteria.calibrate(model, batches)
    schedule = Schedule(sched_oneshot)
    pruner = Pruner(
        model,
        0.5,
        "local",
        criteria,
        schedule=schedule,
        example_inputs=batches[0],
        ignored_layers=[model.first, model.second, model.head],
    )
    pruner.prune_model()
    assert torch.equal(model.hidden.weight, rows[rest(14, lowest(want, 7))])


def test_callbacks_in_a_training_loop(batches: list[Tensor]) -> None:
    """fastai's Learner with the library's own callbacks: masks while training, then real removal."""
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from fasterai.prune.prune_callback import PruneCallback
    from fasterai.sparse.sparsify_callback import SparsifyCallback

    images, labels = torch.randn(24, 3, 8, 8), torch.randint(5, (24,))
    samples = list(zip(images, labels, strict=True))
    loaders = DataLoaders(DataLoader(samples, bs=8), DataLoader(samples, bs=8))

    def learner() -> Learner:
        return Learner(loaders, make(Plain), loss_func=nn.CrossEntropyLoss())

    counts = []
    for criteria in (ProfileCriteria(), copy.deepcopy(large_final)):
        learn = learner()
        sparsify = SparsifyCallback(0.5, "filter", "local", criteria, Schedule(sched_agp))
        with learn.no_bar(), learn.no_logging():
            learn.fit(2, 1e-3, cbs=sparsify)
        layers = (learn.model.first, learn.model.second)
        counts.append([int((layer.weight.flatten(1) == 0).all(1).sum()) for layer in layers])
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0

    learn = learner()
    criteria = ProfileCriteria(n_batches=2)
    criteria.calibrate(learn.model, learn.dls.train)
    model = learn.model
    prune = PruneCallback(
        0.5,
        Schedule(sched_agp),
        "local",
        criteria,
        example_inputs=images[:2],
        ignored_layers=[model.head],
    )
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-3, cbs=prune)
    assert (model.first.out_channels, model.second.out_channels, model.hidden.out_features) == (5, 6, 7)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_other_criteria(batches: list[Tensor]) -> None:
    model = make(Plain)
    for criterion in (fpgm, activation_mean):
        criteria = ProfileCriteria(criterion)
        criteria.calibrate(model, batches)
        want = criterion(model, idap.profile(model, batches))
        for name, scores in want.items():
            torch.testing.assert_close(criteria.scale[model.get_submodule(name)], scores)
    criteria = ProfileCriteria(bn_scale(batches[0]))
    criteria.calibrate(model, batches)
    gamma = model.norm.weight.detach().double().abs()
    torch.testing.assert_close(criteria(model.first, "filter").flatten(), gamma)
    with pytest.raises(InvalidInputError, match="'second'"):
        criteria(model.second, "filter")


def test_ties_go_by_index_and_dead_filters_first(batches: list[Tensor]) -> None:
    model = make(Plain)
    with torch.no_grad():
        model.first.weight[[1, 4, 7]] = 0
        model.first.bias[[1, 4, 7]] = -1
        model.first.weight[2] = model.first.weight[3]
        model.first.bias[2] = model.first.bias[3]
    criteria = ProfileCriteria()
    criteria.calibrate(model, batches)
    scores = criteria(model.first, "filter").flatten()
    assert len(set(scores.tolist())) == 10
    assert scores.argsort()[:3].tolist() == [1, 4, 7]
    assert scores[2] < scores[3]
    Sparsifier(model, "filter", "local", criteria, data=batches).sparsify_model({"first": 0.3})
    assert not model.first.bias[[1, 4]].any()
    assert model.first.bias[7] != 0

    def constant(model: nn.Module, profile: idap.ActivationProfile) -> dict[str, Tensor]:
        return {name: torch.full((stats.channels,), -2.0) for name, stats in profile.layers.items()}

    criteria = ProfileCriteria(constant)
    criteria.calibrate(model, batches)
    assert criteria(model.second, "filter", squeeze=True).argsort().tolist() == list(range(12))


def test_filters_without_weights_keep_their_scores(batches: list[Tensor]) -> None:
    model = make(Plain)
    with torch.no_grad():
        model.first.weight[3] = 0
        model.first.bias[3] = 9
    criteria = ProfileCriteria(activation_mean)
    criteria.calibrate(model, batches)
    torch.testing.assert_close(criteria(model.first, "filter").flatten()[3].item(), 9.0)


def test_what_is_wrong_is_said(batches: list[Tensor]) -> None:
    model = make(Plain)
    criteria = ProfileCriteria()
    with pytest.raises(InvalidInputError, match="calibrate"):
        criteria(model.first, "filter")
    with pytest.raises(EmptyDataError):
        criteria.calibrate(model, [])
    with pytest.raises(InvalidInputError, match="int"):
        criteria.calibrate(model, 3)
    with pytest.raises(InvalidInputError, match=r"Plain has no Conv1d with filters; wanted .* layer_type"):
        criteria.calibrate(model, batches, nn.Conv1d)
    with pytest.raises(InvalidInputError, match="Conv1d or Conv3d"):
        criteria.calibrate(model, batches, (nn.Conv1d, nn.Conv3d))
    with pytest.raises(InvalidInputError, match="ReLU has no layer with filters"):
        criteria.calibrate(nn.ReLU(), batches)
    with pytest.raises(InvalidInputError, match="layer_type: got 'Conv2d'"):
        criteria.calibrate(model, batches, "Conv2d")
    with pytest.raises(InvalidInputError, match="criterion: got dict, wanted a function"):
        ProfileCriteria({"hidden": torch.ones(14)})
    for given in (None, [1.0]):
        with pytest.raises(InvalidInputError, match=f"got {type(given).__name__}, wanted a mapping"):
            ProfileCriteria(lambda m, p, given=given: given).calibrate(model, batches)
    with pytest.raises(InvalidInputError, match="'nowhere' is no layer"):
        ProfileCriteria(lambda m, p: {"nowhere": torch.ones(3)}).calibrate(model, batches)
    for wrong in (-1, 0, 2.0, True):
        with pytest.raises(InvalidInputError, match=f"n_batches: got {wrong!r}"):
            ProfileCriteria(n_batches=wrong)
        with pytest.raises(InvalidInputError, match=f"n_batches: got {wrong!r}"):
            criteria.calibrate(model, batches, n_batches=wrong)
    ProfileCriteria(lambda m, p: {"hidden": list(range(14))}).calibrate(model, batches)  # numbers will do
    with pytest.raises(NonFiniteError, match="'first'"):
        criteria.calibrate(model, [batches[0] * float("nan")])
    with pytest.raises(NonFiniteError, match="'hidden'"):
        ProfileCriteria(lambda m, p: {"hidden": torch.full((14,), float("nan"))}).calibrate(model, batches)
    with pytest.raises(InvalidInputError, match="'hidden'"):
        ProfileCriteria(lambda m, p: {"hidden": torch.zeros(3)}).calibrate(model, batches)
    criteria.calibrate(model, iter(batches), nn.Conv2d)
    with pytest.raises(InvalidInputError, match="'nonsense'"):
        criteria(model.first, "nonsense")
    with pytest.raises(InvalidInputError, match="layer_type"):
        criteria(model.hidden, "row")
    model.first = model.first  # the same object, another width: an iterator cannot be read again
    model.first.weight = nn.Parameter(model.first.weight[:5].detach())
    with pytest.raises(InvalidInputError, match="5 channels"):
        criteria(model.first, "filter")


def test_number_of_batches(batches: list[Tensor]) -> None:
    model, seen = make(Plain), []
    data = [torch.randn(2, 3, 8, 8) for _ in range(7)]
    criteria = ProfileCriteria(lambda m, p: seen.append(p.batches) or idap.flow_divergence(m, p))
    criteria.calibrate(model, data)
    criteria.calibrate(model, data, n_batches=3)
    ProfileCriteria(criteria.criterion, n_batches=None).calibrate(model, data)
    assert seen == [5, 3, 7]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["fasterai", "fasterai.core.criteria"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "idap.integrations.fasterai")
    with pytest.raises(ImportError, match="pip install fasterai"):
        importlib.import_module("idap.integrations.fasterai")
