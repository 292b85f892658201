"""Bytes that the kernels read from the GPU's memory, by its hardware counters, over the bytes of their maps.

python benchmarks/gpu_counters.py --json benchmarks/results/gpu/counters.json

Runs itself under Nsight Compute (``ncu``), which counts one kernel after the other, its caches emptied before each.
Where there is no ``ncu``, or the machine does not permit counters, the file says so in words, and the exit code is 0.
"""

from __future__ import annotations

import argparse
import csv
import glob
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import Case
from timing import environment, write_json

from idap_kernels import available_backends, bn_act_stats, channel_stats, pair_stats

READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
MARK = "spin_kernel"  # torch.cuda._sleep: runs between two cases, so that their kernels can be told apart
MAPS = (  # every shape of work, in maps that no L2 cache holds
    Case((32, 64, 112, 112), "contiguous", "float32"),
    Case((256, 64, 112, 112), "contiguous", "bfloat16"),
    Case((256, 1024, 14, 14), "contiguous", "float32"),
    Case((512, 2048, 7, 7), "contiguous", "float32"),
    Case((32, 256, 56, 56), "channels_last", "float32"),
    Case((256, 64, 112, 112), "channels_last", "bfloat16"),
    Case((4, 4096, 4096), "tokens", "float32"),
)
FORBIDDEN = "not permitted here: the driver keeps the hardware counters to administrators (ERR_NVGPUCTRPERM)"


def runs(
    maps: Sequence[Case], backends: Sequence[str], device: str
) -> list[tuple[dict[str, Any], Callable[[], object]]]:
    """What is counted: a description, and the call. A map is made when it is needed first, and then let go."""
    made: dict[str, Any] = {}

    def tensors(case: Case) -> tuple[Any, ...]:
        if case.name not in made:
            made.clear()
            channels = case.shape[case.channel_dim]
            mean, var = torch.zeros(channels, device=device), torch.ones(channels, device=device)
            made[case.name] = case.make(device), mean, var
        return made[case.name]  # type: ignore[no-any-return]

    def channels(case: Case, backend: str) -> object:
        return channel_stats(tensors(case)[0], channel_dim=case.channel_dim, backend=backend)

    def fused(case: Case, backend: str) -> object:
        return bn_act_stats(*tensors(case), channel_dim=case.channel_dim, backend=backend)

    def pairs(case: Case, backend: str) -> object:
        x = tensors(case)[0]
        half = x.shape[0] // 2
        return pair_stats(x[:half], x[half:], backend=backend)

    calls: tuple[tuple[str, Callable[[Case, str], object]], ...] = (
        ("channel_stats", channels),
        ("bn_act_stats", fused),
        ("pair_stats", pairs),  # of the halves of the map, which together are read once
    )
    return [
        (
            {"op": op, "case": case.name, "backend": backend, "bytes": case.nbytes},
            partial(call, case, backend),
        )
        for case in maps
        for backend in backends
        for op, call in calls
    ]


def count(maps: Sequence[Case], device: str) -> None:
    """The program that is counted: every call once as it is, then between two marks."""
    torch.set_grad_enabled(False)
    for _, call in runs(maps, working_backends(), device):
        call()  # compiles, checks itself, makes the workspace
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        torch.cuda._sleep(1)
        call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def working_backends() -> list[str]:
    reasons = available_backends()
    return [name for name in ("cuda", "triton") if reasons[name] is None]


def find_ncu() -> str | None:
    """Nsight Compute's command."""
    places = sorted(glob.glob("/opt/nvidia/nsight-compute/*/ncu"), reverse=True)
    for place in ("ncu", "/usr/local/cuda/bin/ncu", *places):
        found = shutil.which(place)
        if found:
            return found
    return None


def command(ncu: str) -> list[str]:
    """Counts only what lies between cudaProfilerStart and cudaProfilerStop; the GPU's clocks are left alone."""
    options = ["--csv", "--print-units", "base", "--metrics", f"{READ},{WRITTEN}"]
    options += ["--clock-control", "none", "--profile-from-start", "off"]
    return [ncu, *options, sys.executable, str(Path(__file__).resolve()), "--count"]


def parse(text: str) -> list[tuple[str, dict[str, float]]]:
    """Kernels in the order of their launches, with their counters, from what ``ncu --csv`` prints."""
    lines = text.splitlines()
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if head is None:
        return []
    kernels: dict[int, tuple[str, dict[str, float]]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(line for line in lines[head:] if line.startswith('"')))):
        if row["ID"].isdigit() and row["Metric Name"] in (READ, WRITTEN):
            _, counters = kernels.setdefault(int(row["ID"]), (row["Kernel Name"], {}))
            counters[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    return [kernels[i] for i in sorted(kernels)]


def assign(kernels: list[tuple[str, dict[str, float]]], what: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The descriptions with the counters of the kernels behind their mark.

    Raises:
        ValueError: there are not as many marks as descriptions, or no kernel behind one.
    """
    groups: list[list[tuple[str, dict[str, float]]]] = []
    for name, counters in kernels:
        if MARK in name:
            groups.append([])
        elif groups:
            groups[-1].append((name, counters))
    if len(groups) != len(what) or not all(groups):
        raise ValueError(f"{len(what)} calls were counted, and {sum(map(bool, groups))} have kernels")
    rows = []
    for row, group in zip(what, groups, strict=True):
        read, written = (sum(c[name] for _, c in group) for name in (READ, WRITTEN))
        rows.append(
            {
                **row,
                "kernels": len(group),
                "dram_read_bytes": read,
                "dram_written_bytes": written,
                "read_over_map": read / row["bytes"],
                "written_over_map": written / row["bytes"],
            }
        )
    return rows


def outcome(code: int, output: str, what: list[dict[str, Any]]) -> dict[str, Any]:
    """``status``: ``measured``, else why not; ``rows``: the counters; ``failed``: whether something is wrong."""
    if "ERR_NVGPUCTRPERM" in output:
        return {"status": FORBIDDEN, "rows": [], "failed": False}
    try:
        if code == 0:
            return {"status": "measured", "rows": assign(parse(output), what), "failed": False}
        last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
        reason = f"exit code {code}: {last[:500]}"
    except (ValueError, KeyError) as error:
        reason = f"its output is not as expected: {type(error).__name__}: {error}"
    return {"status": f"ncu failed: {reason}", "rows": [], "failed": True}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda"], default="cuda")
    parser.add_argument("--json", help="write the result to this file")
    parser.add_argument("--limit", type=float, default=240, help="seconds after which ncu is stopped")
    parser.add_argument("--count", action="store_true", help="the program that ncu runs")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: nothing was measured")
    if args.count:
        return count(MAPS, args.device)
    result: dict[str, Any] = {"environment": environment(args.device), "device": args.device}
    ncu = find_ncu()
    if ncu is None:
        found: dict[str, Any] = {
            "status": "no ncu (Nsight Compute) on this machine",
            "rows": [],
            "failed": False,
        }
    else:
        result["ncu"] = subprocess.run([ncu, "--version"], capture_output=True, text=True).stdout.strip()
        what = [row for row, _ in runs(MAPS, working_backends(), args.device)]
        try:
            done = subprocess.run(
                command(ncu), capture_output=True, text=True, timeout=args.limit, env=os.environ.copy()
            )
            found = outcome(done.returncode, done.stdout + done.stderr, what)
        except subprocess.TimeoutExpired:
            found = {"status": f"ncu failed: not done after {args.limit:.0f} s", "rows": [], "failed": True}
    failed = found.pop("failed")
    result.update(found)
    print(f"hardware counters: {result['status']}")
    for row in result["rows"]:
        print(
            f"{row['op']:13s} {row['backend']:7s} {row['case']:38s} {row['kernels']} kernels  "
            f"read {row['read_over_map']:.3f}  written {row['written_over_map']:.3f} of the map"
        )
    if args.json:
        write_json(args.json, result)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
