"""Builds the native extensions. Neither needs torch; neither stops the install when it cannot be built.

Environment variables are listed in the README. What happened is recorded in idap_kernels/_build.json,
which ``idap doctor`` reads.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = Path("csrc")

CPU_KERNELS = [
    "channel_stats.cpp",
    "bn_act.cpp",
    "pair_stats.cpp",
    "filter_norms.cpp",
    "read.cpp",
    "table.cpp",
]
CPU_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-ffp-contract=fast",  # fused multiply-add, and nothing else of fast-math
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-Wno-uninitialized",  # GCC's own AVX-512 header
    "-Wno-maybe-uninitialized",
]
ISA_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
    ],
}

CUDA_ARCHS = ["75", "80", "86", "89", "90", "120"]
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-cudart",
    "static",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
    "-Xptxas",
    "-v",
]
# Machine code of these is made from the intermediate code of another: a third of the time is saved, and
# the same instructions come out.
CUDA_BASE = {"86": "80", "89": "80", "90": "80"}


class Unavailable(Exception):
    """An extension cannot be built here; the message is the reason a user reads."""


def off(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in ("0", "off", "false", "no")


def on(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in ("1", "on", "true", "yes")


def own_nvcc() -> Path | None:
    """nvcc of the user's toolkit: CUDA_HOME first, then PATH."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = [nvcc for home in homes if (nvcc := Path(home) / "bin" / "nvcc").exists()]
    if on_path := shutil.which("nvcc"):
        found.append(Path(on_path).resolve())
    return found[0] if found else None


def pypi_nvcc() -> Path | None:
    """nvcc of the NVIDIA packages in the environment that builds."""
    for entry in [*sys.path, sysconfig.get_path("purelib")]:
        nvcc = Path(entry) / "nvidia" / "cu13" / "bin" / "nvcc"
        if nvcc.exists():
            return nvcc
    return None


def usable_nvcc() -> Path:
    """nvcc to compile with.

    Raises:
        Unavailable: the CUDA kernels are not wanted, not for this system, or there is no nvcc.
    """
    if off("IDAP_CUDA"):
        raise Unavailable("IDAP_CUDA=0 was set")
    if not sys.platform.startswith("linux"):
        raise Unavailable(f"the CUDA kernels are built on Linux only, this is {sys.platform}")
    nvcc = own_nvcc() or pypi_nvcc()
    if nvcc is None:
        why = "pip fetches one on Linux x86-64 only"
        if cuda_platform():
            why = "none was fetched (no index that pip knows has NVIDIA's packages, or --no-build-isolation)"
        raise Unavailable(
            f"no nvcc here, and {why}: set CUDA_HOME to a CUDA toolkit, or put its nvcc on PATH, and install "
            "idap again"
        )
    return nvcc


def toolkit_root(nvcc: Path) -> Path:
    """The toolkit that nvcc belongs to, by its own word: what lies on PATH may be a wrapper script."""
    command = [str(nvcc), "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=")).resolve()
    return nvcc.parent.parent


def cudart_static(root: Path) -> Path | None:
    """The static CUDA runtime of a toolkit, be it NVIDIA's installer, conda or PyPI that laid it out."""
    names = [root / folder / "libcudart_static.a" for folder in ("lib64", "lib")]
    names += sorted(root.glob("targets/*/lib/libcudart_static.a"))
    return next((name for name in names if name.exists()), None)


def cuda_platform() -> bool:
    """Whether NVIDIA's packages on PyPI can compile for this machine."""
    return sys.platform.startswith("linux") and platform.machine().lower() in ("x86_64", "amd64")


class BuildExtensions(build_ext):
    """Compiles the CPU kernels once per instruction set and the CUDA kernels with nvcc."""

    def run(self) -> None:
        super().run()
        self.remove_stale()
        self.write_record()

    @property
    def record(self) -> dict[str, Any]:
        if not hasattr(self, "_record"):
            self._record: dict[str, Any] = {}
        return self._record

    def build_extensions(self) -> None:
        for ext in self.extensions:
            name = ext.name.rpartition(".")[2]
            try:
                if off("IDAP_NATIVE"):
                    raise Unavailable("IDAP_NATIVE=0 was set")
                entry = self.build_cpu(ext) if name == "_cpu" else self.build_cuda(ext)
            except Exception as error:
                reason = str(error) or type(error).__name__
                if isinstance(error, CompileError):
                    reason += "; 'pip install -v' shows what the compiler says"
                if name == "_cuda" and on("IDAP_CUDA"):
                    raise SystemExit(
                        f"IDAP_CUDA=1, but the CUDA kernels cannot be built: {reason}"
                    ) from error
                entry = {"built": False, "reason": reason}
                self.announce_reason(name, reason)
            self.record[name] = entry

    def announce_reason(self, name: str, reason: str) -> None:
        print(
            f"WARNING: {name} is left out ({reason}). The install goes on; see 'idap doctor'.",
            file=sys.stderr,
        )

    # ------------------------------------------------------------------ CPU
    def build_cpu(self, ext: Extension) -> dict[str, Any]:
        self.require_compiler()
        openmp = self.accepts(
            ["-fopenmp"], "#include <omp.h>\nint main() { return omp_get_max_threads() < 0; }"
        )
        flags = CPU_FLAGS + (["-fopenmp"] if openmp else [])
        isas = ["portable"]
        x86 = "#ifndef __x86_64__\n#error\n#endif\n#include <immintrin.h>\nint main() { return 0; }"
        if all(self.accepts(ISA_FLAGS[isa], x86) for isa in ("avx2", "avx512")):
            isas += ["avx2", "avx512"]
        jobs: list[tuple[str, list[str], str]] = []
        for isa in isas:
            for kernel in CPU_KERNELS:
                jobs.append((str(CSRC / "cpu" / kernel), [*flags, *ISA_FLAGS[isa], f"-DIDAP_ISA={isa}"], isa))
        binding = [*flags, "-DIDAP_X86"] if len(isas) > 1 else flags
        jobs.append((str(CSRC / "bindings_cpu.cpp"), binding, "binding"))
        objects = self.compile_all(jobs)
        self.link(ext, objects, ["-fopenmp"] if openmp else [])
        return {"built": True, "isas": isas, "openmp": openmp, "compiler": self.compiler_version()}

    def require_compiler(self) -> None:
        if self.compiler.compiler_type == "msvc":
            raise Unavailable("the kernels need GCC or Clang; MSVC has no vector extensions")
        if not self.accepts(["-std=c++17"], "int main() { return 0; }"):
            raise Unavailable(
                f"no working C++17 compiler ({self.compiler_command()}): install one (Debian: apt install g++; "
                "macOS: xcode-select --install), or name one in CXX, and install idap again"
            )
        if not self.accepts(["-std=c++17"], "#include <Python.h>\nint main() { return 0; }"):
            raise Unavailable(
                f"the compiler finds no Python.h in {sysconfig.get_path('include')} (Debian: apt install "
                "python3-dev): install the headers, and idap again"
            )

    def compile_all(self, jobs: list[tuple[str, list[str], str]]) -> list[str]:
        def compile_one(job: tuple[str, list[str], str]) -> list[str]:
            source, flags, folder = job
            return list(
                self.compiler.compile(
                    [source],
                    output_dir=str(Path(self.build_temp) / folder),
                    include_dirs=self.include_dirs + pybind_include(),
                    extra_postargs=flags,
                )
            )

        with ThreadPoolExecutor(jobs_at_once()) as pool:
            return [obj for objs in pool.map(compile_one, jobs) for obj in objs]

    def link(self, ext: Extension, objects: list[str], flags: list[str]) -> None:
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, target, extra_postargs=flags, target_lang="c++")

    def accepts(self, flags: list[str], program: str) -> bool:
        """Whether the compiler compiles and links a program with these flags."""
        with tempfile.TemporaryDirectory() as folder, silenced():
            source = Path(folder) / "probe.cpp"
            source.write_text(program, encoding="utf-8")
            try:
                objects = self.compiler.compile(
                    [str(source)], output_dir=folder, include_dirs=self.include_dirs, extra_postargs=flags
                )
                self.compiler.link_executable(
                    objects, str(Path(folder) / "probe"), extra_postargs=flags, target_lang="c++"
                )
            except Exception:
                return False
        return True

    def compiler_command(self) -> str:
        return str(getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)[0])

    def compiler_version(self) -> str:
        try:
            return run([self.compiler_command(), "--version"]).splitlines()[0]
        except (Unavailable, IndexError):
            return "unknown"

    # ------------------------------------------------------------------ CUDA
    def build_cuda(self, ext: Extension) -> dict[str, Any]:
        nvcc = usable_nvcc()
        self.require_compiler()
        root = toolkit_root(nvcc)
        library = cudart_static(root)
        if library is None:
            raise Unavailable(f"the toolkit at {root} has no libcudart_static.a: install its runtime package")
        banner = run([str(nvcc), "--version"]).splitlines()
        version = next((line.strip() for line in banner if "release" in line), "unknown")
        archs = supported_archs(nvcc)
        base = {a: CUDA_BASE.get(a, a) if CUDA_BASE.get(a, a) in archs else a for a in archs}
        codes = [f"-gencode=arch=compute_{base[a]},code=sm_{a}" for a in archs]
        codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        named = ";".join([*archs, f"{archs[-1]}+PTX"])
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        sources = sorted((CSRC / "cuda").glob("*.cu"))

        flags = [*NVCC_FLAGS, *codes, f"-I{root / 'include'}"]
        if "-compress-mode" in run([str(nvcc), "--help"]):
            flags.append("-compress-mode=size")

        def compile_one(source: Path) -> tuple[str, str]:
            target = str(folder / f"{source.stem}.o")
            return target, run([str(nvcc), *flags, "-c", str(source), "-o", target], with_errors=True)

        with ThreadPoolExecutor(jobs_at_once()) as pool:
            compiled = list(pool.map(compile_one, sources))
        objects = [target for target, _ in compiled]
        objects += self.compiler.compile(
            [str(CSRC / "bindings_cuda.cpp")],
            output_dir=str(folder),
            include_dirs=[*self.include_dirs, *pybind_include(), str(root / "include")],
            extra_postargs=["-std=c++17", "-O2", "-fvisibility=hidden", f'-DIDAP_CUDA_ARCHS="{named}"'],
        )
        self.link(ext, objects, [str(library), "-ldl", "-lrt", "-lpthread"])
        resources = resource_report("".join(log for _, log in compiled))
        return {"built": True, "archs": named, "nvcc": version, "resources": resources}

    # ------------------------------------------------------------------ record
    @property
    def in_place(self) -> bool:
        return bool(self.inplace or getattr(self, "editable_mode", False))

    def remove_stale(self) -> None:
        """A library of an earlier build must not outlive the build that left it out."""
        folders = [Path(self.build_lib), *([ROOT] if self.in_place else [])]
        for ext in self.extensions:
            if not self.record[ext.name.rpartition(".")[2]]["built"]:
                for folder in folders:
                    (folder / self.get_ext_filename(ext.name)).unlink(missing_ok=True)

    def write_record(self) -> None:
        folder = ROOT if self.in_place else Path(self.build_lib)
        path = folder / "idap_kernels" / "_build.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.record, indent=2) + "\n", encoding="utf-8")


def supported_archs(nvcc: Path) -> list[str]:
    """Compute capabilities to compile for: those of IDAP_CUDA_ARCHS, or of the default what nvcc knows.

    Raises:
        Unavailable: nvcc does not know one that was asked for.
    """
    wanted = re.findall(r"[^;,\s]+", os.environ.get("IDAP_CUDA_ARCHS", "").replace(".", ""))
    listed = run([str(nvcc), "--list-gpu-arch"]).split()
    known = sorted({int(a) for line in listed if (a := line.removeprefix("compute_")).isdigit()})
    unknown = [a for a in wanted if not a.isdigit() or int(a) not in known]
    archs = [a for a in known if str(a) in (wanted or CUDA_ARCHS)]
    if unknown or not archs:
        raise Unavailable(
            f"nvcc does not know {', '.join(unknown or CUDA_ARCHS)} (IDAP_CUDA_ARCHS), only "
            + ", ".join(map(str, known))
        )
    return [str(a) for a in archs]


def pybind_include() -> list[str]:
    import pybind11

    return [pybind11.get_include()]


def jobs_at_once() -> int:
    wanted = os.environ.get("MAX_JOBS", "")
    return max(1, int(wanted)) if wanted.isdigit() else os.cpu_count() or 1


def resource_report(log: str) -> dict[str, dict[str, int]]:
    """What ``-Xptxas -v`` says, by architecture: kernels, most registers, bytes of stack and of spills."""
    report: dict[str, dict[str, int]] = {}
    entry: dict[str, int] = {}
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '\w+' for 'sm_(\w+)'", line):
            entry = report.setdefault(found[1], {"kernels": 0, "registers": 0, "stack": 0, "spills": 0})
            entry["kernels"] += 1
        elif found := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", line
        ):
            entry["stack"] += int(found[1])
            entry["spills"] += int(found[2]) + int(found[3])
        elif found := re.search(r"Used (\d+) registers", line):
            entry["registers"] = max(entry["registers"], int(found[1]))
    return report


def run(command: list[str], with_errors: bool = False) -> str:
    """Output of a command; :class:`Unavailable` with its last error lines if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise Unavailable(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise Unavailable(f"{Path(command[0]).name} failed: " + " | ".join(lines[-3:])[:500])
    return done.stdout + done.stderr if with_errors else done.stdout


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Hides what probes print: a failed probe is an answer, not an error."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            os.close(saved[0])
            os.close(saved[1])


if __name__ == "__main__":  # also when a build backend runs this file
    setup(
        ext_modules=[
            Extension("idap_kernels._cpu", sources=[], optional=True),
            Extension("idap_kernels._cuda", sources=[], optional=True),
        ],
        cmdclass={"build_ext": BuildExtensions},
        zip_safe=False,
    )
