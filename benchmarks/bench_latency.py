"""Batch-1 FP32 latency of ResNet-50, as it is and pruned, and the time that pruning it took.

python benchmarks/bench_latency.py --device cpu --json benchmarks/results/latency-cpu.json

Random weights: what is measured is the shape of the network, not its accuracy. Filters go by flow
divergence down to a share of the multiply-accumulates, then blocks by block divergence.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch
from timing import environment, write_json

import idap


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--macs", type=float, default=0.39, help="share of the MACs after stage 1 (default 0.39)"
    )
    parser.add_argument("--blocks", type=int, default=2, help="blocks to remove in stage 2 (default 2)")
    parser.add_argument("--warmup", type=int, help="default: 10 on the CPU, 100 on a GPU")
    parser.add_argument("--runs", type=int, help="default: 50 on the CPU, 500 on a GPU")
    parser.add_argument("--json", help="write the result to this file")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: nothing was measured")
    from torchvision.models import resnet50

    warmup = args.warmup or (100 if args.device == "cuda" else 10)
    runs = args.runs or (500 if args.device == "cuda" else 50)
    torch.manual_seed(0)
    base = resnet50(weights=None).eval().to(args.device)
    batches = [torch.randn(8, 3, 224, 224, device=args.device) for _ in range(2)]
    example = batches[0][:1]
    seconds: dict[str, float] = {}

    def timed(name: str, function: Any) -> Any:
        begin = time.perf_counter()
        result = function()
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - begin
        return result

    stats = timed("profile", lambda: idap.profile(base, batches, progress=False))
    scores = idap.flow_divergence(base, stats)
    plan = timed("decide_filters", lambda: idap.prune_filters(base, scores, example, macs=args.macs))
    narrow = timed("surgery", lambda: plan.apply(base, example))
    again = timed("profile_again", lambda: idap.profile(narrow, batches, layers=(), progress=False))
    divergences = idap.layer_divergence(narrow, again)
    cut = timed(
        "decide_blocks", lambda: idap.truncate_layers(narrow, divergences, example, count=args.blocks)
    )
    models = {"base": base, "filters": narrow, "filters+layers": cut.apply(narrow, example)}
    models = {name: copy.deepcopy(model).eval().to(args.device) for name, model in models.items()}
    compared = idap.compare_latency(models, example, warmup=warmup, runs=runs)
    result: dict[str, Any] = {
        "environment": environment(args.device),
        "device": args.device,
        "model": "resnet50",
        "batch": 1,
        "dtype": "float32",
        "mode": "eager",
        "warmup": warmup,
        "pruning_seconds": seconds,
        "models": {},
    }
    for name, model in models.items():
        latency = compared.stats[name]
        macs, params = idap.count_macs(model, example), idap.count_params(model)
        speedup = compared.speedup(name, "base")
        result["models"][name] = {
            "macs": macs,
            "params": params,
            "latency_ms": latency.to_dict(),
            "speedup": speedup,
        }
        print(
            f"{name:16s} {macs / 1e9:6.2f} GMACs {params / 1e6:6.2f} M  "
            f"{latency.median:7.2f} ms (p10 {latency.p10:.2f}, p90 {latency.p90:.2f})  {speedup:.2f}x"
        )
    print("pruning took, in seconds:", {name: round(s, 2) for name, s in seconds.items()})
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
