"""Times of several functions taken in turns, so that their ratios hold on a noisy machine."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def sample_times(
    functions: dict[str, Callable[[], object]], *, seconds: float = 1.0, device: str = "cpu", rounds: int = 7
) -> dict[str, dict[str, float]]:
    """Median, 10th and 90th percentile and minimum time of one call, in microseconds, by name.

    ``ratio`` is the median over the rounds of the time over that of the first function in the same round.

    Each round calls every function in turn, each after a call of its own that is not timed. A function that
    takes less than half a millisecond is called several times per round; the mean is one observation.
    """
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    def clock(function: Callable[[], object], calls: int) -> float:
        function()  # not timed: every function finds the caches as it leaves them itself
        synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize()
        return (time.perf_counter() - begin) / calls

    calls = {}
    for name, function in functions.items():
        function()
        calls[name] = max(1, int(5e-4 / max(clock(function, 1), 1e-7)))
    once = sum(clock(f, calls[n]) * calls[n] for n, f in functions.items())
    rounds = max(rounds, min(200, int(seconds / max(once, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(clock(function, calls[name]) * 1e6)
    first = times[next(iter(functions))]
    return {
        name: {
            "ratio": statistics.median(mine / theirs for mine, theirs in zip(t, first)),
            "median_us": statistics.median(t),
            "p10_us": quantile(t, 0.1),
            "p90_us": quantile(t, 0.9),
            "min_us": min(t),
            "rounds": len(t),
        }
        for name, t in times.items()
    }


def quantile(values: list[float], q: float) -> float:
    """The value at share ``q`` of the sorted list (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def geometric_mean(values: list[float]) -> float:
    return statistics.geometric_mean(values)


def environment(device: str) -> dict[str, Any]:
    """The machine and the versions that a result was measured with."""
    import idap_kernels

    info: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", "csrc", "idap", "idap_kernels", "benchmarks/*.py")),
        "idap": idap_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "backends": idap_kernels.available_backends(),
    }
    if info["backends"]["cpu"] is None:
        from idap_kernels.backends import cpu

        info["isa"] = cpu.isa()
    if device == "cuda":
        info["gpu"] = torch.cuda.get_device_name()
        info["cuda"] = torch.version.cuda
        info["driver"] = _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return info


def write_json(path: str | Path, result: dict[str, Any]) -> None:
    """Write a result, its folder made if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _git(*args: str) -> str:
    return _first_line(["git", "-C", str(Path(__file__).parent.parent), *args])


def _first_line(command: list[str]) -> str:
    try:
        out = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    except OSError:
        return ""
    return out[0].strip() if out else ""


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
