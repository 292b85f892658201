"""Scoring time inside Torch-Pruning: this scorer against the library's own and against feature-map rank.

python benchmarks/bench_scoring.py --json benchmarks/results/scoring-cpu.json

What is timed: from "model, batches and dependency groups given" to "a score for every channel of every group".
The groups are found once, outside, and are those that a pruner of the library hands to its importance. Random
weights and random images: the times do not depend on the values. Everything runs in turns within one process;
a bare forward pass opens and closes every round. A scorer whose first call takes longer than ``--slow`` seconds
is timed in that call alone. Peak memory is that of a process of its own for each scorer.

Hessian: one backward pass per sample, as its docstring shows. Its counter is keyed by name and looked up by
parameter, so it keeps the last sample's squared gradients alone (1.6.1); it is timed as it is. Activation:
every batch overwrites the one before (1.6.1). HRank (Lin et al., CVPR 2020, arXiv 2002.10179): the rank of every
feature map of every image, here of all convolutions' outputs, many matrices a call where its code takes one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from bench_step import in_turns, summary
from timing import environment, write_json
from torch import Tensor, nn
from torch.nn import functional as F

from idap.integrations.torch_pruning import ChannelImportance

Score = Callable[[Any], "Tensor | None"]
MODELS = {"resnet50": "ResNet-50", "vit_base_patch16_224": "ViT-B/16"}
CLASSES = 1000
TOLERANCE = 1e-3  # of our scores, relative to the largest of the group


class NotApplicable(Exception):
    """The scorer has no meaning for this model; the message says why."""


@dataclass(frozen=True)
class Task:
    """What every scorer is given."""

    model: nn.Module
    batches: list[Tensor]
    labels: list[Tensor]
    groups: list[Any]
    device: str

    @property
    def images(self) -> int:
        return sum(map(len, self.batches))

    def with_own_groups(self) -> Task:
        """The same with copies of the groups' index lists, which the library's scorers sort in place."""
        copies = []
        for group in self.groups:
            own = copy.copy(group)
            own._group = []
            for item in group:
                own.add_dep(item.dep, list(item.idxs))
                own[-1].root_idxs = item.root_idxs
            copies.append(own)
        return replace(self, groups=copies)

    def first(self, images: int) -> Task:
        """The same with the first images alone."""
        size = len(self.batches[0])
        batches, labels = (list(torch.cat(t)[:images].split(size)) for t in (self.batches, self.labels))
        return replace(self, batches=batches, labels=labels)


class _Recorded(tp.importance.Importance):  # type: ignore[misc]
    """Keeps the groups it is asked about, and by giving no score lets the pruner remove nothing."""

    def __init__(self) -> None:
        self.groups: list[Any] = []

    def __call__(self, group: Any) -> None:
        self.groups.append(group)


def build(name: str, batch: int, batches: int, device: str) -> Task:
    torch.manual_seed(0)
    heads: dict[nn.Module, int] = {}
    outside: list[
        tuple[nn.Parameter, int]
    ] = []  # parameters of no layer, and the dimension of their channels
    if name == "resnet50":
        from torchvision.models import resnet50

        model: nn.Module = resnet50(weights=None)
        head = model.fc
    else:
        import timm

        model = timm.create_model(name, pretrained=False)
        head = model.head
        heads = {m.qkv: m.num_heads for m in model.modules() if isinstance(m, timm.layers.Attention)}
        outside = [(p, p.dim() - 1) for n, p in model.named_parameters() if n in ("cls_token", "pos_embed")]
    # Not all one, as they are made: else those that score by them would find nothing to rank.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    model = model.eval().to(device)
    images = [torch.randn(batch, 3, 224, 224, device=device) for _ in range(batches)]
    labels = [torch.randint(CLASSES, (batch,), device=device) for _ in range(batches)]
    recorded = _Recorded()
    pruner = tp.pruner.BasePruner(
        model,
        (images[0][:1],),
        recorded,
        ignored_layers=[head],
        num_heads=heads,
        in_channel_groups={},
        out_channel_groups={},
        unwrapped_parameters=outside,
    )
    pruner.step()
    return Task(model.eval(), images, labels, recorded.groups, device)


# ------------------------------------------------------------------------------------------------
# Scorers: what happens before the groups are scored, and the function that scores one
# ------------------------------------------------------------------------------------------------


def ours(task: Task) -> Score:
    score: Score = ChannelImportance(task.model, task.batches)
    return score


def activation(task: Task) -> Score:
    importance = tp.importance.ActivationImportance()
    with torch.no_grad(), importance.compute_importance(task.model):
        for batch in task.batches:
            task.model(batch)
    return importance  # type: ignore[no-any-return]


def taylor(task: Task) -> Score:
    task.model.zero_grad()
    for batch, labels in zip(task.batches, task.labels, strict=True):
        F.cross_entropy(task.model(batch), labels).backward()
    return tp.importance.TaylorImportance()  # type: ignore[no-any-return]


def hessian(task: Task) -> Score:
    importance = tp.importance.HessianImportance()
    importance.zero_grad()
    for batch, labels in zip(task.batches, task.labels, strict=True):
        losses = F.cross_entropy(task.model(batch), labels, reduction="none")
        for loss in losses:
            task.model.zero_grad()
            loss.backward(retain_graph=True)
            importance.accumulate_grad(task.model)
    return importance  # type: ignore[no-any-return]


def bn_scale(task: Task) -> Score:
    return tp.importance.BNScaleImportance()  # type: ignore[no-any-return]


def magnitude(task: Task) -> Score:
    return tp.importance.MagnitudeImportance()  # type: ignore[no-any-return]


def hrank(task: Task) -> Score:
    without = sum(
        not any(isinstance(item.dep.target.module, nn.Conv2d) for item in group) for group in task.groups
    )
    if without:
        raise NotApplicable(
            f"{without} of {len(task.groups)} groups have no convolution: a channel of a sequence of tokens is "
            "a column, whose rank is one"
        )
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def add(module: nn.Module, args: Any, output: Tensor) -> None:
            ranks = torch.linalg.matrix_rank(output).double().sum(0)
            sums[name] = sums[name] + ranks if name in sums else ranks

        return add

    layers = {name: m for name, m in task.model.named_modules() if isinstance(m, nn.Conv2d)}
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        with torch.inference_mode():
            for batch in task.batches:
                task.model(batch)
    finally:
        for handle in handles:
            handle.remove()
    scores = {name: (ranks / task.images).clone() for name, ranks in sums.items()}
    importance: Score = ChannelImportance(task.model, scores=scores)
    return importance


@dataclass(frozen=True)
class Scorer:
    prepare: Callable[[Task], Score]
    reads_data: bool
    scales: bool = False  # may be measured on fewer images, its time being proportional to them


SCORERS = {
    "idap": Scorer(ours, True),
    "activation": Scorer(activation, True),
    "taylor": Scorer(taylor, True),
    "hessian": Scorer(hessian, True),
    "hrank": Scorer(hrank, True, scales=True),
    "bn_scale": Scorer(bn_scale, False),
    "magnitude": Scorer(magnitude, False),
}


def forward(task: Task) -> None:
    with torch.inference_mode():
        for batch in task.batches:
            task.model(batch)
    _wait(task.device)


def scored(scorer: Scorer, task: Task) -> list[Tensor | None]:
    """What is timed: a score for every group."""
    importance = scorer.prepare(task)
    scores = [importance(group) for group in task.groups]
    _wait(task.device)
    return scores


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------
# Checks
# ------------------------------------------------------------------------------------------------


def count_scored(task: Task, scores: list[Tensor | None]) -> int:
    """Groups with a score for every channel.

    Raises:
        ValueError: a score has the wrong length, or is not finite.
    """
    for group, score in zip(task.groups, scores, strict=True):
        width = len(group[0].idxs)
        if score is not None and score.shape != (width,):
            raise ValueError(f"a score of shape {tuple(score.shape)} for a group of {width} channels")
        if score is not None and not score.isfinite().all():
            raise ValueError("a score is not finite")
    return sum(score is not None for score in scores)


def plain_scores(task: Task) -> list[Tensor]:
    """Flow divergence from hooks in plain PyTorch and float64, mean over the layers of a group, mean one."""
    norms: dict[nn.Module, list[Tensor]] = {}
    positions: dict[nn.Module, int] = {}

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        y = output.double().relu()
        y = y.flatten(2) if isinstance(module, nn.Conv2d) else y.view(len(y), -1, y.shape[-1]).mT
        norms.setdefault(module, []).append(torch.linalg.vector_norm(y, dim=2))
        positions[module] = y.shape[2]

    handles = [
        m.register_forward_hook(hook) for m in task.model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))
    ]
    forward(task)
    for handle in handles:
        handle.remove()
    results = []
    for group in task.groups:
        total = torch.zeros(len(group[0].idxs), dtype=torch.float64, device=task.device)
        times = torch.zeros_like(total)
        for item in group:
            layer = item.dep.target.module
            if layer not in norms or not group._DG.is_out_channel_pruning_fn(item.dep.handler):
                continue
            filters = torch.linalg.vector_norm(layer.weight.detach().double().flatten(1), dim=1)
            flow = torch.cat(norms[layer]).mean(0) * filters / (len(filters) * positions[layer])
            roots = torch.tensor(item.root_idxs, device=task.device)
            total.scatter_add_(0, roots, flow[item.idxs])
            times.scatter_add_(0, roots, torch.ones_like(flow[item.idxs]))
        total /= times
        results.append(total / total.mean())
    return results


def check_ours(task: Task) -> None:
    """Refuses to go on if our scores differ from the formula in plain PyTorch."""
    for number, (got, wanted) in enumerate(
        zip(scored(SCORERS["idap"], task), plain_scores(task), strict=True)
    ):
        root = task.groups[number][0].dep.target.name
        if got is None or got.shape != wanted.shape:
            raise SystemExit(
                f"no score, or one of the wrong length, for the group of {root}: nothing was timed"
            )
        error = float((got.to(wanted) - wanted).abs().max() / wanted.abs().max())
        if not error < TOLERANCE:
            raise SystemExit(f"the scores of the group of {root} are wrong by {error:.1e}: nothing was timed")


# ------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------


def clock(function: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result


def few_enough(scorer: Scorer, task: Task, limit: float) -> Task:
    """The task, or one with as few images as fit into the limit of seconds by a trial with one."""
    if not scorer.scales:
        return task
    seconds, _ = clock(lambda: scored(scorer, task.first(1)))
    return task if seconds * task.images <= limit else task.first(max(1, int(limit / seconds)))


def measure(task: Task, rounds: int, slow: float, limit: float) -> dict[str, Any]:
    """Rows of one model by scorer, each with its times or with why there are none."""
    check_ours(task)
    rows: dict[str, dict[str, Any]] = {}
    fast: dict[str, Callable[[], object]] = {"forward": lambda: forward(task)}
    times: dict[str, list[float]] = {}
    for name, scorer in SCORERS.items():
        row = rows[name] = {"reads_data": scorer.reads_data}
        try:
            own = few_enough(scorer, task.with_own_groups(), limit)
            seconds, scores = clock(partial(scored, scorer, own))
            row |= {"groups_scored": count_scored(task, scores), "images": own.images}
        except NotApplicable as reason:
            row["skipped"] = str(reason)
            continue
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"
            continue
        finally:
            task.model.zero_grad()
        if not row["groups_scored"]:
            row["skipped"] = "gives no score to any group"
        elif seconds > slow:
            times[name] = [seconds]
        else:
            fast[name] = partial(scored, scorer, own)
    fast["forward_again"] = lambda: forward(task)
    times |= in_turns(fast, rounds)
    task.model.zero_grad()
    bare = [*times.pop("forward"), *times["forward_again"]]
    # Least times: the difference of two long ones would be the machine's noise.
    noise = abs(min(bare[:rounds]) - min(times.pop("forward_again")))
    for name, own_times in times.items():
        row = rows[name]
        scale = task.images / row["images"]
        row["times"] = summary({name: [t * scale for t in own_times]})[name]
        row["beyond_forward_s"] = row["times"]["min_s"] - min(bare) if row["reads_data"] else None
        idap_times = times["idap"]
        if len(own_times) == len(idap_times):
            ratios = [scale * theirs / mine for theirs, mine in zip(own_times, idap_times, strict=True)]
            row["over_idap"] = statistics.median(ratios)
        else:
            row["over_idap"] = row["times"]["median_s"] / statistics.median(idap_times)
    return {
        "groups": len(task.groups),
        "forward": summary({"forward": bare})["forward"],
        "noise_s": noise,
        "scorers": rows,
    }


# ------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def peak(device: str) -> Iterator[list[int]]:
    """Gathers the highest memory in use within, in bytes: the process's own on a CPU, else the device's.

    Raises:
        OSError: this system tells no peak that can be set back.
    """
    found: list[int] = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    yield found
    if device == "cuda":
        found.append(torch.cuda.max_memory_allocated())
    else:
        status = Path("/proc/self/status").read_text()
        found.append(1024 * int(status.partition("VmHWM:")[2].split()[0]))


def extra_memory(name: str, task: Task) -> int | None:
    """Bytes that the peak of scoring lies above that of the forward passes, 0 if it does not; None if the system
    does not tell."""
    try:
        forward(task)
        with peak(task.device) as bare:
            forward(task)
        with peak(task.device) as whole:
            scored(SCORERS[name], task)
    except OSError:
        return None
    return max(0, whole[0] - bare[0])


def extra_memory_apart(name: str, model: str, args: argparse.Namespace) -> int | None:
    """The same of one batch, in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", name, "--models", model, "--batch", str(args.batch)]
    command += ["--device", args.device, "--threads", str(torch.get_num_threads()), "--batches", "1"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the process that measures the memory of {name} failed")
    result: int | None = json.loads(done.stdout.splitlines()[-1])
    return result


def show(model: str, result: dict[str, Any]) -> None:
    bare = result["forward"]["median_s"]
    print(
        f"{MODELS[model]}, {result['groups']} groups; forward passes {bare:.2f} s, noise {result['noise_s']:.2f} s"
    )
    for name, row in result["scorers"].items():
        if "times" not in row:
            print(f"  {name:12s} {row.get('skipped') or row['error']}")
            continue
        t, beyond, memory = row["times"], row["beyond_forward_s"], row.get("extra_memory")
        text = f"  {name:12s} {t['median_s']:8.2f} s  {row['over_idap']:6.2f}x"
        text += f"  beyond the forward pass {beyond:7.2f} s" if beyond is not None else ""
        text += f"  +{memory / 2**20:.0f} MiB" if memory is not None else ""
        print(text + ("" if row["images"] == result["images"] else f"  (scaled from {row['images']} images)"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: torch's own")
    parser.add_argument("--slow", type=float, default=30, help="seconds over which one call is all")
    parser.add_argument("--limit", type=float, default=120, help="seconds for a scorer that can be scaled")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out")
    parser.add_argument("--json", help="write the result to this file")
    parser.add_argument("--memory-of", choices=list(SCORERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: nothing was measured")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        task = build(args.models[0], args.batch, args.batches, args.device)
        print(json.dumps(extra_memory(args.memory_of, task)))
        return
    result: dict[str, Any] = {
        "environment": environment(args.device) | {"torch_pruning": version("torch-pruning")},
        "device": args.device,
        "batch": args.batch,
        "batches": args.batches,
        "models": {},
    }
    for name in args.models:
        task = build(name, args.batch, args.batches, args.device)
        found = result["models"][name] = measure(task, args.rounds, args.slow, args.limit)
        found["images"] = task.images
        for scorer, row in found["scorers"].items():
            if "times" in row and not args.no_memory:
                row["extra_memory"] = extra_memory_apart(scorer, name, args)
        show(name, found)
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
