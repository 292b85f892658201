"""setuptools as the build backend; beside it, CUDA's compiler from PyPI where it is wanted and can be had."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  # every hook that is not below

from setup import cuda_platform, off, on, own_nvcc, pypi_nvcc

# One CUDA toolkit in parts, all of the same minor release. cccl has a header that cuda_fp16.h includes.
CUDA_PACKAGES = [
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *cuda_requirements()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *cuda_requirements()]


def cuda_requirements() -> list[str]:
    """What to fetch before the CUDA kernels can be compiled.

    A requirement that cannot be met would end the install, so it is made only if pip can meet it, or if
    ``IDAP_CUDA=1`` asks for the kernels or nothing.
    """
    if not cuda_platform() or off("IDAP_CUDA") or off("IDAP_NATIVE") or own_nvcc() or pypi_nvcc():
        return []
    return CUDA_PACKAGES if on("IDAP_CUDA") or obtainable(CUDA_PACKAGES) else []


def obtainable(packages: list[str]) -> bool:
    """Whether pip finds all packages with the indexes configured; yes if there is no pip to ask."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed"]
    command += ["--timeout", "15", "--retries", "1", *packages]
    # pip hides itself from the builds it isolates, through PYTHONPATH.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return "No matching distribution" not in done.stderr
