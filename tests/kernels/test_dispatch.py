from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from idap_kernels import BackendUnavailable, available_backends, channel_stats, dispatch
from idap_kernels.backends import cpu
from idap_kernels.doctor import format_report, report

ISAS = ["portable", "avx2", "avx512"]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_every_backend_is_named_and_every_refusal_has_a_reason():
    backends = available_backends()
    assert set(backends) == set(dispatch.BACKENDS)
    assert backends["reference"] is None
    assert all(reason is None or len(reason) > 20 for reason in backends.values())


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable", lambda: "the extension was not built: no compiler")
    with pytest.raises(BackendUnavailable, match=r"no compiler.*backend='auto'"):
        channel_stats(torch.randn(2, 3), backend="cpu")


def test_auto_falls_back_to_the_reference(monkeypatch):
    x = torch.randn(2, 3, 4)
    wanted = channel_stats(x, backend="reference").state
    monkeypatch.setattr(cpu, "unavailable", lambda: "the extension was not built: no compiler")
    assert torch.equal(channel_stats(x).state, wanted)
    data = report()
    assert data["auto"]["cpu"] == "reference"
    assert "no compiler" in format_report(data)


def test_the_cuda_backend_refuses_a_cpu_tensor():
    with pytest.raises(BackendUnavailable, match="cuda"):
        channel_stats(torch.randn(2, 3), backend="cuda")


def test_more_dimensions_than_the_kernels_take_still_work():
    x = torch.randn(2, 3, 2, 2, 2, 2, 2)
    with pytest.raises(BackendUnavailable, match="7 dimensions"):
        channel_stats(x, backend="cpu")
    torch.testing.assert_close(channel_stats(x).mean, x.double().mean(dim=(0, 2, 3, 4, 5, 6)))


@pytest.mark.skipif(available_backends()["cpu"] is not None, reason="no CPU kernels here")
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_agrees_with_the_reference(isa):
    code = """
import torch
from idap_kernels.backends import cpu
if cpu.unavailable():
    print("skip", cpu.unavailable()); raise SystemExit
from idap_kernels import channel_stats, filter_norms, pair_stats
from tests.kernels.common import SHAPES, TOLERANCE, assert_state_close, layouts
torch.manual_seed(0)
for dtype, tolerance in TOLERANCE.items():
    for shape in SHAPES[::2]:
        x = (torch.randn(shape, dtype=torch.float64) * 1.7 + 0.2).to(dtype)
        for name, (y, dims) in layouts(x).items():
            for act in ("relu", "identity", "gelu", "silu"):
                got = channel_stats(y, activation=act, backend="cpu", **dims).state
                wanted = channel_stats(y, activation=act, backend="reference", **dims).state
                assert_state_close(got, wanted, tolerance, f"{dtype} {name} {shape} {act}")
            got, wanted = (pair_stats(y, y, backend=b).state for b in ("cpu", "reference"))
            torch.testing.assert_close(got, wanted, rtol=tolerance, atol=0)
            got, wanted = (filter_norms([y], backend=b)[0] for b in ("cpu", "reference"))
            torch.testing.assert_close(got, wanted, rtol=tolerance, atol=0)
print("ok", cpu.isa())
"""
    done = run_python(code, IDAP_ISA=isa)
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("skip"):
        pytest.skip(done.stdout)
    assert done.stdout.split() == ["ok", isa]


def test_an_unknown_instruction_set_is_a_reason_not_a_crash():
    done = run_python(
        "from idap_kernels import available_backends; print(available_backends()['cpu'])", IDAP_ISA="avx9000"
    )
    assert done.returncode == 0, done.stderr
    assert "avx9000" in done.stdout or "not built" in done.stdout


@pytest.mark.parametrize("package", ["idap", "idap_kernels"])
def test_import_is_cheap_and_silent(package):
    code = f"""
import sys, {package}
heavy = ("torchvision", "timm", "transformers", "matplotlib", "torch_pruning", "rich", "sklearn", "triton")
print([name for name in heavy if name in sys.modules])
"""
    done = run_python(code)
    assert done.stdout.strip() == "[]", done.stdout
    assert done.stderr == ""


def test_kernels_do_not_import_the_pruning_package():
    done = run_python("import sys, idap_kernels; print('idap' in sys.modules)")
    assert done.stdout.strip() == "False"


def test_the_report_is_json_and_reads_well():
    data = json.loads(json.dumps(report()))
    text = format_report(data)
    for name in dispatch.BACKENDS:
        assert name in text
    assert data["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
