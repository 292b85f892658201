"""The tables of the documents, made from the committed results.

python benchmarks/tables.py            prints them
python benchmarks/tables.py --write    writes them into the documents, between their markers
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # where this file is loaded by its path
import bars  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
GPU_RESULTS = RESULTS / "gpu"
NOT_MEASURED = "Not measured yet; `{}` measures it."


def load(name: str) -> dict[str, Any]:
    with open(RESULTS / f"{name}.json", encoding="utf-8") as file:
        result: dict[str, Any] = json.load(file)
    return result


def machine(environment: dict[str, Any]) -> str:
    return (
        f"{environment['processor']}, {environment['threads']} threads, {environment.get('isa', '')}, "
        f"torch {environment['torch']}, {environment['date']}"
    )


def kernels(name: str) -> str:
    result = load(name)
    lines = [
        f"{machine(result['environment'])}; median times.",
        "",
        "| `channel_stats` on | time | GB/s | of ceiling | eager | compile | released |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["ops"]["channel_stats"]:
        speed = row["speedup"]
        lines.append(
            f"| {_case_label(row)} | {row['times']['idap']['median_us'] / 1e3:.2f} ms | {row['gb_per_s']:.1f} | "
            f"{100 * row['share_of_ceiling']:.0f} % | {speed['eager']:.1f}× | {speed['compile']:.2f}× | "
            f"{speed['released']:.2f}× |"
        )
    summary = result["summary"]
    means = [f"{summary[f'channel_stats/{peer}']['geomean']:.{d}f}×" for peer, d in PEERS]
    worst = [f"{summary[f'channel_stats/{peer}']['worst']:.{d}f}×" for peer, d in PEERS]
    lines.append(f"| **geometric mean** | | | | **{means[0]}** | **{means[1]}** | **{means[2]}** |")
    lines.append(f"| worst case | | | | {worst[0]} | {worst[1]} | {worst[2]} |")
    others = []
    for op in ("pair_stats", "filter_norms"):
        ratios = [
            f"{summary[f'{op}/{peer}']['geomean']:.2f}× {peer} (worst {summary[f'{op}/{peer}']['worst']:.2f}×)"
            for peer in ("eager", "compile")
            if f"{op}/{peer}" in summary
        ]
        others.append(f"`{op}`: {', '.join(ratios)}")
    lines += ["", "Geometric means of the other two over the same cases: " + "; ".join(others) + "."]
    return "\n".join(lines)


PEERS = (("eager", 1), ("compile", 2), ("released", 2))


FUSED_PEERS = ("forward", "separate", "compile")


def bn_act_stats(name: str) -> str:
    if not (RESULTS / f"{name}.json").exists():
        return NOT_MEASURED.format(
            f"python benchmarks/bench_kernels.py --ops bn_act_stats --json {name}.json"
        )
    result = load(name)
    rows = result["ops"]["bn_act_stats"]
    lines = [
        f"{machine(result['environment'])}; median times; bytes read and written.",
        "",
        "| `bn_act_stats` on | time | GB/s | of ceiling | batch norm and ReLU alone | and `channel_stats` | compile |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [_ratio(row["speedup"].get(peer)) for peer in FUSED_PEERS]
        lines.append(
            f"| {_case_label(row)} | {row['times']['idap']['median_us'] / 1e3:.2f} ms | {row['gb_per_s']:.1f} | "
            f"{100 * row['share_of_ceiling']:.0f} % | {' | '.join(cells)} |"
        )
    found = [result["summary"].get(f"bn_act_stats/{peer}", {}) for peer in FUSED_PEERS]
    means = [_ratio(values.get("geomean")) for values in found]
    lines.append(f"| **geometric mean** | | | | {' | '.join(f'**{text}**' for text in means)} |")
    lines.append(f"| worst case | | | | {' | '.join(_ratio(values.get('worst')) for values in found)} |")
    lines += [
        "",
        "Ceiling: a copy of the map into memory that is there already. The others: time of eager batch norm and ReLU "
        "in place, without and with our `channel_stats` of the same map, and of both with the same statistics under "
        "`torch.compile`, over ours. Results are written to memory that the process has already"
        + _in_fresh_memory([row["fresh_memory"] for row in rows if "fresh_memory" in row]),
    ]
    return "\n".join(lines)


def _in_fresh_memory(times: list[dict[str, float]]) -> str:
    if not times:
        return "."
    means = [
        statistics.geometric_mean(t[peer] / t["idap"] for t in times) for peer in ("forward", "separate")
    ]
    return (
        "; where every result of more than 32 MB gets new pages from the system, as by default on Linux, their cost is "
        f"in all of them, and the means of the first two are {means[0]:.2f}× and {means[1]:.2f}×."
    )


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"


def _case_label(row: dict[str, Any]) -> str:
    shape, layout, dtype = row["case"].rsplit("-", 2)
    return f"{shape.replace('x', '×')} {layout.replace('_', '-')} {dtype}"


def gpu_results() -> bars.Results:
    """What the suite left, all of one GPU; empty before it ran on one."""
    return bars.load([GPU_RESULTS])


def gpu_machine(results: bars.Results) -> str:
    environment = next(iter(results.values()))["environment"]
    return ", ".join(
        f"{label}{environment[key]}"
        for key, label in (("gpu", ""), ("driver", "driver "), ("torch", "torch "), ("date", ""))
        if environment.get(key)
    )


def gpu_bars(_: str) -> str:
    results = gpu_results()
    lines = [gpu_machine(results) + ".", ""] if results else []
    lines += ["| on one GPU, in one run | target | measured | |", "|---|--:|--:|---|"]
    for row in bars.evaluate(results):
        verdict = "" if row["verdict"] == "not measured" else row["verdict"]
        lines.append(f"| {row['bar']} | {row['target']} | {row['measured']} | {verdict} |")
    return "\n".join(lines)


GPU_PEERS = {
    "channel_stats": ("eager", "compile", "released", "triton"),
    "bn_act_stats": ("forward", "separate", "compile", "triton"),
    "pair_stats": ("eager", "compile", "triton"),
    "filter_norms": ("eager", "compile", "triton"),
}


def gpu_kernels(_: str) -> str:
    results = gpu_results()
    if "kernels" not in results:
        return NOT_MEASURED.format("benchmarks/gpu_suite.sh kernels kernels-more")
    lines = [
        f"{gpu_machine(results)}; median times of the GPU's work, maps from its memory. Of a copy: share of the rate, "
        "in bytes read and written, of a copy within that memory. The others: their time over ours."
    ]
    for op, peers in GPU_PEERS.items():
        rows = results["kernels"]["ops"].get(op)
        if rows:
            lines += ["", f"| `{op}` on | time | GB/s | of a copy | {' | '.join(peers)} |"]
            lines.append("|---|--:|--:|--:|" + "--:|" * len(peers))
        for row in rows or ():
            label = _case_label(row) if row["case"].count("-") > 1 else row["case"]
            cells = [_ratio(row["speedup"].get(peer)) for peer in peers]
            lines.append(
                f"| {label} | {row['times']['idap']['median_us']:.1f} µs | {row['gb_per_s']:.0f} | "
                f"{100 * row['share_of_ceiling']:.0f} % | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def gpu_profile(_: str) -> str:
    results = gpu_results()
    if "profile" not in results:
        return NOT_MEASURED.format("benchmarks/gpu_suite.sh profile")
    result = results["profile"]
    lines = [
        f"{gpu_machine({'profile': result})}; a pass over {result['batches']} batches of {result['batch']}."
    ]
    for precision, measured in (("float32", result), ("convolutions in TF32", result.get("tf32"))):
        if measured:
            lines += [
                "",
                f"| ResNet-50, {precision} | time (p10–p90) | over the forward pass |",
                "|---|--:|--:|",
            ]
            lines += _profile_rows(measured, result["layers"], 1)
    return "\n".join(lines)


def kernels_summary(name: str) -> str:
    result = load(name.replace("-summary", ""))
    rows = {
        "channel_stats": "`channel_stats`",
        "pair_stats": "`pair_stats`",
        "filter_norms": "`filter_norms`",
    }
    lines = [
        f"{machine(result['environment'])}; geometric mean (worst case) of the speed-ups.",
        "",
        "| | cases | eager PyTorch | `torch.compile` | the released expression |",
        "|---|--:|--:|--:|--:|",
    ]
    for op, label in rows.items():
        cells = []
        for peer, digits in PEERS:
            found = result["summary"].get(f"{op}/{peer}")
            text = f"{found['geomean']:.{digits}f}× ({found['worst']:.{digits}f}×)" if found else "–"
            cells.append(text)
        lines.append(f"| {label} | {len(result['ops'][op])} | {' | '.join(cells)} |")
    shares = [row["share_of_ceiling"] for row in result["ops"]["channel_stats"] if row["bytes"] >= 32 << 20]
    lines += [
        "",
        f"On maps of 32 MB and more `channel_stats` reads at {100 * min(shares):.0f}–{100 * max(shares):.0f} % "
        f"(median {100 * statistics.median(shares):.0f} %) of the rate at which the same machine reads the same "
        "memory and does nothing with it.",
    ]
    return "\n".join(lines)


COST_CASES = (
    ("channel_stats", "32x256x56x56-contiguous-float32", "`channel_stats` of (32, 256, 56, 56)"),
    ("channel_stats", "8x512x3072-tokens-float32", "`channel_stats` of tokens (8, 512, 3072)"),
    ("channel_stats", "1x2048x7x7-contiguous-float32", "`channel_stats` of (1, 2048, 7, 7)"),
    ("pair_stats", "32x256x56x56-contiguous-float32", "`pair_stats` of two (32, 256, 56, 56)"),
    ("filter_norms", "resnet50-weights", "`filter_norms` of all weights of ResNet-50"),
)


def kernel_costs(name: str) -> str:
    result = load(name.replace("kernel-costs", "kernels"))
    lines = [
        f"{machine(result['environment'])}; float32, median times.",
        "",
        "| | reads | time | rate | eager PyTorch |",
        "|---|--:|--:|--:|--:|",
    ]
    for op, case, label in COST_CASES:
        row = next(row for row in result["ops"][op] if row["case"] == case)
        times = {who: row["times"][who]["median_us"] / 1e3 for who in ("idap", "eager")}
        lines.append(
            f"| {label} | {row['bytes'] / 1e6:.1f} MB | {times['idap']:.2f} ms | {row['gb_per_s']:.1f} GB/s | "
            f"{times['eager']:.1f} ms |"
        )
    return "\n".join(lines)


def profile(name: str) -> str:
    result = load(name)
    batches = result.get("batches", 1)
    lines = [
        f"| ResNet-50, {batches} batch{'es' * (batches > 1)} of {result['batch']} | time (p10–p90) | over the "
        "forward pass |",
        "|---|--:|--:|",
        *_profile_rows(result, result["layers"], 0),
        "",
        "Over the forward pass: the median of the rounds' ratios; the machine's own spread (p10–p90) in brackets. "
        "Blocks cost most in their first batch, whose inputs are copied to see which blocks write into theirs.",
    ]
    return "\n".join(lines)


def _profile_rows(result: dict[str, Any], layers: int, digits: int) -> list[str]:
    labels = {
        "forward": "forward pass alone",
        "profile": f"with all {layers} convolutions profiled, nothing fused",
        "profile_fused": "and their batch norms and activations run in the same pass",
        "profile_with_blocks": "with convolutions and removable blocks profiled",
        "eager_hooks": "with the same statistics from eager hooks",
        "forward_graph": "forward pass alone, as a replayed CUDA graph",
        "profile_graph": "with all convolutions profiled, fused, captured and replayed as a CUDA graph",
    }
    lines = []
    for key, label in labels.items():
        t, extra = result["times"].get(key), result["overhead"].get(key)
        if t is not None:
            low, middle, high = (f"{t[k] / 1e3:.{digits}f}" for k in ("p10_us", "median_us", "p90_us"))
            over = "" if extra is None else f"{100 * extra:+.1f} %"
            lines.append(f"| {label} | {middle} ms ({low}–{high}) | {over} |")
    return lines


def latency(name: str) -> str:
    result = load(name)
    base = result["models"]["base"]
    lines = [
        "| ResNet-50, batch 1, float32 | MACs | parameters | latency (p10–p90) | speed-up |",
        "|---|--:|--:|--:|--:|",
    ]
    labels = {"base": "as it is", "filters": "filters pruned", "filters+layers": "and two blocks removed"}
    for key, label in labels.items():
        row = result["models"][key]
        t = row["latency_ms"]
        lines.append(
            f"| {label} | {row['macs'] / 1e9:.2f} G ({100 * (row['macs'] / base['macs'] - 1):+.0f} %) | "
            f"{row['params'] / 1e6:.2f} M | {t['median']:.1f} ms ({t['p10']:.1f}–{t['p90']:.1f}) | "
            f"{row['speedup']:.2f}× |"
        )
    took = result["pruning_seconds"]
    lines += [
        "",
        f"Random weights: the table is about the network's shape. Profiling took {took['profile']:.1f} s (16 images), "
        f"deciding {took['decide_filters']:.1f} s, surgery {took['surgery']:.1f} s.",
    ]
    return "\n".join(lines)


def quickstart(name: str) -> str:
    result = load(name)
    lines = [
        "| stage | parameters | MACs | test accuracy | batch-1 latency | speed-up |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in result["stages"]:
        t = row["latency"]
        lines.append(
            f"| {row['name']} | {row['params']:,} | {row['macs'] / 1e6:.2f} M | {100 * row['accuracy']:.2f} % | "
            f"{t['median']:.2f} ms ({t['p10']:.2f}–{t['p90']:.2f}) | {row['speedup']:.2f}× |"
        )
    return "\n".join(lines)


PRUNING = "pruning-cpu.jsonl"
CRITERIA = {
    "flow_divergence": "flow divergence",
    "flow_divergence_summed": "flow divergence, summed",
    "taylor": "Taylor",
    "taylor_summed": "Taylor, summed",
    "weight_l1": "L1",
    "weight_l1_summed": "L1, summed",
    "weight_l2": "L2",
    "weight_l2_summed": "L2, summed",
    "fpgm": "FPGM",
    "fpgm_summed": "FPGM, summed",
    "positive_fraction": "APoZ",
    "positive_fraction_summed": "APoZ, summed",
    "bn_scale": "BN scale",
    "bn_scale_summed": "BN scale, summed",
    "random": "random",
    "random_summed": "random, summed",
}
SUMMED = (
    "Summed: scores as they are, added up over coupled layers; the others: mean over coupled layers, each group's "
    "scores divided by their mean (the default of `prune_filters`)."
)


def pruning_rows(**wanted: Any) -> list[dict[str, Any]]:
    """The runs whose fields have the wanted values, those of the last recipe of their network and set alone."""
    with open(RESULTS / PRUNING, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.endswith("}\n")]
    last = {(row["run"]["dataset"], row["run"]["model"]): row["recipe"] for row in rows}
    return [
        row
        for row in rows
        if row["recipe"] == last[row["run"]["dataset"], row["run"]["model"]]
        and all(row["run"][key] == value for key, value in wanted.items())
    ]


class Spread:
    """Values of the runs of some seeds, in percent."""

    def __init__(self, rows: list[dict[str, Any]], which: str = "final") -> None:
        by_seed = {row["run"]["seed"]: 100 * row["accuracy"][which] for row in rows}
        self.values = list(by_seed.values())

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values) if self.values else float("-inf")

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def cell(self, best: Spread | None = None) -> str:
        """Mean ± standard deviation; bold in the lead, ``≈`` where the lead is within its own deviation."""
        if not self.values:
            return ""
        text = f"{self.mean:.2f} ± {self.deviation:.2f}" if len(self.values) > 1 else f"{self.mean:.2f}"
        if best is not None and self.mean == best.mean:
            return f"**{text}**"
        return f"{text} ≈" if best is not None and best.mean - self.mean <= self.deviation else text


def _table(
    columns: dict[str, Callable[[str], list[dict[str, Any]]]], which: dict[str, str] | None = None
) -> list[str]:
    """Lines of a table, a criterion a row, a column for each selection of runs; the lead of each marked."""
    cells = {
        title: {key: Spread(select(key), (which or {}).get(title, "final")) for key in CRITERIA}
        for title, select in columns.items()
    }
    lines = []
    for key, label in CRITERIA.items():
        own = [column[key] for column in cells.values()]
        if any(spread.values for spread in own):
            leads = [max(column.values(), key=lambda spread: spread.mean) for column in cells.values()]
            marked = (spread.cell(best) for spread, best in zip(own, leads, strict=True))
            lines.append(f"| {label} | " + " | ".join(marked) + " |")
    return lines


def _head(first: str, columns: list[str]) -> list[str]:
    return [f"| {first} | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns)]


def _caption(rows: list[dict[str, Any]]) -> str:
    seeds = len({row["run"]["seed"] for row in rows})
    recipe, environment = rows[-1]["recipe"], rows[-1]["environment"]
    return (
        f"Test accuracy in %, mean ± standard deviation over {seeds} seeds; bold: in the lead; ≈: the lead is within "
        f"its own deviation. Training {recipe['epochs']} epochs, fine-tuning {recipe['finetune_epochs']}, the same for "
        f"all. torch {environment['torch']}, {environment['date']}."
    )


def pruning_criteria(_: str) -> str:
    of = {"dataset": "silhouettes", "model": "resnet"}
    rows = pruning_rows(task="criteria", **of)

    def select(macs: float) -> Callable[[str], list[dict[str, Any]]]:
        return lambda key: [r for r in rows if r["run"]["criterion"] == key and r["run"]["macs"] == macs]

    columns = {
        "−50 % MACs, no training": select(0.5),
        "−50 %": select(0.5),
        "−70 %": select(0.3),
        "−85 %": select(0.15),
    }
    base = Spread(rows, "base")
    scratch = Spread(pruning_rows(task="scratch", **of))
    return "\n".join(
        [
            *_head("silhouettes, residual CNN", list(columns)),
            f"| not pruned | | {' | '.join([base.cell()] * 3)} |",
            *_table(columns, {"−50 % MACs, no training": "recalibrated"}),
            f"| flow divergence's shape, from scratch | | | {scratch.cell()} | |",
            "",
            f"{_caption(rows)} No training: batch norms re-estimated. From scratch: new weights, for as many epochs "
            f"as training and fine-tuning took. {SUMMED}",
        ]
    )


def pruning_sets(_: str) -> str:
    places = {
        "silhouettes": {"dataset": "silhouettes", "model": "resnet"},
        "digits": {"dataset": "digits", "model": "resnet"},
        "MNIST-5k": {"dataset": "mnist5k", "model": "resnet"},
        "silhouettes, ViT": {"dataset": "silhouettes", "model": "vit"},
    }
    found = {
        title: [row for task in ("criteria", "sets") for row in pruning_rows(task=task, macs=0.3, **place)]
        for title, place in places.items()
    }
    found = {title: rows for title, rows in found.items() if rows}

    def select(rows: list[dict[str, Any]]) -> Callable[[str], list[dict[str, Any]]]:
        return lambda key: [row for row in rows if row["run"]["criterion"] == key]

    base = [Spread(rows, "base").cell() for rows in found.values()]
    scratch = [Spread(pruning_rows(task="scratch", **places[title])).cell() for title in found]
    seeds = ", ".join(f"{title} {len({r['run']['seed'] for r in rows})}" for title, rows in found.items())
    return "\n".join(
        [
            *_head("−70 % MACs, fine-tuned", list(found)),
            f"| not pruned | {' | '.join(base)} |",
            *_table({title: select(rows) for title, rows in found.items()}),
            f"| flow divergence's shape, from scratch | {' | '.join(scratch)} |",
            "",
            f"Test accuracy in %, mean ± standard deviation over seeds ({seeds}); bold: in the lead; ≈: the lead is "
            "within its own deviation.",
        ]
    )


def pruning_oneshot(_: str) -> str:
    rows = pruning_rows(task="oneshot")
    variants = list(dict.fromkeys(row["run"]["variant"] for row in rows))
    spreads = {v: Spread([row for row in rows if row["run"]["variant"] == v]) for v in variants}
    base, neither = Spread(rows, "base"), spreads["neither"]
    lines = [
        *_head("−50 % MACs by flow divergence, no training", ["test accuracy", "of the loss recovered"]),
        f"| not pruned | {base.cell()} | |",
    ]
    for variant, spread in spreads.items():
        share = (spread.mean - neither.mean) / (base.mean - neither.mean)
        lines.append(
            f"| {variant} | {spread.cell()} | {'' if variant == 'neither' else f'{100 * share:.0f} %'} |"
        )
    return "\n".join(lines)


def pruning_ablation(_: str) -> str:
    rows = pruning_rows(task="ablation")
    lines = _head(
        "target −70 % MACs", ["test accuracy", "MACs left", "parameters left", "target reached", "tries"]
    )
    variants = list(dict.fromkeys(row["run"]["variant"] for row in rows))
    spreads = {v: Spread([row for row in rows if row["run"]["variant"] == v]) for v in variants}
    lines.append(f"| not pruned | {Spread(rows, 'base').cell()} | | | | |")
    for variant, spread in spreads.items():
        own = [row for row in rows if row["run"]["variant"] == variant]
        macs = statistics.fmean(row["macs"] / row["base_macs"] for row in own)
        params = statistics.fmean(row["params"] / row["base_params"] for row in own)
        reached = sum(row["reached_target"] for row in own)
        tries = statistics.fmean(row["steps"] for row in own)
        lines.append(
            f"| {variant} | {spread.cell()} | {100 * macs:.0f} % | {100 * params:.0f} % | "
            f"{reached} of {len(own)} | {tries:.1f} |"
        )
    return "\n".join(lines)


def pruning_summary(_: str) -> str:
    of = {"dataset": "silhouettes", "model": "resnet"}
    rows = pruning_rows(task="criteria", **of)
    base = Spread(rows, "base")
    columns = {"−50 % MACs": 0.5, "−70 % MACs": 0.3, "−85 % MACs": 0.15}
    plain = [key for key in CRITERIA if not key.endswith("_summed") or key == "flow_divergence_summed"]

    def spread(key: str, macs: float, which: str = "final") -> Spread:
        return Spread([r for r in rows if r["run"]["criterion"] == key and r["run"]["macs"] == macs], which)

    untrained = {key: spread(key, 0.5, "recalibrated") for key in plain}
    trained = {title: {key: spread(key, macs) for key in plain} for title, macs in columns.items()}
    leads = [max(own.values(), key=lambda s: s.mean) for own in (untrained, *trained.values())]
    lines = [
        *_head("criterion", ["−50 %, no training", *columns]),
        f"| not pruned | {' | '.join([base.cell()] * 4)} |",
    ]
    for key in plain:
        own = [untrained[key], *(column[key] for column in trained.values())]
        if any(s.values for s in own):
            cells = (s.cell(lead) for s, lead in zip(own, leads, strict=True))
            lines.append(f"| {CRITERIA[key]} | {' | '.join(cells)} |")
    lines += ["", _caption(rows)]
    return "\n".join(lines)


def step(name: str) -> str:
    result = load(name)
    labels = {
        "forward": "the forward passes alone",
        "idap": "profile, rank, surgery, check",
        "released": "the same the released way",
    }
    lines = [
        f"{machine(result['environment'])}; ResNet-50, {result['batches']} batches of {result['batch']}.",
        "",
        "| one pruning step | time (least to most) |",
        "|---|--:|",
    ]
    for key, label in labels.items():
        t = result["times"][key]
        lines.append(f"| {label} | {t['median_s']:.1f} s ({t['min_s']:.1f}–{t['max_s']:.1f}) |")
    dense = result["densenet121"]
    lines += [
        "",
        "The released way (eager hooks with a transfer a layer and batch, a new dependency graph a pruned layer) "
        f"takes {result['speedup']:.2f}× the time; beyond the forward passes, which both have to run, "
        f"{result['speedup_beyond_forward']:.1f}×. Deciding (scores to plan) on DenseNet-121: "
        f"{dense['median_s']:.2f} s ({dense['min_s']:.2f}–{dense['max_s']:.2f}). Peak memory of the process: "
        f"{result['peak_memory_mb'] / 1024:.1f} GiB.",
    ]
    return "\n".join(lines)


SCORERS = {
    "idap": "`ChannelImportance`, flow divergence",
    "activation": "`ActivationImportance`",
    "taylor": "`TaylorImportance`",
    "hessian": "`HessianImportance`",
    "hrank": "feature-map rank (HRank)",
    "bn_scale": "`BNScaleImportance`",
    "magnitude": "`MagnitudeImportance`",
}


def scoring(name: str) -> str:
    result = load(name)
    images = result["batch"] * result["batches"]
    lines = [f"{machine(result['environment'])}; Torch-Pruning {result['environment']['torch_pruning']}."]
    notes = []
    for model, found in result["models"].items():
        title = {"resnet50": "ResNet-50", "vit_base_patch16_224": "ViT-B/16"}[model]
        bare, rows = found["forward"], found["scorers"]
        lines += [
            "",
            f"| {title}, {images} images, {found['groups']} groups | reads data | time (least–most) | over ours | "
            "beyond the forward passes | over ours | memory beyond |",
            "|---|---|--:|--:|--:|--:|--:|",
            f"| the forward passes alone | | {_seconds(bare)} | | | | |",
        ]
        own = rows["idap"]["beyond_forward_s"]
        for key, label in SCORERS.items():
            row = rows[key]
            data = "yes" if row["reads_data"] else "no"
            if "times" not in row:
                lines.append(f"| {label} | {data} | – | | | | |")
                notes.append(f"{title}, {label}: {row.get('skipped') or 'raises ' + row['error']}.")
                continue
            if row["groups_scored"] < found["groups"]:
                notes.append(f"{title}, {label}: scores {row['groups_scored']} groups only.")
            if row["images"] < images:
                notes.append(f"{title}, {label}: measured on {row['images']} images, scaled to {images}.")
            beyond, memory = row["beyond_forward_s"], row.get("extra_memory")
            cells = [data, _seconds(row["times"]), f"{row['over_idap']:.2f}×", "", "", ""]
            if beyond is not None:
                # A difference within the noise of the forward passes is no more than a bound.
                noise = found["noise_s"]
                cells[3] = f"{beyond:.2f} s" if beyond > noise else f"≤ {noise:.2f} s"
                if beyond > noise:
                    cells[4] = f"{'' if own > noise else '≥ '}{beyond / max(own, noise):.1f}×"
            if memory is not None:
                cells[5] = f"{memory / 2**20:.0f} MiB"
            lines.append(f"| {label} | {' | '.join(cells)} |")
    apart = ", ".join(f"{found['noise_s']:.2f} s" for found in result["models"].values())
    lines += [
        "",
        "Beyond the forward passes: least time minus the least of the bare forward passes, themselves measured twice "
        f"and apart by {apart}. A time without a span is that of one call. Memory: peak of a process with "
        f"{result['batch']} images, above the peak of its forward pass.",
        *([""] + [f"- {note}" for note in notes] if notes else []),
    ]
    return "\n".join(lines)


def scoring_summary(name: str) -> str:
    result = load(name.replace("-summary", ""))
    found = list(result["models"].items())
    titles = {"resnet50": "ResNet-50", "vit_base_patch16_224": "ViT-B/16"}
    lines = [
        "| a score for every group, CPU | "
        + " | ".join(f"{titles[model]}, {result['batch'] * result['batches']} images" for model, _ in found)
        + " |",
        "|---|" + "--:|" * len(found),
        "| *the forward passes alone* | " + " | ".join(_seconds(own["forward"]) for _, own in found) + " |",
    ]
    for key, label in SCORERS.items():
        cells = []
        for _, own in found:
            row = own["scorers"][key]
            if "times" not in row:
                cells.append("–")
            else:
                over = row["over_idap"]
                ratio = "" if key == "idap" else f", {over:.{1 if over >= 1 else 2}f}×"
                cells.append(f"{row['times']['median_s']:.2f} s{ratio}")
        kind = "" if found[0][1]["scorers"][key]["reads_data"] else ", reads no data"
        lines.append(f"| {label}{kind} | {' | '.join(cells)} |")
    lines += [
        "",
        f"{machine(result['environment'])}; median times; over ours: median of the ratios within a round.",
    ]
    return "\n".join(lines)


def _seconds(times: dict[str, Any]) -> str:
    text = f"{times['median_s']:.2f} s"
    return text if times["rounds"] == 1 else f"{text} ({times['min_s']:.2f}–{times['max_s']:.2f})"


def resume(name: str) -> str:
    result = load(name)
    moments = sorted(kill["decisions_on_disk"] for row in result["rows"] for kill in row["killed"])
    return (
        f"{result['same']} of {result['runs']} runs of both stages on the digits, killed (`kill -9`) {result['kills']} "
        f"times at random moments with {moments[0]} to {moments[-1]} decisions on disk and resumed, ended at the same "
        "weights and the same history, bit for bit."
    )


def model_rows(name: str) -> list[dict[str, Any]]:
    with open(RESULTS / f"{name}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def _models_caption(rows: list[dict[str, Any]]) -> str:
    measured = [row["environment"] for row in rows if "environment" in row]
    dates = sorted({own["date"] for own in measured})
    return machine({**measured[-1], "date": " to ".join(dict.fromkeys((dates[0], dates[-1])))})


def _giga(macs: float) -> str:
    return f"{macs / 1e9:.{2 if macs < 1e10 else 1}f}"


def _verdict(row: dict[str, Any], step: str) -> str:
    found = row.get(step, {})
    if "error" not in found:
        return "✓" if found else "–"
    return "as unpruned¹" if found.get("unpruned_fails_too") else "✗"


def _proved_speed(row: dict[str, Any]) -> float | None:
    """The speed-up of the smallest network, if its surgery was proved exact and it was timed."""
    found = row.get("latency", {}).get("modes", {}).get("eager", {}).get("layers", {}).get("speedup")
    return found if "error_filters" in row.get("exact", {}) else None


def _deeper(row: dict[str, Any]) -> str:
    """What more blocks gone come to, where the paper's ratio was not reached before."""
    deep = row["latency"]["modes"]["eager"].get("deep") if _proved_speed(row) else None
    return f"; {deep['speedup']:.2f}× without {len(deep['removed'])} blocks" if deep else ""


def models(name: str) -> str:
    rows = model_rows(name)
    lines = [
        f"{_models_caption(rows)}; batch 1, float32, eager.",
        "",
        "| network | from | GMACs (paper) | stage 1 (target) | stage 2, blocks | parameters | exact | trains | "
        "reloads | export | ONNX |",
        "|---|---|--:|--:|--:|--:|--:|---|---|---|---|",
    ]
    notes: dict[str, str] = {}
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['name']} | {row['library']} | {row['failed']} |" + " |" * 8)
            continue
        paper, filters, layers = row["paper"], row.get("filters", {}), row.get("layers", {})
        cells = [row["title"], row["library"]]
        cells.append(f"{_giga(row['macs'])} ({paper['gmacs']:g})" if paper["gmacs"] else _giga(row["macs"]))
        if "after" in filters:
            share = filters["after"]["macs"] / row["macs"]
            cells.append(
                f"{_giga(filters['after']['macs'])}, {100 * share:.1f} % ({100 * filters['share']:.0f} %)"
            )
        else:
            cells.append("✗")
        if "after" in layers:
            cells.append(
                f"{_giga(layers['after']['macs'])}, {len(layers['removed'])} of {layers['removable']}"
            )
        else:
            cells.append("nothing to remove" if layers.get("removable") == 0 else "✗")
        last = layers.get("after") or filters.get("after") or {"params": row["params"]}
        cells.append(f"{row['params'] / 1e6:.1f} → {last['params'] / 1e6:.1f} M")
        errors = [value for key, value in row.get("exact", {}).items() if key.startswith("error_")]
        cells.append(f"{max(errors):.0e}" if errors else "✗")
        cells += [_verdict(row, step) for step in ("train", "reload", "export", "onnx")]
        lines.append(f"| {' | '.join(cells)} |")
        for step in ("export", "onnx"):
            own = row.get(step, {}).get("unpruned_fails_too")
            if own:
                notes.setdefault(f"{row['title']}, {step}", " ".join(own.split())[:160])
    lines += [
        "",
        "Exact: largest difference in float64, relative to the largest output, from the original with the removed "
        "contributions at zero, both stages.",
    ]
    if notes:
        lines += ["", "¹ The library's own network cannot be exported unpruned either:", ""]
        lines += [f"- {key}: {value}" for key, value in notes.items()]
    return "\n".join(lines)


def models_latency(name: str) -> str:
    rows = [row for row in model_rows(name.replace("-latency", "")) if _proved_speed(row) is not None]
    lines = [
        f"{_models_caption(rows)}; batch 1, float32, eager; median (p10–p90).",
        "",
        "| network | from | as it is | filters pruned | and blocks removed | speed-up | RTX 3060, paper | runs | "
        "profile | decision | surgery | peak memory |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        own = row["latency"]["modes"]["eager"]
        cells = [row["title"], row["library"]]
        for key in ("base", "filters", "layers"):
            t = own[key]
            cells.append(f"{t['median']:.1f} ms ({t['p10']:.1f}–{t['p90']:.1f})")
        paper = row["paper"]["speedup"]
        cells.append(f"{_proved_speed(row):.2f}×{_deeper(row)}")
        cells.append(f"{paper:.2f}×" if paper else "–")
        cells.append(str(row["latency"]["runs"]))
        costs = row["filters"]["costs"]
        cells.append(f"{costs['profile']['seconds']:.1f} s")
        cells.append(f"{costs['groups']['seconds'] + costs['decision']['seconds']:.1f} s")
        cells.append(f"{costs['surgery']['seconds']:.2f} s")
        peak = max(cost["peak_bytes"] for step, cost in costs.items() if step != "one forward pass")
        cells.append(f"{peak / 2**30:.1f} GiB ({costs['one forward pass']['peak_bytes'] / 2**30:.1f})")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Where the paper's ratio is not reached, more blocks go until it is, or none is left: the second figure. "
        "Profile: two batches of two samples (of one, above 60 GMACs). Decision: finding the groups, ranking, proof. "
        "Peak memory: of the process, the model included; in brackets that of a forward pass of the same batch.",
    ]
    return "\n".join(lines)


def models_summary(name: str) -> str:
    rows = model_rows(name.replace("-summary", ""))
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        if "after" in row.get("filters", {}):
            first.setdefault(row["name"], row)
    lines = [
        "| network | GMACs | stage 1 | stage 2 | CPU speed-up | paper, RTX 3060 |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in first.values():
        layers = row.get("layers", {})
        after = row["filters"]["after"]["macs"]
        speed = _proved_speed(row)
        paper = row["paper"]["speedup"]
        lines.append(
            f"| {row['title']} | {_giga(row['macs'])} | {_giga(after)} ({100 * (after / row['macs'] - 1):+.0f} %) | "
            f"{_giga(layers['after']['macs']) if layers.get('removed') else '–'} | "
            f"{f'{speed:.2f}×' if speed else '–'}{_deeper(row)} | {f'{paper:.2f}×' if paper else '–'} |"
        )
    lines += ["", f"{_models_caption(list(first.values()))}; batch 1, float32, random weights."]
    return "\n".join(lines)


TABLES: dict[str, dict[str, Callable[[str], str]]] = {
    "README.md": {
        "quickstart-cpu": quickstart,
        "kernels-summary-cpu": kernels_summary,
        "pruning-summary": pruning_summary,
        "profile-cpu": profile,
        "latency-cpu": latency,
        "scoring-cpu-summary": scoring_summary,
        "models-cpu-summary": models_summary,
    },
    "examples/README.md": {"kernel-costs-cpu": kernel_costs},
    "benchmarks/RESULTS.md": {
        "kernels-cpu": kernels,
        "bn-act-stats-cpu": bn_act_stats,
        "bars-gpu": gpu_bars,
        "kernels-gpu": gpu_kernels,
        "profile-gpu": gpu_profile,
        "pruning-criteria": pruning_criteria,
        "pruning-sets": pruning_sets,
        "pruning-oneshot": pruning_oneshot,
        "pruning-ablation": pruning_ablation,
        "step-cpu": step,
        "scoring-cpu": scoring,
        "models-cpu": models,
        "models-cpu-latency": models_latency,
        "resume-cpu": resume,
    },
}


def filled(document: str) -> str:
    """The text of a document with every table between its markers made anew."""
    text = (ROOT / document).read_text(encoding="utf-8")
    for name, make in TABLES[document].items():
        pattern = re.compile(rf"(<!-- table:{name} -->\n).*?(<!-- /table -->)", re.DOTALL)
        found = pattern.search(text)
        if not found:
            raise SystemExit(f"{document} has no marker <!-- table:{name} -->")
        text = f"{text[: found.end(1)]}{make(name)}\n{text[found.start(2) :]}"
    return text


def main() -> None:
    for document, tables in TABLES.items():
        if "--write" in sys.argv[1:]:
            (ROOT / document).write_text(filled(document), encoding="utf-8")
            continue
        for name, make in tables.items():
            print(f"{document}, {name}\n\n{make(name)}\n")


if __name__ == "__main__":
    main()
