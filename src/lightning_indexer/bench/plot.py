"""A picture of a benchmark run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Horizontal bars of time and of extra memory per case, on logarithmic axes, peers beside ours.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 1.6 + 0.5 * len(records)), sharey=True)
    names = ["lightning-indexer", *dict.fromkeys(name for record in records for name in record["peers"])]
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        rows = [record if i == 0 else record["peers"].get(name) for record in records]
        where = [y + (i - (len(names) - 1) / 2) * height for y in range(len(records))]
        _bars(left, where, [row and row["median_s"] for row in rows], height, name, readable_seconds)
        _bars(right, where, [row and row["peak_extra_bytes"] for row in rows], height, name, readable_bytes)
    left.set_yticks(range(len(records)), [label(record) for record in records])
    left.invert_yaxis()
    left.set_xlabel("median time per call (s, log)")
    right.set_xlabel("rise of resident memory during the call (bytes, log)")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_xlim(right=axis.get_xlim()[1] * 8)  # room for the labels
        axis.grid(axis="x", alpha=0.3)
    right.legend(loc="upper center", bbox_to_anchor=(-0.05, 1.12), ncols=len(names), frameon=False)
    first = records[0]
    figure.suptitle(f"score_topk on {first['device']}, {first['threads']} threads", y=0.99)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def label(record: dict[str, Any]) -> str:
    """A case in two short lines."""
    sequences = f", {record['num_seqs']} sequences" if record["num_seqs"] > 1 else ""
    queries = record["tokens"] * record["num_seqs"]
    return f"{queries} x {record['entries']:,}{sequences}\n{record['format']}, k={record['top_k']}"


def readable_seconds(value: float) -> str:
    """Seconds or milliseconds."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def readable_bytes(value: float | None) -> str:
    """GiB or MiB."""
    if value is None:
        return "unknown"
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def _bars(axis: Any, where: list[float], values: list[Any], height: float, name: str, text: Any) -> None:
    shown = [(y, value) for y, value in zip(where, values, strict=True) if value]
    bars = axis.barh([y for y, _ in shown], [value for _, value in shown], height=height, label=name)
    axis.bar_label(bars, [text(value) for _, value in shown], padding=3, fontsize=8)
