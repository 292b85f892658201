from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import idap
from idap import criteria
from idap.errors import InvalidInputError

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
