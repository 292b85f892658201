"""ChannelImportance inside Torch-Pruning's own pruners, against the formula written out with hooks."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pruning_networks as networks
import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

import idap
from idap import criteria
from idap.errors import GraphError, InvalidInputError, NonFiniteError
from idap.integrations.torch_pruning import ChannelImportance

SEEN = (nn.modules.conv._ConvNd, nn.Linear)
OUT = {
    tp.prune_conv_out_channels,
    tp.prune_depthwise_conv_out_channels,
    tp.prune_linear_out_channels,
}


def formula(model: nn.Module, batches: list[Tensor]) -> dict[nn.Module, Tensor]:
    """(1 / (C S)) mean_b ||relu(Y[b, k])|| ||W_k|| of every layer, from outputs kept by hooks, in float64."""
    outputs: dict[nn.Module, list[Tensor]] = {}
    hooks = [
        module.register_forward_hook(
            lambda module, args, y: outputs.setdefault(module, []).append(y.detach())
        )
        for module in model.modules()
        if isinstance(module, SEEN)
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    scores = {}
    for module, parts in outputs.items():
        y = torch.cat(parts).double()
        y = y.movedim(1 if isinstance(module, nn.modules.conv._ConvNd) else -1, 1)
        y = y.flatten(2) if y.dim() > 2 else y[..., None]
        weight = module.weight.detach().double()
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            weight = weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
        norms = weight.flatten(1).square().sum(1).sqrt()
        scores[module] = y.relu().square().sum(2).sqrt().mean(0) * norms / (y.shape[1] * y.shape[2])
    return scores


class Plain(tp.importance.Importance):
    """The same question answered channel by channel."""

    def __init__(self, model: nn.Module, batches: list[Tensor]):
        self.scores = {module: score.tolist() for module, score in formula(model, batches).items()}

    def __call__(self, group: Any) -> Tensor | None:
        layers: dict[int, list[float]] = {root: [] for root in group[0].idxs}
        for item in group:
            if item.dep.handler in OUT and item.dep.target.module in self.scores:
                score = self.scores[item.dep.target.module]
                mine: dict[int, list[float]] = {}
                for channel, root in zip(item.idxs, item.root_idxs):
                    mine.setdefault(root, []).append(score[channel])
                for root, values in mine.items():
                    layers[root].append(sum(values) / len(values))
        if not any(layers.values()):
            return None
        total = torch.tensor([sum(values) / len(values) for values in layers.values()], dtype=torch.float64)
        return total / total.mean() + 1e-12 * torch.arange(len(total))  # dead channels go in their order


def prepared(kind: str) -> tuple[nn.Module, Tensor]:
    build, example = networks.SMALL[kind]
    torch.manual_seed(1)
    x = example()
    model = build().eval()
    networks.randomise(model, x)
    return model.double().eval(), x.double()


def pruned(
    model: nn.Module, x: Tensor, importance: Any, kind: type = tp.pruner.BasePruner, **options: Any
) -> Any:
    last = [module for module in model.modules() if isinstance(module, SEEN)][-1]
    options = {
        "pruning_ratio": 0.4,
        "in_channel_groups": {},
        "out_channel_groups": {},
        "num_heads": {},
    } | options
    pruner = kind(model, (x,), importance=importance, ignored_layers=[last], **options)
    for _ in range(options.get("iterative_steps", 1)):
        pruner.step()
    return pruner


def widths(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("ranking", ["local", "global", "isomorphic"])
@pytest.mark.parametrize("kind", networks.SMALL)
def test_the_same_channels_as_by_the_formula(kind, ranking):
    model, x = prepared(kind)
    options: dict[str, Any] = {"global_pruning": ranking != "local", "isomorphic": ranking == "isomorphic"}
    try:
        own = copy.deepcopy(model)
        pruned(own, x, tp.importance.MagnitudeImportance(), **options)
        own(x)
    except Exception as error:
        pytest.skip(f"Torch-Pruning's own importance fails on it: {type(error).__name__}: {error}")
    batches = [x, x.flip(0) * 0.7 + 0.1]
    other = copy.deepcopy(model)
    history = pruned(model, x, ChannelImportance(model, batches), **options).pruning_history()
    assert history == pruned(other, x, Plain(other, batches), **options).pruning_history()
    assert history
    assert widths(model) == widths(other)
    torch.testing.assert_close(model(x), other(x))


ATTENTIONS = {
    "fused": {"attn.qkv": 4},
    "separate": {"attn.query": 4, "attn.key": 4, "attn.value": 4},
}


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention(kind, heads):
    build, _ = networks.ATTENTION[kind]
    model = networks.randomise(build()).eval()
    x = torch.randn(2, 5, next(model.parameters()).shape[-1], dtype=torch.float64)
    other = copy.deepcopy(model)
    histories = []
    for net, importance in ((model, ChannelImportance(model, [x])), (other, Plain(other, [x]))):
        layers = dict(net.named_modules())
        options = {
            "num_heads": {layers[name]: number for name, number in ATTENTIONS[kind].items()},
            "prune_num_heads": heads,
            "prune_head_dims": not heads,
            "head_pruning_ratio": 0.5 if heads else 0.0,
        }
        pruner = pruned(net, x, importance, **options)
        histories.append(pruner.pruning_history())
        assert all(options["num_heads"][layers[name]] == (2 if heads else 4) for name in ATTENTIONS[kind])
    assert histories[0] == histories[1]
    attention = [entry for entry in histories[0] if entry[0].startswith("attn")]
    assert attention, "no channel of the attention was removed"
    assert widths(model) == widths(other)


CLASSIFIERS: list[tuple[str, str, int, dict[str, Any]]] = [
    ("torchvision", "resnet50", 32, {}),
    ("torchvision", "efficientnet_b4", 32, {}),
    ("torchvision", "mobilenet_v3_large", 32, {}),
    ("torchvision", "densenet121", 32, {}),
    ("torchvision", "convnext_small", 32, {}),
    ("torchvision", "vgg19_bn", 32, {}),
    ("torchvision", "inception_v3", 80, {"aux_logits": False, "init_weights": False}),
    ("torchvision", "efficientnet_v2_s", 32, {}),
    ("torchvision", "vit_b_16", 32, {"image_size": 32}),
    ("timm", "resnet50", 32, {}),
    ("timm", "efficientnet_b4", 32, {}),
    ("timm", "mobilenetv3_large_100", 32, {}),
    ("timm", "densenet121", 32, {}),
    ("timm", "convnext_small", 32, {}),
    ("timm", "vgg19_bn", 32, {}),
    ("timm", "inception_v3", 80, {}),
    ("timm", "efficientnetv2_s", 32, {}),
    ("timm", "vit_base_patch16_224", 32, {"img_size": 32}),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "name", "size", "options"), CLASSIFIERS, ids=[f"{lib}-{n}" for lib, n, _, _ in CLASSIFIERS]
)
def test_the_classifiers_of_the_paper(library, name, size, options):
    """All that Torch-Pruning prunes with its own scores (not ShuffleNetV2: its graph divides by zero)."""
    source = pytest.importorskip(library)
    build = source.models.get_model if library == "torchvision" else source.create_model
    model = build(name, **options).eval().double()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    nets = {"magnitude": copy.deepcopy(model), "formula": copy.deepcopy(model), "ours": model}
    histories, sizes = {}, {}
    for kind, net in nets.items():
        importance = {
            "magnitude": lambda net: tp.importance.MagnitudeImportance(),
            "formula": lambda net: Plain(net, [x]),
            "ours": lambda net: ChannelImportance(net, [x]),
        }[kind](net)
        attentions = {
            m.qkv: m.num_heads for m in net.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")
        }
        multihead = {m: m.num_heads for m in net.modules() if isinstance(m, nn.MultiheadAttention)}
        pruner = pruned(net, x, importance, round_to=8, num_heads=attentions, out_channel_groups=multihead)
        histories[kind], sizes[kind] = pruner.pruning_history(), widths(net)
        if kind == "ours":
            assert not importance.skipped
    assert histories["ours"] == histories["formula"]
    assert sizes["ours"] == sizes["magnitude"]
    assert sizes["ours"] != widths(build(name, **options))


def test_no_layer_before_a_flatten_is_skipped():
    """The last convolution before a classifier, which Torch-Pruning's activation importance loses."""
    model, x = prepared("flatten")
    before = model.conv2.out_channels
    pruned(model, x, ChannelImportance(model, [x]))
    assert model.conv2.out_channels == before - int(0.4 * before + 1)
    assert model.fc1.in_features == model.conv2.out_channels * 16
    model(x)


@pytest.mark.parametrize("ranking", ["local", "global"])
@pytest.mark.parametrize(
    "kind",
    [
        tp.pruner.BasePruner,
        tp.pruner.MetaPruner,
        tp.pruner.MagnitudePruner,
        tp.pruner.BNScalePruner,
        tp.pruner.GroupNormPruner,
        tp.pruner.GrowingRegPruner,
    ],
    ids=lambda kind: kind.__name__,
)
def test_every_pruner_in_steps_with_training_between(kind, ranking):
    model, x = prepared("residual")
    importance = ChannelImportance(model, [x])
    pruner = kind(
        model,
        (x,),
        importance=importance,
        global_pruning=ranking == "global",
        pruning_ratio=0.5,
        iterative_steps=3,
        ignored_layers=[model.fc],
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sizes = [sum(p.numel() for p in model.parameters())]
    for _ in range(3):
        model.train()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        pruner.update_regularizer()
        if kind.regularize is tp.pruner.BasePruner.regularize:
            pruner.regularize(model, loss=None)
        else:
            pruner.regularize(model)
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        model.eval()
        importance.refresh()  # regularizing asked for scores before the weights changed
        fresh = ChannelImportance(model, [x])
        for group in pruner.DG.get_all_groups(ignored_layers=[model.fc]):
            torch.testing.assert_close(importance(group), fresh(group), rtol=0, atol=0)
        pruner.step()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        sizes.append(sum(p.numel() for p in model.parameters()))
        assert model(x).isfinite().all()
    assert sizes == sorted(set(sizes), reverse=True)
    assert not importance.skipped


def test_scores_follow_the_pruned_model():
    model, x = prepared("chain")
    calls = []

    def scores(current: nn.Module) -> dict[str, Tensor]:
        assert current is model
        calls.append(current.conv1.out_channels)
        return idap.flow_divergence(current, idap.profile(current, [x], blocks=()))

    importance = ChannelImportance(model, scores=scores, normalize=None)
    pruner = pruned(model, x, importance, iterative_steps=3)
    assert len(calls) == 3
    assert calls == sorted(calls, reverse=True)
    group = next(g for g in pruner.DG.get_all_groups() if g[0].dep.target.module is model.conv2)
    importance(group)
    assert len(calls) == 4  # the last step pruned too
    importance(group)
    assert len(calls) == 4
    with torch.no_grad():
        model.conv2.weight[0] *= 1e3
    old = importance(group)
    importance.refresh()
    assert importance(group)[0] > 1e5 * old[0]  # the filter's norm and what it gives
    assert len(calls) == 5


def groups(model: nn.Module, x: Tensor) -> list[Any]:
    graph = tp.DependencyGraph().build_dependency(model, (x,))
    return list(graph.get_all_groups())


def test_length_and_order_of_a_part_of_a_group():
    model, x = prepared("residual")
    graph = tp.DependencyGraph().build_dependency(model, (x,))
    importance = ChannelImportance(model, [x], normalize=None)
    root, prune = model.b, tp.prune_conv_out_channels
    whole = importance(graph.get_pruning_group(root, prune, list(range(16))))
    part = importance(graph.get_pruning_group(root, prune, [9, 2, 14]))
    assert whole.shape == (16,)
    assert torch.equal(part, whole[[9, 2, 14]])


@pytest.mark.parametrize("name", [n for n in criteria.RIVALS if n != "random"])
def test_every_criterion_of_a_profile(name):
    model, x = prepared("chain")
    criterion = criteria.RIVALS[name]
    wanted = criterion(model, idap.profile(model, [x], blocks=()))
    importance = ChannelImportance(model, [x], criterion=criterion, normalize=None)
    for group in groups(model, x):
        layer = next(n for n, m in model.named_modules() if m is group[0].dep.target.module)
        torch.testing.assert_close(importance(group), wanted[layer].double())


def test_reductions_and_normalisation():
    model, x = prepared("residual")
    scores = {name: torch.rand(n, dtype=torch.float64) for name, n in (("project", 24), ("c", 20), ("d", 24))}
    [group] = [g for g in groups(model, x) if g[0].dep.target.module is model.project]
    rows = {n: scores[n] for n in ("project", "d")}
    table = torch.stack(list(rows.values()))
    for reduction, wanted in (("mean", table.mean(0)), ("sum", table.sum(0)), ("max", table.amax(0))):
        plain = ChannelImportance(model, scores=scores, reduction=reduction, normalize=None)(group)
        torch.testing.assert_close(plain, wanted)
        scaled = ChannelImportance(model, scores=scores, reduction=reduction)(group)
        torch.testing.assert_close(scaled, wanted / wanted.mean())


@pytest.mark.parametrize("constant", [0.0, 1.0, -3.0])
def test_ties_are_broken_by_order_and_global_ranking_takes_no_more_than_asked(constant):
    model, x = prepared("chain")
    scores = {
        name: torch.full((m.weight.shape[0],), constant)
        for name, m in model.named_modules()
        if hasattr(m, "stride")
    }
    importance = ChannelImportance(model, scores=scores)
    values = {g[0].dep.target.module: importance(g) for g in groups(model, x) if len(g[0].idxs) > 5}
    for value in values.values():
        assert (value.diff() > 0).all()
    assert values[model.conv1].max() < values[model.conv2].min()
    assert len(torch.cat(list(values.values())).unique()) == 16 + 24
    before = model.conv1.out_channels + model.conv2.out_channels
    pruner = pruned(model, x, importance, global_pruning=True, pruning_ratio=0.25, max_pruning_ratio=1.0)
    after = model.conv1.out_channels + model.conv2.out_channels
    assert before - after == before - int(before * 0.75)
    removed = {name: idxs for name, _, idxs in pruner.pruning_history() if idxs}
    assert removed == {"conv1": list(range(10))}


def test_dead_channels_go_first_and_one_by_one():
    model, x = prepared("chain")
    with torch.no_grad():
        model.conv1.weight[[1, 5, 6]] = 0
        model.conv1.bias[[1, 5, 6]] = -1
    pruner = pruned(model, x, ChannelImportance(model, [x]), global_pruning=True, pruning_ratio=0.05)
    assert [entry for entry in pruner.pruning_history() if entry[2]] == [["conv1", True, [1, 5]]]


def test_no_scores_no_removal_and_it_is_said():
    model, x = prepared("chain")
    importance = ChannelImportance(model, scores={"conv1": torch.rand(16)})
    with pytest.warns(UserWarning, match="'conv2' .Conv2d. has scores"):
        pruned(model, x, importance)
    assert list(importance.skipped) == ["conv2"]
    assert (model.conv1.out_channels, model.conv2.out_channels) == (9, 24)


def test_a_group_without_scores_is_warned_about_once():
    model, x = prepared("chain")
    importance = ChannelImportance(model, scores={"conv1": torch.rand(16)})
    [group] = [g for g in groups(model, x) if g[0].dep.target.module is model.conv2]
    with pytest.warns(UserWarning, match="conv2"):
        assert importance(group) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert importance(group) is None


def test_attention_scores_of_flow_divergence_are_left_alone():
    """Head scores stand under the name of the attention, which is no layer with a score a channel."""
    model = networks.SmallViT().eval()
    x = torch.randn(2, 3, 16, 16)
    scores = idap.flow_divergence(model, idap.profile(model, [x]))
    names = dict(model.named_modules())
    assert any(not isinstance(names[name], SEEN) for name in scores)
    importance = ChannelImportance(model, scores=scores)
    for group in groups(model, x):
        importance(group)


def test_unusable_arguments():
    model, x = prepared("chain")
    for arguments, word in (
        ({}, "neither"),
        ({"batches": [x], "scores": {}}, "both"),
        ({"batches": iter([x])}, "only once"),
        ({"batches": [x], "reduction": "median"}, "median"),
        ({"batches": [x], "normalize": "max"}, "normalize"),
    ):
        with pytest.raises(InvalidInputError, match=word):
            ChannelImportance(model, **arguments)
    with pytest.raises(InvalidInputError, match="Tensor"):
        ChannelImportance(x, [x])
    for arguments, word in (
        ({"batches": x}, "one tensor"),
        ({"scores": 3}, "got int"),
        ({"batches": [x], "criterion": "taylor"}, "'taylor'"),
    ):
        with pytest.raises(InvalidInputError, match=word):
            ChannelImportance(model, **arguments)


@pytest.mark.parametrize(
    ("scores", "error", "words"),
    [
        ({"conv1": torch.ones(15)}, InvalidInputError, r"conv1.*\(15,\)"),
        ({"nowhere": torch.ones(3)}, InvalidInputError, "nowhere"),
        ({}, InvalidInputError, "none of a convolution"),
        ({"conv2": torch.full((24,), float("nan"))}, NonFiniteError, "conv2"),
        (lambda model: 3, InvalidInputError, "int"),
    ],
)
def test_scores_that_do_not_fit(scores, error, words):
    model, x = prepared("chain")
    importance = ChannelImportance(model, scores=scores)
    with pytest.raises(error, match=words):
        importance(groups(model, x)[0])


def test_nan_activations_name_the_layer():
    model, x = prepared("chain")
    with torch.no_grad():
        model.conv2.weight[3] = torch.nan
    with pytest.raises(NonFiniteError, match="conv2"):
        pruned(model, x, ChannelImportance(model, [x]))


def test_scores_at_the_edges_of_double_precision_keep_their_order():
    model, x = prepared("chain")
    [group] = [g for g in groups(model, x) if g[0].dep.target.module is model.conv1]
    for low, high in ((5e-301, 8e-301), (1e-300, 1.0), (1e307, 1.7e308), (-1.7e308, -1e307), (-1.0, 1.0)):
        given = torch.linspace(0, 1, 16, dtype=torch.float64)[torch.randperm(16)] * (high - low) + low
        given[3] = given[5]
        for normalize in ("mean", None):
            value = ChannelImportance(model, scores={"conv1": given}, normalize=normalize)(group)
            assert value.isfinite().all()
            assert len(value.unique()) == 16
            assert torch.equal(value.argsort(), given.argsort(stable=True))


def test_channels_named_twice_and_none_at_all():
    model, x = prepared("residual")
    graph = tp.DependencyGraph().build_dependency(model, (x,))
    importance = ChannelImportance(model, [x], normalize=None)
    part = lambda idxs: importance(graph.get_pruning_group(model.b, tp.prune_conv_out_channels, idxs))
    assert torch.equal(part([3, 3, 5]), part([3, 5])[[0, 0, 1]])
    assert part([]).shape == (0,)


def test_batches_of_pairs_need_forward():
    model, x = prepared("chain")
    pairs = [(x, torch.zeros(len(x)))]
    importance = ChannelImportance(model, pairs, forward=lambda model, batch: model(batch[0]))
    plain = ChannelImportance(model, [x])
    for group in groups(model, x):
        assert torch.equal(importance(group), plain(group))


def test_a_group_made_before_the_pruning_is_refused():
    model, x = prepared("chain")
    importance = ChannelImportance(model, [x])
    graph = tp.DependencyGraph().build_dependency(model, (x,))
    old = graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, list(range(16)))
    graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, [0, 1]).prune()
    with pytest.raises(GraphError, match="channel 15 of 'conv1', which has 14"):
        importance(old)


def test_another_model_or_old_scores_are_refused():
    model, x = prepared("chain")
    importance = ChannelImportance(copy.deepcopy(model), [x])
    with pytest.raises(InvalidInputError, match="same object"):
        importance(groups(model, x)[0])
    importance(groups(importance.model, x)[0])
    with pytest.raises(InvalidInputError, match="same object"):
        importance(groups(model, x)[0])
    fixed = idap.flow_divergence(model, idap.profile(model, [x], blocks=()))
    importance = ChannelImportance(model, scores=fixed)
    with pytest.raises(InvalidInputError, match="pruned since"):
        pruned(model, x, importance, iterative_steps=2)
