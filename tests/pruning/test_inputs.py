"""Example inputs in every form, and the size of a model."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from idap import complexity, inputs
from idap.errors import EmptyDataError, InvalidInputError


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return x if y is None else x - y


A, B = torch.arange(6.0).view(3, 2), torch.ones(3, 2)


@pytest.mark.parametrize(
    ("example", "wanted"),
    [
        (A, A),
        ((A,), A),
        ((A, B), A - B),
        ([A, B], A - B),
        ({"x": A, "y": B}, A - B),
        (UserDict(y=A, x=B), B - A),
    ],
)
def test_call(example: object, wanted: Tensor) -> None:
    assert torch.equal(inputs.call(Two(), example), wanted)
    assert inputs.batch_size_of(example) == 3


@pytest.mark.parametrize("example", [3, None, "abc", {1: A}, {A}])
def test_unknown_forms(example: object) -> None:
    with pytest.raises(InvalidInputError, match="example inputs"):
        inputs.call(Two(), example)


def test_batch_size() -> None:
    assert inputs.batch_size_of({"scale": torch.tensor(2.0), "x": torch.zeros(4, 1)}) == 4
    with pytest.raises(EmptyDataError):
        inputs.batch_size_of(torch.zeros(0, 3))
    with pytest.raises(InvalidInputError):
        inputs.batch_size_of((torch.tensor(1.0),))


def test_nested_structures_keep_their_form() -> None:
    pair = namedtuple("pair", "left right")
    moved = inputs.to_device({"a": [A, (B, 3)], "b": pair(A, None)}, "meta")
    assert moved["a"][1][0].device.type == "meta"
    assert moved["a"][1][1] == 3
    assert isinstance(moved["b"], pair)


def test_outputs_of_any_kind() -> None:
    @dataclass
    class Output:
        logits: Tensor
        _private: int = 0

    grown = A.clone().requires_grad_(True) * 2
    for value, paths in (
        (grown, [""]),
        ((grown, None, [B]), ["[0]", "[2][0]"]),
        (OrderedDict(logits=grown, loss=B), ["['logits']", "['loss']"]),
        (Output(grown), [".logits"]),
    ):
        found = inputs.outputs_of(value)
        assert [path for path, _ in found] == paths
        assert not any(tensor.requires_grad for _, tensor in found)


def test_modes_are_put_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)).train()
    model[1].eval()
    seen = []

    def fail() -> None:
        with inputs.evaluating(model):
            seen.extend(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [False, False, False]
    assert model.training
    assert model[0].training
    assert not model[1].training


def test_a_model_that_cannot_be_copied() -> None:
    model = nn.Linear(2, 2)
    model.handle = (item for item in ())
    with pytest.raises(InvalidInputError, match="cannot be copied"):
        inputs.tracing_copy(model)


def test_counts() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 5)
    ).train()
    x = torch.randn(2, 3, 8, 8)
    assert complexity.count_params(model) == 3 * 8 * 9 + 16 + 8 * 36 * 5 + 5
    assert complexity.count_macs(model, x) == 2 * (36 * 3 * 8 * 9 + 8 * 36 * 5)
    assert model.training
    assert model[1].num_batches_tracked == 0
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    assert complexity.count_params(tied) == 16


def test_attention_is_counted_in_evaluation_mode_too() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    tokens, width, hidden = 5, 16, 32
    projections = tokens * width * width * 4 + tokens * width * hidden * 2
    scores = 2 * tokens * tokens * width
    enabled = torch.backends.mha.get_fastpath_enabled()
    assert complexity.count_macs(layer, torch.randn(1, tokens, width)) == projections + scores
    assert torch.backends.mha.get_fastpath_enabled() == enabled


def test_lists_of_images_are_batches_and_lists_of_features_are_not():
    pictures = [torch.zeros(3, 32, 40), torch.zeros(3, 24, 48)]
    assert inputs.images_of((pictures,)) is pictures
    assert inputs.batch_size_of((pictures,)) == 2
    features = [torch.zeros(3, 7, 6)] * 2
    assert inputs.images_of((features,)) is None
    assert inputs.batch_size_of((features,)) == 3
