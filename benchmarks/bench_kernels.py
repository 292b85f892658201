"""Kernel throughput beside eager PyTorch, the released expression, torch.compile and, on a GPU, Triton's kernels.

python benchmarks/bench_kernels.py --device cpu --json benchmarks/results/kernels-cpu.json

Every case is checked against the reference before it is timed; a wrong result stops the run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from cases import Case, grid
from peers import eager_channel_stats, eager_filter_norms, eager_pair_stats, released_expression
from timing import environment, geometric_mean, sample_times, write_json
from torch import Tensor

from idap_kernels import available_backends, channel_stats, filter_norms, pair_stats


def check_close(got: Tensor, wanted: Tensor, scale: Tensor, what: str, tolerance: float = 2e-4) -> None:
    error = ((got.double() - wanted.double()).abs() / scale.double().clamp_min(1e-30)).max().item()
    if not error <= tolerance:
        raise SystemExit(f"{what} is wrong by {error:.2e} of its scale: nothing was timed")


def read_ceiling(x: Tensor) -> Callable[[], object] | None:
    """A function that reads the memory of ``x`` once, on the CPU; the copy on a GPU, read and written."""
    if x.device.type == "cuda":
        flat = x.as_strided((x.numel(),), (1,))
        target = torch.empty_like(flat)
        return lambda: target.copy_(flat)
    from idap_kernels.backends import cpu

    if cpu.unavailable() is not None:
        return None
    from idap_kernels import _cpu  # type: ignore[attr-defined]

    size = x.numel() * x.element_size() // 256 * 256
    return lambda: _cpu.read_memory(x.data_ptr(), size, torch.get_num_threads())


def triton_works(device: str) -> bool:
    """Whether Triton's kernels are timed beside those that ``auto`` takes: on a GPU where they run."""
    return device == "cuda" and available_backends()["triton"] is None


def bench_channel_stats(case: Case, device: str, seconds: float, compile_peer: bool) -> dict[str, Any]:
    x = case.make(device)
    dim = case.channel_dim
    ours = channel_stats(x, channel_dim=dim).state
    wanted = channel_stats(x, channel_dim=dim, backend="reference").state
    scale = wanted.abs().amax(dim=1, keepdim=True)
    scale[2] = scale[10]  # the mean lies near zero: the range is its scale
    check_close(ours, wanted, scale, f"channel_stats on {case.name}")
    functions: dict[str, Callable[[], object]] = {
        "idap": lambda: channel_stats(x, channel_dim=dim),
        "eager": lambda: eager_channel_stats(x, dim),
        "released": lambda: released_expression(x, dim),
    }
    if compile_peer:
        torch._dynamo.reset()
        compiled = torch.compile(eager_channel_stats, dynamic=False)
        functions["compile"] = lambda: compiled(x, dim)
    if triton_works(device):
        functions["triton"] = lambda: channel_stats(x, channel_dim=dim, backend="triton").state
    for name in ("eager", "compile", "triton"):
        if name in functions:
            got = functions[name]()
            assert isinstance(got, Tensor)
            check_close(got, wanted, scale, f"the {name} peer on {case.name}", 1e-3)
    ceiling = read_ceiling(x)
    if ceiling is not None:
        functions["ceiling"] = ceiling
    return summarize(case.name, case.nbytes, sample_times(functions, seconds=seconds, device=device), device)


def bench_pair_stats(case: Case, device: str, seconds: float, compile_peer: bool) -> dict[str, Any]:
    x, y = case.make(device, seed=0), case.make(device, seed=1)
    wanted = pair_stats(x, y, backend="reference").state
    check_close(pair_stats(x, y).state, wanted, wanted[0].expand_as(wanted), f"pair_stats on {case.name}")
    functions: dict[str, Callable[[], object]] = {
        "idap": lambda: pair_stats(x, y),
        "eager": lambda: eager_pair_stats(x, y),
    }
    if compile_peer:
        torch._dynamo.reset()
        compiled = torch.compile(eager_pair_stats, dynamic=False)
        functions["compile"] = lambda: compiled(x, y)
    if triton_works(device):
        functions["triton"] = lambda: pair_stats(x, y, backend="triton")
        got = pair_stats(x, y, backend="triton").state
        check_close(got, wanted, wanted[0].expand_as(wanted), f"Triton's pair_stats on {case.name}")
    times = sample_times(functions, seconds=seconds, device=device)
    return summarize(case.name, 2 * case.nbytes, times, device)


def resnet50_weights(device: str) -> list[Tensor]:
    """Random weights of the shapes of ResNet-50's 53 convolutions and its classifier."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, inputs, 1, 1))
            inputs = 4 * width
    shapes.append((1000, 2048))
    generator = torch.Generator(device=device).manual_seed(0)
    return [torch.randn(s, generator=generator, device=device) for s in shapes]


def bench_filter_norms(device: str, seconds: float, compile_peer: bool) -> dict[str, Any]:
    weights = resnet50_weights(device)
    for i, (a, b) in enumerate(zip(filter_norms(weights), filter_norms(weights, backend="reference"))):
        check_close(a, b, b, f"filter_norms of layer {i}")
    functions: dict[str, Callable[[], object]] = {
        "idap": lambda: filter_norms(weights),
        "eager": lambda: eager_filter_norms(weights),
    }
    if compile_peer:
        torch._dynamo.reset()
        compiled = torch.compile(eager_filter_norms, dynamic=False)
        functions["compile"] = lambda: compiled(weights)
    if triton_works(device):
        functions["triton"] = lambda: filter_norms(weights, backend="triton")
    nbytes = sum(w.numel() * w.element_size() for w in weights)
    return summarize(
        "resnet50-weights", nbytes, sample_times(functions, seconds=seconds, device=device), device
    )


def summarize(name: str, nbytes: int, times: dict[str, dict[str, float]], device: str) -> dict[str, Any]:
    ours = times["idap"]["median_us"]
    row: dict[str, Any] = {"case": name, "bytes": nbytes, "times": times, "gb_per_s": nbytes / ours / 1e3}
    row["speedup"] = {n: t["median_us"] / ours for n, t in times.items() if n not in ("idap", "ceiling")}
    if "ceiling" in times:
        moved = 2 * nbytes if device == "cuda" else nbytes  # a copy reads and writes
        row["ceiling_gb_per_s"] = moved / times["ceiling"]["median_us"] / 1e3
        row["share_of_ceiling"] = row["gb_per_s"] / row["ceiling_gb_per_s"]
    return row


def print_row(op: str, row: dict[str, Any]) -> None:
    ratios = "  ".join(f"{name} {ratio:6.2f}x" for name, ratio in row["speedup"].items())
    share = f"  {100 * row['share_of_ceiling']:4.0f} % of ceiling" if "share_of_ceiling" in row else ""
    time = row["times"]["idap"]["median_us"]
    print(
        f"{op:13s} {row['case']:38s} {time:9.1f} us {row['gb_per_s']:7.1f} GB/s  {ratios}{share}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", help="write the result to this file")
    parser.add_argument("--seconds", type=float, default=1.0, help="time per case, about (default 1)")
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: nothing was measured")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    result: dict[str, Any] = {"environment": environment(args.device), "device": args.device, "ops": {}}
    for op, bench in (("channel_stats", bench_channel_stats), ("pair_stats", bench_pair_stats)):
        rows = result["ops"][op] = []
        for case in grid(args.device):
            if args.filter in case.name:
                rows.append(bench(case, args.device, args.seconds, not args.no_compile))
                print_row(op, rows[-1])
    if args.filter in "resnet50-weights":
        row = bench_filter_norms(args.device, args.seconds, not args.no_compile)
        result["ops"]["filter_norms"] = [row]
        print_row("filter_norms", row)
    result["summary"] = summary = {}
    for op, rows in result["ops"].items():
        for peer in ("eager", "released", "compile", "triton"):
            ratios = [r["speedup"][peer] for r in rows if peer in r["speedup"]]
            if ratios:
                summary[f"{op}/{peer}"] = {"geomean": geometric_mean(ratios), "worst": min(ratios)}
    shares = [
        r["share_of_ceiling"]
        for r in result["ops"]["channel_stats"]
        if r["bytes"] >= 32e6 and "share_of_ceiling" in r
    ]
    if shares:
        summary["channel_stats/share_of_ceiling_from_32MB"] = {
            "median": sorted(shares)[len(shares) // 2],
            "worst": min(shares),
        }
    for name, values in summary.items():
        print(name, {k: round(v, 2) for k, v in values.items()})
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
