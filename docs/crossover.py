"""Write the tables of when-not-to-use-it.md from the measurements in benchmarks/results/.

    python docs/crossover.py

`make docs` does so too, and a test fails while the page holds anything else.
"""

import json
from pathlib import Path

DOCS = Path(__file__).parent
PAGE = DOCS / "when-not-to-use-it.md"
RESULTS = DOCS.parent / "benchmarks" / "results"
EQUAL = 1.1  # times whose ratio is below this are called equal: the repetitions of one case differ by as much


def cpu_table(records: list[dict]) -> list[str]:
    """Every case beside transformers' eager indexer."""
    rows = ["| queries x entries | keys, k | `score_topk` | transformers, eager | less time |", "|---|---|---|---|---|"]
    for record in records:
        ours, theirs = record["median_s"], record["peers"]["transformers"]["median_s"]
        cells = (shape(record), keys(record), time(ours), time(theirs), winner(ours, theirs, "transformers"))
        rows.append(f"| {' | '.join(cells)} |")
    first = records[0]
    return [f"{first['cores']} cores of an {first['device']}, torch {first['torch']}, {origin(first)}:", "", *rows]


def cuda_table(records: list[dict]) -> list[str]:
    """mxfp4 with k=512 beside two steps of PyTorch: replayed from a graph, and called eagerly."""
    rows = [
        "| queries x entries | `score_topk`, graph | PyTorch | less time | `score_topk`, eager | less time |",
        "|---|---|---|---|---|---|",
    ]
    wanted = [r for r in records if r.get("query_format") == r["format"] == "mxfp4" and r["top_k"] == 512]
    for record in wanted:
        if "two_step" not in record["peers"]:
            continue
        graph, eager = (record[name]["median"] / 1e6 for name in ("graph_cold_us", "eager_cold_us"))
        peer = record["peers"]["two_step"]
        theirs, mode = peer["median_us"] / 1e6, peer["mode"]
        times = (time(graph), f"{time(theirs)}, {mode}", winner(graph, theirs, "PyTorch"), time(eager))
        rows.append(f"| {' | '.join((shape(record), *times, winner(eager, theirs, 'PyTorch')))} |")
    first = wanted[0]
    return [f"One {first['device']}, torch {first['torch']}, cold L2 cache, {origin(first)}:", "", *rows]


TABLES = {"cpu.jsonl": cpu_table, "cuda.jsonl": cuda_table}


def shape(record: dict) -> str:
    seqs = f" ({record['num_seqs']} sequences)" if record["num_seqs"] > 1 else ""
    return f"{record['num_seqs'] * record['tokens']:,} x {record['entries']:,}{seqs}"


def keys(record: dict) -> str:
    return f"{record['format']}, {record['top_k']:,}"


def origin(record: dict) -> str:
    return f"commit {record['commit']}"


def time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= 0.9995 * size or unit == "us":
            return f"{seconds / size:.3g} {unit}"
    raise AssertionError("us take what is left")


def winner(ours: float, theirs: float, name: str) -> str:
    """Which takes less time, in bold where it is not this library."""
    if max(ours, theirs) < EQUAL * min(ours, theirs):
        return "**equal**"
    return f"**{name}, {ours / theirs:.1f} x**" if theirs < ours else f"`score_topk`, {theirs / ours:.1f} x"


def filled(text: str, folder: Path = RESULTS) -> str:
    """The page with its tables made anew."""
    for name, table in TABLES.items():
        records = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        assert text.count(begin) == text.count(end) == 1, f"{PAGE.name} must say once where {name} goes"
        before, rest = text.split(begin)
        text = before + begin + "\n" + "\n".join(table([r for r in records if "entries" in r])) + "\n\n" + end
        text += rest.split(end)[1]
    return text


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
