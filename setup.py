"""Builds the native extensions. Neither needs torch; neither stops the install when it cannot be built.

Environment variables are listed in the README. What happened is recorded in idap_kernels/_build.json,
which ``idap doctor`` reads.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
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

ROOT = Path(__file__).resolve().parent
CSRC = Path("csrc")

CPU_KERNELS = ["channel_stats.cpp", "pair_stats.cpp", "filter_norms.cpp", "read.cpp", "table.cpp"]
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
NVCC_FLAGS = ["-std=c++17", "-O3", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# One CUDA toolkit in parts, for machines without one: all of the same minor release.
CUDA_PACKAGES = [
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
]


class Unavailable(Exception):
    """An extension cannot be built here; the message is the reason a user reads."""


def off(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in ("0", "off", "false", "no")


def own_nvcc() -> Path | None:
    """nvcc of the user's toolkit: CUDA_HOME first, then PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        nvcc = Path(home) / "bin" / "nvcc"
        return nvcc if nvcc.exists() else None
    found = shutil.which("nvcc")
    return Path(found).resolve() if found else None


def pypi_nvcc() -> Path | None:
    """nvcc of the NVIDIA packages in the environment that builds."""
    for entry in [*sys.path, sysconfig.get_path("purelib")]:
        nvcc = Path(entry) / "nvidia" / "cu13" / "bin" / "nvcc"
        if nvcc.exists():
            return nvcc
    return None


def toolkit_root(nvcc: Path) -> Path:
    """The toolkit that nvcc belongs to, by its own word: what lies on PATH may be a wrapper script."""
    command = [str(nvcc), "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=")).resolve()
    return nvcc.parent.parent


def cuda_platform() -> bool:
    return sys.platform.startswith("linux") and platform.machine().lower() in ("x86_64", "amd64")


def build_requirements() -> list[str]:
    wanted = cuda_platform() and not off("IDAP_CUDA") and not off("IDAP_NATIVE")
    return CUDA_PACKAGES if wanted and own_nvcc() is None else []


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
                if name == "_cuda" and os.environ.get("IDAP_CUDA", "") == "1":
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
        if self.compiler.compiler_type == "msvc":
            raise Unavailable("the kernels need GCC or Clang; MSVC has no vector extensions")
        if not self.accepts([], "int main() { return 0; }"):
            command = " ".join(self.compiler.compiler_so[:1])
            raise Unavailable(
                f"no working C++ compiler ({command}): install one (Debian: apt install g++; macOS: "
                "xcode-select --install) and install idap again"
            )
        if not self.accepts(["-std=c++17"], "#include <Python.h>\nint main() { return 0; }"):
            raise Unavailable(
                "Python.h is missing (Debian: apt install python3-dev); install idap again after"
            )
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

    def compiler_version(self) -> str:
        try:
            command = [*self.compiler.compiler_so[:1], "--version"]
            return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()[0]
        except (OSError, IndexError):
            return "unknown"

    # ------------------------------------------------------------------ CUDA
    def build_cuda(self, ext: Extension) -> dict[str, Any]:
        if off("IDAP_CUDA"):
            raise Unavailable("IDAP_CUDA=0 was set")
        if not sys.platform.startswith("linux"):
            raise Unavailable(f"the CUDA kernels are built on Linux only, this is {sys.platform}")
        nvcc = own_nvcc() or (pypi_nvcc() if cuda_platform() else None)
        if nvcc is None:
            raise Unavailable(
                "no nvcc: set CUDA_HOME, or put nvcc on PATH, or build with network access so that pip "
                "can fetch it, and install idap again"
            )
        root = toolkit_root(nvcc)
        library = next(
            (
                p
                for d in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib")
                if (p := root / d / "libcudart_static.a").exists()
            ),
            None,
        )
        if library is None:
            raise Unavailable(f"the toolkit at {root} has no libcudart_static.a: install its runtime package")
        version = run([str(nvcc), "--version"]).strip().splitlines()[-2].strip()
        archs = self.supported_archs(nvcc)
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        named = ";".join([*archs, f"{archs[-1]}+PTX"])
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        sources = sorted((CSRC / "cuda").glob("*.cu"))

        def compile_one(source: Path) -> str:
            target = folder / f"{source.stem}.o"
            run(
                [
                    str(nvcc),
                    *NVCC_FLAGS,
                    *codes,
                    f"-I{root / 'include'}",
                    "-c",
                    str(source),
                    "-o",
                    str(target),
                ]
            )
            return str(target)

        with ThreadPoolExecutor(jobs_at_once()) as pool:
            objects = list(pool.map(compile_one, sources))
        objects += self.compiler.compile(
            [str(CSRC / "bindings_cuda.cpp")],
            output_dir=str(folder),
            include_dirs=[*self.include_dirs, *pybind_include(), str(root / "include")],
            extra_postargs=["-std=c++17", "-O2", "-fvisibility=hidden", f'-DIDAP_CUDA_ARCHS="{named}"'],
        )
        self.link(ext, objects, [str(library), "-ldl", "-lrt", "-lpthread"])
        return {"built": True, "archs": named, "nvcc": version}

    def supported_archs(self, nvcc: Path) -> list[str]:
        wanted = os.environ.get("IDAP_CUDA_ARCHS", "").replace(",", ";").replace(" ", ";")
        names = [a for a in wanted.split(";") if a] or CUDA_ARCHS
        known = {
            line.strip().removeprefix("compute_") for line in run([str(nvcc), "--list-gpu-arch"]).split()
        }
        archs = sorted((a for a in names if a in known), key=int)
        if not archs:
            raise Unavailable(f"this nvcc knows none of the architectures {', '.join(names)}")
        if wanted and len(archs) < len(names):
            raise Unavailable(
                f"IDAP_CUDA_ARCHS={wanted}: this nvcc knows {', '.join(sorted(known, key=int))}"
            )
        return archs

    # ------------------------------------------------------------------ record
    def remove_stale(self) -> None:
        """A library of an earlier build must not outlive the build that left it out."""
        for ext in self.extensions:
            name = ext.name.rpartition(".")[2]
            if not self.record.get(name, {}).get("built"):
                with contextlib.suppress(FileNotFoundError):
                    Path(self.get_ext_fullpath(ext.name)).unlink()
                if self.inplace or getattr(self, "editable_mode", False):
                    with contextlib.suppress(FileNotFoundError):
                        (ROOT / self.get_ext_filename(ext.name)).unlink()

    def write_record(self) -> None:
        folder = ROOT if self.inplace or getattr(self, "editable_mode", False) else Path(self.build_lib)
        path = folder / "idap_kernels" / "_build.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.record, indent=2) + "\n", encoding="utf-8")


def pybind_include() -> list[str]:
    import pybind11

    return [pybind11.get_include()]


def jobs_at_once() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def run(command: list[str]) -> str:
    """Output of a command; :class:`Unavailable` with its last error lines if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise Unavailable(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise Unavailable(f"{Path(command[0]).name} failed: " + " | ".join(lines[-3:])[:500])
    return done.stdout


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


setup(
    ext_modules=[
        Extension("idap_kernels._cpu", sources=[], optional=True),
        Extension("idap_kernels._cuda", sources=[], optional=True),
    ],
    cmdclass={"build_ext": BuildExtensions},
    setup_requires=build_requirements(),
    zip_safe=False,
)
