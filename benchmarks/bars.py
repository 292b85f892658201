"""What the GPU kernels are held to, and what was measured: a pure function of the result files.

python benchmarks/bars.py FOLDER [FOLDER ...]

Of several folders, as when the suite ran in parts, the ops are joined; of any other file the last one counts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean as _geometric_mean
from typing import Any

NOT_MEASURED = "not measured yet"
Results = dict[str, dict[str, Any]]  # "kernels", "counters", "profile": what the benchmarks wrote
Measure = Callable[[Results], float | str | None]
_UNITS = {"": "", "×": "×", "us": " µs"}


@dataclass(frozen=True)
class Bar:
    """A target, and how a figure is read from the results; ``None`` or a reason in words where there is none."""

    text: str
    comparison: str  # ≥ | ≤ | <
    target: float
    unit: str  # % | × | us | ""
    measure: Measure
    worst: Measure | None = None  # given in brackets

    def format(self, value: float) -> str:
        return f"{100 * value:.1f} %" if self.unit == "%" else f"{value:.2f}{_UNITS[self.unit]}"

    @property
    def wanted(self) -> str:
        figure = f"{100 * self.target:g} %" if self.unit == "%" else f"{self.target:g}{_UNITS[self.unit]}"
        return f"{self.comparison} {figure}"

    def met(self, value: float) -> bool:
        if self.comparison == "<":
            return value < self.target
        return value >= self.target if self.comparison == "≥" else value <= self.target


def _rows(results: Results, op: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = results.get("kernels", {}).get("ops", {}).get(op, [])
    return rows


def geometric_mean(values: list[float]) -> float:
    return _geometric_mean(values)


def least(values: list[float]) -> float:
    return min(values)


def _share(smallest: float, largest: float) -> Measure:
    """The smallest share of the ceiling among the maps of these sizes."""

    def measure(results: Results) -> float | None:
        rows = [r for r in _rows(results, "channel_stats") if smallest <= r["bytes"] <= largest]
        return min((r["share_of_ceiling"] for r in rows), default=None)

    return measure


def _read(results: Results) -> float | str | None:
    """The most bytes read, over those of the map, of any kernel in CUDA C++."""
    counters = results.get("counters")
    if counters is None:
        return None
    rows = [row["read_over_map"] for row in counters["rows"] if row["backend"] == "cuda"]
    return max(rows) if rows else str(counters["status"])


def _ratio(op: str, peer: str, of: Callable[[list[float]], float]) -> Measure:
    """The peer's time over ours; of Triton ours over its time, as far as ours are the kernels in CUDA C++."""

    def measure(results: Results) -> float | str | None:
        ratios = [row["speedup"][peer] for row in _rows(results, op) if peer in row["speedup"]]
        if not ratios:
            return None
        if peer == "triton":
            missing = results["kernels"]["environment"]["backends"]["cuda"]
            if missing is not None:
                return f"no kernels in CUDA C++ beside it: {missing}"
            ratios = [1 / ratio for ratio in ratios]
        return of(ratios)

    return measure


def _launch(results: Results) -> float | None:
    launch = results.get("kernels", {}).get("launch")
    return launch and float(launch["host_us"]["channel_stats"]["median_us"])


def _overhead(what: str) -> Measure:
    return lambda results: results.get("profile", {}).get("overhead", {}).get(what)


def _bars() -> list[Bar]:
    statistics, fused = ("channel_stats", "pair_stats"), ("bn_act_stats",)
    every = (*statistics, *fused, "filter_norms")
    large, small = _share(64e6, float("inf")), _share(7.5e6, 8.5e6)
    bars = [
        Bar("maps of 64 MB and more, share of a copy's rate, worst", "≥", 0.9, "%", large),
        Bar("maps of 8 MB, share of a copy's rate, worst", "≥", 0.6, "%", small),
        Bar("bytes read from memory over the map's, by the hardware counter, worst", "≤", 1.05, "", _read),
    ]
    for op, peer, name, target, of in (
        *((op, "eager", "eager PyTorch", 8, geometric_mean) for op in statistics),
        ("channel_stats", "released", "the released expression", 3, geometric_mean),
        *((op, "compile", "torch.compile", 1.2, geometric_mean) for op in statistics + fused),
        *((op, "compile", "torch.compile", 1.0, least) for op in statistics + fused),
        *((op, "triton", "", 0.9, geometric_mean) for op in every),
    ):
        label = f"{op} against {name}" if name else f"Triton's {op} against CUDA's"
        which = "worst" if of is least else "geometric mean"
        worst = None if of is least else _ratio(op, peer, least)
        bars.append(Bar(f"{label}, {which}", "≥", target, "×", _ratio(op, peer, of), worst))
    return [
        *bars,
        Bar("host's time for a call on a small map", "≤", 10, "us", _launch),
        Bar("profile of ResNet-50, float32, over the forward pass", "≤", 0.05, "%", _overhead("profile")),
        Bar("the same with bn_act_stats, over the forward pass", "<", 0.0, "%", _overhead("profile_fused")),
    ]


BARS = _bars()


def evaluate(results: Results) -> list[dict[str, str]]:
    """Every bar with its target, what was measured, and ``met``, ``missed`` or ``not measured``, each in words."""
    table = []
    for bar in BARS:
        value = bar.measure(results)
        if isinstance(value, float):
            measured, verdict = bar.format(value), "met" if bar.met(value) else "missed"
            worst = bar.worst and bar.worst(results)
            if isinstance(worst, float):
                measured += f" (worst {bar.format(worst)})"
        else:
            measured, verdict = value or NOT_MEASURED, "not measured"
        table.append({"bar": bar.text, "target": bar.wanted, "measured": measured, "verdict": verdict})
    return table


def load(folders: Sequence[str | Path]) -> Results:
    """The result files of the folders: ``kernels*.json``, whose ops are joined, ``counters.json``, ``profile.json``.

    Raises:
        ValueError: they are of different GPUs or commits.
    """
    results: Results = {}
    origins: set[tuple[Any, Any]] = set()

    def read(path: Path) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        origins.add((data["environment"].get("gpu"), data["environment"].get("commit")))
        return data

    for folder in map(Path, folders):
        for path in sorted(folder.glob("kernels*.json")):
            part = read(path)
            known = results.setdefault("kernels", {**part, "ops": {}})
            known["ops"].update(part["ops"])
            if "launch" in part:
                known["launch"] = part["launch"]
        for name in ("counters", "profile"):
            if (folder / f"{name}.json").is_file():
                results[name] = read(folder / f"{name}.json")
    if len(origins) > 1:
        found = "; ".join(f"{gpu} at {commit}" for gpu, commit in sorted(origins, key=str))
        raise ValueError(f"the results are not of one GPU and one commit: {found}")
    return results


def text(table: list[dict[str, str]]) -> str:
    """The table for a terminal."""
    width = max(len(row["bar"]) for row in table)
    return "\n".join(
        f"{row['bar']:{width}s}  {row['target']:>9s}  {row['measured']:>9s}  {row['verdict']}"
        for row in table
    )


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    print(text(evaluate(load(sys.argv[1:]))))
