"""A benchmark run as a person reads it."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from lightning_indexer.bench.plot import label, readable_bytes, readable_seconds


def line(record: dict[str, Any]) -> str:
    """One finished case."""
    parts = [f"{record['case']}: {readable_seconds(record['median_s'])}"]
    for name, peer in record["peers"].items():
        parts.append(f"{name} {readable_seconds(peer['median_s'])} ({peer['time_ratio']:.1f} x)")
    parts += [f"{name} skipped: {reason}" for name, reason in record["peers_skipped"].items()]
    return ", ".join(parts)


def table(records: Sequence[dict[str, Any]]) -> Table:
    """All cases: median time, rate, rise of memory, and each peer's ratios."""
    first = records[0]
    result = Table(title=f"score_topk, {first['device']}, {first['threads']} threads", title_justify="left", box=None)
    result.add_column("queries x entries")
    for name in ("time", "GFLOP/s", "memory"):
        result.add_column(name, justify="right")
    names = dict.fromkeys(name for record in records for name in record["peers"])
    for name in names:
        result.add_column(name, justify="right")
        result.add_column("memory", justify="right")
    for record in records:
        result.add_row(
            label(record),
            readable_seconds(record["median_s"]),
            f"{record['gflops']:.0f}",
            readable_bytes(record["peak_extra_bytes"]),
            *(cell for name in names for cell in _peer_cells(record["peers"].get(name))),
        )
    return result


def _peer_cells(peer: dict[str, Any] | None) -> tuple[str, str]:
    if peer is None:
        return "", ""
    ratio = peer["memory_ratio"]
    return (
        f"{readable_seconds(peer['median_s'])}\n{peer['time_ratio']:.1f} x",
        readable_bytes(peer["peak_extra_bytes"]) + ("" if ratio is None else f"\n{ratio:.0f} x"),
    )
