"""What setup.py decides, what it records, and what the installed package says of it."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from idap_kernels import available_backends, build_info

ROOT = Path(__file__).parents[2]
pytest.importorskip("setuptools", minversion="77")
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no source tree here")

VARIABLES = ("IDAP_CUDA", "IDAP_NATIVE", "IDAP_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS")


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """setup.py as a module, in an environment without nvcc and without our variables."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "setup", raising=False)
    module = importlib.import_module("setup")
    assert module.__file__ == str(ROOT / "setup.py")
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setattr(module, "pypi_nvcc", lambda: None)
    yield module
    sys.modules.pop("setup", None)


@pytest.fixture
def backend(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    sys.modules.pop("build_backend", None)
    module = importlib.import_module("build_backend")
    monkeypatch.setattr(module, "obtainable", lambda packages: True)
    on_machine(monkeypatch, "linux", "x86_64")
    yield module
    sys.modules.pop("build_backend", None)


def on_machine(monkeypatch: pytest.MonkeyPatch, system: str, machine: str) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def build_extensions(folder: Path, path: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """``setup.py build_ext`` into ``folder``, with the programs on ``path`` alone."""
    environment = {k: v for k, v in os.environ.items() if k not in (*VARIABLES, "CC", "CXX")}
    command = [sys.executable, "setup.py", "-q", "build_ext", "-b", str(folder), "-t", str(folder / "temp")]
    environment |= {"PATH": str(path), **variables}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def recorded(folder: Path, done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "idap_kernels" / "_build.json").read_text())
    assert set(record) == {"_cpu", "_cuda"}
    for name, entry in record.items():
        assert not entry["built"]
        assert f"{name} is left out ({entry['reason']})" in done.stderr
    return {name: entry["reason"] for name, entry in record.items()}


# ---------------------------------------------------------------------- variables
@pytest.mark.parametrize(
    ("value", "off", "on"),
    [
        ("0", True, False),
        ("OFF", True, False),
        ("no", True, False),
        ("1", False, True),
        (" On ", False, True),
        ("", False, False),
        ("maybe", False, False),
    ],
)
def test_switches(setup, monkeypatch, value, off, on):
    monkeypatch.setenv("IDAP_CUDA", value)
    assert (setup.off("IDAP_CUDA"), setup.on("IDAP_CUDA")) == (off, on)


def test_jobs(setup, monkeypatch):
    for value, wanted in (("3", 3), ("0", 1), ("", os.cpu_count()), ("many", os.cpu_count())):
        monkeypatch.setenv("MAX_JOBS", value)
        assert setup.jobs_at_once() == wanted


# ---------------------------------------------------------------------- nvcc
def test_nvcc_of_the_users_toolkit_goes_first(setup, monkeypatch, tmp_path):
    assert setup.own_nvcc() is None
    on_path = script(tmp_path / "path" / "nvcc", "")
    link = tmp_path / "links" / "nvcc"
    link.parent.mkdir()
    link.symlink_to(on_path)
    monkeypatch.setattr(setup.shutil, "which", lambda name: str(link))
    assert setup.own_nvcc() == on_path
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "empty"))
    assert setup.own_nvcc() == on_path
    home = script(tmp_path / "toolkit" / "bin" / "nvcc", "")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "toolkit"))
    assert setup.own_nvcc() == home


def test_nvcc_from_pypi_is_found_on_the_module_path(setup, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    nvcc = script(tmp_path / "nvidia" / "cu13" / "bin" / "nvcc", "")
    assert setup.pypi_nvcc() == nvcc


def test_the_toolkit_of_a_wrapper_script(setup, tmp_path):
    toolkit = tmp_path / "toolkit"
    wrapper = script(
        tmp_path / "bin" / "nvcc", f"echo '#$ _SPACE_= ' >&2; echo '#$ TOP={toolkit}/bin/..' >&2"
    )
    (toolkit / "bin").mkdir(parents=True)
    assert setup.toolkit_root(wrapper) == toolkit
    silent = script(tmp_path / "other" / "bin" / "nvcc", "exit 1")
    assert setup.toolkit_root(silent) == tmp_path / "other"


@pytest.mark.parametrize("folder", ["lib64", "lib", "targets/sbsa-linux/lib"])
def test_the_static_runtime_of_every_layout(setup, tmp_path, folder):
    assert setup.cudart_static(tmp_path) is None
    library = tmp_path / folder / "libcudart_static.a"
    library.parent.mkdir(parents=True)
    library.touch()
    assert setup.cudart_static(tmp_path) == library


def test_architectures(setup, monkeypatch, tmp_path):
    nvcc = script(tmp_path / "nvcc", "for a in 75 80 86 89 90 90a 100; do echo compute_$a; done")
    assert setup.supported_archs(nvcc) == ["75", "80", "86", "89", "90"]
    for asked in ("90;80", "90, 80", "9.0 8.0", "80;80;90;"):
        monkeypatch.setenv("IDAP_CUDA_ARCHS", asked)
        assert setup.supported_archs(nvcc) == ["80", "90"]
    monkeypatch.setenv("IDAP_CUDA_ARCHS", "90;120")
    with pytest.raises(setup.Unavailable, match=r"does not know 120 .* only 75, 80, 86, 89, 90, 100"):
        setup.supported_archs(nvcc)
    monkeypatch.delenv("IDAP_CUDA_ARCHS")
    with pytest.raises(setup.Unavailable, match="does not know 75"):
        setup.supported_archs(script(tmp_path / "old", "echo compute_50"))
    with pytest.raises(setup.Unavailable, match="nvcc failed: no licence"):
        setup.supported_archs(script(tmp_path / "broken" / "nvcc", "echo no licence >&2; exit 1"))


# ---------------------------------------------------------------------- build requirements
def test_nvcc_is_fetched_only_where_it_is_wanted_and_not_here(backend, monkeypatch):
    assert backend.cuda_requirements() == backend.CUDA_PACKAGES
    assert all(package.endswith("==13.0.*") for package in backend.CUDA_PACKAGES)
    for variable in ("IDAP_CUDA", "IDAP_NATIVE"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "0")
            assert backend.cuda_requirements() == []
    for system, machine in (
        ("linux", "aarch64"),
        ("darwin", "arm64"),
        ("darwin", "x86_64"),
        ("win32", "AMD64"),
    ):
        with monkeypatch.context() as patch:
            on_machine(patch, system, machine)
            assert backend.cuda_requirements() == []
    for found in ("own_nvcc", "pypi_nvcc"):
        with monkeypatch.context() as patch:
            patch.setattr(backend, found, lambda: Path("nvcc"))
            assert backend.cuda_requirements() == []


def test_what_pip_cannot_find_is_not_required(backend, monkeypatch):
    monkeypatch.setattr(backend, "obtainable", lambda packages: False)
    assert backend.cuda_requirements() == []
    monkeypatch.setenv("IDAP_CUDA", "1")  # the kernels or nothing: pip is to say what is missing
    assert backend.cuda_requirements() == backend.CUDA_PACKAGES


def test_pip_is_asked(setup, monkeypatch, tmp_path):
    pytest.importorskip("pip")
    backend = importlib.import_module("build_backend")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert not backend.obtainable(["nvidia-cuda-nvcc==13.0.*"])
    monkeypatch.setattr(backend.sys, "executable", str(script(tmp_path / "python", "exit 1")))
    assert backend.obtainable(["nvidia-cuda-nvcc==13.0.*"])  # no pip to ask


# ---------------------------------------------------------------------- builds that leave something out
def test_everything_switched_off_and_nothing_stale(tmp_path):
    stale = tmp_path / "idap_kernels" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.parent.mkdir()
    stale.touch()
    reasons = recorded(tmp_path, build_extensions(tmp_path, os.environ["PATH"], IDAP_NATIVE="0"))
    assert reasons == dict.fromkeys(("_cpu", "_cuda"), "IDAP_NATIVE=0 was set")
    assert not stale.exists()


def test_no_compiler(tmp_path):
    reasons = recorded(tmp_path, build_extensions(tmp_path, tmp_path))
    assert "no working C++17 compiler (" in reasons["_cpu"]
    assert (
        "no nvcc here" in reasons["_cuda"] or reasons["_cuda"] == reasons["_cpu"]
    )  # nvidia-cuda-nvcc is here


def test_a_broken_compiler_beside_nvcc(tmp_path):
    script(tmp_path / "toolkit" / "bin" / "nvcc", "exit 1")
    variables = {"CXX": "/bin/false", "CUDA_HOME": str(tmp_path / "toolkit")}
    reasons = recorded(tmp_path, build_extensions(tmp_path, tmp_path, **variables))
    assert "no working C++17 compiler (/bin/false)" in reasons["_cpu"]
    assert reasons["_cuda"] == reasons["_cpu"]


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ here")
def test_no_python_headers(tmp_path):
    refuse = 'for a; do case $a in *.cpp) grep -q Python.h $a && exit 1;; esac; done; exec g++ "$@"'
    compiler = str(script(tmp_path / "bin" / "compiler", refuse))
    reasons = recorded(tmp_path, build_extensions(tmp_path, os.environ["PATH"], CXX=compiler, IDAP_CUDA="0"))
    assert "finds no Python.h" in reasons["_cpu"]
    assert reasons["_cuda"] == "IDAP_CUDA=0 was set"


def test_cuda_or_nothing(tmp_path):
    done = build_extensions(tmp_path, tmp_path, CXX="/bin/false", IDAP_CUDA="1")
    assert done.returncode != 0
    assert "IDAP_CUDA=1, but the CUDA kernels cannot be built: no " in done.stderr
    assert not (tmp_path / "idap_kernels" / "_build.json").exists()


@pytest.mark.parametrize(
    ("system", "machine", "words"),
    [
        ("linux", "aarch64", "on Linux x86-64 only"),
        ("darwin", "arm64", "built on Linux only, this is darwin"),
        ("linux", "x86_64", "none was fetched"),
    ],
)
def test_why_there_is_no_nvcc(setup, monkeypatch, system, machine, words):
    on_machine(monkeypatch, system, machine)
    with pytest.raises(setup.Unavailable, match=words):
        setup.usable_nvcc()


# ---------------------------------------------------------------------- the installed package
@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    monkeypatch.setattr(build_info, "build_info", lambda: entries)
    return entries


def test_reasons_of_a_missing_extension(record):
    error = ImportError("libgomp.so.1: cannot open shared object file")
    assert "never built" in build_info.extension_missing("_cpu", error)
    record["_cpu"] = {"built": False, "reason": "no compiler"}
    assert build_info.extension_missing("_cpu", error) == "the extension was not built: no compiler"
    record["_other"] = {"built": True}
    assert "_other" in build_info.extension_missing("_other", error)
    assert "another Python" in build_info.extension_missing("_other", error)


@pytest.mark.skipif(available_backends()["cpu"] is not None, reason="no CPU kernels here")
def test_an_extension_that_does_not_load(record):
    record["_cpu"] = {"built": True}
    error = ImportError("libgomp.so.1: cannot open shared object file")
    assert "does not load: libgomp" in build_info.extension_missing("_cpu", error)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(available_backends()["cpu"] is not None, reason="no CPU kernels here")
def test_one_openmp_runtime():
    """The kernels run on torch's own OpenMP threads: no second runtime, and its thread number holds."""
    code = """
import torch, idap_kernels
torch.set_num_threads(2)
x = torch.randn(8, 64, 56, 56)
torch.relu(x).sum()
threads = len(__import__("os").listdir("/proc/self/task"))
idap_kernels.channel_stats(x, backend="cpu")
assert len(__import__("os").listdir("/proc/self/task")) <= max(threads, 2), "the kernels started threads"
maps = open("/proc/self/maps").read().split()
print(len({path for path in maps if "libgomp" in path or "libomp" in path or "libiomp" in path}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"]


# ---------------------------------------------------------------------- files
def test_every_package_and_data_file_is_in_the_build(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path)]
    command += ["build_py", "-d", str(tmp_path / "lib")]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    built = {p.relative_to(tmp_path / "lib") for p in (tmp_path / "lib").rglob("*") if p.is_file()}
    wanted = {p.relative_to(ROOT) for name in ("idap", "idap_kernels") for p in (ROOT / name).rglob("*.py")}
    wanted |= {Path("idap/py.typed"), Path("idap_kernels/py.typed")}
    wanted |= {p.relative_to(ROOT) for p in (ROOT / "idap" / "quickstart").glob("*.safetensors")}
    assert wanted - built == set()
    assert not [p for p in built if p.suffix in (".so", ".json")]
