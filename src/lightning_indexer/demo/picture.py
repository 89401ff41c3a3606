"""A picture of what each query chose: one row per query, the context from left to right."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_indexer.config import CSA_RATIO
from lightning_indexer.demo.report import Report
from lightning_indexer.demo.run import Row

FILE_NAME = "selection.png"

_LABEL_WIDTH, _LABEL_LINES = 46, 2
_CHOSEN, _BEST, _PLANTED = "#a6c8e4", "#0b3c6f", "#d62728"
_NUM_BEST = 10


def has_matplotlib() -> bool:
    """Whether a picture can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def draw(report: Report, rows: Sequence[Row], path: Path) -> None:
    """Write the picture as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 2.2 + 0.55 * len(rows)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"Which entries each query chose: {min(report.top_k, report.entries)} of {report.entries:,}",
        fontsize=17,
        fontweight="bold",
    )
    axes = figure.add_subplot()
    ranks = {item.first_token: item.rank for item in report.planted}
    for y, row in enumerate(rows):
        _draw_row(axes, y, row, ranks)
    _draw_axes(axes, report, rows)
    figure.savefig(path, format="png")


def _draw_row(axes: Any, y: int, row: Row, ranks: Mapping[int, int]) -> None:
    places = [entry * CSA_RATIO for entry in row.entries]
    axes.vlines(places[_NUM_BEST:], y - 0.28, y + 0.28, color=_CHOSEN, linewidth=0.7)
    axes.vlines(places[:_NUM_BEST], y - 0.28, y + 0.28, color=_BEST, linewidth=1.8)
    if row.planted is not None:
        start = row.planted.start
        axes.plot(start, y - 0.4, marker="v", color=_PLANTED, markersize=10, clip_on=False)
        in_margin = axes.get_yaxis_transform()  # x in fractions of the width, y in rows
        found = f"rank {ranks[start]:,}"
        axes.text(1.01, y, found, transform=in_margin, color=_PLANTED, fontsize=12, va="center")


def _draw_axes(axes: Any, report: Report, rows: Sequence[Row]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import StrMethodFormatter

    axes.set_xlabel(f"position in the context: {report.tokens:,} tokens of {Path(report.source).name}", fontsize=13)
    axes.set_ylabel("query", fontsize=13)
    axes.set_xlim(0, report.tokens)
    axes.set_ylim(len(rows) - 0.5, -0.65)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(axis="x", labelsize=12)
    axes.tick_params(axis="y", length=0)
    axes.set_yticks(range(len(rows)), [_label(row.passage.text) for row in rows], fontsize=11)
    best, chosen = (Line2D([], [], color=color, linewidth=3) for color in (_BEST, _CHOSEN))
    planted = Line2D([], [], color=_PLANTED, marker="v", linestyle="", markersize=10)
    labels = [f"its {_NUM_BEST} best entries", "the others it chose", "planted sentence it asks for, and its rank"]
    axes.legend(
        [best, chosen, planted], labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=12
    )


def _label(text: str) -> str:
    wrapped = textwrap.wrap(text, _LABEL_WIDTH, max_lines=_LABEL_LINES, placeholder=" …")
    return "\n".join(wrapped).replace("$", r"\$")  # a pair of them would be read as a formula
