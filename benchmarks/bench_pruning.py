"""Criteria against each other on real data, by accuracy after equal fine-tuning; resumable.

python benchmarks/bench_pruning.py --json benchmarks/results/pruning-cpu.jsonl --cache /tmp/idap-bases

Every run appends one JSON line, and is skipped when its line is there: stop it and start it again at will.
Two processes share the work with ``--shard 1/2`` and ``--shard 2/2``. ``--list`` shows what is left to do.

criteria   silhouettes, residual CNN: every criterion at -50, -70 and -85 % MACs, 5 seeds
sets       digits, MNIST-5k and a small ViT on silhouettes: every criterion at one ratio, 3 seeds
scratch    the shape that flow divergence chose, trained from new weights for as long as all of it took
oneshot    -50 % MACs and no training: batch norms re-estimated, means compensated, both, neither
ablation   the whole pipeline and parts of it, through idap.compress

The seed is that of the base network's training, of the fine-tuning and of the random criterion. All decisions
are made on training images; accuracies are of the test split, which nothing else reads.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load_file, save_file
from timing import environment
from torch import Tensor, nn
from torch.nn import functional as F

import idap
from idap import criteria
from idap.calibration import compensate, recalibrate
from idap.complexity import count_macs, count_params
from idap.quickstart import DigitsResNet, TrainingBatches

Criterion = Callable[[nn.Module, idap.ActivationProfile], dict[str, Tensor]]

TASKS = ("criteria", "sets", "scratch", "oneshot", "ablation")
READERS = (nn.Conv2d, nn.Linear)
CALIBRATION = 1024  # training images that profiles, gradients and batch norms are taken from
# Scores as they are, added up over the layers of a group, in place of means over groups scaled to mean one.
SUMMED = "_summed"


# ------------------------------------------------------------------------------------------------
# Networks
# ------------------------------------------------------------------------------------------------


class ResNet(DigitsResNet):
    """Residual CNN with 372,058 parameters for grey images; 9 M multiply-accumulates for 28x28."""

    def __init__(self, stride: int = 2) -> None:
        super().__init__(widths=(16, 48, 96), depths=(1, 2, 2))
        first = self.stem[0]
        assert isinstance(first, nn.Conv2d)
        first.stride = (stride, stride)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, dim)
        b, t, _ = x.shape
        qkv = self.qkv(x).reshape(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.proj(y.transpose(1, 2).reshape(b, t, self.num_heads * self.head_dim))
        return result


class Encoder(nn.Module):
    """A transformer block, normalised before each part."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, dim)
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """A small vision transformer: 16 patches of 28x28 images, their mean, one linear layer."""

    def __init__(self, dim: int = 64, depth: int = 3, heads: int = 8, hidden: int = 256) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, 7, stride=7)
        self.position = nn.Parameter(torch.randn(1, 16, dim) * 0.02)
        self.blocks = nn.Sequential(*(Encoder(dim, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:  # (B, 1, 28, 28) -> (B, 10)
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(dim=1))
        return logits


# ------------------------------------------------------------------------------------------------
# What is run
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How a network is trained on a set; every criterion gets the same."""

    epochs: int
    lr: float
    finetune_epochs: int
    finetune_lr: float
    shift: int  # pixels that training images are moved by at most


RECIPES = {
    ("silhouettes", "resnet"): Recipe(12, 0.05, 6, 0.03, 2),
    ("mnist5k", "resnet"): Recipe(20, 0.05, 8, 0.03, 2),
    ("digits", "resnet"): Recipe(40, 0.05, 10, 0.03, 1),
    ("silhouettes", "vit"): Recipe(40, 2e-3, 10, 1e-3, 2),
}


@dataclass(frozen=True)
class Run:
    """One line of the results: what is pruned, how, to which share of its multiply-accumulates."""

    task: str
    dataset: str
    model: str
    seed: int
    criterion: str
    macs: float
    variant: str = ""

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.dataset, self.model]


RIVALS = (
    "random",
    "weight_l1",
    "weight_l2",
    "taylor",
    "fpgm",
    "positive_fraction",
    "bn_scale",
)
ABLATION: dict[str, dict[str, Any]] = {
    "filters, then layers": {},
    "layers, then filters": {"stages": ("layers", "filters")},
    "filters only": {"stages": ("filters",)},
    "layers only": {"stages": ("layers",)},
    "no fine-tuning": {"finetune": None, "final_finetune": None},
    "no mean compensation": {"compensate": False},
    "no batch-norm re-estimation": {"recalibrate": False},
}
ONESHOT = {
    "neither": (False, False),
    "batch norm re-estimated": (False, True),
    "means compensated": (True, False),
    "both": (True, True),
}


def grid() -> list[Run]:
    """All runs, in the order in which they are worth having."""
    runs = []
    silhouettes = ("silhouettes", "resnet")
    names = ("flow_divergence", *RIVALS, f"flow_divergence{SUMMED}", f"taylor{SUMMED}")
    for seed in range(5):
        for macs in (0.30, 0.50, 0.15):
            runs += [Run("criteria", *silhouettes, seed, name, macs) for name in names]
        runs.append(Run("scratch", *silhouettes, seed, "flow_divergence", 0.30))
        runs += [Run("oneshot", *silhouettes, seed, "flow_divergence", 0.50, v) for v in ONESHOT]
    for seed in range(3):
        for dataset, model in (("digits", "resnet"), ("mnist5k", "resnet"), ("silhouettes", "vit")):
            own = [name for name in names if model == "resnet" or name != "bn_scale"]
            runs += [Run("sets", dataset, model, seed, name, 0.30) for name in own]
            if model == "resnet":
                runs.append(Run("scratch", dataset, model, seed, "flow_divergence", 0.30))
        runs += [Run("ablation", *silhouettes, seed, "flow_divergence", 0.30, v) for v in ABLATION]
    # Whether summing alone makes the difference: at one ratio for the others too.
    others = [name for name in RIVALS if name != "taylor"]
    for seed in range(5):
        runs += [Run("criteria", *silhouettes, seed, f"{name}{SUMMED}", 0.30) for name in others]
    return runs


def shard(runs: list[Run], part: int, parts: int) -> list[Run]:
    """The runs of one process: those of one base network stay together, spread by the work in them."""
    bases: dict[tuple[str, str, int], list[Run]] = {}
    for run in runs:
        bases.setdefault((run.dataset, run.model, run.seed), []).append(run)
    load = [0.0] * parts
    mine: list[Run] = []
    for (dataset, _, _), own in sorted(bases.items(), key=lambda item: -_work(item[0][0], len(item[1]))):
        least = load.index(min(load))
        load[least] += _work(dataset, len(own))
        if least == part:
            mine += own
    order = {run: i for i, run in enumerate(runs)}
    return sorted(mine, key=order.__getitem__)


def _work(dataset: str, runs: int) -> float:
    return {"silhouettes": 14.0, "mnist5k": 6.0, "digits": 3.0}[dataset] * (runs + 4)


# ------------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------------


@cache
def _data(name: str) -> dict[str, datasets.Split]:
    return datasets.load(name)


def _new(dataset: str, model: str) -> nn.Module:
    network = ViT() if model == "vit" else ResNet(stride=1 if dataset == "digits" else 2)
    return network.to(memory_format=torch.channels_last)


def accuracy(model: nn.Module, split: datasets.Split) -> float:
    """The share of the split's images that the model, in evaluation mode, puts into their class."""
    device = next(model.parameters()).device
    mode, right = model.training, 0
    model.eval()
    with torch.inference_mode():
        for images, labels in zip(split.images.split(256), split.labels.split(256), strict=True):
            right += int((model(images.to(device)).argmax(dim=1).cpu() == labels).sum())
    model.train(mode)
    return right / len(split)


class Bench:
    """Runs of the grid with what they share: where results go, and where trained bases are kept."""

    def __init__(self, path: Path, cache_dir: Path, device: str) -> None:
        self.path, self.cache_dir, self.device = path, cache_dir, device
        self.environment = environment(device)
        cache_dir.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)

    def finished(self) -> set[str]:
        return {_key(row["run"], row["recipe"]) for row in read_lines(self.path)}

    def append(self, row: dict[str, Any]) -> None:
        """One line in one write, on the disk before this returns; a line cut short before it is ended."""
        text = json.dumps(row) + "\n"
        with open(self.path, "a+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                text = text if file.read(1) == b"\n" else "\n" + text
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def base(self, run: Run) -> tuple[nn.Module, float]:
        """The trained network of a set and seed in eval mode, from the cache if it is there, and its seconds."""
        recipe = run.recipe
        mark = f"{recipe.epochs}-{recipe.lr:g}-{recipe.shift}"
        path = self.cache_dir / f"{run.dataset}-{run.model}-{mark}-{run.seed}.safetensors"
        torch.manual_seed(run.seed)
        model = _new(run.dataset, run.model)
        if path.exists():
            model.load_state_dict(load_file(path))
            return model.to(self.device).eval(), 0.0
        start = time.perf_counter()
        model.to(self.device)
        self.train(model, run, recipe.epochs, recipe.lr)
        state = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
        partial_path = path.with_suffix(f".{os.getpid()}.tmp")
        save_file(state, partial_path)
        os.replace(partial_path, path)
        return model.eval(), time.perf_counter() - start

    def train(self, model: nn.Module, run: Run, epochs: int, lr: float) -> None:
        train = _data(run.dataset)["train"]
        batches = TrainingBatches(train, pixels=run.recipe.shift)
        # A transformer does not learn from so little data with plain gradient descent in as many epochs.
        adam = partial(torch.optim.AdamW, lr=lr, weight_decay=0.05) if run.model == "vit" else None
        idap.finetune(model, batches, epochs=epochs, lr=lr, optimizer=adam, seed=run.seed)

    def calibration(self, run: Run) -> list[tuple[Tensor, Tensor]]:
        train = _data(run.dataset)["train"]
        images, labels = train.images[:CALIBRATION].split(128), train.labels[:CALIBRATION].split(128)
        return list(zip(images, labels, strict=True))

    def plan(self, base: nn.Module, run: Run) -> idap.PruningPlan:
        pairs = self.calibration(run)
        images = [image for image, _ in pairs]
        example = images[0][:1].to(self.device)
        profile = idap.profile(base, images, blocks=(), progress=False)
        name = run.criterion.removesuffix(SUMMED)
        summed: dict[str, Any] = (
            {"normalize": None, "reduction": "sum"} if run.criterion.endswith(SUMMED) else {}
        )
        criterion: Criterion
        if name == "taylor":
            criterion = criteria.taylor(pairs)
        elif name == "bn_scale":
            criterion = criteria.bn_scale(example)
        elif name == "random":
            criterion = partial(criteria.random_scores, seed=run.seed)
        else:
            criterion = {"flow_divergence": idap.flow_divergence, **criteria.RIVALS}[name]
        return idap.prune_filters(
            base, criterion(base, profile), example, macs=run.macs, round_to=1, **summed
        )

    def carry_out(self, run: Run) -> dict[str, Any]:
        base, base_seconds = self.base(run)
        start = time.perf_counter()
        test = _data(run.dataset)["test"]
        example = test.images[:1].to(self.device)
        scores = {"base": accuracy(base, test)}
        size = {"base_macs": count_macs(base, example), "base_params": count_params(base)}
        extra: dict[str, Any] = {}
        if run.task == "ablation":
            model, extra = self.compress(base, run)
        else:
            model = self.prune(base, run, test, scores)
        scores["final"] = accuracy(model, test)
        return {
            "run": asdict(run),
            "recipe": asdict(run.recipe),
            "accuracy": {name: round(value, 6) for name, value in scores.items()},
            "macs": count_macs(model, example),
            "params": count_params(model),
            **size,
            **extra,
            "widths": [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)],
            "seconds": round(time.perf_counter() - start, 2),
            "base_seconds": round(base_seconds, 2),
            "environment": self.environment,
        }

    def prune(self, base: nn.Module, run: Run, test: datasets.Split, scores: dict[str, float]) -> nn.Module:
        recipe = run.recipe
        images = [image for image, _ in self.calibration(run)]
        plan = self.plan(base, run)
        source = base
        compensated, reestimated = ONESHOT.get(run.variant, (False, True))
        if compensated:
            readers = [name for name, module in base.named_modules() if isinstance(module, READERS)]
            inputs = idap.profile(base, images, layers=(), blocks=(), inputs=readers, progress=False).inputs
            source = compensate(base, plan, inputs, images[0][:1].to(self.device))
        model = plan.apply(source).to(memory_format=torch.channels_last)
        if run.task == "oneshot":
            if reestimated:
                recalibrate(model, images)
            return model
        if run.task == "scratch":
            torch.manual_seed(run.seed)
            for module in model.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
                    module.reset_parameters()
            self.train(model, run, recipe.epochs + recipe.finetune_epochs, recipe.lr)
            return model
        scores["one_shot"] = accuracy(model, test)
        recalibrate(model, images)
        scores["recalibrated"] = accuracy(model, test)
        self.train(model, run, recipe.finetune_epochs, recipe.finetune_lr)
        return model

    def compress(self, base: nn.Module, run: Run) -> tuple[nn.Module, dict[str, Any]]:
        """The pipeline with one part changed: an epoch after every step, twice the grid's fine-tuning at the end."""
        recipe, validation = run.recipe, _data(run.dataset)["validation"]

        def tune(epochs: int) -> Callable[[nn.Module], None]:
            return lambda model: self.train(model, run, epochs, recipe.finetune_lr)

        options = {
            "finetune": tune(1),
            "final_finetune": tune(2 * recipe.finetune_epochs),
            **ABLATION[run.variant],
        }
        result = idap.compress(
            base,
            [image for image, _ in self.calibration(run)],
            evaluate=lambda model: accuracy(model, validation),
            target={"macs": run.macs},
            budget=0.02,
            round_to=1,
            seed=run.seed,
            progress=False,
            **options,
        )
        steps = [s for s in result.history if s.stage != "base"]
        return result.model, {
            "reached_target": result.reached_target,
            "stopped": result.stopped,
            "steps": len(steps),
            "kept": sum(s.accepted for s in steps),
        }


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The results of a file; a line that a crash cut short is left out."""
    rows = []
    with suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
        for line in file:
            with suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


def _key(run: dict[str, Any], recipe: dict[str, Any]) -> str:
    return json.dumps([run, recipe], sort_keys=True)


def _left(runs: Iterable[Run], done: set[str]) -> Iterator[Run]:
    return (run for run in runs if _key(asdict(run), asdict(run.recipe)) not in done)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--datasets", nargs="+", choices=datasets.NAMES, default=list(datasets.NAMES))
    parser.add_argument("--models", nargs="+", choices=("resnet", "vit"), default=["resnet", "vit"])
    parser.add_argument("--seeds", type=int, nargs="+", help="only these")
    parser.add_argument(
        "--json", type=Path, required=True, help="results, a line a run; runs in it are skipped"
    )
    parser.add_argument(
        "--cache", type=Path, required=True, help="folder that keeps the trained base networks"
    )
    parser.add_argument("--shard", default="1/1", help="i/n: the i-th of n processes, from 1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--list", action="store_true", help="show what is left, and run nothing")
    args = parser.parse_args()
    part, parts = map(int, args.shard.split("/"))
    if not 1 <= part <= parts:
        raise SystemExit(f"--shard {args.shard}: wanted i/n with i from 1 to n")
    torch.set_num_threads(args.threads)
    bench = Bench(args.json, args.cache, args.device)
    wanted = [
        run
        for run in grid()
        if run.task in args.tasks
        and run.dataset in args.datasets
        and run.model in args.models
        and (args.seeds is None or run.seed in args.seeds)
    ]
    runs = shard(wanted, part - 1, parts)
    left = list(_left(runs, bench.finished()))
    begin = time.perf_counter()
    for i, run in enumerate(left):
        if args.list:
            print(run)
            continue
        row = bench.carry_out(run)
        bench.append(row)
        spent = time.perf_counter() - begin
        print(
            f"{i + 1}/{len(left)} {run.task} {run.dataset} {run.model} {run.seed} {run.criterion} {run.macs:g} "
            f"{run.variant} {row['accuracy']} {row['seconds']:.0f} s, left about "
            f"{spent / (i + 1) * (len(left) - i - 1) / 60:.0f} min",
            flush=True,
        )


if __name__ == "__main__":
    main()
