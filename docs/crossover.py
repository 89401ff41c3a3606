"""Write the tables of pages from the measurements in benchmarks/results/.

    python docs/crossover.py

`make docs` does so too, and a test fails while a page holds anything else.
"""

import json
from pathlib import Path

DOCS = Path(__file__).parent
WHEN_NOT, LAYER, PARALLEL = DOCS / "when-not-to-use-it.md", DOCS / "layer.md", DOCS / "context-parallel.md"
RESULTS = DOCS.parent / "benchmarks" / "results"
EQUAL = 1.1  # times whose ratio is below this are called equal: the repetitions of one case differ by as much


def cpu_table(records: list[dict]) -> list[str]:
    """Every case beside transformers' eager indexer."""
    rows = ["| queries x entries | keys, k | `score_topk` | transformers, eager | less time |", "|---|---|---|---|---|"]
    for record in (r for r in records if "entries" in r):
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


def host_table(records: list[dict]) -> list[str]:
    """What an eager call keeps the host: the least and the median of the shortest calls on the device."""
    rows = ["| call, with memory given | host, median | host, 10 % |", "|---|---|---|"]
    for case in ("decode-1x1-entries8192-k512-mxfp4", "append-65536-mxfp4-in-order", "gather-64x512-fp8_ds_mla"):
        spread = next(r for r in records if r["case"] == case)["host_us"]
        rows.append(f"| `{case}` | {time(spread['median'] / 1e6)} | {time(spread['p10'] / 1e6)} |")
    return [f"The host of that {records[0]['device']}, {origin(records[0])}:", "", *rows]


def layer_table(records: list[dict]) -> list[str]:
    """A column for each case: a stage's time in a graph, with a cold L2 cache."""
    names = [record["case"].removeprefix("layer-") for record in records]
    rows = [f"| stage | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for stage in records[0]["stages_us"]:
        times = (time(record["stages_us"][stage]["graph_cold"]["median"] / 1e6) for record in records)
        rows.append(f"| {stage} | {' | '.join(times)} |")
    eager = (time(record["stages_us"]["whole step"]["eager"]["median"] / 1e6) for record in records)
    rows.append(f"| whole step, called eagerly | {' | '.join(eager)} |")
    begins = (time(record["begin_step_host_us"] / 1e6) for record in records)
    rows.append(f"| `begin_step`, on the host | {' | '.join(begins)} |")
    first = records[0]
    return [f"One {first['device']}, torch {first['torch']}, {origin(first)}:", "", *rows]


def parallel_table(records: list[dict]) -> list[str]:
    """Every case and layout: each step in a graph, and all of them called eagerly, beside one GPU without shards."""
    steps = ("whole", "local", "exchange", "merge", "together")
    names = ("queries x entries, k", "layout", "one GPU", *steps[1:], "one GPU, eager", "together, eager")
    rows = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for record in records:
        graph = (time(record["graph_us"][step]["median"] / 1e6) for step in steps)
        eager = (time(record["eager_us"][step]["median"] / 1e6) for step in ("whole", "together"))
        name = f"{shape(record)}, {record['top_k']:,}"
        rows.append(f"| {' | '.join((name, record['layout'], *graph, *eager))} |")
    first = records[0]
    machine = f"{first['world_size']} {first['device']}, NCCL {first['nccl']}, torch {first['torch']}"
    return [f"{machine}, cold L2 cache, {origin(first)}:", "", *rows]


# marker in the page -> page, measurements, table
TABLES = {
    "cpu.jsonl": (WHEN_NOT, "cpu.jsonl", cpu_table),
    "cuda.jsonl": (WHEN_NOT, "cuda.jsonl", cuda_table),
    "cuda.jsonl: host": (WHEN_NOT, "cuda.jsonl", host_table),
    "layer.jsonl": (LAYER, "layer.jsonl", layer_table),
    "context_parallel.jsonl": (PARALLEL, "context_parallel.jsonl", parallel_table),
}
PAGES = (WHEN_NOT, LAYER, PARALLEL)


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


def filled(page: Path) -> str:
    """A page with its tables made anew."""
    text = page.read_text(encoding="utf-8")
    for name, (where, file, table) in TABLES.items():
        if where != page:
            continue
        records = [json.loads(line) for line in (RESULTS / file).read_text(encoding="utf-8").splitlines()]
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        assert text.count(begin) == text.count(end) == 1, f"{page.name} must say once where {name} goes"
        before, rest = text.split(begin)
        text = before + begin + "\n" + "\n".join(table(records)) + "\n\n" + end + rest.split(end)[1]
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page), encoding="utf-8")
