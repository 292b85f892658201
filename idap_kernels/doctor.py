"""What is installed, what works, and for what does not: why, and what to do."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .backends import cpu, cuda, triton
from .build_info import build_info
from .dispatch import AUTO_ORDER, available_backends, why_not
from .version import __version__

PACKAGES = ("torch", "triton", "torchvision", "timm", "transformers", "torch-pruning", "safetensors", "numpy")
VARIABLES = (  # read at run time
    "IDAP_ISA",
    "IDAP_TRITON_TUNE",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "CUDA_VISIBLE_DEVICES",
)


def report() -> dict[str, Any]:
    """Versions, machine, backends and build record, as data for JSON.

    ``backends`` has for each name ``works``, ``detail`` where it works and ``reason`` where it does not.
    ``auto`` says which backend a call gets on each kind of device. On a GPU its backends are tried first, which may
    take some seconds.
    """
    probes = {"cpu": torch.empty(1, 1)}
    if torch.cuda.is_available():
        probes["cuda"] = torch.empty(1, 1, device="cuda")
    reasons = available_backends()
    for name in ("cuda", "triton"):
        if reasons[name] is None and "cuda" in probes and not (name == "triton" and triton.interpreting()):
            reasons[name] = why_not(name, probes["cuda"])
    return {
        "idap": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "torch": {
            "cuda": torch.version.cuda,
            "threads": torch.get_num_threads(),
            "gpus": _gpus(),
        },
        "backends": {
            name: {
                "works": reason is None,
                "reason": reason,
                "detail": _detail(name) if reason is None else None,
            }
            for name, reason in reasons.items()
        },
        "auto": {
            device: next(name for name in AUTO_ORDER[device] if why_not(name, probe) is None)
            for device, probe in probes.items()
        },
        "build": build_info(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "executable": sys.executable,
    }


def format_report(data: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    lines = [f"idap {data['idap']}, Python {data['python']}, {data['platform']}", ""]
    lines.append("packages")
    for name, number in data["packages"].items():
        lines.append(f"  {name:14s} {number or 'not installed'}")
    gpus = data["torch"]["gpus"]
    lines.append(
        f"  torch uses {data['torch']['threads']} threads, CUDA {data['torch']['cuda'] or 'not built in'}"
    )
    lines += [f"  {gpu}" for gpu in gpus] or ["  no GPU that torch can use"]
    lines += ["", "backends"]
    for name, backend in data["backends"].items():
        state = "works" if backend["works"] else "no"
        why = backend["detail"] if backend["works"] else backend["reason"]
        lines.append(f"  {name:10s} {state:6s} {why}")
    lines += ["", "backend='auto' takes"]
    lines += [f"  {name} for {device} tensors" for device, name in data["auto"].items()]
    if data["environment"]:
        lines += ["", "environment"]
        lines += [f"  {name}={value}" for name, value in data["environment"].items()]
    return "\n".join(lines)


def _detail(name: str) -> str:
    if name == "cpu":
        threads = "OpenMP" if cpu.uses_openmp() else "one thread: the compiler had no OpenMP"
        return f"compiled, {cpu.isa()}, {threads}"
    if name == "cuda":
        versions = cuda.versions()
        return (
            f"compiled for sm_{cuda.architectures()}, CUDA runtime {versions['runtime']}, "
            f"driver {versions['driver']}"
        )
    if name == "triton":
        how = "run in Python, on CPU tensors" if triton.interpreting() else "compiled at their first use"
        return f"Triton {triton.version()}, kernels {how}"
    return "plain PyTorch, in float64"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(f"GPU {i}: {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return found
