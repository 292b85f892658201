"""What a run looks like: a table of its stages, and pictures of its steps, widths and divergences.

matplotlib and rich are imported by the functions that need them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from .compress import CompressionResult, StepRecord
from .errors import InvalidInputError
from .latency import LatencyStats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

# Okabe and Ito: told apart with every common colour blindness, and in grey by their lightness.
_BEFORE, _AFTER, _LIMIT, _SECOND = "#9AA5B1", "#0072B2", "#D55E00", "#E69F00"


@dataclass(frozen=True)
class StageSummary:
    """One row of the table: the model as a stage left it."""

    name: str
    params: int
    macs: int
    accuracy: float  # share between 0 and 1, on data that no decision of the run has seen
    latency: LatencyStats | None = None
    speedup: float | None = None  # over the first row, from rounds measured in turns

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def stage_table(
    rows: Sequence[StageSummary],
    *,
    title: str | None = None,
    caption: str | None = None,
    accuracy_name: str = "Accuracy",
) -> Table:
    """A rich table of the stages: parameters, MACs, accuracy, latency, and their changes to the first row.

    Accuracy changes are in points, and below the median latency stand its 10th and 90th percentiles.

    Raises:
        InvalidInputError: there is no row.
    """
    from rich.table import Table

    if not rows:
        raise InvalidInputError("got no stage to put into the table")
    first = rows[0]
    timed = any(row.latency is not None for row in rows)
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption=caption,
        caption_justify="left",
        show_lines=True,
    )
    table.add_column("Stage")
    for name in ("Parameters", "MACs", accuracy_name):
        table.add_column(name, justify="right", no_wrap=True)
    if timed:
        table.add_column("Latency", justify="right", no_wrap=True)
        table.add_column("Speed-up", justify="right", no_wrap=True)
    for row in rows:
        changes = ("", "", "")
        if row is not first:
            points = 100 * (row.accuracy - first.accuracy)
            changes = (_percent(row.params, first.params), _percent(row.macs, first.macs), f"\n{points:+.2f}")
        values = (f"{row.params:,}", f"{row.macs / 1e6:.2f} M", f"{row.accuracy:.2%}")
        cells = [value + change for value, change in zip(values, changes, strict=True)]
        if timed:
            stats = row.latency
            cells.append(f"{stats.median:.2f} ms\n{stats.p10:.2f}-{stats.p90:.2f}" if stats else "")
            cells.append(f"{row.speedup:.2f}x" if row.speedup is not None else "")
        table.add_row(row.name, *cells)
    return table


def layer_widths(model: nn.Module) -> dict[str, int]:
    """Output channels of every convolution and output features of every linear layer, in module order."""
    widths = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            widths[name] = module.out_features
        elif isinstance(module, nn.modules.conv._ConvNd):
            widths[name] = module.out_channels
    return widths


def mean_divergence(scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean flow divergence of the filters of every layer."""
    return {name: float(values.double().mean()) for name, values in scores.items()}


def plot_steps(result: CompressionResult, path: str | PathLike[str], *, metric_name: str = "Metric") -> None:
    """Draw size and metric over the steps of a run; steps that were undone are hollow. Writes a PNG."""
    history = result.history
    base = result.baseline
    with _figure(path, 8.6, 6.0) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        _size_line(top, history, "macs", "MACs", _AFTER, "o")
        _size_line(top, history, "params", "parameters", _SECOND, "s")
        for name, colour in (("macs", _AFTER), ("params", _SECOND)):
            if name in result.target:
                goal = 100 * result.target[name] / getattr(base, name)
                top.axhline(goal, color=colour, linewidth=1, linestyle=":")
                label = "MACs" if name == "macs" else "parameters"
                top.annotate(
                    f"target, {label}",
                    (0, goal),
                    xytext=(2, 3),
                    textcoords="offset points",
                    color=colour,
                    fontsize=8,
                )
        top.set_ylim(0, 107)
        top.set_ylabel("Left of the original (%)")
        if not all(step.accepted for step in history):
            top.plot([], [], "o", markerfacecolor="none", color="black", label="undone")
        top.legend(frameon=False, ncols=3, loc="upper right")

        kept = [(i, step.metric) for i, step in enumerate(history) if step.accepted]
        undone = [(i, step.metric) for i, step in enumerate(history) if not step.accepted]
        bottom.plot(*zip(*kept, strict=True), "-o", color="black", markersize=5)
        if undone:
            bottom.plot(*zip(*undone, strict=True), "o", markerfacecolor="none", color="black", markersize=5)
        floor = base.metric - result.budget
        bottom.axhline(floor, color=_LIMIT, linewidth=1.2, linestyle="--")
        bottom.annotate(
            f"budget: {floor:.4g}",
            (0, floor),
            xytext=(2, 4),
            textcoords="offset points",
            color=_LIMIT,
            fontsize=8,
        )
        bottom.set_ylabel(metric_name)
        bottom.margins(y=0.2)
        for axes in (top, bottom):
            _stage_bands(axes, history, label=axes is top)
        bottom.set_xticks(
            range(len(history)), [_short(step) for step in history], rotation=45, ha="right", fontsize=8
        )
        top.set_title("Size and metric over the steps", loc="left", pad=22)


def plot_widths(before: Mapping[str, int], after: Mapping[str, int], path: str | PathLike[str]) -> None:
    """Draw the width of every layer before and after; layers that are gone are marked. Writes a PNG.

    Raises:
        InvalidInputError: ``before`` is empty.
    """
    if not before:
        raise InvalidInputError("got no layer widths to draw")
    names = list(before)
    with _figure(path, 8.6, max(3.0, 0.9 + 0.3 * len(names)), grid="x") as figure:
        axes = figure.subplots()
        widest = max(before.values())
        for i, name in enumerate(names):
            axes.barh(i, before[name], height=0.78, color="#D3D8DE", label="before" if i == 0 else None)
            if name in after:
                axes.barh(i, after[name], height=0.46, color=_AFTER, label="after" if i == 0 else None)
                text = (
                    f"{before[name]} \N{RIGHTWARDS ARROW} {after[name]}"
                    if after[name] != before[name]
                    else f"{before[name]}"
                )
                colour = "black"
            else:
                text, colour = "removed", _LIMIT
            axes.text(before[name] + widest * 0.012, i, text, va="center", fontsize=8, color=colour)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, widest * 1.14)
        axes.set_xlabel("Output channels")
        axes.set_title("Width of every layer", loc="left")
        axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)


def plot_divergence(
    filters_before: Mapping[str, float],
    filters_after: Mapping[str, float],
    blocks_before: Mapping[str, float],
    blocks_after: Mapping[str, float],
    path: str | PathLike[str],
) -> None:
    """Draw flow divergence through the depth of a network before and after. Writes a PNG.

    Above: the mean over the filters of every layer (:func:`mean_divergence`), on a logarithmic axis; below:
        the
    relative change that every removable block makes (:func:`idap.layer_divergence`).

    Raises:
        InvalidInputError: ``filters_before`` is empty.
    """
    if not filters_before:
        raise InvalidInputError("got no divergences to draw")
    names = list(filters_before)
    rows = 2 if blocks_before else 1
    with _figure(path, 8.6, 3.6 * rows + 0.6) as figure:
        panels = figure.subplots(rows, 1, squeeze=False)[:, 0]
        top = panels[0]
        top.plot(
            range(len(names)),
            [filters_before[n] for n in names],
            "-o",
            color=_BEFORE,
            markersize=5,
            label="before",
        )
        left = [(i, filters_after[n]) for i, n in enumerate(names) if n in filters_after]
        top.plot(*zip(*left, strict=True), "-s", color=_AFTER, markersize=4.5, label="after")
        _mark_gone(top, [i for i, n in enumerate(names) if n not in filters_after])
        top.set_yscale("log")
        top.set_ylabel("Mean flow divergence\nof the filters")
        top.set_xticks(range(len(names)), names, rotation=55, ha="right", fontsize=8)
        top.set_title("Flow divergence through the depth", loc="left")
        top.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)
        if rows == 2:
            bottom = panels[1]
            blocks = list(blocks_before)
            for i, name in enumerate(blocks):
                bottom.bar(
                    i - 0.2, blocks_before[name], 0.38, color=_BEFORE, label="before" if i == 0 else None
                )
                if name in blocks_after:
                    bottom.bar(i + 0.2, blocks_after[name], 0.38, color=_AFTER)
            _mark_gone(bottom, [i for i, n in enumerate(blocks) if n not in blocks_after], offset=0.2)
            bottom.set_ylabel("Relative change by the block\n" r"$\|T_{l+1}-T_l\| \,/\, \|T_l\|$")
            bottom.set_xticks(range(len(blocks)), blocks, rotation=0 if len(blocks) < 9 else 55, fontsize=8)
            bottom.set_ylim(bottom=0)


@contextmanager
def _figure(
    path: str | PathLike[str], width: float, height: float, *, grid: Literal["both", "x", "y"] = "both"
) -> Iterator[Figure]:
    """A figure on the Agg canvas, saved to ``path`` at the end; pyplot and global settings stay untouched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis=grid, color="#E5E5E5", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=150, format="png")


def _size_line(
    axes: Axes, history: Sequence[StepRecord], name: str, label: str, colour: str, marker: str
) -> None:
    full = getattr(history[0], name)
    kept = [(i, 100 * getattr(step, name) / full) for i, step in enumerate(history) if step.accepted]
    undone = [(i, 100 * getattr(step, name) / full) for i, step in enumerate(history) if not step.accepted]
    axes.plot(*zip(*kept, strict=True), "-" + marker, color=colour, markersize=5, label=label)
    if undone:
        axes.plot(*zip(*undone, strict=True), marker, color=colour, markerfacecolor="none", markersize=5)


def _stage_bands(axes: Axes, history: Sequence[StepRecord], *, label: bool) -> None:
    """Shade every other run of steps of one stage, and name the stages above the upper axes."""
    axes.set_xlim(-0.5, len(history) - 0.5)
    start, shaded = 0, False
    for i in range(1, len(history) + 1):
        if i < len(history) and history[i].stage == history[start].stage:
            continue
        if shaded:
            axes.axvspan(start - 0.5, i - 0.5, color="#F2F4F7", zorder=0, linewidth=0)
        if label:
            axes.annotate(
                history[start].stage,
                ((start + i - 1) / 2, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color="#444444",
            )
        start, shaded = i, not shaded


def _mark_gone(axes: Axes, positions: Sequence[int], offset: float = 0.0) -> None:
    for k, i in enumerate(positions):
        axes.plot(
            i + offset,
            0.03,
            marker="x",
            color=_LIMIT,
            markersize=7,
            markeredgewidth=2,
            linestyle="none",
            transform=axes.get_xaxis_transform(),
            label="removed" if k == 0 else None,
            clip_on=False,
        )


def _short(step: StepRecord) -> str:
    return step.action.split(" (")[0]


def _percent(value: float, full: float) -> str:
    return f"\n{100 * (value / full - 1):+.0f}%" if full else ""
