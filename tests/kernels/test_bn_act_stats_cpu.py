"""What is particular to the compiled CPU kernels: instruction sets, threads, all paths of work, memory around y."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from idap_kernels import available_backends, bn_act_stats, build_info, channel_stats
from idap_kernels.backends import cpu
from idap_kernels.dispatch import OUTPUT_ACTIVATION_CODES, BatchNorm

from .common import TOLERANCE

pytestmark = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason=f"CPU kernels: {available_backends()['cpu']}"
)

# One unit in the last place of y, relative to the largest terms that make it up.
ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-13, torch.float16: 1e-3, torch.bfloat16: 8e-3}

# (shape as stored, order of its dimensions in the map (B, C, *)): every path of work and what is left over in it.
# The last four are 4 MB and more in float32: they are written past the caches.
MAPS = {
    "tiles": ((3, 40, 7, 7), (0, 1, 2, 3)),
    "tiles, rows shorter than a vector": ((2, 50, 3), (0, 1, 2)),
    "tiles, channels outermost": ((35, 2, 9), (1, 0, 2)),
    "rows": ((2, 3, 57, 61), (0, 1, 2, 3)),
    "rows, positions innermost but apart": ((5, 6, 2, 7), (1, 2, 0, 3)),
    "rows, samples innermost": ((6, 5, 7, 3), (3, 0, 1, 2)),
    "channels": ((2, 9, 140, 37), (0, 3, 1, 2)),
    "channels, two blocks": ((2, 11, 259), (0, 2, 1)),
    "channels, fewer than a vector": ((2, 150, 3), (0, 2, 1)),
    "channels, positions outermost": ((13, 3, 70), (1, 2, 0)),
    "vectors": ((300, 33), (0, 1)),
    "vectors, samples innermost": ((33, 300), (1, 0)),
    "tiles, streamed": ((450, 51, 7, 7), (0, 1, 2, 3)),
    "rows, streamed": ((2, 3, 421, 419), (0, 1, 2, 3)),
    "channels, streamed": ((3, 67, 71, 77), (0, 3, 1, 2)),
    "channels, two blocks, streamed": ((2, 1900, 277), (0, 2, 1)),
}


def walled(
    shape: tuple[int, ...], order: tuple[int, ...], dtype: torch.dtype, shift: int
) -> tuple[Tensor, Tensor]:
    """A map in the middle of a buffer of NaN, ``shift`` elements from the alignment of an allocation."""
    n = torch.Size(shape).numel()
    buffer = torch.full((n + 256,), float("nan"), dtype=dtype)
    return buffer, buffer[64 + shift : 64 + shift + n].view(shape).permute(order)


def norm_of(channels: int, dtype: torch.dtype = torch.float32) -> BatchNorm:
    mean, weight, bias = torch.randn(3, channels).to(dtype)
    return BatchNorm(mean, (torch.rand(channels) + 0.3).to(dtype), weight, bias, 1e-5)


def assert_close(y: Tensor, x: Tensor, norm: BatchNorm, act: str, what: str) -> None:
    wanted, _ = bn_act_stats(x.double(), *norm[:4], eps=norm.eps, act=act, backend="reference")
    scale = norm.weight.double().abs() / (norm.var.double() + norm.eps).sqrt()
    size = (
        scale * (x.double().movedim(1, -1).abs() + norm.mean.double().abs()) + norm.bias.double().abs()
    ).movedim(-1, 1)
    error = ((y.double() - wanted).abs() / size.clamp_min(1e-30)).max().item()
    assert error <= ROUNDING[x.dtype], f"{what}: {error}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("shape", "order"), MAPS.values(), ids=MAPS)
def test_every_path_writes_y_and_nothing_else(shape, order, dtype):
    for shift in (0, 3):
        _, x = walled(shape, order, dtype, shift)
        x.copy_(torch.randn(x.shape) * 2 + 0.3)
        norm = norm_of(x.shape[1])
        for act in ["hardswish"] if x.numel() > 2**19 else OUTPUT_ACTIVATION_CODES:
            buffer, y = walled(shape, order, dtype, 5 - shift)
            state = torch.full((11, x.shape[1]), float("nan"), dtype=torch.float64)
            cpu.bn_act_stats(x, norm, act, y, 1, 0, "relu", state, False)
            assert_close(y, x, norm, act, f"{act}, {shift}")
            assert int(buffer.isnan().sum()) == 256
            assert torch.equal(state, channel_stats(x, backend="cpu").state)


@pytest.mark.parametrize(("shape", "order"), MAPS.values(), ids=MAPS)
def test_threads_do_not_change_a_bit(shape, order):
    before = torch.get_num_threads()
    try:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape).to(dtype).permute(order)
            norm = norm_of(x.shape[1])
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(bn_act_stats(x, *norm[:4], act="silu", backend="cpu"))
            for y, stats in results[1:]:
                assert torch.equal(y, results[0][0])
                assert torch.equal(stats.state, results[0][1].state)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("parameters", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
def test_parameters_of_every_dtype(dtype, parameters):
    for channels in (1, 3, 16, 37):
        x = torch.randn(2, channels, 5, 9).to(dtype)
        norm = norm_of(channels, parameters)
        y, _ = bn_act_stats(x, *norm[:4], act="identity", backend="cpu")
        assert_close(y, x, norm, "identity", f"{channels} channels")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_rounded_to_nearest_even(dtype):
    """Every half times a factor that needs rounding: overflow, subnormals, infinities and NaN among them."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(256, 1, 256)
    for factor in (1.0, 0.5, 1.0009765625, 3.1415927, 2.0**-9, 2.0**9):
        norm = torch.zeros(1), torch.ones(1), torch.tensor([factor])
        y, _ = bn_act_stats(x, *norm, eps=0.0, act="identity", backend="cpu")
        wanted = (x.float() * torch.tensor(factor)).to(dtype)
        assert torch.equal(y.isnan(), wanted.isnan())
        ends = {"nan": 0.0, "posinf": torch.inf, "neginf": -torch.inf}
        assert torch.equal(y.nan_to_num(**ends), wanted.nan_to_num(**ends))


def test_nan_and_infinities_go_through_as_in_torch():
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1e30, -1e30, 4.0, -4.0])
    x = special.repeat(2, 20, 9)
    for act in OUTPUT_ACTIVATION_CODES:
        args = torch.zeros(20), torch.ones(20)
        y, _ = bn_act_stats(x, *args, eps=0.0, act=act, backend="cpu")
        wanted, _ = bn_act_stats(x, *args, eps=0.0, act=act, backend="reference")
        torch.testing.assert_close(y, wanted, equal_nan=True, msg=act)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa):
    if isa not in build_info.build_info().get("_cpu", {}).get("isas", []):
        pytest.skip(f"{isa} was not compiled in")
    names = "every_path or every_dtype or nearest_even or nan_and"
    arguments = ["-q", "-x", "-p", "no:cacheprovider", "-k", names, __file__]
    environment = {**os.environ, "IDAP_ISA": isa}
    probe = "from idap_kernels.backends import cpu; print(cpu.unavailable() or '')"
    root = Path(__file__).parents[2]
    reason = subprocess.run(
        [sys.executable, "-c", probe], env=environment, cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()
    if reason:
        pytest.skip(reason)
    command = [sys.executable, "-m", "pytest", *arguments]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
