"""One pruning step without fine-tuning, against the way of the method's released code.

python benchmarks/bench_step.py --json benchmarks/results/step-cpu.json

Profile, rank, surgery and check of ResNet-50 (random weights) on 10 batches of 16. The released way: hooks that
compute the scores in eager PyTorch and send them to the host for every layer and batch, and a dependency graph
that is built anew for every layer that is pruned. The same share of filters goes in both. Deciding alone (scores
to plan) is timed on DenseNet-121 too.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from timing import environment, write_json
from torch import Tensor, nn

import idap


def released_step(model: nn.Module, batches: list[Tensor], ratio: float) -> nn.Module:
    """Scores from eager hooks, then one new dependency graph a pruned layer."""
    import torch_pruning as tp

    pruned = copy.deepcopy(model)
    layers = {name: m for name, m in pruned.named_modules() if isinstance(m, nn.Conv2d)}
    sums: dict[str, Tensor] = {}

    def hook_for(name: str) -> Any:
        def hook(module: nn.Conv2d, args: Any, output: Tensor) -> None:
            norms = torch.linalg.vector_norm(output.relu().flatten(2), dim=2).mean(0)
            filters = torch.linalg.vector_norm(module.weight.flatten(1), dim=1)
            score = norms * filters / output[0].numel()
            sums[name] = sums.get(name, torch.zeros(len(score))) + score.cpu()

        return hook

    handles = [layer.register_forward_hook(hook_for(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for batch in batches:
            pruned(batch)
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        scores = sums[name]
        if layer.out_channels != len(scores):
            continue  # cut with an earlier layer that it is coupled to
        lowest = scores.argsort()[: int(ratio * len(scores))].tolist()
        with torch.enable_grad():
            graph = tp.DependencyGraph().build_dependency(pruned, (batches[0][:1],))
        group = graph.get_pruning_group(layer, tp.prune_conv_out_channels, lowest)
        if lowest and graph.check_pruning_group(group):
            group.prune()
    with torch.no_grad():
        pruned.eval()(batches[0][:1])
    return pruned


def our_step(model: nn.Module, batches: list[Tensor], ratio: float) -> nn.Module:
    stats = idap.profile(model, batches, blocks=(), progress=False)
    plan = idap.prune_filters(model, idap.flow_divergence(model, stats), batches[0][:1], ratio=ratio)
    return plan.apply(model, batches[0][:1])


def in_turns(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call; the functions run one after the other in every round."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return times


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    return {
        name: {"median_s": statistics.median(t), "min_s": min(t), "max_s": max(t), "rounds": len(t)}
        for name, t in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the result to this file")
    args = parser.parse_args()
    from torchvision.models import densenet121, resnet50

    torch.manual_seed(0)
    model = resnet50(weights=None).eval()
    batches = [torch.randn(args.batch, 3, 224, 224) for _ in range(args.batches)]

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    times = in_turns(
        {
            "forward": forward,
            "idap": lambda: our_step(model, batches, args.ratio),
            "released": lambda: released_step(model, batches, args.ratio),
        },
        args.rounds,
    )
    whole = [theirs / ours for ours, theirs in zip(times["idap"], times["released"])]
    # Least times: the difference of two long ones would be the machine's noise.
    bare, ours, theirs = (min(times[name]) for name in ("forward", "idap", "released"))
    result: dict[str, Any] = {
        "environment": environment("cpu"),
        "model": "resnet50",
        "batches": args.batches,
        "batch": args.batch,
        "ratio": args.ratio,
        "times": summary(times),
        "speedup": statistics.median(whole),
        "speedup_beyond_forward": (theirs - bare) / (ours - bare),
    }
    dense = densenet121(weights=None).eval()
    image = torch.randn(2, 3, 224, 224)
    scores = idap.flow_divergence(dense, idap.profile(dense, [image], blocks=(), progress=False))
    deciding = in_turns({"decide": lambda: idap.prune_filters(dense, scores, image[:1], ratio=args.ratio)}, 5)
    result["densenet121"] = summary(deciding)["decide"]
    result["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for name, row in result["times"].items():
        print(f"{name:10s} {row['median_s']:7.2f} s  ({row['min_s']:.2f} to {row['max_s']:.2f})")
    print(f"released over idap: {result['speedup']:.2f}x; beyond the forward passes: ", end="")
    print(f"{result['speedup_beyond_forward']:.1f}x")
    print(f"deciding on DenseNet-121: {result['densenet121']['median_s']:.2f} s")
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
