"""The list of the paper's architectures: complete, buildable by name, printed by `idap models`."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from pruning_networks import randomise
from torch import Tensor, nn

import idap
from idap import inputs
from idap.cli import main
from idap.models.registry import ARCHITECTURES
from idap.models.resolve import resolve

from .network_checks import wide

WIDTHS = {"classification": 10, "detection": 3, "segmentation": 3, "generation": 3, "language": 3}


def test_there_are_the_22_networks_of_the_paper() -> None:
    assert Counter(own.task for own in ARCHITECTURES.values()) == WIDTHS
    timed = [own.name for own in ARCHITECTURES.values() if own.paper.speedup is not None]
    assert len(timed) == 19
    for own in ARCHITECTURES.values():
        assert own.builders
        if own.paper.gmacs is not None:
            assert own.paper.pruned_gmacs < own.paper.gmacs
            assert 0.1 < own.paper.share < 0.5
    both = [own.name for own in ARCHITECTURES.values() if {"torchvision", "timm"} <= set(own.builders)]
    assert len(both) == 9, "timm has no plain ShuffleNetV2"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_builders_reach_another_process_and_names_lead_to_them(name: str) -> None:
    for builder in ARCHITECTURES[name].builders.values():
        again = pickle.loads(pickle.dumps(builder))
        # Bound methods are equal only if they are of the same object.
        assert getattr(again, "__self__", again) == getattr(builder, "__self__", builder)
    assert pickle.loads(pickle.dumps(resolve(name))) == resolve(name)


def test_idap_models_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ARCHITECTURES)
    assert main(["models", "resnet50"]) == 0
    printed = capsys.readouterr().out
    assert "input: 3×224×224" in printed
    assert "1.98× on an RTX 3060" in printed
    assert main(["models", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in entries] == list(ARCHITECTURES)
    assert next(e for e in entries if e["name"] == "bert_base")["inputs"][0] == [1, 128]


def test_an_unknown_name_lists_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "resnet5"]) == 2
    assert "resnet50" in capsys.readouterr().err


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_profiles_in_one_pass_with_the_norms_are_those_of_torch(name: str) -> None:
    own = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = randomise(own.small()).double().eval()
    if not any(isinstance(module, nn.modules.batchnorm._NormBase) for module in model.modules()):
        pytest.skip("it has no batch norms")
    batches = [wide(own.small_inputs(2)) for _ in range(2)]
    made: dict[bool, list[list[Tensor]]] = {False: [], True: []}
    states = {}
    for fuse in made:

        def forward(m: nn.Module, batch: Any, outputs: list[list[Tensor]] = made[fuse]) -> None:
            outputs.append([tensor for _, tensor in inputs.outputs_of(inputs.call(m, batch))])

        torch.manual_seed(1)
        states[fuse] = idap.profile(
            model, batches, blocks=(), forward=forward, fuse=fuse, progress=False
        ).layers
    assert list(states[True]) == list(states[False])
    for layer, stats in states[False].items():
        torch.testing.assert_close(states[True][layer].state, stats.state, rtol=1e-9, atol=1e-9)
    for plain, ours in zip(made[False], made[True]):
        for a, b in zip(plain, ours):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
