"""What the compiler says of the CUDA kernels, for every architecture: no spill, no stack, all in the binary."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from idap_kernels.backends import cuda, reference
from idap_kernels.build_info import build_info
from idap_kernels.dispatch import BatchNorm

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
ARCHS = ["75", "80", "86", "89", "90", "120"]
REGISTERS_PER_MULTIPROCESSOR = 65536
THREADS = 256
# Blocks that must fit a multiprocessor at once: enough loads in flight to keep the memory busy.
RESIDENT = {"channel_rows": 3, "channel_columns": 2, "pair_kernel": 3, "filter_kernel": 3}
KERNELS = {
    "channel_rows": 10,
    "channel_columns": 8,
    "bn_act_rows": 8,
    "bn_act_columns": 6,
    "pair_stats": 8,
    "filter_norms": 1,
}  # compiled from each file


class Report(NamedTuple):
    kernel: str
    instance: str
    arch: str
    registers: int
    stack: int
    spills: int
    shared: int


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    if found := shutil.which("nvcc"):
        candidates.append(Path(found))
    candidates.append(Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "nvcc")
    return next((c for c in candidates if c.exists()), None)


def parse(log: str) -> list[Report]:
    """The records of ``-Xptxas -v``: a line that names the kernel, one with its stack, one with its registers."""
    reports = []
    kernel = instance = arch = ""
    stack = spills = 0
    for line in log.splitlines():
        if m := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            name, arch = m.groups()
            known = next((k for k in RESIDENT if k in name), None)
            kernel = known or name
            instance = name.rpartition(kernel)[2] if known else ""
        elif m := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            stack, stores, loads = map(int, m.groups())
            spills = stores + loads
        elif m := re.search(r"Used (\d+) registers.*?(?:, (\d+) bytes smem)?(?:,|$)", line):
            smem = re.search(r"(\d+) bytes smem", line)
            shared = int(smem.group(1)) if smem else 0
            reports.append(Report(kernel, instance, arch, int(m.group(1)), stack, spills, shared))
    return reports


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Report]]:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc: not in CUDA_HOME, on PATH, or in the nvidia/cu13 folder of site-packages")
    arch = "90"
    folder = tmp_path_factory.mktemp(f"sm_{arch}")

    def compile_one(source: Path) -> str:
        command = [
            str(nvcc),
            "-std=c++17",
            "-O3",
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
            "-Xptxas",
            "-v",
        ]
        command += ["-Werror", "all-warnings", "-c", str(source), "-o", str(folder / f"{source.stem}.o")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stderr + done.stdout

    sources = sorted(CUDA.glob("*.cu"))
    with ThreadPoolExecutor(2) as pool:
        logs = list(pool.map(compile_one, sources))
    found = {source.stem: parse(log) for source, log in zip(sources, logs)}
    assert {r.arch for rs in found.values() for r in rs} == {arch}
    return found


def test_resources(reports: dict[str, list[Report]]) -> None:
    """No spill, no local memory, and enough blocks on a multiprocessor at once."""
    for stem, count in KERNELS.items():
        assert len(reports[stem]) == count, stem
    for r in (r for rs in reports.values() for r in rs):
        assert r.stack == 0, r
        assert r.spills == 0, r
        if r.kernel in RESIDENT:
            double = "EdLi" in r.instance and r.kernel == "channel_rows"
            wanted = 2 if double else RESIDENT[r.kernel]
            rounded = -(-r.registers // 8) * 8  # registers are handed out in eights
            assert REGISTERS_PER_MULTIPROCESSOR // (rounded * THREADS) >= wanted, r
            assert wanted * r.shared <= 64 * 1024, r  # of sm_75, the smallest


@pytest.mark.parametrize("arch", ARCHS)
def test_the_build_spilled_nothing(arch: str) -> None:
    """What the compiler said when the extension that is installed here was built."""
    record = build_info().get("_cuda", {})
    if not record.get("built"):
        pytest.skip(f"no CUDA kernels here: {record.get('reason', 'never built')}")
    if arch not in record["resources"]:
        pytest.skip(f"built for {record['archs']} alone")
    said = record["resources"][arch]
    assert said["kernels"] >= sum(KERNELS.values())
    assert said["spills"] == 0
    assert said["stack"] == 0
    assert 0 < said["registers"] <= 128  # two blocks of 256 threads on a multiprocessor


@pytest.mark.skipif(cuda._native is None, reason="no CUDA kernels here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_the_backend_hands_to_the_binding(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Without a workspace a native call launches nothing and says how much it wants: no GPU is asked."""
    wanted = []
    monkeypatch.setattr(
        cuda, "_launch", lambda device, call, *args: wanted.append(call(*args, 0, 0, 0, 0, 0, 0))
    )
    x, state = torch.zeros(4, 6, 64, 64, dtype=dtype), torch.zeros(11, 6, dtype=torch.float64)
    mean, var, weight, bias = torch.rand(4, 6)
    cuda.channel_stats(x, 1, 0, "relu", state, False)
    for norm in (BatchNorm(mean, var, weight, bias, 1e-5), BatchNorm(mean, var, None, None, 1e-5)):
        for act in ("relu", "hardswish"):
            cuda.bn_act_stats(x, norm, act, torch.empty_like(x), 1, 0, "gelu", state, True)
    scratch, tickets = wanted[0]
    assert scratch > 0
    assert tickets > 0
    assert wanted == [wanted[0]] * 5


def test_a_workspace_grows_and_belongs_to_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing, made, lent = False, [], []

    class Memory:
        def __init__(self, scratch: int, tickets: int, device: int) -> None:
            self.lent = (1000 + len(made), scratch, 2000 + len(made), tickets)
            made.append((scratch, tickets))

    def call(wanted: tuple[int, int], *rest: int) -> tuple[int, int] | None:
        if rest[1] < wanted[0] or rest[3] < wanted[1]:
            return wanted
        lent.append(rest)
        return None

    monkeypatch.setattr(cuda, "_Workspace", Memory)
    monkeypatch.setattr(cuda, "_workspaces", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7 + device, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    least = (1 << 20, 1 << 12)
    cuda._launch(0, call, (100, 5))
    cuda._launch(0, call, (200, 6))
    assert made == [least]
    assert lent == [(1000, least[0], 2000, least[1], 0, 7)] * 2
    cuda._launch(0, call, (1 << 21, 5))
    cuda._launch(0, call, (100, 5))
    assert made[1:] == [(1 << 21, least[1])]
    assert lent[2] == lent[3]
    cuda._launch(1, call, (100, 5))
    assert made[2:] == [least]
    assert lent[4][4:] == (1, 8)
    capturing = True
    cuda._launch(0, call, (300, 5))
    assert made[3:] == [(300, 5)]  # its own, and no larger than it needs
    capturing = False
    cuda._launch(0, call, (100, 5))
    assert lent[6] == lent[3]


def test_float64_is_written_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "channel_stats", reference.channel_stats)
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    mean, var, weight, bias = torch.rand(4, 5)
    for norm in (BatchNorm(mean, var, weight, bias, 1e-5), BatchNorm(mean, var, None, None, 1e-5)):
        got, wanted = [
            (torch.empty_like(x), torch.zeros(11, 5, dtype=torch.float64)) for _ in range(2)
        ]  # fmt: skip
        cuda.bn_act_stats(x, norm, "gelu", got[0], 2, 0, "silu", got[1], False)
        reference.bn_act_stats(x, norm, "gelu", wanted[0], 2, 0, "silu", wanted[1], False)
        for a, b in zip(got, wanted):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_the_report_is_understood() -> None:
    log = """ptxas info    : Compiling entry function '_ZN4idap12channel_rowsINS_7NoWriteEfLi4EEEvNS' for 'sm_75'
ptxas info    : Function properties for _ZN4idap12channel_rowsINS_7NoWriteEfLi4EEEvNS
    24 bytes stack frame, 20 bytes spill stores, 44 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 24 bytes cumulative stack size, 18440 bytes smem
"""
    assert parse(log) == [Report("channel_rows", "INS_7NoWriteEfLi4EEEvNS", "75", 80, 24, 64, 18440)]
