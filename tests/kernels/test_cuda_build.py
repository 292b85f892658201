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

from idap_kernels.build_info import build_info

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
ARCHS = ["75", "80", "86", "89", "90", "120"]
REGISTERS_PER_MULTIPROCESSOR = 65536
THREADS = 256
# Blocks that must fit a multiprocessor at once: enough loads in flight to keep the memory busy.
RESIDENT = {"channel_rows": 3, "channel_columns": 2, "pair_kernel": 3, "filter_kernel": 3}
KERNELS = {
    "channel_rows": 10,
    "channel_columns": 8,
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
            double = "IdLi" in r.instance and r.kernel == "channel_rows"
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


def test_the_report_is_understood() -> None:
    log = """ptxas info    : Compiling entry function '_ZN4idap12channel_rowsIfLi4ELi4EEEvNS' for 'sm_75'
ptxas info    : Function properties for _ZN4idap12channel_rowsIfLi4ELi4EEEvNS
    24 bytes stack frame, 20 bytes spill stores, 44 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 24 bytes cumulative stack size, 18440 bytes smem
"""
    assert parse(log) == [Report("channel_rows", "IfLi4ELi4EEEvNS", "75", 80, 24, 64, 18440)]
