"""The report as a person reads it in a terminal."""

import re

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lightning_indexer.demo.report import Example, Found, Planted, Report

PICTURE_HINT = "no picture: matplotlib is missing (pip install 'lightning-indexer[plots]')"

_TIME_UNITS = ((1, "s"), (1e3, "ms"), (1e6, "us"))
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def show(report: Report, console: Console) -> None:
    """Print the report."""
    console.print(_heading(report), Text(report.note, style="italic"), "", _facts(report), "", sep="\n")
    console.print(_planted_table(report.planted, report.entries), "")
    for example in report.examples:
        console.print(_example(example))
    picture = f"picture: {report.picture}" if report.picture else PICTURE_HINT
    console.print(Text(picture), soft_wrap=True)


def size(num_bytes: int | None) -> str:
    """A readable size in powers of 1000."""
    if num_bytes is None:
        return "unknown"
    value = float(num_bytes)
    for unit in _UNITS:
        if value < 999.5 or unit == _UNITS[-1]:
            break
        value /= 1000
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"


def duration(seconds: float) -> str:
    """A readable time, to three digits or so."""
    value, unit = next(((seconds * k, u) for k, u in _TIME_UNITS if seconds * k >= 1), (seconds * 1e6, "us"))
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def percent(part: int, whole: int) -> str:
    """A share in percent; only all of it is 100 %."""
    if part == whole:
        return "100 %"
    return f"{min(100 * part / whole, 99.99):.2f} %"


def agreement_line(report: Report) -> str:
    """The outcome of the check, in one sentence."""
    checked = report.agreement
    return (
        f"agreement with float64: {percent(checked.agreeing, checked.choices)} of "
        f"{checked.num_queries} x {checked.per_query} choices up to a score band of ±{checked.band:.1e}"
    )


def _heading(report: Report) -> Text:
    return Text.assemble(
        ("Lightning indexer demo", "bold"),
        f"  {report.num_queries:,} queries choose {report.top_k} entries each from {report.tokens:,} tokens "
        f"of {report.source}",
    )


def _facts(report: Report) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    for name, *lines in _fact_lines(report):
        table.add_row(name, Group(*lines))
    return table


def _fact_lines(report: Report) -> list[tuple[RenderableType, ...]]:
    return [
        ("Device", *_device_lines(report)),
        ("Context", *_context_lines(report)),
        ("Cache", *_cache_lines(report)),
        ("Time", *_time_lines(report)),
        ("Memory", *_memory_lines(report)),
        ("Exactness", Text(agreement_line(report), style="bold green" if report.agreement.complete else "bold red")),
        ("Attention", _attention_line(report)),
    ]


def _device_lines(report: Report) -> list[RenderableType]:
    note = [] if report.device_note is None else [Text(report.device_note, style="yellow")]
    return [Text(report.device_name), *note]


def _context_lines(report: Report) -> list[RenderableType]:
    repeated = f"the text has {report.source_tokens:,}, repeated in shuffled paragraphs"
    origin = repeated if report.source_tokens < report.tokens else "the beginning of the text"
    lines: list[RenderableType] = [
        f"{report.tokens:,} tokens ({origin})",
        f"{report.entries:,} entries, one per 4 tokens, each with the 4 tokens before",
    ]
    if report.top_k >= report.entries:
        lines.append(Text(f"every entry is chosen: top-k is {report.top_k} (use a smaller --top-k)", style="yellow"))
    return lines


def _cache_lines(report: Report) -> list[RenderableType]:
    cache = report.cache
    return [
        f"index keys {_against(cache.index_format, cache.index_bytes, cache.index_bf16_bytes)}",
        f"KV entries {_against(cache.kv_format, cache.kv_bytes, cache.kv_bf16_bytes)}",
    ]


def _time_lines(report: Report) -> list[RenderableType]:
    seconds = report.seconds
    per_query = duration(seconds.select / report.num_queries)
    lines: list[RenderableType] = [
        f"build {duration(seconds.build)} ({report.tokens / seconds.build:,.0f} tokens/s)",
        f"select {duration(seconds.select)} ({per_query} per query), gather and attend {duration(seconds.attend)}",
    ]
    if report.device == "cuda":
        lines.append(f"before that, kernels compiled or loaded in {duration(seconds.prepare)}")
    return lines


def _memory_lines(report: Report) -> list[RenderableType]:
    memory = report.memory
    queries, entries = report.num_queries, report.entries
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    table.add_row(Text(size(memory.select_rise), style="bold"), "more while selecting, measured")
    table.add_row(size(memory.dense_scores), f"float32 scores [{queries}, {entries}] would have taken")
    table.add_row(size(memory.eager_scores), f"eager scores [{queries}, {report.num_heads}, {entries}], before the sum")
    table.add_row(
        size(memory.prefill_eager_scores),
        f"the same for a prefill of all {report.tokens:,} tokens ({size(memory.prefill_dense_scores)} summed)",
    )
    whole = (
        "torch's allocations on the GPU"
        if report.device == "cuda"
        else "the whole process, torch and the text included"
    )
    table.add_row(size(memory.peak), f"peak of {whole}")
    return [table]


def _attention_line(report: Report) -> str:
    chosen = min(report.top_k, report.entries)
    share = 100 * report.attention_share
    return f"the {chosen} chosen entries hold {share:.1f} % of the attention weight of all {report.entries:,}"


def _against(format: str, num_bytes: int, bf16_bytes: int) -> str:
    ratio = f", {bf16_bytes / num_bytes:.1f} x smaller than bf16 ({size(bf16_bytes)})"
    return f"{format}: {size(num_bytes)}" + (ratio if num_bytes != bf16_bytes else "")


def _planted_table(planted: list[Planted], num_entries: int) -> Group:
    title = Text.assemble(
        ("Planted sentences", "bold"),
        f"  hidden once each and asked for in other words; rank among {num_entries:,} entries",
    )
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("rank", justify="right")
    table.add_column("at token", justify="right")
    table.add_column("what was hidden, and what was asked", ratio=1)
    for item in planted:
        colour = "green" if item.in_top_k else "red"
        words = Text.assemble(item.sentence, "\n", (item.query, "dim"))
        table.add_row(Text(f"{item.rank:,}", style=f"bold {colour}"), f"{item.first_token:,}", words)
    return Group(title, Padding(table, (0, 0, 0, 2)))


def _example(example: Example) -> Group:
    asked = "Question" if example.kind == "question" else "Piece of the text"
    title = Text.assemble((f"{asked}  ", "bold"), example.query)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(justify="right", style="cyan", no_wrap=True)
    table.add_column(ratio=1)
    for found in example.best:
        table.add_row(f"{found.score:.3f}", _found(found))
    return Group(title, Padding(table, (0, 0, 1, 2)))


def _found(found: Found) -> Text:
    """The entry's own tokens in bold, their neighbours dim."""
    before, text, after = (_shorten_rules(part) for part in (found.before, found.text, found.after))
    return Text.assemble(("…" + before, "dim"), (text, "bold"), (after + "…", "dim"))


def _shorten_rules(text: str) -> str:
    """Rows of one punctuation mark, such as the underlines of headings, cut to three."""
    return re.sub(r"([^\w\s])\1{3,}", r"\1\1\1", text)
