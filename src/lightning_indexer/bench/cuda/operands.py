"""Seeded random operands, made on the device that will use them; keys and entries go through the real append path.

Sequences lie in permuted blocks: in a cache that has been in use, neighbours are not neighbours.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lightning_indexer.bench.cuda.cases import AppendCase, GatherCase, ScoringCase
from lightning_indexer.cache.schema import CacheSchema
from lightning_indexer.cache.view import IndexerView, KVView, PagedView
from lightning_indexer.formats import QUERY_FORMATS
from lightning_indexer.ops.append import append_entries
from lightning_indexer.query import QuantizedQuery, quantize_query

_CHUNK_VALUES = 2**25  # random values made at a time
_WEIGHT_SCALE = 64**-0.5 * 128**-0.5  # the factors that the model folds into the weights

View = TypeVar("View", bound=PagedView)


@dataclass(frozen=True, eq=False)
class ScoringOperands:
    """What `score_topk` is called with."""

    query: Tensor | QuantizedQuery
    weights: Tensor
    view: IndexerView
    valid_lens: Tensor
    seq_ids: Tensor

    @property
    def device(self) -> torch.device:
        return self.view.device


@dataclass(frozen=True, eq=False)
class GatherOperands:
    """What `gather_kv` is called with; a query's indices are distinct and ascend, as those of `score_topk` do."""

    view: KVView
    indices: Tensor
    seq_ids: Tensor


@dataclass(frozen=True, eq=False)
class AppendOperands:
    """What `append_entries` is called with; slots are distinct."""

    view: PagedView
    entries: Tensor
    slots: Tensor


def make_scoring(case: ScoringCase, device: torch.device) -> ScoringOperands:
    """Queries, weights and a filled cache."""
    generator = torch.Generator(device).manual_seed(0)
    view = filled_view(IndexerView, case.schema, case.num_seqs, case.entries, generator)
    shape = (case.num_queries, case.num_heads, case.head_dim)
    q = torch.randn(shape, generator=generator, device=device)
    return ScoringOperands(
        query=quantize_query(q, case.query_format) if case.query_format in QUERY_FORMATS else q.bfloat16(),
        weights=torch.randn(shape[:2], generator=generator, device=device) * _WEIGHT_SCALE,
        view=view,
        valid_lens=case.lens().to(device).repeat(case.num_seqs),
        seq_ids=torch.arange(case.num_seqs, dtype=torch.int32, device=device).repeat_interleave(case.tokens),
    )


def make_gather(case: GatherCase, device: torch.device) -> GatherOperands:
    """A filled cache and random indices."""
    generator = torch.Generator(device).manual_seed(0)
    view = filled_view(KVView, case.schema, case.tokens, case.entries, generator)
    drawn = torch.rand(case.tokens, case.entries, generator=generator, device=device).topk(case.top_k).indices
    return GatherOperands(
        view=view,
        indices=drawn.sort().values.to(torch.int32),
        seq_ids=torch.arange(case.tokens, dtype=torch.int32, device=device),
    )


def make_append(case: AppendCase, device: torch.device) -> AppendOperands:
    """Entries and slots for an empty cache."""
    generator = torch.Generator(device).manual_seed(0)
    kind = KVView if case.schema.format == "fp8_ds_mla" else IndexerView
    view = empty_view(kind, case.schema, 1, case.pool_entries, generator)
    if case.in_order:
        slots = _slots(view, 0, 0, case.count)
    else:
        slots = torch.randperm(case.pool_entries, generator=generator, device=device)[: case.count].clone()
    entries = torch.randn(case.count, case.head_dim, generator=generator, device=device).bfloat16()
    return AppendOperands(view, entries, slots)


def empty_view(kind: type[View], schema: CacheSchema, num_seqs: int, entries: int, generator: torch.Generator) -> View:
    """Room for `entries` entries of each of `num_seqs` sequences, in permuted blocks."""
    device = generator.device
    blocks_per_seq = -(-entries // schema.entries_per_block)
    num_blocks = num_seqs * blocks_per_seq
    storage = torch.zeros(num_blocks, schema.stride, dtype=torch.uint8, device=device)
    table = torch.randperm(num_blocks, generator=generator, device=device).to(torch.int32)
    return kind(storage, schema, table.view(num_seqs, blocks_per_seq))


def filled_view(kind: type[View], schema: CacheSchema, num_seqs: int, entries: int, generator: torch.Generator) -> View:
    """`num_seqs` sequences of `entries` random entries in permuted blocks."""
    view = empty_view(kind, schema, num_seqs, entries, generator)
    chunk = max(_CHUNK_VALUES // schema.dim, 1)
    for seq_id in range(num_seqs):
        for start in range(0, entries, chunk):
            slots = _slots(view, seq_id, start, min(start + chunk, entries))
            values = torch.randn(len(slots), schema.dim, generator=generator, device=generator.device)
            append_entries(values, view, slots)
    return view


def _slots(view: PagedView, seq_id: int, start: int, stop: int) -> Tensor:
    """Of a sequence's entries from `start` up to `stop`, in order."""
    indices = torch.arange(start, stop, device=view.device).unsqueeze(0)
    return view.slots(torch.tensor([seq_id], device=view.device), indices)[0]
