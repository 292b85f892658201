"""Pictures of a run: its steps, the widths of its layers, the divergence through its depth.

matplotlib is imported by the functions that need it, and only its Agg canvas is used.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from .compress import StepRecord
from .errors import InvalidInputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Destination: TypeAlias = "str | PathLike[str] | IO[bytes]"

# More layers than this, and the widths stand side by side instead of one below the other.
_ROWS = 40
_INCHES = 8.6
_LABELS = 30  # tick labels side by side, at most
_SECTIONS = 24  # named parts of a network with more layers than that


@dataclass(frozen=True)
class Theme:
    """Colours; those of the series (Okabe and Ito's) are told apart with every common colour blindness."""

    text: str
    paper: str
    grid: str
    band: str
    bar: str
    before: str
    after: str
    second: str
    third: str
    limit: str


LIGHT = Theme(
    text="#1F2933",
    paper="#FFFFFF",
    grid="#E5E5E5",
    band="#F2F4F7",
    bar="#D3D8DE",
    before="#9AA5B1",
    after="#0072B2",
    second="#E69F00",
    third="#009E73",
    limit="#D55E00",
)
DARK = Theme(
    text="#D8DEE6",
    paper="#14181D",
    grid="#2B323A",
    band="#1C2229",
    bar="#3B444E",
    before="#7F8B97",
    after="#4AA8E0",
    second="#F4C95D",
    third="#2FC79A",
    limit="#F0803C",
)


@dataclass(frozen=True)
class Spot:
    """A part of a picture and what it shows; edges as shares of width and height, from the top left."""

    left: float
    top: float
    width: float
    height: float
    text: str


class Run(Protocol):
    """What :func:`plot_steps` reads of a run; a :class:`CompressionResult` has it."""

    @property
    def history(self) -> tuple[StepRecord, ...]: ...

    @property
    def budget(self) -> float: ...

    @property
    def target(self) -> Mapping[str, float]: ...


SIZES = {"macs": "MACs", "params": "parameters", "latency": "latency"}


def plot_steps(
    result: Run, path: Destination, *, metric_name: str = "Metric", dark: bool = False
) -> list[Spot]:
    """Draw size, metric and drift over the steps of a run; steps that were undone are hollow. Writes a PNG.

    Args:
        path: a file name, or a binary file to write into.
        dark: light lines on a dark ground.

    Returns:
        Where each step is in the picture, and its figures.

    Raises:
        InvalidInputError: the run has no step.
    """
    history = result.history
    if not history:
        raise InvalidInputError("got a run without a step to draw")
    base = history[0]
    with _picture(path, 7.4, dark=dark) as picture:
        theme = picture.theme
        size, metric, drift = picture.figure.subplots(3, 1, sharex=True, height_ratios=(6, 4, 3))
        styles = {"macs": (theme.after, "o"), "params": (theme.second, "s"), "latency": (theme.third, "^")}
        goals: dict[str, float] = {}
        for name, label in SIZES.items():
            full = getattr(base, name)
            if not full:
                continue
            shares = [100 * (getattr(step, name) or math.nan) / full for step in history]
            colour, marker = styles[name]
            _line(size, history, shares, colour, marker, label)
            if name in result.target:
                goals[name] = 100 * result.target[name] / full
        for level, names in _joined(goals).items():
            colour = styles[names[0]][0] if len(names) == 1 else theme.text
            size.axhline(level, color=colour, linewidth=1, linestyle=":")
            label = "target, " + " and ".join(SIZES[name] for name in names)
            _note(size, label, (0, level), colour)
        if not all(step.accepted for step in history):
            size.plot([], [], "o", markerfacecolor="none", color=theme.text, label="undone")
        size.set_ylim(0, 122)
        size.set_yticks(range(0, 101, 20))
        size.set_ylabel("Left of the original (%)")
        size.legend(frameon=False, ncols=4, loc="upper right", labelcolor=theme.text, borderaxespad=0.1)

        _line(metric, history, [step.metric for step in history], theme.text, "o")
        floor = base.metric - result.budget
        metric.axhline(floor, color=theme.limit, linewidth=1.2, linestyle="--")
        _note(metric, f"budget: {floor:.4g}", (0, floor), theme.limit)
        metric.set_ylabel(metric_name, parse_math=False)
        metric.margins(y=0.2)

        _line(drift, history, [step.drift for step in history], theme.text, "o")
        drift.set_ylabel("Drift")
        drift.margins(y=0.2)
        drift.set_ylim(bottom=0)

        for axes in (size, metric, drift):
            _stage_bands(axes, history, theme, label=axes is size)
        _ticks(drift, [_short(step) for step in history], rotation=45)
        size.set_title("Size, metric and drift over the steps", loc="left", pad=34)
        for i, step in enumerate(history):
            picture.hover((size, drift), i - 0.5, i + 0.5, _describe(i, step, base))
    return picture.spots


def plot_widths(
    before: Mapping[str, int], after: Mapping[str, int], path: Destination, *, dark: bool = False
) -> list[Spot]:
    """Draw the width of every layer before and after; layers that are gone are marked. Writes a PNG.

    Up to 40 layers stand one below the other with their figures; more stand side by side.

    Args:
        path: a file name, or a binary file to write into.
        dark: light bars on a dark ground.

    Returns:
        Where each layer is in the picture, and its widths.

    Raises:
        InvalidInputError: ``before`` is empty.
    """
    if not before:
        raise InvalidInputError("got no layer widths to draw")
    names = list(before)
    texts = {name: _change(before[name], after.get(name)) for name in names}
    if len(names) > _ROWS:
        return _plot_many_widths(before, after, texts, path, dark)
    with _picture(path, max(3.0, 0.9 + 0.3 * len(names)), grid="x", dark=dark) as picture:
        theme = picture.theme
        axes = picture.figure.subplots()
        widest = max(before.values())
        for i, name in enumerate(names):
            axes.barh(i, before[name], height=0.78, color=theme.bar, label="before" if i == 0 else None)
            left = after.get(name)
            if left is not None:
                axes.barh(i, left, height=0.46, color=theme.after, label="after" if i == 0 else None)
            colour = theme.limit if left is None else theme.text
            axes.text(before[name] + widest * 0.012, i, texts[name], va="center", fontsize=8, color=colour)
        axes.set_yticks(range(len(names)), [_fit(n, 44) for n in names], fontsize=8, parse_math=False)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, widest * 1.14)
        axes.set_xlabel("Output channels")
        axes.set_title("Width of every layer", loc="left")
        _legend_above(axes, theme)
        for i, name in enumerate(names):
            picture.hover_row(axes, i - 0.5, i + 0.5, f"{name}: {texts[name]}")
    return picture.spots


def _plot_many_widths(
    before: Mapping[str, int],
    after: Mapping[str, int],
    texts: Mapping[str, str],
    path: Destination,
    dark: bool,
) -> list[Spot]:
    names = list(before)
    with _picture(path, 4.4, grid="y", dark=dark) as picture:
        theme = picture.theme
        axes = picture.figure.subplots()
        places = range(len(names))
        _depth_axis(axes, names, theme)
        axes.bar(places, [before[n] for n in names], width=1.0, color=theme.bar, label="before")
        left = [(i, after[n]) for i, n in enumerate(names) if n in after]
        if left:
            where, widths = zip(*left, strict=True)
            axes.bar(where, widths, width=0.62, color=theme.after, label="after")
        _mark_gone(axes, [i for i, n in enumerate(names) if n not in after], theme)
        axes.set_ylabel("Output channels")
        axes.set_title(f"Width of the {len(names)} layers", loc="left")
        _legend_above(axes, theme)
        for i, name in enumerate(names):
            picture.hover((axes, axes), i - 0.5, i + 0.5, f"{name}: {texts[name]}")
    return picture.spots


def plot_divergence(
    filters_before: Mapping[str, float],
    filters_after: Mapping[str, float],
    blocks_before: Mapping[str, float],
    blocks_after: Mapping[str, float],
    path: Destination,
    *,
    dark: bool = False,
) -> list[Spot]:
    """Draw flow divergence through the depth of a network before and after. Writes a PNG.

    Above: the mean over the filters of every layer (:func:`mean_divergence`), on a logarithmic axis; below:
    the relative change that every removable block makes (:func:`idap.layer_divergence`). Without filters or
    without blocks there is only the other panel.

    Args:
        path: a file name, or a binary file to write into.
        dark: light lines on a dark ground.

    Returns:
        Where each layer and block is in the picture, and its divergences.

    Raises:
        InvalidInputError: there are neither filters nor blocks.
    """
    panels = [name for name, values in (("filters", filters_before), ("blocks", blocks_before)) if values]
    if not panels:
        raise InvalidInputError("got no divergences to draw")
    with _picture(path, 3.6 * len(panels) + 0.6, dark=dark) as picture:
        theme = picture.theme
        drawn = dict(zip(panels, picture.figure.subplots(len(panels), 1, squeeze=False)[:, 0], strict=True))
        if filters_before:
            axes = drawn["filters"]
            names = list(filters_before)
            many = len(names) > _LABELS
            _depth_axis(axes, names, theme)
            for means, marker, colour, label in (
                (filters_before, "o", theme.before, "before"),
                (filters_after, "s", theme.after, "after"),
            ):
                # A logarithmic axis has no place for a layer that is silent.
                points = [(i, means[n]) for i, n in enumerate(names) if means.get(n)]
                if points:
                    size = 2.5 if many else 5.0
                    style = {"linewidth": 1.0 if many else 1.5, "markersize": size, "label": label}
                    axes.plot(*zip(*points, strict=True), "-" + marker, color=colour, **style)
            if filters_after:
                _mark_gone(axes, [i for i, n in enumerate(names) if n not in filters_after], theme)
            axes.set_yscale("log")
            axes.set_ylabel("Mean flow divergence\nof the filters")
            _hover_values(picture, axes, names, filters_before, filters_after)
        if blocks_before:
            axes = drawn["blocks"]
            names = list(blocks_before)
            _depth_axis(axes, names, theme)
            places = range(len(names))
            heights = [blocks_before[n] for n in names]
            axes.bar([i - 0.2 for i in places], heights, 0.38, color=theme.before, label="before")
            left = [(i + 0.2, blocks_after[n]) for i, n in enumerate(names) if n in blocks_after]
            if left:
                where, values = zip(*left, strict=True)
                axes.bar(where, values, 0.38, color=theme.after, label="after")
                gone = [i for i, n in enumerate(names) if n not in blocks_after]
                _mark_gone(axes, gone, theme, offset=0.2)
            axes.set_ylabel("Relative change by the block\n" r"$\|T_{l+1}-T_l\| \,/\, \|T_l\|$")
            axes.set_ylim(bottom=0)
            _hover_values(picture, axes, names, blocks_before, blocks_after)
        top = drawn[panels[0]]
        top.set_title("Flow divergence through the depth", loc="left")
        _legend_above(top, theme)
    return picture.spots


# ------------------------------------------------------------------------------------ pictures


class _Picture:
    def __init__(self, figure: Figure, theme: Theme) -> None:
        self.figure, self.theme = figure, theme
        self.spots: list[Spot] = []
        self._columns: list[tuple[Axes, Axes, float, float, str]] = []
        self._rows: list[tuple[Axes, float, float, str]] = []

    def hover(self, axes: tuple[Axes, Axes], left: float, right: float, text: str) -> None:
        """A column from the top of the first axes to the bottom of the last; edges in their x."""
        self._columns.append((*axes, left, right, text))

    def hover_row(self, axes: Axes, top: float, bottom: float, text: str) -> None:
        self._rows.append((axes, top, bottom, text))

    def place(self) -> None:
        """Turn data into shares of the picture, once everything has its place."""
        width, height = self.figure.bbox.width, self.figure.bbox.height
        for first, last, left, right, text in self._columns:
            x0, x1 = (first.transData.transform((x, first.get_ylim()[1]))[0] / width for x in (left, right))
            top, bottom = 1 - first.bbox.y1 / height, 1 - last.bbox.y0 / height
            self.spots.append(Spot(x0, top, x1 - x0, bottom - top, text))
        for axes, upper, lower, text in self._rows:
            y0, y1 = (1 - axes.transData.transform((0, y))[1] / height for y in (upper, lower))
            self.spots.append(Spot(0.0, y0, axes.bbox.x1 / width, y1 - y0, text))


@contextmanager
def _picture(
    path: Destination, height: float, *, grid: Literal["both", "x", "y"] = "both", dark: bool = False
) -> Iterator[_Picture]:
    """A picture on the Agg canvas, written to ``path`` at the end; pyplot and its settings stay untouched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    theme = DARK if dark else LIGHT
    figure = Figure(figsize=(_INCHES, height), dpi=150, layout="constrained", facecolor=theme.paper)
    FigureCanvasAgg(figure)
    picture = _Picture(figure, theme)
    yield picture
    for axes in figure.axes:
        axes.set_facecolor(theme.paper)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(theme.text)
        axes.tick_params(which="both", colors=theme.text)
        for label in (axes.xaxis.label, axes.yaxis.label, axes.title, axes._left_title):  # type: ignore[attr-defined]
            label.set_color(theme.text)
        axes.grid(axis=grid, color=theme.grid, linewidth=0.6)
        axes.set_axisbelow(True)
    with warnings.catch_warnings():
        # Names may hold characters that the font lacks.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        figure.savefig(path, format="png")
    picture.place()


def _line(
    axes: Axes,
    history: Sequence[StepRecord],
    values: Sequence[float],
    colour: str,
    marker: str,
    label: str | None = None,
) -> None:
    kept = [(i, value) for i, value in enumerate(values) if history[i].accepted]
    undone = [(i, value) for i, value in enumerate(values) if not history[i].accepted]
    if kept:
        axes.plot(*zip(*kept, strict=True), "-" + marker, color=colour, markersize=5, label=label)
    if undone:
        axes.plot(*zip(*undone, strict=True), marker, color=colour, markerfacecolor="none", markersize=5)


def _joined(goals: Mapping[str, float]) -> dict[float, list[str]]:
    """Goals by their level; those too near to each other for two labels share one."""
    levels: dict[float, list[str]] = {}
    for name, goal in goals.items():
        near = next((level for level in levels if abs(level - goal) < 0.5), goal)
        levels.setdefault(near, []).append(name)
    return levels


def _note(axes: Axes, text: str, place: tuple[float, float], colour: str) -> None:
    axes.annotate(
        text,
        (-0.45, place[1]),
        xytext=(2, 3),
        textcoords="offset points",
        color=colour,
        fontsize=8,
        parse_math=False,
    )


def _stage_bands(axes: Axes, history: Sequence[StepRecord], theme: Theme, *, label: bool) -> None:
    """Shade every other run of steps of one stage, and name the stages above the upper axes."""
    axes.set_xlim(-0.5, len(history) - 0.5)
    inch = len(history) / (0.88 * _INCHES)  # one, in steps
    ends = [-math.inf, -math.inf]  # of the names so far, in two rows
    for k, (stage, start, stop) in enumerate(_runs([step.stage for step in history])):
        if k % 2:
            axes.axvspan(start - 0.5, stop - 0.5, color=theme.band, zorder=0, linewidth=0)
        if not label:
            continue
        middle, half = (start + stop - 1) / 2, 0.04 * len(stage) * inch
        row = next((i for i in (0, 1) if ends[i] <= middle - half), None)
        if row is None:
            continue
        ends[row] = middle + half
        axes.annotate(
            _fit(stage, 30),
            (middle, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4 + 12 * row),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=theme.text,
            parse_math=False,
        )


def _depth_axis(axes: Axes, names: Sequence[str], theme: Theme) -> None:
    """The layers along x: by name, or, where they are too many, by the parts of the network they are in."""
    axes.set_xlim(-0.6, len(names) - 0.4)
    if len(names) <= _LABELS:
        _ticks(axes, names, rotation=55 if len(names) > 8 or max(map(len, names)) > 8 else 0)
        return
    sections = _sections(names)
    if sections is None:
        _ticks(axes, names, rotation=55)
        return
    for k, (_, start, stop) in enumerate(sections):
        if k % 2:
            axes.axvspan(start - 0.5, stop - 0.5, color=theme.band, zorder=0, linewidth=0)
    # Small parts give way to large ones where their names would run into each other.
    gap = 0.17 * len(names) / (0.88 * _INCHES)
    chosen: list[tuple[float, str]] = []
    for name, start, stop in sorted(sections, key=lambda section: section[1] - section[2]):
        middle = (start + stop - 1) / 2
        if all(abs(middle - other) >= gap for other, _ in chosen):
            chosen.append((middle, name))
    chosen.sort()
    axes.set_xticks(
        [place for place, _ in chosen],
        [_fit(name, 30) for _, name in chosen],
        rotation=55,
        ha="right",
        rotation_mode="anchor",
        fontsize=8,
        parse_math=False,
    )


def _sections(names: Sequence[str]) -> list[tuple[str, int, int]] | None:
    """The most parts of a network, by the beginnings of its layers' names, that can be named on one axis."""
    best = None
    parts = [name.split(".") for name in names]
    for depth in range(1, max(map(len, parts)) + 1):
        runs = _runs([".".join(p[:depth]) for p in parts])
        if len(runs) > _SECTIONS:
            break
        best = runs
    return best if best is not None and len(best) > 1 else None


def _runs(keys: Sequence[str]) -> list[tuple[str, int, int]]:
    """Neighbours that are equal, with where they begin and where the next begin."""
    runs: list[tuple[str, int, int]] = []
    for i, key in enumerate(keys):
        if runs and runs[-1][0] == key:
            runs[-1] = (key, runs[-1][1], i + 1)
        else:
            runs.append((key, i, i + 1))
    return runs


def _ticks(axes: Axes, labels: Sequence[str], *, rotation: int) -> None:
    step = math.ceil(len(labels) / _LABELS)
    places = range(0, len(labels), step)
    style: dict[str, Any] = {"ha": "right", "rotation_mode": "anchor"} if rotation else {}
    axes.set_xticks(
        places,
        [_fit(labels[i], 30) for i in places],
        rotation=rotation,
        fontsize=8,
        parse_math=False,
        **style,
    )


def _mark_gone(axes: Axes, positions: Sequence[int], theme: Theme, offset: float = 0.0) -> None:
    if positions:
        axes.plot(
            [i + offset for i in positions],
            [0.03] * len(positions),
            marker="x",
            color=theme.limit,
            markersize=5 if len(positions) > 12 else 7,
            markeredgewidth=2,
            linestyle="none",
            transform=axes.get_xaxis_transform(),
            label="removed",
            clip_on=False,
        )


def _legend_above(axes: Axes, theme: Theme) -> None:
    axes.legend(
        frameon=False,
        ncols=3,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        borderaxespad=0.2,
        labelcolor=theme.text,
    )


# --------------------------------------------------------------------------------------- texts


def _hover_values(
    picture: _Picture,
    axes: Axes,
    names: Sequence[str],
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> None:
    for i, name in enumerate(names):
        then = f"after {after[name]:.4g}" if name in after else "removed" if after else ""
        text = f"{name}: before {before[name]:.4g}{', ' if then else ''}{then}"
        picture.hover((axes, axes), i - 0.5, i + 0.5, text)


def _describe(number: int, step: StepRecord, base: StepRecord) -> str:
    lines = [
        f"{number}. {step.stage}: {step.action}, {'kept' if step.accepted else 'undone'}",
        f"MACs {step.macs:,} ({step.macs / base.macs:.1%})" if base.macs else f"MACs {step.macs:,}",
        f"parameters {step.params:,} ({step.params / base.params:.1%})"
        if base.params
        else f"parameters {step.params:,}",
        f"metric {step.metric:.4f}, drift {step.drift:.3g}",
    ]
    latency = getattr(step, "latency", None)
    return "\n".join(
        [*lines, *([f"latency {latency:.3f} ms"] if latency else []), *filter(None, [step.note])]
    )


def _change(before: int, after: int | None) -> str:
    if after is None:
        return "removed"
    return f"{before} \N{RIGHTWARDS ARROW} {after}" if after != before else f"{before}"


def _fit(name: str, most: int) -> str:
    """A name with its middle left out if it is long: both ends tell layers apart."""
    # Fonts cannot set lone surrogates and control characters.
    name = "".join(char if char.isprintable() else "?" for char in name)
    if len(name) <= most:
        return name
    head = most // 3
    return f"{name[:head]}\N{HORIZONTAL ELLIPSIS}{name[len(name) - (most - head - 1) :]}"


def _short(step: StepRecord) -> str:
    return step.action.split(" (")[0]
