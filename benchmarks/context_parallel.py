"""Time context-parallel selection: each rank selects on its shard, candidates are exchanged, every rank merges them.

    torchrun --nproc-per-node 8 benchmarks/context_parallel.py            # NCCL, one GPU for each rank
    torchrun --nproc-per-node 2 benchmarks/context_parallel.py --quick    # gloo, where there is no GPU

Every rank makes all keys from one seed, keeps its shard of their bytes, and compares each merged selection bit for bit
with its own of the whole before anything is timed. Rank 0 writes a JSON line per case and layout. Times are in
microseconds, of each repetition on the slowest rank; ranks meet before each:

    whole      score_topk without shards, on one device
    local      score_topk on a shard
    exchange   all_gather of 8 bytes per candidate
    merge      merge_topk of all ranks' candidates, already gathered
    together   local, global indices, exchange and merge

On a GPU, "graph" is the replay of a CUDA graph and "eager" starts on an idle device, both with a cold L2 cache.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast; before NCCL reads it

import torch
import torch.distributed as dist
from torch import Tensor

import lightning_indexer
from lightning_indexer import (
    ContiguousShard,
    IndexerView,
    InterleavedShard,
    merge_topk,
    score_topk,
    score_topk_workspace_bytes,
)
from lightning_indexer.bench.cuda.cases import ScoringCase
from lightning_indexer.bench.cuda.gpu import Gpu, Spread
from lightning_indexer.bench.cuda.operands import ScoringOperands, make_scoring
from lightning_indexer.bench.run import commit, machine_record
from lightning_indexer.ops.merge import all_gather_single

Shard = InterleavedShard | ContiguousShard
Candidates = tuple[Tensor, Tensor]  # indices and scores

GRID = tuple(
    ScoringCase("decode", 1, num_seqs, entries, top_k=top_k)
    for num_seqs, entries in ((1, 1_048_576), (16, 262_144))
    for top_k in (512, 1_024)
)
QUICK_GRID = (
    ScoringCase("decode", 1, 1, 6_000, top_k=64),
    ScoringCase("decode", 2, 3, 500, top_k=512),  # more than there are
)


def even(rank: int, ranks: int) -> int:
    return 1


def growing(rank: int, ranks: int) -> int:
    return rank + 1


def first_empty(rank: int, ranks: int) -> int:
    return int(rank > 0 or ranks == 1)


def contiguous(part: Callable[[int, int], int]) -> Callable[[int, int, int], Shard]:
    """Rank r holds part(r, ranks) of all ranks' parts."""

    def layout(rank: int, ranks: int, entries: int) -> Shard:
        parts = [part(r, ranks) for r in range(ranks)]
        start, stop = (entries * sum(parts[:r]) // sum(parts) for r in (rank, rank + 1))
        return ContiguousShard(start, stop)

    return layout


LAYOUTS: dict[str, Callable[[int, int, int], Shard]] = {
    "contiguous": contiguous(even),
    "contiguous-uneven": contiguous(growing),
    "contiguous-first-empty": contiguous(first_empty),
    "round-robin": lambda rank, ranks, entries: InterleavedShard(rank, ranks),
    "interleaved-64": lambda rank, ranks, entries: InterleavedShard(rank, ranks, 64),
}


class Cpu:
    """What `Gpu` does here, on a CPU, where there are no graphs."""

    device = torch.device("cpu")
    modes = ("eager",)

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats

    def time(self, run: Callable[[], object], mode: str) -> Spread:
        run()
        return Spread(tuple(self._once(run) for _ in range(self.repeats)))

    def describe(self) -> dict[str, Any]:
        return machine_record()

    def _once(self, run: Callable[[], object]) -> float:
        dist.barrier()
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e6


class Cuda:
    """One GPU. The number of repetitions is given, because ranks must not differ in it."""

    modes = ("graph", "eager")

    def __init__(self, repeats: int) -> None:
        met = torch.zeros(1, device="cuda")
        self._gpu = Gpu(repeats, meet=lambda: dist.all_reduce(met))
        self.device = self._gpu.device

    def time(self, run: Callable[[], object], mode: str) -> Spread:
        return self._gpu.time(run, graph=mode == "graph", cold=True)

    def describe(self) -> dict[str, Any]:
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        own = {"version": lightning_indexer.__version__, "commit": commit(), "time": started}
        return {**self._gpu.describe(), "nccl": ".".join(map(str, torch.cuda.nccl.version())), **own}


@dataclass(frozen=True, eq=False)
class Rank:
    """One rank's part of a case, and the steps that are timed."""

    case: ScoringCase
    operands: ScoringOperands
    shard: Shard
    view: IndexerView
    local_lens: Tensor
    found: Candidates  # given memory, this rank's numbering
    merged: Candidates
    workspace: Tensor

    @classmethod
    def make(cls, case: ScoringCase, operands: ScoringOperands, shard: Shard) -> "Rank":
        sizes = {"num_heads": case.num_heads, "head_dim": case.head_dim, "top_k": case.top_k}
        needed = score_topk_workspace_bytes(**sizes, device=operands.device)
        return cls(
            case,
            operands,
            shard,
            held(operands.view, shard, case.entries),
            shard.local_valid_lens(operands.valid_lens),
            outputs(case, operands.device),
            outputs(case, operands.device),
            torch.empty(needed, dtype=torch.uint8, device=operands.device),
        )

    def whole(self) -> Candidates:
        return self._select(self.operands.view, self.operands.valid_lens)

    def local(self) -> Candidates:
        return self._select(self.view, self.local_lens)

    def together(self) -> Candidates:
        indices, scores = self.local()
        return self._merge((self.shard.global_indices(indices), scores), dist.group.WORLD)

    def merge(self, gathered: Candidates) -> Candidates:
        return self._merge(gathered, None)

    def poison(self) -> None:
        """Forget what an earlier step wrote: it may be the right answer."""
        for indices, scores in (self.found, self.merged):
            indices.fill_(-2)
            scores.fill_(torch.nan)

    def _select(self, view: IndexerView, valid_lens: Tensor) -> Candidates:
        out, scores_out = self.found
        return score_topk(
            self.operands.query,
            self.operands.weights,
            view,
            top_k=self.case.top_k,
            valid_lens=valid_lens,
            seq_ids=self.operands.seq_ids,
            order="score",
            return_scores=True,
            out=out,
            scores_out=scores_out,
            workspace=self.workspace,
        )

    def _merge(self, candidates: Candidates, group: dist.ProcessGroup | None) -> Candidates:
        out, scores_out = self.merged
        return merge_topk(*candidates, top_k=self.case.top_k, group=group, out=out, scores_out=scores_out)


def outputs(case: ScoringCase, device: torch.device) -> Candidates:
    shape = (case.num_queries, case.top_k)
    return torch.empty(shape, dtype=torch.int32, device=device), torch.empty(shape, device=device)


def held(view: IndexerView, shard: Shard, entries: int) -> IndexerView:
    """A copy of the bytes that a rank keeps of each sequence, in blocks of its own, at least one."""
    device, per_block = view.device, view.schema.entries_per_block
    count = int(shard.local_valid_lens(torch.tensor([entries], dtype=torch.int32)))
    local = torch.arange(count, dtype=torch.int32, device=device).unsqueeze(0)
    num_blocks = max(-(-count // per_block), 1)
    storage = torch.zeros(view.num_seqs * num_blocks, view.schema.stride, dtype=torch.uint8, device=device)
    table = torch.arange(len(storage), dtype=torch.int32, device=device).view(view.num_seqs, num_blocks)
    kept = IndexerView(storage, view.schema, table)
    for seq_id in torch.arange(view.num_seqs, device=device).split(1):
        source = view.slots(seq_id, shard.global_indices(local))[0]
        target = kept.slots(seq_id, local)[0]
        for rows, kept_rows in ((view.data_rows, kept.data_rows), (view.scale_rows, kept.scale_rows)):
            kept_rows[target // per_block, target % per_block] = rows[source // per_block, source % per_block]
    return kept


def run_layout(case: ScoringCase, operands: ScoringOperands, shard: Shard, machine: Cpu | Cuda) -> dict[str, Any]:
    """Check, then time.

    Raises:
        AssertionError: the merged selection is not that of the whole.
    """
    rank = Rank.make(case, operands, shard)
    want = [x.clone() for x in rank.whole()]
    rank.poison()
    check(case, want, rank.together(), "together")
    local_indices, scores = rank.local()
    gathered = (beside_others(shard.global_indices(local_indices)), beside_others(scores))
    rank.poison()
    check(case, want, rank.merge(gathered), "gathered, then merged")
    packed = torch.empty(case.num_queries, case.top_k, dtype=torch.int64, device=operands.device)
    steps: dict[str, Callable[[], object]] = {
        "whole": rank.whole,
        "local": rank.local,
        "exchange": Exchange(packed),
        "merge": lambda: rank.merge(gathered),
        "together": rank.together,
    }
    times = {
        f"{mode}_us": {name: on_slowest_rank(machine.time(step, mode)).record() for name, step in steps.items()}
        for mode in machine.modes
    }
    check(case, want, rank.merged, "timed")  # by the last step
    return {"exchanged_bytes_per_rank": packed.nbytes, **times}


class Exchange:
    """The collective of `merge_topk`, into the same memory every time."""

    def __init__(self, packed: Tensor) -> None:
        self._packed = packed
        self._gathered = packed.new_empty(dist.get_world_size() * len(packed), packed.shape[1])

    def __call__(self) -> Tensor:
        all_gather_single(self._gathered, self._packed)
        return self._gathered


def beside_others(tensor: Tensor) -> Tensor:
    """All ranks' [T, k] as [T, ranks * k]."""
    gathered = Exchange(tensor)()
    return gathered.view(-1, *tensor.shape).transpose(0, 1).flatten(1)


def check(case: ScoringCase, want: list[Tensor], got: Candidates, what: str) -> None:
    for name, w, g in zip(("indices", "scores"), want, got, strict=True):
        wrong = (w.view(torch.int32) != g.view(torch.int32)).nonzero()
        place = wrong[0].tolist() if len(wrong) else None
        assert not len(wrong), f"{case.name}, rank {dist.get_rank()}, {what}: {len(wrong)} {name} differ, first {place}"


def on_slowest_rank(spread: Spread) -> Spread:
    """Of every repetition: a step has been taken when all ranks have taken it."""
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, spread.times)
    return Spread(tuple(max(times) for times in zip(*of_ranks, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time context-parallel selection; start it with torchrun.")
    parser.add_argument("--quick", action="store_true", help="two small cases")
    parser.add_argument("--repeats", type=int, help="default: 50 on GPUs, 5 on CPUs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("bench-output/context_parallel.jsonl"))
    options = parser.parse_args()
    machine = start(options.device, options.repeats)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    shared = {"world_size": ranks, "backend": dist.get_backend(), **machine.describe()}
    records = []
    for case in QUICK_GRID if options.quick else GRID:
        operands = make_scoring(case, machine.device)
        for layout, make in LAYOUTS.items():
            shards = [make(r, ranks, case.entries) for r in range(ranks)]
            entries = torch.tensor([case.entries], dtype=torch.int32)
            lens = [int(shard.local_valid_lens(entries)) for shard in shards]
            record = {"case": case.name, "layout": layout, "local_entries": lens, **asdict(case), **shared}
            records.append(record | run_layout(case, operands, shards[rank], machine))
            if rank == 0:
                print(summary(records[-1]), flush=True)
    if rank == 0:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def start(device: str, repeats: int | None) -> Cpu | Cuda:
    """Join the group of all ranks."""
    if device == "cpu":
        dist.init_process_group("gloo")
        return Cpu(repeats or 5)
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    return Cuda(repeats or 50)


def summary(record: dict[str, Any]) -> str:
    medians = (
        f"{mode.removesuffix('_us')}: "
        + ", ".join(f"{name} {spread['median']:.1f}" for name, spread in record[mode].items())
        for mode in ("graph_us", "eager_us")
        if mode in record
    )
    return f"{record['case']} {record['layout']} over {record['world_size']} ranks, us; {'; '.join(medians)}"


if __name__ == "__main__":
    main()
