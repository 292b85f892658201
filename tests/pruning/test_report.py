"""Table, pictures and page: what the cells say, and what the axes hold."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from torch import nn

from idap import plots
from idap.compress import CompressionResult, StepRecord
from idap.errors import ArtifactError, InvalidInputError
from idap.groups import Skipped
from idap.latency import LatencyStats
from idap.plan import BlockRemoval, BlockStep, ChannelRemoval, ChannelStep, Projection, PruningPlan
from idap.report import (
    StageSummary,
    TensorBoardLog,
    format_macs,
    layer_widths,
    mean_divergence,
    plot_divergence,
    plot_steps,
    plot_widths,
    read_run,
    stage_table,
    write_report,
)

PNG = b"\x89PNG\r\n\x1a\n"


def text_of(table: Any) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def make_result(**changes: Any) -> CompressionResult:
    history = (
        StepRecord("base", "original", True, 1000, 2000, 0.99, 0.0, 1.0),
        StepRecord("filters", "ratio 0.100", True, 800, 1500, 0.98, 0.01, 1.0),
        StepRecord("filters", "ratio 0.120", False, 500, 900, 0.90, 0.2, 1.0),
        StepRecord("layers", "remove b.1 (divergence 0.3)", True, 600, 1000, 0.975, 0.1, 1.0),
        StepRecord("final", "fine-tune", True, 600, 1000, 0.985, 0.05, 1.0),
    )
    values: dict[str, Any] = {
        "model": nn.Identity(),
        "plan": cast(Any, None),
        "history": history,
        "params": 600,
        "macs": 1000,
        "metric": 0.985,
        "drift": 0.05,
        "budget": 0.02,
        "target": {"macs": 1000},
        "reached_target": True,
        "stopped": {},
    }
    return CompressionResult(**(values | changes))


@contextmanager
def kept_figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Collect the figures that the functions draw, to look at their axes."""
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig

    def spy(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    yield figures


def test_table_holds_values_and_changes():
    stats = LatencyStats(2.0, 1.5, 2.5, 10, "cpu", "float32", 1, "x")
    rows = [
        StageSummary("original", 1000, 4_000_000, 0.99, stats, 1.0),
        StageSummary(
            "pruned", 250, 1_000_000, 0.985, LatencyStats(1.0, 0.9, 1.2, 10, "cpu", "float32", 1, "x"), 1.98
        ),
    ]
    text = text_of(stage_table(rows, title="T", accuracy_name="Test accuracy"))
    lines = [" ".join(line.replace("│", " ").split()) for line in text.splitlines()]
    assert [line for line in lines if line.startswith(("original", "pruned"))] == [
        "original 1,000 4.00 M 99.00% 2.00 ms 1.00x",
        "pruned 250 1.00 M 98.50% 1.00 ms 1.98x",
    ]
    assert "1.50-2.50" in lines
    assert "-75% -75% -0.50 0.90-1.20" in lines
    assert "Test accuracy" in text


def test_table_without_latency_has_no_such_columns_and_no_rows_raise():
    assert "Speed-up" not in text_of(stage_table([StageSummary("original", 10, 10, 0.5)]))
    with pytest.raises(InvalidInputError, match="no stage"):
        stage_table([])


def test_widths_and_mean_divergence():
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 4, 3), nn.Linear(4, 2))
    assert layer_widths(model) == {"0": 6, "2": 4, "3": 2}
    assert mean_divergence({"a": torch.tensor([1.0, 3.0])}) == {"a": 2.0}


def test_steps_picture(tmp_path, monkeypatch):
    path = tmp_path / "steps.png"
    with kept_figures(monkeypatch) as figures:
        plot_steps(make_result(), path, metric_name="Accuracy")
    assert path.read_bytes().startswith(PNG)
    top, bottom, drift = figures[0].axes
    macs = top.get_lines()[0]
    assert list(macs.get_xdata()) == [0, 1, 3, 4]
    assert list(macs.get_ydata()) == [100, 75, 50, 50]
    undone = top.get_lines()[1]
    assert (list(undone.get_xdata()), list(undone.get_ydata())) == ([2], [45])
    assert list(bottom.get_lines()[0].get_ydata()) == [0.99, 0.98, 0.975, 0.985]
    assert any(line.get_ydata()[0] == pytest.approx(0.97) for line in bottom.get_lines())
    assert bottom.get_ylabel() == "Accuracy"
    assert list(drift.get_lines()[0].get_ydata()) == [0.0, 0.01, 0.1, 0.05]
    assert list(drift.get_lines()[1].get_ydata()) == [0.2]
    assert [t.get_text() for t in drift.get_xticklabels()][3] == "remove b.1"


def test_steps_picture_shows_latency_and_joins_equal_targets(tmp_path, monkeypatch):
    history = tuple(
        dataclasses.replace(step, latency=latency)
        for step, latency in zip(make_result().history, (4.0, 3.0, None, 2.0, 2.0), strict=True)
    )
    target = {"macs": 1000, "params": 500, "latency": 2.5}
    with kept_figures(monkeypatch) as figures:
        spots = plot_steps(make_result(history=history, target=target), tmp_path / "steps.png")
    top = figures[0].axes[0]
    named = {line.get_label(): list(line.get_ydata()) for line in top.get_lines()}
    assert named["latency"] == [100, 75, 50, 50]
    texts = [text.get_text() for text in top.texts]
    assert "target, MACs and parameters" in texts
    assert "target, latency" in texts
    assert [spot.text.split(",")[0] for spot in spots][1:3] == [
        "1. filters: ratio 0.100",
        "2. filters: ratio 0.120",
    ]
    assert "latency 3.000 ms" in spots[1].text
    # One beside the other, within the picture.
    for left, right in pairwise(spots):
        assert left.left + left.width == pytest.approx(right.left)
    assert all(0 < spot.left < spot.left + spot.width <= 1.001 for spot in spots)
    assert all(0 < spot.top < spot.top + spot.height < 1 for spot in spots)


@pytest.mark.parametrize("count", [6, 40, 121])
def test_labels_do_not_overlap(tmp_path, monkeypatch, count):
    names = {
        6: [f"features.{i}" for i in range(6)],
        40: [f"encoder.layers.{i // 4}.a_rather_long_name_for_a_layer.{i % 4}" for i in range(40)],
        121: ["features.conv0"]
        + [f"features.block{1 + i // 40}.layer{i % 40 // 2}.conv{i % 2}" for i in range(119)]
        + ["classifier"],
    }[count]
    assert len(names) == count
    widths = {name: 8 + i for i, name in enumerate(names)}
    means = {name: 1.0 + i for i, name in enumerate(names)}
    left = dict.fromkeys(names[: count - 2], 4)
    records = make_result().history
    history = records[:1] + records[1:3] * (count // 2) + records[3:]
    with kept_figures(monkeypatch) as figures:
        spots = plot_widths(widths, left, tmp_path / "w.png")
        plot_divergence(means, cast(Any, left), means, cast(Any, left), tmp_path / "d.png")
        plot_steps(make_result(history=history), tmp_path / "s.png")
    assert spots[0].text == f"{names[0]}: 8 → 4"
    assert spots[-1].text.endswith("removed")
    for figure in figures:
        assert figure.get_size_inches()[1] < 14
        for axes in figure.axes:
            for labels in (axes.get_xticklabels(), axes.get_yticklabels(), axes.texts):
                shown = [label for label in labels if label.get_text()]
                assert not any(crosses(a, b) for a, b in combinations(shown, 2))


def crosses(a: Any, b: Any) -> bool:
    """Whether two texts of one rotation lie on each other: compared along and across their lines."""
    if a.get_rotation() in (0, 90):
        return bool(a.get_window_extent().shrunk(0.98, 0.9).overlaps(b.get_window_extent()))
    # Parallel lines through their anchors: too near if their distance is less than the height of the font.
    angle = math.radians(a.get_rotation())
    (xa, ya), (xb, yb) = (t.get_transform().transform(t.get_position()) for t in (a, b))
    distance = abs((xa - xb) * math.sin(angle) - (ya - yb) * math.cos(angle))
    return distance < a.get_fontsize() * a.figure.dpi / 72 * 0.9


def test_names_are_not_read_as_formulas(tmp_path):
    plot_widths({"a$_$b": 2, "\\frac{": 3, "名": 4}, {"a$_$b": 1}, tmp_path / "w.png")
    assert (tmp_path / "w.png").stat().st_size > 1000


def test_steps_picture_needs_a_step(tmp_path):
    with pytest.raises(InvalidInputError, match="without a step"):
        plot_steps(make_result(history=()), tmp_path / "s.png")


def test_steps_picture_of_a_run_without_steps_or_target(tmp_path):
    result = make_result(history=make_result().history[:1], target={})
    plot_steps(result, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_widths_picture_marks_removed_layers(tmp_path, monkeypatch):
    with kept_figures(monkeypatch) as figures:
        plot_widths({"a": 8, "b": 16, "c": 4}, {"a": 4, "c": 4}, tmp_path / "w.png")
    axes = figures[0].axes[0]
    assert [t.get_text() for t in axes.texts] == ["8 \N{RIGHTWARDS ARROW} 4", "removed", "4"]
    assert [bar.get_width() for bar in axes.patches] == [8, 4, 16, 4, 4]
    with pytest.raises(InvalidInputError, match="widths"):
        plot_widths({}, {}, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_divergence_picture(tmp_path, monkeypatch):
    with kept_figures(monkeypatch) as figures:
        plot_divergence(
            {"a": 0.1, "b": 0.2}, {"a": 0.3}, {"l.0": 0.5, "l.1": 0.4}, {"l.0": 0.6}, tmp_path / "d.png"
        )
        plot_divergence({"a": 0.1, "b": 0.2}, {"a": 0.3}, {}, {}, tmp_path / "e.png")
    top, bottom = figures[0].axes
    assert list(top.get_lines()[0].get_ydata()) == [0.1, 0.2]
    assert list(top.get_lines()[1].get_ydata()) == [0.3]
    assert top.get_lines()[2].get_xdata()[0] == 1
    assert [bar.get_height() for bar in bottom.patches] == [0.5, 0.4, 0.6]
    assert bottom.patches[2].get_x() > bottom.patches[0].get_x()
    assert len(figures[1].axes) == 1
    with pytest.raises(InvalidInputError, match="divergences"):
        plot_divergence({}, {}, {}, {}, tmp_path / "x.png")


def test_drawing_needs_no_pyplot_and_importing_no_matplotlib(tmp_path):
    code = (
        "import sys, idap.report\n"
        "assert 'matplotlib' not in sys.modules and 'rich' not in sys.modules\n"
        f"idap.report.plot_widths({{'a': 2}}, {{'a': 1}}, {str(tmp_path / 'w.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("theme", [plots.LIGHT, plots.DARK])
def test_colours_differ_in_lightness(theme):
    def lightness(colour: str) -> float:
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        return 0.299 * red + 0.587 * green + 0.114 * blue

    pairs = [
        ("text", "paper"),
        ("after", "second"),
        ("after", "paper"),
        ("before", "paper"),
        ("limit", "paper"),
    ]
    for one, other in [*pairs, ("after", "bar")]:
        assert abs(lightness(getattr(theme, one)) - lightness(getattr(theme, other))) > 40, (one, other)


# ------------------------------------------------------------------------------------- web page

EVIL = "<script>alert('\"&\ud800$_$')</script>"


def make_run(directory: Path, *, finished: bool = True, change: Callable[[Any], Any] | None = None) -> Path:
    """A run directory as compress writes it."""
    channels = ChannelStep(
        (ChannelRemoval("a", "conv_out", 8, (0, 1)), ChannelRemoval("b", "conv_in", 8, (0, 1)))
    )
    projection = Projection("conv2d", 6, 8, (2, 2))
    blocks = BlockStep(
        (BlockRemoval("b.1", "Bottleneck"), BlockRemoval(EVIL, "Basic", projection=projection))
    )
    skipped = (Skipped("fc", 10, "its channels are an output"), Skipped(EVIL, 4, EVIL))
    plan = PruningPlan("Net", (channels, blocks), skipped=skipped)
    history = make_result().history
    failed = dataclasses.replace(history[2], metric=math.nan, drift=math.nan, note=f"diverged {EVIL}")
    history = (history[0], history[1], failed, *history[3:])
    settings = {
        "budget": 0.02,
        "target": {"macs": 0.5, "params": 400},
        "model": "Net 0123",
        "ignored": [EVIL],
    }
    run = {"format": "idap-run", "version": 1, "settings": settings, "versions": {"torch": "2.9"}}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "run.json").write_text(json.dumps(run))
    events: list[Any] = [{"event": "step", "record": history[0].to_dict(), "checkpoint": None}]
    for step, record in zip((channels, channels, blocks), history[1:4], strict=True):
        proposed = PruningPlan("Net", (step,), skipped=skipped).to_dict()
        if record.stage == "layers":
            events.append({"event": "ranking", "value": [["b.10", 0.3], ["b.1", 0.4], ["b.2", 0.5]]})
        events.append({"event": "plan", "value": {"plan": proposed, "action": record.action}})
        events.append({"event": "step", "record": record.to_dict(), "checkpoint": None})
    lines = [json.dumps(event) for event in events]
    (directory / "journal.jsonl").write_text("\n".join(lines) + '\n{"event": "pl')
    if finished:
        result = make_result(history=history, plan=plan, stopped={"filters": EVIL}).to_dict()
        result["widths"] = {"before": {"a": 8, "b.1": 4, EVIL: 4}, "after": {"a": 6, EVIL: 4, "b.1.new": 2}}
        result["divergence"] = {
            "filters": {"before": {"a": 0.5, "b.1": 0.25, EVIL: 0.125}, "after": {"a": 0.75, EVIL: None}},
            "blocks": {"before": {"b.1": 0.3125}, "after": {}},
        }
        stats = LatencyStats(2.0, 1.5, 2.5, 10, "cpu", "float32", 1, "x").to_dict()
        result["latency"] = {"before": stats, "after": {**stats, "median": 1.0}, "speedup": 2.04}
        result |= {"settings": settings, "versions": {"torch": "2.9"}, "seconds": 3725.0}
        (directory / "result.json").write_text(json.dumps(change(result) if change else result))
    return directory


class Page(HTMLParser):
    """Tables as lists of rows of texts, and the tags that were opened."""

    VOID = ("meta", "image", "br")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.open: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def table(self, *head: str) -> list[list[str]]:
        (found,) = [table[1:] for table in self.tables if tuple(table[0][: len(head)]) == head]
        return found


def test_page_of_a_finished_run(tmp_path):
    path = write_report(make_run(tmp_path / "run"))
    assert path == tmp_path / "run" / "report" / "index.html"
    pictures = ["divergence.png", "steps.png", "widths.png"]
    assert sorted(file.name for file in path.parent.iterdir()) == [*pictures[:1], "index.html", *pictures[1:]]
    assert all((path.parent / name).read_bytes().startswith(PNG) for name in pictures)
    page = Page(path)
    assert page.table("", "Before", "After", "Change") == [
        ["MACs", "2,000", "1,000", "\N{MINUS SIGN}50.0 %"],
        ["Parameters", "1,000", "600", "\N{MINUS SIGN}40.0 %"],
        ["Metric", "0.9900", "0.9850", "\N{MINUS SIGN}0.0050"],
        ["Drift", "0", "0.05", ""],
        ["Latency", "2 ms (1.5–2.5)", "1 ms (1.5–2.5)", "2.04× as fast"],
    ]
    evil = EVIL.replace("\ud800", "?")
    goals = {row[0]: row[1] for row in page.table("", "") if len(row) == 2}
    assert goals["Target, MACs"] == "1,000 (50.0%); 50.0%, reached"
    assert goals["Stage filters ended"] == evil
    assert page.table("Block") == [
        ["b.1", "Bottleneck", "identity", "0.3125"],
        [evil, "Basic", "projection, conv2d 6 → 8, stride 2×2", ""],
    ]
    assert page.table("Group or block")[1] == [evil, "4", evil]
    assert page.table("Layer") == [
        ["a", "8", "6", "\N{MINUS SIGN}25.0 %", "0.5", "0.75"],
        ["b.1", "4", "", "removed", "0.25", ""],
        [evil, "4", "4", "", "0.125", ""],
        ["b.1.new", "", "2", "new", "", ""],
    ]
    steps = page.table("Step")
    assert [row[3] for row in steps] == ["kept", "kept", "undone", "kept", "kept"]
    assert steps[2][2:7] == ["ratio 0.120", "undone", "900 (45.0%)", "500 (50.0%)", "none"]
    assert steps[2][-1] == f"diverged {evil}"
    assert page.table("Setting")[-1] == ["ignored", evil]
    assert page.table("Software") == [["torch", "2.9"]]
    assert "Target reached." in page.text
    assert "1 h 02 min" in page.text


def test_page_needs_nothing_else_and_runs_no_script(tmp_path):
    page = Page(write_report(make_run(tmp_path)))
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    addresses = [value for _, a in page.tags for name, value in a.items() if name in ("href", "src")]
    # Light and dark of three pictures.
    assert len(addresses) == 6
    assert all(address.startswith("data:image/png;base64,iVBOR") for address in addresses)
    assert "url(" not in page.source
    assert "@import" not in page.source
    policies = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert "prefers-color-scheme:dark" in page.source
    assert any(a.get("name") == "viewport" for _, a in page.tags)
    # A part of a picture for every step, layer and block in it.
    assert sum(tag == "rect" for tag, _ in page.tags) == 5 + (3 + 1) + 3


def test_page_shows_what_the_command_measured(tmp_path):
    directory = make_run(tmp_path / "run")
    stats = LatencyStats(4.0, 3.0, 5.0, 7, "cpu", "float32", 1, "x")
    rows = [
        StageSummary("original", 1000, 2000, 0.97, stats, 1.0),
        StageSummary("pruned", 600, 1000, 0.9625, dataclasses.replace(stats, median=2.0), 1.98),
    ]
    table = {"metric": "accuracy", "rows": [row.to_dict() for row in rows]}
    (directory / "table.json").write_text(json.dumps(table))
    page = Page(write_report(directory))
    minus = "\N{MINUS SIGN}"
    assert page.table("", "Before", "After", "Change")[2:] == [
        ["Test accuracy", "97.00%", "96.25%", f"{minus}0.75 points"],
        ["Validation accuracy", "99.00%", "98.50%", f"{minus}0.50 points"],
        ["Drift", "0", "0.05", ""],
        ["Latency", "4 ms (3–5)", "2 ms (3–5)", "1.98× as fast"],
    ]
    assert "no decision read" in page.text
    (directory / "table.json").write_text(json.dumps({**table, "metric": "tasks:f1"}))
    assert Page(write_report(directory)).table("", "Before")[2][:3] == ["Test, tasks:f1", "0.97", "0.9625"]
    (directory / "table.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"table\.json: damaged"):
        write_report(directory)


def test_blocks_left_alone_have_no_channels(tmp_path):
    def add_block(result):
        result["plan"]["skipped"].append({"root": "b.9", "size": 1, "reason": "ignored on request"})
        return result

    page = Page(write_report(make_run(tmp_path / "run", change=add_block)))
    assert page.table("Group or block")[-1] == ["b.9", "", "ignored on request"]
    assert page.table("Reason", "Number")[-1] == ["ignored on request", "1", ""]


def test_macs_are_in_millions_or_billions():
    assert [format_macs(n) for n in (11_431_552, 999_000_000, 4_089_000_000)] == [
        "11.43 M",
        "999.00 M",
        "4.09 G",
    ]


def test_page_of_a_run_that_is_not_over(tmp_path):
    page = Page(write_report(make_run(tmp_path, finished=False), tmp_path / "elsewhere" / "page.html"))
    assert sorted(p.name for p in (tmp_path / "elsewhere").iterdir()) == [
        "divergence.png",
        "page.html",
        "steps.png",
        "widths.png",
    ]
    assert "Not finished." in page.text
    assert "Target reached" not in page.text
    assert page.table("Layer") == [["a", "8", "6", "\N{MINUS SIGN}25.0 %"]]
    assert [row[0] for row in page.table("Block")] == ["b.1", EVIL.replace("\ud800", "?")]
    goals = {row[0]: row[1] for row in page.table("", "")}
    assert goals["Target, MACs"] == "1,000 (50.0%); 50.0%, reached"
    assert goals["Target, parameters"] == "400 (40.0%); 60.0%, not reached"
    run = read_run(tmp_path)
    # The step that was undone is not in the plan; blocks stand in their order.
    assert len(run.plan.steps) == 2
    assert list(run.blocks[0]) == ["b.1", "b.2", "b.10"]
    assert run.current is not None
    assert run.current.action.startswith("remove b.1")


def test_page_of_a_run_that_has_just_begun(tmp_path):
    make_run(tmp_path, finished=False)
    (tmp_path / "journal.jsonl").write_text("")
    page = Page(write_report(tmp_path))
    assert "The original has not been measured yet." in page.text
    assert not [tag for tag, _ in page.tags if tag == "image"]


def without(key: str) -> Callable[[Any], Any]:
    return lambda result: {name: value for name, value in result.items() if name != key}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda result: [], "no JSON object"),
        (without("widths"), "no 'widths'"),
        (lambda result: {**result, "plan": {}}, "plan"),
        (lambda result: {**result, "history": [{"stage": "base"}]}, "record of a step"),
        (lambda result: {**result, "history": []}, "history is empty"),
        (
            lambda result: {**result, "history": [{**result["history"][0], "macs": "x"}]},
            "macs of a step is 'x'",
        ),
        (lambda result: {**result, "latency": {"before": 1}}, "damaged"),
        (lambda result: {**result, "target": []}, "damaged"),
    ],
)
def test_damaged_results_are_refused(tmp_path, change, match):
    with pytest.raises(ArtifactError, match=match):
        write_report(make_run(tmp_path, change=change))
    assert not (tmp_path / "report").exists()


def test_directories_that_hold_no_run_are_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="no such directory"):
        write_report(tmp_path / "none")
    with pytest.raises(ArtifactError, match=r"run\.json"):
        write_report(tmp_path)
    make_run(tmp_path)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"result\.json: damaged"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text('{"format": "other"}')
    with pytest.raises(ArtifactError, match="not the description"):
        write_report(tmp_path)
    with pytest.raises(ArtifactError, match="cannot be written"):
        write_report(make_run(tmp_path / "b"), tmp_path / "run.json")


def test_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = make_result().history
    failed = dataclasses.replace(history[2], metric=math.nan, drift=math.nan, note="diverged")
    with TensorBoardLog(tmp_path) as log:
        for step in (history[0], history[1], failed):
            log(step)
    with TensorBoardLog(tmp_path, first_step=3) as log:
        log(dataclasses.replace(history[3], latency=2.5))

    def read(run: str) -> Any:
        return accumulator.EventAccumulator(str(tmp_path / run)).Reload()

    kept, undone = read("kept"), read("undone")
    assert [(event.step, event.value) for event in kept.Scalars("macs")] == [(0, 2000), (1, 1500), (3, 1000)]
    assert [(event.step, event.value) for event in kept.Scalars("latency")] == [(3, 2.5)]
    assert [(event.step, event.value) for event in undone.Scalars("params")] == [(2, 500)]
    assert "metric" not in undone.Tags()["scalars"]
    (text,) = undone.Tensors("action/text_summary")
    assert b"diverged" in text.tensor_proto.string_val[0]


def test_tensorboard_that_is_missing_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InvalidInputError, match=re.escape("pip install 'idap[tensorboard]'")):
        TensorBoardLog(tmp_path / "log")
    assert not (tmp_path / "log").exists()
