"""What a profile costs on top of the forward pass it rides on.

python benchmarks/bench_profile.py --device cpu --json benchmarks/results/profile-cpu.json

ResNet-50 with random weights, every convolution measured, over a few batches; blocks and layers are found before.
Beside it, hooks that compute the same statistics in eager PyTorch. Times are taken in turns within one run. On a GPU
everything twice: with convolutions in float32, and in TF32, which is PyTorch's own choice there; and the forward pass
as a replayed CUDA graph, without and with the statistics.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peers import eager_channel_stats
from timing import environment, sample_times, write_json
from torch import Tensor, nn

import idap

LONG = 4  # a pass this many times as long tells the cost of a batch from that of a pass


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


def forward_graph(model: nn.Module, batch: Tensor) -> Callable[[Tensor], None]:
    """The forward pass as a replayed CUDA graph; its input is copied in, as every user of one has to."""
    given = batch.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what libraries allocate at their first call must not be captured
        for _ in range(3):
            model(given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(given)

    def run(x: Tensor) -> None:
        given.copy_(x)
        graph.replay()

    return run


def check(model: nn.Module, batch: Tensor, layers: list[str], **options: Any) -> None:
    """Stop unless a profile of three equal batches has the statistics of eager hooks."""
    stats = idap.profile(model, [batch] * 3, layers=layers, blocks=(), progress=False, **options)
    for name, wanted in eager_profile(model, batch, layers).items():
        got = stats.layers[name].state.clone()
        got[[0, 1, 3, 4, 5, 6, 7, 8]] /= 3  # counts and sums
        error = ((got - wanted.double()).abs().amax(1) / wanted.double().abs().amax(1).clamp_min(1e-30)).max()
        if not error < 1e-3:
            raise SystemExit(
                f"the statistics of {name} are wrong by {float(error):.1e} under {options}: nothing was timed"
            )


def measure(
    model: nn.Module, batches: list[Tensor], layers: list[str], blocks: list[str], device: str, rounds: int
) -> dict[str, Any]:
    """Times of one pass over the batches, and what they are over that of the forward passes alone."""

    def profile(batches: list[Tensor], blocks: Sequence[str] = (), **options: Any) -> Callable[[], object]:
        return lambda: idap.profile(model, batches, layers=layers, blocks=blocks, progress=False, **options)

    functions: dict[str, Callable[[], object]] = {
        "forward": lambda: [model(x) for x in batches],
        "profile": profile(batches, fuse=False),
        "profile_fused": profile(batches, fuse=True),
        "profile_with_blocks": profile(batches, blocks),
        "eager_hooks": lambda: [eager_profile(model, x, layers) for x in batches],
    }
    if device == "cuda":
        replay = forward_graph(model, batches[0])
        functions["forward_graph"] = lambda: [replay(x) for x in batches]
        functions["profile_graph"] = profile(batches, cuda_graph=True)
        functions["profile_fused_long"] = profile(batches * LONG)
        functions["profile_graph_long"] = profile(batches * LONG, cuda_graph=True)
    options: list[dict[str, Any]] = [{"fuse": False}, {"fuse": True}]
    for given in [*options, {"cuda_graph": True}] if device == "cuda" else options:
        check(model, batches[0], layers, **given)
    times = sample_times(functions, device=device, rounds=rounds, seconds=0)
    result: dict[str, Any] = {
        "times": times,
        "overhead": {
            n: t["ratio"] - 1 for n, t in times.items() if n != "forward" and not n.endswith("_long")
        },
    }
    if device == "cuda":
        forward = times["forward"]["median_us"] / len(batches)
        result["further_batch_us"] = further = {
            name: (times[f"{name}_long"]["median_us"] - times[name]["median_us"])
            / ((LONG - 1) * len(batches))
            for name in ("profile_fused", "profile_graph")
        }
        result["overhead_further_batch"] = {name: t / forward - 1 for name, t in further.items()}
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, help="default: 8 on the CPU, 64 on a GPU")
    parser.add_argument("--batches", type=int, help="of one pass; default: 4 on the CPU, 8 on a GPU")
    parser.add_argument("--size", type=int, default=224, help="of the images (default 224)")
    parser.add_argument("--json", help="write the result to this file")
    parser.add_argument("--rounds", type=int, help="default: 7 on the CPU, 11 on a GPU")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: nothing was measured")
    from torchvision.models import resnet50

    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    gpu = args.device == "cuda"
    batch = args.batch or (64 if gpu else 8)
    rounds = args.rounds or (11 if gpu else 7)
    model = resnet50(weights=None).eval().to(args.device)
    batches = [
        torch.randn(batch, 3, args.size, args.size, device=args.device)
        for _ in range(args.batches or (8 if gpu else 4))
    ]
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    blocks = [block.name for block in idap.find_blocks(model, batches[0][:1])]
    result: dict[str, Any] = {
        "environment": environment(args.device),
        "device": args.device,
        "model": "resnet50",
        "batch": batch,
        "batches": len(batches),
        "layers": len(layers),
    }
    before = torch.backends.cudnn.allow_tf32
    for precision in ("float32", "tf32") if gpu else ("float32",):
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = False
        measured = measure(model, batches, layers, blocks, args.device, rounds)
        print_times(precision, measured, len(batches))
        if precision == "float32":
            result.update(measured)
        else:
            result[precision] = measured
        if args.json:
            write_json(args.json, result)
    torch.backends.cudnn.allow_tf32 = before


def print_times(precision: str, measured: dict[str, Any], batches: int) -> None:
    print(f"{precision}, a pass over {batches} batches")
    for name, t in measured["times"].items():
        spread = f"(p10 {t['p10_us'] / 1e3:.1f}, p90 {t['p90_us'] / 1e3:.1f})"
        extra = measured["overhead"].get(name)
        text = "" if extra is None else f"  {100 * extra:+.1f} %"
        print(f"{name:20s} {t['median_us'] / 1e3:9.1f} ms  {spread}{text}", flush=True)
    for name, extra in measured.get("overhead_further_batch", {}).items():
        print(f"{name}, a further batch: {100 * extra:+.1f} % over its forward pass")


if __name__ == "__main__":
    main()
