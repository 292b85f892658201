"""Table and pictures: what the cells say, and what the axes hold."""

import subprocess
import sys
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from torch import nn

from idap import report
from idap.compress import CompressionResult, StepRecord
from idap.errors import InvalidInputError
from idap.latency import LatencyStats
from idap.report import (
    StageSummary,
    layer_widths,
    mean_divergence,
    plot_divergence,
    plot_steps,
    plot_widths,
    stage_table,
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
def kept_figures(monkeypatch: pytest.MonkeyPatch):
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
    top, bottom = figures[0].axes
    macs = top.get_lines()[0]
    assert list(macs.get_xdata()) == [0, 1, 3, 4]
    assert list(macs.get_ydata()) == [100, 75, 50, 50]
    undone = top.get_lines()[1]
    assert (list(undone.get_xdata()), list(undone.get_ydata())) == ([2], [45])
    assert list(bottom.get_lines()[0].get_ydata()) == [0.99, 0.98, 0.975, 0.985]
    assert any(line.get_ydata()[0] == pytest.approx(0.97) for line in bottom.get_lines())
    assert bottom.get_ylabel() == "Accuracy"
    assert [t.get_text() for t in bottom.get_xticklabels()][3] == "remove b.1"


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
    assert [bar.get_height() for bar in bottom.patches] == [0.5, 0.6, 0.4]
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


def test_colours_differ_in_lightness():
    def lightness(colour: str) -> float:
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        return 0.299 * red + 0.587 * green + 0.114 * blue

    pairs = [(report._BEFORE, report._AFTER), (report._AFTER, report._SECOND)]
    assert all(abs(lightness(a) - lightness(b)) > 40 for a, b in pairs)
