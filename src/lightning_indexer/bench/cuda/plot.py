"""A picture of a GPU run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_indexer.bench.cuda.screen import label, rates, readable_us

_OURS = "lightning-indexer"


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Horizontal bars of time per case, peers beside ours, targets as ticks; and of our share of the memory's speed.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(15, 1.8 + 0.55 * len(records)), sharey=True, width_ratios=(3, 1), layout="constrained"
    )
    names = [_OURS, *dict.fromkeys(name for record in records for name in record.get("peers", {}))]
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        shown = [(y, time) for y, record in enumerate(records) if (time := _time(record, name)) is not None]
        offset = (i - (len(names) - 1) / 2) * height
        where, times = [y + offset for y, _ in shown], [time for _, time in shown]
        bars = left.barh(where, times, height=height, label=name)
        left.bar_label(bars, [readable_us(time) for time in times], padding=3, fontsize=7)
    _draw_targets(left, records, -(len(names) - 1) / 2 * height)
    left.set_xscale("log")
    left.set_xlim(right=left.get_xlim()[1] * 2)  # room for the labels
    left.set_xlabel("median time per call, CUDA-graph replay, cold L2 (us, log)")
    left.set_yticks(range(len(records)), [label(record) for record in records], fontsize=8)
    left.set_ylim(len(records) - 0.4, -0.6)
    left.grid(axis="x", alpha=0.3)
    left.legend(loc="upper right", fontsize=8)
    _draw_shares(right, records)
    first = records[0]
    figure.suptitle(f"{first['device']}, driver {first['driver']}, torch {first['torch']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _time(record: dict[str, Any], name: str) -> float | None:
    where = record if name == _OURS else record.get("peers", {}).get(name)
    return None if where is None else float(where["median_us"])


def _draw_targets(axis: Any, records: Sequence[dict[str, Any]], offset: float) -> None:
    """Across our own bars."""
    for name, colour in (("floor", "tab:red"), ("goal", "tab:green")):
        shown = [(y, target[name]) for y, record in enumerate(records) if (target := record.get("target_us"))]
        where, limits = [y + offset for y, _ in shown], [limit for _, limit in shown]
        axis.scatter(limits, where, marker="|", s=260, linewidths=2, color=colour, label=name, zorder=3)


def _draw_shares(axis: Any, records: Sequence[dict[str, Any]]) -> None:
    """Decode against reading, gather and append against copying; prefill is bound by arithmetic and gets its rate.

    Append's share is that of calls in a row, the bar beside it one call.
    """
    for y, record in enumerate(records):
        share = record.get("percent_of_read" if record["kind"] == "decode" else "percent_of_copy", 0.0)
        axis.barh(y, share, height=0.5, color="tab:blue" if record["kind"] == "decode" else "tab:purple")
        axis.text(103, y, rates(record)[0], va="center", fontsize=8)
    axis.set_xlim(0, 150)
    axis.set_xticks(range(0, 101, 25))
    axis.axvline(100, color="black", linewidth=0.8)
    axis.set_xlabel("% of the measured ceiling\n(append: by calls in a row)")
    axis.grid(axis="x", alpha=0.3)
