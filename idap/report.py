"""What a run looks like: a table of its stages, a web page, and scalars for TensorBoard.

matplotlib, rich and tensorboard are imported by the functions that need them.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import rundir
from .compress import StepRecord
from .criteria import out_width
from .errors import ArtifactError, InvalidInputError
from .groups import Skipped
from .latency import LatencyStats
from .plan import BlockRemoval, BlockStep, PruningPlan
from .plots import SIZES, Spot, plot_divergence, plot_steps, plot_widths
from .profile import is_scored

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "RunData",
    "StageSummary",
    "TensorBoardLog",
    "layer_widths",
    "mean_divergence",
    "plot_divergence",
    "plot_steps",
    "plot_widths",
    "read_run",
    "stage_table",
    "write_report",
]

PAGE, TABLE = "index.html", "table.json"


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
        values = (f"{row.params:,}", format_macs(row.macs), f"{row.accuracy:.2%}")
        cells = [value + change for value, change in zip(values, changes, strict=True)]
        if timed:
            stats = row.latency
            cells.append(f"{stats.median:.2f} ms\n{stats.p10:.2f}-{stats.p90:.2f}" if stats else "")
            cells.append(f"{row.speedup:.2f}x" if row.speedup is not None else "")
        table.add_row(row.name, *cells)
    return table


def format_macs(macs: float) -> str:
    """Multiply-accumulates for people: ``"11.43 M"``, ``"4.09 G"``."""
    return f"{macs / 1e9:,.2f} G" if macs >= 1e9 else f"{macs / 1e6:,.2f} M"


def layer_widths(model: nn.Module) -> dict[str, int]:
    """Output channels of every convolution and output features of every linear layer, in module order."""
    widths = {}
    for name, module in model.named_modules():
        if is_scored(module):
            widths[name] = out_width(module)
    return widths


def mean_divergence(scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean flow divergence of the filters of every layer."""
    return {name: float(values.double().mean()) for name, values in scores.items()}


# ------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class RunData:
    """What the directory of a run says about it; of a run that is not over, as far as it got."""

    directory: Path
    settings: dict[str, Any]
    versions: dict[str, str]
    history: tuple[StepRecord, ...]
    plan: PruningPlan
    budget: float
    target: dict[str, float]  # counts and milliseconds
    finished: bool
    reached_target: bool = False
    stopped: dict[str, str] = field(default_factory=dict)
    widths: tuple[dict[str, int], dict[str, int]] = ({}, {})  # before and after
    filters: tuple[dict[str, float], dict[str, float]] = ({}, {})
    blocks: tuple[dict[str, float], dict[str, float]] = ({}, {})
    latency: tuple[LatencyStats, LatencyStats, float] | None = None  # before, after, speed-up
    seconds: float = 0.0
    tested: tuple[StageSummary, StageSummary] | None = None  # before and after, on data that no decision read
    metric: str = ""  # "accuracy", or the function that stood for it; empty if not known

    @property
    def baseline(self) -> StepRecord | None:
        """The record of the original; None if the run did not get that far."""
        return self.history[0] if self.history else None

    @property
    def current(self) -> StepRecord | None:
        """The last step that was kept."""
        return next((step for step in reversed(self.history) if step.accepted), None)


def read_run(directory: str | PathLike[str]) -> RunData:
    """Read the directory of a run, finished or not; neither model nor data is needed.

    Raises:
        InvalidInputError: ``directory`` is none.
        ArtifactError: it holds no run, or its files are damaged or of another version.
    """
    source = Path(directory)
    if not source.is_dir():
        raise InvalidInputError(f"{source}: no such directory; give the directory of a run")
    description = rundir.read_description(source)
    file = source / rundir.RESULT
    finished = file.exists()
    if finished:
        result = _read_json(file)
        described = {key: result.get(key) or description.get(key) or {} for key in ("settings", "versions")}
        run = _understood(file, lambda: _from_result(source, result, described))
        table = source / TABLE
        return _understood(table, lambda: _with_table(run, _read_json(table))) if table.exists() else run
    events = rundir.read_events(source)
    return _understood(source / rundir.JOURNAL, lambda: _from_events(source, description, events))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file}: damaged ({error})") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{file}: damaged, it holds no JSON object")
    return data


def _understood(file: Path, read: Callable[[], RunData]) -> RunData:
    try:
        return read()
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        # InvalidInputError is a ValueError: a plan or a step that cannot be read.
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ArtifactError(f"{file}: damaged ({reason})") from error


def _from_result(source: Path, result: dict[str, Any], described: dict[str, Any]) -> RunData:
    latency = None
    if result.get("latency"):
        before, after = (LatencyStats(**result["latency"][when]) for when in ("before", "after"))
        latency = (before, after, float(result["latency"]["speedup"]))

    def pair(data: Any, kind: Callable[[Any], Any]) -> Any:
        return tuple(
            {str(name): kind(value) for name, value in data[when].items() if value is not None}
            for when in ("before", "after")
        )

    history = _history(result["history"])
    if not history:
        raise ValueError("its history is empty")
    return RunData(
        directory=source,
        settings=dict(described["settings"]),
        versions=dict(described["versions"]),
        history=history,
        plan=PruningPlan.from_dict(result["plan"]),
        budget=float(result["budget"]),
        target={name: float(value) for name, value in result["target"].items()},
        finished=True,
        reached_target=bool(result["reached_target"]),
        stopped={str(stage): str(reason) for stage, reason in result["stopped"].items()},
        widths=pair(result["widths"], int),
        filters=pair(result["divergence"]["filters"], float),
        blocks=pair(result["divergence"]["blocks"], float),
        latency=latency,
        seconds=float(result["seconds"]),
    )


def _with_table(run: RunData, table: dict[str, Any]) -> RunData:
    """The run with what ``idap prune`` measured at its end, and its latency rather than that of the run."""
    before, after = map(_summary, table["rows"])
    latency = run.latency
    if before.latency is not None and after.latency is not None and after.speedup is not None:
        latency = (before.latency, after.latency, float(after.speedup))
    return replace(run, tested=(before, after), metric=str(table["metric"]), latency=latency)


def _summary(row: dict[str, Any]) -> StageSummary:
    latency = LatencyStats(**row["latency"]) if row["latency"] else None
    return StageSummary(**{**row, "accuracy": float(row["accuracy"]), "latency": latency})


def _from_events(source: Path, description: dict[str, Any], events: list[dict[str, Any]]) -> RunData:
    settings = dict(description["settings"])
    history = _history(event["record"] for event in events if event["event"] == "step")
    plan = PruningPlan(str(settings.get("model", "")).partition(" ")[0])
    proposed: Any = None
    blocks: dict[str, float] = {}
    for event in events:
        if event["event"] == "plan":
            proposed = event["value"]["plan"]
        elif event["event"] == "ranking" and not blocks:
            ranked = {str(name): float(value) for name, value in event["value"]}
            blocks = {name: ranked[name] for name in sorted(ranked, key=_by_number)}
        elif event["event"] == "step":
            if proposed is not None and event["record"]["accepted"]:
                plan = plan + PruningPlan.from_dict(proposed)
            proposed = None
    target: dict[str, float] = {}
    if history:
        for name, value in (settings.get("target") or {}).items():
            target[name] = value if value > 1 else value * (getattr(history[0], name) or math.nan)
    return RunData(
        directory=source,
        settings=settings,
        versions=dict(description.get("versions") or {}),
        history=history,
        plan=plan,
        budget=float(settings["budget"]),
        target=target,
        finished=False,
        widths=_widths_of(plan),
        blocks=(blocks, {}),
        seconds=sum(step.seconds for step in history),
    )


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts ``blocks.10`` after ``blocks.9``: by depth, as far as names tell."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def _history(records: Iterable[Any]) -> tuple[StepRecord, ...]:
    history = tuple(StepRecord.from_dict(record) for record in records)
    for step in history:
        # Compared and computed with from here on; a string among them would fail far from its cause.
        for name in ("params", "macs", "metric", "drift", "seconds"):
            if not isinstance(getattr(step, name), (int, float)):
                raise ValueError(f"{name} of a step is {getattr(step, name)!r}")
    return history


def _widths_of(plan: PruningPlan) -> tuple[dict[str, int], dict[str, int]]:
    """Widths of the layers that a plan cuts or removes, as far as it knows them."""
    before: dict[str, int] = {}
    after: dict[str, int] = {}
    for step in plan.steps:
        if isinstance(step, BlockStep):
            gone = tuple(f"{removal.name}." for removal in step.removals)
            after = {name: size for name, size in after.items() if not f"{name}.".startswith(gone)}
            continue
        for removal in step.removals:
            if removal.kind in ("conv_out", "linear_out"):
                before.setdefault(removal.layer, removal.size)
                after[removal.layer] = removal.size - len(removal.removed)
    return before, after


# ------------------------------------------------------------------------------------ web page


def write_report(directory: str | PathLike[str], output: str | PathLike[str] | None = None) -> Path:
    """Write one self-contained web page about a run, and its pictures as PNG files beside it.

    Everything comes from the directory of the run (``run.json``, ``journal.jsonl`` and ``result.json``), so
    that a run can be looked at anywhere, also while it is going on. The page needs no network and no script,
    follows the reader's light or dark theme, and shows figures under the pointer.

    Args:
        output: the directory to write ``index.html`` and the pictures to (made if it is not there), or the
            name of the page, ending in ``.html``; ``directory/report`` if not given.

    Returns:
        The path of the page.

    Raises:
        InvalidInputError: ``directory`` is none.
        ArtifactError: it holds no run or a damaged one, or the report cannot be written.
    """
    run = read_run(directory)
    target = Path(output) if output is not None else run.directory / "report"
    page = target if target.suffix.lower() in (".html", ".htm") else target / PAGE
    pictures = _pictures(run)
    text = _page(run, pictures)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            temporary = page.with_name(f".{picture.name}.part")
            temporary.write_bytes(picture.light)
            temporary.replace(page.with_name(picture.name))
        rundir.write_atomically(page, text)
    except OSError as error:
        raise ArtifactError(
            f"{page}: cannot be written ({error.strerror or error}); choose another place"
        ) from error
    return page


@dataclass(frozen=True)
class _Drawn:
    name: str
    title: str
    caption: str
    light: bytes
    dark: bytes
    spots: list[Spot]


def _pictures(run: RunData) -> list[_Drawn]:
    drawn = []

    def draw(name: str, title: str, caption: str, plot: Callable[..., list[Spot]], *data: Any) -> None:
        light, dark = io.BytesIO(), io.BytesIO()
        spots = plot(*data, light)
        plot(*data, dark, dark=True)
        drawn.append(_Drawn(name, title, caption, light.getvalue(), dark.getvalue(), spots))

    if run.history:
        caption = (
            "Hollow marks are steps that were undone: the metric fell by more than the stage may use of the "
            "budget."
        )
        draw("steps.png", "Steps", caption, plot_steps, run)
    if run.filters[0] or run.blocks[0]:
        parts = [
            *(["the mean over the filters of every layer"] if run.filters[0] else []),
            *(["the relative change that every removable block makes"] if run.blocks[0] else []),
        ]
        caption = f"The flow on its way through the network: {', and '.join(parts)}."
        if not run.finished:
            caption = "The relative change that every removable block made when the blocks were ranked first."
        draw("divergence.png", "Flow divergence", caption, plot_divergence, *run.filters, *run.blocks)
    if run.widths[0]:
        caption = (
            "Output channels of every convolution and linear layer."
            if run.finished
            else "Output channels of the layers that were cut so far."
        )
        draw("widths.png", "Widths", caption, plot_widths, *run.widths)
    return drawn


class _Html(str):
    """Text that is markup already; every other string is escaped."""

    __slots__ = ()


def _escape(value: object) -> _Html:
    if isinstance(value, _Html):
        return value
    # Lone surrogates, which JSON can hold, have no place in a file.
    return _Html(html.escape(str(value).encode("utf-8", "replace").decode("utf-8")))


def _tag(name: str, *content: object, **attributes: object) -> _Html:
    written = "".join(f' {key.rstrip("_")}="{_escape(value)}"' for key, value in attributes.items())
    return _Html(f"<{name}{written}>{''.join(map(_escape, content))}</{name}>")


def _table(
    head: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Sequence[int] = (), caption: str = ""
) -> _Html:
    """A table; the first cell of a row is its heading, ``numbers`` are the columns set to the right."""

    def line(cells: Sequence[object], heading: bool) -> _Html:
        made = []
        for i, cell in enumerate(cells):
            style = {"class_": "n"} if i in numbers else {}
            if heading:
                made.append(_tag("th", cell, scope="col", **style))
            elif i == 0:
                made.append(_tag("th", cell, scope="row", **style))
            else:
                made.append(_tag("td", cell, **style))
        return _tag("tr", *made)

    return _tag(
        "div",
        _tag(
            "table",
            _tag("caption", caption) if caption else "",
            _tag("thead", line(head, True)),
            _tag("tbody", *(line(row, False) for row in rows)),
        ),
        class_="scroll",
    )


def _section(title: str, *content: object) -> _Html:
    return _tag("section", _tag("h2", title), *content)


def _folded(title: str, content: _Html, rows: int) -> _Html:
    """Content of many rows is closed at first."""
    return content if rows <= 24 else _tag("details", _tag("summary", title), content)


def _page(run: RunData, pictures: Sequence[_Drawn]) -> str:
    model = run.plan.model or "model"
    title = f"{model}, pruned" if run.finished else f"{model}, being pruned"
    body = _tag(
        "main",
        _tag("h1", title),
        _tag("p", *_status(run), class_="status"),
        _tiles(run),
        _headline(run),
        _goals(run),
        *(_figure_of(picture) for picture in pictures),
        _blocks(run),
        _left_alone(run),
        _layers(run),
        _steps(run),
        _section(
            "Settings and versions",
            _table(("Setting", "Value"), [(name, _plain(value)) for name, value in run.settings.items()]),
            _table(("Software", "Version"), run.versions.items()),
        ),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # No script may run, whatever a layer is called.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        '<meta name="color-scheme" content="light dark">'
        f"<title>{_escape(title)}</title><style>{_STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def _status(run: RunData) -> list[object]:
    steps = len(run.history) - 1
    kept = sum(step.accepted for step in run.history[1:])
    done = f"{max(steps, 0)} steps, {kept} kept, {_duration(run.seconds)}"
    if not run.finished:
        return [_tag("strong", "Not finished.", class_="warn"), f" So far {done}."]
    if not run.target:
        return [f"No target was set. {done}."]
    verdict = (
        _tag("strong", "Target reached.", class_="good")
        if run.reached_target
        else _tag("strong", "Target not reached.", class_="warn")
    )
    return [verdict, f" {done}."]


def _tiles(run: RunData) -> _Html:
    base, now = run.baseline, run.current
    if base is None or now is None or now is base:
        return _Html()
    tiles = [
        ("MACs", _relative(now.macs, base.macs)),
        ("Parameters", _relative(now.params, base.params)),
        _metric_tile(run, base, now),
    ]
    if run.latency is not None:
        tiles.append(("Speed", f"{run.latency[2]:.2f}\N{MULTIPLICATION SIGN}"))
    return _tag("div", *(_tag("div", _tag("b", value), name) for name, value in tiles), class_="tiles")


def _metric_tile(run: RunData, base: StepRecord, now: StepRecord) -> tuple[str, str]:
    if run.tested is None:
        return "Metric", _signed(now.metric - base.metric, ".4g")
    before, after = (row.accuracy for row in run.tested)
    if run.metric == "accuracy":
        return "Test accuracy, points", _signed(100 * (after - before), ".2f")
    return "Metric, test", _signed(after - before, ".4g")


def _metric_row(run: RunData, name: str, before: float, after: float) -> Sequence[object]:
    if run.metric == "accuracy":
        change = _signed(100 * (after - before), ".2f")
        return (f"{name} accuracy", f"{before:.2%}", f"{after:.2%}", change and f"{change} points")
    return (f"{name}, {run.metric}", f"{before:.6g}", f"{after:.6g}", _signed(after - before, ".4g"))


def _headline(run: RunData) -> _Html:
    base, now = run.baseline, run.current
    if base is None or now is None:
        return _tag("p", "The original has not been measured yet.")
    rows: list[Sequence[object]] = [
        ("MACs", _count(base.macs), _count(now.macs), _relative(now.macs, base.macs)),
        ("Parameters", _count(base.params), _count(now.params), _relative(now.params, base.params)),
    ]
    note = ""
    if run.tested is None:
        change = _signed(now.metric - base.metric, ".4f")
        rows.append(("Metric", f"{base.metric:.4f}", f"{now.metric:.4f}", change))
    else:
        rows.append(_metric_row(run, "Test", *(row.accuracy for row in run.tested)))
        rows.append(_metric_row(run, "Validation", base.metric, now.metric))
    rows.append(("Drift", "0", f"{now.drift:.3g}", ""))
    if run.latency is not None:
        before, after, speedup = run.latency
        rows.append(
            (
                "Latency",
                _milliseconds(before),
                _milliseconds(after),
                f"{speedup:.2f}\N{MULTIPLICATION SIGN} as fast",
            )
        )
        note = (
            f"Latency: median and 10th to 90th percentile of {after.runs} passes on {after.device}, "
            f"{after.dtype}, {after.threads} thread{'s' * (after.threads != 1)}, both models in turns."
        )
    elif base.latency and now.latency:
        rows.append(
            (
                "Latency",
                f"{base.latency:.3g} ms",
                f"{now.latency:.3g} ms",
                _relative(now.latency, base.latency),
            )
        )
    if run.tested is not None:
        note = f"Test: on data that no decision read; validation data decided. {note}"
    drift = "Drift: squared distance of the outputs from the original's, over their squared size."
    table = _table(("", "Before", "After", "Change"), rows, numbers=(1, 2, 3))
    return _tag("section", table, _tag("p", f"{drift} {note}".strip(), class_="note"))


def _goals(run: RunData) -> _Html:
    base, now = run.baseline, run.current
    rows: list[Sequence[object]] = []
    if base is not None and now is not None:
        used = base.metric - now.metric
        spent = f"the metric {'fell' if used > 0 else 'rose'} by {abs(used):.4g}" if used else "not used"
        rows.append(("Budget", f"{run.budget:g}; {spent}"))
        for name, goal in run.target.items():
            full, left = getattr(base, name), getattr(now, name)
            if full and left and math.isfinite(goal):
                unit = f"{goal:.3g} ms" if name == "latency" else f"{int(goal):,}"
                met = "reached" if left <= goal else "not reached"
                rows.append(
                    (
                        f"Target, {SIZES.get(name, name)}",
                        f"{unit} ({goal / full:.1%}); {left / full:.1%}, {met}",
                    )
                )
    rows += [(f"Stage {stage} ended", reason) for stage, reason in run.stopped.items()]
    return _section("Budget and target", _table(("", ""), rows)) if rows else _Html()


def _figure_of(picture: _Drawn) -> _Html:
    # Width and height stand in the first chunk of every PNG file.
    width, height = struct.unpack(">II", picture.light[16:24])

    def image(data: bytes, theme: str) -> _Html:
        address = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
        return _Html(f'<image class="{theme}" href="{address}" width="{width}" height="{height}"/>')

    spots = [
        _Html(
            f'<rect x="{spot.left * width:.1f}" y="{spot.top * height:.1f}" '
            f'width="{max(spot.width, 0) * width:.1f}" height="{max(spot.height, 0) * height:.1f}">'
            f"{_tag('title', spot.text)}</rect>"
        )
        for spot in picture.spots
    ]
    drawing = _tag(
        "svg",
        image(picture.light, "light"),
        image(picture.dark, "dark"),
        _tag("g", *spots, class_="spots"),
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=picture.title,
    ).replace("aria_label", "aria-label", 1)
    figure = _tag("figure", _tag("div", _Html(drawing), class_="scroll"), _tag("figcaption", picture.caption))
    return _section(picture.title, figure)


def _blocks(run: RunData) -> _Html:
    rows = []
    for step in run.plan.steps:
        if isinstance(step, BlockStep):
            for removal in step.removals:
                rows.append(
                    (removal.name, removal.type, _stand_in(removal), _number(run.blocks[0].get(removal.name)))
                )
    if not rows:
        return _section("Removed blocks", _tag("p", "No block was removed."))
    head = ("Block", "Type", "In its place", "Divergence")
    return _section("Removed blocks", _table(head, rows, numbers=(3,)))


def _stand_in(removal: BlockRemoval) -> str:
    projection = removal.projection
    if projection is None:
        return "nothing: cut out with its channels" if removal.cut else "identity"
    arrow, times = "\N{RIGHTWARDS ARROW}", "\N{MULTIPLICATION SIGN}"
    stride = f", stride {times.join(map(str, projection.stride))}" if projection.stride else ""
    return f"projection, {projection.kind} {projection.inputs} {arrow} {projection.outputs}{stride}"


def _left_alone(run: RunData) -> _Html:
    skipped = run.plan.skipped
    if not skipped:
        return _Html()
    reasons: dict[str, list[int]] = {}
    for item in skipped:
        reasons.setdefault(item.reason, []).append(0 if _is_block(run, item) else item.size)
    summary = _table(
        ("Reason", "Number", "Channels"),
        [(reason, len(sizes), f"{sum(sizes):,}" if any(sizes) else "") for reason, sizes in reasons.items()],
        numbers=(1, 2),
    )
    rows = [(item.root, "" if _is_block(run, item) else item.size, item.reason) for item in skipped]
    each = _table(("Group or block", "Channels", "Reason"), rows, numbers=(1,))
    return _section(
        "Left alone", summary, _tag("details", _tag("summary", f"All {len(rows)}, by name"), each)
    )


def _is_block(run: RunData, item: Skipped) -> bool:
    # Plans give blocks the size 1; groups are named by a layer.
    return item.size == 1 and item.root not in run.widths[0]


def _layers(run: RunData) -> _Html:
    (before, after), (flow_before, flow_after) = run.widths, run.filters
    names = [*before, *(name for name in after if name not in before)]
    if not names:
        return _Html()
    head = ["Layer", "Before", "After", "Change"]
    if flow_before:
        head += ["Divergence before", "Divergence after"]
    rows = []
    for name in names:
        old, new = before.get(name), after.get(name)
        if old is None or new is None:
            change = "removed" if new is None else "new"
        else:
            change = _relative(new, old) if new != old else ""
        row: list[object] = [name, _number(old), _number(new), change]
        if flow_before:
            row += [_number(flow_before.get(name)), _number(flow_after.get(name))]
        rows.append(row)
    table = _table(head, rows, numbers=range(1, len(head)))
    return _section("Layers", _folded(f"All {len(rows)} layers", table, len(rows)))


def _steps(run: RunData) -> _Html:
    base = run.baseline
    if base is None:
        return _Html()
    timed = any(step.latency is not None for step in run.history)
    rows = []
    for number, step in enumerate(run.history):
        verdict = _tag(
            "span", "kept" if step.accepted else "undone", class_="good" if step.accepted else "warn"
        )
        cells: list[object] = [
            number,
            step.stage,
            step.action,
            verdict,
            _counted(step.macs, base.macs),
            _counted(step.params, base.params),
            _number(step.metric),
            _number(step.drift),
        ]
        if timed:
            cells.append(_number(step.latency))
        rows.append([*cells, _duration(step.seconds), step.note])
    head = ["Step", "Stage", "Action", "", "MACs", "Parameters", "Metric", "Drift"]
    head += ["Latency (ms)"] if timed else []
    table = _table([*head, "Time", "Note"], rows, numbers=(0, *range(4, len(head) + 1)))
    return _section("Steps", _folded(f"All {len(rows)} steps", table, len(rows)))


def _counted(value: int, full: int) -> str:
    return f"{_count(value)} ({value / full:.1%})" if full else _count(value)


def _count(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g} {unit}"
    return f"{value:,}"


def _relative(value: float, full: float) -> str:
    return f"{_signed(100 * (value / full - 1), '.1f')} %" if full else ""


def _signed(value: float, form: str) -> str:
    return f"{value:+{form}}".replace("-", "\N{MINUS SIGN}", 1) if value else "0"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if math.isfinite(value) else "none"


def _milliseconds(stats: LatencyStats) -> str:
    return f"{stats.median:.3g} ms ({stats.p10:.3g}\N{EN DASH}{stats.p90:.3g})"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _plain(value: object) -> str:
    if value is None or value in ([], {}):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return str(value)


_STYLE = """
:root{--text:#1f2933;--soft:#5b6670;--paper:#fff;--card:#f6f7f9;--line:#dfe3e8;--good:#00704f;--warn:#b34700}
body{margin:0;background:var(--paper);color:var(--text);font:15px/1.5 system-ui,sans-serif}
main{max-width:920px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.6rem;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:36px 0 8px}
p{margin:6px 0}.status,.note,figcaption,caption{color:var(--soft)}
.note,figcaption{font-size:.87rem}.good{color:var(--good)}.warn{color:var(--warn)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(120px,1fr));gap:10px;margin:18px 0}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 14px;color:var(--soft)}
.tiles b{display:block;font-size:1.5rem;font-weight:650;color:var(--text);font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;margin:8px 0;font-size:.9rem}
th,td{text-align:left;padding:5px 10px 5px 0;border-bottom:1px solid var(--line);vertical-align:top;font-weight:400}
thead th{color:var(--soft);font-size:.82rem;white-space:nowrap}thead tr:not(:has(th:not(:empty))){display:none}
tbody th{overflow-wrap:anywhere;min-width:6em}
.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
figure{margin:0}svg{display:block;width:100%;min-width:640px;height:auto}.dark{display:none}
.spots rect{fill:transparent}.spots rect:hover{fill:#8aa4bd2b}
summary{cursor:pointer;padding:4px 0}
@media (prefers-color-scheme:dark){
:root{--text:#d8dee6;--soft:#98a3ae;--paper:#14181d;--card:#1c2229;--line:#2f3740;--good:#2fc79a;--warn:#f0803c}
.dark{display:inline}.light{display:none}}
@media (max-width:560px){table{font-size:.82rem}.n{white-space:normal}th,td{padding-right:6px}}
@media print{details>*{display:block}svg{min-width:0}}
"""


# --------------------------------------------------------------------------------- TensorBoard


class TensorBoardLog:
    """Writes the steps of a run for TensorBoard; an instance is a ``progress`` function of ``compress``.

    Steps that were kept and steps that were undone are two runs (``kept`` and ``undone`` below
    ``directory``), so that one chart shows both, told apart by colour. Values that are not finite, such as
    the metric of a training that failed, are left out.

    Args:
        directory: where the event files go; made if it is not there.
        first_step: number of the next record; to go on with a run, the number of records it has. What an
            earlier process wrote from there on is dropped.

    Raises:
        InvalidInputError: tensorboard is not installed.
        ArtifactError: ``directory`` cannot be written.
    """

    def __init__(self, directory: str | PathLike[str], *, first_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InvalidInputError(
                f"TensorBoard logs need tensorboard, not usable here ({error}): pip install 'idap[tensorboard]'"
            ) from error
        self.directory = Path(directory)
        self.step = self._first = first_step
        self._make = SummaryWriter
        self._writers: dict[str, Any] = {}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"{self.directory}: cannot be written ({error.strerror or error})") from error

    def __call__(self, record: StepRecord) -> None:
        """Write one step."""
        writer = self._writer("kept" if record.accepted else "undone")
        for name in ("macs", "params", "metric", "drift", "latency", "seconds"):
            value = getattr(record, name)
            if value is not None and math.isfinite(value):
                writer.add_scalar(name, value, self.step)
        note = f"{record.stage}: {record.action}{f' ({record.note})' if record.note else ''}"
        writer.add_text("action", note, self.step)
        writer.flush()
        self.step += 1

    def close(self) -> None:
        """Write what is left and close the files."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _writer(self, name: str) -> Any:
        if name not in self._writers:
            path = os.fspath(self.directory / name)
            try:
                self._writers[name] = self._make(path, purge_step=self._first or None)
            except OSError as error:
                raise ArtifactError(f"{path}: cannot be written ({error.strerror or error})") from error
        return self._writers[name]


def _percent(value: float, full: float) -> str:
    return f"\n{100 * (value / full - 1):+.0f}%" if full else ""
