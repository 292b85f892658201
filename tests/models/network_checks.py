"""What every network of the paper must show, on its small relative."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pruning_networks import randomise, relative_error, zeroed_outputs
from torch import Tensor, nn

import idap
from idap import inputs
from idap.models.architectures import Architecture
from idap.plan import PruningPlan


def wide(value: Any) -> Any:
    return inputs.map_tensors(value, lambda t: t.double() if t.is_floating_point() else t)


def outputs(model: nn.Module, example: Any) -> list[Tensor]:
    with torch.no_grad():
        return [tensor for _, tensor in inputs.outputs_of(inputs.call(model, example))]


@dataclass
class Pruned:
    """A small network in float64, its inputs, and what stage 1 makes of it with the paper's share."""

    architecture: Architecture
    model: nn.Module
    example: Any
    plan: PruningPlan
    network: nn.Module


def pruned(architecture: Architecture, prepare: Callable[[Any, Any], None] | None = None) -> Pruned:
    """The small network with random norms; ``prepare`` takes it and its inputs, and changes it in place."""
    torch.manual_seed(0)
    example = wide(architecture.small_inputs(2))
    model = randomise(architecture.small(), example).eval()
    if prepare is not None:
        prepare(model, example)
    scores = idap.flow_divergence(model, idap.profile(model, [example]))
    plan = idap.prune_filters(model, scores, example, macs=architecture.paper.share, round_to=4)
    return Pruned(architecture, model, example, plan, plan.apply(model))


def check_stage_1(own: Pruned) -> None:
    """Exact, as small as asked for, and of the same form."""
    assert own.plan.before is not None
    assert own.plan.after is not None
    assert own.plan.after.macs <= own.architecture.paper.share * own.plan.before.macs
    assert idap.count_macs(own.network, own.example) == own.plan.after.macs
    before, after = (inputs.call(m, own.example) for m in (own.model, own.network))
    assert type(before) is type(after)
    kinds = [[(path, t.shape, t.dtype) for path, t in inputs.outputs_of(value)] for value in (before, after)]
    assert kinds[0] == kinds[1]
    got = outputs(own.network, own.example)
    assert relative_error(outputs(own.model, own.example), got) > 1e-3, "nothing was removed that mattered"
    assert relative_error(zeroed_outputs(own.model, own.plan, own.example), got) <= 1e-10
    assert own.plan.exactness_error(own.model, own.example) <= 1e-10


def check_stage_2(own: Pruned, least: int, count: int) -> None:
    """At least so many residual blocks are found on the narrowed network, and go exactly."""
    blocks = [block.name for block in idap.find_blocks(own.network, own.example) if block.residual]
    assert len(blocks) >= least
    record = idap.profile(own.network, [own.example], blocks=blocks)
    divergences = idap.layer_divergence(own.network, record)
    plan = idap.truncate_layers(own.network, divergences, own.example, count=count)
    assert len(plan.removed_blocks) == count
    assert set(plan.removed_blocks) <= set(blocks)
    assert (own.plan + plan).exactness_error(own.model, own.example) <= 1e-10


def check_training(own: Pruned) -> None:
    """A step moves every parameter that has a part in the output, to finite values."""
    network = copy.deepcopy(own.network).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    loss = own.architecture.loss(network, own.example)
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    reached = [p for p in network.parameters() if p.grad is not None and bool(p.grad.any())]
    assert len(reached) > 0.5 * len(list(network.parameters()))
    assert all(torch.isfinite(p).all() for p in network.parameters())


def check_reload(pruned_networks: Iterable[Pruned], folder: Path) -> None:
    """All of them saved here and loaded in a new process, which finds the same bits."""
    jobs = []
    for own in pruned_networks:
        name = own.architecture.name
        idap.save(model=own.network, plan=own.plan, directory=folder / name)
        torch.save((own.example, outputs(own.network, own.example)), folder / f"{name}.pt")
        jobs.append((name, own.architecture.small.__module__, own.architecture.small.__qualname__))
    code = f"""
        import importlib, torch, idap
        from idap import inputs
        torch.set_num_threads({torch.get_num_threads()})
        for name, module, builder in {jobs!r}:
            factory = getattr(importlib.import_module(module), builder)
            network = idap.load({str(folder)!r} + "/" + name, lambda: factory().double())
            example, wanted = torch.load({str(folder)!r} + f"/{{name}}.pt")
            with torch.no_grad():
                found = [t for _, t in inputs.outputs_of(inputs.call(network, example))]
            assert len(found) == len(wanted), name
            assert all(torch.equal(a, b) for a, b in zip(found, wanted)), name
        print("same")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.stdout.strip() == "same", result.stderr


def meta_macs(architecture: Architecture) -> float:
    """Multiply-accumulates, in 10⁹, of the full network at batch 1, without its memory."""
    builder = next(iter(architecture.builders.values()))
    with torch.device("meta"):
        network = builder()
        example = architecture.inputs(1)
    return idap.count_macs(network, example) / 1e9
