"""A GPU run as a person reads it."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from lightning_indexer.bench.plot import readable_bytes

_VERDICT_STYLES = {"goal": "bold green", "floor": "green", "missed": "bold red"}


def line(record: dict[str, Any]) -> str:
    """One finished case."""
    spread = "{} to {}".format(*(readable_us(record["graph_cold_us"][name]) for name in ("p10", "p90")))
    parts = [f"{record['case']}: {readable_us(record['median_us'])} ({spread})", *rates(record)]
    for name, peer in record.get("peers", {}).items():
        memory = readable_bytes(peer["peak_extra_bytes"])
        parts.append(f"{name} {readable_us(peer['median_us'])} ({peer['time_ratio']:.1f} x) and {memory}")
    parts += [f"{name} skipped: {reason}" for name, reason in record.get("peers_skipped", {}).items()]
    return ", ".join(parts)


def table(records: Sequence[dict[str, Any]]) -> Table:
    """All cases: times, what they are of what the hardware gives, targets, memory and the two-step way beside it."""
    first = records[0]
    ceilings = first["ceilings"]
    title = (
        f"{first['device']}, driver {first['driver']}, torch {first['torch']}; "
        f"reading {ceilings['read_gb_s']:,.0f} GB/s, copying {ceilings['copy_gb_s']:,.0f} GB/s"
    )
    result = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    result.add_column("case", no_wrap=True)
    for name in ("cold", "warm", "eager", "host", "rate", "target", "MiB", "two-step"):
        result.add_column(name, justify="right", no_wrap=True)
    for record in records:
        result.add_row(
            label(record).replace("\n", ", "),
            readable_us(record["graph_cold_us"]["median"]),
            readable_us(record["graph_warm_us"]["median"]),
            readable_us(record["eager_cold_us"]["median"]),
            readable_us(record["host_us"]["median"]),
            rates(record)[0],
            _target(record),
            _memory(record),
            _two_step(record),
        )
    result.caption = (
        "cold, warm: CUDA-graph replay; eager: from an idle device, cold. host: what an eager call keeps "
        "the host, of many in a row, with memory given. MiB: what a call allocates with and without "
        "memory given to it. two-step: plain PyTorch's time over ours. The rate of append is that of calls in a row."
    )
    result.caption_justify = "left"
    return result


def label(record: dict[str, Any]) -> str:
    """A case in two short lines."""
    kind = record["kind"]
    if kind == "append":
        return f"append {record['count']:,}\n{record['format']}, {'in order' if record['in_order'] else 'random'}"
    if kind == "gather":
        return f"gather {record['tokens']}x{record['top_k']}\n{record['format']}"
    shape = f"{record['num_seqs']}x{record['tokens']}" if kind == "decode" else str(record["tokens"])
    query = "" if record["query_format"] == record["format"] else f"/{record['query_format']}"
    engine = "" if record["engine"] == "auto" else f", {record['engine']}"
    return f"{kind} {shape} x {record['entries']:,}\n{record['format']}{query}, k={record['top_k']}{engine}"


def rates(record: dict[str, Any]) -> list[str]:
    """What the time comes to, against the ceiling that matters for the kind of case."""
    if record["kind"] == "decode":
        return [f"{record['percent_of_read']:.0f} % read"]
    if record["kind"] == "prefill":
        return [f"{record['tflops']:,.0f} TFLOP/s"]
    rate = f"{record['percent_of_copy']:.0f} % copy"
    same = f"{record['percent_of_same_copy']:.0f} % of a copy of its size"
    if "in_a_row_us" not in record:
        return [rate, same]
    row = f"by {record['calls_in_a_row']} in a row, {readable_us(record['in_a_row_us'])} each"
    return [rate, row, f"one call {same}"]


def readable_us(value: float) -> str:
    """Microseconds, milliseconds or seconds, with three digits."""
    for limit, factor, unit in ((1e3, 1.0, "us"), (1e6, 1e3, "ms"), (float("inf"), 1e6, "s")):
        if value < limit:
            number = value / factor
            return f"{number:.{0 if number >= 100 else 1 if number >= 10 else 2}f} {unit}"
    raise AssertionError(f"every time is below infinity, got {value}")


def _target(record: dict[str, Any]) -> str:
    """What was met, or missed, and its limit."""
    verdict = record["verdict"]
    if verdict is None:
        return ""
    name = "goal" if verdict == "goal" else "floor"
    target = record.get("target_us")
    limit = readable_us(target[name]) if target else f"{record['target_percent'][name]:.0f} %"
    return f"[{_VERDICT_STYLES[verdict]}]{verdict} {limit}[/]"


def _memory(record: dict[str, Any]) -> str:
    names = [name for name in ("peak_given_bytes", "peak_alone_bytes") if name in record]
    return ", ".join(f"{record[name] / 2**20:,.1f}" if record[name] else "0" for name in names)


def _two_step(record: dict[str, Any]) -> str:
    peer = record.get("peers", {}).get("two_step")
    return "" if peer is None else f"{peer['time_ratio']:.1f} x"
