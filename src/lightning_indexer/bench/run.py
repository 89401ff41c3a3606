"""Run the grid: check each case, time it, write a JSON line for it."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import lightning_indexer
from lightning_indexer.bench import memory
from lightning_indexer.bench.agreement import compare
from lightning_indexer.bench.cases import Case, Operands, make_operands
from lightning_indexer.bench.peers import peer
from lightning_indexer.ops.score_topk import score_topk

_CHECKED_ROWS = 4


@dataclass
class Timing:
    """Seconds of each repetition after one warm-up, and the rise of resident memory in the worst of them."""

    seconds: list[float] = field(default_factory=list)
    rise: int | None = None

    @property
    def median(self) -> float:
        return median(self.seconds)

    def add(self, run: Callable[[], object]) -> None:
        with memory.watch() as use:
            start = time.perf_counter()
            run()
            self.seconds.append(time.perf_counter() - start)
        if use.rise is not None:
            self.rise = max(self.rise or 0, use.rise)

    def record(self) -> dict[str, Any]:
        return {
            "median_s": self.median,
            "min_s": min(self.seconds),
            "max_s": max(self.seconds),
            "repeats": len(self.seconds),
            "peak_extra_bytes": self.rise,
        }


def run_grid(cases: Sequence[Case], *, peers: Sequence[str] = (), repeats: int = 5) -> Iterator[dict[str, Any]]:
    """Yield a JSON-able record per case: shape, machine, our times, each peer's times and the ratios.

    Raises:
        AssertionError: a case gives a wrong selection; nothing is timed on red.
    """
    machine = machine_record()
    for case in cases:
        operands = make_operands(case)
        check(case, operands)
        yield {"case": case.name, **asdict(case), **machine, **_time(case, operands, peers, repeats)}


def check(case: Case, operands: Operands) -> None:
    """Compare a few rows of each sequence with float64."""
    indices = _select(case, operands)
    for seq_id in range(case.num_seqs):
        first = seq_id * case.tokens
        rows = slice(first, first + min(_CHECKED_ROWS, case.tokens))
        agreement = compare(
            operands.q[rows],
            operands.weights[rows],
            operands.view,
            indices[rows],
            num_entries=case.entries,
            seq_id=seq_id,
        )
        right = f"{agreement.agreeing} of {agreement.choices} choices agree with float64"
        assert agreement.complete, f"{case.name}, sequence {seq_id}: {right}"


def _select(case: Case, operands: Operands) -> Tensor:
    return score_topk(
        operands.query,
        operands.weights,
        operands.view,
        top_k=case.top_k,
        valid_lens=operands.valid_lens,
        seq_ids=operands.seq_ids,
    )


def _time(case: Case, operands: Operands, peers: Sequence[str], repeats: int) -> dict[str, Any]:
    """Our times and the peers', taken in turns so that a slow moment of the machine hits all of them."""
    runs: dict[str, Callable[[], object]] = {"ours": lambda: _select(case, operands)}
    skipped = {}
    for name in peers:
        try:
            runs[name] = peer(name, case, operands)
        except (MemoryError, ModuleNotFoundError) as error:
            skipped[name] = str(error)
    timings = {name: Timing() for name in runs}
    for name, run in runs.items():
        if name == "ours" or case.dense_bytes < 2**26:  # a peer's long first run is its warm-up and its price
            run()
    for _ in range(repeats):
        for name, run in runs.items():
            timings[name].add(run)
    best = timings.pop("ours")
    return {
        **best.record(),
        "gflops": case.flop / best.median / 1e9,
        "dense_score_bytes": case.dense_bytes,
        "peers": {
            name: {
                **timing.record(),
                "time_ratio": timing.median / best.median,
                "memory_ratio": timing.rise / max(best.rise, 1) if timing.rise and best.rise is not None else None,
            }
            for name, timing in timings.items()
        },
        "peers_skipped": skipped,
    }


def machine_record() -> dict[str, Any]:
    """What a reader needs to judge a time."""
    return {
        "device": _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "version": lightning_indexer.__version__,
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """One JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The checkout's commit, with a + where files differ from it; None for an installed package."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except OSError:
        return None
    return done.stdout.strip() or None
