"""The README's tables, made from the committed results.

python benchmarks/tables.py            prints them
python benchmarks/tables.py --write    writes them into README.md, between their markers
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


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
        shape, layout, dtype = row["case"].rsplit("-", 2)
        label = f"{shape.replace('x', '×')} {layout.replace('_', '-')} {dtype}"
        speed = row["speedup"]
        lines.append(
            f"| {label} | {row['times']['idap']['median_us'] / 1e3:.2f} ms | {row['gb_per_s']:.1f} | "
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


def profile(name: str) -> str:
    result = load(name)
    rows = {
        "forward": "forward pass alone",
        "profile": f"with all {result['layers']} convolutions profiled",
        "profile_with_blocks": "with convolutions and removable blocks profiled",
        "eager_hooks": "with the same statistics from eager hooks",
    }
    lines = [
        "| ResNet-50, batch " + str(result["batch"]) + " | time (p10–p90) | over the forward pass |",
        "|---|--:|--:|",
    ]
    for key, label in rows.items():
        extra = result["overhead"].get(key)
        t = result["times"][key]
        lines.append(
            f"| {label} | {t['median_us'] / 1e3:.0f} ms ({t['p10_us'] / 1e3:.0f}–{t['p90_us'] / 1e3:.0f}) | "
            f"{'' if extra is None else f'{100 * extra:+.1f} %'} |"
        )
    lines += [
        "",
        "One batch; over the forward pass: the median of the rounds' ratios. The machine's own spread (p10–p90 in "
        "brackets) is larger than the cost of the convolutions' statistics. Blocks cost most in their first batch, "
        "whose inputs are copied to see which blocks write into theirs.",
    ]
    return "\n".join(lines)


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


TABLES = {
    "quickstart-cpu": quickstart,
    "kernels-cpu": kernels,
    "profile-cpu": profile,
    "latency-cpu": latency,
}


def filled(text: str) -> str:
    """The text with every table between its markers made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- table:{name} -->\n).*?(<!-- /table -->)", re.DOTALL)
        found = pattern.search(text)
        if not found:
            raise SystemExit(f"README.md has no marker <!-- table:{name} -->")
        text = f"{text[: found.end(1)]}{make(name)}\n{text[found.start(2) :]}"
    return text


def main() -> None:
    if "--write" in sys.argv[1:]:
        path = ROOT / "README.md"
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        for name, make in TABLES.items():
            print(f"{name}\n\n{make(name)}\n")


if __name__ == "__main__":
    main()
