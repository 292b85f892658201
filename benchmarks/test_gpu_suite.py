"""What measures a GPU, run without one: on tiny cases, with a made-up GPU whose tensors lie on the CPU."""

from __future__ import annotations

import json
import os
import platform
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bars
import bench_kernels
import bench_profile
import gpu_counters
import pytest
import tables
import timing
import torch
from cases import Case, copies, grid
from peers import eager_bn_act, eager_bn_act_stats, eager_channel_stats
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import idap
from idap_kernels import channel_stats
from idap_kernels.dispatch import BACKENDS, backend_module

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    Case((2, 3, 4, 5), "contiguous", "float32"),
    Case((2, 3, 4, 5), "channels_last", "bfloat16"),
    Case((2, 5, 8), "tokens", "float32"),
]


class OnTheCpu(TorchFunctionMode):
    """Everything that is asked for on ``cuda`` is made on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


class Gpu:
    """Runs every launch at once; ``_sleep`` keeps it busy, and an event is done when it no longer is."""

    def __init__(self) -> None:
        self.busy_until = 0.0
        self.sleeps: list[int] = []
        self.replayed = 0

    def sleep(self, cycles: int) -> None:
        self.sleeps.append(cycles)
        self.busy_until = time.perf_counter() + cycles / 1e9


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    made = Gpu()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = time.perf_counter()

        def query(self) -> bool:
            return time.perf_counter() >= made.busy_until

        def elapsed_time(self, end: Any) -> float:
            return float(end.at - self.at) * 1e3

    class Graph:
        def replay(self) -> None:
            made.replayed += 1

    @contextmanager
    def nothing(*args: Any) -> Iterator[None]:
        yield

    generator = torch.Generator
    properties = SimpleNamespace(L2_cache_size=1 << 10, name="Made-up GPU", multi_processor_count=1)
    for name, value in {
        "is_available": lambda: True,
        "synchronize": lambda: None,
        "Event": Event,
        "_sleep": made.sleep,
        "get_device_name": lambda: properties.name,
        "get_device_properties": lambda device: properties,
        "current_device": lambda: 0,
        "CUDAGraph": Graph,
        "graph": nothing,
        "stream": nothing,
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "cudart": lambda: SimpleNamespace(cudaProfilerStart=lambda: 0, cudaProfilerStop=lambda: 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator("cpu"))
    monkeypatch.setattr(timing, "_FIRST_WAIT", 1 << 16)
    monkeypatch.setattr(bench_kernels, "LARGE_COPY", 1 << 16)
    for op in ("channel_stats", "bn_act_stats", "pair_stats", "filter_norms"):
        monkeypatch.setattr(bench_kernels, op, triton_as_reference(getattr(bench_kernels, op)))
    monkeypatch.setattr(bench_kernels, "triton_works", lambda device: device == "cuda")
    forget_backends()
    with torch.random.fork_rng(devices=[]), OnTheCpu():
        grad = torch.is_grad_enabled()
        yield made
        torch.set_grad_enabled(grad)
    forget_backends()


def forget_backends() -> None:
    """What backends found out about the machine, which is another one now."""
    for name in BACKENDS:
        getattr(backend_module(name).unavailable, "cache_clear", lambda: None)()


def triton_as_reference(op: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, backend: str = "auto", **options: Any) -> Any:
        return op(*args, backend="reference" if backend in ("triton", "auto") else backend, **options)

    return run


# --- cases and times


def test_maps_of_8_mb_have_8_mb_in_either_dtype() -> None:
    for dtype in ("float32", "bfloat16"):
        of_8mb = [c for c in grid("cuda") if c.dtype == dtype and 7.5e6 <= c.nbytes <= 8.5e6]
        assert {c.layout for c in of_8mb} == {"contiguous", "channels_last", "tokens"}
        assert len(of_8mb) == 7
    assert {c.name for c in grid("cpu")} < {c.name for c in grid("cuda")}
    assert any(c.nbytes >= 64e6 and c.layout == "tokens" for c in grid("cuda"))


def test_copies_overflow_the_cache() -> None:
    assert copies(8 << 20, 50 << 20) * (8 << 20) >= 4 * (50 << 20)
    assert copies(1 << 30, 50 << 20) == 1
    assert copies(1, 50 << 20) == 1024


def test_device_times_rotates_waits_longer_and_marks_what_waits_itself(gpu: Gpu, monkeypatch: Any) -> None:
    monkeypatch.setattr(timing, "_LONGEST_WAIT", 1 << 24)
    seen: list[int] = []

    def waits(i: int) -> None:
        time.sleep(max(0.0, gpu.busy_until - time.perf_counter()))

    times = timing.device_times(
        {"quick": seen.append, "slow": lambda i: time.sleep(2e-3), "waits": waits},
        copies=3,
        seconds=0.0,
        rounds=2,
    )
    assert times["quick"]["rounds"] == 2
    assert set(seen) == {0, 1, 2}
    assert (times["quick"]["waits"], times["slow"]["waits"], times["waits"]["waits"]) == (0, 0, 1)
    assert max(gpu.sleeps) == 1 << 24  # doubled until all calls were queued in time
    assert times["slow"]["median_us"] >= 2e3
    assert times["slow"]["ratio"] > 1 == times["quick"]["ratio"]


def test_call_times_and_idle_times(gpu: Gpu) -> None:
    functions: dict[str, Callable[[], object]] = {"nothing": lambda: None, "sleep": lambda: time.sleep(1e-4)}
    for times in (
        timing.call_times(functions, device="cuda", calls=3, rounds=4),
        timing.idle_times(functions, rounds=4),
    ):
        assert times["sleep"]["rounds"] == 4
        assert times["sleep"]["median_us"] >= 100 > times["nothing"]["median_us"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told so")
def test_kept_memory_is_used_again() -> None:
    found = False
    with timing.kept_memory():
        for _ in range(6):
            block = torch.empty(40 << 20, dtype=torch.uint8)
            found |= bool((block == 7).any())  # a new one would be zero
            block.fill_(7)
            del block
    assert found


def test_peers_of_bn_act_stats_compute_what_they_say() -> None:
    for case in TINY:
        dim = case.channel_dim
        x, channels = case.make(), case.shape[case.channel_dim]
        mean, var, weight, bias = torch.rand(4, channels) + 0.5
        before = x.clone()
        y, state = eager_bn_act_stats(x, mean, var, weight, bias, dim)
        assert torch.equal(x, before)
        wide = x.double().movedim(dim, -1)
        wanted = ((wide - mean) / (var + 1e-5).sqrt() * weight + bias).clamp_min(0).movedim(-1, dim)
        torch.testing.assert_close(y.double(), wanted, rtol=1e-2, atol=1e-2)
        assert torch.equal(y, eager_bn_act(x, mean, var, weight, bias, dim))
        assert torch.equal(state, eager_channel_stats(x, dim))


# --- bench_kernels


@pytest.fixture
def few_weights(monkeypatch: Any) -> None:
    monkeypatch.setattr(
        bench_kernels, "resnet50_weights", lambda device: [torch.randn(3, 5), torch.randn(2, 7)]
    )


def run_kernels(monkeypatch: Any, tmp_path: Path, *args: str) -> dict[str, Any]:
    monkeypatch.setattr(bench_kernels, "grid", lambda device: TINY)
    path = tmp_path / "kernels.json"
    bench_kernels.main(["--json", str(path), "--seconds", "0.001", "--no-compile", *args])
    torch.set_grad_enabled(True)
    assert [p.name for p in tmp_path.iterdir()] == ["kernels.json"]
    result: dict[str, Any] = json.loads(path.read_text())
    return result


@pytest.mark.usefixtures("few_weights")
def test_kernels_on_the_cpu(monkeypatch: Any, tmp_path: Path) -> None:
    result = run_kernels(monkeypatch, tmp_path)
    assert {op: len(rows) for op, rows in result["ops"].items()} == {
        "channel_stats": 3,
        "bn_act_stats": 3,
        "pair_stats": 3,
        "filter_norms": 1,
    }
    assert "launch" not in result
    row = result["ops"]["bn_act_stats"][0]
    assert set(row["fresh_memory"]) == {"idap", "forward", "separate"}
    assert row["bytes"] == 2 * 2 * 3 * 4 * 5 * 4  # read and written
    assert set(row["speedup"]) == {"forward", "separate"}
    assert row["ceiling_gb_per_s"] == pytest.approx(row["bytes"] / row["times"]["ceiling"]["median_us"] / 1e3)


@pytest.mark.usefixtures("few_weights")
def test_kernels_on_a_gpu(monkeypatch: Any, tmp_path: Path, gpu: Gpu) -> None:
    result = run_kernels(monkeypatch, tmp_path, "--device", "cuda", "--filter", "2x")
    result.update(run_kernels(monkeypatch, tmp_path, "--device", "cuda", "--ops", "launch,filter_norms"))
    assert result["environment"]["gpu"] == "Made-up GPU"
    assert result["environment"]["l2_bytes"] == 1 << 10
    assert set(result["launch"]["host_us"]) == set(result["launch"]["gpu_start_us"])
    assert set(result["ops"]) == {"filter_norms"}
    result = run_kernels(monkeypatch, tmp_path, "--device", "cuda", "--ops", "channel_stats,bn_act_stats")
    for op, peers in (
        ("channel_stats", {"eager", "released", "triton"}),
        ("bn_act_stats", {"forward", "separate", "triton"}),
    ):
        for row in result["ops"][op]:
            assert set(row["speedup"]) == set(row["speedup_called"]) == peers
            assert row["times"]["idap"]["called_us"] > 0
            assert row["ceiling_gb_per_s"] >= max(row["own_copy_gb_per_s"], result["copy_gb_per_s"])
            assert row["share_of_ceiling"] == pytest.approx(row["gb_per_s"] / row["ceiling_gb_per_s"])
    assert "channel_stats/triton/called" in result["summary"]


@pytest.mark.usefixtures("few_weights")
def test_the_compiled_peers(monkeypatch: Any) -> None:
    monkeypatch.setattr(bench_kernels, "compiled", lambda function: function)
    monkeypatch.setattr(bench_kernels, "grid", lambda device: TINY)
    for op in ("channel_stats", "bn_act_stats", "pair_stats"):
        row = bench_kernels.BY_CASE[op](TINY[0], "cpu", 0.001, True)
        assert row["speedup"]["compile"] > 0
    assert bench_kernels.bench_filter_norms("cpu", 0.001, True)["speedup"]["compile"] > 0


def test_a_time_limit_names_what_it_leaves_out(monkeypatch: Any, tmp_path: Path) -> None:
    result = run_kernels(monkeypatch, tmp_path, "--ops", "channel_stats", "--limit", "-1")
    assert result["left_out"] == [f"channel_stats {case.name}" for case in TINY]
    assert result["ops"] == {}


def test_a_wrong_result_is_not_timed(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_kernels, "eager_bn_act", lambda x, *norm: x)
    with pytest.raises(SystemExit, match=r"bn_act_stats by forward on .* is wrong"):
        run_kernels(monkeypatch, tmp_path, "--ops", "bn_act_stats")


def test_unknown_ops_and_a_missing_gpu(monkeypatch: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        bench_kernels.main(["--ops", "nonsense"])
    assert "there is no nonsense" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for script in (bench_kernels, bench_profile, gpu_counters):
        with pytest.raises(SystemExit, match="no CUDA device here"):
            script.main(["--device", "cuda"])


def test_two_maps_read_through_have_no_layout_on_a_gpu() -> None:
    assert {c.layout for c in bench_kernels.cases_of("pair_stats", "cuda")} == {"contiguous", "tokens"}
    assert bench_kernels.cases_of("pair_stats", "cpu") == grid("cpu")
    assert bench_kernels.cases_of("bn_act_stats", "cuda") == grid("cuda")


def test_the_summary_sorts_by_size() -> None:
    def row(nbytes: float, share: float, ratio: float) -> dict[str, Any]:
        return {"bytes": nbytes, "share_of_ceiling": share, "speedup": {"eager": ratio}}

    found = bench_kernels.summary_of(
        {
            "channel_stats": [row(8e6, 0.5, 2), row(64e6, 0.9, 8), row(33e6, 0.7, 4)],
            "bn_act_stats": [row(128e6, 0.8, 1), row(66e6, 0.6, 1)],
        }
    )
    assert found["channel_stats/eager"] == {"geomean": pytest.approx(4), "worst": 2}
    assert found["channel_stats/share_of_ceiling_of_8MB"]["worst"] == 0.5
    assert found["channel_stats/share_of_ceiling_from_64MB"] == {"median": 0.9, "worst": 0.9}
    assert found["channel_stats/share_of_ceiling_from_32MB"]["worst"] == 0.7
    assert found["bn_act_stats/share_of_ceiling_from_64MB"]["worst"] == 0.8
    assert found["bn_act_stats/share_of_ceiling_from_32MB"]["worst"] == 0.6


# --- bench_profile


class Small(nn.Module):
    def __init__(self, weights: None) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.stem(x)
        return y + self.block(y)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_profile(device: str, monkeypatch: Any, tmp_path: Path, request: Any) -> None:
    models = pytest.importorskip("torchvision.models")
    monkeypatch.setattr(models, "resnet50", Small)
    graphs: list[bool] = []
    profile = idap.profile

    def without_graph(*args: Any, cuda_graph: bool = False, **options: Any) -> Any:
        graphs.append(cuda_graph)
        return profile(*args, **options)

    if device == "cuda":
        made = request.getfixturevalue("gpu")
        monkeypatch.setattr(idap, "profile", without_graph)
        monkeypatch.setattr(nn.Module, "to", lambda self, device: self)
    path = tmp_path / "profile.json"
    arguments = ["--size", "8", "--batch", "2", "--batches", "2", "--rounds", "2"]
    bench_profile.main(["--device", device, "--json", str(path), *arguments])
    torch.set_grad_enabled(True)
    result = json.loads(path.read_text())
    wanted = {"forward", "profile", "profile_fused", "profile_with_blocks", "eager_hooks"}
    if device == "cuda":
        wanted |= {"forward_graph", "profile_graph", "profile_fused_long", "profile_graph_long"}
        assert made.replayed > 0
        assert True in graphs
        assert False in graphs
        assert set(result["tf32"]["times"]) == wanted
        assert set(result["overhead_further_batch"]) == {"profile_fused", "profile_graph"}
    assert set(result["times"]) == wanted
    assert set(result["overhead"]) == {n for n in wanted if n != "forward" and not n.endswith("_long")}
    assert (result["layers"], result["batches"]) == (2, 2)


def test_profile_stops_at_wrong_statistics(monkeypatch: Any) -> None:
    model = Small(None).eval()
    monkeypatch.setattr(bench_profile, "eager_channel_stats", lambda y: 2 * eager_channel_stats(y))
    with torch.no_grad(), pytest.raises(SystemExit, match=r"statistics of stem\.0 are wrong"):
        bench_profile.check(model, torch.randn(2, 3, 8, 8), ["stem.0"], fuse=False)


# --- hardware counters

HEAD = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    '"CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)


def ncu_line(number: int, kernel: str, metric: str, value: str) -> str:
    return (
        f'"{number}","7","python3","127.0.0.1","{kernel}","1","7","(256, 1, 1)","(132, 1, 1)","0","9.0",'
        f'"Command line profiler metrics","{metric}","byte","{value}"'
    )


def ncu_output(kernels: list[tuple[str, str, str]]) -> str:
    lines = ["==PROF== Connected to process 7", HEAD]
    for i, (kernel, read, written) in enumerate(kernels):
        lines += [
            ncu_line(i, kernel, gpu_counters.READ, read),
            ncu_line(i, kernel, gpu_counters.WRITTEN, written),
        ]
    return "\n".join([*lines, "==PROF== Disconnected from process 7"])


SPIN = ("at::cuda::(anonymous namespace)::spin_kernel(long)", "64", "0")


def test_counters_are_read_from_ncu() -> None:
    text = ncu_output(
        [SPIN, ("rows<float, 4>(Map)", "1,050", "10"), SPIN, ("a(int)", "900", "0"), ("b", "300", "5")]
    )
    what = [{"bytes": 1000, "case": "x"}, {"bytes": 1200, "case": "y"}]
    found = gpu_counters.outcome(0, text, what)
    assert found["status"] == "measured"
    assert not found["failed"]
    first, second = found["rows"]
    assert (first["case"], first["kernels"], first["read_over_map"], first["written_over_map"]) == (
        "x",
        1,
        1.05,
        0.01,
    )
    assert (second["kernels"], second["dram_read_bytes"], second["dram_written_bytes"]) == (2, 1200, 5)


def test_counters_that_are_forbidden_or_odd_are_said_in_words() -> None:
    text = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters"
    found = gpu_counters.outcome(1, text, [{"bytes": 1}])
    assert found == {"status": gpu_counters.FORBIDDEN, "rows": [], "failed": False}
    found = gpu_counters.outcome(9, "starting\n==ERROR== no driver\n", [{"bytes": 1}])
    assert found["failed"]
    assert found["status"] == "ncu failed: exit code 9: ==ERROR== no driver"
    for odd in ("", ncu_output([SPIN]), ncu_output([SPIN, ("a", "1", "1"), SPIN, ("a", "1", "1")])):
        found = gpu_counters.outcome(0, odd, [{"bytes": 1}])
        assert found["failed"]
        assert "1 calls were counted" in found["status"]


def test_the_counted_program(gpu: Gpu, monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu_counters, "working_backends", lambda: ["reference"])
    gpu_counters.count(TINY, "cuda")
    assert gpu.sleeps == [1] * 9  # a mark a call, three ops on three maps
    what = [row for row, _ in gpu_counters.runs(TINY, ["cuda", "triton"], "cuda")]
    assert len(what) == 18
    assert {row["op"] for row in what} == {"channel_stats", "bn_act_stats", "pair_stats"}
    assert all(case.nbytes > 60e6 and case.shape[0] % 2 == 0 for case in gpu_counters.MAPS)


@pytest.mark.parametrize("fails", [False, True])
def test_counters_from_the_command_to_the_file(
    gpu: Gpu, monkeypatch: Any, tmp_path: Path, fails: bool
) -> None:
    monkeypatch.setattr(gpu_counters, "working_backends", lambda: ["cuda"])
    kernels = [k for _ in range(3 * len(gpu_counters.MAPS)) for k in (SPIN, ("rows", "1e9", "0"))]
    (tmp_path / "output").write_text(ncu_output(kernels))
    executable(
        tmp_path / "bin" / "ncu", f'echo "$@" >>{tmp_path}/calls; cat {tmp_path}/output; exit {3 * fails}'
    )
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
    path = tmp_path / "counters.json"
    if fails:
        with pytest.raises(SystemExit):
            gpu_counters.main(["--json", str(path)])
    else:
        gpu_counters.main(["--json", str(path)])
    result = json.loads(path.read_text())
    assert len(result["rows"]) == (0 if fails else len(kernels) // 2)
    assert ("failed" in result["status"]) == fails
    call = (tmp_path / "calls").read_text().splitlines()[-1]
    assert call.endswith("gpu_counters.py --count")
    assert "--clock-control none" in call
    assert "--csv" in call


def test_no_ncu_is_no_failure(gpu: Gpu, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_counters, "find_ncu", lambda: None)
    gpu_counters.main(["--json", str(tmp_path / "counters.json")])
    assert "no ncu" in json.loads((tmp_path / "counters.json").read_text())["status"]


# --- the targets


def made_up_results(share: float = 0.95, ratio: float = 9.0, counters: Any = 1.01) -> bars.Results:
    environment = {"gpu": "Made-up GPU", "commit": "abc", "backends": {"cuda": None, "triton": None}}
    speedup = {"eager": ratio, "released": ratio, "compile": ratio, "triton": 1 / share}
    rows = [
        {"bytes": nbytes, "share_of_ceiling": share, "speedup": speedup, "case": f"{nbytes}x1-contiguous-float32",
         "gb_per_s": 1.0, "times": {"idap": {"median_us": 1.0}}}
        for nbytes in (8_000_000, 80_000_000, 30_000_000)
    ]  # fmt: skip
    rows[2] = {**rows[2], "share_of_ceiling": 0.1}  # of no size that a target is about
    counted: dict[str, Any] = {"status": str(counters), "rows": []}
    if isinstance(counters, float):
        row = {"backend": "cuda", "op": "channel_stats", "case": "x", "kernels": 1, "written_over_map": 0.0}
        counted = {"status": "measured", "rows": [{**row, "read_over_map": counters}]}
        counted["rows"].append({**row, "backend": "triton", "read_over_map": 3.0})
    return {
        "kernels": {
            "environment": environment,
            "ops": dict.fromkeys(("channel_stats", "pair_stats", "filter_norms", "bn_act_stats"), rows),
            "launch": {"host_us": {"channel_stats": {"median_us": 9.5}}},
        },
        "counters": {"environment": environment, **counted},
        "profile": {"environment": environment, "overhead": {"profile": 0.04, "profile_fused": -0.01}},
    }


def verdicts(results: bars.Results) -> dict[str, tuple[str, str]]:
    return {row["bar"]: (row["measured"], row["verdict"]) for row in bars.evaluate(results)}


def test_every_target_is_met_by_good_figures_and_missed_by_bad_ones() -> None:
    assert {verdict for _, verdict in verdicts(made_up_results()).values()} == {"met"}
    bad = made_up_results(share=0.5, ratio=0.9, counters=1.2)
    bad["kernels"]["launch"]["host_us"]["channel_stats"]["median_us"] = 11.0
    bad["profile"]["overhead"] = {"profile": 0.06, "profile_fused": 0.01}
    assert {verdict for _, verdict in verdicts(bad).values()} == {"missed"}


def test_targets_without_figures_are_not_measured() -> None:
    assert set(verdicts({}).values()) == {(bars.NOT_MEASURED, "not measured")}
    found = verdicts(made_up_results(counters=gpu_counters.FORBIDDEN))
    assert [text for text, verdict in found.values() if verdict == "not measured"] == [gpu_counters.FORBIDDEN]
    alone = made_up_results()
    alone["kernels"]["environment"]["backends"]["cuda"] = "not compiled"
    found = verdicts(alone)
    assert sum(verdict == "not measured" and "not compiled" in text for text, verdict in found.values()) == 4


def test_the_figures_of_targets() -> None:
    results = made_up_results()
    rows = [dict(row) for row in results["kernels"]["ops"]["channel_stats"]]
    rows[0]["speedup"] = {"eager": 4.0, "compile": 0.9, "triton": 0.5}
    results["kernels"]["ops"]["channel_stats"] = rows
    found = verdicts(results)
    assert found["channel_stats against eager PyTorch, geometric mean"] == ("6.87× (worst 4.00×)", "missed")
    assert found["channel_stats against torch.compile, worst"] == ("0.90×", "missed")
    assert found["Triton's channel_stats against CUDA's, geometric mean"] == ("1.22× (worst 0.95×)", "met")
    assert found["maps of 8 MB, share of a copy's rate, worst"] == ("95.0 %", "met")


def write_results(folder: Path, results: bars.Results) -> None:
    folder.mkdir(parents=True)
    kernels = results["kernels"]
    more = {"environment": kernels["environment"], "ops": {"bn_act_stats": kernels["ops"]["bn_act_stats"]}}
    first = {**kernels, "ops": {op: rows for op, rows in kernels["ops"].items() if op != "bn_act_stats"}}
    for name, data in {**results, "kernels": first, "kernels-more": more}.items():
        timing.write_json(folder / f"{name}.json", data)


def test_results_of_several_files_are_joined_and_of_several_gpus_are_not(tmp_path: Path) -> None:
    results = made_up_results()
    write_results(tmp_path / "a", results)
    assert bars.evaluate(bars.load([tmp_path / "a"])) == bars.evaluate(results)
    assert bars.load([tmp_path / "nothing"]) == {}
    results["profile"]["environment"] = {**results["profile"]["environment"], "gpu": "another"}
    write_results(tmp_path / "b", results)
    with pytest.raises(ValueError, match="Made-up GPU at abc; another at abc"):
        bars.load([tmp_path / "b"])


# --- the suite


def executable(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def run_suite(tmp_path: Path, *steps: str, **environment: str) -> tuple[int, str, dict[str, Any]]:
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_suite.sh"), *steps],
        env={
            **os.environ,
            "OUT": str(tmp_path / "out"),
            "PYTHON": sys.executable,
            "WHEELS": "",
            **environment,
        },
        capture_output=True,
        text=True,
    )
    suite = json.loads((tmp_path / "out" / "suite.json").read_text())
    return done.returncode, done.stdout + done.stderr, suite


def test_without_a_gpu_the_suite_says_so(tmp_path: Path) -> None:
    executable(tmp_path / "bin" / "nvidia-smi", "exit 9")
    code, text, suite = run_suite(tmp_path, PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert code == 3
    assert {row["outcome"] for row in suite["steps"]} == {"skipped: no GPU"}
    assert len(suite["steps"]) == 9
    assert {row["verdict"] for row in suite["bars"]} == {"not measured"}
    assert "≥ 90 %" in text


@pytest.mark.slow
def test_every_step_of_the_suite_is_called_with_arguments_that_parse(tmp_path: Path) -> None:
    """With a made-up GPU, and an interpreter that runs each script as far as its missing GPU."""
    executable(
        tmp_path / "bin" / "nvidia-smi",
        'case "$*" in -L) echo "GPU 0: Made-up";; *compute_cap*) echo 9.0;; *) echo "Made-up GPU, 1.0";; esac',
    )
    executable(tmp_path / "bin" / "compute-sanitizer", f'echo "sanitizer $@" >>{tmp_path}/calls')
    executable(
        tmp_path / "python",
        f'echo "${{IDAP_CUDA_ARCHS:-}} $@" >>{tmp_path}/calls\n'
        f'case "$1 $2" in -m*|-c*) exit 0;; -*) exec {sys.executable} "$@";; esac\n'
        f'exec {sys.executable} -c \'import runpy, sys, torch; torch.cuda.is_available = lambda: False; '
        f'sys.argv = sys.argv[1:]; sys.path.insert(0, "benchmarks"); sys.path.insert(0, "."); '
        f'runpy.run_path(sys.argv[0], run_name="__main__")\' "$@"',
    )  # fmt: skip
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    settings = {"PATH": path, "PYTHON": str(tmp_path / "python"), "STAMP": str(tmp_path / "build" / "stamp")}
    code, text, suite = run_suite(tmp_path, **settings, BUDGET="9000")
    outcomes = {row["step"]: row["outcome"] for row in suite["steps"]}
    assert code == 1
    for step in ("build", "backend", "tests", "memcheck", "racecheck", "initcheck"):
        assert outcomes[step] == "ok"
    for step in ("kernels", "counters", "profile", "kernels-more", "latency", "scoring"):
        assert outcomes[step] == "failed: exit code 1"  # 2 would be arguments that do not parse
    assert text.count("no CUDA device here: nothing was measured") == 6
    calls = (tmp_path / "calls").read_text()
    assert re.search(r"^9\.0 +-m pip install", calls, re.MULTILINE)
    assert "--tool racecheck" in calls
    code, _, suite = run_suite(tmp_path, "tests", **settings)
    assert code == 0  # and nothing is built again
    assert [row["outcome"] for row in suite["steps"]] == ["ok, as it was", "ok"]


def test_a_budget_that_is_spent_begins_no_step(tmp_path: Path) -> None:
    executable(tmp_path / "bin" / "nvidia-smi", 'case "$*" in -L) echo "GPU 0: Made-up";; *) echo 9.0;; esac')
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    code, _, suite = run_suite(tmp_path, "kernels", "tests", PATH=path, BUDGET="1")
    assert code == 3
    assert {row["outcome"] for row in suite["steps"]} == {"skipped: no time left"}


# --- the tables


def test_tables_of_a_gpu_before_and_after_it_was_measured(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tables, "GPU_RESULTS", tmp_path / "gpu")
    for make in (tables.gpu_bars, tables.gpu_kernels, tables.gpu_profile):
        text = make("x")
        assert "not measured yet" in text.lower()
        assert "met |" not in text
    results = made_up_results()
    results["kernels"]["environment"].update(torch="2", driver="580", date="2030-01-01")
    spread = {"median_us": 1e4, "p10_us": 9e3, "p90_us": 1.1e4}
    results["profile"].update(
        batch=64, batches=8, layers=53, times={"forward": spread, "profile": spread},
        tf32={"times": {"forward": spread}, "overhead": {}},
    )  # fmt: skip
    write_results(tmp_path / "gpu", results)
    assert "| ≥ 90 % | 95.0 % | met |" in tables.gpu_bars("x")
    assert "8000000 contiguous float32" in tables.gpu_kernels("x").replace("×1 ", " ")
    assert "Made-up GPU" in tables.gpu_kernels("x")
    assert "+4.0 %" in tables.gpu_profile("x")


def test_the_table_of_bn_act_stats_before_and_after_it_was_measured(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    environment = {"processor": "a CPU", "threads": 2, "torch": "2", "date": "2030-01-01"}
    assert "Not measured yet" in tables.bn_act_stats("bn-act-stats-cpu")
    row: dict[str, Any] = {"case": "2x3x4x5-channels_last-float32", "bytes": 960, "gb_per_s": 20.0}
    row.update(share_of_ceiling=0.9, times={"idap": {"median_us": 2e3}})
    row.update(speedup={"forward": 1.1, "separate": 1.9, "compile": 4.0})
    row.update(fresh_memory={"idap": 2.0, "forward": 3.0, "separate": 4.0})
    ops = {"bn_act_stats": [row]}
    data = {"environment": environment, "ops": ops, "summary": bench_kernels.summary_of(ops)}
    timing.write_json(tmp_path / "bn-act-stats-cpu.json", data)
    text = tables.bn_act_stats("bn-act-stats-cpu")
    assert "| 2×3×4×5 channels-last float32 | 2.00 ms | 20.0 | 90 % | 1.10× | 1.90× | 4.00× |" in text
    assert "**1.10×**" in text
    assert "the means of the first two are 1.50× and 2.00×." in text


def test_the_reference_agrees_with_itself() -> None:
    """The made-up GPU times the reference in place of the kernels: what it is given must be what it gives."""
    x = TINY[0].make()
    assert torch.equal(
        channel_stats(x, backend="reference").state, triton_as_reference(channel_stats)(x).state
    )
