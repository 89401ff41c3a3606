"""Sequences whose keys are shared out over ranks, as a user of context parallel shares them out; on any device."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_indexer import (
    CacheSchema,
    ContiguousShard,
    IndexerView,
    InterleavedShard,
    PagedPool,
    QuantizedQuery,
    append_entries,
    merge_topk,
    quantize_query,
    score_topk,
)
from lightning_indexer.ops.shard import INT32_MAX, Shard

ENTRIES_PER_BLOCK = 16
SECONDS = 100  # until a process that hangs is given up
WHOLE = InterleavedShard(rank=0, num_ranks=1)

Layout = Callable[[int, int, Tensor], Shard]  # of (rank, ranks, int32 lengths of the sequences)


def interleaved(interleave: int) -> Layout:
    return lambda rank, ranks, lens: InterleavedShard(rank, ranks, interleave)


def contiguous(part: Callable[[int], int]) -> Layout:
    """Rank r holds part(r) of part(0) + part(1) + ... parts of each sequence, and the last rank what may follow."""

    def layout(rank: int, ranks: int, lens: Tensor) -> Shard:
        parts = [part(r) for r in range(ranks)]
        start, stop = (lens * sum(parts[:r]) // sum(parts) for r in (rank, rank + 1))
        return ContiguousShard(start.int(), INT32_MAX if rank == ranks - 1 else stop.int())

    return layout


LAYOUTS: dict[str, Layout] = {
    "contiguous": contiguous(lambda rank: 1),
    "contiguous-uneven": contiguous(lambda rank: rank + 1),
    "contiguous-every-other-empty": contiguous(lambda rank: rank % 2),
    "round-robin": interleaved(1),
    "interleaved-5": interleaved(5),
    "interleaved-blocks": interleaved(ENTRIES_PER_BLOCK),
    "interleaved-64": interleaved(64),  # over 8 ranks more than the longest sequence: some have nothing
}


@dataclass(frozen=True)
class Sequences:
    """Keys, queries and lengths, the same wherever they are made.

    Args:
        lens: entries of each sequence.
        distinct_keys: how many different keys there are (1: all scores of a query are equal); None: all differ.
        queries: (sequence, valid length) of each.
    """

    format: str
    lens: Sequence[int] = (211, 0, 97)
    distinct_keys: int | None = None
    queries: Sequence[tuple[int, int]] = ((0, 211), (0, 210), (2, 97), (0, 1), (1, 0), (2, 18), (0, 128))
    num_heads: int = 8

    def view(self, layout: Layout, rank: int, ranks: int, device: str = "cpu") -> IndexerView:
        """What one rank keeps of the keys."""
        generator = torch.Generator().manual_seed(1)
        num_blocks = sum(self.lens) // ENTRIES_PER_BLOCK + len(self.lens)
        schema = CacheSchema(self.format, ENTRIES_PER_BLOCK)
        pool = PagedPool(schema, num_blocks, max_seqs=len(self.lens), device=device)
        view = IndexerView(pool.storage, pool.schema, pool.block_table)
        for seq_id, length in enumerate(self.lens):
            num_entries = torch.tensor([length], dtype=torch.int32, device=device)
            shard = layout(rank, ranks, num_entries)
            pool.alloc(seq_id, int(shard.local_valid_lens(num_entries)))
            keys = torch.randn(self.distinct_keys or length, schema.dim, generator=generator)
            if self.distinct_keys is not None:
                keys = keys[torch.randint(self.distinct_keys, (length,), generator=generator)]
            local = shard.local_indices(torch.arange(length, dtype=torch.int32, device=device).unsqueeze(0))
            slots = view.slots(torch.tensor([seq_id], device=device), local)[0]
            append_entries(keys.to(device), view, slots)
        return view

    def query(self, device: str = "cpu") -> tuple[Tensor | QuantizedQuery, Tensor]:
        generator = torch.Generator().manual_seed(2)
        shape = (len(self.queries), self.num_heads, 128)
        q = torch.randn(shape, generator=generator).to(device)
        weights = torch.randn(shape[:2], generator=generator).to(device)
        return quantize_query(q, self.format) if self.format != "bf16" else q.bfloat16(), weights

    def rows(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """int32 [T] each: sequences, valid lengths, and how long the sequences are."""
        seq_ids, valid_lens = torch.tensor(self.queries, dtype=torch.int32).unbind(1)
        lens = torch.tensor(self.lens, dtype=torch.int32)[seq_ids]
        return seq_ids.to(device), valid_lens.to(device), lens.to(device)

    def candidates(
        self, layout: Layout, rank: int, ranks: int, top_k: int, device: str = "cpu", **options: object
    ) -> tuple[Tensor, Tensor]:
        """One rank's selection, with the sequence's indices."""
        seq_ids, valid_lens, lens = self.rows(device)
        shard = layout(rank, ranks, lens)
        indices, scores = score_topk(
            *self.query(device),
            self.view(layout, rank, ranks, device),
            top_k=top_k,
            valid_lens=shard.local_valid_lens(valid_lens),
            seq_ids=seq_ids,
            return_scores=True,
            **{"order": "score", **options},
        )
        return shard.global_indices(indices), scores

    def merged_here(self, layout: Layout, ranks: int, top_k: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """All ranks' selections, merged without a group."""
        parts = [self.candidates(layout, rank, ranks, top_k, device) for rank in range(ranks)]
        return merge_topk(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)), top_k=top_k)

    def whole(self, top_k: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """The selection without shards."""
        seq_ids, valid_lens, _ = self.rows(device)
        view = self.view(lambda rank, ranks, lens: WHOLE, 0, 1, device)
        options = {"top_k": top_k, "order": "score", "return_scores": True}
        return score_topk(*self.query(device), view, valid_lens=valid_lens, seq_ids=seq_ids, **options)


CASES = {
    "mxfp4": Sequences("mxfp4"),
    "fp8-plateaus": Sequences("fp8", distinct_keys=4),
    "mxfp4-plateaus": Sequences("mxfp4", distinct_keys=4),
    "bf16-all-equal": Sequences("bf16", distinct_keys=1),
}


def torchrun(script: Path, *arguments: str) -> str:
    """What a script prints on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), *arguments], env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
