from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import idap
from idap import criteria
from idap.errors import EmptyDataError, InvalidInputError, NonFiniteError

LAYERS = {
    "conv": (nn.Conv2d(3, 7, 3, bias=False), (4, 3, 8, 8)),
    "pointwise": (nn.Conv2d(3, 7, 1), (4, 3, 8, 8)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), (4, 6, 8, 8)),
    "grouped": (nn.Conv1d(6, 9, 3, groups=3), (4, 6, 12)),
    "transposed": (nn.ConvTranspose2d(4, 5, 2, stride=2), (3, 4, 6, 6)),
    "transposed_grouped": (nn.ConvTranspose2d(6, 4, 2, groups=2), (3, 6, 6, 6)),
    "conv3d": (nn.Conv3d(2, 5, 2), (2, 2, 4, 4, 4)),
    "linear": (nn.Linear(6, 5), (8, 6)),
    "tokens": (nn.Linear(6, 5), (4, 9, 6)),
}


def plain_divergence(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The formula as it is written, one filter at a time."""
    y = layer(x)
    channel_dim = -1 if isinstance(layer, nn.Linear) else 1
    y = y.movedim(channel_dim, 1).flatten(2) if y.dim() > 2 else y[..., None]
    _, channels, positions = y.shape
    scores = []
    for k in range(channels):
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            per_group = channels // layer.groups
            rows = layer.weight.unflatten(0, (layer.groups, -1))[k // per_group]
            weight = rows[:, k % per_group]
        else:
            weight = layer.weight[k]
        norm = sum(y[b, k].relu().norm() for b in range(len(y))) / len(y)
        scores.append(norm * weight.norm() / (channels * positions))
    return torch.stack(scores).detach()


@pytest.mark.parametrize("kind", LAYERS)
def test_flow_divergence_is_the_formula(kind):
    layer, shape = LAYERS[kind]
    layer, x = layer.double(), torch.randn(shape, dtype=torch.float64)
    model = nn.Sequential(layer)
    scores = idap.flow_divergence(model, idap.profile(model, x.split(1), blocks=()))
    torch.testing.assert_close(scores["0"], plain_divergence(layer, x))


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 100.0))
def test_scores_scale_with_the_activations(factor):
    model = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False)).double()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    once = idap.flow_divergence(model, idap.profile(model, [x], blocks=()))["0"]
    scaled = idap.flow_divergence(model, idap.profile(model, [factor * x], blocks=()))["0"]
    torch.testing.assert_close(scaled, factor * once)


def test_permuted_filters_have_permuted_scores_and_a_dead_one_has_none():
    layer = nn.Conv2d(3, 8, 3)
    x, order = torch.randn(4, 3, 6, 6), torch.randperm(8)
    with torch.no_grad():
        layer.bias[2] = -1e6
    model = nn.Sequential(layer)
    scores = idap.flow_divergence(model, idap.profile(model, [x], blocks=()))["0"]
    assert scores[2] == 0
    with torch.no_grad():
        layer.weight.copy_(layer.weight[order])
        layer.bias.copy_(layer.bias[order])
    permuted = idap.flow_divergence(model, idap.profile(model, [x], blocks=()))["0"]
    torch.testing.assert_close(permuted, scores[order])


def test_heads_add_up():
    # The divergence of a head has the energies of its channels in it; energies add over channels.
    y = torch.randn(3, 5, 12, dtype=torch.float64)
    layer = nn.Linear(12, 12, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.eye(12))
    model = nn.Sequential(layer)
    stats = idap.profile(model, [y], blocks=(), activation="identity").layers["0"]
    for b, head in enumerate(stats.flow_energy.view(3, 4).sum(1)):
        torch.testing.assert_close(head, y[..., 4 * b : 4 * b + 4].square().sum((1, 2)).mean())


def test_rivals_come_from_the_same_profile():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 1)).double()
    x = torch.randn(6, 3, 7, 7, dtype=torch.float64)
    p = idap.profile(model, [x], blocks=())
    y = model[0](x).detach().transpose(0, 1).flatten(1)
    close = torch.testing.assert_close
    w = model[0].weight.detach().flatten(1)
    close(criteria.weight_l1(model, p)["0"], w.abs().sum(1))
    close(criteria.weight_l2(model, p)["0"], w.norm(dim=1))
    close(criteria.activation_mean(model, p)["0"], y.abs().mean(1))
    close(criteria.activation_variance(model, p)["0"], y.var(1, correction=0))
    close(criteria.positive_fraction(model, p)["0"], (y > 0).double().mean(1))
    for rival in criteria.RIVALS.values():
        assert list(rival(model, p)) == ["0", "2"]


def test_a_filter_near_the_others_has_the_lowest_score_of_fpgm():
    layer = nn.Conv2d(2, 5, 3, bias=False).double()
    p = idap.profile(nn.Sequential(layer), [torch.randn(2, 2, 5, 5, dtype=torch.float64)], blocks=())
    with torch.no_grad():
        layer.weight[3] = layer.weight[[0, 1, 2, 4]].mean(0)
    scores = criteria.fpgm(nn.Sequential(layer), p)["0"]
    rows = layer.weight.detach().flatten(1)
    wanted = [sum((row - other).norm() for other in rows) for row in rows]
    torch.testing.assert_close(scores, torch.stack(wanted))
    assert scores.argmin() == 3
    with torch.no_grad():
        layer.weight += 7.0  # what all filters share does not count, unlike for their norms
    torch.testing.assert_close(criteria.fpgm(nn.Sequential(layer), p)["0"], scores)


def test_random_scores_depend_on_name_and_seed_alone():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1))
    x = torch.randn(2, 3, 6, 6)
    once = criteria.random_scores(model, idap.profile(model, [x], blocks=()))
    torch.manual_seed(5)
    alone = criteria.random_scores(model, idap.profile(model, [x + 1], layers=["1"], blocks=()))
    assert torch.equal(once["1"], alone["1"])
    assert not torch.equal(once["0"], once["1"])
    other = criteria.random_scores(model, idap.profile(model, [x], blocks=()), seed=1)
    assert not torch.equal(once["0"], other["0"])
    assert all(score.min() >= 0 and score.max() < 1 for score in once.values())


def _classifier():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4)
    ).double()


def test_taylor_is_the_formula():
    model = _classifier().train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    pairs = [(torch.randn(5, 3, 6, 6, dtype=torch.float64), torch.randint(4, (5,))) for _ in range(3)]
    p = idap.profile(model, [x for x, _ in pairs], blocks=())
    scores = criteria.taylor(pairs)(model, p)
    twin = _classifier().eval()
    wanted = {"0": 0.0, "4": 0.0}
    for x, y in pairs:
        twin.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        for name in wanted:
            weight = twin.get_submodule(name).weight
            wanted[name] += (weight * weight.grad).detach().square().flatten(1).sum(1) / len(pairs)
    for name, value in wanted.items():
        torch.testing.assert_close(scores[name], value)
    assert model.training
    assert all(not q.requires_grad and q.grad is None for q in model.parameters())
    assert torch.equal(model[1].running_mean, torch.zeros(6))


def test_taylor_of_a_linear_model_is_known_beforehand():
    # L = Σ_k a_k · w_k · x with a = (0, 1, 2): the score of neuron k is a_k² Σ_i (w_ki x_i)².
    layer = nn.Linear(4, 3, bias=False).double()
    x = torch.randn(1, 4, dtype=torch.float64)
    p = idap.profile(nn.Sequential(layer), [x], blocks=())
    target = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    scores = criteria.taylor([(x, target)], loss=lambda y, a: (y * a).sum())(nn.Sequential(layer), p)["0"]
    torch.testing.assert_close(scores, target[0] ** 2 * (layer.weight * x).detach().square().sum(1))
    assert scores[0] == 0


@pytest.mark.parametrize("name", ["transposed", "transposed_grouped", "grouped", "tokens"])
def test_taylor_has_a_score_for_every_filter(name):
    layer, shape = LAYERS[name]
    model, x = nn.Sequential(layer.float()), torch.randn(shape)
    p = idap.profile(model, [x], blocks=())
    scores = criteria.taylor([(x, 0)], loss=lambda y, _: y.square().sum())(model, p)["0"]
    assert scores.shape == (p.layers["0"].channels,)
    assert (scores > 0).all()


def test_taylor_reads_a_parametrised_weight():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3)), nn.Flatten())
    x = torch.randn(2, 3, 6, 6)
    p = idap.profile(model, [x], blocks=())
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten())
    plain[0].weight.data, plain[0].bias.data = model[0].weight.detach(), model[0].bias.detach()
    rival = criteria.taylor([(x, 0)], loss=lambda y, _: y.square().sum())
    torch.testing.assert_close(rival(model, p)["0"], rival(plain, p)["0"])


def test_taylor_refuses_what_it_cannot_use():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    x = torch.randn(2, 3, 3, 3)
    p = idap.profile(model, [x], blocks=())
    with pytest.raises(EmptyDataError, match="taylor"):
        criteria.taylor([])(model, p)
    with pytest.raises(InvalidInputError, match="pair"):
        criteria.taylor([x])(model, p)
    with pytest.raises(InvalidInputError, match=r"\(2, 4\)"):
        criteria.taylor([(x, 0)], loss=lambda y, _: y)(model, p)
    with pytest.raises(NonFiniteError, match="'0'"):
        criteria.taylor([(x, 0)], loss=lambda y, _: y.sum() * float("inf"))(model, p)


def test_bn_scale_reads_the_norm_behind_the_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(5)  # stands before its convolution in the list of modules
            self.conv = nn.Conv2d(3, 5, 3)
            self.late = nn.Conv2d(5, 4, 1)
            self.late_norm = nn.BatchNorm2d(4)
            self.plain = nn.BatchNorm2d(4, affine=False)
            self.last = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.late(self.norm(self.conv(x)).relu())
            return self.plain(self.last(self.late_norm(x.relu())))

    model, x = Net(), torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([1.0, -3.0, 0.0, 2.0, -0.5]))
    p = idap.profile(model, [x], blocks=())
    scores = criteria.bn_scale(x)(model, p)
    # The norm behind a ReLU and the one without scales say nothing about a filter.
    assert list(scores) == ["conv"]
    assert scores["conv"].tolist() == [1.0, 3.0, 0.0, 2.0, 0.5]
    bare = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(InvalidInputError, match="no layer of Sequential has a batch norm"):
        criteria.bn_scale(x)(bare, idap.profile(bare, [x], blocks=()))


def test_a_profile_of_another_model_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 5, 3))
    p = idap.profile(model, [torch.randn(1, 3, 5, 5)], blocks=())
    with pytest.raises(InvalidInputError, match="6 filters, the profile 5"):
        idap.flow_divergence(nn.Sequential(nn.Conv2d(3, 6, 3)), p)
    with pytest.raises(InvalidInputError, match="ReLU"):
        idap.flow_divergence(nn.Sequential(nn.ReLU()), p)
    with pytest.raises(InvalidInputError, match="not there"):
        idap.flow_divergence(nn.Identity(), p)


def test_block_divergence_of_an_identity_is_zero():
    class Block(nn.Module):
        def __init__(self, scale: float):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.scale = scale

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (1 + self.scale) + 0 * self.fc(x)

    model = nn.Sequential(Block(0.0), Block(0.5)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    p = idap.profile(model, [x], blocks=["0", "1"])
    values = idap.layer_divergence(model, p)
    assert values["0"] == 0
    assert values["1"] == pytest.approx(0.5)


def test_scores_leave_a_parametrised_model_as_it_was():
    layer = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3))
    model = nn.Sequential(layer).train()
    p = idap.profile(model, [torch.randn(2, 3, 6, 6)], blocks=())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    idap.flow_divergence(model, p)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize("wrong", [None, {}, [torch.randn(1, 3, 5, 5)]])
def test_what_is_no_profile_is_refused(wrong):
    model = nn.Sequential(nn.Conv2d(3, 5, 3))
    for criterion in (idap.flow_divergence, idap.layer_divergence):
        with pytest.raises(InvalidInputError, match=r"idap\.profile"):
            criterion(model, wrong)
