"""Tables of the commands on the console."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..report import StageSummary, format_macs

if TYPE_CHECKING:
    from rich.table import Table


def models_table(
    rows: Sequence[StageSummary],
    *,
    title: str,
    caption: str,
    format_metric: Callable[[float], str] | None = None,
) -> Table:
    """Size and latency of models, a row each, and a metric on any scale (``accuracy``) if it has a format.

    :func:`idap.report.stage_table` is the one for accuracies, with their changes in points.
    """
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", title_style="bold", caption=caption, caption_justify="left"
    )
    table.add_column("Model")
    columns = ["Parameters", "MACs", *(["Metric"] if format_metric else []), "Median", "p10-p90"]
    for column in [*columns, *(["Speed-up"] if len(rows) > 1 else [])]:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        stats = row.latency
        cells = [f"{row.params:,}", format_macs(row.macs)]
        cells += [format_metric(row.accuracy)] if format_metric else []
        cells += [f"{stats.median:.2f} ms", f"{stats.p10:.2f}-{stats.p90:.2f}"] if stats else ["", ""]
        cells += [f"{row.speedup:.2f}x" if row.speedup is not None else ""] if len(rows) > 1 else []
        table.add_row(row.name, *cells)
    return table


def profile_tables(found: Mapping[str, Any], title: str) -> list[Table]:
    """The layers and, if there are any, the removable blocks of a profile, as ``idap profile`` found them."""
    from rich.table import Table

    layers = Table(title=title, title_justify="left", title_style="bold")
    layers.add_column("Layer", overflow="fold")
    for column in ("Width", "Mean flow divergence", "Dead", "APoZ"):
        layers.add_column(column, justify="right", no_wrap=True)
    for layer in found["layers"]:
        layers.add_row(
            layer["name"],
            f"{layer['width']:,}",
            f"{layer['flow_divergence']:.3g}",
            str(layer["dead"]),
            f"{layer['apoz']:.1%}",
        )
    if not found["blocks"]:
        return [layers]
    blocks = Table(title="Removable blocks", title_justify="left", title_style="bold")
    blocks.add_column("Block", overflow="fold")
    blocks.add_column("Divergence", justify="right", no_wrap=True)
    for block in found["blocks"]:
        blocks.add_row(block["name"], f"{block['divergence']:.3g}")
    return [layers, blocks]
