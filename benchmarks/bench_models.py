"""Every architecture of the paper: pruned, truncated, proved exact, trained a step, reloaded, exported, timed.

python benchmarks/bench_models.py --jsonl benchmarks/results/models-cpu.jsonl [--only resnet50,gpt2_base]
python benchmarks/bench_models.py --device cuda --jsonl OUT/models.jsonl

A process a row, so that peak memory is the row's own; steps that a row has already are not made again (--again
makes them). Random weights: what is measured is the network's shape, not its accuracy. Each network is
pruned to the smallest share of its multiply-accumulates that the paper reports for it, by flow divergence from
one profile on noise of its own input shape; then it loses one block, or two where more than ten can go.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from timing import environment
from torch import nn

import idap
from idap import inputs as idap_inputs
from idap.adapters.detection import most_proposals
from idap.groups import find_groups
from idap.heads import find_heads
from idap.layers import block_filter_divergence
from idap.models.architectures import Architecture
from idap.models.registry import ARCHITECTURES
from idap.plan import PruningPlan, check_forward

# Without a figure in the paper: the language models.
SHARE = 0.40
EXACT = 1e-10
HEAVY = 60e9


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--jsonl", type=Path, help="one line a row; what is there is kept")
    parser.add_argument("--only", default="", help="names, comma-separated (default: all)")
    parser.add_argument(
        "--library", default="", help="torchvision or timm (default: each that has the network)"
    )
    parser.add_argument("--again", action="store_true", help="make steps that a row has already")
    parser.add_argument("--steps", default=",".join(STEPS), help=f"some of {', '.join(STEPS)}")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of latency a row, on the CPU (default 60)"
    )
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds a row may take (default 1200)")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--reload", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: nothing was measured")
    if args.reload:
        name, library, directory, seed = args.reload.split("|")
        print(digest_of_loaded(ARCHITECTURES[name], library, directory, int(seed)))
        return 0
    if args.row:
        name, _, library = args.row.partition("/")
        print("ROW " + json.dumps(Row(ARCHITECTURES[name], library, args).run()))
        return 0
    names = args.only.split(",") if args.only else list(ARCHITECTURES)
    unknown = [name for name in names if name not in ARCHITECTURES]
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are {', '.join(ARCHITECTURES)}")
    done = read_rows(args.jsonl) if args.jsonl else {}
    wanted, failed = args.steps.split(","), 0
    for name in names:
        for library in ARCHITECTURES[name].builders:
            if args.library not in ("", library):
                continue
            old = done.get((name, library), {})
            missing = [step for step in wanted if args.again or step not in old]
            if not missing and "failed" not in old:
                continue
            row = one_row(name, library, missing or wanted, args)
            print(summary(row), flush=True)
            failed += not green(row)
            if "failed" in row and "failed" not in old and old:
                continue  # what is there is kept
            if same_network(old, row):
                row = {**old, **row}
            done[name, library] = row
            if args.jsonl:
                write_rows(args.jsonl, done)
    return 1 if failed else 0


def one_row(name: str, library: str, steps: list[str], args: argparse.Namespace) -> dict[str, Any]:
    # Both stages make the network that the other steps look at.
    steps = [step for step in STEPS if step in steps or step in ("filters", "layers")]
    command = [sys.executable, __file__, "--row", f"{name}/{library}", "--device", args.device]
    command += ["--steps", ",".join(steps), "--seconds", str(args.seconds)]
    begin = time.perf_counter()
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=args.limit)
    except subprocess.TimeoutExpired:
        return {"name": name, "library": library, "failed": f"took longer than {args.limit:g} s"}
    lines = [line for line in child.stdout.splitlines() if line.startswith("ROW ")]
    if child.returncode or not lines:
        tail = (child.stderr.strip().splitlines() or ["no output"])[-1]
        return {"name": name, "library": library, "failed": f"exit code {child.returncode}: {tail}"}
    row: dict[str, Any] = json.loads(lines[-1][4:])
    row["seconds"] = time.perf_counter() - begin
    return row


def same_network(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether two rows are of one pruned network, so that steps of the one say something of the other."""
    return all(
        step in old and old[step].get(key) == new.get(step, {}).get(key)
        for step, key in (("filters", "after"), ("layers", "after"), ("layers", "removed"))
    )


def read_rows(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {(row["name"], row["library"]): row for row in rows}


def write_rows(path: Path, rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    """All rows in the order of the registry, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    order = list(ARCHITECTURES)
    ordered = sorted(rows.values(), key=lambda row: order.index(row["name"]))
    staged = path.with_suffix(path.suffix + ".part")
    staged.write_text("".join(json.dumps(row) + "\n" for row in ordered), encoding="utf-8")
    os.replace(staged, path)


def green(row: dict[str, Any]) -> bool:
    """Whether all that was tried in a row did what it should; what the library cannot do unpruned does not count."""
    return "failed" not in row and not any(
        "error" in row.get(step, {}) and not row[step].get("unpruned_fails_too") for step in STEPS
    )


def summary(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['name']:24s} {row['library']:14s} FAILED {row['failed']}"
    parts = [f"{row['name']:24s} {row['library']:14s}"]
    if "macs" in row:
        parts.append(f"{row['macs'] / 1e9:7.2f} G")
    if "after" in row.get("filters", {}):
        parts.append(f"→ {row['filters']['after']['macs'] / 1e9:6.2f} G")
    if "removed" in row.get("layers", {}):
        parts.append(f"-{len(row['layers']['removed'])}/{row['layers']['removable']} blocks")
    if "error_filters" in row.get("exact", {}):
        parts.append(f"exact {row['exact']['error_filters']:.0e}")
    for mode, found in row.get("latency", {}).get("modes", {}).items():
        if "layers" in found:
            parts.append(f"{mode} {found['base']['median']:.1f} → {found['layers']['median']:.1f} ms")
            parts.append(f"{found['layers']['speedup']:.2f}× ({row['paper']['speedup'] or '–'})")
    for step in STEPS:
        if "error" in row.get(step, {}):
            known = " (unpruned too)" if row[step].get("unpruned_fails_too") else ""
            parts.append(f"[{step}{known}: {row[step]['error'][:140]}]")
    return "  ".join(parts)


# ------------------------------------------------------------------------------------------------ one row


class Peak:
    """Peak resident memory of this process since the last reset, in bytes; on CUDA that of the device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line.split()[1] for line in status if line.startswith("VmHWM")))


def seeded(make: Callable[[int], Any], batch: int, seed: int) -> Any:
    torch.manual_seed(seed)
    return make(batch)


def digest(model: nn.Module, inputs: Any) -> str:
    """SHA-256 over all that a model returns, to the last bit."""
    with idap_inputs.evaluating(model), torch.no_grad():
        outputs = idap_inputs.outputs_of(idap_inputs.call(model, inputs))
    found = hashlib.sha256()
    for path, tensor in outputs:
        found.update(path.encode())
        found.update(tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def digest_of_loaded(architecture: Architecture, library: str, directory: str, seed: int) -> str:
    model = idap.load(directory, architecture.builders[library]).eval()
    return digest(model, seeded(architecture.inputs, 1, seed))


def shaken(model: nn.Module, batch: Any) -> nn.Module:
    """Parameters that are constant as built away from it, and statistics of batch norms that fit.

    As ones, zeros or 1e-6 (norms, biases, class tokens, layer scales, a classifier's first weights) they hide what
    passes through them, and a proof would prove nothing.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            first = parameter.flatten()[:1]
            if parameter.is_floating_point() and parameter.numel() > 1 and bool((parameter == first).all()):
                if float(first) == 1.0:
                    parameter.uniform_(0.8, 1.2)
                else:
                    parameter.normal_(0.0, 0.1)
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        idap.recalibrate(model, [batch])
    return model.eval()


class Graphed(nn.Module):
    """A model captured in a CUDA graph for one shape of its inputs."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(3):
                idap_inputs.call(model, inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        self.model = model
        with torch.inference_mode(), torch.cuda.graph(self.graph):
            self.outputs = idap_inputs.call(model, inputs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.graph.replay()
        return self.outputs


class Row:
    """One architecture of one library; every step writes a part of the record, or what went wrong in it."""

    def __init__(self, architecture: Architecture, library: str, args: argparse.Namespace) -> None:
        self.of, self.library, self.args = architecture, library, args
        self.device = args.device
        self.peak = Peak(self.device)
        self.record: dict[str, Any] = {"name": architecture.name, "library": library}

    def run(self) -> dict[str, Any]:
        steps = self.args.steps.split(",")
        begin = time.perf_counter()
        torch.manual_seed(0)
        self.base = self.of.builders[self.library]().eval().to(self.device)
        self.example = self.inputs(1)
        self.macs = idap.count_macs(self.base, self.example)
        self.base = shaken(self.base, self.inputs(1 if self.macs > HEAVY else 2, seed=5))
        paper = vars(self.of.paper)
        shapes = [list(t.shape) for _, t in idap_inputs.named_tensors(self.example)]
        self.record |= {
            "title": self.of.title, "task": self.of.task, "device": self.device, "batch": 1,
            "dtype": "float32", "input": shapes, "paper": paper, "macs": self.macs,
            "params": idap.count_params(self.base), "build_seconds": time.perf_counter() - begin,
            "environment": environment(self.device), "notes": list(self.of.notes),
        }  # fmt: skip
        for step in STEPS:
            if step in steps:
                self.attempt(step)
        return self.record

    def inputs(self, batch: int, seed: int = 1) -> Any:
        return idap_inputs.to_device(seeded(self.of.inputs, batch, seed), self.device)

    def traced(self) -> Any:
        """What channels and blocks are followed on."""
        small = self.of.trace_inputs
        return self.example if small is None else idap_inputs.to_device(small(), self.device)

    def attempt(self, step: str) -> None:
        begin = time.perf_counter()
        try:
            self.record[step] = getattr(self, step)()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:600]
            self.record[step] = {"error": reason}
        self.record[step]["seconds"] = time.perf_counter() - begin

    def timed(self, function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        self.peak.reset()
        begin = time.perf_counter()
        result = function()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return result, {"seconds": time.perf_counter() - begin, "peak_bytes": self.peak.read()}

    def filters(self) -> dict[str, Any]:
        """Stage 1: profile, decision and surgery, to the paper's smallest share."""
        share = self.of.paper.share or SHARE
        batches = [self.inputs(1 if self.macs > HEAVY else 2, seed=seed) for seed in (2, 3)]
        scan, finding = self.timed(lambda: find_groups(self.base, self.traced()))
        heads = find_heads(self.base, scan)
        _, forward = self.timed(lambda: idap.count_macs(self.base, batches[0]))
        profile, profiling = self.timed(
            lambda: idap.profile(self.base, batches, blocks=(), heads=heads, progress=False)
        )
        scores = idap.flow_divergence(self.base, profile)
        self.plan, deciding = self.timed(
            lambda: idap.prune_filters(self.base, scores, self.example, macs=share, groups=scan)
        )
        self.narrow, surgery = self.timed(lambda: self.plan.apply(self.base))
        return {
            "share": share,
            "after": self.measure(self.narrow),
            "groups": len(scan.groups),
            "skipped": [[skip.root, skip.size, skip.reason[:200]] for skip in self.plan.skipped],
            "costs": {
                "one forward pass": forward, "profile": profiling, "groups": finding, "decision": deciding,
                "surgery": surgery,
            },
        }  # fmt: skip

    def layers(self) -> dict[str, Any]:
        """Stage 2: one block, or two where more than ten can go.

        An identity has a meaning where a residual sum or a concatenation passes the block by; where there are too few
        of these, units of plain stacks and blocks that change the shape get a projection, fitted by least squares.
        """
        traced = self.traced()
        at_start = len(idap.find_blocks(self.base, traced))
        wanted = min(at_start, 2 if at_start > 10 else 1)
        if not wanted:
            return {"removable": 0, "removable_at_start": 0, "removed": [], "costs": {}}
        blocks = [b for b in idap.find_blocks(self.narrow, traced) if b.residual or b.channels]
        project = len(blocks) < wanted
        if project:
            blocks = idap.find_blocks(self.narrow, traced, projections=True)
        projected = [block for block in blocks if block.projection is not None]
        batch = self.inputs(1 if self.macs > HEAVY else 2, seed=4)
        profile, profiling = self.timed(
            lambda: idap.profile(
                self.narrow,
                [batch],
                layers=None if projected else (),
                blocks=[block for block in blocks if block.projection is None],
                heads={},
                progress=False,
            )
        )
        divergences = idap.layer_divergence(self.narrow, profile)
        if projected:
            scores = idap.flow_divergence(self.narrow, profile)
            divergences |= block_filter_divergence(self.narrow, scores, projected)
        count = min(len(blocks), wanted)

        def without(count: int) -> tuple[PruningPlan, nn.Module, dict[str, float]]:
            cut = idap.truncate_layers(
                self.narrow, divergences, self.example, count=count, projections=project
            )
            short = cut.apply(self.narrow, self.example)
            return cut, short, idap.fit_projections(self.narrow, short, cut, [batch])

        (self.cut, self.short, residuals), deciding = self.timed(lambda: without(count))
        self.without, self.removable = without, len(blocks)
        return {
            "removable": len(blocks),
            "removable_at_start": at_start,
            "removed": list(self.cut.removed_blocks),
            "projected": residuals,
            "after": self.measure(self.short),
            "costs": {"profile": profiling, "decision": deciding},
        }

    def measure(self, model: nn.Module) -> dict[str, int]:
        return {"macs": idap.count_macs(model, self.example), "params": idap.count_params(model)}

    def whole(self) -> tuple[nn.Module, PruningPlan]:
        """The smallest network that came out, and the plan that leads to it."""
        if hasattr(self, "short"):
            return self.short, self.plan.then(self.cut)
        return self.narrow, self.plan

    def exact(self) -> dict[str, Any]:
        """Both stages against the original with the removed contributions at zero, in float64."""
        example = idap_inputs.map_tensors(self.traced(), lambda t: t.double() if t.is_floating_point() else t)
        model, plan = self.whole()
        # In place and back, which loses nothing: the largest of the networks leave no room for one more copy.
        base = self.base.double()
        try:
            errors = {"error_filters": self.plan.exactness_error(base, example)}
            if plan is not self.plan:
                errors["error_both"] = plan.exactness_error(base, example)
        finally:
            self.base.float()
        if not max(errors.values()) <= EXACT:
            raise AssertionError(f"not exact: {errors}")
        check_forward(self.base, model, self.example, shorter=bool(plan.removed_blocks))
        return dict(errors)

    def train(self) -> dict[str, Any]:
        """One step of SGD on the pruned network, in training mode."""
        model = copy.deepcopy(self.whole()[0]).train()
        batch = self.inputs(1 if self.macs > HEAVY else 2, seed=6)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        loss = self.of.loss(model, batch)
        loss.backward()
        reached = sum(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        moved = sum(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
        if not torch.isfinite(loss) or not moved:
            raise AssertionError(f"loss {float(loss)}, {moved} parameters moved")
        return {
            "loss": float(loss), "tensors": len(before), "with_finite_gradient": reached, "moved": moved
        }  # fmt: skip

    def reload(self) -> dict[str, Any]:
        """Saved, loaded in a new process: the same bits."""
        model, plan = self.whole()
        mine = digest(copy.deepcopy(model).cpu(), seeded(self.of.inputs, 1, 7))
        with tempfile.TemporaryDirectory() as directory:
            target = Path(directory) / "model"
            idap.save(model=model, plan=plan, directory=target)
            size = sum(file.stat().st_size for file in target.iterdir())
            command = [sys.executable, __file__, "--reload", f"{self.of.name}|{self.library}|{target}|7"]
            child = subprocess.run(command, capture_output=True, text=True)
        theirs = (child.stdout.split() or [child.stderr.strip()[-300:]])[-1]
        if theirs != mine:
            raise AssertionError(f"other bits after loading: {theirs} instead of {mine}")
        return {"same_bits": True, "file_bytes": size}

    def export(self) -> dict[str, Any]:
        return self.exported(
            lambda model, path: idap.export_program(model, path, self.trace(), dynamic_batch=False)
        )

    def onnx(self) -> dict[str, Any]:
        return self.exported(
            lambda model, path: idap.export_onnx(model, path, self.trace(), dynamic_batch=False)
        )

    def trace(self) -> Any:
        small = self.of.trace_inputs
        return seeded(self.of.inputs, 1, 1) if small is None else small()

    def exported(self, export: Callable[[nn.Module, Path], Path]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as directory:
            try:
                file = export(copy.deepcopy(self.whole()[0]).cpu(), Path(directory) / "pruned.file")
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
                try:
                    export(copy.deepcopy(self.base).cpu(), Path(directory) / "base.file")
                except Exception as same:
                    other = " ".join(f"{type(same).__name__}: {same}".split())[:400]
                    return {"error": reason, "unpruned_fails_too": other}
                return {"error": reason}
            return {"file_bytes": file.stat().st_size}

    def latency(self) -> dict[str, Any]:
        """In turns: as it is, after stage 1, after both."""
        models = {"base": self.base, "filters": self.narrow, "layers": self.whole()[0]}
        models = {name: copy.deepcopy(model).eval() for name, model in models.items()}
        if self.device == "cuda":
            warmup, runs = 100, 500
        else:
            once = idap.measure_latency(self.base, self.example, warmup=1, runs=2).median / 1e3
            runs = max(5, min(100, int(self.args.seconds / (4.5 * once))))
            warmup = max(1, min(10, runs // 5))
        modes: dict[str, Any] = {}
        modes["eager"] = self.compared(models, warmup, runs)
        modes["eager"] |= self.deeper(modes["eager"], warmup, runs)
        if self.device == "cuda":
            wraps: dict[str, Callable[[nn.Module], Any]] = {
                "compile": torch.compile,
                "graph": lambda model: Graphed(model, self.example),
            }
            for mode, wrap in wraps.items():
                try:
                    modes[mode] = self.compared({n: wrap(m) for n, m in models.items()}, warmup, runs)
                except Exception as error:
                    modes[mode] = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        return {"warmup": warmup, "runs": runs, "modes": modes}

    def deeper(self, found: dict[str, Any], warmup: int, runs: int) -> dict[str, Any]:
        """With as many more blocks gone as the paper's ratio takes, if it is not reached yet; at most all of them."""
        wanted = self.of.paper.speedup
        if wanted is None or found["layers"]["speedup"] >= wanted or not hasattr(self, "without"):
            return {}
        for count in range(len(self.cut.removed_blocks) + 1, self.removable + 1):
            cut, model, _ = self.without(count)
            quick = self.compared({"base": self.base, "deep": model}, 2, max(5, runs // 4))
            if quick["deep"]["speedup"] >= 1.03 * wanted or count == self.removable:
                break
        else:
            return {}
        deep = self.compared({"base": self.base, "deep": model}, warmup, runs)["deep"]
        return {"deep": {**deep, **self.measure(model), "removed": list(cut.removed_blocks)}}

    def compared(self, models: dict[str, nn.Module], warmup: int, runs: int) -> dict[str, Any]:
        with ExitStack() as stack:
            # A detector takes as long as the regions it finds, of which random weights find any number.
            for model in models.values():
                stack.enter_context(most_proposals(model))
            found = idap.compare_latency(models, self.example, warmup=warmup, runs=runs)
        return {
            name: {**found.stats[name].to_dict(), "speedup": found.speedup(name, "base")} for name in models
        }


STEPS = ("filters", "layers", "exact", "train", "reload", "export", "onnx", "latency")

if __name__ == "__main__":
    sys.exit(main())
