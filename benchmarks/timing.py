"""Times of several functions taken in turns, so that their ratios hold on a noisy machine."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    return _spreads(times)


_FIRST_WAIT, _LONGEST_WAIT = 1 << 20, 1 << 28  # clock cycles of the GPU: about 0.6 ms, 0.15 s


def device_times(
    functions: dict[str, Callable[[int], object]], *, copies: int, seconds: float = 1.0, rounds: int = 7
) -> dict[str, dict[str, float]]:
    """The GPU's time for one call, without the host's part in it; otherwise as :func:`sample_times`.

    Calls are queued behind a kernel that only waits, so that the GPU never waits for Python, and are timed with
    events. Every call, of whichever function, takes the next of ``copies`` inputs and writes a result of its own:
    with enough copies nothing is read from the cache, or overwritten there, that comes from memory in real use.

    ``waits`` is 1 for a function that waits for the GPU itself; its time has the host's part in it.
    """
    positions = itertools.cycle(range(copies))
    waits = dict.fromkeys(functions, _FIRST_WAIT)
    waiting: set[str] = set()
    calls = dict.fromkeys(functions, 1)

    def clock(name: str) -> float:
        function = functions[name]
        while True:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(waits[name])
            function(next(positions))  # not timed
            begin.record()
            kept = [function(next(positions)) for _ in range(calls[name])]
            late = begin.query()  # all of them had to be queued before the first one begins
            end.record()
            torch.cuda.synchronize()
            del kept
            if not late or name in waiting:
                return begin.elapsed_time(end) * 1e3 / calls[name]
            if waits[name] < _LONGEST_WAIT:
                waits[name] *= 2
            elif calls[name] > 1:  # more launches than the queue holds
                waits[name], calls[name] = _FIRST_WAIT, calls[name] // 2
            else:
                waits[name] = _FIRST_WAIT
                waiting.add(name)

    for name, function in functions.items():
        function(0)
        torch.cuda.synchronize()
        clock(name)
        calls[name] = max(1, min(64, int(5e2 / max(clock(name), 1e-3))))  # half a millisecond of work
    begin = time.perf_counter()
    for name in functions:
        clock(name)
    once = time.perf_counter() - begin
    rounds = max(rounds, min(200, int(seconds / max(once, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name in functions:
            times[name].append(clock(name))
    return {name: {**t, "waits": int(name in waiting)} for name, t in _spreads(times).items()}


def call_times(
    functions: dict[str, Callable[[], object]], *, device: str, calls: int = 20, rounds: int = 100
) -> dict[str, dict[str, float]]:
    """The host's time for one call that does not wait for its result, in microseconds, by name.

    Before a round of ``calls`` the GPU has nothing to do, and a round is too short to fill its queue.
    """
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            synchronize()
            begin = time.perf_counter()
            for _ in range(calls):
                function()
            times[name].append((time.perf_counter() - begin) / calls * 1e6)
    synchronize()
    return _spreads(times)


def idle_times(
    functions: dict[str, Callable[[], object]], *, rounds: int = 200
) -> dict[str, dict[str, float]]:
    """Time on an idle GPU between an event just before a call and one just after it, in microseconds, by name."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e3)
    return _spreads(times)


@contextmanager
def kept_memory() -> Iterator[None]:
    """Large results come from memory that the process has already, as they do on a GPU, and not anew from the kernel.

    By default glibc gives every block of more than 32 MB back when it is freed, and finding new pages for the next one
    takes longer than filling them. Nothing happens where the C library is another. Afterwards large blocks come from
    new pages again, but for those that fit into a gap that was kept.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        yield
        return
    trim, threshold, most = -1, -3, -4  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX
    mallopt(most, 0)
    mallopt(trim, 2**31 - 1)
    try:
        yield
    finally:  # where glibc's own adjustment ends up once large blocks were freed
        mallopt(most, 65536)
        mallopt(threshold, 32 << 20)
        mallopt(trim, 64 << 20)


def _spreads(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    first = times[next(iter(times))]
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
        "commit": _git("rev-parse", "--short", "HEAD") or os.environ.get("COMMIT", ""),
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
        info["l2_bytes"] = l2_bytes()
        info["cuda"] = torch.version.cuda
        info["driver"] = _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return info


def l2_bytes() -> int:
    """Size of the GPU's L2 cache."""
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def write_json(path: str | Path, result: dict[str, Any]) -> None:
    """Write a result, its folder made if need be. A reader never finds half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f"{path.name}.part")
    half.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(half, path)


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
