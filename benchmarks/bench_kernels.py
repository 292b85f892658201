"""Kernel throughput beside eager PyTorch, the released expression, torch.compile and, on a GPU, Triton's kernels.

python benchmarks/bench_kernels.py --device cpu --json benchmarks/results/kernels-cpu.json

Every case is checked against the reference before it is timed; a wrong result stops the run. The file is written anew
after every case, so that a run that is cut short leaves what it has. On a GPU ``median_us`` is the GPU's time, with
maps from memory and not from its cache, and ``called_us`` the time of calls from Python one after the other. On a CPU
what bn_act_stats and its peers write comes from memory that the process has already; ``fresh_memory``: from new memory.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from cases import Case, copies, grid
from peers import (
    eager_bn_act,
    eager_bn_act_stats,
    eager_channel_stats,
    eager_filter_norms,
    eager_pair_stats,
    released_expression,
)
from timing import (
    call_times,
    device_times,
    environment,
    geometric_mean,
    idle_times,
    kept_memory,
    l2_bytes,
    quantile,
    sample_times,
    write_json,
)
from torch import Tensor

from idap_kernels import (
    ChannelStats,
    available_backends,
    bn_act_stats,
    channel_stats,
    filter_norms,
    pair_stats,
)

Functions = dict[str, Callable[[int], object]]  # called with the number of the input, of several equal ones
LARGE_COPY = 1 << 30  # bytes
PEERS = ("eager", "released", "forward", "separate", "compile", "triton")


def check_close(got: Tensor, wanted: Tensor, scale: Tensor, what: str, tolerance: float = 2e-4) -> None:
    error = ((got.double() - wanted.double()).abs() / scale.double().clamp_min(1e-30)).max().item()
    if not error <= tolerance:
        raise SystemExit(f"{what} is wrong by {error:.2e} of its scale: nothing was timed")


def check_state(got: object, wanted: Tensor, what: str, tolerance: float = 2e-4) -> None:
    """Compare statistics of a map, (11, C), row by row."""
    assert isinstance(got, Tensor)
    scale = wanted.abs().amax(dim=1, keepdim=True)
    scale[2] = scale[10]  # the mean lies near zero: the range is its scale
    check_close(got, wanted, scale, what, tolerance)


def check_map(got: Tensor, wanted: Tensor, what: str) -> None:
    """Compare a normalized map with the reference's."""
    scale = wanted.double().abs() + 1e-2 * wanted.double().abs().amax()
    check_close(got, wanted, scale, what, 2e-4 if wanted.dtype == torch.float32 else 1e-2)


def make_copies(given: list[Tensor], device: str) -> list[list[Tensor]]:
    """What a call reads, and on a GPU as many copies as it takes for none to be in the cache when its turn comes."""
    if device != "cuda":
        return [given]
    nbytes = sum(t.numel() * t.element_size() for t in given)
    return [given, *([t.clone() for t in given] for _ in range(copies(nbytes, l2_bytes()) - 1))]


def memory_copy(maps: list[Tensor]) -> Callable[[int], object]:
    """A function that copies the memory of a map: read once and written once."""
    flat = [x.as_strided((x.numel(),), (1,)) for x in maps]
    targets = [torch.empty_like(x) for x in flat]
    return lambda i: targets[i].copy_(flat[i])


def read_ceiling(maps: list[Tensor], device: str) -> Callable[[int], object] | None:
    """A function that reads the memory of a map once, on the CPU; the copy on a GPU, read and written."""
    if device == "cuda":
        return memory_copy(maps)
    x = maps[0]
    from idap_kernels.backends import cpu

    if cpu.unavailable() is not None:
        return None
    from idap_kernels import _cpu  # type: ignore[attr-defined]

    size = x.numel() * x.element_size() // 256 * 256
    return lambda i: _cpu.read_memory(x.data_ptr(), size, torch.get_num_threads())


def large_copy_rate() -> float:
    """GB/s of a large copy within the GPU's memory, bytes read and written."""
    source = torch.empty(LARGE_COPY // 4, dtype=torch.float32, device="cuda").normal_()
    times = device_times({"copy": memory_copy([source])}, copies=1)
    return 2 * LARGE_COPY / times["copy"]["median_us"] / 1e3


def triton_works(device: str) -> bool:
    """Whether Triton's kernels are timed beside those that ``auto`` takes: on a GPU where they run."""
    return device == "cuda" and available_backends()["triton"] is None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def times_of(functions: Functions, count: int, seconds: float, device: str) -> dict[str, dict[str, float]]:
    """Times of all functions on ``count`` equal inputs: of the GPU's work there, of whole calls on a CPU."""
    if device != "cuda":
        return sample_times({name: partial(f, 0) for name, f in functions.items()}, seconds=seconds)
    times = device_times(functions, copies=count, seconds=seconds)
    position = itertools.cycle(range(count))
    called = sample_times(
        {name: lambda f=f: f(next(position)) for name, f in functions.items()},  # type: ignore[misc]
        device=device,
        seconds=seconds / 4,
        rounds=5,
    )
    return {name: {**t, "called_us": called[name]["median_us"]} for name, t in times.items()}


def bench_channel_stats(case: Case, device: str, seconds: float, compile_peer: bool) -> dict[str, Any]:
    maps = [x for (x,) in make_copies([case.make(device)], device)]
    dim = case.channel_dim
    functions: Functions = {
        "idap": lambda i: channel_stats(maps[i], channel_dim=dim).state,
        "eager": lambda i: eager_channel_stats(maps[i], dim),
        "released": lambda i: released_expression(maps[i], dim),
    }
    if compile_peer:
        peer = compiled(eager_channel_stats)
        functions["compile"] = lambda i: peer(maps[i], dim)
    if triton_works(device):
        functions["triton"] = lambda i: channel_stats(maps[i], channel_dim=dim, backend="triton").state
    wanted = channel_stats(maps[0], channel_dim=dim, backend="reference").state
    for name, function in functions.items():
        if name != "released":
            what = f"channel_stats by {name} on {case.name}"
            check_state(function(0), wanted, what, 1e-3 if name in ("eager", "compile") else 2e-4)
    ceiling = read_ceiling(maps, device)
    if ceiling is not None:
        functions["ceiling"] = ceiling
    times = times_of(functions, len(maps), seconds, device)
    return summarize(case.name, case.nbytes, times, case.nbytes * (2 if device == "cuda" else 1))


def bench_bn_act_stats(case: Case, device: str, seconds: float, compile_peer: bool) -> dict[str, Any]:
    maps = [x for (x,) in make_copies([case.make(device)], device)]
    dim = case.channel_dim
    channels = case.shape[dim]
    mean, var, weight, bias = (torch.rand(channels, device=device) + 0.5 for _ in range(4))
    norm = mean - 1, var, weight, bias - 1
    functions: Functions = {
        "idap": lambda i: bn_act_stats(maps[i], *norm, channel_dim=dim),
        "forward": lambda i: eager_bn_act(maps[i], *norm, dim),
        "separate": lambda i: (eager_bn_act(maps[i], *norm, dim), channel_stats(maps[i], channel_dim=dim)),
    }
    if compile_peer:
        peer = compiled(eager_bn_act_stats)
        functions["compile"] = lambda i: peer(maps[i], *norm, dim)
    if triton_works(device):
        functions["triton"] = lambda i: bn_act_stats(maps[i], *norm, channel_dim=dim, backend="triton")
    wanted, exact = bn_act_stats(maps[0], *norm, channel_dim=dim, backend="reference")
    for name, function in functions.items():
        what = f"bn_act_stats by {name} on {case.name}"
        got: Any = function(0)
        y, stats = (got, None) if name == "forward" else got
        check_map(y, wanted, what)
        if stats is not None:
            state = stats.state if isinstance(stats, ChannelStats) else stats
            check_state(state, exact.state, what, 1e-3 if name == "compile" else 2e-4)
    del wanted, got, y
    functions["ceiling"] = memory_copy(maps)
    with kept_memory() if device == "cpu" else nullcontext():
        times = times_of(functions, len(maps), seconds, device)
    return summarize(case.name, 2 * case.nbytes, times, 2 * case.nbytes)


def bn_act_stats_in_fresh_memory(case: Case, seconds: float) -> dict[str, float]:
    """Times in microseconds on a CPU where large results get new pages; no kept memory may have come before."""
    x, dim = case.make(), case.channel_dim
    mean, var, weight, bias = torch.rand(4, case.shape[dim]) + 0.5
    norm = mean, var, weight, bias
    functions: dict[str, Callable[[], object]] = {
        "idap": lambda: bn_act_stats(x, *norm, channel_dim=dim),
        "forward": lambda: eager_bn_act(x, *norm, dim),
        "separate": lambda: (eager_bn_act(x, *norm, dim), channel_stats(x, channel_dim=dim)),
    }
    return {name: t["median_us"] for name, t in sample_times(functions, seconds=seconds).items()}


def bench_pair_stats(case: Case, device: str, seconds: float, compile_peer: bool) -> dict[str, Any]:
    pairs = make_copies([case.make(device, seed=0), case.make(device, seed=1)], device)
    functions: Functions = {
        "idap": lambda i: pair_stats(*pairs[i]).state,
        "eager": lambda i: eager_pair_stats(*pairs[i]),
    }
    if compile_peer:
        peer = compiled(eager_pair_stats)
        functions["compile"] = lambda i: peer(*pairs[i])
    if triton_works(device):
        functions["triton"] = lambda i: pair_stats(*pairs[i], backend="triton").state
    wanted = pair_stats(*pairs[0], backend="reference").state
    for name, function in functions.items():
        got = function(0)
        assert isinstance(got, Tensor)
        what = f"pair_stats by {name} on {case.name}"
        check_close(got, wanted, wanted[0].expand_as(wanted), what, 1e-3 if name != "idap" else 2e-4)
    return summarize(case.name, 2 * case.nbytes, times_of(functions, len(pairs), seconds, device))


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
    models = make_copies(resnet50_weights(device), device)
    functions: Functions = {
        "idap": lambda i: filter_norms(models[i]),
        "eager": lambda i: eager_filter_norms(models[i]),
    }
    if compile_peer:
        peer = compiled(eager_filter_norms)
        functions["compile"] = lambda i: peer(models[i])
    if triton_works(device):
        functions["triton"] = lambda i: filter_norms(models[i], backend="triton")
    wanted = filter_norms(models[0], backend="reference")
    for name, function in functions.items():
        got: Any = function(0)
        for layer, (a, b) in enumerate(zip(got, wanted, strict=True)):
            check_close(a, b, b, f"filter_norms by {name} of layer {layer}")
    nbytes = sum(w.numel() * w.element_size() for w in models[0])
    return summarize("resnet50-weights", nbytes, times_of(functions, len(models), seconds, device))


LAUNCH = (
    "host_us: the host's time for a call that does not wait for its result, on a map of 12.5 kB, twenty calls in a row "
    "with nothing queued before them. gpu_start_us: on an idle GPU, from an event just before a call to the start of "
    "its kernel: to an event just after the call, less the kernel's own time. add_, add: the same of torch's addition "
    "of 1 to the map, in place and into a new tensor."
)


def bench_launch(device: str, seconds: float) -> dict[str, Any]:
    """What a call costs before its kernel starts."""
    x = torch.randn(1, 64, 7, 7, device=device)
    mean, var = torch.zeros(64, device=device), torch.ones(64, device=device)
    into = channel_stats(x)
    functions: dict[str, Callable[[], object]] = {
        "channel_stats": lambda: channel_stats(x),
        "channel_stats_into": lambda: channel_stats(x, out=into),
        "bn_act_stats": lambda: bn_act_stats(x, mean, var),
        "add_": lambda: x.add_(1),
        "add": lambda: x + 1,
    }
    row: dict[str, Any] = {"what": LAUNCH, "map": list(x.shape)}
    row["host_us"] = call_times(functions, device=device, rounds=max(20, int(100 * seconds)))
    if device == "cuda":
        idle = idle_times(functions)
        busy = device_times({n: lambda i, f=f: f() for n, f in functions.items()}, copies=1)  # type: ignore[misc]
        row["kernel_us"] = {name: t["median_us"] for name, t in busy.items()}
        row["gpu_start_us"] = {name: t["median_us"] - row["kernel_us"][name] for name, t in idle.items()}
    return row


def summarize(
    name: str, nbytes: int, times: dict[str, dict[str, float]], ceiling_bytes: int = 0
) -> dict[str, Any]:
    """The row of a case; ``ceiling_bytes``: what the function that is the ceiling moves."""
    ours = times["idap"]
    row: dict[str, Any] = {
        "case": name,
        "bytes": nbytes,
        "times": times,
        "gb_per_s": nbytes / ours["median_us"] / 1e3,
    }
    others = {n: t for n, t in times.items() if n not in ("idap", "ceiling")}
    row["speedup"] = {n: t["median_us"] / ours["median_us"] for n, t in others.items()}
    if "called_us" in ours:
        row["speedup_called"] = {n: t["called_us"] / ours["called_us"] for n, t in others.items()}
    if "ceiling" in times:
        row["ceiling_gb_per_s"] = ceiling_bytes / times["ceiling"]["median_us"] / 1e3
        row["share_of_ceiling"] = row["gb_per_s"] / row["ceiling_gb_per_s"]
    return row


def against_large_copy(row: dict[str, Any], rate: float) -> None:
    """On a GPU the ceiling is that of a large copy, if it is higher than that of one of the case's own size."""
    own = row.pop("ceiling_gb_per_s", None)
    if own is not None:
        row["own_copy_gb_per_s"] = own
    row["ceiling_gb_per_s"] = max(rate, own or 0.0)
    row["share_of_ceiling"] = row["gb_per_s"] / row["ceiling_gb_per_s"]


def summary_of(ops: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Geometric mean and worst case of every ratio, by op and peer; the shares of the ceiling, by size of the map."""
    summary: dict[str, dict[str, float]] = {}
    for op, rows in ops.items():
        for key, suffix in (("speedup", ""), ("speedup_called", "/called")):
            for peer in PEERS:
                ratios = [r[key][peer] for r in rows if peer in r.get(key, {})]
                if ratios:
                    summary[f"{op}/{peer}{suffix}"] = {
                        "geomean": geometric_mean(ratios),
                        "worst": min(ratios),
                    }
        for label, least, most in (
            ("from_32MB", 32e6, float("inf")),
            ("from_64MB", 64e6, float("inf")),
            ("of_8MB", 7.5e6, 8.5e6),
        ):
            written = 2 if op == "bn_act_stats" else 1  # its bytes are those of two maps
            shares = [
                r["share_of_ceiling"]
                for r in rows
                if "share_of_ceiling" in r and least <= r["bytes"] / written <= most
            ]
            if shares:
                summary[f"{op}/share_of_ceiling_{label}"] = {
                    "median": quantile(shares, 0.5),
                    "worst": min(shares),
                }
    return summary


def print_row(op: str, row: dict[str, Any]) -> None:
    ratios = "  ".join(f"{name} {ratio:6.2f}x" for name, ratio in row["speedup"].items())
    share = f"  {100 * row['share_of_ceiling']:4.0f} % of ceiling" if "share_of_ceiling" in row else ""
    time = row["times"]["idap"]["median_us"]
    print(
        f"{op:13s} {row['case']:38s} {time:9.1f} us {row['gb_per_s']:7.1f} GB/s  {ratios}{share}", flush=True
    )


OPS = ("channel_stats", "launch", "filter_norms", "pair_stats", "bn_act_stats")
BY_CASE = {
    "channel_stats": bench_channel_stats,
    "bn_act_stats": bench_bn_act_stats,
    "pair_stats": bench_pair_stats,
}


def cases_of(op: str, device: str) -> list[Case]:
    """The cases of an op. Two maps that are read through have no layout: a GPU's minutes are spent on others."""
    every = grid(device)
    if op == "pair_stats" and device == "cuda":
        return [case for case in every if case.layout != "channels_last"]
    return every


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", help="write the result to this file")
    parser.add_argument("--ops", default=",".join(OPS), help=f"of {', '.join(OPS)} (default: all)")
    parser.add_argument("--seconds", type=float, help="time per case, about (default: 1, on a GPU 0.5)")
    parser.add_argument("--limit", type=float, default=float("inf"), help="begin no case after these seconds")
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    args = parser.parse_args(argv)
    ops = args.ops.split(",")
    unknown = set(ops) - set(OPS)
    if unknown:
        parser.error(f"--ops: there is no {', '.join(sorted(unknown))}; known are {', '.join(OPS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: nothing was measured")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    begin = time.monotonic()
    seconds = args.seconds or (0.5 if args.device == "cuda" else 1.0)
    rows: dict[str, list[dict[str, Any]]] = {}
    result: dict[str, Any] = {"environment": environment(args.device), "device": args.device, "ops": rows}
    if args.device == "cuda":
        result["copy_gb_per_s"] = large_copy_rate()
        print(f"a copy within the GPU's memory, read and written: {result['copy_gb_per_s']:.0f} GB/s")
    result["left_out"] = left_out = []

    def add(op: str, name: str, bench: Callable[[], dict[str, Any]]) -> None:
        if args.filter not in name:
            return
        if time.monotonic() - begin > args.limit:
            left_out.append(f"{op} {name}")
            return
        row = bench()
        if args.device == "cuda":
            torch.cuda.empty_cache()  # the next case's maps are of other sizes
            against_large_copy(row, result["copy_gb_per_s"])
        rows.setdefault(op, []).append(row)
        print_row(op, row)
        result["summary"] = summary_of(rows)
        if args.json:
            write_json(args.json, result)

    for op in ops:
        if op in BY_CASE:
            cases = [case for case in cases_of(op, args.device) if args.filter in case.name]
            fresh = {}
            if op == "bn_act_stats" and args.device == "cpu":
                fresh = {case.name: bn_act_stats_in_fresh_memory(case, seconds / 2) for case in cases}
            for case in cases:
                add(op, case.name, partial(BY_CASE[op], case, args.device, seconds, not args.no_compile))
                if fresh and rows.get(op):
                    rows[op][-1]["fresh_memory"] = fresh[rows[op][-1]["case"]]
        elif op == "filter_norms":
            bench = partial(bench_filter_norms, args.device, seconds, not args.no_compile)
            add(op, "resnet50-weights", bench)
        elif args.device == "cuda" and args.filter in "launch":
            result["launch"] = bench_launch(args.device, seconds)
            starts = {n: f"{t['median_us']:.1f} us" for n, t in result["launch"]["host_us"].items()}
            print("host's time for a call:", starts, flush=True)
    for name, values in summary_of(rows).items():
        print(name, {k: round(v, 2) for k, v in values.items()})
    if left_out:
        print(f"left out after {args.limit:.0f} s: {', '.join(left_out)}")
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
