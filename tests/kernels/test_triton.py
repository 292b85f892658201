"""The Triton kernels: interpreted, compiled for GPUs that are not here, and run on a GPU where there is one.

Whether Triton interprets is decided when it is imported, so the interpreted tests of this file run in a process of
their own, which ``test_under_the_interpreter`` starts.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from idap_kernels import (
    BackendUnavailable,
    ChannelStats,
    available_backends,
    bn_act_stats,
    channel_stats,
    dispatch,
    filter_norms,
    pair_stats,
)
from idap_kernels.backends import cpu, reference, triton
from idap_kernels.backends import triton_plan as plans
from idap_kernels.backends.self_check import self_check
from idap_kernels.channel_stats import ROWS
from idap_kernels.doctor import report

from .common import TOLERANCE, assert_state_close, layouts

INTERPRETED = triton.interpreting()
HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPE_NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}

interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_under_the_interpreter")
alone = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no part in it")
compiles = pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="needs Triton's compiler")
_reason = available_backends()["triton"]
on_gpu = pytest.mark.skipif(INTERPRETED or _reason is not None, reason=f"Triton kernels: {_reason}")


@alone
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_under_the_interpreter():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-W",
        "ignore",
        "-p",
        "no:cacheprovider",
        str(Path(__file__)),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-2000:]
    assert int(passed[1]) >= 20


# ------------------------------------------------------------------------------------------------ the plan, pure


def channel_plan(
    x: Tensor, channel_dim: int = 1, sample_dim: int = 0, sms: int = 132, **more
) -> plans.ChannelPlan:
    return plans.plan_channel_stats(
        tuple(x.shape),
        x.stride(),
        channel_dim,
        sample_dim,
        x.element_size(),
        more.pop("aligned", True),
        sms,
        **more,
    )


def parameters(channels: int, dtype: torch.dtype, device: str = "cpu") -> dispatch.BatchNorm:
    mean, weight, bias = torch.randn(3, channels, dtype=torch.float64).to(device, dtype)
    var = torch.rand(channels, dtype=torch.float64) * 3 + 0.05
    return dispatch.BatchNorm(mean, var.to(device, dtype), weight, bias, 1e-3)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


MAPS = [
    (empty(32, 64, 112, 112), {}),
    (empty(64, 1024, 14, 14), {}),
    (empty(64, 2048, 7, 7, dtype=torch.bfloat16), {}),
    (empty(1, 2048, 7, 7), {}),
    (empty(1, 1, 1 << 20), {}),
    (empty(1, 1, 1 << 31), {}),
    (empty(1024, 3, 2, 2), {}),
    (empty(1024, 8192), {}),
    (empty(16, 4096, 4096, dtype=torch.bfloat16), {"channel_dim": 2}),
    (empty(197, 32, 768), {"channel_dim": 2, "sample_dim": 1}),
    (empty(32, 256, 56, 56).to(memory_format=torch.channels_last), {}),
    (empty(8, 64, 40, 40)[:, :, 1:36, 2:39], {}),
    (empty(5, 7, 9).transpose(1, 2), {}),
    (empty(2, 3, 4, dtype=torch.float64), {}),
]


@pytest.mark.parametrize("config", plans.CANDIDATES, ids=str)
def test_every_plan_covers_its_map_once(config):
    for (x, dims), sms in itertools.product(MAPS, (1, 16, 132)):
        p = channel_plan(x, **dims, sms=sms, config=config)
        samples, channels = x.shape[dims.get("sample_dim", 0)], x.shape[dims.get("channel_dim", 1)]
        assert p.positions == x.numel() // samples // channels
        assert (p.tiles - 1) * p.channels_tile < channels <= p.tiles * p.channels_tile
        assert (p.sample_blocks - 1) * p.per_block < samples <= p.sample_blocks * p.per_block
        assert (p.pieces - 1) * p.piece < p.positions <= p.pieces * p.piece
        assert p.pieces == 1 or p.per_block == p.samples_tile == 1
        assert p.piece % p.step == 0
        assert p.programs < 1 << 31
        # A tile has one place for each thread, times the vector where that lies across the channels.
        width = p.vec if p.columns else 1
        assert p.samples_tile * p.channels_tile * p.lanes == 32 * p.warps * width
        # What a thread adds up in the precision of the data.
        at_once = p.samples_tile * (p.unroll if p.over_samples else 1)
        adds = -(-min(p.per_block, samples) // at_once) * -(-min(p.piece, p.positions) // p.step) * p.unroll
        assert adds <= max(plans.MAX_ADDS, p.unroll)


def test_no_recompile_for_a_new_batch_size():
    shapes = [
        ((3, 5), 1),
        ((64, 7, 7), 1),
        ((64, 112, 112), 1),
        ((2048, 14, 14), 1),
        ((197, 768), 2),
        ((90, 12), 2),
    ]
    for (rest, channel_dim), dtype in itertools.product(shapes, DTYPE_NAMES):
        made = set()
        for batch in (1, 2, 3, 8, 17, 256, 1024):
            x = empty(batch, *rest, dtype=dtype)
            plain = channel_plan(x, channel_dim)
            made.add((*sorted(plain.constants().items()), plain.warps, plain.registers))
            for act in ("relu", "gelu"):  # what is written besides, changes no sum
                p = channel_plan(x, channel_dim, act=act)
                assert dataclasses.replace(p, registers=plain.registers) == plain
                assert p.registers >= plain.registers
                made.add((act, p.registers))
        assert len(made) == 3, (rest, dtype, made)
    for rest, row_dims in (((768,), 1), ((197, 768), 1), ((197, 768), 2), ((64, 7, 7), 1)):
        made = set()
        for batch in (1, 2, 3, 8, 17, 256):
            x = empty(batch, *rest)
            p = plans.plan_pair_stats(tuple(x.shape), x.stride(), x.stride(), row_dims, 4, True, 132)
            made.add((*sorted(p.constants().items()), p.warps))
        assert len(made) == 1, (rest, made)


def test_the_plan_takes_wide_loads_where_it_may():
    assert channel_plan(empty(2, 8, 4, 4)).vec == 4
    assert channel_plan(empty(2, 8, 4, 4, dtype=torch.bfloat16)).vec == 8
    assert channel_plan(empty(2, 8, 14, 14, dtype=torch.bfloat16)).vec == 4
    assert channel_plan(empty(2, 8, 7, 7)).vec == 1
    assert channel_plan(empty(2, 8, 4, 4), aligned=False).vec == 1
    assert channel_plan(empty(2, 9, 8)[:, :, ::2]).vec == 1
    columns = channel_plan(empty(2, 50, 64, dtype=torch.float16), 2)
    assert columns.columns
    assert not columns.rows
    assert columns.vec == 4
    assert channel_plan(empty(2, 50, 63), 2).vec == 1


def test_large_maps_fill_a_gpu_and_their_records_stay_small():
    for x, dims in MAPS:
        p = channel_plan(x, **dims)
        size = x.numel() * x.element_size()
        if size >= 64 << 20:
            assert p.programs >= 3 * 132
            assert 2 * 8 * p.scratch <= size / 8


def test_merging_dimensions():
    assert plans.merge_dims([(2, 60), (3, 20), (1, 7), (4, 5), (5, 1)], sort=True) == [(120, 1)]
    assert plans.merge_dims([(5, 1), (4, 5)], sort=True) == [(20, 1)]
    assert plans.merge_dims([(5, 1), (4, 5)], sort=False) == [(5, 1), (4, 5)]
    assert plans.merge_dims([(4, 10, 8), (8, 1, 1)], sort=True) == [(4, 10, 8), (8, 1, 1)]
    assert plans.merge_dims([(1, 3)], sort=True) == []


# ------------------------------------------------------------------------------------- reasons, and the way round


@alone
def test_a_missing_triton_has_a_reason(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in triton.unavailable.__wrapped__()


@alone
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_has_a_reason_and_triton_is_not_imported_for_it():
    code = """
import sys
import idap_kernels
print("triton" in sys.modules, idap_kernels.available_backends()["triton"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith("False ")
    assert re.search("no usable GPU|no CUDA build|not a CUDA build|not installed", done.stdout), done.stdout
    with pytest.raises(BackendUnavailable, match="triton"):
        channel_stats(torch.randn(2, 3), backend="triton")


def test_an_old_triton_and_an_old_gpu_have_a_reason(monkeypatch):
    class Properties:
        name, major, minor = "Tesla V100", 7, 0

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    assert triton._device_unfit(0) == "Tesla V100 is sm_70, older than sm_75"
    monkeypatch.setitem(sys.modules, "triton", type(sys)("triton"))
    sys.modules["triton"].__version__ = "3.2.0"
    assert "3.2.0 is too old" in triton._import_kernels.__wrapped__()[1]


def test_auto_never_takes_triton_on_the_cpu(monkeypatch):
    monkeypatch.setattr(triton, "channel_stats", lambda *a: pytest.fail("it ran"))
    monkeypatch.setattr(cpu, "unavailable", lambda: "no compiler")
    channel_stats(torch.randn(2, 3))
    assert report()["auto"]["cpu"] == "reference"
    assert dispatch.AUTO_ORDER["cuda"] == ("cuda", "triton", "reference")


def test_auto_goes_on_when_a_kernel_does_not_compile(monkeypatch):
    """With the order of a GPU, played on the CPU."""

    class Kernel:
        def __getitem__(self, grid):
            def launch(*args, **constants):
                raise RuntimeError("ptxas fatal: no such architecture")

            return launch

    kernels = type(
        "Kernels", (), {"channel_kernel": Kernel(), "pair_kernel": Kernel(), "entry_kernel": Kernel()}
    )
    reasons: dict[int | None, str | None] = {}
    monkeypatch.setitem(dispatch.AUTO_ORDER, "cpu", ("triton", "reference"))
    monkeypatch.setattr(triton, "_import_kernels", lambda: (kernels, None))
    monkeypatch.setattr(triton, "interpreting", lambda: False)
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    monkeypatch.setattr(triton, "_device_reasons", reasons)
    monkeypatch.setattr(triton, "refuses", lambda x: reasons.get(None))
    monkeypatch.setattr(triton, "_capturing", lambda: False)
    monkeypatch.setattr(triton, "_stream_key", lambda device: (0, 0))
    monkeypatch.setattr(triton, "_workspaces", {})
    x = torch.randn(2, 3, 4)
    norm = parameters(3, torch.float32)
    for call in (
        lambda b: channel_stats(x, backend=b).state,
        lambda b: bn_act_stats(x, *norm[:4], backend=b)[0],
        lambda b: (
            bn_act_stats(x, *norm[:4], backend=b, out=channel_stats(x + 1, backend="reference"))[1].state
        ),
        lambda b: pair_stats(x, x + 1, backend=b).state,
        lambda b: filter_norms([x], backend=b)[0],
    ):
        reasons.clear()
        with pytest.raises(BackendUnavailable, match="ptxas fatal"):
            call("triton")
        reasons.clear()
        assert torch.equal(call("auto"), call("reference"))
        assert "ptxas fatal" in str(dispatch.why_not("triton", x))
        assert torch.equal(call("auto"), call("reference"))


# --------------------------------------------------------------------------------------- compiled, without a GPU


def compile_for(kernel, arch: int, types: dict[str, str], constants: dict, warps: int, registers: int | None):
    """Registers, bytes of stack and the loads of a kernel, from the compiler and the disassembler in Triton's wheel."""
    import triton as compiler
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    names = [n for n in kernel.arg_names if n not in constants]
    aligned = {
        (kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in names if n in ("x", "y", "result")
    }
    source = ASTSource(kernel, signature, constexprs=dict(constants), attrs=aligned)
    options = {"num_warps": warps, "maxnreg": registers, "enable_fp_fusion": True}
    made = compiler.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this build of Triton brings no cuobjdump")
    # It does not read from a pipe.
    path = Path(os.environ["PYTEST_TMP"]) / "kernel.cubin"
    path.write_bytes(made.asm["cubin"])
    said = subprocess.run([str(tool), "-res-usage", str(path)], capture_output=True, text=True).stdout
    registers, stack, local = (int(re.search(rf"{w}:(\d+)", said)[1]) for w in ("REG", "STACK", "LOCAL"))
    return registers, stack + local, made.asm["ptx"], made.asm["ttgir"]


SHAPES_OF_WORK = {
    "rows": (empty(32, 256, 56, 56), 1, ".v4"),
    "short rows": (empty(32, 2048, 7, 7), 1, ""),
    "columns": (empty(8, 512, 3072), 2, ".v4"),
    "vectors": (empty(64, 4096), 1, ".v4"),
    "a row of 2^32 elements": (empty(1, 1, 1 << 32), 1, ".v4"),
    "split rows": (empty(57, 32, 256, 57).permute(1, 2, 0, 3), 1, ""),
}


@pytest.fixture
def compile_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_TMP", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def check_channel_kernel(
    arch: int,
    what: str,
    dtype: torch.dtype,
    activation: str,
    act: str | None = None,
    given: str = "fp32",
    affine: bool = True,
) -> None:
    """``act``: of bn_act_stats, with parameters ``given``; else it is channel_stats."""
    from idap_kernels.backends import triton_kernels

    x, channel_dim, width = SHAPES_OF_WORK[what]
    x = x.to(dtype)
    p = channel_plan(x, channel_dim, activation=activation, act=act)
    name = f"*{DTYPE_NAMES[dtype]}"
    types = {"x": name, "records": "*fp64", "tickets": "*i32", "state": "*fp64"}
    constants = {
        **p.constants(),
        "ACTIVATION": dispatch.ACTIVATION_CODES[activation],
        "ACT": None if act is None else dispatch.OUTPUT_ACTIVATION_CODES[act],
    }
    if act is None:
        constants |= dict.fromkeys(("result", "bn_mean", "bn_var", "eps_low", "eps_high"))
    else:
        types |= {"result": name, **{f"bn_{n}": f"*{given}" for n in ("mean", "var", "weight", "bias")}}
    if act is None or not affine:
        constants |= dict.fromkeys(("bn_weight", "bn_bias"))
    registers, stack, ptx, ttgir = compile_for(
        triton_kernels.channel_kernel, arch, types, constants, p.warps, p.registers
    )
    assert stack == 0
    assert registers <= p.registers
    if dtype == torch.float32:
        assert f"ld.global{width}.b32" in ptx
        assert act is None or f"st.global{width}.b32" in ptx
    assert re.search(r"atom[.\w]*acq_rel[.\w]*add", ptx)
    # Within the loop over positions nothing may pass between threads.
    loops = re.findall(r"scf\.for .*?scf\.yield", ttgir, re.S)
    innermost = [body.rpartition("scf.for")[2] for body in loops]
    assert innermost
    assert not any("convert_layout" in body for body in innermost)
    # All loads of a step come before its stores, which they would have to wait for.
    order = [re.findall(r"tt\.(load|store)", body) for body in innermost]
    assert any("store" in accesses for accesses in order) == (act is not None)
    assert all(accesses == sorted(accesses) for accesses in order)


@compiles
def test_the_kernels_compile_without_a_spill(compile_folder):
    check_channel_kernel(90, "rows", torch.bfloat16, "relu")
    check_channel_kernel(80, "columns", torch.float32, "gelu")
    check_channel_kernel(90, "rows", torch.float32, "relu", "relu")


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("arch", [75, 90])
@pytest.mark.parametrize("what", SHAPES_OF_WORK)
def test_every_kernel_compiles_without_a_spill(what, arch, compile_folder):
    """On the oldest and the newest architecture of the caps; those between had the same counts or fewer."""
    for dtype in DTYPE_NAMES:
        some = ["gelu"] if dtype == torch.float64 else ["silu"]  # those that need the most
        every = dtype == torch.float32 and (what, arch) == ("rows", 90)
        for activation in dispatch.ACTIVATION_CODES if every else some:
            check_channel_kernel(arch, what, dtype, activation)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("arch", [75, 90])
@pytest.mark.parametrize("what", SHAPES_OF_WORK)
def test_every_kernel_that_writes_compiles_without_a_spill(what, arch, compile_folder):
    acts = itertools.cycle(["relu6", "hardswish", "silu"])
    for dtype, given in zip(DTYPE_NAMES, ("fp32", "fp64", "fp16", "fp32")):
        check_channel_kernel(arch, what, dtype, "silu", next(acts), given, affine=dtype != torch.float16)
        if dtype in (torch.bfloat16, torch.float64):
            check_channel_kernel(arch, what, dtype, "gelu", "gelu", given)


@compiles
@pytest.mark.parametrize("arch", [90, pytest.param(75, marks=pytest.mark.slow)])
def test_the_other_kernels_compile_without_a_spill(arch, compile_folder):
    from idap_kernels.backends import triton_kernels

    for dtype, row_dims in ((torch.float32, 1), (torch.bfloat16, 2)):
        x = empty(32, 197, 768, dtype=dtype)
        p = plans.plan_pair_stats(
            tuple(x.shape), x.stride(), x.stride(), row_dims, x.element_size(), True, 132
        )
        name = f"*{DTYPE_NAMES[dtype]}"
        types = {"x": name, "y": name, "records": "*fp64", "tickets": "*i32", "out": "*fp64"}
        registers, stack, *_ = compile_for(
            triton_kernels.pair_kernel, arch, types, p.constants(), p.warps, None
        )
        assert stack == 0
        assert registers <= 80
    types = {"table": "*i64", "out": "*fp64"}
    registers, stack, *_ = compile_for(
        triton_kernels.filter_kernel, arch, types, plans.FILTER_CONSTANTS, 4, None
    )
    assert stack == 0
    assert registers <= 128
    compile_for(triton_kernels.entry_kernel, arch, {"table": "*i64", "address": "i64"}, {}, 1, None)


# ------------------------------------------------------------------------------------------- under the interpreter


@pytest.fixture(scope="module", autouse=True)
def _fast_interpreter():
    """The interpreter replaces Triton's functions at every call of a device function; once is enough here."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    replace, done = interpreter._patch_lang, set()

    class Kept:
        def restore(self) -> None:
            pass

    def once(function):
        if id(function.__globals__) not in done:
            done.add(id(function.__globals__))
            replace(function)
            # Up to Triton 3.6 this is int(array of one element), which NumPy 2.4 refuses.
            interpreter.tl.core.tensor.__index__ = lambda self: int(self.handle.data.reshape(-1)[0])
        return Kept()

    interpreter._patch_lang = once
    yield


@pytest.fixture
def programs(monkeypatch):
    """Sets the number of multiprocessors that plans are made for, poisons the workspace, checks the tickets."""

    def set_to(count: int) -> None:
        monkeypatch.setattr(triton, "_multiprocessors", lambda index: count)
        for scratch, tickets in triton._workspaces.values():
            scratch.fill_(math.nan)
            assert not tickets.any()

    monkeypatch.setattr(triton, "_workspaces", {})
    set_to(1)
    yield set_to
    assert triton._workspaces
    assert not any(tickets.any() for _, tickets in triton._workspaces.values())


SMALL = [
    (1, 1),
    (2, 3),
    (20, 33),
    (1, 1, 1),
    (3, 5, 7),
    (3, 20, 1),
    (1, 3, 130),
    (2, 3, 5, 7),
    (2, 9, 7, 7),
    (2, 20, 3, 3),
    (2, 20, 2, 2),
    (2, 9, 14, 14),
    (1, 3, 31, 61),
    (2, 6, 3, 4, 5),
    (2, 4, 2, 3, 3, 2),
]


def agrees(y: Tensor, dims: dict[str, int], activation: str, what: str) -> None:
    got = torch.full((11, y.shape[dims.get("channel_dim", 1)]), math.nan, dtype=torch.float64)
    triton.channel_stats(
        y, dims.get("channel_dim", 1) % y.dim(), dims.get("sample_dim", 0) % y.dim(), activation, got, False
    )
    wanted = channel_stats(y, activation=activation, backend="reference", **dims).state
    assert_state_close(got, wanted, TOLERANCE[y.dtype], f"{what} {tuple(y.shape)} {y.dtype} {activation}")


@interpreted
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_every_layout_agrees_with_the_reference(shape, programs):
    x = torch.randn(shape) * 1.7 + 0.2
    for layout, (y, dims) in layouts(x).items():
        agrees(y, dims, "relu", layout)


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("activation", ["relu", "identity", "gelu", "silu"])
def test_every_dtype_and_activation_agrees_with_the_reference(dtype, activation, programs):
    for shape in ((3, 5, 7, 7), (2, 3, 24, 24), (9, 6)):
        x = (torch.randn(shape, dtype=torch.float64) * 1.7 + 0.2).to(dtype)
        agrees(x, {}, activation, "contiguous")
        agrees(x.movedim(1, -1).contiguous(), {"channel_dim": -1}, activation, "channels last")


WORK = {  # both levels of records: pieces of rows, blocks of samples, and whole tiles of both layouts
    "short rows": ((70, 3, 4, 4), {}),
    "samples": ((8, 20, 33), {}),
    "pieces": ((2, 3, 72, 72), {}),
    "one channel": ((1, 1, 30000), {}),
    "tokens": ((2, 300, 10), {"channel_dim": 2}),
    "many samples of tokens": ((9, 40, 16), {"channel_dim": 2}),
    "vectors": ((300, 40), {}),
}


@interpreted
@pytest.mark.parametrize("what", WORK)
def test_one_or_many_programs(what, programs):
    shape, dims = WORK[what]
    x = torch.randn(shape) + 3
    seen = set()
    for count in (1, 4):
        programs(count)
        agrees(x, dims, "relu", what)
        p = channel_plan(x, **dims, sms=count)
        seen.add((p.sample_blocks > 1, p.pieces > 1))
    assert seen & {(True, False), (False, True), (True, True)}, "no program shared a channel with another"


OUTPUT_ACTS = list(dispatch.OUTPUT_ACTIVATION_CODES)
# Errors as a share; the interpreter cuts the last bits of a bfloat16 off, compiled kernels round.
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}


def dense_layouts(x: Tensor) -> dict[str, tuple[Tensor, dict[str, int]]]:
    """Of :func:`layouts` those without gaps and overlaps, and two more."""
    found = {
        name: (y, dims)
        for name, (y, dims) in layouts(x).items()
        if y.stride() == torch.empty_like(y).stride()
    }
    found["odd address"] = (torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape), {})
    if x.dim() == 4:  # positions that do not merge
        found["split rows"] = (x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3), {})
    return found


def guarded(x: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor like ``x`` full of NaN, in the middle of ones that are returned too."""
    memory = torch.ones(x.numel() + 128, dtype=x.dtype, device=x.device)
    y = memory.as_strided(x.shape, x.stride(), 64)
    y.fill_(math.nan)
    return y, memory


def assert_writes(
    x: Tensor, norm: dispatch.BatchNorm, act: str, dims: dict[str, int], activation: str, what: str
) -> None:
    """``bn_act_stats`` of Triton against its definition and against its ``channel_stats``."""
    channel_dim, sample_dim = dims.get("channel_dim", 1) % x.dim(), dims.get("sample_dim", 0) % x.dim()
    call = (channel_dim, sample_dim, activation)
    y, memory = guarded(x)
    exact = torch.empty_like(x, dtype=torch.float64)
    got = torch.empty(11, x.shape[channel_dim], dtype=torch.float64, device=x.device)
    reference.bn_act_stats(x.double(), norm, act, exact, *call, got, False)
    wanted = got.clone()
    triton.bn_act_stats(x, norm, act, y, *call, got, True)
    triton.channel_stats(x, *call, wanted, True)
    if INTERPRETED:  # two compiled kernels may fuse and order their operations differently
        assert torch.equal(got, wanted), what
    assert_state_close(got, wanted, TOLERANCE[x.dtype], what)
    error = (y.double() - exact).abs() / (exact.abs() + 0.1 * exact.abs().max().clamp_min(1))
    assert error.max() <= ROUNDING[x.dtype], f"{what} {float(error.max()):.1e}"
    y.fill_(1.0)
    assert (memory == 1).all(), f"{what}: written beside the result"


@interpreted
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_what_is_written_agrees_with_the_reference(shape, programs):
    """Dtypes, activations and kinds of parameters take turns."""
    x = torch.randn(shape, dtype=torch.float64) * 1.7 + 0.2
    for n, layout in enumerate(dense_layouts(x), SMALL.index(shape)):
        dtype, given = list(TOLERANCE)[n % 4], list(TOLERANCE)[n // 2 % 4]
        act, activation = OUTPUT_ACTS[n % 6], list(dispatch.ACTIVATION_CODES)[n // 3 % 4]
        y, dims = dense_layouts(x.to(dtype))[layout]
        norm = parameters(y.shape[dims.get("channel_dim", 1)], given)
        missing = [(), ("weight",), ("bias",), ("weight", "bias")][n % 4]
        norm = norm._replace(**dict.fromkeys(missing))
        assert_writes(y, norm, act, dims, activation, f"{layout} {shape} {dtype} {act} {activation} {given}")


@interpreted
@pytest.mark.parametrize("act", OUTPUT_ACTS)
def test_every_output_activation(act, programs):
    cycle = zip(itertools.cycle(dispatch.ACTIVATION_CODES), reversed(list(TOLERANCE)))
    for dtype, (activation, given) in zip(TOLERANCE, cycle):
        x = (torch.randn(3, 5, 4, 8, dtype=torch.float64) * 3).to(dtype)
        assert_writes(x, parameters(5, given), act, {}, activation, f"{dtype} {activation} {given}")


@interpreted
@pytest.mark.parametrize("what", WORK)
def test_every_element_is_written_once(what, programs, monkeypatch):
    from triton.runtime import interpreter

    shape, dims = WORK[what]
    x = torch.randn(shape) + 3
    norm = parameters(x.shape[dims.get("channel_dim", 1)], torch.float32)
    builder = interpreter.interpreter_builder
    store, written = builder.create_masked_store, []

    def counted(pointers, value, mask, *more):
        written.append(pointers.data[mask.data])
        return store(pointers, value, mask, *more)

    monkeypatch.setattr(builder, "create_masked_store", counted)
    exact, y = torch.empty(shape, dtype=torch.float64), torch.empty_like(x)
    state, wanted = torch.empty(2, 11, len(norm.mean), dtype=torch.float64)
    call = (dims.get("channel_dim", 1), 0, "relu")
    reference.bn_act_stats(x.double(), norm, "relu6", exact, *call, wanted, False)
    for count in (1, 4):
        programs(count)
        written.clear()
        triton.bn_act_stats(x, norm, "relu6", y, *call, state, False)
        places = np.concatenate(written).astype(np.int64) - y.data_ptr()
        places = places[(places >= 0) & (places < y.nbytes)] // y.element_size()
        assert (np.bincount(places, minlength=y.numel()) == 1).all()
        torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-5)
        assert_state_close(state, wanted, 1e-5, what)


@interpreted
def test_vectors_only_where_both_addresses_allow_them(programs):
    x, norm = torch.randn(2, 3, 8, 8), parameters(3, torch.float32)
    for start in (0, 1, 4):
        y = torch.full((x.numel() + 8,), math.nan)[start : start + x.numel()].view(x.shape)
        state = torch.empty(11, 3, dtype=torch.float64)
        with mock.patch.object(plans, "plan_channel_stats", wraps=plans.plan_channel_stats) as plan:
            triton.bn_act_stats(x, norm, "identity", y, 1, 0, "relu", state, False)
        assert plans.plan_channel_stats(*plan.call_args.args).vec == (1 if start == 1 else 4)
        wanted = torch.nn.functional.batch_norm(x, *norm[:4], eps=norm.eps)
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
        assert_state_close(state, channel_stats(x, backend="reference").state, 1e-5, str(start))


@interpreted
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch.")
)
def test_what_is_written_for_nan_and_infinity(dtype, programs):
    values = [math.nan, math.inf, -math.inf, 0.0, 3e38, -3e38, 1.0, -1.0]
    norm = dispatch.BatchNorm(torch.tensor([0.0, 0.5]), torch.ones(2), None, None, 0.0)
    state = torch.empty(11, 2, dtype=torch.float64)
    for shape in ((1, 2, 24), (24, 2)):
        x = torch.tensor(values, dtype=dtype).repeat(6).view(shape)
        for act in OUTPUT_ACTS:
            y, exact = torch.zeros_like(x), torch.empty(shape, dtype=torch.float64)
            triton.bn_act_stats(x, norm, act, y, 1, 0, "relu", state, False)
            reference.bn_act_stats(x.double(), norm, act, exact, 1, 0, "relu", state, False)
            torch.testing.assert_close(y.double(), exact, equal_nan=True, rtol=1e-2, atol=1e-6)
    for act in ("relu", "relu6", "hardswish"):  # a broken norm must not look like a dead channel
        broken = norm._replace(mean=torch.tensor([math.nan, 0.0]))
        triton.bn_act_stats(torch.ones_like(x), broken, act, y, 1, 0, "relu", state, False)
        assert y.isnan().any(0).tolist() == [True, False]


@interpreted
@pytest.mark.parametrize("what", ["samples", "pieces", "tokens"])
def test_programs_in_any_order_give_the_same_bits(what, programs, monkeypatch):
    from triton.runtime import interpreter

    shape, dims = WORK[what]
    programs(4)
    x, y = torch.randn(shape) + 3, torch.randn(shape) * 2
    builder = interpreter.interpreter_builder
    place, results = builder.set_grid_idx, []
    for seed in range(2):

        def shuffled(i, j, k, seed=seed):
            order = list(range(builder.grid_dim[0]))
            if seed:
                random.Random(seed).shuffle(order)
            place(order[i], j, k)

        monkeypatch.setattr(builder, "set_grid_idx", shuffled)
        programs(4)
        stats = channel_stats(x, backend="triton", **dims)
        results.append(channel_stats(y, backend="triton", out=stats, **dims).state)
    assert all(torch.equal(results[0], other) for other in results)
    wanted = channel_stats(torch.cat([x, y]), backend="reference", **dims).state
    assert_state_close(results[0], wanted, 1e-5, what)


@interpreted
@pytest.mark.parametrize("what", WORK)
def test_variance_far_from_zero(what, programs):
    shape, dims = WORK[what]
    programs(2)
    x = torch.randn(shape) + 1e4
    got = channel_stats(x, backend="triton", **dims).var
    exact = channel_stats(x, backend="reference", **dims).var
    assert ((got - exact).abs() / exact).max() < 1e-5
    x.view(-1)[: x.numel() // 50] = 0.0  # where the shift is taken
    got = channel_stats(x, backend="triton", **dims).var
    exact = channel_stats(x, backend="reference", **dims).var
    assert ((got - exact).abs() <= 1e-4 * exact).all()


@interpreted
def test_constants_have_no_variance(programs):
    cases = zip(itertools.cycle(TOLERANCE), WORK.values())
    for dtype, (shape, dims) in cases:
        x = torch.full(shape, 0.7).to(dtype)[:2]
        s = channel_stats(x, backend="triton", **dims)
        assert s.var.abs().max() <= 1e-12
        assert torch.equal(s.min, s.max)
        assert (s.min == x.flatten()[0]).all()


@interpreted
@pytest.mark.parametrize("what", WORK)
def test_nan_and_infinity_stay_in_their_channel(what, programs):
    shape, dims = WORK[what]
    programs(2)
    channel_dim = dims.get("channel_dim", 1)
    for value in (math.nan, math.inf, -math.inf):
        x = torch.randn(shape) + 5
        x.select(channel_dim, 0)[-1].fill_(value)
        got = channel_stats(x, backend="triton", **dims).state
        wanted = channel_stats(x, backend="reference", **dims).state
        assert torch.equal(got.isnan(), wanted.isnan())
        assert torch.equal(got.isinf(), wanted.isinf())
        assert torch.equal(
            got[[0, 1, 8, 9, 10], 0].nan_to_num(7.0), wanted[[0, 1, 8, 9, 10], 0].nan_to_num(7.0)
        )
        if got.shape[1] > 1:
            assert_state_close(got[:, 1:], wanted[:, 1:], 1e-5, what)


@interpreted
def test_accumulating_keeps_a_nan_and_starts_from_nothing(programs):
    x = torch.randn(2, 3, 4)
    bad = x.clone()
    bad[0, 1, 2] = math.nan
    for order in ([bad, x], [x, bad]):
        running = ChannelStats.empty(3)
        for part in order:
            channel_stats(part, out=running, backend="triton")
        assert running.min.isnan().tolist() == [False, True, False]
        assert running.max.isnan().tolist() == [False, True, False]
    parts = torch.randn(12, 6, 5, 3).split([1, 4, 7])
    running = ChannelStats.empty(6)
    for part in parts:
        channel_stats(part, out=running, backend="triton")
    whole = channel_stats(torch.cat(parts), backend="triton")
    assert_state_close(running.state, whole.state, 1e-6, "out")
    merged = channel_stats(parts[0], backend="triton").merge(
        channel_stats(torch.cat(parts[1:]), backend="triton")
    )
    assert_state_close(merged.state, whole.state, 1e-6, "merge")


@interpreted
def test_offsets_beyond_32_bits(programs):
    far = 2**31 + 64
    try:
        memory = torch.from_numpy(np.zeros(far, dtype=np.uint16)).view(torch.bfloat16)  # pages, not yet there
    except MemoryError as error:
        pytest.skip(f"not enough memory: {error}")
    memory[far - 1] = 3.0
    last = memory.as_strided((2, 8, 8), (far - 64, 8, 1))
    assert channel_stats(last, backend="triton").max.tolist() == [0.0] * 7 + [3.0]
    rows = memory.as_strided((8, 2), (1, far - 8))
    assert channel_stats(rows, backend="triton").max.tolist() == [0.0, 3.0]
    written = torch.from_numpy(np.zeros(far, dtype=np.uint16)).view(torch.bfloat16)
    y, state = written.as_strided((8, 2), (1, far - 8)), torch.empty(11, 2, dtype=torch.float64)
    norm = dispatch.BatchNorm(torch.tensor([1.0, -1.0]), torch.ones(2), None, None, 0.0)
    triton.bn_act_stats(rows, norm, "identity", y, 1, 0, "relu", state, False)
    assert y.tolist() == [[-1.0, 1.0]] * 7 + [[-1.0, 4.0]]
    assert state[10].tolist() == [0.0, 3.0]
    assert pair_stats(last, last, backend="triton").yy.tolist() == [0.0, 9.0]
    assert filter_norms([last], backend="triton")[0].tolist() == [0.0, 3.0]


@interpreted
def test_indices_of_64_bits(programs, monkeypatch):
    """Rows of 2^31 elements take too long here: short ones, by the code for long ones."""
    for name in ("plan_channel_stats", "plan_pair_stats"):
        plan = getattr(plans, name)
        monkeypatch.setattr(plans, name, lambda *a, plan=plan: dataclasses.replace(plan(*a), wide=True))
    x = torch.randn(2, 3, 6, 40)
    for layout, (y, dims) in layouts(x).items():
        agrees(y, dims, "relu", layout)
        assert_pairs(y, y.contiguous(), "sample", layout)
    for layout, (y, dims) in dense_layouts(x).items():
        assert_writes(y, parameters(3, torch.float32), "relu", dims, "relu", layout)


def assert_pairs(a: Tensor, b: Tensor, per: str, what: str) -> None:
    got = pair_stats(a, b, per=per, backend="triton").state
    wanted = pair_stats(a, b, per=per, backend="reference").state
    scale = torch.stack([wanted[0], wanted[1], (wanted[0] * wanted[1]).sqrt(), wanted[3]]).clamp_min(1e-300)
    assert ((got - wanted).abs() / scale).max() <= TOLERANCE[a.dtype], f"{what} {tuple(a.shape)} {a.dtype}"


@interpreted
@pytest.mark.parametrize("per", ["sample", "token"])
def test_pairs_agree_with_the_reference(per, programs):
    for shape in ((1, 1), (3, 5, 7), (2, 9, 131), (2, 3, 5, 7), (2, 6, 3, 4, 5), (2, 4, 2, 3, 3, 2)):
        x = torch.randn(shape)
        y = x + 0.1 * torch.randn(shape)
        for layout, (a, _) in layouts(x).items():
            b = layouts(y)[layout][0]
            for second in (b, b.contiguous()):  # also with layouts that differ
                assert_pairs(a, second, per, layout)
    for dtype in TOLERANCE:
        x, y = torch.randn(2, 3, 5, 24, dtype=torch.float64).to(dtype)
        assert_pairs(x, y, per, "dtype")


@interpreted
def test_pairs_in_pieces(programs):
    x, y = torch.randn(2, 2, 20000)
    results = []
    for count in (1, 5, 5):
        programs(count)
        assert_pairs(x, y, "sample", f"{count} multiprocessors")
        results.append(pair_stats(x, y, backend="triton").state)
    assert torch.equal(results[1], results[2])
    small = x.clone()
    small[:, ::7] += 1e-3  # a difference that would cancel
    exact = (small.double() - x.double()).square().sum(1)
    torch.testing.assert_close(pair_stats(x, small, backend="triton").dd, exact, rtol=1e-6, atol=0)


@interpreted
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_filter_norms_of_many_layers(dim, programs):
    shapes = [(1, 1), (5, 3, 7, 7), (6, 7), (2, 3, 4, 5, 6), (9, 1, 3, 3)]
    weights = [torch.randn(s, dtype=torch.float64).to(d) for s, d in zip(shapes, itertools.cycle(TOLERANCE))]
    weights += [w.transpose(0, 1) for w in weights[1:3]]
    weights += [torch.randn(40, 50)[3:9, 1:12:2], torch.randn(4, 3, 5, 6, 7)[:, :2, 1:3, ::2, :5]]
    weights += [torch.randn(4, 5) * 1e-25, torch.randn(4, 5) * 1e25]
    long = torch.randn(2, 1100).movedim(0, dim)
    weights += [long.to(d) for d in TOLERANCE]
    norms = filter_norms(weights, dim=dim, backend="triton")
    for got, wanted in zip(norms, filter_norms(weights, dim=dim, backend="reference")):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
    again = filter_norms(weights[:3], dim=dim, backend="triton")
    tables = len(triton._tables)
    assert all(torch.equal(a, b) for a, b in zip(filter_norms(weights[:3], dim=dim, backend="triton"), again))
    assert len(triton._tables) == tables, "the table was not kept"
    triton._workspace(torch.device("cpu"), 1, 1)  # for the fixture, which looks at one


@interpreted
def test_the_self_check_finds_a_wrong_kernel(programs, monkeypatch):
    device = torch.device("cpu")
    assert self_check(triton, device) is None
    right = triton.pair_stats
    monkeypatch.setattr(triton, "pair_stats", lambda x, y, n, out: right(x, x, n, out))
    assert self_check(triton, device) == "self-check failed: pair_stats is wrong on this device"


@interpreted
def test_parameters_operators_and_names(programs):
    x = torch.nn.Parameter(torch.randn(2, 3, 4))
    assert not channel_stats(x, backend="triton").state.requires_grad
    torch.library.opcheck(torch.ops.idap.channel_stats.default, (x.detach(), 1, 0, "relu", "triton"))
    assert dispatch.why_not("triton", x) is None
    assert "7 dimensions" in dispatch.why_not("triton", torch.zeros(2, 3, 2, 2, 2, 2, 2))
    assert "not on the CPU" in dispatch.why_not("triton", torch.zeros(2, 3, device="meta"))
    assert "run in Python" in report()["backends"]["triton"]["detail"]


@interpreted
def test_tuning_is_measured_once_and_kept(programs, monkeypatch, tmp_path):
    path = tmp_path / "deep" / "tuned.json"
    monkeypatch.setenv(triton.TUNE_VARIABLE, str(path))
    monkeypatch.setattr(triton, "_tuned", {})
    times = {config: 10.0 - i for i, config in enumerate(plans.CANDIDATES)}
    measured = []

    def time(device, run, config):
        run(config)
        measured.append(config)
        return times[config]

    monkeypatch.setattr(triton, "_time", time)
    stats = ChannelStats.empty(5)
    x = torch.randn(3, 5, 9)
    channel_stats(x, out=stats, backend="triton")  # what is measured must not be counted
    assert_state_close(stats.state, channel_stats(x, backend="reference").state, 1e-5, "tuned")
    assert measured == list(plans.CANDIDATES)
    monkeypatch.setattr(triton, "_tuned", {})  # as in a new process
    channel_stats(torch.randn(7, 5, 9), backend="triton")
    assert len(measured) == len(plans.CANDIDATES), "a new batch size was measured again"
    kept = json.loads(path.read_text())
    (chosen,) = kept.values()
    assert plans.Config(**chosen) == plans.CANDIDATES[-1]
    pair_stats(x, x, backend="triton")
    assert len(json.loads(path.read_text())) == 2
    y, state = torch.full_like(x, math.nan), torch.full((11, 5), math.nan, dtype=torch.float64)

    def untouched(device, run, config):
        assert y.isnan().all()
        assert state.isnan().all()
        return time(device, run, config)

    with mock.patch.object(triton, "_time", untouched):
        triton.bn_act_stats(x, parameters(5, x.dtype), "relu", y, 1, 0, "relu", state, False)
    assert not y.isnan().any()
    assert len(json.loads(path.read_text())) == 3
    path.write_text("{")
    monkeypatch.setattr(triton, "_tuned", {})
    channel_stats(x, backend="triton")  # measured again
    assert len(json.loads(path.read_text())) == 1


# ---------------------------------------------------------------------------------------------------------- on a GPU

GPU_WORK = [
    ((5, 37, 7, 7), {}),
    ((70, 64, 6, 6), {}),
    ((2, 3, 96, 96), {}),
    ((1, 2, 40000), {}),
    ((32, 64, 56, 56), {}),
    ((3, 300, 40), {"channel_dim": 2}),
    ((1, 18000, 30), {"channel_dim": 2}),
    ((33, 300), {}),
]


@on_gpu
def test_the_self_check_passes_on_this_gpu():
    assert dispatch.why_not("triton", torch.empty(1, 1, device="cuda")) is None


@on_gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
def test_agrees_with_the_reference_on_a_gpu(dtype):
    for shape in SMALL:
        x = (torch.randn(shape, dtype=torch.float64) * 1.7 + 0.2).to(dtype).cuda()
        for layout, (y, dims) in layouts(x).items():
            got = channel_stats(y, backend="triton", **dims).state
            wanted = channel_stats(y, backend="reference", **dims).state
            assert_state_close(got, wanted, TOLERANCE[dtype], f"{layout} {shape}")
    for per in ("sample", "token"):
        x, y = torch.randn(2, 3, 7, 60, device="cuda").to(dtype)
        assert_pairs(x, y, per, "gpu")
    weights = [torch.randn(s, device="cuda").to(dtype) for s in ((64, 3, 7, 7), (10, 4099), (3, 70000))]
    for got, wanted in zip(
        filter_norms(weights, backend="triton"), filter_norms(weights, backend="reference")
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)


@on_gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
def test_what_is_written_agrees_with_the_reference_on_a_gpu(dtype):
    turns = itertools.cycle(itertools.product(OUTPUT_ACTS, TOLERANCE))
    for shape in ((20, 33), (3, 5, 7), (2, 9, 14, 14), (1, 3, 31, 61), (2, 3, 96, 96)):
        x = (torch.randn(shape, dtype=torch.float64) * 1.7 + 0.2).to(dtype).cuda()
        for layout, (y, dims) in dense_layouts(x).items():
            act, given = next(turns)
            norm = parameters(y.shape[dims.get("channel_dim", 1)], given, device="cuda")
            assert_writes(y, norm, act, dims, "relu", f"{layout} {shape} {act} {given}")


@on_gpu
@pytest.mark.parametrize(("shape", "dims"), GPU_WORK)
def test_equal_bits_accumulation_and_offset_on_a_gpu(shape, dims):
    x, y = torch.randn(shape, device="cuda") + 1e4, torch.randn(shape, device="cuda") * 2 + 1e4
    runs = []
    for _ in range(20):
        stats = channel_stats(x, backend="triton", **dims)
        runs.append(channel_stats(y, backend="triton", out=stats, **dims).state)
    assert all(torch.equal(runs[0], other) for other in runs)
    wanted = channel_stats(torch.cat([x, y]), backend="reference", **dims).state
    m2 = ROWS.index("m2")
    assert ((runs[0][m2] - wanted[m2]) / wanted[m2]).abs().max() < 1e-4


@on_gpu
@pytest.mark.parametrize(("shape", "dims"), GPU_WORK)
def test_graph_capture_and_replay_on_a_gpu(shape, dims):
    x = torch.randn(shape, device="cuda")
    channels = x.shape[dims.get("channel_dim", 1)]
    stats, more = (ChannelStats.empty(channels, device="cuda") for _ in range(2))
    norm = parameters(channels, torch.float32, device="cuda")[:4]

    def everything() -> tuple[Tensor, Tensor, Tensor]:
        channel_stats(x, out=stats, backend="triton", **dims)
        y, _ = bn_act_stats(x, *norm, act="silu", out=more, backend="triton", **dims)
        return pair_stats(x, x, backend="triton").xx, filter_norms([x], backend="triton")[0], y

    everything()  # compiles before the capture
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pairs, norms, y = everything()
    stats.state.zero_()
    more.state.zero_()
    parts = []
    for i in range(3):
        x.copy_(torch.randn(shape, device="cuda") + i)
        parts.append(x.clone())
        graph.replay()
        channel_stats(parts[-1], backend="triton", **dims)  # an eager call between replays
    wanted = channel_stats(torch.cat(parts), backend="reference", **dims).state
    assert_state_close(stats.state, wanted, 1e-5, str(shape))
    assert_state_close(more.state, wanted, 1e-5, str(shape))
    exact, _ = bn_act_stats(x, *norm, act="silu", backend="reference", **dims)
    torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pairs, pair_stats(x, x, backend="reference").xx, rtol=1e-5, atol=0)
    torch.testing.assert_close(norms, filter_norms([x], backend="reference")[0], rtol=1e-9, atol=0)


@on_gpu
def test_a_new_batch_size_compiles_nothing_on_a_gpu():
    from idap_kernels.backends import triton_kernels

    def compiled() -> int:
        return sum(len(c[0]) for c in triton_kernels.channel_kernel.device_caches.values())

    norm = parameters(64, torch.float32, device="cuda")[:4]

    def run(batch: int) -> None:
        x = torch.randn(batch, 64, 14, 14, device="cuda")
        channel_stats(x, backend="triton")
        bn_act_stats(x, *norm, eps=1 / batch, backend="triton")  # nor does a new eps

    run(4)
    before = compiled()
    for batch in (1, 2, 3, 16, 100, 256):
        run(batch)
    assert compiled() == before


@on_gpu
def test_side_stream_on_a_gpu():
    stream = torch.cuda.Stream()
    x = torch.zeros(16, 64, 56, 56, device="cuda")
    channel_stats(x, backend="triton")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(2.0)
        got = channel_stats(x, backend="triton").mean
    stream.synchronize()
    assert (got == 2).all()
