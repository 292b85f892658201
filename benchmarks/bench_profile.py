"""What a profile costs on top of the forward pass it rides on.

python benchmarks/bench_profile.py --device cpu --json benchmarks/results/profile-cpu.json

ResNet-50 with random weights, every convolution measured. Beside it, hooks that compute the same
statistics in eager PyTorch. Times are taken in turns within one run.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from peers import eager_channel_stats
from timing import environment, sample_times, write_json
from torch import Tensor, nn

import idap


def eager_profile(model: nn.Module, batch: Tensor, layers: list[str]) -> dict[str, Tensor]:
    """The same statistics from hooks in eager PyTorch."""
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def hook_for(name: str) -> Any:
        return lambda module, args, output: found.__setitem__(name, eager_channel_stats(output))

    handles = [modules[name].register_forward_hook(hook_for(name)) for name in layers]
    try:
        model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, help="default: 16 on the CPU, 64 on a GPU")
    parser.add_argument("--json", help="write the result to this file")
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: nothing was measured")
    from torchvision.models import resnet50

    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    batch_size = args.batch or (64 if args.device == "cuda" else 16)
    model = resnet50(weights=None).eval().to(args.device)
    x = torch.randn(batch_size, 3, 224, 224, device=args.device)
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]

    stats = idap.profile(model, [x], layers=layers, blocks=(), progress=False)
    for name, wanted in eager_profile(model, x, layers).items():
        got = stats.layers[name].state
        error = ((got - wanted.double()).abs().amax(1) / wanted.double().abs().amax(1).clamp_min(1e-30)).max()
        if not error < 1e-3:
            raise SystemExit(f"the statistics of {name} are wrong by {float(error):.1e}: nothing was timed")

    blocks = [block.name for block in idap.find_blocks(model, x[:1])]
    times = sample_times(
        {
            "forward": lambda: model(x),
            "profile": lambda: idap.profile(model, [x], layers=layers, blocks=(), progress=False),
            "profile_with_blocks": lambda: idap.profile(
                model, [x], layers=layers, blocks=blocks, progress=False
            ),
            "eager_hooks": lambda: eager_profile(model, x, layers),
        },
        device=args.device,
        rounds=args.rounds,
        seconds=0,
    )
    overhead = {name: t["ratio"] - 1 for name, t in times.items() if name != "forward"}
    for name, t in times.items():
        spread = f"(p10 {t['p10_us'] / 1e3:.1f}, p90 {t['p90_us'] / 1e3:.1f})"
        extra = f"  +{100 * overhead[name]:.1f} %" if name in overhead else ""
        print(f"{name:20s} {t['median_us'] / 1e3:9.1f} ms  {spread}{extra}")
    if args.json:
        write_json(
            args.json,
            {
                "environment": environment(args.device),
                "device": args.device,
                "model": "resnet50",
                "batch": batch_size,
                "layers": len(layers),
                "times": times,
                "overhead": overhead,
            },
        )


if __name__ == "__main__":
    main()
